"""Downloads in the host: into its folders, with its progress bar and its stop button."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils

from .. import downloads
from ..downloads import Present
from ..obtain import Obtained, Request, obtain
from . import folders, installed

_UNIT = 1 << 20  # the host's bar counts whole numbers that a page can show


def present() -> dict[str, Present]:
    """What of the list is installed, by content, under whatever name."""
    return downloads.collect(_present())


def fingerprint() -> str:
    """Changes with the files of the folders that downloads go to."""
    return installed.fingerprint(folders.ADAPTERS, folders.ENCODERS)


def download(
    name: str, *, accept_licence: bool, with_encoder: bool = True, endpoint: str | None = None
) -> Obtained:
    """Fetch a model and, unless one is installed, the encoder that it reads.

    Args:
        name: One of `downloads.NAMES`.
        accept_licence: Whether a restricted licence is accepted.
        with_encoder: Whether the encoder is wanted, too.
        endpoint: See `hub.fetch`.

    Raises:
        DownloadError: See `obtain.obtain`.
        InterruptProcessingException: The stop button; what has arrived is kept.
    """
    request = Request(downloads.find(name), accept_licence, with_encoder)
    return obtain(request, present(), _Folders(), endpoint=endpoint, watch=_Bar())


def _present() -> Iterator[tuple[str, Present]]:
    for adapter in installed.adapters():
        held = downloads.held_by(adapter.spec)
        if held is not None:
            yield held[0], Present(adapter.name, held[1])
    for encoder in installed.encoders():
        name = downloads.tower(encoder.encoder)
        if name is not None:
            yield name, Present(encoder.name)


@dataclass(frozen=True)
class _Folders:
    """The folders that the host is configured with; it calls the kinds as `downloads` does."""

    def place(self, kind: str) -> Path:
        return Path(installed.places(kind)[0])

    def where(self, kind: str, name: str) -> Path:
        return folders.find(kind, name)


class _Bar:
    """The node's progress bar, which begins again with each file, and the stop button."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._size = 0

    def __call__(self, done: int, size: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        total = max(1, size // _UNIT)
        if self._bar is None or size != self._size:
            self._bar, self._size = comfy.utils.ProgressBar(total), size
        self._bar.update_absolute(min(total, done // _UNIT), total)
