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

REPORTS = """() => Object.fromEntries(window.app.graph.nodes.flatMap(node => (node.widgets ?? [])
    .filter(widget => widget.name === "$$node-text-preview")
    .map(widget => [node.type, widget.value])))"""

OVERLAPS = """() => {
    const boxes = window.app.graph.nodes.map(node => [node.type, ...node.getBounding()]);
    return boxes.flatMap(([first, a, b, width, height], i) => boxes.slice(i + 1)
        .filter(([, c, d, w, h]) => a < c + w && c < a + width && b < d + h && d < b + height)
        .map(([second]) => `${first} and ${second}`));
}"""

REPORTED = {
    "text_and_image": {
        "ImagePromptLoadAdapter": "base for SD 1.5, 4 tokens",
        "ImagePromptEncode": "4 image tokens",
        "ImagePromptApply": "16 of 16 layers",
    },
    "automatic": {
        "ImagePromptAutoLoader": "adapter: ip-adapter-plus_sd15.safetensors",
        "ImagePromptEncode": "16 image tokens",
        "ImagePromptApply": "16 of 16 layers",
    },
    "face_identity": {
        "ImagePromptLoadAdapter": "faceid-plusv2 for SD 1.5",
        "ImagePromptLoadFaceModel": "buffalo_l on CPU",
        "ImagePromptDetectFace": "1 x buffalo_l",
        "ImagePromptEncodeFace": "4 image tokens",
        "ImagePromptFaceLoRA": "128 of 128 modules",
        "ImagePromptApply": "16 of 16 layers",
    },
}
"""What the nodes of a workflow say, once it has run."""


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
    expect(page.get_by_test_id("error-overlay")).to_have_count(0)


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


@pytest.mark.parametrize("name", REPORTED)
def test_run_button_makes_a_picture_and_nodes_report(page: Page, server: Server, name: str) -> None:
    load_workflow(page, read_workflow(name), name)
    page.evaluate(SHRINK)
    with page.expect_response(lambda response: response.url.endswith("/api/prompt")) as queued:
        page.get_by_test_id("queue-button").click()
    prompt_id = queued.value.json()["prompt_id"]
    shown = page.wait_for_function(RESULT, timeout=180_000)
    assert shown.json_value() == [64, 64]
    outputs = server.history(prompt_id)["outputs"]
    assert [image["filename"] for output in outputs.values() for image in output["images"]]
    reports = page.evaluate(REPORTS)
    assert reports.keys() == REPORTED[name].keys()
    assert {kind: text in reports[kind] for kind, text in REPORTED[name].items()} == dict.fromkeys(
        reports, True
    )
    # The reports made the nodes higher, into the room that was left for them.
    assert page.evaluate(OVERLAPS) == []
