"""The shipped workflows on the miniature: the same graphs with its files, its words and its size.

What a workflow does to real models it does to these, in a second on a CPU; the thumbnails show it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from miniature import family, world
from miniature.studio import GUIDANCE, SAMPLER, SCHEDULER, STEPS
from miniature.world import Scene
from scripts.client import Json
from scripts.miniature_graphs import GLOBAL, PLUS
from scripts.prompts import read_prompt

SMALLER = 8
"""A picture of 512 pixels has 64 here."""

LATENT = 8
"""Pixels of a latent; masks are cut to these."""


Card = Literal["beside", "film", "grid", "rows", "files"]


@dataclass(frozen=True)
class Shot:
    """What a workflow is given.

    Attributes:
        pictures: Middle of the name of a picture of `pictures.py` -> what is there instead.
        labels: Which of them the thumbnail shows, in order, and what it calls them.
        texts: Title of a text node -> its words; all others are empty.
        layers: Title or kind of an influence node -> weights by transformer, for what its preset
            does in larger models.
        inputs: Kind of a node -> inputs that are set on all of that kind.
        card: How the thumbnail is composed.
        runs: The workflow is run once for each of these pictures, in the place of ``reference``.
        instead: The workflow that is run for it, where its own nodes know published files only.
    """

    pictures: Mapping[str, Image.Image]
    labels: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str | float]] = field(default_factory=dict)
    card: Card = "beside"
    runs: tuple[str, ...] = ("reference",)
    instead: str = ""


def scene(shape: str, texture: str, colour: str, place: str, ground: str) -> Scene:
    """A scene with marks that are all different."""
    return Scene(shape, texture, colour, place, ground, (0, 1, 2, 3))


def painted(shown: Scene) -> Image.Image:
    """A reference or a photo."""
    return world.pil(world.render([shown]))[0]


def silhouette(shown: Scene) -> Image.Image:
    """What the ControlNet reads."""
    return world.pil(world.outlines([shown]))[0]


def with_mask(shown: Scene) -> Image.Image:
    """A photo that is transparent where its shape is, in whole latents."""
    covered = world.coverage(replace(shown, scale=1.0)).numpy() > 0
    side = world.SIZE // LATENT
    blocks = covered.reshape(side, LATENT, side, LATENT).any((1, 3))
    keep = Image.fromarray((~blocks).astype("uint8") * 255).resize(
        (world.SIZE, world.SIZE), Image.Resampling.NEAREST
    )
    picture = painted(shown).convert("RGBA")
    picture.putalpha(keep)
    return picture


def write_inputs(name: str, shot: Shot, folder: Path) -> None:
    """Write the pictures of a workflow into the host's input folder; it is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for middle, picture in shot.pictures.items():
        picture.save(folder / _file(name, middle))


def prompt(name: str, shot: Shot, reference: str = "reference") -> Json:
    """The API-format prompt of a shipped workflow, changed to what the miniature can make.

    Args:
        name: The workflow.
        shot: What it is given; `write_inputs` puts its pictures where this looks.
        reference: The picture in the place of ``reference``.
    """
    changed = copy.deepcopy(read_prompt(shot.instead or name))
    for node in changed.values():
        kind, title, inputs = node["class_type"], node["_meta"]["title"], node["inputs"]
        match kind:
            case "CheckpointLoaderSimple":
                inputs["ckpt_name"] = family.BASE.name
            case "ImagePromptLoadAdapter":
                inputs["adapter_name"] = PLUS if "plus" in inputs["adapter_name"] else GLOBAL
            case "CLIPVisionLoader":
                inputs["clip_name"] = str(Path(family.CLIP.name, family.CLIP_VISION.name))
            case "ControlNetLoader":
                inputs["control_net_name"] = family.CONTROLNET.name
            case "LoadImage":
                middle = Path(inputs["image"]).stem.removeprefix("ip_adapter_")
                inputs["image"] = _file(name, reference if middle == "reference" else middle)
            case "CLIPTextEncode":
                inputs["text"] = shot.texts.get(title, "")
            case "EmptyLatentImage" | "SolidMask":
                inputs["width"] //= SMALLER
                inputs["height"] //= SMALLER
            case "ImageScaleToTotalPixels":
                node["class_type"] = "ImageScale"  # the host's smallest total is larger
                node["inputs"] = {
                    "image": inputs["image"],
                    "upscale_method": "nearest-exact",
                    "width": world.SIZE,
                    "height": world.SIZE,
                    "crop": "disabled",
                }
            case "KSampler":
                inputs |= {"steps": STEPS, "cfg": GUIDANCE}
                inputs |= {"sampler_name": SAMPLER, "scheduler": SCHEDULER}
            case "SaveImage":
                source = changed[inputs["images"][0]]
                if source["class_type"] == "ImagePromptGridPicture":
                    inputs["images"] = source["inputs"]["images"]  # one by one, without the labels
            case "ImagePromptInfluence":
                by_hand = shot.layers.get(title, shot.layers.get(kind))
                if by_hand is not None:
                    inputs |= {"layers": "linear", "layer_weights": by_hand}
        node["inputs"] |= shot.inputs.get(kind, {})
    return changed


def _file(name: str, middle: str) -> str:
    return f"{name}_{middle}.png"
