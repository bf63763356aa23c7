"""The host's CLIP_VISION objects: which tower each one is, its features, and files of any naming.

An encoder is judged by its weights, never by its file. The host's own towers and our
`openclip.OpenCLIPVision` run alike, at their own picture size or at another one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management as management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from .. import encoders, images
from ..checkpoint import Tensors, read_tensors, shapes
from ..encoders import ENCODERS, Encoder, FeatureKind, Location
from ..errors import CheckpointError, IncompatibleModelError
from ..openclip import OpenCLIPTower, load_tower, resize_positions
from .openclip import OpenCLIPVision

CHUNK = 16
"""Pictures per run of the encoder at most, fewer where they are larger than 224 pixels."""

_CONFIGS = {
    (1280, 32): "clip_vision_config_h.json",
    (1664, 48): "clip_vision_config_g.json",
    (1024, 24): "clip_vision_config_vitl.json",
    (1152, 27): "clip_vision_siglip_384.json",
}
"""The host's descriptions of towers by hidden width and depth: heads and activation are in them."""


def recognise(clip_vision: Any) -> Encoder | None:
    """Tell which tower a loaded encoder is, by its weights.

    Args:
        clip_vision: The host's CLIP_VISION object of any kind, or `openclip.OpenCLIPVision`.

    Returns:
        See `encoders.recognise`; None when it is no CLIP or SigLIP tower, such as DINO.
    """
    model = getattr(clip_vision, "model", None)
    if not isinstance(model, torch.nn.Module):
        return None
    return encoders.recognise(shapes(dict(model.named_parameters())))


def require(clip_vision: Any) -> Encoder:
    """Tell which tower a loaded encoder is, or say what it is instead.

    Raises:
        IncompatibleModelError: It is no CLIP or SigLIP tower.
    """
    encoder = recognise(clip_vision)
    if encoder is None:
        raise IncompatibleModelError(
            f"clip_vision is {describe(clip_vision)}; needed is a CLIP or SigLIP tower. Connect "
            "Load Image Encoder or Load CLIP Vision with the file that the adapter names."
        )
    return encoder


def describe(clip_vision: Any) -> str:
    """What an encoder is, to follow "clip_vision is" in a message."""
    encoder = recognise(clip_vision)
    if encoder is not None:
        return encoder.name
    model = getattr(clip_vision, "model", None)
    kind = type(clip_vision if model is None else model).__name__
    return f"a {kind}, not a CLIP image encoder"


def progress(count: int) -> Any:
    """The host's progress bar for a number of pictures."""
    return comfy.utils.ProgressBar(count)


def features(
    clip_vision: Any, pixels: Tensor, kind: FeatureKind, progress: Any | None = None
) -> Tensor:
    """Encode pictures, a few at a time; the host's stop button works between them.

    Args:
        clip_vision: See `recognise`.
        pixels: ``[N, 3, S, S]`` in 0..1, not normalised. S is the tower's own size or any multiple
            of its patch; another size than its own stretches its table of positions.
        kind: ``"pooled"``, the projected embedding of the class token, or ``"hidden"``, all tokens
            of the penultimate layer, before any LayerNorm.
        progress: The bar of a longer work that these pictures are part of; their own unless given.

    Returns:
        ``[N, E]`` or ``[N, P, W]``, float32, on the host's intermediate device.

    Raises:
        IncompatibleModelError: It is no CLIP or SigLIP tower, has no such features, or cannot read
            pictures of this size.
    """
    mean = tuple(getattr(clip_vision, "image_mean", images.CLIP_MEAN))
    std = tuple(getattr(clip_vision, "image_std", images.CLIP_STD))
    return _encode(clip_vision, images.normalise(pixels, mean, std), kind, progress)


def zero_features(clip_vision: Any, size: int, kind: FeatureKind) -> Tensor:
    """Features ``[1, E]`` or ``[1, P, W]`` of the picture whose *normalised* pixels are all zero.

    Args:
        clip_vision: See `recognise`.
        size: Width and height in pixels.
        kind: See `features`.

    Raises:
        IncompatibleModelError: See `features`.
    """
    return _encode(clip_vision, torch.zeros(1, 3, size, size), kind)


def load(path: Path) -> Any:
    """Load an encoder file of any naming, whatever it is called.

    Hugging Face names become the host's own object, OpenCLIP names an `openclip.OpenCLIPVision`.
    Towers with more or fewer positions than the published ones get their own picture size.

    Raises:
        CheckpointError: See `checkpoint.read_tensors`; also if the file holds no image encoder, one
            that the host cannot run, or not all of it.
    """
    tensors = read_tensors(path)
    place = encoders.locate(tensors)
    encoder = encoders.recognise(shapes(tensors))
    if place is None or encoder is None:
        raise CheckpointError(
            f"'{path.name}' holds no CLIP or SigLIP image encoder: {_instead(tensors)}. Choose one "
            f"such as {encoders.VIT_H.file}, from {encoders.VIT_H.link}."
        )
    if place.naming == "open_clip":
        return OpenCLIPVision(load_tower(tensors, path.name))
    return _load_hugging_face(tensors, place, encoder, path.name)


def _encode(
    clip_vision: Any, pixel_values: Tensor, kind: FeatureKind, bar: Any | None = None
) -> Tensor:
    height, width = pixel_values.shape[-2:]
    each = _bytes_per_picture(_check(clip_vision, kind, height, width), height, width)
    bar = bar or progress(len(pixel_values))
    device = clip_vision.load_device
    rows = min(len(pixel_values), CHUNK, max(1, CHUNK * 224**2 // (height * width)))
    management.load_models_gpu([clip_vision.patcher], memory_required=rows * each)
    rows = max(1, min(rows, int(management.get_free_memory(device) // (2 * each))))
    out: list[Tensor] = []
    start = 0
    while start < len(pixel_values):
        management.throw_exception_if_processing_interrupted()
        chunk = pixel_values[start : start + rows].to(device)
        try:
            penultimate, pooled = _run(clip_vision.model, chunk)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows = -(-rows // 2)  # others use the device too, and no estimate knows that
            continue
        found = pooled if kind == "pooled" else penultimate
        out.append(found.float().to(management.intermediate_device()))
        bar.update(len(chunk))
        start += len(chunk)
    return torch.cat(out)


def _bytes_per_picture(encoder: Encoder, height: int, width: int) -> int:
    """What a transformer's layer needs at its widest, in float32, with all scores of attention."""
    tokens = height * width // encoder.patch**2 + encoder.has_class_token
    states, scores = tokens * encoder.hidden, tokens**2 * (encoder.hidden // 64)
    # States, keys, queries, values, sum, and the two sides of an MLP four times as wide.
    return 4 * (16 * states + 2 * scores)


def _check(clip_vision: Any, kind: FeatureKind, height: int, width: int) -> Encoder:
    encoder = require(clip_vision)
    if encoder.feature_width(kind) is None:
        raise IncompatibleModelError(
            f"clip_vision is {encoder.name}, which has no projected image embedding; this adapter "
            "needs one. Load the image encoder that the adapter names."
        )
    patch, own = encoder.patch, clip_vision.image_size
    if (height, width) != (own, own) and (height % patch or width % patch):
        near = max(1, round(width / patch)) * patch
        raise IncompatibleModelError(
            f"{encoder.name} cannot read pictures of {width} x {height} pixels: it reads patches "
            f"of {patch}. Choose a multiple of that, such as {near}."
        )
    return encoder


def _run(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised pixels -> penultimate hidden states ``[N, P, W]``, embedding ``[N, E]``."""
    if isinstance(model, OpenCLIPTower) or _fits(model, pixel_values):
        _, penultimate, pooled, _ = model(pixel_values=pixel_values, intermediate_output=-2)
        return penultimate, pooled
    # The host's own forward, with its table of positions stretched on the way: the model is
    # shared with other nodes, so the table in it stays as it is.
    vision = model.vision_model
    embeddings = vision.embeddings
    patches = embeddings.patch_embedding(pixel_values)  # [N, W, h, w]
    x = patches.flatten(2).transpose(1, 2)  # [N, h*w, W]
    has_class_token = embeddings.class_embedding is not None
    if has_class_token:
        class_token = comfy.ops.cast_to_input(embeddings.class_embedding, x)
        x = torch.cat((class_token.expand(len(x), 1, -1), x), dim=1)  # [N, 1 + h*w, W]
    table = comfy.ops.cast_to_input(embeddings.position_embedding.weight, x)
    grid = (patches.shape[-2], patches.shape[-1])
    x = vision.pre_layrnorm(x + resize_positions(table, grid, has_class_token=has_class_token))
    last, penultimate = vision.encoder(x, mask=None, intermediate_output=-2)
    return penultimate, model.visual_projection(vision.post_layernorm(last[:, 0]))


def _fits(model: Any, pixel_values: Tensor) -> bool:
    """Whether the host's own forward reads pictures of this size."""
    embeddings = model.vision_model.embeddings
    kernel = embeddings.patch_embedding.weight.shape
    if len(kernel) == 2:
        return True  # SigLIP 2 NaFlex stretches its table itself
    height, width = (side // int(kernel[-1]) for side in pixel_values.shape[-2:])
    has_class_token = embeddings.class_embedding is not None
    positions = int(embeddings.position_embedding.weight.shape[0]) - has_class_token
    return height == width and height * width == positions


def _load_hugging_face(tensors: Tensors, place: Location, encoder: Encoder, name: str) -> Any:
    wanted = dict(_canonical(tensors, place))
    described = (encoder.hidden, encoder.layers) in _CONFIGS
    linear = wanted["vision_model.embeddings.patch_embedding.weight"].ndim == 2
    vision = None
    try:
        if encoder in ENCODERS or linear:
            vision = comfy.clip_vision.load_clipvision_from_sd(dict(wanted))
        elif described:
            vision = _build(encoder)
            vision.load_sd(wanted)
    except RuntimeError as error:
        raise CheckpointError(
            f"'{name}' looks like {encoder.name} but its tensors have other shapes: "
            f"{str(error).splitlines()[-1].strip()} Download it again."
        ) from error
    if vision is None:
        known = ", ".join(row.name for row in encoders.PUBLIC)
        raise CheckpointError(
            f"'{name}' is {encoder.name} and {encoder.layers} layers, which this ComfyUI cannot "
            f"run; adapters need one of {known}. Get the encoder that the adapter names."
        )
    missing = sorted(key for key, _ in vision.model.named_parameters() if key not in wanted)
    if missing:
        raise CheckpointError(
            f"'{name}' looks like {encoder.name} but {len(missing)} tensors are missing (first: "
            f"{missing[0]}). Download it again."
        )
    return vision


def _canonical(tensors: Tensors, place: Location) -> Iterable[tuple[str, Tensor]]:
    """The image half of a file under the names that the host expects."""
    for key, tensor in tensors.items():
        outer = key.removeprefix(place.outer)
        if key.startswith(place.prefix):
            yield f"vision_model.{key.removeprefix(place.prefix)}", tensor
        if outer.startswith(("visual_projection.", "multi_modal_projector.")):
            yield outer, tensor


def _build(encoder: Encoder) -> Any:
    """The host's object for a published tower with another size or without its projection."""
    file = _CONFIGS[encoder.hidden, encoder.layers]
    config = json.loads(Path(comfy.clip_vision.__file__).with_name(file).read_text())
    config |= {"image_size": encoder.size, "patch_size": encoder.patch}
    if encoder.pooled is None:
        config.pop("projection_dim", None)
    with tempfile.TemporaryDirectory() as folder:  # older hosts read a file only
        path = Path(folder) / file
        path.write_text(json.dumps(config))
        return comfy.clip_vision.ClipVisionModel(str(path))


def _instead(tensors: Tensors) -> str:
    if any("ip_adapter." in key or "image_proj." in key for key in tensors):
        return "it is an IP-Adapter, which belongs in models/ipadapter"
    if any("layer_scale" in key or "mlp.gate_proj" in key for key in tensors):
        return "it looks like a DINO encoder, which no adapter here reads"
    if any("token_embedding" in key for key in tensors):
        return "it is a text encoder without its image half"
    first = f", such as {min(tensors)}" if tensors else ""
    return f"it has {len(tensors)} tensors{first}"
