"""Digests of the user's files, computed once and kept in the host's user folder.

Nothing is written beside the user's files. An entry counts while a file's size and time are as they
were when it was read.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import folder_paths

from .. import files
from ..checkpoint import digest
from . import folders

log = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """SHA-256 of a file; computed only if it is not known, or the file changed."""
    known = _read()
    stamp = folders.stamp_of(path.stat())
    key = str(path.resolve())
    entry = known.get(key)
    if isinstance(entry, dict) and entry.get("stamp") == stamp:
        return str(entry.get("sha256"))
    log.info("IP-Adapter: computing the SHA-256 of %s", path.name)
    found = digest(path)
    known[key] = {"stamp": stamp, "sha256": found}
    _write({place: value for place, value in known.items() if os.path.exists(place)})
    return found


def _file() -> Path:
    return Path(folder_paths.get_user_directory()) / "ip_adapter" / "digests.json"


def _read() -> dict[str, object]:
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there yet, or not ours any more: computed again
    return known if isinstance(known, dict) else {}


def _write(known: dict[str, object]) -> None:
    """Replace the file in one step; a read-only user folder only costs the time of hashing."""
    target = _file()
    try:
        files.write(target, json.dumps(known, indent=1, sort_keys=True).encode())
    except OSError as error:
        log.warning("IP-Adapter: cannot remember digests in %s (%s)", target.parent, error)
