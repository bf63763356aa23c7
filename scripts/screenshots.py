"""Take the documentation's pictures of workflows and nodes in the host's real front end.

`python -m scripts.screenshots` writes docs/images/first_workflow.png; with the argument `all`,
every workflow also goes into the ignored test-artifacts/. With `nodes`, every node that has a help
page goes into web/docs/images.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page

from scripts.browser import load_workflow, open_page
from scripts.graphs import GRAPHS
from scripts.host import REPOSITORY
from scripts.prompts import read_workflow
from scripts.server import Server
from scripts.workflows import write_placeholders

FIRST = REPOSITORY / "docs" / "images" / "first_workflow.png"
OTHERS = REPOSITORY / "test-artifacts"
PAGES = REPOSITORY / "web" / "docs"

# What the front end's own bars leave free of a 1600 x 900 page, in pixels.
LEFT, TOP, RIGHT, BOTTOM = 80, 110, 1580, 880

VIEW = """([scale, x, y]) => {
    const view = window.app.canvas.ds;
    view.scale = scale;
    view.offset[0] = x;
    view.offset[1] = y;
    window.app.canvas.setDirty(true, true);
}"""


ZOOM = 2.0
"""Pixels for each of the front end's units: sharp where the help panel shows a picture smaller."""
MARGIN = 8
COLOURS = 48
TALL = (1600, 2000)
"""A page on which the highest node fits."""

PLAIN = {"Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.NodeBadge.NodeIdBadgeMode": "None"}

EMPTY = {
    "version": 0.4,
    "last_node_id": 0,
    "last_link_id": 0,
    "nodes": [],
    "links": [],
    "groups": [],
}

ADD_NODE = """async kind => {
    const node = window.LiteGraph.createNode(kind);
    window.app.graph.add(node);
    node.setSize([Math.max(node.size[0], 260), node.size[1]]);  // or long titles are cut
    window.app.canvas.deselectAll();
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    return [...node.getBounding()];
}"""


def _fit(page: Page, workflow: dict[str, Any]) -> None:
    """Show the whole graph as large as the free part of the page allows."""
    boxes = [group["bounding"] for group in workflow["groups"]]
    boxes += [[*node["pos"], *node["size"]] for node in workflow["nodes"]]
    left, top = (min(box[axis] for box in boxes) for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    scale = min((RIGHT - LEFT) / (right - left), (BOTTOM - TOP) / (bottom - top))
    x = (LEFT + RIGHT) / 2 / scale - (left + right) / 2
    y = (TOP + BOTTOM) / 2 / scale - (top + bottom) / 2
    page.evaluate(VIEW, [scale, x, y])


def take(page: Page, name: str, target: Path) -> None:
    """Open a shipped workflow and save a picture of it.

    Args:
        page: The front end, from `open_page`.
        name: The workflow's name.
        target: The PNG to write.
    """
    workflow = read_workflow(name)
    load_workflow(page, workflow, name)
    page.wait_for_timeout(1500)  # thumbnails load, notes render
    _fit(page, workflow)
    page.wait_for_timeout(500)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=target)
    print(target.relative_to(REPOSITORY))


def take_node(page: Page, kind: str, target: Path) -> None:
    """Save a small picture of one node, as it is when it is new.

    Args:
        page: The front end, from `open_page`.
        kind: The node's id.
        target: The PNG to write.
    """
    load_workflow(page, EMPTY, kind)
    x, y, width, height = page.evaluate(ADD_NODE, kind)
    page.evaluate(VIEW, [ZOOM, LEFT / ZOOM - x, TOP / ZOOM - y])
    page.wait_for_timeout(400)  # text boxes follow the view, fonts arrive
    clip = {
        "x": LEFT - MARGIN,
        "y": TOP - MARGIN,
        "width": width * ZOOM + 2 * MARGIN,
        "height": height * ZOOM + 2 * MARGIN,
    }
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    target.parent.mkdir(parents=True, exist_ok=True)
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(target.relative_to(REPOSITORY), shot.size, target.stat().st_size)


def take_nodes(base: Path) -> None:
    """Save a picture of every node that has a help page, and remove those of no other."""
    kinds = sorted(path.stem for path in PAGES.glob("*.md"))
    saved = base / "models" / "image_prompts" / "anna_00001.safetensors"
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.touch()
    with Server(base) as server:
        server.post("/settings", PLAIN)
        with open_page(server, TALL) as page:
            for kind in kinds:
                take_node(page, kind, PAGES / "images" / f"{kind}.png")
    for old in (PAGES / "images").glob("*.png"):
        if old.stem not in kinds:
            old.unlink()


def main(arguments: list[str]) -> None:
    """Take the pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        write_placeholders(base)
        if arguments == ["nodes"]:
            return take_nodes(base)
        with Server(base) as server, open_page(server) as page:
            take(page, "01_first_image_prompt", FIRST)
            for name in GRAPHS if arguments == ["all"] else ():
                take(page, name, OTHERS / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
