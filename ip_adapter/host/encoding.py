"""Encoding with the host's CLIP Vision: reference images -> image features -> an image prompt."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from .. import images, prompt
from ..errors import ImageError, IncompatibleModelError
from ..prompt import ImagePrompt
from ..spec import AdapterSpec, Encoder, encoder_of
from .adapters import LoadedAdapter

CHUNK = 8
"""Pictures per run of the encoder; bounds its memory whatever the number of references."""


def encode(adapter: LoadedAdapter, clip_vision: Any, image: Tensor, fit: images.Fit) -> ImagePrompt:
    """Turn reference images into one image prompt.

    Args:
        adapter: Its projection makes the tokens.
        clip_vision: The host's CLIP_VISION object, or `openclip.OpenCLIPVision`.
        image: ``[B, H, W, C]`` in 0..1, one reference per row.
        fit: How a picture that is not square is made so.

    Raises:
        ImageError: See `images.check`; also if the encoder returns values that are not numbers.
        IncompatibleModelError: The encoder is not the one this adapter was trained with.
    """
    check_encoder(adapter.spec, clip_vision, adapter.label)
    pixels = images.squares(image, clip_vision.image_size, fit)
    kind = adapter.spec.projection.kind
    features = _features(clip_vision, _normalise(clip_vision, pixels), kind)
    if not bool(torch.isfinite(features).all()):
        raise ImageError(
            "The image encoder returned values that are not numbers for this picture. It "
            "overflows in float16 on some GPUs: start ComfyUI with --fp32-text-enc and try again."
        )
    conditional = _project(adapter, features)
    unconditional = adapter.unconditional.get(clip_vision)
    if unconditional is None:
        if kind == "pooled":
            zero = torch.zeros_like(features[:1])
        else:
            zero = _features(clip_vision, torch.zeros_like(pixels[:1]), kind)
        unconditional = _project(adapter, zero)
        adapter.unconditional[clip_vision] = unconditional
    return prompt.from_tokens(conditional, unconditional, adapter.fingerprint, adapter.label)


def check_encoder(spec: AdapterSpec, clip_vision: Any, label: str) -> None:
    """Compare an encoder's width with what the projection reads, before any work is done.

    Raises:
        IncompatibleModelError: They differ, or the encoder is no CLIP tower.
    """
    wanted = spec.encoder_name
    given = _encoder(clip_vision, wanted)
    found = given.feature_width(spec.projection.kind)
    if found != spec.projection.features:
        raise IncompatibleModelError(
            f"{label} does not work with this image encoder: needed is {wanted} "
            f"({spec.projection.kind} features of width {spec.projection.features}), clip_vision "
            f"is {given.name} (width {found}). Load the other image encoder, whatever its file is "
            "called."
        )


def _encoder(clip_vision: Any, wanted: str) -> Encoder:
    """Recognise an encoder by its weights, never by its file."""
    model: Any = getattr(clip_vision, "model", None)
    if hasattr(model, "hidden") and hasattr(model, "pooled"):
        return encoder_of(model.hidden, model.pooled)  # our OpenCLIP tower
    try:
        hidden = model.vision_model.post_layernorm.weight.shape[0]
        pooled = model.visual_projection.weight.shape[0]
    except AttributeError:
        kind = type(model).__name__ if model is not None else type(clip_vision).__name__
        raise IncompatibleModelError(
            f"clip_vision is a {kind}, not a CLIP image encoder with a projection; needed is "
            f"{wanted}. Connect Load CLIP Vision or Load OpenCLIP Image Encoder with that file."
        ) from None
    return encoder_of(int(hidden), int(pooled))


def _normalise(clip_vision: Any, pixels: Tensor) -> Tensor:
    mean = getattr(clip_vision, "image_mean", images.CLIP_MEAN)
    std = getattr(clip_vision, "image_std", images.CLIP_STD)
    return images.normalise(pixels, tuple(mean), tuple(std))


def _features(clip_vision: Any, pixel_values: Tensor, kind: str) -> Tensor:
    """Run the encoder in chunks: ``[N, 3, S, S]`` -> ``[N, E]`` or ``[N, P, E]``, float32."""
    comfy.model_management.load_models_gpu([clip_vision.patcher])
    device = clip_vision.load_device
    progress = comfy.utils.ProgressBar(len(pixel_values))
    out = []
    for chunk in torch.split(pixel_values, CHUNK):
        comfy.model_management.throw_exception_if_processing_interrupted()
        _, penultimate, pooled, _ = clip_vision.model(
            pixel_values=chunk.to(device), intermediate_output=-2
        )
        features = pooled if kind == "pooled" else penultimate
        out.append(features.float().to(comfy.model_management.intermediate_device()))
        progress.update(len(chunk))
    return torch.cat(out)


def _project(adapter: LoadedAdapter, features: Tensor) -> Tensor:
    device = adapter.load(memory=features.numel() * 64)
    tokens = adapter.module.image_tokens(features.to(device))
    return tokens.to(comfy.model_management.intermediate_device())
