"""Pixels: from a picture of any size and aspect to the square that an image encoder reads.

The only home of CLIP's mean and standard deviation. Resizing follows CLIP's own preprocessing
(bicubic with antialiasing, values rounded to 8 bit), so that a centre crop gives the same numbers
as the host's CLIP Vision nodes.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ImageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Literal["crop", "pad", "tile"]
"""How a picture becomes square: ``crop`` keeps its centre, ``pad`` keeps all of it on neutral
ground, ``tile`` covers it with overlapping squares, each a reference of its own."""


def check(image: Tensor) -> None:
    """Refuse what cannot be a picture.

    Args:
        image: ``[B, H, W, C]``, values 0..1, C 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        ImageError: The tensor has another rank, no pixels, another number of channels, or values
            that are not finite.
    """
    shape = tuple(image.shape)
    if image.ndim != 4:
        raise ImageError(
            f"The reference image has shape {shape}; needed is [batch, height, width, channels]. "
            "Connect an IMAGE output, for example of a Load Image node."
        )
    if 0 in shape:
        raise ImageError(
            f"The reference image is empty (shape {shape}). Check the node that makes it: a crop "
            "or a selection may have left nothing."
        )
    if shape[-1] not in (1, 3, 4):
        raise ImageError(
            f"The reference image has {shape[-1]} channels; needed are 1 (grey), 3 (RGB) or "
            "4 (RGBA)."
        )
    if not bool(torch.isfinite(image).all()):
        raise ImageError(
            "The reference image has values that are not numbers (NaN or infinite). It is often "
            "the result of a VAE decode in float16 that overflowed: try a float32 VAE (start "
            "ComfyUI with --fp32-vae) or another picture."
        )


def flatten(image: Tensor) -> Tensor:
    """``[B, H, W, 1|3|4]`` -> ``[B, 3, H, W]``: transparent pixels become CLIP's mean colour.

    The mean colour is zero after normalisation, hence says nothing to the encoder.
    """
    pixels = image.movedim(-1, 1).float()
    if pixels.shape[1] == 1:
        return pixels.expand(-1, 3, -1, -1)
    if pixels.shape[1] == 3:
        return pixels
    colour, alpha = pixels[:, :3], pixels[:, 3:].clamp(0, 1)
    return colour * alpha + _neutral(pixels) * (1 - alpha)


def squares(image: Tensor, size: int, fit: Fit) -> Tensor:
    """Make pictures square and resize them to the encoder's input.

    Args:
        image: ``[B, H, W, C]``, values 0..1; see `check`.
        size: The encoder's input size in pixels.
        fit: What to do with a picture that is not square.

    Returns:
        ``[N, 3, size, size]``, values 0..1 in steps of 1/255. N is B, or B times the number of
        tiles, the tiles of one picture side by side.

    Raises:
        ImageError: See `check`; also a `fit` that does not exist.
    """
    check(image)
    if fit not in get_args(Fit):
        raise ImageError(f"Unknown fit {fit!r}; needed is one of {', '.join(get_args(Fit))}.")
    pixels = flatten(image)
    if fit == "pad":
        out = _pad(pixels, size)
    else:
        out = _cover(pixels, size, tiles=_tile_count(pixels) if fit == "tile" else 1)
    return out.clamp(0, 1).mul(255).round().div(255)


def zoom(height: int, width: int, size: int, fit: Fit) -> float:
    """The factor by which `squares` scales a picture; above 1 it has fewer pixels than are read."""
    return size / (max(height, width) if fit == "pad" else min(height, width))


def share(height: int, width: int, fit: Fit) -> float:
    """How much of a picture's area `squares` shows, 0..1."""
    return min(height, width) / max(height, width) if fit == "crop" else 1.0


def normalise(
    pixels: Tensor,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """``[N, 3, H, W]`` in 0..1 -> the encoder's pixel values, zero mean and unit variance."""
    channels = (1, -1, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(channels)) / pixels.new_tensor(std).view(channels)


def _neutral(like: Tensor) -> Tensor:
    return like.new_tensor(CLIP_MEAN).view(1, 3, 1, 1)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)


def _tile_count(pixels: Tensor) -> int:
    height, width = pixels.shape[-2:]
    return math.ceil(max(height, width) / min(height, width))


def _cover(pixels: Tensor, size: int, tiles: int) -> Tensor:
    """Scale the short side to `size` and take `tiles` squares, evenly spread over the long one."""
    height, width = pixels.shape[-2:]
    scale = zoom(height, width, size, "crop")
    scaled = _resize(pixels, round(scale * height), round(scale * width))
    height, width = scaled.shape[-2:]
    slack_y, slack_x = height - size, width - size
    if tiles == 1:
        corners = [(slack_y // 2, slack_x // 2)]
    else:
        corners = [
            (round(slack_y * i / (tiles - 1)), round(slack_x * i / (tiles - 1)))
            for i in range(tiles)
        ]
    cut = [scaled[..., y : y + size, x : x + size] for y, x in corners]
    return torch.stack(cut, dim=1).flatten(0, 1)  # [B, tiles, 3, S, S] -> [B*tiles, 3, S, S]


def _pad(pixels: Tensor, size: int) -> Tensor:
    """Scale the long side to `size` and centre the picture on CLIP's mean colour."""
    height, width = pixels.shape[-2:]
    scale = zoom(height, width, size, "pad")
    scaled = _resize(pixels, max(1, round(scale * height)), max(1, round(scale * width)))
    height, width = scaled.shape[-2:]
    top, left = (size - height) // 2, (size - width) // 2
    canvas = _neutral(pixels).expand(pixels.shape[0], -1, size, size).clone()
    canvas[..., top : top + height, left : left + width] = scaled
    return canvas
