"""Regions: several image prompts on one picture, each with a place, a weight and an influence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks, retouch, tiles
from .influence import Influence
from .prompt import ImagePrompt


@dataclass(frozen=True, eq=False)
class Region:
    """One image prompt and where it acts.

    Attributes:
        prompt: What to attend to.
        mask: ``[H, W]`` or ``[M, H, W]`` in image space, or None for the whole picture.
        weight: The paper's lambda.
        influence: More of how strongly, where and when, or None.
    """

    prompt: ImagePrompt
    mask: Tensor | None = None
    weight: float = 1.0
    influence: Influence | None = None

    def __deepcopy__(self, memo: object) -> Region:
        return self


def intersect(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Where both masks let an image prompt act.

    Args:
        first: ``[H, W]`` or ``[M, H, W]``, of any size, or None for everywhere.
        second: Like `first`.

    Returns:
        ``[M, H, W]``, the product at the larger height and width; the last mask of the shorter
        list serves the pictures that come after. None where neither is given.

    Raises:
        ImageError: See `masks.check`.
    """
    given = [masks.check(one).float() for one in (first, second) if one is not None]
    if len(given) < 2:
        return given[0] if given else None
    size = [max(sides) for sides in zip(*(one.shape[-2:] for one in given), strict=True)]
    count = max(map(len, given))
    a, b = (_as_many(_resized(one, size), count) for one in given)
    return a * b


def tile(image: Tensor, sharpening: float = 0.0, overlap: tiles.Overlap = "share") -> tiles.Tiles:
    """Scale, sharpen and cut pictures into tiles.

    Args:
        image: ``[B, H, W, C]`` in 0..1.
        sharpening: See `retouch.sharpen`; 0 is none.
        overlap: See `tiles.cut`.

    Raises:
        ImageError: See `images.check` and `tiles.cut`.
    """
    scaled = tiles.scale(image)
    if sharpening > 0:
        colour, alpha = scaled[..., :3], scaled[..., 3:]
        scaled = torch.cat((retouch.sharpen(colour, sharpening), alpha), dim=-1)
    return tiles.cut(scaled, overlap)


def _resized(mask: Tensor, size: list[int]) -> Tensor:
    if list(mask.shape[-2:]) == size:
        return mask
    return F.interpolate(mask[:, None], size=size, mode="area")[:, 0]


def _as_many(mask: Tensor, count: int) -> Tensor:
    return torch.cat((mask, mask[-1:].expand(count - len(mask), -1, -1)))
