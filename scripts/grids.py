"""Draw the example of a weight grid: a real ComfyUI runs the miniature through the grid's nodes.

`python -m scripts.grids` writes docs/images/weight_grid.png.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scripts import claims, demo
from scripts import miniature_graphs as graphs
from scripts.client import Json, ServerError
from scripts.host import REPOSITORY, HostError
from scripts.server import Server

SHEET = REPOSITORY / "docs" / "images" / "weight_grid.png"
WEIGHTS, PRESETS = "0, 0.25, 0.5, 0.75, 1", "linear, ease in, ease out"
"""The miniature has the presets that every UNet has; style and composition need a larger one."""


def prompt(
    weights: str = WEIGHTS, presets: str = PRESETS, reference: str = claims.names("reference")[0]
) -> Json:
    """A grid of one reference with a text, and its labelled sheet as the only saved picture.

    Args:
        weights: See Image Prompt Grid.
        presets: See Image Prompt Grid.
        reference: A file of the input folder.
    """
    nodes = graphs.with_images([reference], text=f"{claims.SHAPE} {claims.PLACE}")
    grid = nodes["apply"]
    grid["class_type"] = "ImagePromptGrid"
    del grid["inputs"]["weight"]
    grid["inputs"] |= {"weights": weights, "presets": presets}
    pictures = {"images": ["decode", 0], "grid": ["apply", 1]}
    nodes["label"] = {"class_type": "ImagePromptGridPicture", "inputs": pictures}
    nodes["save"]["inputs"]["images"] = ["label", 0]
    return nodes


def draw(target: Path) -> None:
    """Run the prompt in a host of its own, and keep the sheet.

    Raises:
        HostError: No ComfyUI was found.
        ServerError: It did not start, or refused or failed the prompt.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        claims.write_inputs(base / "input")
        with Server(base, packs=[demo.PACK]) as server:
            result = server.run(prompt(), timeout=300)
        (sheet,) = (image.data for image in result.images if image.kind == "output")
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(sheet)).save(target, optimize=True)  # without the graph in it


def main(arguments: Sequence[str] = ()) -> None:
    """Draw the sheet, at the path that is given or the usual one; end with it or what failed."""
    target = Path(arguments[0]) if arguments else SHEET
    try:
        draw(target)
    except (HostError, ServerError) as error:
        sys.exit(f"grids: {error}")
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
