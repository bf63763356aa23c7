"""More detail of a reference: its tiles are encoded apart, and their features become one set.

The grids of patch tokens of ``k x k`` tiles are laid side by side as the tiles lie in the picture,
and pooled back to the size of one grid; class tokens are averaged. A pooled embedding has no
places, so those of the tiles are averaged, which works for every width. (ComfyUI_IPAdapter_plus
folded the embedding into a square and pooled that: numbers that have nothing to do with each other
were mixed, and widths that are no square, such as 1280 and 768, failed.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def split(image: Tensor, count: int) -> Tensor:
    """Cut pictures into ``count x count`` equal tiles; what is left over at the end is dropped.

    Args:
        image: ``[B, H, W, C]``.
        count: Tiles in each direction; as many as there are pixels at most.

    Returns:
        ``[B*count*count, H // count, W // count, C]``, row by row, the tiles of one picture
        together.
    """
    batch, height, width, channels = image.shape
    count = min(count, height, width)
    height, width = height // count, width // count
    whole = image[:, : count * height, : count * width]
    tiles = whole.reshape(batch, count, height, count, width, channels).transpose(2, 3)
    return tiles.reshape(-1, height, width, channels)


def merge(features: Tensor, count: int) -> Tensor:
    """Make one set of features of those of the tiles of a picture.

    Args:
        features: ``[B*count*count, P, W]`` hidden states, or ``[B*count*count, E]`` pooled ones, of
            tiles in the order of `split`. P is a square number, and one more with a class token.
        count: Tiles in each direction.

    Returns:
        ``[B, P, W]`` or ``[B, E]``.
    """
    # [B, k*k, P, W] or [B, k*k, E]
    apart = features.reshape(-1, count * count, *features.shape[1:])
    if features.ndim == 2:
        return apart.mean(dim=1)
    patches, width = features.shape[1:]
    side = math.isqrt(patches)
    first = patches - side * side  # 1 with a class token, else 0
    grids = apart[:, :, first:].reshape(-1, count, count, side, side, width)
    stitched = grids.transpose(2, 3).reshape(-1, count * side, count * side, width)
    cells = stitched.reshape(-1, side, count, side, count, width)  # of k x k tokens each
    pooled = cells.mean(dim=(2, 4)).flatten(1, 2)  # [B, S*S, W]
    return torch.cat((apart[:, :, :first].mean(dim=1), pooled), dim=1)


def mix(whole: Tensor, tiled: Tensor, ratio: float) -> Tensor:
    """Blend the features of whole pictures with those of their tiles.

    Args:
        whole: ``[B, P, W]`` or ``[B, E]``.
        tiled: Like `whole`, from `merge`.
        ratio: The part of the whole, 0..1.
    """
    return ratio * whole + (1 - ratio) * tiled


def side_by_side(whole: Tensor, tiled: Tensor, ratio: float) -> Tensor:
    """Keep both as references of their own, the whole ones first and times the ratio.

    Args:
        whole: ``[B, P, W]`` or ``[B, E]``.
        tiled: Like `whole`, from `merge`.
        ratio: Factor of the whole ones; the tiled ones count fully.

    Returns:
        ``[2*B, P, W]`` or ``[2*B, E]``.
    """
    return torch.cat((ratio * whole, tiled))
