"""Pictures made ready by hand: cropped at a side, sharpened, or turned to noise to lead away from.

The numbers are those of PrepImageForClipVision and IPAdapterNoise of ComfyUI_IPAdapter_plus. The
sharpening is contrast-adaptive (AMD FidelityFX CAS).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import images
from .errors import ImageError

Position = Literal["top", "bottom", "left", "right", "center", "pad"]
"""Which square of a picture is kept; ``pad`` keeps all of it on a ground."""

Resample = Literal["LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST"]
"""Pillow's filters."""

Noise = Literal["fade", "dissolve", "gaussian", "shuffle"]
"""How noise meets a picture: ``fade`` mixes it in, ``dissolve`` replaces single values by it,
``gaussian`` adds it, ``shuffle`` also warps the picture and turns it upside down."""

SIDE = 224
"""Pixels of the square that most image encoders see."""

SEEDS = 1_000_000_007


def sharpen(image: Tensor, amount: float) -> Tensor:
    """Sharpen where the contrast is low, and hardly where it is high, so that edges get no halo.

    Each value e is weighed against its four neighbours: ``(e + w * (b + d + f + h)) / (1 + 4w)``.
    With m and M the sums of the least and of the greatest value of the cross and of the diagonal,
    ``w = -sqrt(min(m, 2 - M) / M) * (1/8 + amount * (1/5 - 1/8))``.

    Args:
        image: ``[B, H, W, C]``, values 0..1.
        amount: 0 leaves the picture as it is; just above is a little, 1 the most.

    Returns:
        ``[B, H, W, C]``, values 0..1. The outermost pixels, which lack neighbours, stay.
    """
    height, width = image.shape[1:3]
    if amount <= 0 or height < 3 or width < 3:
        return image
    shifted = [
        [image[:, y : height - 2 + y, x : width - 2 + x] for x in range(3)] for y in range(3)
    ]
    centre = shifted[1][1]
    sides = [shifted[0][1], shifted[1][0], shifted[1][2], shifted[2][1]]
    corners = [shifted[0][0], shifted[0][2], shifted[2][0], shifted[2][2]]
    cross_low, cross_high = _bounds([centre, *sides])
    corner_low, corner_high = _bounds(corners)
    low, high = cross_low + corner_low, cross_high + corner_high
    room = torch.minimum(low, 2 - high) / high.clamp(min=torch.finfo(high.dtype).tiny)
    weight = -room.sqrt() * (1 / 8 + amount * (1 / 5 - 1 / 8))
    out = image.clamp(0, 1)
    out[:, 1:-1, 1:-1] = ((sum(sides) * weight + centre) / (1 + 4 * weight)).clamp(0, 1)
    return out


def prepare(
    image: Tensor,
    resample: Resample = "LANCZOS",
    position: Position = "center",
    size: int = SIDE,
    sharpening: float = 0.0,
    ground: float | tuple[float, ...] = 0.0,
) -> Tensor:
    """Make pictures square and small by hand, instead of leaving it to the encoder.

    Args:
        image: ``[B, H, W, C]``, values 0..1; see `images.check`. C stays.
        resample: Pillow's filter.
        position: Which square is kept.
        size: Side of the result in pixels.
        sharpening: See `sharpen`; after the resize.
        ground: What ``pad`` puts around the picture, one value or one for each channel.

    Returns:
        ``[B, size, size, C]`` in steps of 1/255, unless sharpened.

    Raises:
        ImageError: See `images.check`; also a position or a filter that does not exist.
    """
    images.check(image)
    if position not in get_args(Position):
        raise ImageError(
            f"Unknown crop position {position!r}; needed is one of {', '.join(get_args(Position))}."
        )
    if resample not in get_args(Resample):
        raise ImageError(
            f"Unknown filter {resample!r}; needed is one of {', '.join(get_args(Resample))}."
        )
    square = _surround(image, ground) if position == "pad" else _cut(image, position)
    # Truncated, as the host saves pictures and the old pack made them.
    levels = square.clamp(0, 1).mul(255).byte().cpu().numpy()
    scaled = np.stack([_resize(one, size, resample) for one in levels])
    return sharpen(torch.from_numpy(scaled).to(image.device, torch.float32) / 255, sharpening)


def noise(image: Tensor | None, kind: Noise, strength: float, blur: int = 0) -> Tensor:
    """Make a picture of noise, as a negative reference; the same for the same picture.

    Args:
        image: ``[B, H, W, C]``, values 0..1, whose centre square is used; None for a black one.
        kind: How the noise meets the picture.
        strength: 0..1, the share of the noise.
        blur: Width in pixels of a Gaussian blur over all, made odd; 0 for none.

    Returns:
        ``[B, 224, 224, C]``, values 0..1.

    Raises:
        ImageError: See `images.check`; also a kind that does not exist.
    """
    start = torch.zeros(1, SIDE, SIDE, 3) if image is None else _centre(image)
    generator = torch.Generator().manual_seed(int(start.sum().item()) % SEEDS)

    # torch draws in the order in which a picture lies in memory; so the old pack's noise did.
    def uniform() -> Tensor:
        return torch.empty_like(start).uniform_(generator=generator)

    def normal(like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=generator)

    match kind:
        case "fade":
            out = start * (1 - strength) + uniform() * strength
        case "dissolve":
            replaced = uniform() < strength
            out = torch.where(replaced, uniform(), start)
        case "gaussian":
            out = start + normal(start) * strength
        case "shuffle":
            warped = _warp(start.movedim(-1, 1), generator, blur=(1 - strength) * 3.5)
            turned = warped.flip(2, 3).movedim(1, -1)
            # Each flip of the old pack drew a number, whether to flip, before always flipping.
            torch.rand(2, generator=generator)
            grain = normal(turned) * (strength * 0.75)
            out = turned * (1 - grain) + grain
        case _:
            raise ImageError(
                f"Unknown noise {kind!r}; needed is one of {', '.join(get_args(Noise))}."
            )
    out = out.clamp(0, 1)
    if blur > 0:
        width = blur | 1
        out = _blur(out.movedim(-1, 1), width, 0.15 * width + 0.35).movedim(1, -1)
    return out if image is None else out.to(image.device)


def _bounds(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(values)
    return stacked.amin(0).clamp(min=0), stacked.amax(0).clamp(max=1)


def _cut(image: Tensor, position: str) -> Tensor:
    """``[B, H, W, C]`` -> ``[B, S, S, C]`` with the shorter side as S."""
    height, width = image.shape[1:3]
    side = min(height, width)
    top = {"top": 0, "bottom": height - side}.get(position, (height - side) // 2)
    left = {"left": 0, "right": width - side}.get(position, (width - side) // 2)
    return image[:, top : top + side, left : left + side]


def _surround(image: Tensor, ground: float | tuple[float, ...]) -> Tensor:
    """Put equal bars at two sides; of an odd difference one pixel is left, and stretched later."""
    batch, height, width, channels = image.shape
    top, left = max(0, width - height) // 2, max(0, height - width) // 2
    shape = (batch, height + 2 * top, width + 2 * left, channels)
    canvas = image.new_tensor(ground).expand(shape).clone()
    canvas[:, top : top + height, left : left + width] = image
    return canvas


def _resize(levels: np.ndarray, size: int, resample: Resample) -> np.ndarray:
    """``[H, W, C]`` of bytes -> ``[size, size, C]``."""
    channels = levels.shape[-1]
    picture = Image.fromarray(levels[..., 0] if channels == 1 else levels)
    scaled = picture.resize((size, size), resample=Image.Resampling[resample])
    return np.asarray(scaled).reshape(size, size, channels)


def _centre(image: Tensor) -> Tensor:
    """``[B, H, W, C]`` -> ``[B, 224, 224, C]`` on the CPU; values may pass 0 and 1 a little."""
    images.check(image)
    height, width = image.shape[1:3]
    side = min(height, width)
    # torchvision's corner of a centre crop, which rounds halves to even
    top, left = round((height - side) / 2), round((width - side) / 2)
    pixels = image[:, top : top + side, left : left + side].movedim(-1, 1).cpu().float()
    if side != SIDE:
        pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return pixels.movedim(1, -1)


def _warp(pixels: Tensor, generator: torch.Generator, blur: float) -> Tensor:
    """Move each pixel by up to 75/2 pixels at random, the neighbours alike after a blur.

    Args:
        pixels: ``[B, C, S, S]``.
        generator: Of random numbers.
        blur: Standard deviation in pixels of the blur of the moves; 0 for none.
    """
    side = pixels.shape[-1]
    moves = torch.rand((2, 1, side, side), generator=generator) * 2 - 1
    if blur > 0:
        moves = _blur(moves, int(8 * blur + 1) | 1, blur)
    places = torch.linspace(-1 + 1 / side, 1 - 1 / side, side)
    across = places.expand(side, side) + moves[0, 0] * (75 / side)
    down = places[:, None].expand(side, side) + moves[1, 0] * (75 / side)
    grid = torch.stack((across, down), -1).expand(len(pixels), -1, -1, -1)  # [B, S, S, 2]
    # Beyond the border is black, faded to it twice: by the sample, and by how much of it is inside.
    inside = torch.ones_like(pixels[:, :1])
    sampled = F.grid_sample(torch.cat((pixels, inside), 1), grid, align_corners=False)
    return sampled[:, :-1] * sampled[:, -1:]


def _blur(pixels: Tensor, width: int, deviation: float) -> Tensor:
    """Blur ``[N, C, H, W]`` by a Gaussian of this width and standard deviation, both in pixels.

    The kernel is torchvision's, which spreads its points over 1/sqrt(2) of the width.
    """
    reach = (width - 1) / (2 * math.sqrt(2))
    points = torch.linspace(-reach, reach, width).to(pixels)
    kernel = (-((points / deviation) ** 2)).softmax(0).expand(pixels.shape[1], 1, 1, width)
    half = width // 2
    padded = F.pad(pixels, (half, half, half, half), mode="reflect")
    rows = F.conv2d(padded, kernel, groups=pixels.shape[1])
    return F.conv2d(rows, kernel.mT, groups=pixels.shape[1])
