"""What the demo shows: columns of pictures, and the figures that a formula reads off them.

Nothing is chosen by its outcome: scenes come from the first seeds, the noise is the same for all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from miniature import reader, world
from scripts import miniature_graphs as graphs
from scripts.client import Json

ROWS = 4
MASK = "miniature_mask.png"
SHAPE, PLACE = "ring", "top"
"""What the text says; no reference is that."""

Figure = Callable[[Sequence[reader.Reading]], str]


@dataclass(frozen=True)
class Claim:
    """A column of the sheet.

    Attributes:
        heading: What was done.
        note: How, in short.
        prompt: For the host; it makes a picture for each row.
        figures: What to read off the pictures.
    """

    heading: str
    note: str
    prompt: Json
    figures: Sequence[Figure]


def scenes(seed: int, beside: Sequence[world.Scene] = ()) -> list[world.Scene]:
    """The first held-out scenes of a seed, one a row, that share no named attribute.

    Args:
        seed: Decides which.
        beside: Scenes of the same rows, with which they share none either.
    """
    rng, found = random.Random(seed), list[world.Scene]()
    while len(found) < ROWS:
        drawn = world.draw(rng, held_out=True)
        others = [*found, *beside[len(found) : len(found) + 1]]
        if not any(any(world.same(drawn, other).values()) for other in others):
            found.append(drawn)
    return found


REFERENCES = scenes(0)
HINTS = scenes(1, REFERENCES)
"""Scenes whose silhouettes the ControlNet reads."""


PAIRS = [
    (one, replace(other, ground=one.ground))
    for one, other in zip(REFERENCES[:2], REFERENCES[2:], strict=True)
]
"""Two references of one picture: on one ground, since a picture of the world has but one."""

_PAIR_HINTS = list(zip(HINTS[:2], HINTS[2:], strict=True))


def names(kind: str) -> list[str]:
    """Files that the graphs load, one a row: ``reference``, ``hint``, ``other``, ``pair_hint``.

    The others are the second references of `PAIRS`, whose first are the first of the references.
    """
    rows = len(PAIRS) if kind in ("other", "pair_hint") else ROWS
    return [f"miniature_{kind}_{row}.png" for row in range(1, rows + 1)]


def write_inputs(folder: Path) -> None:
    """Draw what the graphs load into the host's input folder; it is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Sequence[Tensor]] = {
        "reference": list(world.render(REFERENCES)),
        "hint": list(world.outlines(HINTS)),
        "other": list(world.render([other for _, other in PAIRS])),
        "pair_hint": [torch.cat(list(world.outlines(pair)), dim=-1) for pair in _PAIR_HINTS],
    }
    for kind, pictures in drawn.items():
        for name, pixels in zip(names(kind), pictures, strict=True):
            world.pil(pixels[None])[0].save(folder / name)
    world.pil(_mask()[None])[0].save(folder / MASK)


def _mask() -> Tensor:
    """White in the left half of a wide picture."""
    width, height = graphs.WIDE
    pixels = torch.zeros(3, height, width)
    pixels[:, :, : width // 2] = 1
    return pixels


def single() -> dict[str, Claim]:
    """What is shown with each reference by itself."""
    references = names("reference")
    said = [replace(scene, shape=SHAPE, place=PLACE) for scene in REFERENCES]
    make = graphs.with_images
    look = _agreeing("look", REFERENCES, world.LOOK)
    return {
        "none": Claim("weight 0", "the base alone", make(references, weight=0.0), (look, _marks)),
        "half": Claim("weight 0.5", "", make(references, weight=0.5), (look, _marks)),
        "full": Claim("weight 1", "global adapter", make(references), (look, _marks)),
        "plus": Claim(
            "weight 1", "plus adapter", make(references, adapter=graphs.PLUS), (look, _marks)
        ),
        "text": Claim(
            "with a text",
            f"“{SHAPE} {PLACE}”",
            make(references, text=f"{SHAPE} {PLACE}"),
            (look, _agreeing("text", said, ("shape", "place"))),
        ),
        "control": Claim(
            "ControlNet",
            "of the hint",
            make(references, hints=names("hint")),
            (look, _agreeing("hint", HINTS, ("shape", "place"))),
        ),
        "custom": Claim(
            "custom model", "outlines shapes", make(references, fine_tuned=True), (look, _outlines)
        ),
    }


def double() -> Claim:
    """What is shown with two references, each in its mask."""
    first = names("reference")[: len(PAIRS)]
    prompt = graphs.in_masks(first, names("other"), MASK, names("pair_hint"))
    halves = [scene for pair in PAIRS for scene in pair]
    return Claim("picture", "both references", prompt, (_agreeing("look", halves, world.LOOK),))


def share(label: str, answers: Iterable[bool]) -> str:
    """``look 7 of 12``."""
    known = list(answers)
    return f"{label} {sum(known)} of {len(known)}"


def _agreeing(label: str, expected: Sequence[world.Scene], attributes: Sequence[str]) -> Figure:
    def figure(found: Sequence[reader.Reading]) -> str:
        rows = [reader.agreement(*pair) for pair in zip(found, expected, strict=True)]
        return share(label, (row[name] for row in rows for name in attributes))

    return figure


def _marks(found: Sequence[reader.Reading]) -> str:
    pairs = zip(found, REFERENCES, strict=True)
    right = [one == other for r, s in pairs for one, other in zip(r.marks, s.marks, strict=True)]
    return share("marks", right)


def _outlines(found: Sequence[reader.Reading]) -> str:
    return share("outline", (reading.outlined for reading in found))
