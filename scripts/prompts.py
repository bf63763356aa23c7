"""The shipped workflows as files: read them, and make them small enough for a CPU."""

from __future__ import annotations

import copy
import json

from scripts.client import Json
from scripts.host import REPOSITORY

FOLDER = REPOSITORY / "workflows"


def names() -> list[str]:
    """Names of the shipped workflows, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def shrink(prompt: Json, *, size: int = 64, steps: int = 2) -> Json:
    """A copy of an API-format prompt that runs in moments on a CPU.

    Args:
        prompt: Node id -> `{"class_type", "inputs"}`.
        size: Width and height in pixels of everything sampled; a multiple of 8. Pictures that are
            scaled to an area get about size x size, but not under the host's 0.01 megapixels.
        steps: Sampling steps.
    """
    small = copy.deepcopy(prompt)
    for node in small.values():
        inputs = node["inputs"]
        match node["class_type"]:
            case "KSampler":
                inputs["steps"] = steps
            case "EmptyLatentImage" | "ImageScale":
                inputs["width"] = inputs["height"] = size
            case "ImageScaleToTotalPixels":
                inputs["megapixels"] = max(0.01, size * size / 1024**2)
    return small


def read_prompt(name: str) -> Json:
    """The API-format prompt of a shipped workflow."""
    prompt: Json = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    return prompt


def read_workflow(name: str) -> Json:
    """A shipped workflow in the UI format."""
    workflow: Json = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return workflow
