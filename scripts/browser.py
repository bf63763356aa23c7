"""The host's own page in a headless Chromium: load a workflow, read it back, take its picture.

Shared by `workflows.py`, `screenshots.py` and the browser tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

from scripts.server import Server
from scripts.setup import find_chromium

Json = dict[str, Any]

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
VIEWPORT = (1600, 900)

SLOW = 30_000
"""How long a busy machine may take to show something, in milliseconds."""

# A first visit shows an empty canvas below the templates, which `open_page` closes; a later one the
# host's sample workflow, whose missing models the page would look for on the internet.
# Nothing in the way of the graph, and its text drawn at every zoom.
SETTINGS = {
    "Comfy.TutorialCompleted": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Locale": "en",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}

# The mask is what the page lays over itself while it is busy. It fades, takes clicks until it is
# gone, and stays for good if the page becomes busy again before that.
READY = """() => window.app?.graph && window.app.extensionManager
    && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100
    && !document.querySelector("#splash-loader, .p-blockui-mask")"""


class BrowserError(RuntimeError):
    """No browser to drive."""


@contextmanager
def open_page(server: Server, viewport: tuple[int, int] = VIEWPORT) -> Iterator[Page]:
    """Open the front end of a running host and wait until it takes workflows.

    Whatever is expected of the page from then on may take as long as `SLOW`.

    Args:
        server: The host.
        viewport: Width and height of the page in pixels.

    Raises:
        BrowserError: There is no Chromium.
    """
    chromium = find_chromium()
    if chromium is None:
        raise BrowserError("No Chromium found; install one, or set CHROMIUM_PATH.")
    expect.set_options(timeout=SLOW)
    server.post("/settings", SETTINGS)
    width, height = viewport
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(server.url())
            wait_until_ready(page)
            page.get_by_role("dialog").first.wait_for(timeout=60_000)
            page.keyboard.press("Escape")
            page.get_by_role("dialog").first.wait_for(state="detached")
            yield page
        finally:
            browser.close()


def wait_until_ready(page: Page) -> None:
    """Wait until the page takes workflows, clicks and keys, as after a load or a dropped file."""
    page.wait_for_function(READY, timeout=120_000)


def load_workflow(page: Page, workflow: Json, name: str) -> None:
    """Put a UI-format workflow on the canvas in a tab of that name, as opening its file would."""
    load = "([workflow, name]) => window.app.loadGraphData(workflow, true, true, name)"
    page.evaluate(load, [workflow, name])


def saved_workflow(page: Page) -> Json:
    """What the front end would save of the graph on the canvas."""
    saved: Json = json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    return saved


def export_prompt(page: Page) -> Json:
    """The front end's own API export of the graph on the canvas, in order of node ids."""
    prompt: Json = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    return {node: prompt[node] for node in sorted(prompt, key=int)}


def unknown_nodes(page: Page) -> list[str]:
    """Kinds of nodes on the canvas that the host does not have."""
    found: list[str] = page.evaluate(
        """() => window.app.graph.nodes.map(node => node.type)
            .filter(kind => !(kind in window.LiteGraph.registered_node_types))"""
    )
    return found
