"""Make the pictures of what the nodes that look inside show: active prompts, the encoder's view.

A real ComfyUI runs them on the small random models of the tests, under the names that users have.
`python -m scripts.inspecting` writes docs/images/inspect.png and docs/images/encoder_view.png.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ip_adapter import drawing
from scripts import pictures
from scripts.client import Json
from scripts.host import REPOSITORY
from tests.conftest import MODEL_FILES
from tests.host.server_fixtures import running
from tests.synthetic.models import (
    ADAPTER_BASE,
    ADAPTER_PLUS,
    CHECKPOINT,
    CLIP_VISION,
    build_models,
)

INSPECT = REPOSITORY / "docs" / "images" / "inspect.png"
VIEW = REPOSITORY / "docs" / "images" / "encoder_view.png"

WIDE, HALF, SPOT = "inspecting_wide.png", "inspecting_half.png", "inspecting_spot.png"
"""A reference that is not square, a mask for the new picture, a mask for the reference."""

SIDE, GAP, MARGIN = 150, 10, 28
"""Of a square on the sheet, between squares, around the sheet, in pixels."""

VIEWS = {
    "crop": "crop: the centre",
    "pad": "pad: all of it, smaller",
    "tile": "tile: squares that cover it",
    "mask": "crop with a mask",
}


def node(kind: str, **inputs: Any) -> Json:
    """One node of a prompt for the API."""
    return {"class_type": kind, "inputs": inputs}


def chain() -> Json:
    """Three image prompts on one model, and the node that inspects it."""
    prompt: Json = {
        "model": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT.name),
        "encoder": node("CLIPVisionLoader", clip_name=CLIP_VISION.name),
        "image": node("LoadImage", image="ip_adapter_reference.png"),
        "half": node("LoadImageMask", image=HALF, channel="red"),
        "base": node("ImagePromptLoadAdapter", adapter_name=ADAPTER_BASE.name, variant="base"),
        "plus": node("ImagePromptLoadAdapter", adapter_name=ADAPTER_PLUS.name, variant="plus"),
        "all": influence(),
        "style": influence(layers="style transfer precise"),
        "by hand": influence(
            layer_weights="0-5:0.3, 6:-0.5, 7-15:1", keyframes="0:1, 0.4:1, 0.7:0.2, 1:0"
        ),
    }
    for name in ("base", "plus"):
        prompt[f"{name} prompt"] = node(
            "ImagePromptEncode",
            ip_adapter=[name, 0],
            clip_vision=["encoder", 0],
            image=["image", 0],
            fit="crop",
        )
    before = "model"
    for name, adapter, weight, more in (
        ("all", "base", 0.6, {}),
        ("style", "plus", 0.8, {"start_at": 0.2, "end_at": 0.8, "mask": ["half", 0]}),
        ("by hand", "plus", 1.0, {}),
    ):
        prompt[f"apply {name}"] = node(
            "ImagePromptApply",
            model=[before, 0],
            ip_adapter=[adapter, 0],
            image_prompt=[f"{adapter} prompt", 0],
            weight=weight,
            influence=[name, 0],
            **{"start_at": 0.0, "end_at": 1.0, **more},
        )
        before = f"apply {name}"
    return {**prompt, "inspect": node("ImagePromptInspect", model=[before, 0])}


def influence(**inputs: Any) -> Json:
    """How, where and when, with what is not given at its default."""
    usual = {"weight": 1.0, "layers": "linear", "scaling": "V only", "start_at": 0.0, "end_at": 1.0}
    return node("ImagePromptInfluence", **{**usual, **inputs})


def views() -> Json:
    """The nodes that show what the encoder sees, one for each way."""
    prompt: Json = {
        "encoder": node("CLIPVisionLoader", clip_name=CLIP_VISION.name),
        "wide": node("LoadImage", image=WIDE),
        "spot": node("LoadImageMask", image=SPOT, channel="red"),
    }
    for name in VIEWS:
        fit = {"fit": name} if name != "mask" else {"fit": "crop", "mask": ["spot", 0]}
        prompt[name] = node(
            "ImagePromptPreview", clip_vision=["encoder", 0], image=["wide", 0], **fit
        )
    return prompt


def write_inputs(folder: Path) -> None:
    """Write what the prompts load."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = pictures.photo().crop((0, 110, 512, 410))
    wide.save(folder / WIDE)
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 24, 64))
    half.save(folder / HALF)
    spot = Image.new("L", wide.size)
    ImageDraw.Draw(spot).ellipse((240, -40, 470, 200), fill=255)
    spot.save(folder / SPOT)


def sheet(reference: Image.Image, squares: dict[str, list[Image.Image]]) -> Image.Image:
    """The reference, and beside it the squares of each way, named."""
    share = SIDE / reference.height
    parts = [("the reference", [reference.resize((round(share * reference.width), SIDE))])]
    parts += [
        (VIEWS[name], [one.resize((SIDE, SIDE)) for one in found])
        for name, found in squares.items()
    ]
    rows = [parts[:1] + parts[1:3], parts[3:]]
    width = 2 * MARGIN + max(
        sum(one.width + GAP for _, held in row for one in held) + 2 * GAP * (len(row) - 1) - GAP
        for row in rows
    )
    line = SIDE + 30
    picture, pen = drawing.canvas(width, 2 * MARGIN + len(rows) * line + 18)
    for place, row in enumerate(rows):
        x, y = MARGIN, MARGIN + place * (line + 18)
        for name, held in row:
            drawing.label(pen, (x, y), name, size=15)
            for one in held:
                picture.paste(one, (x, y + 26))
                x += one.width + GAP
            x += 2 * GAP
    return picture


def run(base: Path, prompts: Iterable[Json]) -> list[dict[str, list[Image.Image]]]:
    """What the nodes of each prompt show, by node."""
    found = []
    with running(base, MODEL_FILES / "models") as server:
        for prompt in prompts:
            shown: dict[str, list[Image.Image]] = {}
            for image in server.run(prompt, timeout=600).images:
                picture = Image.open(io.BytesIO(image.data)).convert("RGB")
                shown.setdefault(image.node_id, []).append(picture)
            found.append(shown)
    return found


def main() -> None:
    """Write the pictures."""
    build_models(MODEL_FILES)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        write_inputs(base / "input")
        active, seen = run(base, (chain(), views()))
        with Image.open(base / "input" / WIDE) as reference:
            view = sheet(reference, {name: seen[name] for name in VIEWS})
    for picture, target in ((active["inspect"][0], INSPECT), (view, VIEW)):
        picture.save(target, optimize=True)
        print(target.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
