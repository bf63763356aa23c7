"""The shipped workflows in the host's own front end: they open, export, run and save unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from scripts.browser import (
    export_prompt,
    load_workflow,
    open_page,
    saved_workflow,
    unknown_nodes,
)
from scripts.graphs import GRAPHS
from scripts.prompts import read_prompt, read_workflow
from scripts.server import Server
from scripts.setup import find_chromium
from tests.host.server_fixtures import running

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium found; set CHROMIUM_PATH"),
]

SHRINK = """() => {
    const small = {EmptyLatentImage: {width: 64, height: 64}, KSampler: {steps: 2}};
    for (const node of window.app.graph.nodes)
        for (const widget of node.widgets ?? [])
            widget.value = small[node.type]?.[widget.name] ?? widget.value;
}"""

RESULT = """() => {
    const [picture] = window.app.graph.findNodesByType("SaveImage")[0].imgs ?? [];
    return picture?.complete ? [picture.naturalWidth, picture.naturalHeight] : null;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("browser"), model_files) as started:
        yield started


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    with open_page(server) as opened:
        yield opened


@pytest.fixture
def complaints(page: Page) -> Iterator[list[str]]:
    """What the page complains about from here on; the fixture's own check is that it does not."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda line: found.append(line.text) if line.type == "error" else None)
    yield found


@pytest.mark.parametrize("name", GRAPHS)
def test_workflow_opens_without_complaint(page: Page, complaints: list[str], name: str) -> None:
    load_workflow(page, read_workflow(name), name)
    page.wait_for_timeout(500)
    assert unknown_nodes(page) == []
    assert complaints == []
    expect(page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.parametrize("name", GRAPHS)
def test_front_end_exports_the_shipped_prompt(page: Page, name: str) -> None:
    load_workflow(page, read_workflow(name), name)
    assert export_prompt(page) == read_prompt(name)


@pytest.mark.parametrize("name", GRAPHS)
def test_front_end_saves_what_it_opened(page: Page, name: str) -> None:
    shipped = read_workflow(name)
    load_workflow(page, shipped, name)
    saved = saved_workflow(page)
    saved["extra"].pop("ds", None)  # where the view happened to be
    assert saved == shipped


def test_run_button_makes_a_picture(page: Page, server: Server) -> None:
    load_workflow(page, read_workflow("text_and_image"), "text_and_image")
    page.evaluate(SHRINK)
    with page.expect_response(lambda response: response.url.endswith("/api/prompt")) as queued:
        page.get_by_test_id("queue-button").click()
    prompt_id = queued.value.json()["prompt_id"]
    shown = page.wait_for_function(RESULT, timeout=180_000)
    assert shown.json_value() == [64, 64]
    outputs = server.history(prompt_id)["outputs"]
    assert [image["filename"] for output in outputs.values() for image in output["images"]]
