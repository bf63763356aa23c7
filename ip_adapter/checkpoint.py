"""Weights files: the only reader of adapters.

Files are told apart by their first bytes, never by their name: a .safetensors saved as .bin loads,
an HTML page saved as .bin is named as such. Pickles are read weights-only.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import detection
from .adapter import IPAdapter
from .errors import CheckpointError
from .projections import Ops
from .spec import AdapterSpec

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses longer headers
_AGAIN = "Delete it and download it again."


def read_tensors(path: Path) -> Tensors:
    """Read every tensor of a file under one flat key each.

    A safetensors file is mapped, not read; nested dictionaries of a pickle are joined with dots.

    Raises:
        CheckpointError: The file is no weights file, is damaged, or wants to run code.
    """
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if _is_safetensors(head):
        return _read_safetensors(path, head, size)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _read_pickle(path, is_zip=head[:1] == b"P")
    raise CheckpointError(f"'{path.name}' is not a weights file: it is {_what(head, size)}")


def load_adapter(path: Path, ops: Ops = nn) -> IPAdapter:
    """Read an adapter from any published container, whatever the file is called.

    Its parameters keep the file's dtype and, for safetensors, stay mapped.

    Raises:
        CheckpointError: See `read_tensors` and `detection.identify`.
        IncompatibleModelError: The adapter is for an unsupported base model.
    """
    tensors = _canonical(read_tensors(path))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    spec = detection.identify(shapes, path.name)
    # Asked of torch's own layers: the host's have no parameters before loading in Dynamic VRAM.
    plain = IPAdapter(spec, nn, device="meta").state_dict()
    needed = {key: tuple(tensor.shape) for key, tensor in plain.items()}
    detection.check_tensors(shapes, needed, path.name)
    unused = sorted(set(tensors) - set(needed))
    if unused:
        log.warning("'%s': %d tensors are not used, such as %s", path.name, len(unused), unused[0])
    # Cloned when a tensor is a view into something larger, else the surplus would stay in memory.
    kept = {key: _compact(tensors[key]) for key in needed}
    adapter = IPAdapter(spec, ops, device="meta")
    adapter.load_state_dict(kept, strict=True, assign=True)
    return adapter.requires_grad_(False)


def fingerprint(adapter: IPAdapter) -> str:
    """Identify a projection by content: SHA-256 over its tensors, whatever the container was."""
    digest = hashlib.sha256()
    for key, tensor in sorted(adapter.image_proj.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(spec: AdapterSpec, path: Path) -> str:
    """One line that names a loaded adapter."""
    return f"{path.name} ({spec.describe()})"


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and struct.unpack("<Q", head[:8])[0] < _HEADER_LIMIT and head[8:9] == b"{"


def _read_safetensors(path: Path, head: bytes, size: int) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        header = struct.unpack("<Q", head[:8])[0]
        raise CheckpointError(
            f"'{path.name}' is a damaged safetensors file ({error}; {size} bytes on disk, of which "
            f"{header + 8} are its header). A download that stopped early looks like this. {_AGAIN}"
        ) from error


def _read_pickle(path: Path, *, is_zip: bool) -> Tensors:
    if is_zip and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"'{path.name}' is a truncated torch file: its archive has no end "
            f"({path.stat().st_size} bytes on disk). {_AGAIN}"
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


def _canonical(tensors: Tensors) -> Tensors:
    """Drop wrappers that training scripts leave around the published keys."""
    wrappers = ("state_dict.", "module.", "model.")
    while any(part in key for key in tensors for part in (".image_proj.", ".ip_adapter.")):
        wrapper = next((w for w in wrappers if all(key.startswith(w) for key in tensors)), None)
        if wrapper is None:
            break
        tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
    return tensors


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
