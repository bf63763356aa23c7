"""The shipped workflows in the host's own front end: they open, export, run and save unchanged.

One host, one page. What a person would do is done with the mouse, the keyboard and a dropped file;
pictures of it are left in test-artifacts/templates.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from scripts.browser import (
    export_prompt,
    load_workflow,
    open_page,
    saved_workflow,
    unknown_nodes,
    wait_until_ready,
)
from scripts.client import Json
from scripts.graphs import FIRST, GRAPHS
from scripts.graphs_batches import FRAMES
from scripts.prompts import read_prompt, read_workflow
from scripts.server import PACK_NAME, Server
from scripts.setup import find_chromium
from tests.conftest import ROOT
from tests.host.template_host import serving

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium found; set CHROMIUM_PATH"),
]

ARTIFACTS = ROOT / "test-artifacts" / "templates"

DROP = """async ([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name, {type: "application/json"}));
    const canvas = document.querySelector("#graph-canvas");
    const {left, top, width, height} = canvas.getBoundingClientRect();
    const at = {clientX: left + width / 2, clientY: top + height / 2};
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(
            kind, {dataTransfer: data, bubbles: true, cancelable: true, ...at}));
}"""

OPENED = "id => window.app.graph.id === id"

SHRINK = """() => {
    const small = {
        EmptyLatentImage: {width: 64, height: 64},
        ImageScaleToTotalPixels: {megapixels: 0.01},
        KSampler: {steps: 2},
    };
    for (const node of window.app.graph.nodes)
        for (const widget of node.widgets ?? [])
            widget.value = small[node.type]?.[widget.name] ?? widget.value;
}"""

RESULTS = """() => {
    const nodes = window.app.graph.findNodesByType("SaveImage");
    const shown = nodes.map(node => node.imgs ?? []);
    return shown.every(imgs => imgs.length && imgs.every(img => img.complete)) &&
        shown.flatMap(imgs => imgs.map(img => [img.naturalWidth, img.naturalHeight]));
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

FIT = """() => {
    const boxes = window.app.graph.nodes.map(node => node.getBounding());
    const [left, top] = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])));
    const [right, bottom] = [0, 1].map(axis => Math.max(...boxes.map(b => b[axis] + b[axis + 2])));
    const view = window.app.canvas.ds;
    view.scale = Math.min(1480 / (right - left), 740 / (bottom - top));
    view.offset[0] = 840 / view.scale - (left + right) / 2;
    view.offset[1] = 490 / view.scale - (top + bottom) / 2;
    window.app.canvas.setDirty(true, true);
}"""

WIDGET = """([kind, name]) => {
    const [node] = window.app.graph.findNodesByType(kind);
    const widget = node.widgets.find(each => each.name === name);
    const canvas = window.app.canvas;
    canvas.ds.scale = 1;
    canvas.ds.offset[0] = 400 - node.pos[0];
    canvas.ds.offset[1] = 300 - node.pos[1];
    canvas.draw(true, true);
    const {left, top} = canvas.canvas.getBoundingClientRect();
    return [left + 400 + node.size[0] / 2, top + 300 + widget.last_y + 10];
}"""

SELECTED = """() => {
    const field = document.activeElement;
    return field.selectionStart === 0 && field.selectionEnd === field.value.length;
}"""

REPORTED = {
    FIRST: {
        "ImagePromptLoadAdapter": "base for SD 1.5, 4 tokens",
        "ImagePromptEncode": "4 image tokens",
        "ImagePromptApply": "16 of 16 layers",
    },
    "05_face_identity": {
        "ImagePromptLoadAdapter": "faceid-plusv2 for SD 1.5",
        "ImagePromptLoadFaceModel": "buffalo_l on CPU",
        "ImagePromptDetectFace": "1 x buffalo_l",
        "ImagePromptEncodeFace": "4 image tokens",
        "ImagePromptFaceLoRA": "128 of 128 modules",
        "ImagePromptApply": "16 of 16 layers",
    },
    "09_animation_batch": {
        "ImagePromptLoadAdapter": "base for SD 1.5, 4 tokens",
        "ImagePromptEncode": "4 image tokens",
        "ImagePromptFade": f"4 image tokens for each of {FRAMES} pictures",
        "ImagePromptApply": "16 of 16 layers",
    },
    "12_automatic": {
        "ImagePromptAutoLoader": "adapter: ip-adapter-plus_sd15.safetensors",
        "ImagePromptEncode": "16 image tokens",
        "ImagePromptApply": "16 of 16 layers",
    },
}
"""What the nodes of a workflow say, once it has run."""

SHOWN = {"09_animation_batch": FRAMES, "18_seed_batch": 4}
"""Pictures in Save Image, where it is not one."""

SCALED = {"08_inpaint", "09_animation_batch", "14_image_to_image"}
"""Workflows whose pictures have the smallest area that the host scales to."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with serving(tmp_path_factory.mktemp("browser"), model_files) as started:
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


def expect_no_trouble(page: Page, complaints: list[str]) -> None:
    page.wait_for_timeout(300)
    assert unknown_nodes(page) == []
    assert complaints == []
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_test_id("error-overlay")).to_have_count(0)


def picture_of(page: Page, name: str) -> None:
    """Leave a picture of the whole graph."""
    page.evaluate(FIT)
    page.wait_for_timeout(300)
    page.screenshot(path=ARTIFACTS / f"{name}.png")


def open_templates(page: Page) -> Locator:
    """Press the Templates button and choose this pack."""
    page.locator(".templates-tab-button").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name=PACK_NAME, exact=True).click()
    return dialog


@pytest.mark.parametrize("name", GRAPHS)
def test_dropped_file_opens_as_it_was_shipped(page: Page, complaints: list[str], name: str) -> None:
    shipped = read_workflow(name)
    page.evaluate(DROP, [f"{name}.json", json.dumps(shipped)])
    page.wait_for_function(OPENED, arg=shipped["id"])
    wait_until_ready(page)
    expect_no_trouble(page, complaints)
    assert export_prompt(page) == read_prompt(name)
    saved = saved_workflow(page)
    saved["extra"].pop("ds", None)  # where the view happened to be
    assert saved == shipped


def test_template_browser_shows_all_with_their_thumbnails(
    page: Page, complaints: list[str]
) -> None:
    dialog = open_templates(page)
    cards = dialog.locator("[data-testid^=template-workflow-]")
    expect(cards).to_have_count(len(GRAPHS))
    for name in GRAPHS:
        card = dialog.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        expect(card.get_by_role("heading")).to_have_text(name)
        image = card.locator("img")
        expect(image).to_have_js_property("naturalWidth", 512)
        expect(image).to_have_attribute("src", re.compile("^blob:"))
    dialog.get_by_test_id(f"template-workflow-{FIRST}").scroll_into_view_if_needed()
    page.screenshot(path=ARTIFACTS / "template_browser.png")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert complaints == []


@pytest.mark.parametrize("name", GRAPHS)
def test_template_runs_and_shows_its_picture(
    page: Page, server: Server, complaints: list[str], name: str
) -> None:
    dialog = open_templates(page)
    dialog.get_by_test_id(f"template-workflow-{name}").click()
    page.wait_for_function(OPENED, arg=read_workflow(name)["id"])
    expect_no_trouble(page, complaints)
    page.evaluate(SHRINK)
    with page.expect_response(lambda response: response.url.endswith("/api/prompt")) as queued:
        page.get_by_test_id("queue-button").click()
    run = finished(server, queued.value.json()["prompt_id"])
    outputs = run["outputs"].values()
    assert [image["filename"] for output in outputs for image in output["images"]]

    sizes = page.wait_for_function(RESULTS, timeout=30_000).json_value()
    assert len(sizes) == SHOWN.get(name, 1)
    side = 96 if name in SCALED else 64
    if name != "10_weight_grid":  # a sheet, whose size is the labels' matter
        assert {tuple(size) for size in sizes} == {(side, side)}
    reports = page.evaluate(REPORTS)
    executed = kinds(run)
    for kind, text in REPORTED.get(name, {}).items():
        assert kind not in executed or text in reports[kind]
    if name in REPORTED:  # what came from the cache says nothing
        assert reports.keys() == REPORTED[name].keys() & executed
        assert "ImagePromptApply" in executed
    # The reports made the nodes higher, into the room that was left for them.
    assert page.evaluate(OVERLAPS) == []
    picture_of(page, name)
    assert complaints == []


def finished(server: Server, prompt_id: str) -> Json:
    """The host's record of a run, when it has ended well."""
    deadline = time.monotonic() + 300
    while not (found := server.history(prompt_id)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert found["status"]["status_str"] == "success", found["status"]
    return found


def kinds(run: Json) -> set[str]:
    """Kinds of which a node was run, not all taken from the cache."""
    messages = run["status"]["messages"]
    cached = {one for kind, data in messages if kind == "execution_cached" for one in data["nodes"]}
    prompt: Json = run["prompt"][2]
    return {node["class_type"] for key, node in prompt.items() if key not in cached}


def test_weight_is_typed_and_goes_into_the_prompt(page: Page, complaints: list[str]) -> None:
    load_workflow(page, read_workflow(FIRST), FIRST)
    before = export_prompt(page)
    page.mouse.dblclick(*page.evaluate(WIDGET, ["ImagePromptApply", "weight"]))
    field = page.locator(".graphdialog input")
    expect(field).to_be_focused()
    page.wait_for_function(SELECTED)  # the page does that by itself, a moment later
    page.keyboard.type("0.35")
    expect(field).to_have_value("0.35")
    page.screenshot(path=ARTIFACTS / "typing_the_weight.png")
    page.keyboard.press("Enter")
    after = export_prompt(page)
    (apply,) = (key for key, node in before.items() if node["class_type"] == "ImagePromptApply")
    assert before[apply]["inputs"]["weight"] == 0.7
    assert after[apply]["inputs"].pop("weight") == 0.35
    del before[apply]["inputs"]["weight"]
    assert after == before
    assert complaints == []
