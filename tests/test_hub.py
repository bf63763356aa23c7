"""Fetching one file with the real huggingface_hub, from a hub on this machine."""

from __future__ import annotations

import errno
import hashlib
import random
import socket
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
from huggingface_hub import close_session, constants

from ip_adapter import hub
from ip_adapter.errors import DownloadError
from ip_adapter.hub import Fetched, Remote
from tests.hub_server import Hub, serving

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PIECE = 64 * 1024
REPOSITORY, PATH = "owner/name", "folder/model.safetensors"
KNOWN = Remote(REPOSITORY, PATH, (SHA256,))
UNKNOWN = Remote(REPOSITORY, PATH)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits to try again
    with serving() as running:
        running.files[f"{REPOSITORY}/{PATH}"] = CONTENT
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "ipadapter" / "mine.safetensors"


def fetch(server: Hub, target: Path, remote: Remote = KNOWN, **options: object) -> Fetched:
    return hub.fetch(remote, target, endpoint=server.endpoint, **options)  # type: ignore[arg-type]


def refusal(server: Hub, target: Path, remote: Remote = KNOWN) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch(server, target, remote)
    assert not target.exists()
    return str(caught.value)


def parts(target: Path) -> list[Path]:
    """What lies in the folder beside the target."""
    return [path for path in target.parent.glob("*") if path != target]


class Stopped(BaseException):
    """As the host's, which is no Exception."""


def stop_after(count: int) -> hub.Watch:
    calls = []

    def watch(done: int, size: int) -> None:
        calls.append(done)
        if len(calls) == count:
            raise Stopped

    return watch


def test_a_file_arrives_whole_and_nothing_else_stays(server: Hub, target: Path) -> None:
    told: list[tuple[int, int]] = []
    done = fetch(server, target, watch=lambda *numbers: told.append(numbers))
    assert done == Fetched(target, len(CONTENT), SHA256, is_known=True)
    assert target.read_bytes() == CONTENT
    assert parts(target) == []
    steps = [*range(PIECE, len(CONTENT), PIECE), len(CONTENT)]
    assert told == [(step, len(CONTENT)) for step in steps]
    assert server.seen == [("HEAD", "hub", ""), ("GET", "hub", ""), ("GET", "cdn", "")]


def test_without_a_known_digest_the_hub_s_word_counts(server: Hub, target: Path) -> None:
    assert not fetch(server, target, UNKNOWN).is_known
    assert target.read_bytes() == CONTENT


def test_a_stopped_download_goes_on_where_it_was(server: Hub, target: Path) -> None:
    with pytest.raises(Stopped):
        fetch(server, target, watch=stop_after(2))
    assert not target.exists()
    (partial,) = parts(target)
    assert partial.name.startswith(".mine.safetensors.")
    assert partial.suffix == ".partial"
    assert partial.read_bytes() == CONTENT[: 2 * PIECE]

    fetch(server, target)
    assert server.ranges == ["", f"bytes={2 * PIECE}-"]
    assert target.read_bytes() == CONTENT
    assert parts(target) == []


def test_a_broken_connection_is_resumed_at_once_and_later(server: Hub, target: Path) -> None:
    server.breaks_at = 2 * PIECE + 5
    message = refusal(server, target)
    assert "broke" in message
    assert "131 kB have arrived and are kept: run it again" in message
    assert set(server.ranges[1:]) <= {f"bytes={2 * PIECE}-"}
    (partial,) = parts(target)
    assert partial.stat().st_size == 2 * PIECE

    server.breaks_at = None
    fetch(server, target)
    assert server.ranges[-1] == f"bytes={2 * PIECE}-"
    assert target.read_bytes() == CONTENT


def test_a_server_that_only_sends_whole_files_is_no_obstacle(server: Hub, target: Path) -> None:
    with pytest.raises(Stopped):
        fetch(server, target, watch=stop_after(2))
    server.ignores_ranges = True
    fetch(server, target)
    assert server.ranges[-1] == f"bytes={2 * PIECE}-"
    assert target.read_bytes() == CONTENT


def test_a_part_that_is_whole_is_only_checked(server: Hub, target: Path) -> None:
    with pytest.raises(Stopped):
        fetch(server, target, watch=stop_after(5))
    fetch(server, target)
    assert server.ranges == [""]
    assert target.read_bytes() == CONTENT


def test_a_part_of_an_older_file_is_not_continued_but_removed(server: Hub, target: Path) -> None:
    with pytest.raises(Stopped):
        fetch(server, target, UNKNOWN, watch=stop_after(2))
    renewed = server.files[f"{REPOSITORY}/{PATH}"] = CONTENT[::-1]
    fetch(server, target, UNKNOWN)
    assert server.ranges == ["", ""]
    assert target.read_bytes() == renewed
    assert parts(target) == []


def test_a_part_that_is_too_long_is_begun_again(server: Hub, target: Path) -> None:
    with pytest.raises(Stopped):
        fetch(server, target, watch=stop_after(2))
    (partial,) = parts(target)
    partial.write_bytes(bytes(len(CONTENT) + 1))
    fetch(server, target)
    assert server.ranges == ["", ""]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("remote", [KNOWN, UNKNOWN], ids=["known", "announced"])
def test_a_damaged_file_is_removed(server: Hub, target: Path, remote: Remote) -> None:
    server.damaged = True
    message = refusal(server, target, remote)
    found = hashlib.sha256(bytes(byte ^ 1 for byte in CONTENT)).hexdigest()
    assert f"its SHA-256 is {found}, and should be {SHA256}. It was deleted." in message
    assert parts(target) == []


def test_another_file_than_the_known_one_is_not_downloaded(server: Hub, target: Path) -> None:
    message = refusal(server, target, Remote(REPOSITORY, PATH, ("ab" * 32,)))
    assert f"announces the SHA-256 {SHA256}, known is {'ab' * 32}" in message
    assert [method for method, *_ in server.seen] == ["HEAD"]
    assert not target.parent.exists()


def test_a_file_that_cannot_be_checked_is_not_downloaded(server: Hub, target: Path) -> None:
    server.etag = "0" * 40  # of git, for small files
    assert "cannot be checked" in refusal(server, target, UNKNOWN)
    assert fetch(server, target).is_known


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "EntryNotFound", "The hub has no file at https://huggingface.co/owner/name/blob/"),
        (404, "RepoNotFound", "Look for model.safetensors on https://huggingface.co/owner/name"),
        (403, "GatedRepo", "log in with `hf auth login`"),
        (418, "", "The hub answered 418 for"),
    ],
)
def test_refusals_of_the_hub_are_explained(
    server: Hub, target: Path, status: int, code: str, words: str
) -> None:
    server.error = (status, code)
    assert words in refusal(server, target)
    assert not target.parent.exists()


def test_without_a_network_it_says_so(server: Hub, target: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        server.port = closed.getsockname()[1]
        message = refusal(server, target)
    assert "No connection to the hub" in message
    assert "HTTPS_PROXY" in message


def test_offline_mode_is_respected(
    server: Hub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    try:
        message = refusal(server, target)
    finally:
        close_session()
    assert "HF_HUB_OFFLINE is set" in message
    assert str(target.parent) in message
    assert server.seen == []


def test_a_full_disk_is_noticed_before(
    server: Hub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    message = refusal(server, target)
    assert "needs 300 kB more" in message and "has 1.0 kB free" in message
    assert server.ranges == []


def test_a_disk_that_fills_up_keeps_what_is_there(server: Hub, target: Path) -> None:
    def full(done: int, size: int) -> None:
        if done > PIECE:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DownloadError, match=r"is full. Make room. 131 kB have arrived"):
        fetch(server, target, watch=full)
    assert not target.exists()
    fetch(server, target)
    assert server.ranges[-1] == f"bytes={2 * PIECE}-"


def test_two_downloads_of_one_file_are_not_mixed(server: Hub, target: Path) -> None:
    target.parent.mkdir(parents=True)
    with filelock.FileLock(target.with_name(f".{target.name}.lock")):
        assert "is being downloaded" in refusal(server, target)
    fetch(server, target)


def test_a_folder_that_cannot_be_written_is_named(server: Hub, target: Path) -> None:
    target.parent.parent.mkdir(parents=True)
    target.parent.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(server, target)


def test_a_login_page_is_not_taken_for_the_hub(server: Hub, target: Path) -> None:
    server.commit = ""
    assert "is not that of a Hugging Face hub" in refusal(server, target)


def test_a_token_goes_to_the_hub_and_not_beyond(
    server: Hub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(server, target)
    assert server.tokens == {"hub"}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "not known"),
        (999, "999 bytes"),
        (1_000, "1.0 kB"),
        (44_642_768, "45 MB"),
        (2_528_373_448, "2.5 GB"),
    ],
)
def test_sizes_are_said_in_words(size: int | None, text: str) -> None:
    assert hub.words(size) == text
