"""A file is what it was, or what was wanted; never something in between."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ip_adapter.files import replacing, write


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file.txt"
    for content in ("first", "second"):
        with replacing(target) as partial:
            assert partial.parent == target.parent and partial != target
            partial.write_text(content)
        assert target.read_text() == content
    assert list(target.parent.iterdir()) == [target]
    assert os.stat(target).st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(type(error)), replacing(target) as partial:
        partial.write_text("half of it")
        raise error
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.txt"
    write(target, b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(target, b"after")
    assert target.read_bytes() == b"before" and os.listdir(tmp_path) == ["file.txt"]
