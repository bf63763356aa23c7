"""IP-Adapter files with random weights: published keys, published shapes, published containers.

The rows of `catalogue.ROWS` are written by `write`. The self-checks are the published byte sizes
and parameter counts (tests/test_synthetic.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import catalogue
from .catalogue import Container, Layout, Row

Tensors = dict[str, Tensor]

SD15_WIDTHS = catalogue.widths("SD 1.5")
"""Widths of SD 1.5's cross-attention layers in checkpoint order: down, up, middle."""

NANO_WIDTHS = catalogue.widths("SD 1.5", nano=True)
"""The same plan for the UNet of a tenth of the width that the host tests run."""

POOL = 4_000_037
"""How many numbers are drawn; a prime, so that rows of larger tensors do not repeat."""

LORA_DOWN, LORA_UP = 0.01, 0.05
"""Deviations of LoRA factors. Up is zero before training; here it must be seen to act."""


def _scale(key: str, shape: tuple[int, ...]) -> float:
    if "lora" in key:
        return LORA_DOWN if "down" in key else LORA_UP
    return float(shape[-1] ** -0.5) if len(shape) > 1 else 0.1


def fill(layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensors:
    """Random weights of these shapes, scaled so that outputs stay near unit size.

    Args:
        layout: Key -> shape. One-dimensional weights are taken for norms and lie around one.
        seed: Equal seeds give equal numbers for equal layouts.
        dtype: Of every tensor.
    """
    count = min(POOL, sum(math.prod(shape) for shape in layout.values()))
    pool = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    tensors, position = {}, 0
    for key, shape in layout.items():
        size, scale, done = math.prod(shape), _scale(key, shape), 0
        flat = torch.empty(size, dtype=dtype)
        while done < size:
            part = pool[position : position + size - done]
            flat[done : done + len(part)] = part * scale
            done += len(part)
            position = (position + len(part)) % count
        if len(shape) == 1 and key.endswith(".weight"):
            flat += 1
        tensors[key] = flat.reshape(shape)
    return tensors


def make(row: Row, *, nano: bool = False, seed: int = 0) -> Tensors:
    """The flat tensors of a published adapter, filled at random.

    Args:
        row: One of `catalogue.ROWS`.
        nano: Attention for UNets of a tenth of the width; the projection keeps its size.
        seed: Of the numbers.
    """
    return fill(catalogue.layout(row, nano=nano), seed, row.dtype)


def _with_prefixes(projection: Layout, attention: Layout) -> Layout:
    return {f"image_proj.{key}": shape for key, shape in projection.items()} | {
        f"ip_adapter.{key}": shape for key, shape in attention.items()
    }


def base_sd15(
    widths: tuple[int, ...] = SD15_WIDTHS,
    seed: int = 0,
    *,
    features: int = 1024,
    tokens: int = 4,
    context: int = 768,
) -> Tensors:
    """ip-adapter_sd15 (features 1024) or ip-adapter_sd15_vit-G (features 1280)."""
    projection = catalogue.global_projection(features, context, tokens)
    return fill(_with_prefixes(projection, catalogue.key_values(widths, context)), seed)


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
    projection = catalogue.resampler(features, inner, heads, context, tokens=tokens, depth=depth)
    return fill(_with_prefixes(projection, catalogue.key_values(widths, context)), seed)


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """The two-level dictionary that published .bin files pickle."""
    out: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        out.setdefault(part, {})[rest] = tensor
    return out


def write_safetensors(tensors: Tensors, path: Path) -> Path:
    """Write the flat container, without metadata like the published files."""
    save_file(tensors, path)
    return path


def write_bin(tensors: Mapping[str, Tensor], path: Path, *, legacy: bool = False) -> Path:
    """Write the pickled container; `legacy` is the one before zip archives.

    Hollow tensors stay so: the file has the published shapes and hardly any bytes.
    """
    torch.save(nested(tensors), path, _use_new_zipfile_serialization=not legacy)
    return path


_DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def safetensors_header(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, int]:
    """What a .safetensors file of these tensors begins with, and how many bytes of data follow.

    The format: eight bytes with the length of a JSON object, the object, spaces up to a multiple
    of eight. Wider types come first, then the order is that of the names.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def write_sparse(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a full-size .safetensors whose data is a hole of zeros: no bytes on most disks.

    Args:
        tensors: Shapes and types; the numbers are not looked at, so hollow tensors will do.
        path: Where to.
        metadata: For the header.
    """
    header, size = safetensors_header(tensors, metadata)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return path


def metadata(row: Row) -> dict[str, str] | None:
    """A stand-in of the published length for a header's metadata, whose content is unknown."""
    if not row.metadata_bytes:
        return None
    empty = len('"__metadata__":{"recipe":""},')
    return {"recipe": "-" * (row.metadata_bytes - empty)}


def oversize(tensors: Tensors) -> Tensors:
    """Move the projection into storages of twice its size, as some published pickles have it."""
    return {
        key: torch.cat([tensor.flatten()] * 2)[: tensor.numel()].reshape(tensor.shape)
        if key.startswith("image_proj.")
        else tensor
        for key, tensor in tensors.items()
    }


def write(
    row: Row, path: Path, *, nano: bool = False, seed: int = 0, container: Container | None = None
) -> Path:
    """Write a published adapter with random weights.

    Args:
        row: One of `catalogue.ROWS`.
        path: The file, or a folder in which the file gets its published name.
        nano: Attention for UNets of a tenth of the width; the projection keeps its size.
        seed: Of the numbers.
        container: Another container than the published one.

    Returns:
        The file's path.
    """
    path = path / row.file if path.is_dir() else path
    tensors = make(row, nano=nano, seed=seed)
    container = container or row.container
    if container == "safetensors":
        save_file(tensors, path, metadata(row))
        return path
    if row.is_oversized and not nano:
        tensors = oversize(tensors)
    return write_bin(tensors, path, legacy=container == "bin-legacy")


def write_hollow(row: Row, path: Path, *, nano: bool = False) -> Path:
    """Write a published adapter with its true shapes and only zeros, in hardly any bytes.

    A .safetensors has its published size nevertheless, as a hole; a .bin is small.
    """
    path = path / row.file if path.is_dir() else path
    tensors = catalogue.hollow(catalogue.layout(row, nano=nano), row.dtype)
    if row.container == "safetensors":
        return write_sparse(tensors, path, metadata(row))
    return write_bin(tensors, path, legacy=row.container == "bin-legacy")


def write_lora(row: Row, path: Path, *, nano: bool = False, seed: int = 0) -> Path:
    """Write the companion LoRA; with the same seed its numbers are those inside the adapter."""
    path = path / row.lora_file if path.is_dir() else path
    tensors = catalogue.companion(row, make(row, nano=nano, seed=seed))
    save_file(tensors, path)
    return path
