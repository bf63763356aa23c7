"""Tiles: a large, wide or tall reference as up to four squares, each for its part of the picture.

A square picture of twice an encoder's size shows four times the detail of one that is scaled down
to it. The geometry is that of ComfyUI_IPAdapter_plus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import images, masks
from .errors import ImageError

SIDE = 256
"""Side of a tile, in pixels; an image encoder scales it to its own size."""

MOST = 4
"""Tiles along the long side of a picture, at most; the rest of it is cut off on both ends."""

NEARLY_SQUARE = (0.75, 1.33)
"""Heights to widths between which a picture is cropped to a square, of two by two tiles."""

Overlap = Literal["share", "add"]
"""What happens where tiles overlap: they share the strength, or each acts with all of it, as in
ComfyUI_IPAdapter_plus, where two tiles act twice as strongly there."""

OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)


@dataclass(frozen=True, eq=False)
class Tiles:
    """A picture, or a batch of them, in pieces.

    Attributes:
        pictures: ``[N, B, 256, 256, C]``, the tiles from left to right and from top to bottom.
        masks: ``[N, h, w]``, where each acts, in proportion to the whole picture.
    """

    pictures: Tensor
    masks: Tensor


def scale(image: Tensor) -> Tensor:
    """Crop and scale pictures to the size that is cut into tiles.

    A picture that is nearly square becomes a square of 512 pixels. The short side of any other
    becomes 256 pixels, and of a long side beyond 1024 the middle is kept.

    Args:
        image: ``[B, H, W, C]`` in 0..1; see `images.check`.

    Returns:
        ``[B, h, w, C]`` in steps of 1/255.

    Raises:
        ImageError: See `images.check`.
    """
    images.check(image)
    kept, size = _frame(*image.shape[1:3])
    return _centre(_lanczos(_centre(image, *kept), *size), MOST * SIDE, MOST * SIDE)


def scale_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Crop and scale masks as `scale` does the pictures they were painted on.

    Args:
        mask: ``[H', W']`` or ``[M, H', W']``, of any size.
        height: Of the pictures before they were scaled.
        width: Of the pictures before they were scaled.

    Returns:
        ``[M, h, w]``; edges ring a little, as bicubic filters do.

    Raises:
        ImageError: See `masks.check`.
    """
    kept, size = _frame(height, width)
    part = _centre(_bicubic(masks.check(mask)[..., None].float(), height, width), *kept)
    return _centre(_bicubic(part, *size), MOST * SIDE, MOST * SIDE)[..., 0]


def cut(scaled: Tensor, overlap: Overlap = "share") -> Tiles:
    """Cut pictures into as few tiles as cover them, evenly spread.

    Args:
        scaled: ``[B, h, w, C]``, neither side below 256; what `scale` returns.
        overlap: What happens where tiles overlap.

    Raises:
        ImageError: The picture is smaller than a tile, or there is no such `overlap`.
    """
    height, width = scaled.shape[1:3]
    if min(height, width) < SIDE:
        raise ImageError(
            f"The picture is {width} x {height} pixels; needed for tiles are {SIDE} on each side. "
            "Scale it up first."
        )
    if overlap not in OVERLAPS:
        raise ImageError(f"Unknown overlap {overlap!r}; needed is one of {', '.join(OVERLAPS)}.")
    places = [
        (slice(top, top + SIDE), slice(left, left + SIDE))
        for top in _starts(height)
        for left in _starts(width)
    ]
    where = scaled.new_zeros(len(places), height, width)
    for mask, place in zip(where, places, strict=True):
        mask[place] = 1
    if overlap == "share":
        where = where / where.sum(dim=0)
    return Tiles(torch.stack([scaled[:, rows, columns] for rows, columns in places]), where)


def _frame(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The height and width of the middle that is kept of a picture, and what it is scaled to."""
    if NEARLY_SQUARE[0] < height / width < NEARLY_SQUARE[1]:
        short = min(height, width)
        return (short, short), (2 * SIDE, 2 * SIDE)
    if height < width:
        return (height, width), (SIDE, int(SIDE * width / height))
    return (height, width), (int(SIDE * height / width), SIDE)


def _starts(length: int) -> list[int]:
    """The first pixel of each of the tiles that cover a side."""
    count = math.ceil(length / SIDE)
    return [i * (length - SIDE) // max(count - 1, 1) for i in range(count)]


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of ``[B, H, W, C]``; sides that are shorter stay as they are."""
    height, width = min(height, image.shape[1]), min(width, image.shape[2])
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def _lanczos(image: Tensor, height: int, width: int) -> Tensor:
    """Resize ``[B, H, W, C]`` with Pillow, in 8 bit; torch has no such filter."""
    # Truncated, as the host saves pictures and the old pack made them.
    levels = image.clamp(0, 1).mul(255).byte().cpu()
    if levels.shape[-1] == 1:
        levels = levels[..., 0]
    sized = [
        np.array(Image.fromarray(one.numpy()).resize((width, height), Image.Resampling.LANCZOS))
        for one in levels
    ]
    out = torch.from_numpy(np.stack(sized)).to(image.device, torch.float32) / 255
    return out if out.ndim == 4 else out[..., None]


def _bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """Resize ``[B, H, W, C]`` with antialiasing."""
    if image.shape[1:3] == (height, width):
        return image
    pixels = image.movedim(-1, 1)
    sized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return sized.movedim(1, -1)
