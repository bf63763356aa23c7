"""Tensors by content key in safetensors shards on disk; knows nothing of what they mean.

A shard's name is the SHA-256 of its bytes, so a damaged one is told by reading it. Shards are
written under another name and renamed when whole; they are never changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import files
from .pieces import DataError, Piece

log = logging.getLogger(__name__)

SHARD_BYTES = 32 << 20
"""A shard is written when this much waits, or `SHARD_ENTRIES`: what a power cut may lose."""

SHARD_ENTRIES = 512

_OPEN = 128
"""Shards mapped at a time."""

_FRESH = 2.0
"""Seconds; a younger file may still change without another time stamp."""


class Digests:
    """SHA-256 of files and their pieces, remembered as long as a file's size and time stay.

    Args:
        file: Where to remember: one JSON list per line, of which the last counts.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[object]] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    name, *rest = json.loads(line)
                    self._known[name] = rest
                except (ValueError, TypeError):
                    continue  # cut off when the machine stopped: computed again

    def of(self, piece: Piece) -> str:
        """SHA-256 in hexadecimal.

        Raises:
            OSError: It cannot be read.
        """
        name = f"{piece.path.absolute()}:{piece.offset}:{piece.length}"
        status = piece.path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(name)
        if known is not None and known[:2] == stamp:
            return str(known[2])
        found = hashlib.sha256(piece.read()).hexdigest()
        if time.time() - status.st_mtime > _FRESH:
            self._known[name] = [*stamp, found]
            # A cache that may only be read costs the time of hashing.
            with contextlib.suppress(OSError), self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, *stamp, found]) + "\n")
        return found


class Store:
    """One folder of shards.

    Args:
        folder: Made if need be.
        digests: Remembers which shards were found whole.
        recipe: How the tensors were made, for whoever looks into the folder.

    Raises:
        DataError: See `flush`.
    """

    def __init__(self, folder: Path, digests: Digests, recipe: Mapping[str, object]) -> None:
        self.folder = folder
        self._places: dict[str, Path] = {}
        self._pending: dict[str, Tensor] = {}
        self._entries: set[str] = set()
        self._open: OrderedDict[Path, Any] = OrderedDict()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        if not (folder / "recipe.json").is_file():
            self._write("recipe.json", json.dumps(recipe, indent=1).encode())
        for shard in sorted(folder.glob("*.safetensors")):
            self._take(shard, digests)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._entries

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry; it is on disk after `flush`, or when enough of them wait.

        Args:
            key: Digest of what it was made from, of lower-case letters and digits.
            tensors: Its parts by name.

        Raises:
            DataError: See `flush`.
        """
        for name, tensor in tensors.items():
            self._pending[f"{key}/{name}"] = tensor.detach().cpu().contiguous().clone()
        self._entries.add(key)
        waiting = sum(tensor.nbytes for tensor in self._pending.values())
        if waiting >= SHARD_BYTES or len(self._entries) >= SHARD_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard.

        Raises:
            DataError: The disk is full or not writable. What was on it before is as it was.
        """
        if not self._entries:
            return
        content = safetensors.torch.save(self._pending)
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        path = self._write(name, content)
        self._places |= dict.fromkeys(self._entries, path)
        self._pending, self._entries = {}, set()

    def get(self, key: str, name: str) -> Tensor:
        """Read a part of an entry: a view of the mapped file, not to be changed in place.

        Raises:
            DataError: The shard was lost or damaged after this store was opened.
            KeyError: There is no such part.
        """
        if key in self._entries:
            return self._pending[f"{key}/{name}"]
        path = self._places[key]
        try:
            found: Tensor = self._map(path).get_tensor(f"{key}/{name}")
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"The cached shard '{path}' cannot be read any more ({error}). Start again: it is "
                "then made anew, and the run can be resumed."
            ) from error
        return found

    def parts(self, key: str) -> set[str]:
        """Names of an entry's parts."""
        if key in self._entries:
            names = list(self._pending)
        else:
            names = list(self._map(self._places[key]).keys())
        return {name.partition("/")[2] for name in names if name.startswith(f"{key}/")}

    def _take(self, shard: Path, digests: Digests) -> None:
        """Enter a shard into the index; a damaged one is deleted, as its name would be in use."""
        try:
            whole = digests.of(Piece(shard)) == shard.stem
            with safe_open(shard, framework="pt") as file:
                names = list(file.keys())
        except SafetensorError:
            whole, names = False, []
        except OSError as error:
            log.warning("IP-Adapter: the cached shard %s cannot be read (%s)", shard, error)
            return
        if not whole:
            log.warning("IP-Adapter: the cached shard %s is damaged and is made anew", shard)
            shard.unlink(missing_ok=True)
            return
        self._places |= {name.partition("/")[0]: shard for name in names}

    def _map(self, path: Path) -> Any:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = safe_open(path, framework="pt")
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return self._open[path]

    def _write(self, name: str, content: bytes) -> Path:
        target = self.folder / name
        try:
            files.write(target, content)
        except OSError as error:
            raise self._unwritable(error) from error
        return target

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"Cannot write to the cache folder '{self.folder}' ({error}). Free some space or "
            "choose another folder; what is in it already will be used again."
        )


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 over a module's weights: names, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()
