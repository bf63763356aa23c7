"""Make the pictures of docs/recipes.md: a real ComfyUI runs the miniature, one strip for a recipe.

References are the first of a seed, and all pictures of a row start from the same noise: nothing is
chosen by its outcome. `docs/first_picture.json` is written as well: the first template with the
miniature's files, for those who have no others.

    python -m scripts.doc_pictures [NAME...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from miniature import family, world
from miniature.studio import GUIDANCE, SAMPLER, SCHEDULER, STEPS
from scripts import claims, demo
from scripts import miniature_graphs as graphs
from scripts.client import Json
from scripts.contact_sheet import GREY, HEADING, INK, PAPER, SCALE, SMALL, font
from scripts.graphs import FIRST
from scripts.host import REPOSITORY
from scripts.prompts import read_workflow
from scripts.server import Server

IMAGES = REPOSITORY / "docs" / "images"
ROWS = 2
MARGIN, GAP, HEAD, LINE = 28, 22, 74, 31
"""Around a strip; between pictures; for two lines of words; for one. In pixels of the strip."""

FIRST_PICTURE = REPOSITORY / "docs" / "first_picture.json"
ABOUT = (
    "**A picture as a prompt**, with the miniature: a Stable Diffusion of pocket size.\n\n"
    "- Press **Run**: a picture of 64 x 64 takes a second.\n"
    "- **weight** (Apply IP-Adapter): 0 is the text alone, 1 follows the reference.\n"
    "- **Load Image**: `miniature_reference_1.png` to `_4.png`.\n"
    "- **Positive prompt**: words of its small world, such as *striped red cross left on mint*."
)

ONE, TWO = claims.names("reference")[:ROWS]
TEXT = f"{claims.SHAPE} {claims.PLACE}"
WIDE, HALF, SPOT = "doc_wide.png", "doc_half.png", "doc_spot.png"
"""Two scenes beside one another; white in the left half; white around the first shape."""


@dataclass(frozen=True)
class Column:
    """Pictures below one another.

    Attributes:
        heading: First line above them.
        note: Second, fainter line.
        source: Files of the input folder, or the prompt that makes the pictures.
        across: Whether the pictures stand side by side instead.
    """

    heading: str
    note: str
    source: Sequence[str] | Json
    across: bool = False


def node(kind: str, **inputs: Any) -> Json:
    """One node of a prompt for the API; what is left out gets its default."""
    return {"class_type": kind, "inputs": inputs}


def changed(prompt: Json, name: str, **inputs: Any) -> Json:
    """A prompt with other inputs on a node."""
    return {**prompt, name: {**prompt[name], "inputs": {**prompt[name]["inputs"], **inputs}}}


def plain(text: str = "", weight: float = 1.0) -> Json:
    """A picture for each of two references, as everywhere else where nothing is said."""
    return graphs.with_images([ONE, TWO], text=text, weight=weight)


def strength() -> list[Column]:
    """The weight, with a text that names shape and place."""
    weights = (0.0, 0.25, 0.5, 0.75, 1.0)
    made = [Column(f"weight {w:g}", f"text “{TEXT}”", plain(TEXT, w)) for w in weights]
    return [Column("reference", "", [ONE, TWO]), *made]


def layers() -> list[Column]:
    """Where in the network: some layers carry the look, some the layout."""
    made = []
    for heading, transformers in (("all layers", "0-6"), ("style", "5-6"), ("composition", "1-4")):
        influence = node("ImagePromptInfluence", layer_weights=f"{transformers}:1")
        prompt = changed({**plain(), "influence": influence}, "apply", influence=["influence", 0])
        made.append(Column(heading, f"transformers {transformers}", prompt))
    nothing = Column("weight 0", "the base alone", plain(weight=0.0))
    return [Column("reference", "", [ONE, TWO]), nothing, *made]


def moments() -> list[Column]:
    """When: the layout is settled early, the look late."""
    windows = ((0.0, 1.0), (0.4, 1.0), (0.6, 1.0), (0.0, 0.5), (0.0, 0.3))
    made = [
        Column(
            f"from {start:g}" if start else "all steps" if end == 1 else f"until {end:g}",
            f"start_at {start:g}" if start else f"end_at {end:g}",
            changed(plain(TEXT), "apply", start_at=start, end_at=end),
        )
        for start, end in windows
    ]
    return [Column("reference", "", [ONE, TWO]), *made]


def structure() -> list[Column]:
    """A ControlNet says what is where."""
    hints = claims.names("hint")[:ROWS]
    made = graphs.with_images([ONE, TWO], hints=hints)
    return [
        Column("reference", "", [ONE, TWO]),
        Column("hint", "for ControlNet", hints),
        Column("both", "weight 1, strength 1", made),
    ]


def regions() -> list[Column]:
    """Two references with a text each, left and right; a ControlNet says where they stand."""
    rights, hints = claims.names("other"), claims.names("pair_hint")
    nodes = graphs.in_masks([ONE, TWO], rights, HALF, hints)
    for name in ("apply", "apply_first"):
        del nodes[name]
    before: Json = {}
    for side, prompt, mask in (("left", "first", "inside"), ("right", "second", "outside")):
        inputs = {"image_prompt": [f"encode_{prompt}", 0], "mask": [mask, 0], **before}
        nodes[side] = node("ImagePromptRegion", **inputs)
        before = {"regions": [side, 0]}
    nodes["apply"] = node(
        "ImagePromptApplyRegions", model=["checkpoint", 0], ip_adapter=["adapter", 0], **before
    )
    return [
        Column("left", "reference", [ONE, TWO]),
        Column("right", "reference", rights),
        Column("mask of the left", "the right has the rest", [HALF, HALF]),
        Column("hint", "for ControlNet", hints),
        Column("two regions", "weight 1", nodes),
    ]


def inpainting() -> list[Column]:
    """Only the masked part is made anew, after the reference."""
    nodes = graphs.with_images([TWO])
    nodes = {
        **nodes,
        "photo": node("LoadImage", image=ONE),
        "spot": node("LoadImageMask", image=SPOT, channel="red"),
        "start": node("VAEEncode", pixels=["photo", 0], vae=["checkpoint", 2]),
        "latent": node("SetLatentNoiseMask", samples=["start", 0], mask=["spot", 0]),
    }
    made = changed(nodes, "apply", mask=["spot", 0])
    return [
        Column("picture", "to be changed", [ONE]),
        Column("mask", "white: made anew", [SPOT]),
        Column("reference", "", [TWO]),
        Column("result", "weight 1", made),
        Column("without it", "weight 0", changed(made, "apply", weight=0.0)),
    ]


def animation() -> list[Column]:
    """One reference fades to the other; every picture has the same noise."""
    frames = 6
    nodes = graphs.in_masks([ONE], [TWO], HALF, [])
    for name in ("apply_first", "inside", "outside"):
        del nodes[name]
    nodes |= {
        "fade": node(
            "ImagePromptFade",
            first=["encode_first", 0],
            second=["encode_second", 0],
            frames=frames,
        ),
        "empty": node("EmptyLatentImage", width=world.SIZE, height=world.SIZE, batch_size=frames),
        "latent": node("LatentBatchSeedBehavior", samples=["empty", 0], seed_behavior="fixed"),
    }
    nodes["apply"] = node(
        "ImagePromptApply",
        model=["checkpoint", 0],
        ip_adapter=["adapter", 0],
        image_prompt=["fade", 0],
    )
    return [
        Column("first", "", [ONE]),
        Column("Fade Between Prompts", f"{frames} frames, linear", nodes, across=True),
        Column("second", "", [TWO]),
    ]


def tiles() -> list[Column]:
    """A wide reference: its middle, all of it, or in pieces."""
    base = graphs.in_masks([ONE], [TWO], HALF, [])
    dropped = ("apply_first", "inside", "outside", "encode_first", "encode_second", "second")
    nodes = {name: each for name, each in base.items() if name not in dropped}
    nodes["first"] = node("LoadImage", image=WIDE)
    models = {"ip_adapter": ["adapter", 0], "clip_vision": ["encoder", 0]}
    pieces = {
        **nodes,
        "tiles": node("ImagePromptTiles", **models, image=["first", 0]),
        "apply": node(
            "ImagePromptApplyRegions",
            model=["checkpoint", 0],
            ip_adapter=["adapter", 0],
            regions=["tiles", 0],
        ),
    }

    def whole(fit: str) -> Json:
        encode = node("ImagePromptEncode", **models, image=["first", 0], fit=fit)
        apply = node(
            "ImagePromptApply",
            model=["checkpoint", 0],
            ip_adapter=["adapter", 0],
            image_prompt=["encode", 0],
        )
        return {**nodes, "encode": encode, "apply": apply}

    return [
        Column("reference", "twice as wide as high", [WIDE]),
        Column("fit: crop", "its middle", whole("crop")),
        Column("Image Prompt Tiles", "each piece in its place", pieces),
    ]


def first_picture() -> Json:
    """The first template, in the UI format, on the miniature."""
    workflow = read_workflow(FIRST)
    encoder = f"{family.CLIP.name}/{family.CLIP_VISION.name}"
    values: dict[str, list[Any]] = {
        "CheckpointLoaderSimple": [family.BASE.name],
        "ImagePromptLoadAdapter": [graphs.GLOBAL, "automatic"],
        "CLIPVisionLoader": [encoder],
        "Load Image (reference)": [ONE, "image"],
        "Positive prompt": [TEXT],
        "Negative prompt": [""],
        "EmptyLatentImage": [world.SIZE, world.SIZE, 1],
        "KSampler": [42, "fixed", STEPS, GUIDANCE, SAMPLER, SCHEDULER, 1.0],
        "SaveImage": ["miniature"],
        "About this workflow": [ABOUT],
    }
    for each in workflow["nodes"]:
        each["properties"].pop("models", None)
        each["widgets_values"] = values.get(each.get("title", each["type"]), each["widgets_values"])
    return workflow


RECIPES: dict[str, Callable[[], list[Column]]] = {
    "strength": strength,
    "layers": layers,
    "moments": moments,
    "structure": structure,
    "regions": regions,
    "inpainting": inpainting,
    "animation": animation,
    "tiles": tiles,
}
"""Name of the picture -> its columns."""


def write_inputs(folder: Path) -> None:
    """Draw what the graphs load into the host's input folder."""
    claims.write_inputs(folder)
    scenes = claims.REFERENCES[:2]
    wide = torch.cat(list(world.render(scenes)), dim=-1)
    half = torch.zeros(3, world.SIZE, 2 * world.SIZE)
    half[:, :, : world.SIZE] = 1
    spot = torch.nn.functional.max_pool2d(world.coverage(scenes[0])[None], 9, 1, 4)
    for name, pixels in ((WIDE, wide), (HALF, half), (SPOT, spot.expand(3, -1, -1))):
        world.pil(pixels[None])[0].save(folder / name)


def completed(prompt: Json, interfaces: Json) -> Json:
    """A prompt whose nodes have the default of every required input that they leave out."""
    full: Json = {}
    for name, each in prompt.items():
        required = interfaces[each["class_type"]]["input"]["required"]
        defaults = {
            key: entry[1]["default"]
            for key, entry in required.items()
            if len(entry) > 1 and "default" in entry[1]
        }
        full[name] = {**each, "inputs": {**defaults, **each["inputs"]}}
    return full


def draw(columns: Sequence[Sequence[Image.Image]], words: Sequence[Column]) -> Image.Image:
    """The strip: each pixel of a picture large enough to be seen."""
    widths = [SCALE * max(picture.width for picture in column) for column in columns]
    rows = max(len(column) for column in columns)
    side = SCALE * max(picture.height for column in columns for picture in column)
    width = 2 * MARGIN + sum(widths) + GAP * (len(widths) - 1)
    strip = Image.new("RGB", (width, 2 * MARGIN + HEAD + rows * (side + GAP) - GAP), PAPER)
    pen, x = ImageDraw.Draw(strip), MARGIN
    for column, each, word in zip(columns, widths, words, strict=True):
        pen.text((x, MARGIN - 8), word.heading, INK, font(HEADING - 2))
        pen.text((x, MARGIN - 6 + LINE), word.note, GREY, font(SMALL - 3))
        for row, picture in enumerate(column):
            size = (SCALE * picture.width, SCALE * picture.height)
            place = (x, MARGIN + HEAD + row * (side + GAP))
            strip.paste(picture.convert("RGB").resize(size, Image.Resampling.NEAREST), place)
        x += each + GAP
    return strip


def main(arguments: Sequence[str] = ()) -> None:
    """Make the strips that are named, or all of them."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        write_inputs(base / "input")
        text = json.dumps(first_picture(), indent=2, ensure_ascii=False)
        FIRST_PICTURE.write_text(f"{text}\n", encoding="utf-8")
        with Server(base, packs=[demo.PACK]) as server:
            interfaces = server.object_info()
            for name in arguments or RECIPES:
                words = RECIPES[name]()
                columns = [made(column, server, interfaces) for column in words]
                draw(columns, words).save(IMAGES / f"recipe_{name}.png", optimize=True)
                print(name)


def made(column: Column, server: Server, interfaces: Json) -> list[Image.Image]:
    """The pictures of a column."""
    if not isinstance(column.source, dict):
        return [Image.open(server.base / "input" / file) for file in column.source]
    pictures = demo.pictures(server.run(completed(column.source, interfaces), timeout=300))
    return [beside(pictures)] if column.across else pictures


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, as far from one another as columns are."""
    step = pictures[0].width + GAP // SCALE
    row = Image.new("RGB", (step * len(pictures) - GAP // SCALE, pictures[0].height), PAPER)
    for number, picture in enumerate(pictures):
        row.paste(picture, (step * number, 0))
    return row


if __name__ == "__main__":
    main(sys.argv[1:])
