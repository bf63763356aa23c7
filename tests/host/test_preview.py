"""What the preview shows is what the encoder gets: caught at its first layer and un-normalised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import NARROW
from tests.host.test_encoding import POOLED, SIZE, clip_vision, pictures
from tests.synthetic import adapters, catalogue

pytestmark = pytest.mark.host

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(1, 3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(1, 3, 1, 1)
"""As OpenAI published them with CLIP."""

NEUTRAL = MEAN.flatten()


@pytest.fixture
def vision(host: Any) -> Any:
    return clip_vision()


@pytest.fixture
def adapter(host: Any, tmp_path: Path) -> Any:
    """It reads the pooled embedding, so no picture but the reference goes through the encoder."""
    path = adapters.write_safetensors(
        adapters.base_sd15(NARROW, features=POOLED), tmp_path / "base.safetensors"
    )
    return host.library("ip_adapter.host.adapters").load(path)


@contextmanager
def caught(vision: Any) -> Iterator[list[Tensor]]:
    """The pixels that reach the encoder, as colours, ``[N, S, S, 3]`` each."""
    seen: list[Tensor] = []

    def look(module: nn.Module, given: Any) -> None:
        seen.append((given[0].float().cpu() * STD + MEAN).movedim(1, -1))

    patches = vision.model.vision_model.embeddings.patch_embedding
    handle = patches.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def shown(host: Any, *inputs: Any, **more: Any) -> Tensor:
    found: Tensor = host.node("ImagePromptPreview").execute(*inputs, **more).result[0]
    return found


def words(host: Any, *inputs: Any, **more: Any) -> str:
    found: str = host.library("ip_adapter.host.viewing").view(*inputs, **more)[1]
    return found


@pytest.mark.parametrize("size", [0, 28, 56])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("fit", "height", "width", "count"),
    [
        ("crop", 40, 50, 2),
        ("pad", 40, 50, 2),
        ("pad", 90, 31, 2),
        ("tile", 31, 90, 6),
        ("tile", 28, 28, 2),
    ],
)
def test_the_squares_are_what_the_encoder_gets(
    host: Any,
    adapter: Any,
    vision: Any,
    fit: str,
    height: int,
    width: int,
    count: int,
    channels: int,
    size: int,
) -> None:
    image = pictures(2, height, width, channels)
    squares = shown(host, vision, image, fit, size)
    with caught(vision) as seen:
        host.node("ImagePromptEncode").execute(adapter, vision, image, fit, size)
    side = size or SIZE
    assert squares.shape == (count, side, side, 3)
    assert float((torch.cat(seen) - squares).abs().max()) < 1e-5


@pytest.mark.parametrize("fit", ["crop", "pad", "tile"])
def test_a_mask_hides_what_it_hides_from_the_encoder(
    host: Any, adapter: Any, vision: Any, fit: str
) -> None:
    image = pictures(1, 28, 84)
    mask = torch.zeros(7, 21)
    mask[:, 10:] = 1
    squares = shown(host, vision, image, fit, mask=mask)
    (references,) = (
        host.node("ImagePromptReference").execute(image, 1.0, fit, "positive", mask).result
    )
    with caught(vision) as seen:
        host.node("ImagePromptEncodeReferences").execute(adapter, vision, references, "concat")
    assert float((torch.cat(seen) - squares).abs().max()) < 1e-5
    open_ = shown(host, vision, image, fit)
    assert float((squares - open_).abs().max()) > 0.1
    left = squares[0, :, :4] if fit != "pad" else squares[0, 12:16, :4]
    assert float((left - NEUTRAL).abs().max()) < 0.5 / 255 + 1e-6
    right = slice(-4, None)
    assert torch.equal(squares[-1, :, right], open_[-1, :, right])


def test_colour_that_says_nothing_is_zero_to_the_encoder(host: Any, vision: Any) -> None:
    """Transparent pixels and padding are CLIP's mean, to 8 bit."""
    image = pictures(1, 20, 40, 4)
    image[..., 3] = 0
    squares = shown(host, vision, image, "pad")
    normalised = (squares.movedim(-1, 1) - MEAN) / STD
    assert float(normalised.abs().max()) <= 0.5 / 255 / float(STD.min()) + 1e-5


@pytest.mark.parametrize(
    ("fit", "height", "width", "size", "expected"),
    [
        ("crop", 100, 250, 0, ["1 square of 28 x 28 pixels", "40% of the picture", "to 28%"]),
        ("pad", 100, 250, 0, ["1 square", "all of the picture", "60% of the square is empty"]),
        ("tile", 100, 250, 0, ["3 squares", "all of the picture", "scaled to 28%"]),
        ("crop", 56, 56, 56, ["56 x 56 pixels", "all of the picture"]),
        ("crop", 14, 14, 0, ["enlarged 2 times", "a larger picture would say more"]),
        ("crop", 60, 60, 30, ["cannot be encoded: choose a multiple of 14"]),
    ],
)
def test_the_words_say_what_is_seen(
    host: Any, vision: Any, fit: str, height: int, width: int, size: int, expected: list[str]
) -> None:
    found = words(host, vision, pictures(1, height, width), fit, size or None)
    assert all(part in found for part in expected), found
    assert ("scaled" in found) == (min(height, width) > 28 and height != 56)


def test_the_words_count_what_is_hidden(host: Any, adapter: Any, vision: Any) -> None:
    mask = torch.ones(1, 30, 30)
    mask[:, :3] = 0
    found = words(host, vision, pictures(4, 30, 30), "crop", mask=mask, adapter=adapter)
    assert "4 squares" in found and "10% of each picture is hidden" in found
    assert found.endswith("4 image tokens each")


def test_sixteen_squares_are_shown_and_all_are_returned(host: Any, vision: Any) -> None:
    import folder_paths

    image = pictures(20, 28, 28)
    output = host.node("ImagePromptPreview").execute(vision, image, "crop")
    ui = output.ui.as_dict() if hasattr(output.ui, "as_dict") else output.ui
    assert len(output.result[0]) == 20 and len(ui["images"]) == 16
    last = ui["images"][-1]
    file = Path(folder_paths.get_temp_directory(), last["subfolder"], last["filename"])
    with Image.open(file) as saved:
        level = torch.tensor(saved.getpixel((5, 3))) / 255
    assert float((level - output.result[0][15, 3, 5]).abs().max()) < 1.5 / 255


def test_an_encoder_that_is_not_the_adapter_s_is_refused(host: Any, adapter: Any) -> None:
    other = clip_vision(projection_dim=2 * POOLED)
    error = host.library("ip_adapter.errors").IncompatibleModelError
    assert shown(host, other, pictures(1), "crop").shape == (1, SIZE, SIZE, 3)
    with pytest.raises(error, match="does not work with this image encoder"):
        shown(host, other, pictures(1), "crop", ip_adapter=adapter)


def test_a_face_adapter_reads_no_picture(host: Any, vision: Any, tmp_path: Path) -> None:
    errors = host.library("ip_adapter.errors")
    row = catalogue.ROWS["faceid_sd15"]
    path = adapters.write_safetensors(adapters.make(row, nano=True), tmp_path / "face.safetensors")
    face = host.library("ip_adapter.host.adapters").load(path)
    with pytest.raises(errors.IncompatibleModelError, match="reads faces"):
        shown(host, vision, pictures(1), "crop", ip_adapter=face)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_what_cannot_be_seen_is_refused(host: Any, vision: Any, fit: str) -> None:
    errors = host.library("ip_adapter.errors")
    with pytest.raises(errors.ImageError, match="is empty"):
        shown(host, vision, torch.zeros(1, 0, 8, 3), fit)
    with pytest.raises(errors.ImageError, match="0 everywhere"):
        shown(host, vision, pictures(1), fit, mask=torch.zeros(8, 8))
    with pytest.raises(errors.IncompatibleModelError, match="needed is a CLIP or SigLIP tower"):
        shown(host, nn.Identity(), pictures(1), fit)


def test_the_encoder_s_own_size_is_always_one_that_it_reads(host: Any) -> None:
    """SigLIP's 384 pixels are no multiple of its 14."""
    odd = clip_vision(image_size=40)
    assert "cannot be encoded" not in words(host, odd, pictures(1, 60, 60), "crop")
    assert "cannot be encoded" in words(host, odd, pictures(1, 60, 60), "crop", 41)
