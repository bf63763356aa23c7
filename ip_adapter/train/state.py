"""What a training run keeps on disk: the adapter's weights for use, and its state to go on from.

Whatever is written appears whole or not at all: under another name first, flushed to the disk, then
renamed. The state before is removed only when the next one is complete, so that a full disk, a
power cut or a kill in the middle of saving loses nothing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import catalogue, checkpoint, lora
from ..adapter import IPAdapter
from ..convert import FORMAT, VERSION
from ..errors import CheckpointError, IncompatibleModelError, IPAdapterError
from ..files import replacing
from ..spec import AdapterSpec
from .recipe import Recipe

log = logging.getLogger(__name__)

STATES = "state"
"""Folder of states inside a run's folder."""

_PROGRESS = "progress.json"
_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Of written weights, by the names of `Recipe.weights`."""

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
"""What a full disk looks like: safetensors and torch have errors of their own for it."""


class SaveError(IPAdapterError):
    """Weights or a state could not be written; what was there before still is."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        samples: Samples seen by all processes together; the place in data and in chance.
        processes: How many processes there were.
        recipe: `Recipe.lasting` of the run.
    """

    step: int
    samples: int
    processes: int
    recipe: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Start:
    """A published adapter to begin with.

    Attributes:
        adapter: In float32, with gradients.
        lora: Tensors of a FaceID adapter's LoRA under the file's own keys. They are not trained,
            and belong into what is written; put the LoRA on the MODEL before training.
    """

    adapter: IPAdapter
    lora: dict[str, Tensor]


def start_from(path: Path) -> Start:
    """Read an adapter, in any container the loader knows, to go on training it.

    Raises:
        CheckpointError: See `checkpoint.read`.
        IncompatibleModelError: Its projection reads an instruction, for which there is no trainer.
    """
    with torch.inference_mode(False):
        found = checkpoint.read(path)
        if found.spec.projection.text:
            raise IncompatibleModelError(
                f"{found.describe()} reads an instruction beside the image, which cannot be "
                "trained here. Start from an adapter that reads an image, a face, or both."
            )
        adapter = found.build()
        for parameter in adapter.parameters():
            parameter.data = parameter.data.clone().float()  # the file may be mapped
        rest = {key: tensor.clone() for key, tensor in found.tensors.items() if lora.is_lora(key)}
    return Start(adapter.requires_grad_(True), rest)


def metadata(
    spec: AdapterSpec, recipe: Recipe, step: int, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What written weights say of themselves.

    Args:
        spec: Of the adapter.
        recipe: It was trained with.
        step: Optimizer steps done.
        more: Such as ``base_checkpoint``, the name of the base's file.
    """
    out = {
        "format": FORMAT,
        "version": VERSION,
        "base_model": spec.family.name,
        "projection": spec.projection.layout,
        "tokens": str(spec.projection.tokens),
        "needs": spec.needs,
        "design": recipe.design,
        "steps": str(step),
        "recipe": json.dumps(recipe.lasting(), sort_keys=True),
        "recipe_sha256": recipe.digest(),
    }
    if spec.encoder is not None:
        out["encoder"] = spec.encoder.name
    # So that the loader need not guess which of the published adapters with equal tensors it is.
    rows = [r for r in catalogue.variants(spec.family) if r.layout == spec.projection.layout]
    known = [r.variant for r in rows if r.variant == spec.variant]
    general = [r.variant for r in rows if r.purpose in ("general", "full face", "face identity")]
    if known or general:
        out["variant"] = (known or general)[0]
    return out | dict(more or {})


def write_weights(
    adapter: IPAdapter,
    path: Path,
    notes: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float16,
    lora: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an adapter as the flat .safetensors that the loader and other implementations read.

    Args:
        adapter: What was trained.
        path: The file; it appears whole, or not at all.
        notes: See `metadata`. Of a "simple" design only the projection is written, because it has
            no keys and values of its own; `read_into` reads it.
        dtype: Of the tensors.
        lora: See `Start`.

    Raises:
        SaveError: The disk is full, or cannot be written.
    """
    tensors = {
        key: tensor.detach().to("cpu", dtype).contiguous()
        for key, tensor in adapter.state_dict().items()
        if notes.get("design") != "simple" or key.startswith("image_proj.")
    }
    tensors |= dict(lora or {})
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=dict(notes))
    except WRITE_ERRORS as error:
        raise _not_written(path, error) from error
    return path


def read_into(adapter: IPAdapter, path: Path) -> None:
    """Read weights that `write_weights` wrote, of any design, into an adapter of the same shapes.

    Raises:
        CheckpointError: Tensors are missing, not known or of another shape.
    """
    tensors = {k: t for k, t in checkpoint.read_tensors(path).items() if not lora.is_lora(k)}
    missing, unexpected = adapter.load_state_dict(tensors, strict=False)
    missing = [key for key in missing if key.startswith("image_proj.")]
    if missing or unexpected:
        raise CheckpointError(
            f"'{path.name}' is not of this adapter: {len(missing)} tensors of the projection are "
            f"missing and {len(unexpected)} are not known. Build the adapter that was trained."
        )


def latest(run: Path) -> tuple[Path, Progress] | None:
    """The newest complete state in a run's folder, or None where there is none."""
    folder = run / STATES
    if not folder.is_dir():
        return None
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: int(path.name[5:]), reverse=True):
        try:
            return path, Progress(**json.loads((path / _PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            log.warning("IP-Adapter: %s is no complete state, and is passed over", path)
    return None


def save_state(
    run: Path,
    progress: Progress,
    write: Callable[[Path], object],
    *,
    is_main: bool = True,
    agree: Callable[[bool], bool] = bool,
) -> Path:
    """Keep a state, and then drop the ones before it.

    Called by every process; all of them see the same folder.

    Args:
        run: The run's folder.
        progress: Of the run.
        write: Writes this process's part into a folder.
        is_main: Whether this process makes and renames the folder.
        agree: Waits for all processes, and returns whether every one of them passed True.

    Returns:
        The state's folder.

    Raises:
        SaveError: The disk is full or cannot be written; the state before is untouched.
    """
    final = run / STATES / f"step-{progress.step:08d}"
    partial = final.with_name(_PARTIAL + final.name)
    failure: Exception | None = None

    def attempt(action: Callable[[], object], when: bool = True) -> bool:
        """Do something, then find out whether it went well everywhere."""
        nonlocal failure
        try:
            if when:
                action()
        except WRITE_ERRORS as error:
            failure = error
        return agree(failure is None)

    def finish() -> None:
        text = json.dumps(asdict(progress), indent=2, sort_keys=True)
        (partial / _PROGRESS).write_text(text, encoding="utf-8")
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                _flush(path)
        if final.exists():
            shutil.rmtree(final)  # of the same step, hence the same
        os.replace(partial, final)
        _flush(final.parent)

    done = (
        attempt(lambda: _fresh(partial), is_main)
        and attempt(lambda: write(partial))
        and attempt(finish, is_main)
    )
    if not done:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise _not_written(final, failure) from failure
    if is_main:
        for path in final.parent.iterdir():
            older = (match := _STEP.fullmatch(path.name)) and int(match[1]) < progress.step
            if older or path.name.startswith(_PARTIAL):
                shutil.rmtree(path, ignore_errors=True)
    return final


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _flush(path: Path) -> None:
    """Have the system put a file, or a folder's names, on the disk itself."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_written(path: Path, error: Exception | None) -> SaveError:
    reason = " ".join(str(error).split()) if error else "another process could not write its part"
    try:
        free = f", {shutil.disk_usage(_existing(path)).free / 1e6:.0f} MB are free there"
    except OSError:
        free = ""
    return SaveError(
        f"'{path}' could not be written ({reason}{free}). What was saved before is untouched: make "
        "room on the disk, or let the folder be written, and resume."
    )


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
