"""Take the documentation's pictures of workflows in the host's real front end.

`python -m scripts.screenshots` writes docs/images/first_workflow.png; with the argument `all`,
every workflow also goes into the ignored test-artifacts/.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

from scripts.browser import load_workflow, open_page
from scripts.graphs import GRAPHS
from scripts.host import REPOSITORY
from scripts.prompts import read_workflow
from scripts.server import Server
from scripts.workflows import write_placeholders

FIRST = REPOSITORY / "docs" / "images" / "first_workflow.png"
OTHERS = REPOSITORY / "test-artifacts"

# What the front end's own bars leave free of a 1600 x 900 page, in pixels.
LEFT, TOP, RIGHT, BOTTOM = 80, 110, 1580, 880

VIEW = """([scale, x, y]) => {
    const view = window.app.canvas.ds;
    view.scale = scale;
    view.offset[0] = x;
    view.offset[1] = y;
    window.app.canvas.setDirty(true, true);
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


def main(arguments: list[str]) -> None:
    """Take the pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        write_placeholders(base)
        with Server(base) as server, open_page(server) as page:
            take(page, "text_and_image", FIRST)
            for name in GRAPHS if arguments == ["all"] else ():
                take(page, name, OTHERS / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
