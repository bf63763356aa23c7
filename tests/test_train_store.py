"""Shards on disk: what comes back, what survives, and what is noticed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ip_adapter.train import store
from ip_adapter.train.parts import Part, complete
from ip_adapter.train.pieces import DataError, Piece
from ip_adapter.train.store import Digests, Store
from tests.conftest import ROOT


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path) -> Store:
    return Store(folder / "part", Digests(folder / "digests.jsonl"), {"made": "for a test"})


def filled(folder: Path, *keys: str) -> Store:
    made = opened(folder)
    for key in keys:
        made.add(key, {"a": numbers(ord(key), 3, 4), "b": numbers(ord(key), 2).int()})
    return made


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "part").glob("*.safetensors"))


def age(path: Path, seconds: float = 60) -> None:
    """Move a file's time into the past, as if it had lain there."""
    status = path.stat()
    os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))


def test_what_is_stored_comes_back_before_and_after_it_is_on_disk(tmp_path: Path) -> None:
    made = filled(tmp_path, "x", "y")
    for where in (made, "flushed", "opened again"):
        if where == "flushed":
            made.flush()
        elif where == "opened again":
            made = opened(tmp_path)
        assert "x" in made and "y" in made and "z" not in made
        assert made.parts("y") == {"a", "b"}
        assert torch.equal(made.get("y", "a"), numbers(ord("y"), 3, 4))
        assert torch.equal(made.get("x", "b"), numbers(ord("x"), 2).int())
    (shard,) = shards(tmp_path)
    assert set(load_file(shard)) == {"x/a", "x/b", "y/a", "y/b"}


def test_shards_are_written_by_number_and_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_ENTRIES", 2)
    filled(tmp_path / "number", *"abcde")
    assert len(shards(tmp_path / "number")) == 2  # the fifth waits
    monkeypatch.setattr(store, "SHARD_BYTES", 40)
    filled(tmp_path / "size", *"abc")
    assert len(shards(tmp_path / "size")) == 3


def test_many_shards_are_not_all_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_ENTRIES", 1)
    monkeypatch.setattr(store, "_OPEN", 2)
    made = filled(tmp_path, *"abcdef")
    for _ in range(2):
        for key in "abcdef":
            assert torch.equal(made.get(key, "a"), numbers(ord(key), 3, 4))
    assert len(made._open) == 2


def test_a_digest_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, memory = tmp_path / "file", tmp_path / "digests.jsonl"
    file.write_bytes(b"abc")
    age(file)
    read: list[Piece] = []
    original = Piece.read
    monkeypatch.setattr(Piece, "read", lambda piece: read.append(piece) or original(piece))
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert Digests(memory).of(Piece(file)) == abc
    assert Digests(memory).of(Piece(file)) == abc
    assert len(read) == 1
    with memory.open("a") as torn:
        torn.write('["' + str(file))
    assert Digests(memory).of(Piece(file)) == abc and len(read) == 1
    file.write_bytes(b"abd")
    assert Digests(memory).of(Piece(file)) != abc and len(read) == 2
    part = Piece(file, "member", 1, 1)
    assert Digests(memory).of(part) != Digests(memory).of(Piece(file))


def test_a_file_too_young_to_tell_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    digests = Digests(tmp_path / "digests.jsonl")
    file.write_bytes(b"abc")
    first = digests.of(Piece(file))
    status = file.stat()
    file.write_bytes(b"abd")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests.of(Piece(file)) != first


def test_a_damaged_shard_goes_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "SHARD_ENTRIES", 1)
    filled(tmp_path, *"ab")
    for shard in shards(tmp_path):
        age(shard)
    assert all(key in opened(tmp_path) for key in "ab")  # and remembers them as whole
    victim = next(shard for shard in shards(tmp_path) if "a/a" in load_file(shard))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        made = opened(tmp_path)
    assert "a" not in made and "b" in made and str(victim) in caplog.text
    assert not victim.exists()


def test_a_shard_lost_while_open_is_named(tmp_path: Path) -> None:
    filled(tmp_path, "a").flush()
    made = opened(tmp_path)
    shards(tmp_path)[0].unlink()
    with pytest.raises(DataError, match=r"cannot be read any more .* Start again"):
        made.get("a", "a")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"a file")
    with pytest.raises(DataError, match=r"Cannot write to the cache folder .*part"):
        opened(tmp_path)


def part(made: Store, encoded: list[int], rows: int = 5) -> Part[int]:
    """Rows whose features are their number, encoded one by one."""

    def encode(row: int) -> dict[str, Tensor]:
        encoded.append(row)
        return {"a": torch.full((4,), float(row))}

    keys = tuple(f"k{row}" for row in range(rows))
    origins = [f"row {row}" for row in range(rows)]
    return Part(made, keys, lambda row: row, encode, origins, torch.float16)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_ENTRIES", 2)
    real, written = os.fsync, []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        real(handle)

    encoded: list[int] = []
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left on device.*Free some space"):
            complete(part(opened(tmp_path), encoded), lambda: None, 2)
    assert encoded == [0, 1, 2, 3]  # the first shard is there, the second did not fit
    assert not list(tmp_path.glob("**/*.partial"))
    made = opened(tmp_path)
    complete(part(made, encoded), lambda: None, 2)
    assert encoded == [0, 1, 2, 3, 2, 3, 4]
    assert all(made.get(f"k{row}", "a").tolist() == [row] * 4 for row in range(5))


def test_a_stop_keeps_what_was_done_and_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the disk is full at that moment."""
    for disk_is_full in (False, True):
        folder, encoded = tmp_path / str(disk_is_full), []
        made = opened(folder)

        def stop(encoded: list[int] = encoded) -> None:
            if len(encoded) == 3:
                raise KeyboardInterrupt

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as disk:
            if disk_is_full:
                disk.setattr(os, "fsync", full)
            with pytest.raises(KeyboardInterrupt):
                complete(part(made, encoded), stop, 2)
        complete(part(opened(folder), encoded), lambda: None, 2)
        assert encoded == ([0, 1, 2, 0, 1, 2, 3, 4] if disk_is_full else [0, 1, 2, 3, 4])


def test_a_process_killed_while_writing_leaves_only_whole_shards(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
import torch
from ip_adapter.train import store

store.SHARD_ENTRIES = 2
real, written = os.fsync, []

def fsync(handle):
    written.append(handle)
    if len(written) == 4:  # a recipe and two shards are on disk, the third is not renamed yet
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)

os.fsync = fsync
folder = Path(sys.argv[1])
made = store.Store(folder / "part", store.Digests(folder / "digests.jsonl"), {})
for key in "abcdefgh":
    made.add(key, {"a": torch.full((4,), ord(key))})
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    made = opened(tmp_path)
    assert [key for key in "abcdefgh" if key in made] == list("abcd")
    for key in "abcd":
        assert made.get(key, "a").tolist() == [ord(key)] * 4
