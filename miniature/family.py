"""What the miniature is made of: the sizes of its parts and the names of their files.

No host is needed here; `miniature.host` makes the host know them.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

MODELS = Path(__file__).resolve().parent / "models"
"""Laid out as the host's folder of models."""

BASE = MODELS / "checkpoints" / "miniature.safetensors"
FINE_TUNE = MODELS / "diffusion_models" / "miniature_outlined.safetensors"
CONTROLNET = MODELS / "controlnet" / "miniature_shape.safetensors"
CLIP = MODELS / "clip_vision" / "miniature"
"""A whole CLIP as open_clip loads it from a folder; the host reads its image half."""

CLIP_VISION = CLIP / "open_clip_model.safetensors"
ADAPTERS = MODELS / "ipadapter"
ABLATION = MODELS.parent / "ablation"
"""Adapters for the evidence alone, which the loader nodes do not list."""

BUILD = Path(__file__).resolve().parent / "build"
"""What the trainings leave beside the models; nothing in it is shipped."""

SCALE = 0.18215
"""What the host multiplies latents of Stable Diffusion by before the UNet."""

WIDTH = 128
"""Of text states, image embeddings, and both towers of CLIP."""

UNET: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 64,
    "num_res_blocks": 1,
    "channel_mult": (1, 1),
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": WIDTH,
    "legacy": False,
    "use_checkpoint": False,
}
"""Arguments of the host's UNetModel and ControlNet, but for what is particular to either."""

TEXT_LAYERS, VISION_LAYERS, HEADS = 3, 4, 4
VISION_SIZE, PATCH = 64, 8
CONTEXT = 77
"""Length of a text in tokens, as Stable Diffusion's."""


def device() -> torch.device:
    """Where trainings compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> AbstractContextManager[Any]:
    """Bfloat16 for the products where the processor has it; about twice as fast there."""
    if torch.cuda.is_available():
        return torch.autocast("cuda", torch.bfloat16)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if supported is not None and supported():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()
