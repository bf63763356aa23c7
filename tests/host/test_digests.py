"""SHA-256 of a file is computed once, and kept in the host's user folder only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.host


@pytest.fixture
def digests(host: Any) -> Any:
    return host.library("ip_adapter.host.digests")


@pytest.fixture
def user(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import folder_paths

    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(folder))
    yield folder


@pytest.fixture
def computed(digests: Any, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []
    original = digests.digest

    def spy(path: Path) -> str:
        seen.append(path)
        return str(original(path))

    monkeypatch.setattr(digests, "digest", spy)
    return seen


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_it_is_computed_once_and_again_when_the_file_changes(
    digests: Any, user: Path, computed: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "models" / "a.bin"
    path.parent.mkdir()
    path.write_bytes(b"one")
    assert [digests.sha256(path) for _ in range(3)] == [sha(b"one")] * 3
    assert computed == [path]
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))  # same size, another time
    assert digests.sha256(path) == sha(b"two") and len(computed) == 2
    assert [file.name for file in path.parent.iterdir()] == ["a.bin"]
    assert [file.name for file in user.rglob("*.*")] == ["digests.json"]


def test_files_that_are_gone_are_forgotten(digests: Any, user: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    digests.sha256(first)
    first.unlink()
    digests.sha256(second)
    assert list(json.loads((user / "ip_adapter" / "digests.json").read_text())) == [str(second)]


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"x": 3}', "\x00"])
def test_a_damaged_record_is_made_anew(
    digests: Any, user: Path, tmp_path: Path, content: str
) -> None:
    record = user / "ip_adapter" / "digests.json"
    record.parent.mkdir()
    record.write_text(content)
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    assert digests.sha256(path) == sha(b"one")
    assert json.loads(record.read_text())[str(path)]["sha256"] == sha(b"one")


def test_without_a_place_to_write_it_still_works(
    digests: Any, user: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (user / "ip_adapter").write_text("a file where the folder should be")
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    assert digests.sha256(path) == sha(b"one")
    assert "cannot remember digests" in caplog.text
