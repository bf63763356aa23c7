"""References: pictures with a weight, a mask and a role, and how several become one.

They are combined as features of the image encoder, before the projection. ``concat`` leaves them
apart: each becomes tokens of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import images, masks
from .errors import ImageError

Combine = Literal["concat", "average", "norm average", "add", "subtract", "max", "min"]
"""How several references become one; the names are those of ComfyUI_IPAdapter_plus."""

Unconditional = Literal["as trained", "black picture"]
"""What stands for "no image" where features are hidden states: those of a picture whose normalised
pixels are zero (a uniform grey, as in training), or of a black one (as ComfyUI_IPAdapter_plus)."""

UNCONDITIONALS: tuple[Unconditional, ...] = get_args(Unconditional)

COMBINATIONS: tuple[Combine, ...] = get_args(Combine)


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture, or a batch of them, and how it counts.

    Attributes:
        image: ``[B, H, W, C]`` in 0..1.
        weight: Factor of its features.
        fit: How a picture that is not square is made so.
        is_negative: Whether it is what to lead away from, instead of what to lead to.
    """

    image: Tensor
    weight: float = 1.0
    fit: images.Fit = "crop"
    is_negative: bool = False


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """Let only a part of a picture speak: the rest becomes transparent.

    Args:
        image: ``[B, H, W, C]`` in 0..1.
        mask: ``[H', W']`` or ``[M, H', W']`` of any size; M is 1 or B.

    Returns:
        ``[B, H, W, 4]``.

    Raises:
        ImageError: See `images.check` and `masks.check`; or there are as many masks as pictures
            neither once nor for each, or the mask hides everything.
    """
    images.check(image)
    alpha = masks.check(mask).to(image)
    if len(alpha) not in (1, len(image)):
        raise ImageError(
            f"There are {len(alpha)} masks for {len(image)} pictures; needed is one, or one for "
            "each."
        )
    if not bool((alpha > 0).any()):
        raise ImageError(
            "The mask of the reference is 0 everywhere, so nothing of the picture would count. "
            "Load Image gives such a mask for a picture without transparency: paint one in the "
            "mask editor, or leave mask unconnected."
        )
    height, width = image.shape[1:3]
    sized = F.interpolate(alpha[:, None].float(), size=(height, width), mode="bilinear")
    alpha = sized.movedim(1, -1).clamp(0, 1).expand(len(image), -1, -1, -1)
    colour = image[..., :3].expand(-1, -1, -1, 3)
    if image.shape[-1] == 4:
        alpha = alpha * image[..., 3:]
    return torch.cat((colour, alpha), dim=-1)


def combine(features: Tensor, how: Combine) -> Tensor:
    """Make one set of features of those of N pictures.

    Args:
        features: ``[N, E]`` or ``[N, P, W]``.
        how: ``norm average`` divides by the norm over the pictures, each number on its own;
            ``subtract`` takes the mean of the others from the first.

    Returns:
        One row; N rows for ``concat`` and where there is one picture only.
    """
    if how == "concat" or len(features) == 1:
        return features
    return _WAYS[how](features)[None]


def _subtract(features: Tensor) -> Tensor:
    return features[0] - features[1:].mean(dim=0)


def _norm_average(features: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(features, dim=0, keepdim=True)
    return torch.mean(features / norms.clamp(min=1e-12), dim=0)


_WAYS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "average": lambda features: features.mean(dim=0),
    "norm average": _norm_average,
    "add": lambda features: features.sum(dim=0),
    "subtract": _subtract,
    "max": lambda features: features.amax(dim=0),
    "min": lambda features: features.amin(dim=0),
}
