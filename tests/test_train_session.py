"""How rows are shared out, and where ComfyUI is looked for; nothing of it needs the host."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip_adapter.errors import IncompatibleModelError, MissingFileError
from ip_adapter.host import standalone
from ip_adapter.train import session
from ip_adapter.train.data import Row
from ip_adapter.train.pieces import Piece
from ip_adapter.train.recipe import make


def row(number: int, image: int, reference: int | None) -> Row:
    other = None if reference is None else Piece(Path(f"{reference}.png"))
    return Row(f"row {number}", Piece(Path(f"{image}.png")), "", other)


numbers = st.integers(0, 12)
tables = st.lists(st.tuples(numbers, st.none() | numbers), min_size=1, max_size=30).map(
    lambda pairs: [row(i, *pair) for i, pair in enumerate(pairs)]
)


def pictures(rows: list[Row]) -> set[Piece]:
    return {piece for one in rows for piece in (one.image, one.reference or one.image)}


@given(rows=tables, held=st.integers(0, 10), seed=st.integers(0, 5))
def test_no_picture_is_on_both_sides(rows: list[Row], held: int, seed: int) -> None:
    kept, out = session.split(rows, held, seed)
    assert sorted((*kept, *out), key=rows.index) == rows
    assert kept and not pictures(kept) & pictures(out)
    assert (kept, out) == session.split(rows, held, seed)


def test_rows_of_their_own_are_held_out_as_asked() -> None:
    rows = [row(i, i, None) for i in range(10)]
    kept, out = session.split(rows, 3, 0)
    assert (len(kept), len(out)) == (7, 3)
    assert out != session.split(rows, 3, 1)[1] or out != session.split(rows, 3, 2)[1]


def test_an_adapter_of_another_projection_is_not_started_from(base_file: Path) -> None:
    recipe = make({"projection": "plus", "start_from": base_file})
    with pytest.raises(IncompatibleModelError, match="asks for a plus projection, but starts from"):
        session.starting_spec(recipe)
    fitting = make({"projection": "global", "start_from": base_file})
    assert session.needs_encoder(fitting) and not session.needs_face(fitting)


def test_a_face_is_needed_where_the_projection_reads_one() -> None:
    assert session.needs_face(make({"projection": "faceid"}))
    assert not session.needs_encoder(make({"projection": "faceid"}))
    assert session.needs_encoder(make({"projection": "full"}))


def host(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def test_comfyui_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    around = host(tmp_path / "ComfyUI")
    pack = around / "custom_nodes" / "pack"
    assert standalone.find(pack) == around
    other = host(tmp_path / "elsewhere")
    monkeypatch.setenv("COMFYUI_PATH", str(other))
    assert standalone.find(pack) == other
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(MissingFileError, match="set COMFYUI_PATH to the folder"):
        standalone.find(pack)
    monkeypatch.delenv("COMFYUI_PATH")
    assert standalone.find(host(tmp_path / "a" / "b" / ".host" / "ComfyUI").parents[1]).name
