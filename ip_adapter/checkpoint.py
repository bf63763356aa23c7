"""Weights files: the only reader of adapters.

Files are told apart by their first bytes, never by their name: a .safetensors saved as .bin loads,
an HTML page saved as .bin is named as such. Pickles are read weights-only. Training dumps, also
whole folders of them, are read as the adapter they hold (`names`).
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import detection, lora, names
from .adapter import IPAdapter
from .detection import AUTOMATIC, Clues
from .errors import CheckpointError
from .projections import Ops
from .spec import AdapterSpec

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses longer headers
_AGAIN = "Delete it and download it again."
_SAMPLE = 1024  # numbers of a tensor, thrice, that identify it
_PIECE = 1 << 24  # bytes read at a time for a digest
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An adapter's file, read and identified, not yet built.

    Attributes:
        path: The file, or the folder of a training dump.
        spec: What it holds.
        tensors: Its tensors under published flat keys; mapped where the file can be.
        metadata: Of a safetensors file.
    """

    path: Path
    spec: AdapterSpec
    tensors: Tensors
    metadata: Mapping[str, str]

    def check(self) -> list[str]:
        """Make sure that the file is whole.

        Returns:
            The keys of the adapter's own tensors; what else is in the file is not needed.

        Raises:
            CheckpointError: Tensors are missing or have another shape.
        """
        needed = _shapes_of(self.spec)
        detection.check_tensors(shapes(self.tensors), needed, self.path.name)
        return list(needed)

    def build(self, ops: Ops = nn) -> IPAdapter:
        """Build the adapter, whose parameters are the file's tensors in the file's dtype.

        Raises:
            CheckpointError: Tensors are missing or have another shape.
        """
        needed = self.check()
        unused = sorted(k for k in set(self.tensors) - set(needed) if not lora.is_lora(k))
        if unused:
            log.warning(
                "'%s': %d tensors are not used, such as %s", self.path.name, len(unused), unused[0]
            )
        # Cloned when a tensor is a view into something larger, else the surplus stays in memory.
        kept = {key: _compact(self.tensors[key]) for key in needed}
        adapter = IPAdapter(self.spec, ops, device="meta")
        adapter.load_state_dict(kept, strict=True, assign=True)
        return adapter.requires_grad_(False)

    def lora(self) -> Tensors:
        """The LoRA inside the file under kohya's names; empty where there is none."""
        return lora.to_kohya(self.tensors, self.spec.family)

    def describe(self) -> str:
        """A few words that name the file and what it holds, for messages."""
        return f"{self.path.name} ({self.spec.summary()})"


def read(
    path: Path, variant: str = AUTOMATIC, sha256: Callable[[], str] | None = None
) -> Checkpoint:
    """Read an adapter from any published container or training dump, whatever it is called.

    Args:
        path: The file, or the folder of a training dump.
        variant: Which of the published adapters it is, where tensors leave a choice.
        sha256: Gives the file's digest; computed when needed unless given.

    Raises:
        CheckpointError: See `read_tensors` and `detection.identify`.
        IncompatibleModelError: The adapter is for an unsupported base model, or not that variant.
    """
    if path.is_dir():
        tensors: Tensors = {}
        for file in names.dump_files(path):
            tensors |= read_tensors(file)
        return _identified(path, tensors, {}, Clues(variant=variant))
    metadata = read_metadata(path)
    clues = Clues(metadata=metadata, sha256=sha256 or partial(digest, path), variant=variant)
    return _identified(path, read_tensors(path), metadata, clues)


def load_adapter(path: Path, ops: Ops = nn) -> IPAdapter:
    """Read and build an adapter; see `read` and `Checkpoint.build`."""
    return read(path).build(ops)


def read_tensors(path: Path) -> Tensors:
    """Read every tensor of a file under one flat key each.

    A safetensors file is mapped, not read; nested dictionaries of a pickle are joined with dots.

    Raises:
        CheckpointError: The file is no weights file, is damaged, or wants to run code.
    """
    head = _head(path)
    if _is_safetensors(head):
        return _read_safetensors(path, head)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _read_pickle(path, is_zip=head[:1] == b"P")
    size = path.stat().st_size
    raise CheckpointError(f"'{path.name}' is not a weights file: it is {_what(head, size)}")


def read_shapes(path: Path) -> Tensors:
    """Read a file's keys, shapes and dtypes, as tensors without storage.

    Raises:
        CheckpointError: See `read_tensors`.
    """
    # Mapped where the file can be: of a safetensors file no weights are read.
    return {key: tensor.to("meta") for key, tensor in read_tensors(path).items()}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for other files and damaged ones."""
    if not _is_safetensors(_head(path)):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def fingerprint(adapter: IPAdapter) -> str:
    """Identify a projection by content, whatever the container was.

    SHA-256 over the names and shapes of its tensors and the first, middle and last numbers of each:
    training changes all of them, and to read a whole file twice takes longer than to load it.
    """
    found = hashlib.sha256()
    for key, tensor in sorted(adapter.image_proj.state_dict().items()):
        found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        for start in (0, max(0, (len(flat) - _SAMPLE) // 2), max(0, len(flat) - _SAMPLE)):
            some = flat[start : start + _SAMPLE].cpu().contiguous()
            found.update(some.view(torch.uint8).numpy().data)
    return found.hexdigest()


@cache
def _shapes_of(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    # Asked of torch's own layers: the host's have no parameters before loading in Dynamic VRAM.
    return shapes(IPAdapter(spec, nn, device="meta").state_dict())


def _identified(
    path: Path, tensors: Tensors, metadata: Mapping[str, str], clues: Clues
) -> Checkpoint:
    detection.refuse_other_adapters(tensors, path.name)
    tensors = names.canonical(tensors, path.name)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    clues = replace(clues, dtype=_DTYPES.get(dtypes.pop(), "") if len(dtypes) == 1 else "mixed")
    spec = detection.identify(shapes(tensors), path.name, clues)
    return Checkpoint(path, spec, tensors, metadata)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and struct.unpack("<Q", head[:8])[0] < _HEADER_LIMIT and head[8:9] == b"{"


def _read_safetensors(path: Path, head: bytes) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        header = struct.unpack("<Q", head[:8])[0]
        raise CheckpointError(
            f"'{path.name}' is a damaged safetensors file ({error}; {path.stat().st_size} bytes on "
            f"disk, of which {header + 8} are its header). A download that stopped early looks "
            f"like this. {_AGAIN}"
        ) from error


def _read_pickle(path: Path, *, is_zip: bool) -> Tensors:
    if is_zip and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"'{path.name}' is a truncated torch file: its archive has no end "
            f"({path.stat().st_size} bytes on disk). {_AGAIN}"
        )
    if is_zip and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        raise CheckpointError(
            f"'{path.name}' is a TorchScript program, not a file of weights, and was not run. Get "
            "the .safetensors version of this file."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise CheckpointError(
            f"'{path.name}' is a pickle that holds more than weights and was not loaded, because "
            f"loading it could run code ({reason}). Get the .safetensors version of this file."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path.name}' is a damaged torch file ({type(error).__name__}: {error}). {_AGAIN}"
        ) from error
    return _flatten(loaded, "")


def _flatten(value: Any, prefix: str) -> Tensors:
    if isinstance(value, Tensor):
        return {prefix: value}
    out: Tensors = {}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            out.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return out


def _compact(tensor: Tensor) -> Tensor:
    used = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == used else tensor.clone()


def _what(head: bytes, size: int) -> str:
    text = head.lstrip().lower()
    if size == 0:
        return f"empty. {_AGAIN}"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return (
            "a web page. The download saved the page around the file (or a login page) instead of "
            "the file; use the page's download link."
        )
    if text.startswith(b"version https://git-lfs"):
        return (
            f"a Git LFS pointer of {size} bytes, not the file itself. Run 'git lfs pull' in its "
            "folder or download the file directly."
        )
    if head.startswith(b"GGUF"):
        return "a GGUF file, a format no adapter comes in. Get the .safetensors version."
    if text.startswith(b"{"):
        return f"JSON text, perhaps a server's error message. {_AGAIN}"
    return f"of no known format (first bytes {head[:8].hex(' ')}, {size} bytes). {_AGAIN}"
