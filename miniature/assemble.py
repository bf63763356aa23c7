"""Puts the trained parts into the files that the host's standard loaders read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ip_adapter import files

from . import clip, family

Tensors = Mapping[str, Tensor]

_UNET, _TEXT, _VAE = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."


def checkpoint(unet: Tensors, text: Tensors, vae: Tensors, path: Path = family.BASE) -> None:
    """Write a whole checkpoint, named as Stable Diffusion 1.5's are.

    Args:
        unet: As `base.train` returns it.
        text: A whole CLIP under open_clip's names.
        vae: As `vae.train` returns it.
        path: Where to.
    """
    parts = {_UNET: unet, _TEXT: clip.text_tensors(text), _VAE: vae}
    write(
        {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()},
        path,
    )


def unet(path: Path = family.BASE) -> dict[str, Tensor]:
    """The UNet in a checkpoint."""
    return _part(path, _UNET)


def vae(path: Path = family.BASE) -> dict[str, Tensor]:
    """The VAE in a checkpoint."""
    return _part(path, _VAE)


def write(tensors: Tensors, path: Path) -> None:
    """Write tensors in half precision; single numbers stay exact."""
    ready = {
        name: (tensor.half() if tensor.ndim else tensor.float()).contiguous()
        for name, tensor in tensors.items()
    }
    with files.replacing(path) as partial:
        save_file(ready, partial, metadata={"format": "pt"})


def _part(path: Path, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor if tensor.dtype == torch.float32 else tensor.float()
        for name, tensor in load_file(path).items()
        if name.startswith(prefix)
    }
