"""Samples to evaluate on: a picture, which is the image prompt, and its caption.

Read from a COCO folder or from JSON lines, and checked row by row before anything is generated.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ImageError, MissingFileError
from .errors import DataError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_SHOWN = 10
"""Bad rows that a message lists."""


@dataclass(frozen=True)
class Sample:
    """A picture with its caption.

    Attributes:
        id: Names its pictures and decides its seeds; letters, digits, dots, dashes, underscores.
        image: The picture: image prompt, and what CLIP-I compares with.
        caption: What CLIP-T compares with.
        place: Where it stands, for messages: ``data.jsonl line 3``.
    """

    id: str
    image: Path
    caption: str
    place: str


@dataclass(frozen=True)
class DataCard:
    """Identifies data by content.

    Attributes:
        name: ``val2017`` for COCO 2017 validation, or the file's name.
        samples: How many.
        sha256: Over every id, caption and picture file, in order.
    """

    name: str
    samples: int
    sha256: str


def read_samples(path: Path, limit: int | None = None) -> tuple[list[Sample], DataCard]:
    """Read and check samples.

    Args:
        path: A folder with ``annotations/captions_NAME.json`` and the pictures in ``NAME/``, as
            COCO is unpacked: its samples are the pictures by number, each with the caption of the
            lowest annotation number. Or a ``.jsonl`` with ``image`` (relative to the file), and
            ``caption`` or ``text``, and optionally ``id``, in each line.
        limit: Take the first so many.

    Returns:
        The samples and what identifies them.

    Raises:
        DataError: Rows cannot be used; the message names them.
        MissingFileError: There is nothing of the kind at `path`.
    """
    if path.is_dir():
        name, rows = _coco(path)
    elif path.is_file():
        name, rows = path.name, _json_lines(path)
    else:
        raise MissingFileError(
            f"There is no data at {path}. Needed is a COCO folder (annotations/captions_val2017"
            ".json beside val2017/) or a .jsonl file with image and caption in each line."
        )
    samples: list[Sample] = []
    complaints: list[str] = []
    for row in rows:
        if isinstance(row, Sample):
            samples.append(row)
        else:
            complaints.append(row)
        if limit is not None and len(samples) >= limit:
            break
    digest = _check(samples, complaints)
    if complaints:
        more = f"\n  and {len(complaints) - _SHOWN} more" if len(complaints) > _SHOWN else ""
        raise DataError(
            f"{len(complaints)} rows of {path.name} cannot be used. Mend or remove them:\n  "
            + "\n  ".join(complaints[:_SHOWN])
            + more
        )
    if not samples:
        raise DataError(f"{path} has no samples. Needed is at least one picture with a caption.")
    return samples, DataCard(name, len(samples), digest)


def open_picture(path: Path) -> Image.Image:
    """A picture as RGB, upright as its EXIF data says, as the host's Load Image node shows it.

    Raises:
        ImageError: It is damaged or no picture.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(
            f"{path} cannot be read as a picture ({error}). Replace the file, or remove its row "
            "from the data and use a new folder of results."
        ) from error


def to_tensor(picture: Image.Image) -> Tensor:
    """``[1, H, W, 3]`` in 0..1, as the host passes pictures around."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).unsqueeze(0)


def _coco(folder: Path) -> tuple[str, Iterable[Sample | str]]:
    files = sorted((folder / "annotations").glob("captions_*.json"))
    wanted = [file for file in files if file.stem == "captions_val2017"] or files
    if len(wanted) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise MissingFileError(
            f"{folder} has these annotations/captions_*.json: {found}. Needed is one, best "
            "captions_val2017.json, from https://cocodataset.org (2017 Train/Val annotations)."
        )
    name = wanted[0].stem.removeprefix("captions_")
    try:
        content = json.loads(wanted[0].read_text(encoding="utf-8"))
        captions: dict[int, tuple[int, str]] = {}
        for row in content["annotations"]:
            entry = (int(row["id"]), str(row["caption"]).strip())
            image_id = int(row["image_id"])
            captions[image_id] = min(captions.get(image_id, entry), entry)
        images = sorted((int(row["id"]), str(row["file_name"])) for row in content["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{wanted[0]} is not in COCO's format ({type(error).__name__}: {error}). Needed are "
            "`images` with id and file_name, and `annotations` with id, image_id and caption."
        ) from error
    return name, (
        _sample(
            {"id": Path(file).stem, "image": file, "caption": captions.get(number, (0, ""))[1]},
            folder / name,
            f"{wanted[0].name} image {number}",
        )
        for number, file in images
    )


def _json_lines(path: Path) -> Iterable[Sample | str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                yield f"{place}: no JSON ({error})"
                continue
            if not isinstance(row, dict):
                yield f"{place}: {type(row).__name__} instead of an object with image and caption"
                continue
            yield _sample({"id": f"{number:08}", **row}, path.parent, place)


def _sample(row: dict[str, Any], folder: Path, place: str) -> Sample | str:
    """The sample, or what is wrong with the row."""
    image, caption = row.get("image"), row.get("caption", row.get("text"))
    if not isinstance(image, str) or not image:
        return f"{place}: no file name under 'image' (keys: {', '.join(sorted(row))})"
    if not isinstance(caption, str) or not caption.strip():
        return f"{place}: no words under 'caption' or 'text', which CLIP-T needs"
    name = str(row["id"])
    if not _NAME.fullmatch(name):
        return f"{place}: id {name!r} cannot be a file name; use letters, digits, '.', '_' and '-'"
    return Sample(name, folder / image, caption.strip(), place)


def _check(samples: Sequence[Sample], complaints: list[str]) -> str:
    """Add what is wrong with the samples' files and ids to the complaints; return their digest."""
    content = hashlib.sha256()
    first: dict[str, str] = {}
    for sample in samples:
        # Compared without case: two ids must not mean one file on a Windows or macOS disk.
        other = first.setdefault(sample.id.lower(), sample.place)
        if other != sample.place:
            complaints.append(f"{sample.place}: id {sample.id!r} is also that of {other}")
        try:
            data = sample.image.read_bytes()
            Image.open(io.BytesIO(data)).verify()
        except FileNotFoundError:
            complaints.append(f"{sample.place}: there is no file {sample.image}")
            continue
        except (OSError, ValueError, SyntaxError) as error:
            reason = str(error).split(" <")[0]
            complaints.append(f"{sample.place}: {sample.image} is no picture ({reason})")
            continue
        parts = (sample.id, sample.caption, hashlib.sha256(data).hexdigest())
        content.update(json.dumps(parts).encode())
    return content.hexdigest()
