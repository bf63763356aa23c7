"""What is installed: each file of the model folders, known by its content under whatever name.

Files are identified once and remembered while their size and time stay the same. Only headers are
read; of files that have none, an outline is kept in the host's user folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from .. import checkpoint
from ..encoders import Encoder, recognise
from ..files import replacing
from ..spec import AdapterSpec
from . import digests, folders

log = logging.getLogger(__name__)

T = TypeVar("T")

_LEGACY = b"\x80\x02\x8a\x0a"
"""How torch's files began before they were zip archives."""

_REASON = 160  # characters of an error that are kept


@dataclass(frozen=True)
class InstalledAdapter:
    """An adapter on disk.

    Attributes:
        name: What the host lists it as, sub-folders included.
        path: The file.
        spec: What it holds.
    """

    name: str
    path: Path
    spec: AdapterSpec


@dataclass(frozen=True)
class InstalledEncoder:
    """An image encoder on disk.

    Attributes:
        name: What the host lists it as, sub-folders included.
        path: The file.
        encoder: Which tower it holds.
    """

    name: str
    path: Path
    encoder: Encoder


@dataclass(frozen=True)
class InstalledLoRA:
    """A file of the LoRA folders, not looked into.

    Attributes:
        name: What the host lists it as, sub-folders included.
        path: The file.
        size: In bytes.
    """

    name: str
    path: Path
    size: int


def adapters() -> list[InstalledAdapter]:
    """The adapters that can be loaded, in the order in which the host lists them."""
    found = _look(folders.ADAPTERS, _adapter)
    return [InstalledAdapter(n, p, spec) for n, p, spec in found if not isinstance(spec, str)]


def encoders() -> list[InstalledEncoder]:
    """The image encoders, in the order in which the host lists them."""
    found = _look(folders.ENCODERS, _encoder)
    return [InstalledEncoder(n, p, tower) for n, p, tower in found if not isinstance(tower, str)]


def loras() -> list[InstalledLoRA]:
    """Every LoRA file with its size; there may be thousands, so none is opened."""
    return [
        InstalledLoRA(name, path, status.st_size) for name, path, status in _files(folders.LORAS)
    ]


def lora_keys(file: InstalledLoRA) -> frozenset[str]:
    """The names of a LoRA's tensors; empty where it cannot be read."""
    return _keys(file.path, folders.stamp_of(file.path.stat()))


def no_adapters() -> dict[str, str]:
    """Why the other files of the adapter folders are none: name -> reason."""
    found = _look(folders.ADAPTERS, _adapter)
    return {name: reason for name, _, reason in found if isinstance(reason, str)}


def no_encoders() -> dict[str, str]:
    """Why the other files of the encoder folders are none: name -> reason."""
    found = _look(folders.ENCODERS, _encoder)
    return {name: reason for name, _, reason in found if isinstance(reason, str)}


def places(folder: str) -> list[str]:
    """The paths of a model folder, the one that new files go to first."""
    return list(folder_paths.get_folder_paths(folder))


def fingerprint(*names: str) -> str:
    """Changes with the names, sizes and times of the files in model folders; opens none of them."""
    found = hashlib.sha256()
    for folder in names:
        for name, path, status in _files(folder):
            found.update(f"{folder}\0{name}\0{path}\0{folders.stamp_of(status)}\n".encode())
    return found.hexdigest()


def _files(folder: str) -> Iterator[tuple[str, Path, os.stat_result]]:
    for name in folders.names(folder):
        path = folder_paths.get_full_path(folder, name)
        try:
            status = os.stat(path or "")
        except OSError:
            continue  # deleted since the host listed it
        yield name, Path(path), status


def _look(folder: str, identify: Callable[[Path, str], T]) -> Iterator[tuple[str, Path, T]]:
    for name, path, status in _files(folder):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield name, path, identify(path, folders.stamp_of(status))


@cache
def _adapter(path: Path, stamp: str) -> AdapterSpec | str:
    """What a file holds, or why it is no adapter."""
    try:
        found = checkpoint.read(_outline(path, stamp), sha256=partial(digests.sha256, path))
        found.check()
    except Exception as error:  # whatever is wrong with one file, the others count
        return _reason(error, path)
    return found.spec


@cache
def _encoder(path: Path, stamp: str) -> Encoder | str:
    """Which tower a file holds, or why it holds none."""
    try:
        shapes = checkpoint.shapes(checkpoint.read_shapes(_outline(path, stamp)))
    except Exception as error:  # see `_adapter`
        return _reason(error, path)
    return recognise(shapes) or "holds no CLIP or SigLIP image encoder"


@cache
def _keys(path: Path, stamp: str) -> frozenset[str]:
    try:
        return frozenset(checkpoint.read_shapes(path))
    except Exception as error:  # see `_adapter`
        log.info("IP-Adapter: '%s' was passed over: %s", path.name, error)
        return frozenset()


def _reason(error: Exception, path: Path) -> str:
    log.info("IP-Adapter: '%s' was passed over: %s", path.name, error)
    first = str(error).removeprefix(f"'{path.name}'").lstrip(": ").split(". ")[0].rstrip(".")
    first = first or type(error).__name__
    return first if len(first) <= _REASON else first[: _REASON - 3] + "..."


def _outline(path: Path, stamp: str) -> Path:
    """A small file with the same name, keys, shapes and types, for a file without a header.

    torch's legacy container gives its shapes away only when all of it is read, which takes long
    for the published FaceID files of up to 1.5 GB.

    Returns:
        The outline, or `path` itself where the file has a header.
    """
    with path.open("rb") as file:
        if file.read(len(_LEGACY)) != _LEGACY:
            return path
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    folder = Path(folder_paths.get_user_directory()) / "ip_adapter" / "outlines" / key
    known = folder / stamp / path.name
    if known.is_file():
        return known
    zeros: dict[torch.dtype, Tensor] = {}
    hollow = {
        name: zeros.setdefault(t.dtype, torch.zeros((), dtype=t.dtype)).expand(t.shape)
        for name, t in checkpoint.read_tensors(path).items()
    }
    try:
        shutil.rmtree(folder, ignore_errors=True)  # outlines of what the file was before
        with replacing(known) as partial:
            torch.save(hollow, partial)
    except OSError as error:
        log.warning("IP-Adapter: cannot keep outlines in %s (%s)", folder.parent, error)
        return path
    return known
