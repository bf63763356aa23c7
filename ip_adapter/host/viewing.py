"""Viewing: the squares that an image encoder reads of a picture, and what there is to say of them.

They come from the functions that encoding itself uses, so what is shown is what is read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import images
from ..references import masked
from . import reading, vision
from .adapters import LoadedAdapter


def view(
    clip_vision: Any,
    image: Tensor,
    fit: images.Fit,
    size: int | None = None,
    *,
    mask: Tensor | None = None,
    adapter: LoadedAdapter | None = None,
) -> tuple[Tensor, str]:
    """Show pictures as an encoder reads them.

    Args:
        clip_vision: The host's CLIP_VISION object, or `openclip.OpenCLIPVision`.
        image: ``[B, H, W, C]`` in 0..1.
        fit: How a picture that is not square is made so.
        size: Side of the square in pixels; the encoder's own unless given.
        mask: ``[H', W']`` or ``[M, H', W']``, the part that counts, or None for all of it.
        adapter: Whose encoder it has to be, or None for any.

    Returns:
        ``[N, S, S, 3]`` in 0..1, and a line about them.

    Raises:
        ImageError: See `images.squares` and `references.masked`.
        IncompatibleModelError: The encoder is none, or not the adapter's; or the adapter reads no
            picture.
    """
    if adapter is not None:
        reading.check(adapter, clip_vision)
    encoder = vision.require(clip_vision)
    images.check(image)
    seen = image if mask is None else masked(image, mask)
    squares = reading.squares(clip_vision, seen, fit, size)
    words = "; ".join(_words(seen, squares, fit))
    if squares.shape[-1] != clip_vision.image_size and squares.shape[-1] % encoder.patch:
        words += f"; it cannot be encoded: choose a multiple of {encoder.patch} pixels"
    if adapter is not None:
        words += f"; {adapter.spec.projection.tokens} image tokens each"
    return squares.movedim(1, -1), words


def _words(seen: Tensor, squares: Tensor, fit: images.Fit) -> list[str]:
    count, side = squares.shape[0], squares.shape[-1]
    height, width = seen.shape[1:3]
    each = "the picture" if len(seen) == 1 else "each picture"
    what = "square" if count == 1 else "squares"
    words = [f"{count} {what} of {side} x {side} pixels"]
    share = images.share(height, width, fit)
    words.append(f"{share:.0%} of {each}" if share < 1 else f"all of {each}")
    if fit == "pad" and height != width:
        empty = 1 - min(height, width) / max(height, width)
        words.append(f"{empty:.0%} of the square is empty")
    hidden = 1 - float(seen[..., 3].mean()) if seen.shape[-1] == 4 else 0.0
    if hidden > 0:
        words.append(f"{hidden:.0%} of {each} is hidden")
    zoom = images.zoom(height, width, side, fit)
    if zoom > 1:
        words.append(f"enlarged {zoom:.2g} times, so a larger picture would say more")
    elif zoom < 1:
        words.append(f"scaled to {zoom:.0%}")
    return words
