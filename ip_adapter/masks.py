"""Masks: from image space to the token grid of a latent of any size and aspect.

A mask says where in the picture an image prompt acts: 1 fully, 0 not at all. It is averaged over
the area that each latent pixel, and then each token, covers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .errors import ImageError


def check(mask: Tensor) -> Tensor:
    """Return the mask as ``[M, H, W]``, or refuse it.

    Args:
        mask: ``[H, W]`` or ``[M, H, W]``, values 0..1; M is 1, or one mask per picture.

    Raises:
        ImageError: Another rank, or no pixels.
    """
    shape = tuple(mask.shape)
    if mask.ndim not in (2, 3):
        raise ImageError(
            f"The mask has shape {shape}; needed is [height, width] or [batch, height, width]. "
            "Connect a MASK output; turn an IMAGE into one with Convert Image to Mask."
        )
    if 0 in shape:
        raise ImageError(f"The mask is empty (shape {shape}). Check the node that makes it.")
    return mask if mask.ndim == 3 else mask[None]


def to_latent(mask: Tensor, height: int, width: int) -> Tensor:
    """Average a mask ``[M, H, W]`` over the cells of a latent: ``[M, 1, height, width]``."""
    return F.interpolate(mask[:, None].float(), size=(height, width), mode="area")


def to_tokens(mask: Tensor, height: int, width: int) -> Tensor:
    """Average a latent-sized mask ``[M, 1, h, w]`` over a layer's token grid.

    Returns:
        ``[M, height*width, 1]``, one factor per latent token.
    """
    return F.interpolate(mask, size=(height, width), mode="area").flatten(2).movedim(1, 2)
