"""IP-Adapter files with random weights: published keys, published shapes, published containers.

The self-checks are the published byte sizes of the metadata-free float16 safetensors files and the
parameter counts (tests/test_checkpoint.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

SD15_WIDTHS = (320, 320, 640, 640, 1280, 1280) + (1280,) * 3 + (640,) * 3 + (320,) * 3 + (1280,)
"""Widths of SD 1.5's cross-attention layers in checkpoint order: down, up, middle."""

NANO_WIDTHS = tuple(width // 10 for width in SD15_WIDTHS)
"""The same plan for the UNet of a tenth of the width that the host tests run."""


class _Random:
    """Tensors by seed, scaled so that outputs stay near unit size."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def linear(self, rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, generator=self._generator) * columns**-0.5
        return weight.half()

    def vector(self, width: int, mean: float = 0.0) -> Tensor:
        return (mean + 0.1 * torch.randn(width, generator=self._generator)).half()


def _layers(widths: tuple[int, ...], context: int, random: _Random) -> Tensors:
    out: Tensors = {}
    for position, width in enumerate(widths):
        for name in ("to_k_ip", "to_v_ip"):
            out[f"ip_adapter.{2 * position + 1}.{name}.weight"] = random.linear(width, context)
    return out


def base_sd15(
    widths: tuple[int, ...] = SD15_WIDTHS,
    seed: int = 0,
    *,
    features: int = 1024,
    tokens: int = 4,
    context: int = 768,
) -> Tensors:
    """ip-adapter_sd15 (features 1024) or ip-adapter_sd15_vit-G (features 1280)."""
    random = _Random(seed)
    return {
        "image_proj.proj.weight": random.linear(tokens * context, features),
        "image_proj.proj.bias": random.vector(tokens * context),
        "image_proj.norm.weight": random.vector(context, mean=1.0),
        "image_proj.norm.bias": random.vector(context),
        **_layers(widths, context, random),
    }


def plus_sd15(
    widths: tuple[int, ...] = SD15_WIDTHS,
    seed: int = 0,
    *,
    features: int = 1280,
    tokens: int = 16,
    inner: int = 768,
    heads: int = 12,
    depth: int = 4,
    context: int = 768,
) -> Tensors:
    """ip-adapter-plus_sd15, with the published sizes unless told otherwise."""
    random = _Random(seed)

    def norm(prefix: str, width: int) -> Tensors:
        return {
            f"image_proj.{prefix}.weight": random.vector(width, mean=1.0),
            f"image_proj.{prefix}.bias": random.vector(width),
        }

    out: Tensors = {
        "image_proj.latents": random.linear(tokens, inner)[None],
        "image_proj.proj_in.weight": random.linear(inner, features),
        "image_proj.proj_in.bias": random.vector(inner),
        "image_proj.proj_out.weight": random.linear(context, inner),
        "image_proj.proj_out.bias": random.vector(context),
        **norm("norm_out", context),
    }
    for i in range(depth):
        out |= norm(f"layers.{i}.0.norm1", inner)
        out |= norm(f"layers.{i}.0.norm2", inner)
        out[f"image_proj.layers.{i}.0.to_q.weight"] = random.linear(heads * 64, inner)
        out[f"image_proj.layers.{i}.0.to_kv.weight"] = random.linear(heads * 128, inner)
        out[f"image_proj.layers.{i}.0.to_out.weight"] = random.linear(inner, heads * 64)
        out |= norm(f"layers.{i}.1.0", inner)
        out[f"image_proj.layers.{i}.1.1.weight"] = random.linear(4 * inner, inner)
        out[f"image_proj.layers.{i}.1.3.weight"] = random.linear(inner, 4 * inner)
    return out | _layers(widths, context, random)


def nested(tensors: Tensors) -> dict[str, Tensors]:
    """The two-level dictionary that published .bin files pickle."""
    out: dict[str, Tensors] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        out[part][rest] = tensor
    return out


def write_safetensors(tensors: Tensors, path: Path) -> Path:
    """Write the flat container, without metadata like the published files."""
    save_file(tensors, path)
    return path


def write_bin(tensors: Tensors, path: Path, *, legacy: bool = False) -> Path:
    """Write the pickled container; `legacy` is the one before zip archives."""
    torch.save(nested(tensors), path, _use_new_zipfile_serialization=not legacy)
    return path
