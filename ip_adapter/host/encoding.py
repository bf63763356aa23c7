"""Encoding on the host: references, faces and instructions -> an image prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from .. import catalogue, images, prompt
from ..errors import ImageError, IncompatibleModelError
from ..faces import Faces
from ..projections import Features
from ..prompt import ImagePrompt
from ..references import Combine, Reference, Unconditional, combine
from . import reading, text, vision
from .adapters import LoadedAdapter
from .kept import Kept, digest, size_of

log = logging.getLogger(__name__)

_SLICE = 32
"""Pictures whose features are in memory at a time, where each makes tokens of its own."""

_prompts: Kept[ImagePrompt] = Kept(
    768 << 10, lambda found: size_of(found.conditional) + size_of(found.unconditional)
)
"""By adapter. Keys and values are kept with a prompt; all layers' are up to 80 times its size."""


def encode(
    adapter: LoadedAdapter,
    clip_vision: Any,
    image: Tensor,
    fit: images.Fit,
    size: int | None = None,
    *,
    per_frame: bool = False,
    unconditional: Unconditional = "as trained",
) -> ImagePrompt:
    """Turn reference images into one image prompt.

    Args:
        adapter: Its projection makes the tokens.
        clip_vision: The host's CLIP_VISION object, or `openclip.OpenCLIPVision`.
        image: ``[B, H, W, C]`` in 0..1, one reference per row.
        fit: How a picture that is not square is made so.
        size: Side of the square the encoder sees, in pixels; its own unless given.
        per_frame: Whether the reference i is for the picture i of the batch only.
        unconditional: What stands for "no image".

    Raises:
        ImageError: See `images.check`; also if the encoder returns values that are not numbers.
        IncompatibleModelError: The encoder is not the one this adapter was trained with, or the
            adapter needs a face or an instruction.
    """
    return encode_references(
        adapter,
        clip_vision,
        [Reference(image, fit=fit)],
        size=size,
        frames=len(image) if per_frame else 1,
        unconditional=unconditional,
    )


def encode_references(
    adapter: LoadedAdapter,
    clip_vision: Any,
    references: Sequence[Reference],
    how: Combine = "concat",
    size: int | None = None,
    *,
    frames: int = 1,
    unconditional: Unconditional = "as trained",
) -> ImagePrompt:
    """Turn references with weights and roles into one image prompt.

    Args:
        adapter: Its projection makes the tokens.
        clip_vision: See `encode`.
        references: At least one that is not negative. Without a negative one, the unconditional
            side is the zero image, as in training.
        how: How several of one role become one.
        size: See `encode`.
        frames: For how many pictures of a batch there are references, in the order of frames.
        unconditional: See `encode`.

    Raises:
        ImageError: See `encode`; or there is no positive reference.
        IncompatibleModelError: See `encode`.
    """
    spec = adapter.spec
    if spec.projection.face is not None:
        raise reading.needs_a_face(adapter)
    if spec.projection.text:
        raise IncompatibleModelError(
            f"{adapter.label} reads an instruction beside the image. Use Encode Instructed Prompt."
        )
    if all(one.is_negative for one in references):
        raise ImageError(
            "All references are negative; needed is at least one positive one, which says what the "
            "picture is to be like."
        )
    progress = vision.progress(sum(len(one.image) for one in references))
    if how == "concat" and any(len(one.image) > _SLICE for one in references):
        return _encode_slices(
            adapter, clip_vision, references, size, frames, unconditional, progress
        )
    roles: dict[bool, list[Tensor]] = {True: [], False: []}
    for one in references:
        features = reading.read(adapter, clip_vision, one.image, one.fit, size, progress)
        roles[one.is_negative].append(one.weight * features)
    positive = combine(torch.cat(roles[False]), how)
    if roles[True]:
        negative = combine(torch.cat(roles[True]), how)
    else:
        negative = reading.no_image(adapter, clip_vision, positive, unconditional, size)
    return from_features(adapter, Features(image=positive), Features(image=negative), frames)


def _encode_slices(
    adapter: LoadedAdapter,
    clip_vision: Any,
    references: Sequence[Reference],
    size: int | None,
    frames: int,
    unconditional: Unconditional,
    progress: Any,
) -> ImagePrompt:
    """As `encode_references`, with the features of a few pictures at a time in memory."""
    tokens: dict[bool, list[Tensor]] = {True: [], False: []}
    for one in references:
        for some in torch.split(one.image, _SLICE):
            features = one.weight * reading.read(
                adapter, clip_vision, some, one.fit, size, progress
            )
            tokens[one.is_negative].append(_project(adapter, Features(image=features)))
    if not tokens[True]:
        nothing = reading.no_image(adapter, clip_vision, features, unconditional, size)
        tokens[True].append(_project(adapter, Features(image=nothing)))
    sides = (torch.cat(tokens[False]), torch.cat(tokens[True]))
    return prompt.from_tokens(*sides, adapter.fingerprint, adapter.label, frames)


def from_features(
    adapter: LoadedAdapter, positive: Features, negative: Features, frames: int = 1
) -> ImagePrompt:
    """Project features to an image prompt.

    Args:
        adapter: Its projection makes the tokens.
        positive: Of N references; what the adapter's projection reads.
        negative: Of "no image" or of what to lead away from.
        frames: See `encode_references`.

    Raises:
        IncompatibleModelError: Something that the projection reads was not given.
    """
    given = (*vars(positive).values(), *vars(negative).values())
    tensors = digest(*(value for value in given if value is None or isinstance(value, Tensor)))
    numbers = tuple(value for value in given if isinstance(value, float))
    return _prompts.get(
        adapter,
        (tensors, numbers, frames),
        lambda: prompt.from_tokens(
            _project(adapter, positive),
            _project(adapter, negative),
            adapter.fingerprint,
            adapter.label,
            frames,
        ),
    )


def encode_faces(
    adapter: LoadedAdapter,
    faces: Faces,
    clip_vision: Any | None,
    structure: float = 1.0,
    *,
    how: Combine = "concat",
    crop: int | None = None,
    negative: Tensor | None = None,
    frames: int = 1,
    unconditional: Unconditional = "as trained",
) -> ImagePrompt:
    """Turn faces into one image prompt.

    Args:
        adapter: A FaceID, portrait or InstantID adapter.
        faces: One or several; the portrait adapters gain by several of one person.
        clip_vision: The image encoder for the adapters that also read the face's structure.
        structure: Weight of the structure against the identity, for PlusV2.
        how: How several faces become one.
        crop: Side of the aligned crop before it is resized for the encoder; the encoder's own
            unless given. A side that is no multiple of 112 shows a little more.
        negative: ``[B, H, W, C]``, what to lead away from where the adapter reads the structure.
        frames: See `encode_references`.
        unconditional: See `encode`.

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
    seen = nothing = None
    if spec.projection.image is not None:
        if clip_vision is None:
            raise IncompatibleModelError(
                f"{adapter.label} also reads the structure of the face, and clip_vision is not "
                f"connected. Connect {spec.encoder_name}."
            )
        crops = faces.crops(crop or int(clip_vision.image_size))
        seen = combine(reading.read(adapter, clip_vision, crops, "crop"), how)
        if negative is not None:
            nothing = reading.read(adapter, clip_vision, negative, "crop")
        else:
            nothing = reading.no_image(adapter, clip_vision, seen, unconditional)
            if kind == "raw" and unconditional == "as trained":
                nothing = torch.zeros_like(nothing)  # Kolors: no face is no features at all
    positive = Features(image=seen, face=combine(vectors, how), structure=structure)
    nobody = vectors.new_zeros(1 if nothing is None else len(nothing), vectors.shape[-1])
    return from_features(
        adapter, positive, Features(image=nothing, face=nobody, structure=structure), frames
    )


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
    seen = reading.read(adapter, clip_vision, image, fit)
    states = [text.last_hidden_states(clip, words) for words in (instruction, description, "")]
    asked, described, empty = (state.expand(len(seen), -1, -1) for state in states)
    zero = reading.no_image(adapter, clip_vision, seen, "as trained")
    return from_features(
        adapter,
        Features(image=seen, instruction=asked, prompt=described),
        Features(image=zero, instruction=empty[:1], prompt=empty[:1]),
    )


def _project(adapter: LoadedAdapter, features: Features) -> Tensor:
    """Tokens ``[N, T, D]`` of N references; the projection sees a few of them at a time."""
    given: dict[str, Tensor] = {k: v for k, v in vars(features).items() if isinstance(v, Tensor)}
    device = adapter.load(memory=64 * sum(value[:_SLICE].numel() for value in given.values()))
    tokens = []
    for start in range(0, max(map(len, given.values()), default=1), _SLICE):
        some: dict[str, Any] = {
            name: (value if len(value) == 1 else value[start : start + _SLICE]).to(device)
            for name, value in given.items()
        }
        found = adapter.module.image_tokens(replace(features, **some))
        tokens.append(found.to(comfy.model_management.intermediate_device()))
    return torch.cat(tokens)
