"""The page for users of the old pack: its figures, its nodes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from scripts import migration
from tests.conftest import ROOT
from tests.host.test_docs import table

pytestmark = pytest.mark.host

TEXT = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
FIGURES = {
    title: tuple(cell.strip() for cell in rest.split("|"))
    for title, rest in table(TEXT, "measured").items()
}


def close(found: str, written: str) -> bool:
    """The same words, and numbers that differ by a fifth at most."""
    number = r"\d+(?:\.\d+)?"
    if re.sub(number, "#", found) != re.sub(number, "#", written):
        return False
    pairs = zip(re.findall(number, found), re.findall(number, written), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.2, abs=0.02) for a, b in pairs)


def test_the_table_has_the_rows_that_are_measured() -> None:
    assert list(FIGURES) == [row.title for row in migration.ROWS]


def test_the_quick_figures_are_those_of_the_page(host: Any) -> None:
    quick = [row for row in migration.ROWS if not row.is_slow]
    with torch.inference_mode(False):
        found = migration.measure(quick)
    wrong = {
        title: (figures, FIGURES[title])
        for title, figures in found.items()
        if not all(map(close, figures, FIGURES[title]))
    }
    assert len(found) >= 10 and not wrong


def test_a_figure_of_another_kind_or_size_is_noticed() -> None:
    assert close("12 %", "13 %") and close("1024, 768", "1024, 768")
    for found, written in (("12 %", "20 %"), ("0", "12 %"), ("1024", "1024, 768")):
        assert not close(found, written)


def named(text: str) -> dict[str, str]:
    """Old id -> what the tables say of it."""
    parts = re.split(r"^And of before", text, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for part in parts:
        found |= table(part, "old id")
    return found


def test_every_old_node_is_named_once(host: Any) -> None:
    legacy = host.library("ip_adapter.legacy").NODES
    assert sorted(named(TEXT)) == sorted(node.define_schema().node_id for node in legacy)
    recorded = json.loads((ROOT / "tests/host/legacy_nodes.json").read_text(encoding="utf-8"))
    assert set(recorded.get("nodes", recorded)) <= set(named(TEXT))


def test_what_it_says_to_use_exists(host: Any) -> None:
    nodes = {cls.define_schema().display_name: cls for cls in host.library("nodes").NODES}
    inputs = {one.id for cls in nodes.values() for one in cls.define_schema().inputs}
    for old, new in named(TEXT).items():
        assert set(re.findall(r"\*\*(.+?)\*\*", new)) <= set(nodes), old
        assert set(re.findall(r"`(.+?)`", new)) <= inputs, old
