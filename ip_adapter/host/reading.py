"""Reading on the host: pictures -> the features that an adapter's projection wants."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import images
from ..encoders import ENCODERS, Encoder, FeatureKind
from ..errors import ImageError, IncompatibleModelError
from ..references import Unconditional
from ..spec import AdapterSpec
from . import vision
from .adapters import LoadedAdapter
from .kept import Kept, digest, size_of

_features: Kept[Tensor] = Kept(64 << 20, size_of)
"""By encoder; its tens of pictures."""

_empty: WeakKeyDictionary[Any, dict[tuple[Unconditional, int], Tensor]] = WeakKeyDictionary()
"""Hidden features of "no image" per encoder, kind and picture size, ``[1, P, W]``; constants."""


def read(
    adapter: LoadedAdapter,
    clip_vision: Any,
    image: Tensor,
    fit: images.Fit,
    size: int | None = None,
    progress: Any = None,
) -> Tensor:
    """The features that an adapter reads of pictures.

    Args:
        adapter: Whose kind of features.
        clip_vision: See `encoding.encode`.
        image: ``[B, H, W, C]`` in 0..1.
        fit: How a picture that is not square is made so.
        size: See `encoding.encode`.
        progress: See `vision.features`.

    Returns:
        ``[N, E]`` or ``[N, P, W]``.

    Raises:
        ImageError: See `encoding.encode`.
        IncompatibleModelError: The encoder is not the one this adapter was trained with.
    """
    check(adapter, clip_vision)
    seen = squares(clip_vision, image, fit, size)
    return read_squares(adapter, clip_vision, seen, progress=progress)


def squares(clip_vision: Any, image: Tensor, fit: images.Fit, size: int | None = None) -> Tensor:
    """What an encoder is shown of pictures, before its normalisation.

    Args:
        clip_vision: See `encoding.encode`.
        image: ``[B, H, W, C]`` in 0..1.
        fit: How a picture that is not square is made so.
        size: See `encoding.encode`.

    Returns:
        ``[N, 3, S, S]`` in 0..1; see `images.squares`.

    Raises:
        ImageError: See `images.squares`.
    """
    return images.squares(image, size or int(clip_vision.image_size), fit)


def read_squares(
    adapter: LoadedAdapter,
    clip_vision: Any,
    pixels: Tensor,
    what: str = "picture",
    progress: Any = None,
) -> Tensor:
    """The features that an adapter reads of pictures that are as the encoder wants them.

    Args:
        adapter: Whose kind of features.
        clip_vision: Its encoder; see `check_encoder`.
        pixels: ``[N, 3, S, S]`` in 0..1.
        what: What they are, for messages.
        progress: See `vision.features`.

    Returns:
        ``[N, E]`` or ``[N, P, W]``.

    Raises:
        ImageError: The encoder returns values that are not numbers.
        IncompatibleModelError: The adapter reads no picture.
    """
    kind = _kind(adapter)

    def run() -> Tensor:
        features = vision.features(clip_vision, pixels, kind, progress)
        if not bool(torch.isfinite(features).all()):
            raise ImageError(
                f"The image encoder returned values that are not numbers for this {what}. It "
                "overflows in float16 on some GPUs: start ComfyUI with --fp32-text-enc and try "
                "again."
            )
        return features

    return _features.get(clip_vision, (kind, digest(pixels)), run)


def no_image(
    adapter: LoadedAdapter,
    clip_vision: Any,
    like: Tensor,
    unconditional: Unconditional,
    size: int | None = None,
) -> Tensor:
    """The features of "no image": a zero embedding, or the hidden states of an empty picture.

    Args:
        adapter: Whose kind of features.
        clip_vision: See `encoding.encode`.
        like: Features of a picture, for their width and device.
        unconditional: Which empty picture.
        size: See `encoding.encode`.

    Returns:
        ``[1, E]`` or ``[1, P, W]``.
    """
    if _kind(adapter) == "pooled":
        return torch.zeros_like(like[:1])
    side = size or int(clip_vision.image_size)
    known = _empty.setdefault(clip_vision, {})
    if (unconditional, side) not in known:
        if unconditional == "black picture":
            found = vision.features(clip_vision, torch.zeros(1, 3, side, side), "hidden")
        else:
            found = vision.zero_features(clip_vision, side, "hidden")
        known[unconditional, side] = found
    return known[unconditional, side]


def check(adapter: LoadedAdapter, clip_vision: Any) -> None:
    """See that an adapter reads pictures, and with this encoder.

    Raises:
        IncompatibleModelError: It does not; see `check_encoder`.
    """
    _kind(adapter)
    check_encoder(adapter.spec, clip_vision, adapter.label)


def check_encoder(spec: AdapterSpec, clip_vision: Any, label: str) -> None:
    """Compare an encoder with the one an adapter was trained with, before any work is done.

    Raises:
        IncompatibleModelError: They differ, or what is connected is no image encoder.
    """
    kind = spec.projection.image
    assert kind is not None
    wanted = spec.encoder_name
    given = vision.recognise(clip_vision)
    if given is None:
        raise IncompatibleModelError(
            f"clip_vision is {vision.describe(clip_vision)}; needed is {wanted}. Connect Load "
            "Image Encoder or Load CLIP Vision with that file."
        )
    found = given.feature_width(kind)
    if found != spec.projection.features or _is_another(given, spec.encoder):
        raise IncompatibleModelError(
            f"{label} does not work with this image encoder: needed is {wanted} "
            f"({kind} features of width {spec.projection.features}), clip_vision is {given.name} "
            f"(width {found}). Load the other image encoder, whatever its file is called."
        )


def _is_another(given: Encoder, wanted: Encoder | None) -> bool:
    """Whether a tower of the right width is another published one: ViT-L/14 has two.

    A fine-tune for another picture size passes.
    """
    return wanted is not None and given in ENCODERS and given.name != wanted.name


def _kind(adapter: LoadedAdapter) -> FeatureKind:
    """Which features of a picture an adapter reads.

    Raises:
        IncompatibleModelError: None at all.
    """
    kind = adapter.spec.projection.image
    if kind is None:
        raise needs_a_face(adapter)
    return kind


def needs_a_face(adapter: LoadedAdapter) -> IncompatibleModelError:
    """What to say of an adapter that reads no picture alone."""
    return IncompatibleModelError(
        f"{adapter.label} reads faces. Use Encode Face Prompt, with a face from Detect Face."
    )
