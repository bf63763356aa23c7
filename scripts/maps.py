"""Show where references act: a real ComfyUI runs the miniature and draws its attention maps.

Two references, each in its mask, make a wide picture; the nodes Record Attention Maps and Show
Attention Maps draw the three views, which are put below one another.

    python -m scripts.maps [PICTURE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scripts import claims
from scripts import miniature_graphs as graphs
from scripts.client import Json, ServerError
from scripts.demo import BASE, PACK, pictures
from scripts.host import REPOSITORY, HostError
from scripts.server import Server

PICTURE = REPOSITORY / "docs" / "images" / "attention_maps.png"
VIEWS = ("by reference", "by layer group", "over steps")


def graph() -> Json:
    """The demo's picture of two references in two masks, recorded and shown in three views."""
    first, other, hint = (claims.names(kind)[:1] for kind in ("reference", "other", "pair_hint"))
    nodes = graphs.in_masks(first, other, claims.MASK, hint)
    nodes["record"] = _node("ImagePromptRecordMaps", model=["apply", 0], picture=0)
    nodes["sampler"]["inputs"]["model"] = ["record", 0]
    del nodes["save"]
    for number, view in enumerate(VIEWS):
        nodes[f"show_{number}"] = _node(
            "ImagePromptShowMaps",
            maps=["record", 1],
            latent=["sampler", 0],
            view=view,
            scale="same for all",
            reference=0,
            image=["decode", 0],
        )
        nodes[f"save_{number}"] = _node(
            "SaveImage", images=[f"show_{number}", 0], filename_prefix=f"maps_{number}"
        )
    return nodes


def make(base: Path, target: Path) -> None:
    """Run the host and write the picture.

    Args:
        base: Base folder of the host; its input pictures are written there.
        target: The file to write.

    Raises:
        HostError: No ComfyUI was found.
        ServerError: It did not start, or refused or failed the prompt.
    """
    claims.write_inputs(base / "input")
    with Server(base, packs=[PACK]) as server:
        made = server.run(graph(), timeout=300)
    found = dict(
        zip((i.node_id for i in made.images if i.kind == "output"), pictures(made), strict=True)
    )
    views = [found[f"save_{number}"] for number in range(len(VIEWS))]
    sheet = Image.new("RGB", (max(one.width for one in views), sum(one.height for one in views)))
    sheet.paste(views[0].getpixel((0, 0)), (0, 0, *sheet.size))
    top = 0
    for one in views:
        sheet.paste(one, (0, top))
        top += one.height
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, optimize=True)


def _node(kind: str, **inputs: object) -> Json:
    return {"class_type": kind, "inputs": inputs}


def main(arguments: Sequence[str] = ()) -> None:
    """Make the picture, at the path that is given or the usual one; end with it or what failed."""
    target = Path(arguments[0]) if arguments else PICTURE
    try:
        make(BASE, target)
    except (HostError, ServerError) as error:
        sys.exit(f"maps: {error}")
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
