"""Encoding on the host's CLIP Vision class, with a tower small enough to be quick."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ip_adapter import images
from tests.conftest import NARROW
from tests.host.conftest import draw, project
from tests.synthetic import adapters
from tests.tolerance import assert_close

pytestmark = pytest.mark.host

HIDDEN, POOLED, SIZE = 64, 32, 28
CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "image_size": SIZE,
    "patch_size": 14,
    "num_channels": 3,
    "projection_dim": POOLED,
}


def clip_vision(**changes: Any) -> Any:
    import comfy.clip_vision

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # older hosts want a path
        json.dump({**CONFIG, **changes}, file)
        file.flush()
        vision = comfy.clip_vision.ClipVisionModel(file.name)
    generator = torch.Generator().manual_seed(0)
    for parameter in vision.model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return vision


@pytest.fixture
def vision(host: Any) -> Any:
    return clip_vision()


@pytest.fixture(params=["base", "plus"])
def adapter(request: pytest.FixtureRequest, host: Any, tmp_path: Path) -> Any:
    if request.param == "base":
        tensors = adapters.base_sd15(NARROW, features=POOLED)
    else:
        tensors = adapters.plus_sd15(NARROW, features=HIDDEN, inner=64, heads=1, depth=1)
    path = adapters.write_safetensors(tensors, tmp_path / request.param)
    return host.library("ip_adapter.host.adapters").load(path)


@pytest.fixture
def encode(host: Any) -> Any:
    return host.library("ip_adapter.host.encoding").encode


def pictures(count: int, height: int = 40, width: int = 50, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, height, width, channels, generator=generator)


def expected(host: Any, adapter: Any, vision: Any, image: Tensor) -> Tensor:
    """The host's own encoding of an image, through the adapter's projection."""
    out = vision.encode_image(image)
    if adapter.spec.projection.image == "pooled":
        return project(host, adapter, image=out.image_embeds)
    return project(host, adapter, image=out.penultimate_hidden_states)


def test_crop_is_the_hosts_own_preprocessing(host: Any) -> None:
    import comfy.clip_model

    for height, width in ((40, 50), (28, 28), (31, 97), (200, 29), (17, 17)):
        image = pictures(1, height, width)
        theirs = comfy.clip_model.clip_preprocess(image, size=SIZE)
        ours = images.normalise(images.squares(image, SIZE, "crop"))
        assert torch.equal(ours, theirs), (height, width)


def test_conditional_tokens_are_the_projected_features(
    host: Any, adapter: Any, vision: Any, encode: Any
) -> None:
    image = pictures(3)
    tokens = expected(host, adapter, vision, image)
    found = encode(adapter, vision, image, "crop")
    assert_close(found.conditional, tokens.flatten(0, 1)[None], relative=1e-5)
    assert found.adapter == adapter.fingerprint


def test_unconditional_tokens_come_from_the_zero_image(
    host: Any, adapter: Any, vision: Any, encode: Any
) -> None:
    """Zero embedding for pooled features, zero *normalised* pixels for patch features."""
    found = encode(adapter, vision, pictures(2), "crop").unconditional
    if adapter.spec.projection.image == "pooled":
        zero = torch.zeros(1, POOLED)
    else:
        zero = vision.model(pixel_values=torch.zeros(1, 3, SIZE, SIZE), intermediate_output=-2)[1]
    tokens = project(host, adapter, image=zero)
    assert_close(found, tokens.repeat(1, 2, 1), relative=1e-5)
    assert float(tokens.abs().max()) > 0


def test_the_unconditional_side_may_be_a_black_picture(
    host: Any, adapter: Any, vision: Any, encode: Any
) -> None:
    """Adapters that read the pooled embedding keep the zero embedding."""
    trained = encode(adapter, vision, pictures(1), "crop")
    for _ in range(2):  # the second time it is remembered
        black = encode(adapter, vision, pictures(1), "crop", unconditional="black picture")
        if adapter.spec.projection.image == "pooled":
            assert torch.equal(black.unconditional, trained.unconditional)
        else:
            own = expected(host, adapter, vision, torch.zeros(1, SIZE, SIZE, 3))
            assert_close(black.unconditional, own, relative=1e-5)
            assert not torch.equal(black.unconditional, trained.unconditional)
        assert torch.equal(black.conditional, trained.conditional)


def test_the_zero_image_is_encoded_once_per_encoder(
    adapter: Any, vision: Any, encode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = vision.model.forward

    def count(**arguments: Any) -> Any:
        seen.append(len(arguments["pixel_values"]))
        return forward(**arguments)

    monkeypatch.setattr(vision.model, "forward", count)
    first = encode(adapter, vision, pictures(1), "crop")
    once = len(seen)
    again = encode(adapter, vision, 1 - pictures(1), "crop")
    assert len(seen) == once + 1
    assert torch.equal(first.unconditional, again.unconditional)
    assert not torch.equal(first.conditional, again.conditional)


def test_many_references_are_encoded_in_chunks(
    host: Any, adapter: Any, vision: Any, encode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pictures(7)
    whole = encode(adapter, vision, image, "crop")
    monkeypatch.setattr(host.library("ip_adapter.host.vision"), "CHUNK", 2)
    assert_close(encode(adapter, vision, image, "crop").conditional, whole.conditional)


@pytest.mark.parametrize("fit", ["crop", "pad", "tile"])
def test_alpha_is_accepted(adapter: Any, vision: Any, encode: Any, fit: images.Fit) -> None:
    image = pictures(1, 20, 60, channels=4)
    image[..., 3] = 1
    with_alpha = encode(adapter, vision, image, fit)
    assert_close(with_alpha.conditional, encode(adapter, vision, image[..., :3], fit).conditional)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 8, 8, 3), float("nan")), "not numbers"),
        (torch.zeros(0, 8, 8, 3), "empty"),
        (torch.zeros(8, 8, 3), "shape"),
    ],
)
def test_bad_images_are_refused(
    adapter: Any, vision: Any, encode: Any, image: Tensor, message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        encode(adapter, vision, image, "crop")
    assert type(caught.value).__name__ == "ImageError"


def test_an_encoder_that_overflows_is_noticed(
    host: Any, adapter: Any, vision: Any, encode: Any
) -> None:
    vision.model.vision_model.embeddings.class_embedding.fill_(float("nan"))
    with pytest.raises(Exception, match="--fp32-text-enc"):
        encode(adapter, vision, pictures(1), "crop")
    assert vision not in host.library("ip_adapter.host.reading")._empty  # nothing half-made


def test_references_count_by_weight_and_role(
    host: Any, adapter: Any, vision: Any, encode: Any
) -> None:
    """Against the host's own encoding of each picture, weighed and averaged by hand."""
    references = host.library("ip_adapter.references")
    encoding = host.library("ip_adapter.host.encoding")
    sizes = ((40, 50), (31, 97), (64, 28))
    shown = [pictures(1, *size) for size in sizes]
    kind = "image_embeds" if adapter.spec.projection.image == "pooled" else None
    read = [
        getattr(vision.encode_image(picture), kind or "penultimate_hidden_states")
        for picture in shown
    ]
    given = [
        references.Reference(shown[0], weight=0.5),
        references.Reference(shown[1], weight=2.0),
        references.Reference(shown[2], is_negative=True),
    ]
    found = encoding.encode_references(adapter, vision, given, "average")
    mixed = (0.5 * read[0] + 2.0 * read[1]) / 2
    assert_close(found.conditional, project(host, adapter, image=mixed), relative=1e-5)
    assert_close(found.unconditional, project(host, adapter, image=read[2]), relative=1e-5)

    apart = encoding.encode_references(adapter, vision, given)
    tokens = project(host, adapter, image=torch.cat([0.5 * read[0], 2.0 * read[1]]))
    assert_close(apart.conditional, tokens.flatten(0, 1)[None], relative=1e-5)
    alone = encoding.encode_references(adapter, vision, given[:1])
    one = references.Reference(shown[0])
    plain = encode(adapter, vision, shown[0], "crop")
    same = encoding.encode_references(adapter, vision, [one], "max")
    assert torch.equal(same.conditional, plain.conditional)
    assert torch.equal(same.unconditional, plain.unconditional)
    assert not torch.equal(alone.conditional, plain.conditional)
    with pytest.raises(Exception, match="All references are negative"):
        encoding.encode_references(adapter, vision, given[2:])


@pytest.mark.parametrize("fit", ["crop", "tile"])
def test_a_batch_may_be_one_reference_per_frame(
    adapter: Any, vision: Any, encode: Any, fit: images.Fit
) -> None:
    image = pictures(3, 30, 60)
    made = encode(adapter, vision, image, fit, per_frame=True)
    assert made.frames == 3
    for i in range(3):
        own = encode(adapter, vision, image[i : i + 1], fit)
        assert_close(made.conditional[i], own.conditional[0], relative=1e-5)
        assert_close(made.unconditional, own.unconditional, relative=1e-5)


def test_reference_nodes_chain(host: Any, adapter: Any, vision: Any, encode: Any) -> None:
    add, encode_all = (
        host.node(name) for name in ("ImagePromptReference", "ImagePromptEncodeReferences")
    )
    first = add.execute(pictures(1), 1.0, "crop", "positive").args[0]
    both = add.execute(pictures(2, 30, 60), 1.0, "pad", "positive", references=first).args[0]
    assert len(first) == 1 and len(both) == 2  # the first chain is not changed by the second
    found = encode_all.execute(adapter, vision, both, "concat").args[0]
    assert found.tokens == 3 * adapter.spec.projection.tokens
    left = torch.zeros(40, 50)
    left[:, :25] = 1
    half = add.execute(pictures(1), 1.0, "crop", "positive", mask=left).args[0]
    masked = encode_all.execute(adapter, vision, half, "concat").args[0]
    by_hand = pictures(1)
    by_hand[:, :, 25:] = torch.tensor(images.CLIP_MEAN)
    expected = encode(adapter, vision, by_hand, "crop").conditional
    assert_close(masked.conditional, expected, relative=1e-4)


def geometry(hidden: int, pooled: int) -> Any:
    """An encoder of real width, without weights: enough to be refused."""
    vision = clip_vision(num_hidden_layers=0)
    vision.model.vision_model.post_layernorm = nn.LayerNorm(hidden)
    vision.model.visual_projection = nn.Linear(hidden, pooled, bias=False)
    return vision


@pytest.mark.parametrize(
    ("make", "width", "given", "message"),
    [
        (
            adapters.base_sd15,
            1024,
            (1664, 1280),
            "needed is OpenCLIP ViT-H/14 .* is OpenCLIP ViT-bigG",
        ),
        (
            adapters.base_sd15,
            1280,
            (1280, 1024),
            "needed is OpenCLIP ViT-bigG/14 .* OpenCLIP ViT-H/14",
        ),
        (
            adapters.plus_sd15,
            1280,
            (1664, 1280),
            "needed is OpenCLIP ViT-H/14 .* is OpenCLIP ViT-bigG",
        ),
        (adapters.plus_sd15, 1280, (1024, 768), "needed is OpenCLIP ViT-H/14 .* is CLIP ViT-L/14"),
    ],
)
def test_the_wrong_encoder_is_refused_before_any_work(
    host: Any,
    encode: Any,
    tmp_path: Path,
    make: Any,
    width: int,
    given: tuple[int, int],
    message: str,
) -> None:
    path = adapters.write_safetensors(make(NARROW, features=width), tmp_path / "a.safetensors")
    adapter = host.library("ip_adapter.host.adapters").load(path)
    with pytest.raises(Exception, match=message) as caught:
        encode(adapter, geometry(*given), pictures(1), "crop")
    assert type(caught.value).__name__ == "IncompatibleModelError"


def test_what_is_no_clip_tower_is_refused(adapter: Any, encode: Any) -> None:
    class Other:
        model = nn.Linear(1, 1)

    with pytest.raises(Exception, match="is a Linear, not a CLIP image encoder"):
        encode(adapter, Other(), pictures(1), "crop")


def test_adapter_weights_are_the_hosts_to_manage(host: Any, adapter: Any) -> None:
    import comfy.model_management as management

    adapter.load()
    assert any(loaded.model is adapter.patcher for loaded in management.current_loaded_models)
    assert adapter.patcher.model_size() == sum(
        tensor.numel() * tensor.element_size() for tensor in adapter.module.state_dict().values()
    )
    management.unload_all_models()
    assert not any(loaded.model is adapter.patcher for loaded in management.current_loaded_models)
    assert_close(project(host, adapter, image=features(adapter)), features_of(adapter))


@pytest.mark.parametrize("make", [adapters.base_sd15, adapters.plus_sd15])
def test_adapters_load_whole_under_dynamic_vram(
    host: Any, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the host's layers are built without parameters and get them from the state dict."""
    import comfy.memory_management as memory

    tensors = make(NARROW)
    path = adapters.write_safetensors(tensors, tmp_path / "a.safetensors")
    load = host.library("ip_adapter.host.adapters").load
    plain = load(path)
    monkeypatch.setattr(memory, "aimdo_enabled", True, raising=False)
    dynamic = load(path)
    assert set(dynamic.module.state_dict()) == set(tensors)
    assert all(
        torch.equal(value, tensors[key]) for key, value in dynamic.module.state_dict().items()
    )
    assert dynamic.fingerprint == plain.fingerprint
    shape = (1, 1024) if plain.spec.projection.image == "pooled" else (1, 257, 1280)
    given = draw(*shape)
    assert_close(project(host, dynamic, image=given), project(host, plain, image=given))


def features(adapter: Any) -> Tensor:
    shape = (2, POOLED) if adapter.spec.projection.image == "pooled" else (2, 5, HIDDEN)
    return draw(*shape)


def features_of(adapter: Any) -> Tensor:
    """The same projection built of torch's own layers, without the host."""
    from ip_adapter.projections import build_projection

    plain = build_projection(_spec(adapter), nn)
    plain.load_state_dict(
        {key: value.float() for key, value in adapter.module.image_proj.state_dict().items()}
    )
    return plain(features(adapter))


def _spec(adapter: Any) -> Any:
    """The host's copy of the library has classes of its own; say the same with ours."""
    import dataclasses

    from ip_adapter import spec

    kind = getattr(spec, type(adapter.spec.projection).__name__)
    return kind(**dataclasses.asdict(adapter.spec.projection))
