"""Features of one row, as the host's frozen encoders make them.

The host is imported when a function is called; the encoders come in as its own objects.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import images
from ..encoders import FeatureKind
from ..errors import ImageError, IncompatibleModelError
from ..spec import FaceKind
from .pieces import DataError, Piece, load_picture, load_vector
from .store import fingerprint

CONTEXT = 77
"""Text states kept: the first window of a long text, as the published trainings cut it."""


def square(
    piece: Piece, size: int, fit: Literal["crop", "pad"], *, mirror: bool = False
) -> tuple[Tensor, Tensor]:
    """Read a picture and make it square.

    Args:
        piece: Where it is.
        size: Side in pixels.
        fit: ``"crop"``: the short side is resized to `size`, the centre is kept; or ``"pad"``.
        mirror: Whether to swap left and right.

    Returns:
        ``[1, 3, size, size]`` in 0..1, and int32 ``[6]``: height and width of the picture, top and
        left of the crop in the resized picture (0 when padded), height and width of the square.

    Raises:
        DataError: See `pieces.load_picture`.
    """
    picture = load_picture(piece)
    height, width = picture.shape[1:3]
    try:
        pixels = images.squares(picture, size, fit)
    except ImageError as error:
        raise DataError(f"'{piece}': {error}") from error
    top = left = 0
    if fit == "crop":
        scale = size / min(height, width)
        slack = round(scale * width) - size
        top, left = (round(scale * height) - size) // 2, slack // 2
        left = slack - left if mirror else left
    if mirror:
        pixels = pixels.flip(-1)
    return pixels, torch.tensor([height, width, top, left, size, size], dtype=torch.int32)


def latents(vae: Any, pixels: Tensor) -> Tensor:
    """``[1, 3, S, S]`` in 0..1 -> ``[C, S / 8, S / 8]``, as the host's VAE Encode gives them."""
    found: Tensor = vae.encode(pixels.movedim(1, -1))
    return found[0]


def text(clip: Any, words: str) -> dict[str, Tensor]:
    """A caption's states ``text`` ``[77, D]`` and, where there is one, ``pooled`` ``[E]``.

    A caption is no prompt: brackets in it are words, not weights.

    Raises:
        IncompatibleModelError: The text encoder gives fewer states.
    """
    plain = words.replace("(", r"\(").replace(")", r"\)")
    states, pooled = clip.encode_from_tokens(clip.tokenize(plain), return_pooled=True)
    if states.ndim != 3 or states.shape[1] < CONTEXT:
        raise IncompatibleModelError(
            f"clip gives text states of shape {list(states.shape)}; needed are {CONTEXT} per text. "
            "Connect the CLIP of an SD 1.5, SD 2 or SDXL checkpoint."
        )
    found = {"text": states[0, :CONTEXT]}
    return found if pooled is None else found | {"pooled": pooled[0]}


def picture(clip_vision: Any, pixels: Tensor, kind: FeatureKind) -> Tensor:
    """Features ``[E]`` or ``[P, W]`` of a square ``[1, 3, S, S]`` in 0..1."""
    from ..host import vision

    return vision.features(clip_vision, pixels, kind)[0]


def no_picture(clip_vision: Any, size: int, kind: FeatureKind) -> Tensor:
    """Features of no picture: zeros ``[E]``, or those of the zero picture ``[P, W]``."""
    from ..host import vision

    found = vision.zero_features(clip_vision, size, kind)[0]
    return torch.zeros_like(found) if kind == "pooled" else found


def face(piece: Piece, kind: FaceKind) -> Tensor:
    """A face vector ``[E]``, of length 1 or as the recogniser gave it.

    Raises:
        DataError: See `pieces.load_vector`.
    """
    vector = load_vector(piece)
    return F.normalize(vector, dim=0) if kind == "normed" else vector


def identify(holder: Any) -> str:
    """Tell the host's VAE, CLIP or CLIP_VISION by its weights and settings.

    A LoRA on a text encoder is told by an id of this session, so its states are made anew in the
    next one.
    """
    for name in ("first_stage_model", "cond_stage_model", "model"):
        module = getattr(holder, name, None)
        if isinstance(module, torch.nn.Module):
            break
    else:
        raise IncompatibleModelError(
            f"A {type(holder).__name__} is no encoder of the host. Needed are a VAE, a CLIP and a "
            "CLIP_VISION, as the loader nodes give them."
        )
    names = ("vae_dtype", "layer_idx", "tokenizer_options", "image_size", "image_mean", "image_std")
    settings = [f"{name}={getattr(holder, name)}" for name in names if hasattr(holder, name)]
    if holder.patcher.patches:
        settings.append(f"patches={holder.patcher.patches_uuid}")
    return " ".join([fingerprint(module), *settings])
