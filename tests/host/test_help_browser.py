"""Help and translations in the host's own front end: open a page, switch the language."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import ConsoleMessage, Locator, Page, expect

from scripts.browser import open_page, wait_until_ready
from scripts.locales import LANGUAGES, read, texts_file
from scripts.server import Server
from scripts.setup import find_chromium
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium found; set CHROMIUM_PATH"),
]

NODE = "ImagePromptApply"
NAMES = {"zh": "中文", "ko": "한국어", "ja": "日本語"}
"""What the front end calls the languages in its own menu."""

ADD = """kind => {
    const node = window.LiteGraph.createNode(kind);
    window.app.graph.add(node);
    node.pos = [300, 200];
}"""

SHOWN = """kind => {
    const [node] = window.app.graph.findNodesByType(kind);
    return {
        title: node.title,
        inputs: Object.fromEntries(node.inputs.map(input => [input.name, input.localized_name])),
        widgets: Object.fromEntries(node.widgets.map(widget => [widget.name, widget.label])),
        outputs: node.outputs.map(output => output.localized_name),
    };
}"""

INPUTS = """async kind => {
    const {required, optional} = (await (await fetch("/api/object_info")).json())[kind].input;
    return Object.keys({...required, ...optional});
}"""

RESTORED = "kind => window.app.graph.findNodesByType(kind).length === 1"

# A click finds a node only once it was drawn, and the canvas only if nothing fades above it.
TITLE = """kind => {
    const [node] = window.app.graph.findNodesByType(kind);
    const canvas = window.app.canvas;
    canvas.draw(true, true);
    const place = canvas.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] - 15]);
    return document.elementFromPoint(...place) === canvas.canvas && place;
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Server(tmp_path_factory.mktemp("help")) as server, open_page(server) as opened:
        opened.evaluate(ADD, NODE)
        yield opened


def is_complaint(line: ConsoleMessage) -> bool:
    """An error, but not of files that the host asks for in vain, as for every page's en.md."""
    address = line.location["url"]
    ours = "/extensions/ip-adapter/" in address and not address.endswith(f"/{NODE}/en.md")
    return line.type == "error" and (ours or "Failed to load resource" not in line.text)


@pytest.fixture
def complaints(page: Page) -> Iterator[list[str]]:
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda line: found.append(line.text) if is_complaint(line) else None)
    yield found


def open_help(page: Page) -> Locator:
    """Select the node as a user does, and open its help by the button above it."""
    page.mouse.click(*page.wait_for_function(TITLE, arg=NODE).json_value())
    page.get_by_test_id("info-button").click()
    content = page.locator(".node-help-content")
    expect(content.locator("h1")).to_be_visible()
    return content


def choose_language(page: Page, name: str) -> None:
    """Change the language in the settings, as a user does, and load the page anew.

    Without that the front end may read the nodes' names before the language has arrived.
    """
    page.keyboard.press("Control+,")
    setting = page.get_by_test_id("settings-dialog").locator('[data-setting-id="Comfy.Locale"]')
    setting.get_by_role("combobox").click()
    with page.expect_response(lambda response: response.url.endswith("/settings/Comfy.Locale")):
        page.get_by_role("option", name=name, exact=True).click()
    page.reload()
    wait_until_ready(page)
    page.wait_for_function(RESTORED, arg=NODE)
    expect(page.get_by_role("dialog")).to_have_count(0)


def keep(page: Page, name: str) -> None:
    """Keep a picture of the page, to be looked at."""
    folder = ROOT / "test-artifacts"
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / f"help_{name}.png")


def check_help(content: Locator, title: str, cells: list[str]) -> None:
    expect(content.locator("h1")).to_have_text(title)
    expect(content.locator("table").first.locator("tbody tr td:first-child")).to_have_text(cells)
    picture = content.locator("img")
    expect(picture).to_have_count(1)
    expect(picture).to_have_js_property("complete", True)
    assert picture.evaluate("image => image.naturalWidth") > 200


def test_help_shows_the_page_with_its_table_and_picture(page: Page, complaints: list[str]) -> None:
    check_help(open_help(page), "Apply IP-Adapter", list(page.evaluate(INPUTS, NODE)))
    keep(page, "en")
    assert complaints == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_node_and_help_follow_the_language(
    page: Page, complaints: list[str], language: str
) -> None:
    texts: dict[str, Any] = read(texts_file(language))[NODE]
    names = {name: text["name"] for name, text in texts["inputs"].items()}
    choose_language(page, NAMES[language])
    complaints.clear()  # what the front end says while it starts is its own
    shown = page.evaluate(SHOWN, NODE)
    assert shown["title"] == texts["display_name"]
    assert shown["inputs"] == names
    assert shown["widgets"] == {name: names[name] for name in shown["widgets"]}
    assert shown["outputs"] == [texts["outputs"]["0"]["name"]]
    cells = [f"{name} {text}" for name, text in names.items()]
    check_help(open_help(page), texts["display_name"], cells)
    keep(page, language)
    assert complaints == []
