"""scripts/locales.py on texts of a made-up node: what it adds, removes, keeps and reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import locales

INFO = {
    "display_name": "Mix",
    "description": "Mixes two.",
    "input": {
        "required": {"first": ["A", {"tooltip": "One."}]},
        "optional": {"second": ["A", {"tooltip": "Other."}]},
        "hidden": {"prompt": ["PROMPT"]},
    },
    "input_order": {"required": ["first"], "optional": ["second"], "hidden": ["prompt"]},
    "output_name": ["mixed"],
    "output_tooltips": ["Both."],
}
MIX = {
    "display_name": "Mix",
    "description": "Mixes two.",
    "inputs": {
        "first": {"name": "first", "tooltip": "One."},
        "second": {"name": "second", "tooltip": "Other."},
    },
    "outputs": {"0": {"name": "mixed", "tooltip": "Both."}},
}
OLD = {"Mix": {"inputs": {"gone": {"name": "x"}, "second": {"name": "第二"}}}, "Gone": {"a": "b"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locales, "LOCALES", tmp_path)
    monkeypatch.setattr(locales, "SOURCES", tmp_path / "sources.json")
    monkeypatch.setattr(locales, "PAGES", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "Mix.md").write_text("# Mix\n")
    return tmp_path


def test_english_comes_from_what_the_host_says() -> None:
    assert locales.english(INFO) == MIX


def test_an_update_adds_removes_and_keeps(folder: Path) -> None:
    locales._write(locales.texts_file("zh"), OLD)
    locales.update({"Mix": MIX})
    written = locales.read(locales.texts_file("zh"))
    assert list(written) == ["Mix"] and list(written["Mix"]) == list(MIX)
    assert written["Mix"]["inputs"] == {
        "first": {"name": "first", "tooltip": "One."},
        "second": {"name": "第二", "tooltip": "Other."},
    }
    assert locales.read(locales.texts_file("ja")) == {"Mix": MIX}


def test_the_report_names_what_is_to_be_done(folder: Path) -> None:
    locales._write(locales.texts_file("zh"), OLD)
    lines = locales.report({"Mix": MIX})
    for line in (
        "zh: missing: Mix.inputs.first.tooltip",
        "zh: left over: Gone.a",
        "zh: left over: Mix.inputs.gone.name",
        "zh: stale: Mix",
        "zh: no page: Mix",
    ):
        assert line in lines
    locales.update({"Mix": MIX})
    lines = locales.report({"Mix": MIX})
    assert "zh: still English: Mix.inputs.first.tooltip" in lines
    assert not [line for line in lines if "missing" in line or "left over" in line]


def test_a_seal_breaks_with_any_word_of_english(folder: Path) -> None:
    locales.seal({"Mix": MIX}, ["zh"])
    assert locales.stale("zh", {"Mix": MIX}) == []
    assert locales.stale("ko", {"Mix": MIX}) == ["Mix"]
    assert locales.stale("zh", {"Mix": MIX | {"description": "Mixes three."}}) == ["Mix"]
    (folder / "docs" / "Mix.md").write_text("# Mixer\n")
    assert locales.stale("zh", {"Mix": MIX}) == ["Mix"]
