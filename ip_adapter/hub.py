"""One file of the Hugging Face hub: resumed where it broke off, checked, whole or not there.

huggingface_hub does the transfer and is imported here alone, when something is fetched. Its
`hf_hub_download` keeps nothing of a broken download any more (huggingface_hub issue 4196), so what
has arrived is kept in a hidden file beside the target, and its `http_get` asks for the rest.
"""

from __future__ import annotations

import errno
import io
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from .checkpoint import digest
from .errors import DownloadError, IPAdapterError

Watch = Callable[[int, int], None]
"""Told the bytes that are there and the bytes in all, after each piece. May raise to stop."""

HUB = "https://huggingface.co/"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRANSPORT = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}
"""Libraries that huggingface_hub has used for its connections, by version."""

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class Remote:
    """A file on the hub.

    Attributes:
        repository: ``owner/name``.
        path: Within the repository.
        sha256: What its digest may be; empty where none is known.
    """

    repository: str
    path: str
    sha256: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        """Where a person can see it."""
        return f"{HUB}{self.repository}/blob/main/{self.path}"


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched and found whole.

    Attributes:
        path: Where it is.
        size: In bytes.
        sha256: Its digest.
        is_known: Whether the digest is one that was known before; else the hub's word for it.
    """

    path: Path
    size: int
    sha256: str
    is_known: bool


@dataclass(frozen=True)
class _Announced:
    """What the hub says of a file: its address at the commit of now, bytes, SHA-256."""

    url: str
    size: int
    sha256: str


def fetch(
    remote: Remote, target: Path, *, endpoint: str | None = None, watch: Watch | None = None
) -> Fetched:
    """Fetch a file, or the rest of it if a part is there.

    Until the end nothing is visible under the target's name. A part that arrived stays, hidden, for
    the next time; one with the wrong digest is deleted.

    Args:
        remote: The file.
        target: The path to write; its folder is made if need be.
        endpoint: The hub's address; by default huggingface_hub's own, which ``HF_ENDPOINT`` sets.
        watch: See `Watch`.

    Raises:
        DownloadError: huggingface_hub is missing, the hub is not reached, has no such file or wants
            a login, the disk is full, the connection broke, or the digest is wrong.
    """
    _require_library()
    with _in_words(remote, target):
        announced = _announced(remote, endpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _part(target, announced)
        with _alone(target):
            _transfer(announced, part, target, watch)
            found = digest(part)
            if found not in (remote.sha256 or (announced.sha256,)):
                part.unlink()
                raise DownloadError(
                    f"What came from {remote.page} is damaged: its SHA-256 is {found}, and should "
                    f"be {announced.sha256}. It was deleted. Try again; if it stays so, something "
                    "between here and the hub changes files."
                )
            part.replace(target)
            for old in target.parent.glob(f".{escape(target.name)}.*.partial"):
                old.unlink(missing_ok=True)  # begun when the hub had another file of that name
    return Fetched(target, announced.size, found, bool(remote.sha256))


def words(size: int | None) -> str:
    """A number of bytes as people read it: ``45 MB``, ``2.5 GB``."""
    if size is None:
        return "not known"
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            number = size / unit
            return f"{number:.0f} {name}" if number >= 10 else f"{number:.1f} {name}"
    return f"{size} bytes"


def _require_library() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise DownloadError(
            "Downloads need huggingface_hub, which is not installed. Install it with the Python "
            "that runs ComfyUI: python -m pip install huggingface_hub"
        ) from error


def _announced(remote: Remote, endpoint: str | None) -> _Announced:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    address = partial(hf_hub_url, remote.repository, remote.path, endpoint=endpoint)
    found = get_hf_file_metadata(address())
    if not found.commit_hash or not found.size:
        raise DownloadError(
            f"The answer for {remote.page} is not that of a Hugging Face hub; a proxy or a login "
            "page may stand between. Open that address in a browser, and check HF_ENDPOINT."
        )
    sha256 = (found.etag or "").lower()
    if not _SHA256.fullmatch(sha256):
        if not remote.sha256:
            raise DownloadError(
                f"{remote.page} cannot be checked: its SHA-256 is not known here, and the hub "
                "announces none. Nothing was downloaded."
            )
        sha256 = remote.sha256[0]
    if remote.sha256 and sha256 not in remote.sha256:
        raise DownloadError(
            f"{remote.page} is another file than it was: the hub announces the SHA-256 {sha256}, "
            f"known is {' or '.join(remote.sha256)}. Nothing was downloaded. If its publisher "
            "renewed it, download it from that page by hand."
        )
    return _Announced(address(revision=found.commit_hash), found.size, sha256)


def _part(target: Path, announced: _Announced) -> Path:
    """Where what has arrived waits; a name that the host does not list as a model."""
    return target.with_name(f".{target.name}.{announced.sha256[:16]}.partial")


def _transfer(announced: _Announced, part: Path, target: Path, watch: Watch | None) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if part.exists() and part.stat().st_size > announced.size:
        part.unlink()
    there = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(target.parent).free
    if free < announced.size - there:
        raise DownloadError(
            f"{target.name} needs {words(announced.size - there)} more, and the disk of "
            f"{target.parent} has {words(free)} free. Make room, or choose another folder."
        )
    if there == announced.size:
        return
    with _Watched(part, announced.size, watch) as file:
        http_get(
            announced.url,
            file,
            resume_size=there,
            headers={**build_hf_headers(), "Accept-Encoding": "identity"},
            expected_size=announced.size,
            displayed_filename=target.name,
        )


class _Watched(io.BufferedWriter):
    """A file that is appended to, and tells how far it is."""

    def __init__(self, path: Path, size: int, watch: Watch | None) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._size, self._watch = size, watch

    def write(self, data: Any, /) -> int:
        written = super().write(data)
        if self._watch is not None:
            self._watch(self.tell(), self._size)
        return written


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One download of a file at a time, whichever process it runs in."""
    from filelock import FileLock, Timeout  # huggingface_hub needs it, too

    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DownloadError(
            f"{target.name} is being downloaded into {target.parent} by another ComfyUI or "
            "command. Wait for it."
        ) from error
    except NotImplementedError:  # a disk without locks; a mix of two would fail its digest
        yield
        return
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            path.unlink()


# What went wrong, in our words


@contextmanager
def _in_words(remote: Remote, target: Path) -> Iterator[None]:
    try:
        yield
    except IPAdapterError:
        raise
    except Exception as error:
        reason = _reason(error, remote, target)
        if reason is None:
            raise
        kept = sum(
            path.stat().st_size for path in target.parent.glob(f".{escape(target.name)}.*.partial")
        )
        if kept:
            reason += f" {words(kept)} have arrived and are kept: run it again to get the rest."
        raise DownloadError(reason) from error


def _reason(error: Exception, remote: Remote, target: Path) -> str | None:
    """Why a download failed and what to do; None where it is no failure of a download."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return (
                f"{remote.page} is gated: its publisher wants you to accept terms. Do so on that "
                "page with your account, then log in with `hf auth login` or set HF_TOKEN."
            )
        case (
            errors.RepositoryNotFoundError()
            | errors.EntryNotFoundError()
            | errors.RevisionNotFoundError()
        ):
            return (
                f"The hub has no file at {remote.page}: it was moved, deleted or made private. "
                f"Look for {Path(remote.path).name} on {HUB}{remote.repository}."
            )
        case errors.OfflineModeIsEnabled():
            return (
                f"{remote.page} was not downloaded, because HF_HUB_OFFLINE is set. Unset it, or "
                f"download the file by hand into {target.parent}, as {target.name}."
            )
        case errors.HfHubHTTPError():
            status = getattr(error.response, "status_code", "an error")
            return f"The hub answered {status} for {remote.page}. Try again later."
    if _is_transport(error):
        first = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"No connection to the hub for {remote.page}, or it broke ({first}). Check the "
            "network, a proxy (HTTPS_PROXY) and a mirror (HF_ENDPOINT)."
        )
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return f"The disk of {target.parent} is full. Make room."
        if error.errno is None:  # huggingface_hub: fewer or more bytes than announced
            return f"The connection to the hub broke for {remote.page}."
        return f"{target} cannot be written ({error}). Choose a folder that can."
    return None


def _is_transport(error: Exception) -> bool:
    libraries = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
    return bool(libraries & _TRANSPORT) or isinstance(error, ConnectionError | TimeoutError)
