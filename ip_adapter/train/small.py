"""A small training on pictures in memory, as the node runs it: from a batch to a file.

The pictures are written as PNG into a working folder, and from there on it is the command line's
training: the same checks, cache, steps and format. What was trained is kept however it ends.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .. import images
from ..errors import ImageError
from ..host.standalone import Models
from ..objective import Decoupled
from . import session, watch
from .data import Progress, Row
from .loop import Step
from .pieces import Piece
from .recipe import Recipe

WATCHED = 16
"""Rows, at most, on which a trained adapter is asked whether it uses its reference."""


@dataclass(frozen=True)
class Trained:
    """What a small training came to.

    Attributes:
        losses: Of every step.
        words: What the reference is worth to the adapter, in words; empty for a single row.
    """

    losses: tuple[float, ...]
    words: str


def pairs(pictures: Tensor, captions: str, references: Tensor | None) -> list[str]:
    """Check that pictures, captions and references go together.

    Args:
        pictures: ``[B, H, W, C]``.
        captions: One per line, or one for all pictures; may be empty.
        references: ``[B, H, W, C]``, one per picture, or one for all; None for the pictures.

    Returns:
        B captions.

    Raises:
        ImageError: The numbers differ, or see `images.check`.
    """
    images.check(pictures)
    lines = [line.strip() for line in captions.strip().splitlines()] or [""]
    if len(lines) not in (1, len(pictures)):
        raise ImageError(
            f"There are {len(pictures)} pictures and {len(lines)} lines of captions. Write one "
            "line for each picture in their order, or one line for all of them."
        )
    if references is not None:
        images.check(references)
        if len(references) not in (1, len(pictures)):
            raise ImageError(
                f"There are {len(pictures)} pictures and {len(references)} references. Connect one "
                "reference for each picture in their order, one for all, or none."
            )
    return lines if len(lines) == len(pictures) else lines * len(pictures)


def train(
    recipe: Recipe,
    models: Models,
    pictures: Tensor,
    captions: str,
    references: Tensor | None,
    target: Path,
    work: Path,
    *,
    size: int | None = None,
    cpu: bool = False,
    progress: Progress | None = None,
    on_step: Callable[[Step], None] | None = None,
    before_copy: Callable[[], object] | None = None,
    on_ready: Callable[[session.Session], object] | None = None,
) -> Trained:
    """Train on a batch of pictures, and write the adapter.

    Args:
        recipe: What to do.
        models: Of the host.
        pictures: ``[B, H, W, C]`` in 0..1.
        captions: See `pairs`.
        references: See `pairs`.
        target: The file to write. It is also written when `on_step` raises.
        work: A folder for pictures and features, which later runs use again.
        size: See `session.prepare`.
        cpu: See `loop.train`.
        progress: See `session.prepare`.
        on_step: Called after each step; what it raises ends the training.
        before_copy: See `session.prepare`.
        on_ready: Called before the first step.

    Raises:
        IPAdapterError: See `pairs`, `session.prepare` and `loop.train`.
    """
    texts = pairs(pictures, captions, references)
    rows = _rows(work / "pictures", pictures, texts, references)
    ready = session.prepare(
        recipe,
        models,
        rows,
        work / "cache",
        size=size,
        progress=progress,
        before_copy=before_copy,
    )
    if on_ready is not None:
        on_ready(ready)
    losses: list[float] = []

    def note(step: Step) -> None:
        losses.append(step.loss)
        if on_step is not None:
            on_step(step)

    out = Path(tempfile.mkdtemp(dir=work, prefix="run-"))
    try:
        ready.train(out, on_step=note, is_quiet=True, cpu=cpu)
    finally:
        found = sorted(out.glob("*.safetensors"))
        if found:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(found[-1], target)
        shutil.rmtree(out, ignore_errors=True)
    return Trained(tuple(losses), _words(ready))


def _words(ready: session.Session) -> str:
    count = min(WATCHED, len(ready.rows))
    if count < 2:
        return ""
    rows = ready.ready(ready.cache.read(range(count)))
    held = watch.hold_out(rows, schedule=ready.base.schedule.steps, seed=ready.recipe.seed)
    sizes = watch.BranchSizes()
    found = watch.validate(
        Decoupled(ready.adapter), ready.base, held, ready.nothing, batch_size=1, sizes=sizes
    )
    return f"On the pictures themselves, {found.in_words()}\n{watch.in_words(sizes.ratios())}"


def _rows(
    folder: Path, pictures: Tensor, texts: Sequence[str], references: Tensor | None
) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    last = 0 if references is None else len(references) - 1
    return [
        Row(
            f"picture {i + 1}",
            _write(folder, picture),
            text,
            None if references is None else _write(folder, references[min(i, last)]),
        )
        for i, (picture, text) in enumerate(zip(pictures, texts, strict=True))
    ]


def _write(folder: Path, picture: Tensor) -> Piece:
    """Write ``[H, W, C]`` under a name that its content gives, unless it is there."""
    values = picture.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    content = io.BytesIO()
    shape = values.squeeze(-1) if values.shape[-1] == 1 else values
    Image.fromarray(shape.numpy()).save(content, "PNG")
    path = folder / f"{hashlib.sha256(content.getvalue()).hexdigest()[:32]}.png"
    if not path.is_file():
        path.write_bytes(content.getvalue())
    return Piece(path)
