"""Training rows of every format, what is wrong with them, and the order they are seen in."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ip_adapter.train import data
from ip_adapter.train.order import Position, order, permutation
from ip_adapter.train.pieces import DataError, Piece, load_picture, load_vector


def pixels(seed: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def png(seed: int, **size: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed, **size)).save(out, "png")
    return out.getvalue()


def npy(vector: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(vector, np.float32))
    return out.getvalue()


def write(folder: Path, **files: bytes | str) -> Path:
    """Files by name, where ``__`` stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        whole = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(whole)
    return folder


def lines(folder: Path, *rows: object) -> Path:
    """A JSON lines file; bytes and strings as they are."""
    file = folder / "rows.jsonl"
    texts = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    written = [text.encode() if isinstance(text, str) else text for text in texts]
    file.write_bytes(b"\n".join(written) + b"\n")
    return file


def complaint(source: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        data.check(data.read(source), **options)
    return str(caught.value)


def test_a_folder_of_pictures_with_captions(tmp_path: Path) -> None:
    write(tmp_path, b__png=png(2), b__txt="\ufeffa cat, grün\n", notes__md="no row")
    write(tmp_path / "below", a__PNG=png(1), a__txt="")
    rows = data.check(data.read(tmp_path))
    assert [(row.origin, row.text) for row in rows] == [
        ("b.png", "a cat, grün"),
        ("below/a.PNG", ""),
    ]
    assert all(row.reference is None and row.face is None for row in rows)
    found = load_picture(rows[0].image)
    assert torch.equal(found, torch.from_numpy(pixels(2))[None] / 255)


def test_json_lines_with_references_and_faces(tmp_path: Path) -> None:
    write(tmp_path / "more", ref__png=png(3))
    write(tmp_path, a__png=png(1), f__npy=npy(np.ones((1, 4))))
    file = lines(
        tmp_path,
        {"image": "a.png", "text": "one"},
        "",
        {"image": "a.png", "text": "", "reference": "more/ref.png", "face": "f.npy"},
        {"image": str(tmp_path / "a.png"), "text": "absolute", "reference": None},
    )
    rows = data.check(data.read(file))
    assert [row.origin for row in rows] == [f"rows.jsonl line {n}" for n in (1, 3, 4)]
    assert [row.text for row in rows] == ["one", "", "absolute"]
    assert rows[1].reference == Piece(tmp_path / "more" / "ref.png")
    assert rows[1].face is not None
    assert torch.equal(load_vector(rows[1].face), torch.ones(4))
    assert rows[0].reference is None and rows[2].image == rows[0].image


def shard(path: Path, *samples: dict[str, Any]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def test_shards_are_read_as_the_webdataset_library_reads_them(tmp_path: Path) -> None:
    for number in range(2):
        shard(
            tmp_path / f"part-{number}.tar",
            *(
                {"__key__": f"dir.d/{k:03d}", "png": png(10 * number + k), "txt": f"text {k}"}
                for k in range(3)
            ),
        )
    pattern = str(tmp_path / "part-{0..1}.tar")
    theirs = []
    for url in webdataset.shardlists.expand_urls(pattern):
        with open(url, "rb") as file:
            members = webdataset.tariterators.tar_file_expander([{"url": url, "stream": file}])
            for sample in webdataset.tariterators.group_by_keys(members):
                theirs.append((sample["png"], sample["txt"].decode()))
    for source in (pattern, tmp_path):
        rows = data.check(data.read(source))
        assert [(row.image.read(), row.text) for row in rows] == theirs
    assert len(theirs) == 6
    assert rows[4].origin == "part-1.tar dir.d/001"


def test_a_shard_may_have_captions_in_json_references_and_faces(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        {"__key__": "x", "jpg": png(1), "json": {"caption": "of img2dataset", "width": 3}},
        {"__key__": "y", "png": png(2), "reference.png": png(3), "json": {"text": "own"}},
        {"__key__": "z", "png": png(4), "face.npy": np.arange(4.0), "txt": "t", "json": {}},
    )
    rows = data.check(data.read(path))
    assert [row.text for row in rows] == ["of img2dataset", "own", "t"]
    assert rows[1].reference is not None and rows[1].reference.read() == png(3)
    assert rows[2].face is not None
    assert load_vector(rows[2].face).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "gone.png", "text": "x"}, r"'.*gone\.png' does not exist"),
        ({"image": "folder", "text": "x"}, "is a folder"),
        ({"image": "cut.png", "text": "x"}, r"cut\.png' cannot be decoded"),
        ({"image": "words.png", "text": "x"}, r"words\.png' cannot be decoded"),
        ({"image": "empty.png", "text": "x"}, r"is empty \(0 bytes\)"),
        ({"image": "n" * 5000, "text": "x"}, "cannot be read"),
        ({"image": "good.png/inside", "text": "x"}, "cannot be read|does not exist"),
        ({"image": "good.png", "text": "x", "reference": "gone.png"}, "does not exist"),
        ({"image": "good.png", "text": "x", "face": "gone.npy"}, "does not exist"),
        ({"image": "good.png", "text": "x", "face": "good.png"}, "cannot be read as a face"),
        ({"image": "good.png", "text": "x", "face": "zero.npy"}, "not all zero"),
        ({"image": "good.png", "text": "x", "face": "nan.npy"}, "finite"),
        ({"image": "good.png", "text": "x", "face": "two.npy"}, r"shape \[2, 4\]"),
        ({"image": "good.png", "text": "x", "face": "pickle.npy"}, "cannot be read as a face"),
        ({"image": "good.png", "text": 7}, '"text" is 7; needed is a string'),
        ({"image": "good.png", "text": None}, '"text" is null'),
        ({"image": "good.png"}, 'no "text"'),
        ({"text": "x"}, 'no "image"'),
        ({"image": "", "text": "x"}, '"image" is ""'),
        ({"image": 3, "text": "x"}, '"image" is 3'),
        ({"image": "a\0b", "text": "x"}, "needed is the path"),
        ({"image": "good.png", "text": "x", "refrence": "good.png"}, "unknown key 'refrence'"),
        ('{"image": "good.png", "image": "good.png", "text": ""}', 'the key "image" twice'),
        ('{"image": "good.png", "text": "\\ud800"}', "not valid Unicode"),
        ('{"image": "good.png", ', "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1, 2]", "is a JSON list"),
        (b'{"image": "good.png", "text": "gr\xfcn"}', r"not UTF-8 \(byte \d\d:"),
        ({"image": "good.png", "text": "good"}, "same row as rows.jsonl line 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    write(
        tmp_path,
        good__png=png(1),
        cut__png=png(2, height=64, width=64)[:3000],
        words__png="<html>not found</html>",
        empty__png=b"",
        zero__npy=npy(np.zeros(4)),
        nan__npy=npy([1, float("nan")]),
        two__npy=npy(np.ones((2, 4))),
        pickle__npy=b"\x80\x04N.",
    )
    (tmp_path / "folder").mkdir()
    file = lines(tmp_path, {"image": "good.png", "text": "good"}, row)
    found = complaint(file)
    first, second, *_ = found.splitlines()
    assert first == "1 of 2 rows of the training data cannot be used:"
    assert second.startswith("  rows.jsonl line 2: ")
    assert re.search(message, second), second


def test_the_first_wrong_rows_are_listed_with_the_total(tmp_path: Path) -> None:
    write(tmp_path, good__png=png(1))
    wrong = [{"image": f"gone{number}.png", "text": ""} for number in range(8)]
    done: list[tuple[int, int]] = []
    found = complaint(
        lines(tmp_path, {"image": "good.png", "text": ""}, *wrong),
        progress=lambda count, total: done.append((count, total)),
    )
    assert found.startswith("8 of 9 rows")
    assert found.count("does not exist") == data.SHOWN
    assert "and 3 more" in found
    assert done[-1] == (9, 9)


def test_a_face_is_asked_for_where_the_adapter_reads_one(tmp_path: Path) -> None:
    write(tmp_path, a__png=png(1), f__npy=npy(np.ones(4)))
    rows = {"image": "a.png", "text": ""}, {"image": "a.png", "text": "", "face": "f.npy"}
    file = lines(tmp_path, *rows)
    assert len(data.check(data.read(file))) == 2
    found = complaint(file, needs_face=True)
    assert "line 1: has no face vector" in found and "line 2" not in found


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a__png": png(1)}, "a.png: has no caption a.txt"),
        ({"a__png": png(1), "a__txt": b"gr\xfcn"}, "a.png: the caption is not UTF-8"),
        ({"a__png": png(1), "a__jpg": png(1), "a__txt": ""}, "a.jpg: shares a.txt"),
        ({"a__png": b"", "a__txt": ""}, "a.png: '.*' is empty"),
        ({"a__txt": "caption alone"}, "holds no row"),
        ({}, "holds no row"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    write(tmp_path / "set", **files)
    with pytest.raises(DataError, match=message):
        data.check(data.read(tmp_path / "set"))


def test_a_folder_named_like_a_picture_is_wrong(tmp_path: Path) -> None:
    (write(tmp_path, a__txt="") / "a.png").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        data.check(data.read(tmp_path))


@pytest.mark.parametrize("name", ["gone", "gone.jsonl", "there.csv"])
def test_a_source_of_no_kind_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, there__csv="")
    with pytest.raises(DataError, match=r"Needed is a folder of pictures"):
        data.read(tmp_path / name)


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as out:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"x")], "s.tar a: has no picture, only .txt"),
        ([("a.png", png(1))], "s.tar a: has no caption"),
        ([("a.png", png(1)), ("a.json", b"{}")], 's.tar a: has no .txt, and no "text"'),
        ([("a.png", png(1)), ("a.json", b"{")], "s.tar a: is no JSON"),
        ([("a.png", png(1)), ("a.json", b'{"text": 1}')], 's.tar a: "text" is 1'),
        ([("a.png", png(1)), ("a.txt", b"\xff")], "s.tar a: the caption is not UTF-8"),
        ([("a.png", png(1)), ("a.png", png(2)), ("a.txt", b"")], "s.tar a: has two members .png"),
        ([("a.png", png(1)), ("a.jpg", png(2)), ("a.txt", b"")], "s.tar a: has both .png and .jpg"),
        ([("a.png", png(1)[:40]), ("a.txt", b"")], r"s.tar a: '.*s.tar: a.png' cannot be decoded"),
        ([("a.png", b""), ("a.txt", b"")], r"s.tar a: .* is empty"),
    ],
)
def test_a_wrong_sample_is_named(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    good = [("good.png", png(9)), ("good.txt", b"fine")]
    path = tar(tmp_path / "s.tar", *good, *members)
    with pytest.raises(DataError, match=message) as caught:
        data.check(data.read(path))
    assert "s.tar good" not in str(caught.value)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    whole = tar(tmp_path / "s.tar", ("a.png", png(1)), ("a.txt", b"x"), ("b.png", png(2)))
    content = whole.read_bytes()
    cut = content.index(b"b.png") + 512 + 20
    whole.write_bytes(content[:cut])
    assert "s.tar: is no whole, uncompressed tar" in complaint(whole)
    whole.write_bytes(b"\x1f\x8b" + content)
    assert "s.tar: is no whole, uncompressed tar" in complaint(whole)
    with pytest.raises(DataError, match="is named by"):
        data.read(str(tmp_path / "{s,t}.tar"))


def test_a_missing_webdataset_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "s.tar", ("a.png", png(1)), ("a.txt", b"x"))
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(DataError, match="pip install webdataset"):
        data.read(path)


def test_a_piece_of_a_shard_that_was_cut_later_is_noticed(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", ("a.txt", b"x"), ("a.png", png(1)))
    table = data.read(path)
    path.write_bytes(path.read_bytes()[: table.rows[0].image.offset + 5])
    with pytest.raises(DataError, match="the shard ends after 5 of its"):
        data.check(table)


def save(make: Callable[[], Image.Image], path: Path, **options: Any) -> Piece:
    make().save(path, **options)
    return Piece(path)


def test_pictures_of_every_mode_become_rgb_or_rgba(tmp_path: Path) -> None:
    rgb = pixels(1)
    deep = (pixels(2)[..., 0].astype(np.uint16)) * 257
    grey = save(lambda: Image.fromarray(rgb[..., 0]), tmp_path / "grey.png")
    sixteen = save(lambda: Image.fromarray(deep), tmp_path / "deep.png")
    alpha = save(lambda: Image.fromarray(pixels(3, channels=4)), tmp_path / "alpha.png")
    palette = save(
        lambda: Image.fromarray(rgb).quantize(4), tmp_path / "palette.png", transparency=b"\0\xff"
    )
    ints = torch.from_numpy
    assert torch.equal(load_picture(grey), ints(rgb[..., :1]).expand(-1, -1, 3)[None] / 255)
    expected = ints(pixels(2)[..., :1]).expand(-1, -1, 3)[None] / 255
    assert torch.equal(load_picture(sixteen), expected)
    assert torch.equal(load_picture(alpha), ints(pixels(3, channels=4))[None] / 255)
    found = load_picture(palette)
    assert found.shape == (1, 6, 8, 4) and float(found[..., 3].min()) == 0


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by a quarter, clockwise
    piece = save(lambda: Image.fromarray(pixels(1)), tmp_path / "a.png", exif=exif)
    upright = torch.from_numpy(np.rot90(pixels(1), -1).copy())[None] / 255
    assert torch.equal(load_picture(piece), upright)


def test_face_vectors_of_every_container(tmp_path: Path) -> None:
    vector = torch.randn(512, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", vector.numpy())
    safetensors.torch.save_file({"any": vector[None]}, tmp_path / "a.safetensors")
    torch.save(vector[None, None].half(), tmp_path / "a.ipadpt")
    for name in ("a.npy", "a.safetensors"):
        assert torch.equal(load_vector(Piece(tmp_path / name)), vector)
    assert torch.equal(load_vector(Piece(tmp_path / "a.ipadpt")), vector.half().float())


ROWS, SEED, BATCH = st.integers(1, 60), st.integers(0, 2**40), st.integers(1, 9)


def take(steps: int, *arguments: Any, **options: Any) -> list[tuple[list[int], Position]]:
    return list(islice(order(*arguments, **options), steps))


@settings(deadline=None)
@given(ROWS, SEED, BATCH)
def test_every_epoch_sees_every_row_once(rows: int, seed: int, batch: int) -> None:
    epochs = 3
    steps = take(-(-epochs * rows // batch), rows, batch, seed)
    seen = [row for step, _ in steps for row in step][: epochs * rows]
    assert Counter(seen) == dict.fromkeys(range(rows), epochs)
    assert all(sorted(seen[k * rows : (k + 1) * rows]) == [*range(rows)] for k in range(epochs))


@settings(deadline=None)
@given(ROWS, SEED, BATCH, st.integers(2, 5))
def test_processes_share_what_one_would_see(rows: int, seed: int, batch: int, world: int) -> None:
    one = take(7, rows, batch * world, seed)
    many = [take(7, rows, batch, seed, rank=rank, world=world) for rank in range(world)]
    for step, parts in zip(one, zip(*many, strict=True), strict=True):
        assert [row for rows, _ in parts for row in rows] == step[0]
        assert {position for _, position in parts} == {step[1]}


@settings(deadline=None)
@given(ROWS, SEED, BATCH, st.integers(0, 10))
def test_a_resumed_order_goes_on(rows: int, seed: int, batch: int, done: int) -> None:
    whole = take(done + 4, rows, batch, seed)
    start = whole[done - 1][1] if done else Position()
    assert take(4, rows, batch, seed, start) == whole[done:]


@settings(deadline=None)
@given(ROWS, SEED, st.integers(1, 9), st.integers(1, 9))
def test_another_batch_goes_on_in_the_same_order(
    rows: int, seed: int, before: int, after: int
) -> None:
    first = take(3, rows, before, seed)
    second = take(3, rows, after, seed, first[-1][1])
    seen = [row for step, _ in first + second for row in step]
    (whole, _), *_ = take(1, rows, 3 * before + 3 * after, seed)
    assert seen == whole


def test_the_position_counts_epochs_and_rows() -> None:
    steps = take(4, 10, 4, 0)
    positions = [position for _, position in steps]
    assert positions == [Position(0, 4), Position(0, 8), Position(1, 2), Position(1, 6)]


def test_orders_differ_by_seed_and_epoch() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_uniform() -> None:
    """Chi-squared over which row comes first: 9 degrees of freedom, 99.9 % of it below 27.9."""
    first = Counter(int(permutation(10, 1, epoch)[0]) for epoch in range(2000))
    assert sum((first[row] - 200) ** 2 / 200 for row in range(10)) < 27.9


@pytest.mark.parametrize(
    ("rows", "batch", "options"),
    [(0, 1, {}), (3, 0, {}), (3, 1, {"rank": 2, "world": 2}), (3, 1, {"start": Position(0, 4)})],
)
def test_an_order_of_nothing_is_refused(rows: int, batch: int, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="No order of"):
        next(order(rows, batch, 0, **options))
