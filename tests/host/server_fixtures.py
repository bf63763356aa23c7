"""What the server tests share: a ComfyUI process over the small models, prompts, pixels."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.client import Json, OutputImage, Result
from scripts.pictures import write_pictures
from scripts.prompts import read_prompt, shrink
from scripts.server import Server
from tests.synthetic.models import FIXTURE_PACK

GOOD: Json = shrink(read_prompt("01_first_image_prompt"))
"""One reference, one text, one picture of 64 x 64 in two steps."""


@contextlib.contextmanager
def running(base: Path, model_files: Path, *arguments: str) -> Iterator[Server]:
    """A ComfyUI with a base folder of its own, whose model files are links to the built ones.

    The folders are real, so what a test puts beside the models is nobody else's.
    """
    for file in model_files.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            link = base / "models" / file.relative_to(model_files)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    write_pictures(base / "input")
    with Server(base, packs=[FIXTURE_PACK], arguments=arguments) as server:
        yield server


def node(prompt: Json, kind: str) -> str:
    """Id of the only node of a kind."""
    (found,) = (name for name, each in prompt.items() if each["class_type"] == kind)
    return str(found)


def changed(prompt: Json, kind: str, **inputs: Any) -> Json:
    """A copy with other inputs on the only node of a kind; None takes an input away."""
    new = copy.deepcopy(prompt)
    target = new[node(new, kind)]["inputs"]
    target.update(inputs)
    for name, value in inputs.items():
        if value is None:
            del target[name]
    return new


def replaced(prompt: Json, kind: str, new_kind: str, **inputs: Any) -> Json:
    """A copy with another node under the id of the only node of a kind."""
    return {**prompt, node(prompt, kind): {"class_type": new_kind, "inputs": inputs}}


def executed(result: Result) -> set[str]:
    """Ids of the nodes that really ran."""
    found = (event["data"]["node"] for event in result.events if event["type"] == "executing")
    return {name for name in found if name is not None}


def decode(image: OutputImage) -> np.ndarray:
    """Pixels ``[H, W, 3]``, 0..255."""
    with Image.open(io.BytesIO(image.data)) as opened:
        return np.asarray(opened.convert("RGB")).astype(np.int16)


def saved(result: Result) -> list[np.ndarray]:
    """Pixels of what a run saved; previews are left out."""
    return [decode(image) for image in result.images if image.kind == "output"]


def picture(result: Result) -> np.ndarray:
    """Pixels of the only picture that a run saved."""
    (image,) = saved(result)
    return image


@contextlib.contextmanager
def renamed(server: Server, names: dict[str, str]) -> Iterator[None]:
    """Model files under other names below ``models``, for a while."""
    folder = server.base / "models"
    for old, new in names.items():
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)
    try:
        yield
    finally:
        for old, new in names.items():
            (folder / new).rename(folder / old)


@contextlib.contextmanager
def converted(server: Server, name: str) -> Iterator[str]:
    """What Load IP-Adapter offers after Convert IP-Adapter has run on a file, for a while."""
    convert, folder = "ImagePromptConvert", Path("ipadapter", "converted")
    inputs = {"adapter_name": name, "variant": "automatic", "filename_prefix": "converted/mine"}
    result = server.run({"convert": {"class_type": convert, "inputs": inputs}})
    (written,) = result.outputs["convert"]["text"]
    path = server.base / "models" / folder / written
    try:
        yield str(Path(folder.name, written))
    finally:
        path.unlink()
