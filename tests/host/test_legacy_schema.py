"""The old ids report exactly what the old pack reported of them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tests.legacy_workflows import RECORD

pytestmark = pytest.mark.host

OURS = {"python_module", "description"}
"""What says whose node it is."""

FROM_DISK = {"IPAdapterModelLoader": "ipadapter_file", "IPAdapterLoadEmbeds": "embeds"}
"""Inputs whose options are files; the record has none."""

HIDDEN = "hidden"
"""A part without inputs: what the host itself hands to every output node of today's kind."""

MORE = {
    *("output_tooltips", "deprecated", "experimental", "dev_only", "api_node", "price_badge"),
    *("search_aliases", "essentials_category", "has_intermediate_output", "output_matchtypes"),
}
"""What newer hosts report beside what the record has."""


def plain(node_id: str, inputs: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any, Any]]]]:
    """Parts, and in each the inputs with type and options, in order; without what is only said."""
    found = []
    for part, entries in inputs.items():
        rows = []
        for name, (kind, *more) in entries.items():
            options = dict(more[0]) if more else {}
            options.pop("tooltip", None)
            if options.get("multiline") is False:  # the front end's default
                del options["multiline"]
            is_file = FROM_DISK.get(node_id) == name
            rows.append((name, [] if is_file else kind, options))
        if rows and part != HIDDEN:
            found.append((part, rows))
    return found


@pytest.fixture(params=RECORD)
def node_id(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_all_of_them_are_ours(host: Any) -> None:
    ours = {cls.define_schema().node_id: cls for cls in host.library("nodes").LEGACY}
    assert set(RECORD) <= set(ours)
    for name, cls in ours.items():
        assert host.node(name) is cls


def test_interface_is_the_old_one(host: Any, node_id: str) -> None:
    recorded, reported = RECORD[node_id], host.node(node_id).GET_NODE_INFO_V1()
    assert plain(node_id, reported["input"]) == plain(node_id, recorded["input"])
    order = {part: names for part, names in reported["input_order"].items() if names}
    order.pop(HIDDEN, None)
    assert order == recorded["input_order"]
    for key in recorded.keys() - OURS - {"input", "input_order", "search_aliases"}:
        assert reported.get(key, False) == recorded[key], key
    assert reported.keys() <= recorded.keys() | MORE


def test_a_list_of_files_is_a_list(host: Any) -> None:
    """Where plug-ins look for it: in the place of the type."""
    for name, key in FROM_DISK.items():
        (entry,) = (
            e for p in host.node(name).GET_NODE_INFO_V1()["input"].values() for e in p.values()
        )
        assert isinstance(entry[0], list) and not set(entry[1]) - {"tooltip"}, key


def test_it_is_hidden_and_says_what_to_use(host: Any, node_id: str) -> None:
    reported = host.node(node_id).GET_NODE_INFO_V1()
    assert reported["deprecated"] is True
    assert reported["description"]


def test_it_runs_with_the_old_inputs(host: Any, node_id: str) -> None:
    """Parameters in the old order; those of optional inputs may be left out."""
    recorded = RECORD[node_id]["input_order"]
    parameters = inspect.signature(host.node(node_id).execute).parameters
    assert list(parameters) == [name for names in recorded.values() for name in names]
    for name, parameter in parameters.items():
        has_default = parameter.default is not inspect.Parameter.empty
        assert has_default == (name in recorded.get("optional", ())), name


def test_types_that_others_share(host: Any) -> None:
    """Wires of the old pack and of ours fit one another: the types are one and the same."""
    types = {
        entry[0]
        for cls in host.library("nodes").NODES
        for part in cls.GET_NODE_INFO_V1()["input"].values()
        for entry in part.values()
    }
    assert {"IPADAPTER", "INSIGHTFACE", "CLIP_VISION", "EMBEDS"} <= types
