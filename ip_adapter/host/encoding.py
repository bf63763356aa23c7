"""Encoding on the host: references, faces and instructions -> an image prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from torch import Tensor

from .. import catalogue, images, prompt
from ..encoders import ENCODERS, Encoder
from ..errors import ImageError, IncompatibleModelError
from ..faces import Faces
from ..projections import Features
from ..prompt import ImagePrompt
from ..references import Combine, Reference, combine
from ..spec import AdapterSpec
from . import text, vision
from .adapters import LoadedAdapter

log = logging.getLogger(__name__)

_zeros: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()
"""Hidden features of the zero image per encoder and picture size, ``[1, P, W]``; constants."""


def encode(
    adapter: LoadedAdapter,
    clip_vision: Any,
    image: Tensor,
    fit: images.Fit,
    size: int | None = None,
    *,
    per_frame: bool = False,
) -> ImagePrompt:
    """Turn reference images into one image prompt.

    Args:
        adapter: Its projection makes the tokens.
        clip_vision: The host's CLIP_VISION object, or `openclip.OpenCLIPVision`.
        image: ``[B, H, W, C]`` in 0..1, one reference per row.
        fit: How a picture that is not square is made so.
        size: Side of the square the encoder sees, in pixels; its own unless given.
        per_frame: Whether the reference i is for the picture i of the batch only.

    Raises:
        ImageError: See `images.check`; also if the encoder returns values that are not numbers.
        IncompatibleModelError: The encoder is not the one this adapter was trained with, or the
            adapter needs a face or an instruction.
    """
    together = encode_references(adapter, clip_vision, [Reference(image, fit=fit)], size=size)
    return prompt.per_frame(together, len(image)) if per_frame else together


def encode_references(
    adapter: LoadedAdapter,
    clip_vision: Any,
    references: Sequence[Reference],
    how: Combine = "concat",
    size: int | None = None,
) -> ImagePrompt:
    """Turn references with weights and roles into one image prompt.

    Args:
        adapter: Its projection makes the tokens.
        clip_vision: See `encode`.
        references: At least one that is not negative. Without a negative one, the unconditional
            side is the zero image, as in training.
        how: How several of one role become one.
        size: See `encode`.

    Raises:
        ImageError: See `encode`; or there is no positive reference.
        IncompatibleModelError: See `encode`.
    """
    spec = adapter.spec
    if spec.projection.face is not None:
        raise IncompatibleModelError(
            f"{adapter.label} reads faces. Use Encode Face Prompt, with a face from Detect Face."
        )
    if spec.projection.text:
        raise IncompatibleModelError(
            f"{adapter.label} reads an instruction beside the image. Use Encode Instructed Prompt."
        )
    check_encoder(spec, clip_vision, adapter.label)
    side = size or int(clip_vision.image_size)
    roles: dict[bool, list[Tensor]] = {True: [], False: []}
    for one in references:
        read = _read(adapter, clip_vision, one.image, one.fit, side)
        roles[one.is_negative].append(one.weight * read)
    if not roles[False]:
        raise ImageError(
            "All references are negative; needed is at least one positive one, which says what the "
            "picture is to be like."
        )
    positive = combine(torch.cat(roles[False]), how)
    if roles[True]:
        negative = combine(torch.cat(roles[True]), how)
    else:
        negative = _zero(spec, clip_vision, positive, side)
    conditional = _project(adapter, Features(image=positive))
    unconditional = _project(adapter, Features(image=negative))
    return prompt.from_tokens(conditional, unconditional, adapter.fingerprint, adapter.label)


def encode_faces(
    adapter: LoadedAdapter, faces: Faces, clip_vision: Any | None, structure: float
) -> ImagePrompt:
    """Turn faces into one image prompt.

    Args:
        adapter: A FaceID, portrait or InstantID adapter.
        faces: One or several; the portrait adapters gain by several of one person.
        clip_vision: The image encoder for the adapters that also read the face's structure.
        structure: Weight of the structure against the identity, for PlusV2.

    Raises:
        ImageError: A face vector is no use, or its picture is missing where it is needed.
        IncompatibleModelError: The adapter reads no face, or the encoder is missing or wrong.
    """
    spec = adapter.spec
    kind = spec.projection.face
    if kind is None:
        raise IncompatibleModelError(
            f"{adapter.label} reads pictures, not face vectors. Use Encode Image Prompt, or load a "
            "FaceID, portrait or InstantID adapter."
        )
    vectors = faces.normed() if kind == "normed" else faces.embeddings
    wanted = catalogue.recogniser(spec.family, spec.variant)
    if faces.label in {"buffalo_l", "antelopev2"} - {wanted}:
        log.warning(
            "IP-Adapter: %s was trained with the face model %s, and this face was read with %s; "
            "the likeness will be weak",
            adapter.label,
            wanted,
            faces.label,
        )
    if kind == "raw" and torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=0.01):
        log.warning(
            "IP-Adapter: %s was trained with face vectors as the recogniser gives them, and these "
            "have been scaled to length 1; the likeness will be weak",
            adapter.label,
        )
    read = zero = None
    if spec.projection.image is not None:
        if clip_vision is None:
            raise IncompatibleModelError(
                f"{adapter.label} also reads the structure of the face, and clip_vision is not "
                f"connected. Connect {spec.encoder_name}."
            )
        check_encoder(spec, clip_vision, adapter.label)
        side = int(clip_vision.image_size)
        read = _read(adapter, clip_vision, faces.crops(side), "crop", side)
        zero = _zero(spec, clip_vision, read, side)
        if kind == "raw":
            zero = torch.zeros_like(zero)  # Kolors: no face is no features at all
    conditional = _project(adapter, Features(image=read, face=vectors, structure=structure))
    nobody = torch.zeros_like(vectors[:1])
    unconditional = _project(adapter, Features(image=zero, face=nobody, structure=structure))
    return prompt.from_tokens(conditional, unconditional, adapter.fingerprint, adapter.label)


def encode_instructed(
    adapter: LoadedAdapter,
    clip_vision: Any,
    clip: Any,
    image: Tensor,
    fit: images.Fit,
    instruction: str,
    description: str,
) -> ImagePrompt:
    """Turn references and an instruction into one image prompt.

    Args:
        adapter: An IP-Adapter Instruct.
        clip_vision: Its image encoder.
        clip: The host's CLIP object with a CLIP-L text encoder.
        image: ``[B, H, W, C]`` in 0..1, one reference per row.
        fit: How a picture that is not square is made so.
        instruction: What to take from the image: "use the style of the image".
        description: The text prompt of the picture to be made.

    Raises:
        ImageError: See `encode`.
        IncompatibleModelError: The adapter reads no instruction, or an encoder is wrong.
    """
    spec = adapter.spec
    if not spec.projection.text:
        raise IncompatibleModelError(
            f"{adapter.label} reads no instruction. Use Encode Image Prompt, or load an IP-Adapter "
            "Instruct."
        )
    check_encoder(spec, clip_vision, adapter.label)
    states = [text.last_hidden_states(clip, words) for words in (instruction, description, "")]
    side = int(clip_vision.image_size)
    read = _read(adapter, clip_vision, image, fit, side)
    asked, described, empty = (state.expand(len(read), -1, -1) for state in states)
    conditional = _project(adapter, Features(image=read, instruction=asked, prompt=described))
    zero = _zero(spec, clip_vision, read, side)
    nothing = Features(image=zero, instruction=empty[:1], prompt=empty[:1])
    unconditional = _project(adapter, nothing)
    return prompt.from_tokens(conditional, unconditional, adapter.fingerprint, adapter.label)


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


def _read(
    adapter: LoadedAdapter, clip_vision: Any, image: Tensor, fit: images.Fit, side: int
) -> Tensor:
    """The encoder's features of pictures, ``[N, E]`` or ``[N, P, W]``."""
    kind = adapter.spec.projection.image
    assert kind is not None
    features = vision.features(clip_vision, images.squares(image, side, fit), kind)
    if not bool(torch.isfinite(features).all()):
        raise ImageError(
            "The image encoder returned values that are not numbers for this picture. It "
            "overflows in float16 on some GPUs: start ComfyUI with --fp32-text-enc and try again."
        )
    return features


def _zero(spec: AdapterSpec, clip_vision: Any, read: Tensor, side: int) -> Tensor:
    """What training saw for "no image": a zero embedding, or the features of a zero picture."""
    if spec.projection.image == "pooled":
        return torch.zeros_like(read[:1])
    sizes = _zeros.setdefault(clip_vision, {})
    if side not in sizes:
        sizes[side] = vision.zero_features(clip_vision, side, "hidden")
    return sizes[side]


def _project(adapter: LoadedAdapter, features: Features) -> Tensor:
    given: dict[str, Any] = {k: v for k, v in vars(features).items() if isinstance(v, Tensor)}
    device = adapter.load(memory=64 * sum(value.numel() for value in given.values()))
    moved = replace(features, **{name: value.to(device) for name, value in given.items()})
    tokens = adapter.module.image_tokens(moved)
    return tokens.to(comfy.model_management.intermediate_device())
