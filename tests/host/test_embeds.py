"""Embeds in the real host: our own nodes, and the host's folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ip_adapter import images
from tests.conftest import NARROW
from tests.host.conftest import draw, project
from tests.host.test_encoding import HIDDEN, POOLED, SIZE, clip_vision, pictures
from tests.synthetic import adapters, catalogue
from tests.tolerance import assert_close

pytestmark = pytest.mark.host


@pytest.fixture
def vision(host: Any) -> Any:
    return clip_vision()


@pytest.fixture
def library(host: Any) -> Any:
    return host.library("ip_adapter.host.embeds")


@pytest.fixture(params=["base", "plus"])
def adapter(request: pytest.FixtureRequest, host: Any, tmp_path: Path) -> Any:
    if request.param == "base":
        tensors = adapters.base_sd15(NARROW, features=POOLED)
    else:
        tensors = adapters.plus_sd15(NARROW, features=HIDDEN, inner=64, heads=1, depth=1)
    path = adapters.write_safetensors(tensors, tmp_path / request.param)
    return host.library("ip_adapter.host.adapters").load(path)


@pytest.fixture
def face_adapter(host: Any, tmp_path: Path) -> Any:
    parts = {
        "image_proj": catalogue.face_projection(768, 16),
        "ip_adapter": catalogue.key_values(NARROW, 768),
    }
    layout = {f"{part}.{k}": shape for part, keys in parts.items() for k, shape in keys.items()}
    path = adapters.write_safetensors(adapters.fill(layout), tmp_path / "portrait.safetensors")
    return host.library("ip_adapter.host.adapters").load(path)


@pytest.fixture
def folders(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The host's input and output folders, empty."""
    import folder_paths

    found = {}
    for name in ("input", "output"):
        found[name] = tmp_path / name
        found[name].mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(found[name]))
    return found


def is_pooled(adapter: Any) -> bool:
    return bool(adapter.spec.projection.image == "pooled")


def shape(adapter: Any, count: int) -> tuple[int, ...]:
    return (count, POOLED) if is_pooled(adapter) else (count, 5, HIDDEN)


def seen(adapter: Any, vision: Any, image: Tensor) -> Tensor:
    """The host's own encoding."""
    out = vision.encode_image(image)
    return out.image_embeds if is_pooled(adapter) else out.penultimate_hidden_states


def zero_image(adapter: Any, vision: Any) -> Tensor:
    """Of a picture whose normalised pixels are zero, as in training."""
    if is_pooled(adapter):
        return torch.zeros(1, POOLED)
    return vision.model(pixel_values=torch.zeros(1, 3, SIZE, SIZE), intermediate_output=-2)[1]


def prompt_of(host: Any, adapter: Any, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Features to tokens, one picture after the other, written out."""
    return (
        project(host, adapter, image=positive).flatten(0, 1)[None],
        project(host, adapter, image=negative).flatten(0, 1)[None],
    )


def test_the_two_nodes_do_what_encode_does(host: Any, adapter: Any, vision: Any) -> None:
    image = pictures(3)
    encode, back, direct = (
        host.node(name)
        for name in ("ImagePromptEmbeds", "ImagePromptFromEmbeds", "ImagePromptEncode")
    )
    found, negative = encode.execute(adapter, vision, image, "crop").args
    assert_close(found, seen(adapter, vision, image))
    assert_close(negative, zero_image(adapter, vision))
    for batch in ("together", "one per frame"):
        wanted = direct.execute(adapter, vision, image, "crop", batch=batch).args[0]
        for extra in ({"negative": negative}, {"clip_vision": vision}):
            made = back.execute(adapter, found, "concat", batch, **extra).args[0]
            assert (made.frames, made.adapter) == (wanted.frames, adapter.fingerprint)
            assert torch.equal(made.conditional, wanted.conditional)
            assert torch.equal(made.unconditional, wanted.unconditional)


def test_fit_makes_a_row_for_each_tile(host: Any, adapter: Any, vision: Any) -> None:
    found, _ = (
        host.node("ImagePromptEmbeds").execute(adapter, vision, pictures(2, 28, 56), "tile").args
    )
    assert len(found) == 4


@pytest.mark.parametrize("how", ["average", "add", "subtract", "norm average", "max", "min"])
def test_embeds_are_combined_before_the_projection(
    host: Any, adapter: Any, vision: Any, how: str
) -> None:
    given, negative = draw(*shape(adapter, 3)), draw(*shape(adapter, 2), seed=1)

    def mixed(x: Tensor) -> Tensor:
        match how:
            case "average":
                return sum(x) / len(x)  # type: ignore[return-value]
            case "add":
                return sum(x)  # type: ignore[return-value]
            case "subtract":
                return x[0] - sum(x[1:]) / (len(x) - 1)
            case "norm average":
                return sum(row / sum(other**2 for other in x) ** 0.5 for row in x) / len(x)  # type: ignore[return-value]
            case "max":
                return torch.stack(list(x)).max(dim=0).values
            case _:
                return torch.stack(list(x)).min(dim=0).values

    node = host.node("ImagePromptFromEmbeds")
    made = node.execute(adapter, given, how, "together", negative=negative).args[0]
    positive, nothing = prompt_of(host, adapter, mixed(given)[None], mixed(negative)[None])
    assert_close(made.conditional, positive)
    assert_close(made.unconditional, nothing)
    framed = node.execute(adapter, given, how, "one per frame", negative=negative[:1]).args[0]
    assert framed.frames == 3  # each is for a picture of its own, so nothing is combined
    for i in range(3):
        assert_close(framed.conditional[i : i + 1], project(host, adapter, image=given[i : i + 1]))


def test_a_stack_brings_its_own_negative(host: Any, adapter: Any, vision: Any) -> None:
    cond, zeroed = draw(*shape(adapter, 2)), draw(*shape(adapter, 2), seed=1)
    other = draw(*shape(adapter, 1), seed=2)
    node = host.node("ImagePromptFromEmbeds")
    stacked = torch.stack((cond, zeroed))
    made = node.execute(adapter, stacked, "concat", "together").args[0]
    positive, nothing = prompt_of(host, adapter, cond, zeroed)
    assert_close(made.conditional, positive)
    assert_close(made.unconditional, nothing)
    led = node.execute(adapter, stacked, "concat", "together", negative=other).args[0]
    assert_close(led.unconditional, project(host, adapter, image=other).repeat(1, 2, 1))


def test_what_is_missing_is_named(host: Any, adapter: Any, vision: Any) -> None:
    node = host.node("ImagePromptFromEmbeds")
    given = draw(*shape(adapter, 1))
    if is_pooled(adapter):
        made = node.execute(adapter, given, "concat", "together").args[0]
        assert_close(made.unconditional, project(host, adapter, image=torch.zeros(1, POOLED)))
    else:
        with pytest.raises(Exception, match="neither negative embeds nor clip_vision") as caught:
            node.execute(adapter, given, "concat", "together")
        assert type(caught.value).__name__ == "IncompatibleModelError"
        other = clip_vision(hidden_size=HIDDEN // 2)
        with pytest.raises(Exception, match="does not work with this image encoder"):
            node.execute(adapter, given, "concat", "together", clip_vision=other)
    with pytest.raises(Exception, match="The embeds have shape"):
        node.execute(adapter, given[..., 1:], "concat", "together")
    with pytest.raises(Exception, match="The negative embeds have shape"):
        node.execute(adapter, given, "concat", "together", negative=given[..., 1:])


def test_an_adapter_s_own_encoder_serves(host: Any, adapter: Any, vision: Any) -> None:
    import dataclasses

    given = draw(*shape(adapter, 1))
    loaded = dataclasses.replace(adapter, clip_vision=vision)
    made = host.node("ImagePromptFromEmbeds").execute(loaded, given, "concat", "together").args[0]
    nothing = project(host, adapter, image=zero_image(adapter, vision))
    assert_close(made.unconditional, nothing)


def test_face_vectors_are_embeds_too(host: Any, face_adapter: Any) -> None:
    given = draw(2, 512)
    unit = given / given.pow(2).sum(-1, keepdim=True).sqrt()
    node = host.node("ImagePromptFromEmbeds")
    for form in (given, given[:, None], unit):
        made = node.execute(face_adapter, form, "concat", "together").args[0]
        tokens = project(host, face_adapter, face=unit)
        assert_close(made.conditional, tokens.flatten(0, 1)[None])
        nobody = project(host, face_adapter, face=torch.zeros(1, 512))
        assert_close(made.unconditional, nobody.repeat(1, 2, 1))
    with pytest.raises(Exception, match="Leave the negative embeds unconnected"):
        node.execute(face_adapter, given, "concat", "together", negative=given)
    with pytest.raises(Exception, match="Use Encode Face Prompt"):
        host.node("ImagePromptEmbeds").execute(face_adapter, clip_vision(), pictures(1), "crop")


def masked(adapter: Any, vision: Any, image: Tensor, mask: Tensor) -> Tensor:
    """The host's own preprocessing, its normalised pixels times the mask, its tower."""
    import comfy.clip_model

    pixels = comfy.clip_model.clip_preprocess(image, size=SIZE) * mask[:, None]
    _, hidden, pooled, *_ = vision.model(pixel_values=pixels, intermediate_output=-2)
    return pooled if is_pooled(adapter) else hidden


@pytest.mark.parametrize("count", [1, 2])
def test_a_mask_multiplies_normalised_pixels(
    adapter: Any, vision: Any, library: Any, count: int
) -> None:
    image = pictures(2, 40, 50)
    soft = torch.rand(count, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    found = library.read_masked(adapter, vision, image, soft)
    assert_close(found, masked(adapter, vision, image, soft))
    none = library.read_masked(adapter, vision, image, torch.zeros(1, 64, 64))
    blank = zero_image(adapter, vision)
    if not is_pooled(adapter):
        assert_close(none, blank.expand(2, -1, -1))
    whole = library.read_masked(adapter, vision, image, torch.ones(1, 90, 30))
    assert_close(whole, seen(adapter, vision, image))


def test_a_mask_is_cut_to_its_own_square(adapter: Any, vision: Any, library: Any) -> None:
    """Against torchvision-like steps written out: centre crop, bicubic with antialiasing."""
    mask = torch.rand(1, 57, 84, generator=torch.Generator().manual_seed(4))
    top, left = 0, 14  # (84 - 57) / 2 = 13.5, to the even neighbour
    cut = mask[:, top : top + 57, left : left + 57]
    sized = torch.nn.functional.interpolate(
        cut[:, None], (SIZE, SIZE), mode="bicubic", antialias=True
    )[:, 0]
    found = library.read_masked(adapter, vision, pictures(1), mask)
    assert_close(found, masked(adapter, vision, pictures(1), sized))


def test_masks_that_cannot_serve_are_refused(
    adapter: Any, face_adapter: Any, vision: Any, library: Any
) -> None:
    with pytest.raises(Exception, match="not numbers for this picture and mask"):
        library.read_masked(adapter, vision, pictures(1), torch.full((1, 8, 8), float("nan")))
    with pytest.raises(Exception, match="Use Encode Face Prompt"):
        library.read_masked(face_adapter, vision, pictures(1), torch.ones(1, 8, 8))


@pytest.mark.parametrize("side", [SIZE, 4 * SIZE])
def test_masks_of_our_own_references_agree(host: Any, side: int) -> None:
    """Where mask and picture are of one size: up to 8-bit rounding, and the mask's very edge."""
    import comfy.clip_model

    image, mask = pictures(1, side, side), torch.zeros(1, side, side)
    mask[:, :, : side // 2] = 1
    own = host.library("ip_adapter.references").masked(image, mask)
    ours = images.normalise(images.squares(own, SIZE, "crop"))
    small = mask[:, :: side // SIZE, :: side // SIZE]
    theirs = comfy.clip_model.clip_preprocess(image, size=SIZE) * small
    apart = (ours - theirs).abs()
    rounding = 0.5 / 255 / min(images.CLIP_STD) + 1e-6  # of one pixel, normalised
    if side == SIZE:
        assert float(apart.max()) <= rounding
    edge = SIZE // 2  # the resize reads two pixels of its result to each side
    assert float(apart[..., : edge - 2].max()) <= rounding
    assert float(apart[..., edge + 2 :].max()) <= rounding
    assert float(theirs.abs().max()) > 0.5


def test_files_are_listed_and_found(library: Any, folders: dict[str, Path]) -> None:
    assert library.names() == []
    inputs, outputs = folders["input"], folders["output"]
    (inputs / "below").mkdir()
    for path in (inputs / "b.ipadpt", inputs / "below" / "a.ipadpt", inputs / "c.png"):
        torch.save(draw(1, 8), path)
    torch.save(draw(1, 8, seed=1), outputs / "d.ipadpt")
    assert library.names() == ["b.ipadpt", os.path.join("below", "a.ipadpt")]
    assert library.find("below/a.ipadpt") == inputs / "below" / "a.ipadpt"
    assert library.find("d.ipadpt [output]") == outputs / "d.ipadpt"
    for name in ("d.ipadpt", "c.png", "", "below", "../output/d.ipadpt", str(outputs / "d.ipadpt")):
        with pytest.raises(Exception, match=r"which has b\.ipadpt") as caught:
            library.find(name)
        assert type(caught.value).__name__ == "MissingFileError"
        assert library.stamp(name) == "missing"


def test_new_files_are_numbered_as_the_host_does(library: Any, folders: dict[str, Path]) -> None:
    outputs = folders["output"]
    assert library.new_file("IP_embeds") == outputs / "IP_embeds_00001.ipadpt"
    for number in range(1, 8):  # older hosts fill gaps
        torch.save(draw(1, 8), outputs / f"IP_embeds_{number:05}.ipadpt")
    assert library.new_file("IP_embeds") == outputs / "IP_embeds_00008.ipadpt"
    assert library.new_file("sub/x") == outputs / "sub" / "x_00001.ipadpt"
    with pytest.raises(Exception, match="outside the output folder"):
        library.new_file("../x")
