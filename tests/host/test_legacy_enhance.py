"""The old enhancer nodes against torch's adaptive pooling of the host's own features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.host.conftest import Sampler, draw, project
from tests.host.test_encoding import HIDDEN, POOLED, SIZE, clip_vision, pictures
from tests.synthetic import adapters
from tests.synthetic.catalogue import widths
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

GRID = SIZE // 14


@pytest.fixture(scope="module")
def vision(host: Any) -> Any:
    with torch.inference_mode():
        return clip_vision()


@pytest.fixture(scope="module", params=["base", "plus"])
def adapter(
    request: pytest.FixtureRequest, host: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    sizes = widths("SD 1.5", nano=True)
    if request.param == "base":
        tensors = adapters.base_sd15(sizes, features=POOLED)
    else:
        tensors = adapters.plus_sd15(sizes, features=HIDDEN, inner=64, heads=1, depth=1)
    path = tmp_path_factory.mktemp("adapter") / request.param
    with torch.inference_mode():
        adapters.write_safetensors(tensors, path)
        return host.library("ip_adapter.host.adapters").load(path)


def read(vision: Any, adapter: Any, image: Tensor) -> Tensor:
    out = vision.encode_image(image)
    if adapter.spec.projection.image == "pooled":
        return out.image_embeds
    return out.penultimate_hidden_states


def tiled(vision: Any, adapter: Any, one: Tensor, count: int) -> Tensor:
    """Features of a picture ``[1, H, W, 3]`` by its tiles."""
    height, width = one.shape[1] // count, one.shape[2] // count
    tiles = [
        one[:, y * height : (y + 1) * height, x * width : (x + 1) * width]
        for y in range(count)
        for x in range(count)
    ]
    features = torch.cat([read(vision, adapter, tile) for tile in tiles])
    if adapter.spec.projection.image == "pooled":
        return features.mean(dim=0, keepdim=True)
    grids = features[:, 1:].reshape(-1, GRID, GRID, HIDDEN).permute(0, 3, 1, 2)
    lines = [torch.cat(list(grids[y * count : (y + 1) * count]), dim=2) for y in range(count)]
    pooled = F.adaptive_avg_pool2d(torch.cat(lines, dim=1)[None], (GRID, GRID))
    patches = pooled.permute(0, 2, 3, 1).reshape(1, GRID * GRID, HIDDEN)
    return torch.cat((features[:, :1].mean(dim=0, keepdim=True), patches), dim=1)


def no_image(vision: Any, adapter: Any, like: Tensor) -> Tensor:
    if adapter.spec.projection.image == "pooled":
        return torch.zeros_like(like[:1])
    return read(vision, adapter, torch.zeros(1, SIZE, SIZE, 3))


def enhanced(host: Any, model: Any, adapter: Any, vision: Any, image: Tensor, **more: Any) -> Any:
    given = {
        "weight": 0.7,
        "weight_type": "linear",
        "combine_embeds": "concat",
        "start_at": 0.0,
        "end_at": 1.0,
        "embeds_scaling": "V only",
        "enhance_tiles": 2,
        "enhance_ratio": 1.0,
    } | more
    node = host.node("IPAdapterClipVisionEnhancer")
    return node.execute(model, adapter, image, **given, clip_vision=vision).args[0]


def batched(host: Any, model: Any, adapter: Any, vision: Any, image: Tensor, **more: Any) -> Any:
    given = {
        "weight": 0.7,
        "weight_type": "linear",
        "start_at": 0.0,
        "end_at": 1.0,
        "embeds_scaling": "V only",
        "enhance_tiles": 2,
        "enhance_ratio": 0.5,
        "encode_batch_size": 0,
    } | more
    node = host.node("IPAdapterClipVisionEnhancerBatch")
    return node.execute(model, adapter, image, **given, clip_vision=vision).args[0]


def prompt_of(model: Any) -> Any:
    (entry,) = model.model_options["transformer_options"]["image_prompts"]
    return entry.prompt


@pytest.mark.parametrize(
    ("size", "count", "ratio"), [((61, 93), 2, 1.0), ((84, 84), 3, 0.4), ((57, 33), 2, 0.0)]
)
def test_one_picture_is_itself_and_its_tiles(
    host: Any,
    model: Any,
    vision: Any,
    adapter: Any,
    size: tuple[int, int],
    count: int,
    ratio: float,
) -> None:
    image = pictures(1, *size)
    whole, tiles = read(vision, adapter, image), tiled(vision, adapter, image, count)
    given = {"enhance_tiles": count, "enhance_ratio": ratio}
    both = torch.cat((ratio * whole, tiles))
    apart = prompt_of(enhanced(host, model, adapter, vision, image, **given))
    tokens = project(host, adapter, image=both)
    assert_close(apart.conditional, tokens.flatten(0, 1)[None], 1e-5)
    nothing = project(host, adapter, image=no_image(vision, adapter, whole))
    assert_close(apart.unconditional, nothing.repeat(1, 2, 1), 1e-5)
    given["combine_embeds"] = "average"
    joined = prompt_of(enhanced(host, model, adapter, vision, image, **given))
    tokens = project(host, adapter, image=(ratio * whole + tiles) / 2)
    assert_close(joined.conditional, tokens, 1e-5)


def test_several_pictures_are_blended_with_their_tiles(
    host: Any, model: Any, vision: Any, adapter: Any, sample: Sampler
) -> None:
    image, ratio = pictures(3, 70, 64), 0.3
    whole = read(vision, adapter, image)
    tiles = torch.cat([tiled(vision, adapter, one[None], 2) for one in image])
    tokens = project(host, adapter, image=ratio * whole + (1 - ratio) * tiles)
    patched = enhanced(host, model, adapter, vision, image, enhance_ratio=ratio)
    assert_close(prompt_of(patched).conditional, tokens.flatten(0, 1)[None], 1e-5)
    assert relative_error(sample(patched), sample(model)) > 1e-3
    framed = batched(host, model, adapter, vision, image, enhance_ratio=ratio)
    assert_close(prompt_of(framed).conditional, tokens, 1e-5)
    # One picture for the whole batch is blended as well.
    alone = prompt_of(batched(host, model, adapter, vision, image[:1], enhance_ratio=ratio))
    assert_close(alone.conditional, tokens[:1], 1e-5)


def test_the_negative_has_no_tiles(host: Any, model: Any, vision: Any, adapter: Any) -> None:
    negative = 1 - pictures(1, 90, 60)
    made = prompt_of(enhanced(host, model, adapter, vision, pictures(2), image_negative=negative))
    tokens = project(host, adapter, image=read(vision, adapter, negative))
    assert_close(made.unconditional, tokens.repeat(1, 2, 1), 1e-5)


def test_one_tile_is_the_plain_node(
    host: Any, model: Any, vision: Any, adapter: Any, sample: Sampler
) -> None:
    image, noise = pictures(2), draw(2, 4, 8, 8)
    plain = host.node("IPAdapterAdvanced").execute(
        *(model, adapter, image, 0.7, "linear", "concat", 0.0, 1.0, "V only"), clip_vision=vision
    )
    same = enhanced(host, model, adapter, vision, image, enhance_tiles=1, enhance_ratio=0.2)
    assert torch.equal(sample(same), sample(plain.args[0]))
    framed = batched(host, model, adapter, vision, image, enhance_tiles=1, weight=[0.5, 0.0])
    found = sample(framed, noise=noise)
    assert_close(found[1], sample(model, noise=noise)[1], 1e-4)
    assert relative_error(found[0], sample(model, noise=noise)[0]) > 1e-3


def test_more_tiles_than_pixels(host: Any, model: Any, vision: Any, adapter: Any) -> None:
    image = pictures(1, 5, 40)
    made = prompt_of(enhanced(host, model, adapter, vision, image, enhance_tiles=16))
    tokens = project(host, adapter, image=tiled(vision, adapter, image, 5))
    assert_close(made.conditional[:, tokens.shape[1] :], tokens, 1e-5)


def test_memory_does_not_grow_with_the_batch(
    host: Any, model: Any, vision: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are read picture by picture."""
    seen: list[int] = []
    reading = host.library("ip_adapter.host.reading")
    read_all = reading.read

    def spy(adapter: Any, vision: Any, image: Tensor, fit: str) -> Tensor:
        seen.append(len(image))
        return read_all(adapter, vision, image, fit)

    monkeypatch.setattr(reading, "read", spy)
    batched(host, model, adapter, vision, pictures(4), enhance_tiles=3)
    assert seen == [4, 9, 9, 9, 9]


def test_the_encoder_must_be_there(host: Any, model: Any, adapter: Any) -> None:
    with pytest.raises(Exception, match="clip_vision is not connected") as caught:
        enhanced(host, model, adapter, None, pictures(1))
    assert type(caught.value).__name__ == "IncompatibleModelError"
