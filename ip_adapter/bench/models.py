"""Base models and adapters with random weights in published shapes, as the host holds them.

Built by the host's own classes and by ours, without files. ``small`` ones have the same layers a
tenth as wide: for tests of the benchmark, not for figures.

Functions that build need the host: `host.standalone.start` comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapter import IPAdapter
from ..prompt import ImagePrompt, from_tokens
from ..spec import (
    FacePerceiverProjection,
    FaceProjection,
    LinearProjection,
    PatchProjection,
    Projection,
    ResamplerProjection,
)

Size = Literal["real", "small"]
FamilyName = Literal["SD 1.5", "SDXL"]
Kind = Literal["global", "plus", "full", "faceid-plus"]

KINDS: tuple[Kind, ...] = ("global", "plus", "full", "faceid-plus")

CHANNELS: dict[Size, int] = {"real": 320, "small": 32}
"""Width of a UNet's first level."""

LATENT = 8
"""Pixels per latent pixel, each way."""

_UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        "context_dim": 768,
        "adm_in_channels": None,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "use_linear_in_transformer": False,
    },
    "SDXL": {
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_linear_in_transformer": True,
    },
}
"""The released UNets in the host's words, but for their width."""

_ALIKE: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "legacy": False,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}


@dataclass(eq=False)
class Base:
    """A base model and its adapters.

    Attributes:
        family: Which.
        size: Of its weights.
        model: The host's MODEL, without patches.
        dtype: What it computes in.
    """

    family: FamilyName
    size: Size
    model: Any
    dtype: torch.dtype
    _adapters: dict[tuple[Kind, int], Any] = field(default_factory=dict)

    def conditioning(self, seed: int) -> list[Any]:
        """A CONDITIONING of random text states."""
        width = _UNETS[self.family]["context_dim"]
        pooled = {"pooled_output": draw(1, 1280, seed=seed)} if self.family == "SDXL" else {}
        return [[draw(1, 77, width, seed=seed), pooled]]

    def adapter(self, kind: Kind, seed: int = 0) -> Any:
        """One of its adapters, `host.adapters.LoadedAdapter`; the same for the same seed."""
        if (kind, seed) not in self._adapters:
            self._adapters[kind, seed] = _adapter(self, kind, seed)
        return self._adapters[kind, seed]

    def forget_adapters(self) -> None:
        """Make adapters anew when they are asked for."""
        self._adapters.clear()

    def prompt(self, adapter: Any, seed: int = 0, **changes: int) -> ImagePrompt:
        """A random image prompt for one of its adapters.

        Args:
            adapter: See `adapter`.
            seed: Of its tokens.
            **changes: ``tokens`` per reference, ``references`` per frame, ``frames``.
        """
        tokens = changes.get("tokens", adapter.spec.projection.tokens)
        frames = changes.get("frames", 1)
        count = frames * changes.get("references", 1)
        drawn = draw(count + 1, tokens, adapter.spec.projection.width, seed=seed)
        return from_tokens(drawn[1:], drawn[:1], adapter.fingerprint, adapter.label, frames)


def base(family: FamilyName, size: Size, dtype: torch.dtype = torch.float32) -> Base:
    """Build a base model with the host's own classes."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    known = {"SD 1.5": comfy.supported_models.SD15, "SDXL": comfy.supported_models.SDXL}[family]
    config = known({**_ALIKE, **_UNETS[family], "model_channels": CHANNELS[size]})
    config.set_inference_dtype(dtype, None)
    with torch.inference_mode(False), torch.no_grad():
        made = config.get_model({}).eval().requires_grad_(False)
        fill(made.diffusion_model.parameters(), seed=0)
        # The host's own buffers (schedules) are values and stay.
    patcher = comfy.model_patcher.ModelPatcher(
        made,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return Base(family, size, patcher, dtype)


def projection(kind: Kind, family: FamilyName, size: Size) -> Projection:
    """The projection of a published adapter; for tests one that is as wide but not as large."""
    width = _UNETS[family]["context_dim"]
    is_real, is_xl = size == "real", family == "SDXL"
    hidden, pooled = (1280, 1280 if is_xl else 1024) if is_real else (64, 32)
    inner = (1280 if is_xl else 768) if is_real else 64

    def resampler(tokens: int, inner: int) -> ResamplerProjection:
        heads = inner // 64
        return ResamplerProjection(hidden, tokens, inner, heads, 4, 4 * inner, width)

    match kind:
        case "global":
            return LinearProjection(pooled, 4, width)
        case "plus":
            return resampler(16, inner)
        case "full":
            return PatchProjection(hidden, width, 257)
        case "faceid-plus":
            # The queries of this resampler are the identity's tokens, so it is as wide as they.
            identity = FaceProjection(512, 1024, 4, width)
            return FacePerceiverProjection(identity, resampler(4, width), shortcut=is_xl)
    raise AssertionError(kind)


def image_encoder(size: Size) -> Any:
    """A CLIP_VISION object: ViT-H/14, or a tiny tower whose features `projection` reads."""
    import json
    import tempfile

    import comfy.clip_vision

    is_real = size == "real"
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 1280 if is_real else 64,
        "num_hidden_layers": 32 if is_real else 3,
        "num_attention_heads": 16 if is_real else 4,
        "intermediate_size": 5120 if is_real else 128,
        "hidden_act": "gelu",
        "image_size": 224 if is_real else 28,
        "patch_size": 14,
        "num_channels": 3,
        "projection_dim": 1024 if is_real else 32,
    }
    with tempfile.TemporaryDirectory() as folder:  # older hosts want a path
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        with torch.inference_mode(False), torch.no_grad():
            encoder = comfy.clip_vision.ClipVisionModel(str(path))
            fill(encoder.model.parameters(), seed=1)
    return encoder


def save(adapter: Any, path: Path) -> Path:
    """Write an adapter under the published flat keys, in float16."""
    from safetensors.torch import save_file

    save_file({k: v.half().contiguous() for k, v in adapter.module.state_dict().items()}, path)
    return path


def fill(parameters: Iterable[Tensor], seed: int) -> None:
    """Random matrices scaled by their fan-in, ones for the rest; in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        if parameter.ndim > 1:
            bound = math.sqrt(3 / max(1, parameter[0].numel()))
            parameter.data.uniform_(-bound, bound, generator=generator)
        else:
            parameter.data.fill_(1.0)


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _adapter(made: Base, kind: Kind, seed: int) -> Any:
    from ..host import training
    from ..train.samples import snapshot

    spec = training.family_spec(made.model, projection(kind, made.family, made.size))
    with torch.inference_mode(False), torch.no_grad():
        module = IPAdapter(spec).half()
        fill(module.parameters(), seed)
        return snapshot(module, f"{kind} {seed}")
