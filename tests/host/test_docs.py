"""The help pages against the nodes that the host knows: every node, input, choice and default."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.host

DOCS = ROOT / "web" / "docs"
NODES = sorted(path.stem for path in DOCS.glob("*.md"))


@pytest.fixture(params=NODES)
def schema(request: pytest.FixtureRequest, host: Any) -> Any:
    return host.node(request.param).define_schema()


def text_of(schema: Any) -> str:
    return (DOCS / f"{schema.node_id}.md").read_text(encoding="utf-8")


def table(text: str, first: str) -> dict[str, str]:
    """Name and rest of each row of the table that begins with this word; empty without one."""
    found: dict[str, str] = {}
    inside = False
    for line in text.splitlines():
        if line.startswith(f"| {first} |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|-"):
            name, rest = line.strip("| ").split("|", 1)
            found[name.strip().strip("`")] = rest.strip()
    return found


def test_every_node_has_a_page_and_no_page_is_left_over(host: Any) -> None:
    ids = [cls.define_schema().node_id for cls in host.library("nodes").NODES]
    assert sorted(ids) == NODES


def test_the_host_is_told_where_the_pages_are(host: Any) -> None:
    assert [path for path in host.nodes.EXTENSION_WEB_DIRS.values() if path == str(ROOT / "web")]


def test_the_title_is_the_node_s_name(schema: Any) -> None:
    assert text_of(schema).splitlines()[0] == f"# {schema.display_name}"


def test_the_tables_have_every_input_and_output_in_order(schema: Any) -> None:
    text = text_of(schema)
    assert list(table(text, "input")) == [one.id for one in schema.inputs]
    assert list(table(text, "output")) == [one.display_name for one in schema.outputs]
    assert bool(schema.outputs) != ("It has no output" in text)


def test_defaults_and_choices_are_those_of_the_node(schema: Any) -> None:
    described = table(text_of(schema), "input")
    for one in schema.inputs:
        default = getattr(one, "default", None)
        if default not in (None, ""):
            assert re.search(rf"default {re.escape(str(default))}(;|,| \||$)", described[one.id])
        else:
            assert "default" not in described[one.id]
        if one.id in ("fit", "pick", "provider"):
            assert all(option in described[one.id] for option in one.options)


def test_bold_names_are_nodes_of_the_pack(schema: Any, host: Any) -> None:
    names = {cls.define_schema().display_name for cls in host.library("nodes").NODES}
    bold = re.findall(r"\*\*(.+?)\*\*", text_of(schema).replace("\n", " "))
    assert set(bold) <= names
