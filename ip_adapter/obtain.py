"""Fetching what a person asked for: the terms first, then the files that are missing.

Called by a node and a command, never by itself; only here and in `hub` a connection is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from . import hub
from .downloads import UNPACK, Download, Installed, Present, find
from .errors import DownloadError
from .hub import Fetched, Watch

FACE_LICENCE = "https://github.com/deepinsight/insightface#license"


@dataclass(frozen=True)
class Request:
    """What a person asks for.

    Attributes:
        wanted: The file.
        accept_licence: Whether the person accepts a restricted licence.
        with_encoder: Whether the encoder that it reads is wanted, too.
    """

    wanted: Download
    accept_licence: bool = False
    with_encoder: bool = True

    @property
    def parts(self) -> tuple[Download, ...]:
        """The file, and its encoder where that is wanted."""
        with_encoder = self.with_encoder and self.wanted.encoder
        return (self.wanted, find(self.wanted.encoder)) if with_encoder else (self.wanted,)


@dataclass(frozen=True)
class Obtained:
    """What came of a request.

    Attributes:
        path: The file that was asked for.
        name: Its name in the folder, sub-folders included.
        text: What was done, in words, a line for each file.
        added: What was not installed before.
    """

    path: Path
    name: str
    text: str
    added: Installed


class Folders(Protocol):
    """Where models of a kind (`ADAPTERS`, `ENCODERS`) are."""

    def place(self, kind: str) -> Path:
        """The folder that new files go to."""

    def where(self, kind: str, name: str) -> Path:
        """The path of an installed file."""


def missing(request: Request, installed: Installed, folders: Folders) -> tuple[Download, ...]:
    """What of a request has to be fetched. Opens no connection.

    Raises:
        DownloadError: The licence was not accepted, or another file has the name.
    """
    wanted = request.wanted
    out = tuple(one for one in request.parts if not _is_there(one, installed))
    if wanted in out and wanted.is_restricted and not request.accept_licence:
        raise DownloadError(_refusal(wanted))
    for one in out:
        target = folders.place(one.folder) / one.file
        if target.exists():
            raise DownloadError(
                f"{target} exists and is not {one.name}: it is damaged, or something else. Delete "
                "or rename it, then try again."
            )
    return out


def obtain(
    request: Request,
    installed: Installed,
    folders: Folders,
    *,
    endpoint: str | None = None,
    watch: Watch | None = None,
) -> Obtained:
    """Fetch what was asked for, as far as it is not installed.

    Args:
        request: What is asked for.
        installed: What is installed; of that nothing is fetched.
        folders: Where files go.
        endpoint: See `hub.fetch`.
        watch: See `hub.fetch`; begins again for each file.

    Raises:
        DownloadError: See `missing`, before anything is fetched, and `hub.fetch`.
    """
    absent = missing(request, installed, folders)
    lines, names = [], []
    for one in request.parts:
        if one in absent:
            target = folders.place(one.folder) / one.file
            done = hub.fetch(one.remote, target, endpoint=endpoint, watch=watch)
            names.append(one.file)
            lines.append(_report(one, done))
        else:
            file = installed[one.name].file
            names.append(file)
            lines.append(f"{one.name} is installed already, as {file}. Nothing was downloaded.")
    if request.wanted.more:
        lines.append(f"It also needs {request.wanted.more}. {UNPACK}")
    added = {one.name: Present(one.file) for one in absent}
    path = folders.where(request.wanted.folder, names[0])
    return Obtained(path, names[0], "\n".join(lines), added)


def _is_there(one: Download, installed: Installed) -> bool:
    return one.name in installed and installed[one.name].is_certain


def _refusal(one: Download) -> str:
    return (
        f"{one.name} was not downloaded: its licence must be accepted first. It is "
        f"{one.licence}; read it at {one.page} and {FACE_LICENCE}. If you accept it, set "
        "accept_licence in Download IP-Adapter Model, or add --accept-licence to the command. For "
        "other uses take plus-face or full-face, which are Apache-2.0."
    )


def _report(one: Download, done: Fetched) -> str:
    whose = "the published one" if done.is_known else "the one that the hub announces"
    return (
        f"{one.name}: downloaded {done.path} ({hub.words(done.size)}). Its SHA-256 is {whose}, "
        f"{done.sha256}."
    )
