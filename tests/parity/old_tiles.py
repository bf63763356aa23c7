"""How ComfyUI_IPAdapter_plus cuts a large reference into tiles; see `old_pack`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def tiles(image: Tensor, mask: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Cut ``[B, H, W, 3]`` into squares of 256, each with the mask ``[M, H', W']`` of its place."""
    height, width = image.shape[1:3]
    mask = torch.ones(1, height, width) if mask is None else mask
    where = F.interpolate(mask[:, None], (height, width), mode="bicubic", antialias=True)
    pictures = image.movedim(-1, 1)
    if 0.75 < height / width < 1.33:
        side = min(height, width)
        pictures, where = _centre(pictures, side, side), _centre(where, side, side)
        size = (512, 512)
    elif height < width:
        size = (256, int(256 * width / height))
    else:
        size = (int(256 * height / width), 256)
    pictures = torch.stack([_resize(one, size) for one in pictures])
    where = F.interpolate(where, size, mode="bicubic", antialias=True)
    if not 0.25 <= height / width <= 4:
        longest = (256, 1024) if height < width else (1024, 256)
        pictures, where = _centre(pictures, *longest), _centre(where, *longest)
    out = []
    for top in _starts(pictures.shape[2]):
        for left in _starts(pictures.shape[3]):
            part = (..., slice(top, top + 256), slice(left, left + 256))
            place = torch.zeros_like(where[:, 0])
            place[part] = where[:, 0][part]
            out.append((pictures[part].movedim(1, -1), place))
    return out


def _starts(side: int) -> list[int]:
    """Where the tiles along a side begin; what they overlap is spread evenly."""
    count = math.ceil(side / 256)
    overlap = (count * 256 - side) / max(1, count - 1)
    return [int(i * (256 - overlap)) for i in range(count)]


def _centre(x: Tensor, height: int, width: int) -> Tensor:
    top, left = round((x.shape[-2] - height) / 2), round((x.shape[-1] - width) / 2)
    return x[..., top : top + height, left : left + width]


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """``[3, H, W]`` through Pillow's Lanczos filter, in 8 bit."""
    pixels = (picture * 255).byte().movedim(0, -1).numpy()
    found = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS)
    rows = torch.tensor(list(found.tobytes()), dtype=torch.float32)
    return rows.reshape(*size, 3).movedim(-1, 0) / 255
