"""The geometry of tiles, against its formulas written out and against torchvision and Pillow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as torchvision
from PIL import Image
from torch import Tensor

from ip_adapter import tiles
from ip_adapter.errors import ImageError
from tests.tolerance import assert_close

SIZES = [
    (600, 600),  # square
    (500, 640),  # nearly square
    (640, 500),
    (300, 400),  # 0.75 is not nearly square any more
    (400, 300),
    (300, 500),  # wide
    (500, 300),  # tall
    (128, 470),
    (100, 400),  # four tiles side by side
    (100, 401),  # beyond: cut to four
    (900, 100),
    (64, 1000),
]


def picture(height: int, width: int, channels: int = 3, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    levels = torch.randint(0, 256, (batch, height, width, channels), generator=generator)
    return levels / 255


def by_hand(image: Tensor) -> Tensor:
    """``[1, H, W, 3]`` scaled by the rules of the old pack, with torchvision's crop."""
    pixels = image.movedim(-1, 1)
    height, width = pixels.shape[-2:]
    if 0.75 < height / width < 1.33:
        pixels = torchvision.center_crop(pixels, [min(height, width)] * 2)
        size = (512, 512)
    elif height < width:
        size = (int(256 * width / height), 256)
    else:
        size = (256, int(256 * height / width))
    levels = (pixels[0] * 255).round().byte().movedim(0, -1).numpy()
    out = torch.tensor(np.array(Image.fromarray(levels).resize(size, Image.Resampling.LANCZOS)))
    if height / width > 4:
        out = torchvision.center_crop(out.movedim(-1, 0), [1024, 256]).movedim(0, -1)
    if height / width < 0.25:
        out = torchvision.center_crop(out.movedim(-1, 0), [256, 1024]).movedim(0, -1)
    return out[None] / 255


def corners(length: int) -> list[int]:
    """The overlap is spread evenly between as few tiles as cover the side."""
    count = math.ceil(length / 256)
    overlap = (count * 256 - length) / (count - 1) if count > 1 else 0.0
    return [int(i * (256 - overlap)) for i in range(count)]


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_scaled_as_in_the_old_pack(size: tuple[int, int]) -> None:
    image = picture(*size)
    found = tiles.scale(image)
    assert torch.equal(found, by_hand(image))
    assert min(found.shape[1:3]) >= 256 and max(found.shape[1:3]) <= 1024


@pytest.mark.parametrize("size", SIZES)
def test_tiles_lie_where_their_masks_are(size: tuple[int, int]) -> None:
    scaled = by_hand(picture(*size))
    height, width = scaled.shape[1:3]
    found = tiles.cut(scaled, "add")
    places = [(top, left) for top in corners(height) for left in corners(width)]
    assert found.pictures.shape == (len(places), 1, 256, 256, 3)
    assert found.masks.shape == (len(places), height, width)
    for (top, left), piece, mask in zip(places, found.pictures, found.masks, strict=True):
        assert torch.equal(piece[0], scaled[0, top : top + 256, left : left + 256])
        inside = torch.zeros(height, width)
        inside[top : top + 256, left : left + 256] = 1
        assert torch.equal(mask, inside)


@pytest.mark.parametrize(
    ("size", "count"),
    [((600, 600), 4), ((500, 640), 4), ((300, 500), 2), ((128, 470), 4), ((64, 1000), 4)],
)
def test_there_are_as_few_tiles_as_cover_the_picture(size: tuple[int, int], count: int) -> None:
    assert len(tiles.cut(tiles.scale(picture(*size))).pictures) == count


@pytest.mark.parametrize("length", [256, 257, 300, 384, 511, 512, 513, 641, 767, 769, 1000, 1024])
@pytest.mark.parametrize("is_wide", [True, False])
def test_masks_cover_every_pixel(length: int, is_wide: bool) -> None:
    scaled = torch.zeros((1, 256, length, 3) if is_wide else (1, length, 256, 3))
    added = tiles.cut(scaled, "add").masks.sum(dim=0)
    assert float(added.min()) == 1 and float(added.max()) <= 2
    shared = tiles.cut(scaled, "share").masks
    assert_close(shared.sum(dim=0), torch.ones(scaled.shape[1:3]))


def test_overlaps_are_shared_or_added() -> None:
    scaled = torch.zeros(1, 256, 384, 3)  # 128 pixels in the middle belong to both
    left, right = torch.zeros(256, 384), torch.zeros(256, 384)
    left[:, :128], left[:, 128:256] = 1, 0.5
    right[:, 128:256], right[:, 256:] = 0.5, 1
    assert torch.equal(tiles.cut(scaled).masks, torch.stack((left, right)))
    added = tiles.cut(scaled, "add").masks.sum(dim=0)
    assert added[0].tolist() == [1] * 128 + [2] * 128 + [1] * 128


@pytest.mark.parametrize("size", SIZES)
def test_masks_follow_the_pictures_they_were_painted_on(size: tuple[int, int]) -> None:
    """A mask with the picture's brightness stays the picture's brightness, crops included."""
    ramp = torch.linspace(0.1, 0.9, size[1]) * torch.linspace(0.5, 1, size[0])[:, None]
    found = tiles.scale_mask(ramp, *size)
    expected = tiles.scale(ramp[None, :, :, None].expand(-1, -1, -1, 3))[..., 0]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 2 / 255  # another filter, in 8 bit


def test_masks_of_any_size_are_taken_as_stretched_over_the_picture() -> None:
    halves = torch.zeros(2, 60, 600)
    halves[0, :, :300], halves[1] = 1, 1
    found = tiles.scale_mask(halves, 100, 1000)
    assert found.shape == (2, 256, 1024)
    assert_close(found[0, :, :500], torch.ones(256, 500))
    assert_close(found[0, :, 524:] + 1, torch.ones(256, 500))
    assert_close(found[1], torch.ones(256, 1024))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures_keep_their_channels(channels: int) -> None:
    image = picture(300, 300, channels)
    if channels == 4:
        image[..., 3] = 1
    found = tiles.cut(tiles.scale(image)).pictures
    assert found.shape == (4, 1, 256, 256, channels)
    colour = tiles.cut(tiles.scale(image[..., :3].expand(-1, -1, -1, 3))).pictures
    assert_close(found[..., 0], colour[..., 0])


def test_every_picture_of_a_batch_is_cut_alike() -> None:
    batch = picture(300, 700, batch=3)
    together = tiles.cut(tiles.scale(batch))
    for i in range(3):
        alone = tiles.cut(tiles.scale(batch[i : i + 1]))
        assert torch.equal(together.pictures[:, i], alone.pictures[:, 0])
        assert torch.equal(together.masks, alone.masks)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ImageError, match="shape"):
        tiles.scale(torch.zeros(8, 8, 3))
    with pytest.raises(ImageError, match="100 x 300 pixels; needed for tiles are 256"):
        tiles.cut(torch.zeros(1, 300, 100, 3))
    with pytest.raises(ImageError, match="Unknown overlap 'blend'; needed is one of share, add"):
        tiles.cut(torch.zeros(1, 256, 256, 3), "blend")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="mask has shape"):
        tiles.scale_mask(torch.zeros(4), 30, 40)
