"""The workflows of the old pack in the host's own front end: they open, export, run, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from scripts.browser import (
    export_prompt,
    load_workflow,
    open_page,
    saved_workflow,
    unknown_nodes,
)
from scripts.server import Server
from scripts.setup import find_chromium
from tests.host.legacy_server import legacy_server
from tests.legacy_graphs import GRAPHS
from tests.legacy_workflows import RECORD, prompt, widgets, workflow

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium found; set CHROMIUM_PATH"),
]

SHOWN_WIDGETS = """() => Object.fromEntries(window.app.graph.nodes.map(node =>
    [node.id, (node.widgets ?? []).filter(widget => !widget.name.startsWith("$$"))
        .map(widget => [widget.name, widget.value])]))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    with legacy_server(tmp_path_factory.mktemp("legacy_browser"), model_files) as started:
        yield started


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    with open_page(server) as opened:
        yield opened


@pytest.fixture
def complaints(page: Page) -> Iterator[list[str]]:
    """What the page complains about from here on."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda line: found.append(line.text) if line.type == "error" else None)
    yield found


def finished(server: Server, prompt_id: str, seconds: float = 120) -> dict[str, Any]:
    """What the host remembers of a run, once it is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := server.history(prompt_id):
            return found
        time.sleep(0.1)
    raise AssertionError(f"Prompt {prompt_id} did not end in {seconds:.0f} s.")


@pytest.mark.parametrize("name", GRAPHS)
def test_old_workflow_opens_runs_and_saves(
    page: Page, server: Server, complaints: list[str], name: str
) -> None:
    graph, stored = GRAPHS[name], workflow(name, GRAPHS[name])
    load_workflow(page, stored, name)
    page.wait_for_timeout(300)
    assert unknown_nodes(page) == []
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_test_id("error-overlay")).to_have_count(0)  # "Missing Node Packs"

    # Widgets by name, in the order in which the old pack stored them.
    shown = page.evaluate(SHOWN_WIDGETS)
    for node, each in graph.nodes.items():
        if each.kind in RECORD:
            expected = [[key, value] for key, value in widgets(graph, each).items()]
            assert shown[str(graph.number(node))] == expected, node
    exported = export_prompt(page)
    for each in exported.values():
        del each["_meta"]  # titles
    assert exported == prompt(graph)
    saved = {each["id"]: each for each in saved_workflow(page)["nodes"]}
    for each in stored["nodes"]:
        again = saved[each["id"]]
        for key in ("type", "mode", "widgets_values"):
            assert again.get(key, []) == each.get(key, []), (each["type"], key)
    assert len(saved_workflow(page)["links"]) == len(stored["links"])

    with page.expect_response(lambda response: response.url.endswith("/api/prompt")) as queued:
        page.get_by_test_id("queue-button").click()
    done = finished(server, queued.value.json()["prompt_id"])
    assert done["status"]["status_str"] == "success", done["status"]["messages"][-1]
    assert done["outputs"][str(graph.number("save"))]["images"]
    assert complaints == []
