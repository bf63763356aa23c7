"""The LoRA of FaceID adapters on a MODEL: from inside the adapter's file, or from its companion."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
from torch import Tensor

from .. import catalogue, checkpoint
from ..errors import CheckpointError, IncompatibleModelError
from ..refusals import some
from . import folders
from .adapters import LoadedAdapter

log = logging.getLogger(__name__)

INSIDE = "inside"
"""Where the LoRA of most FaceID files is: in the adapter's own file."""


def inside(adapter: LoadedAdapter) -> dict[str, Tensor]:
    """Read the LoRA that an adapter's file holds.

    Raises:
        CheckpointError: It holds none; says where the companion file is had.
    """
    found = checkpoint.read(adapter.path, adapter.spec.variant).lora()
    if not found:
        raise CheckpointError(
            f"{adapter.label} holds no LoRA. FaceID files of another kind have none, and converted "
            "files may have lost it: choose the companion file in lora_name "
            "(https://huggingface.co/h94/IP-Adapter-FaceID, into models/loras)."
        )
    return found


def companion(path: Path) -> dict[str, Tensor]:
    """Read a companion file.

    Raises:
        CheckpointError: It is no weights file, or no LoRA.
    """
    found = checkpoint.read_tensors(path)
    if not any("lora" in key for key in found):
        raise CheckpointError(
            f"'{path.name}' is no LoRA: its tensors are {some(sorted(found))}. Choose the "
            "companion file of the adapter, named ..._lora.safetensors."
        )
    return found


def is_missing(adapter: LoadedAdapter, model: Any) -> bool:
    """Whether an adapter was trained with a LoRA and no attention layer of a MODEL has any."""
    row = catalogue.lookup(adapter.spec.family, adapter.spec.variant)
    if adapter.spec.lora_rank is None and (row is None or row.lora is None):
        return False
    return not any(".attn1.to_q." in str(key) for key in model.patches)


def add(model: Any, adapter: LoadedAdapter, place: str, strength: float) -> tuple[Any, str]:
    """Add an adapter's LoRA, wherever it is, to a clone of a MODEL.

    Args:
        model: The host's MODEL; it is not changed.
        adapter: Whose LoRA.
        place: `INSIDE` or a file of the LoRA folders.
        strength: See `apply`.

    Returns:
        The clone, and a line that says which LoRA it was and how many modules were matched.

    Raises:
        CheckpointError: See `inside` and `companion`.
        IncompatibleModelError: See `apply`.
        MissingFileError: See `folders.find`.
    """
    if place == INSIDE:
        weights, label = inside(adapter), "inside the adapter"
    else:
        weights, label = companion(folders.find(folders.LORAS, place)), place
    patched, matched = apply(model, weights, strength, f"The LoRA {label}")
    return patched, f"LoRA: {label}, {matched}"


def apply(model: Any, lora: Mapping[str, Tensor], strength: float, label: str) -> tuple[Any, str]:
    """Add a LoRA to a clone of a MODEL.

    Args:
        model: The host's MODEL; it is not changed.
        lora: Tensors under any names that the host's LoRA loader knows.
        strength: Factor of the LoRA; 0 returns the model's clone without it.
        label: What to call the LoRA in messages.

    Returns:
        The clone, and a line that says how many modules were matched.

    Raises:
        IncompatibleModelError: No module matches: the LoRA is for another base model.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), names, False)
    patched = model.clone()
    matched = set(patched.add_patches(patches, strength)) if strength else set(patches)
    modules = {key.split(".lora_")[0].removesuffix(".alpha") for key in lora}
    if not matched:
        raise IncompatibleModelError(
            f"{label} does not fit this model: none of its {len(modules)} modules is there. Load a "
            "checkpoint of the family that the adapter is made for."
        )
    unmatched = sorted(module for module in modules if names.get(module) not in matched)
    report = f"{len(matched)} of {len(modules)} modules, strength {strength:g}"
    if unmatched:
        report += f"; not matched: {some(unmatched)}"
        log.warning("IP-Adapter: %s: modules not matched: %s", label, ", ".join(unmatched))
    log.info("IP-Adapter: %s applied to %s", label, report)
    return patched, report
