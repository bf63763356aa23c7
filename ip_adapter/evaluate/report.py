"""From scores to results: a table with standard errors, the protocol below it, and a picture grid.

The paper's row stands in the table only where the protocol equals the paper's; otherwise the page
says in what it differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import files
from . import metrics
from .data import Sample, open_picture
from .evaluation import Score, picture_name
from .metrics import Summary
from .protocol import Condition, Protocol, rows, seed_of

PAPER_ROW = {"clip_t": 0.588, "clip_i": 0.828}
"""IP-Adapter in the table of arXiv 2308.06721."""

PAPER_PROTOCOL: Mapping[str, tuple[Any, ...]] = {
    "data.name": ("val2017",),
    "data.samples": (5000,),
    "sampling.pictures": (4,),
    "sampling.width": (512,),
    "sampling.height": (512,),
    "sampling.steps": (50,),
    "sampling.sampler": ("ddim",),
    "sampling.scheduler": ("ddim_uniform",),
    "sampling.guidance": (7.5,),
    "sampling.weight": (1.0,),
    "sampling.prompt": ("off",),
    "scoring.clip.name": ("ViT-L-14", "ViT-L-14-quickgelu"),
    "scoring.clip.activation": ("quick gelu",),
    "scoring.caption_prefix": ("",),
    "scoring.clip_score_weight": (2.5,),
}
"""What the paper says of its evaluation, and our reading where it says nothing."""

_CELL, _GAP, _HEAD = 192, 6, 26
_GRID_ROWS = 8


@dataclass(frozen=True)
class Figures:
    """One row of the table.

    Attributes:
        clip_i: See `metrics.clip_i`.
        clip_t: CLIPScore, as in the paper.
        clip_t_cosine: The plain cosine under it.
        dino_i: Or None.
    """

    clip_i: Summary
    clip_t: Summary
    clip_t_cosine: Summary
    dino_i: Summary | None


@dataclass(frozen=True)
class Results:
    """All that a report says.

    Attributes:
        protocol: Every choice by name.
        environment: Versions and device: recorded, not compared.
        rows: The figures of each condition.
        gains: Of the adapter over each other condition, paired by sample.
        paper: The paper's row where the protocol equals it, else None.
        deviations: In what the protocol differs from the paper's.
        seconds_per_picture: Mean of those generated; None if none was timed.
    """

    protocol: dict[str, Any]
    environment: dict[str, str]
    rows: dict[Condition, Figures]
    gains: dict[Condition, Figures]
    paper: dict[str, float] | None
    deviations: list[str]
    seconds_per_picture: float | None


def summarise(
    protocol: Protocol, scores: Sequence[Score], environment: Mapping[str, str] | None = None
) -> Results:
    """Make results of the scores that `evaluation.evaluate` returns."""
    weight = protocol.scoring.clip_score_weight
    columns = {c: _columns(scores, c, protocol) for c in protocol.conditions}
    gains: dict[Condition, Figures] = {}
    if "adapter" in columns:
        own = columns["adapter"]
        gains = {
            condition: _figures(own, weight, columns[condition])
            for condition in protocol.conditions
            if condition != "adapter"
        }
    timed = [score.seconds for score in scores if score.seconds is not None]
    away = deviations(protocol)
    return Results(
        protocol=protocol.flat(),
        environment=dict(environment or {}),
        rows={condition: _figures(column, weight) for condition, column in columns.items()},
        gains=gains,
        paper=None if away else dict(PAPER_ROW),
        deviations=away,
        seconds_per_picture=sum(timed) / len(timed) if timed else None,
    )


def deviations(protocol: Protocol) -> list[str]:
    """In what a protocol differs from the paper's: ``sampling.steps is 20, the paper's 50``."""
    flat = protocol.flat()
    return [
        f"{name} is {flat[name]!r}, the paper's {' or '.join(repr(value) for value in allowed)}"
        for name, allowed in PAPER_PROTOCOL.items()
        if flat[name] not in allowed
    ]


def write(
    folder: Path, results: Results, protocol: Protocol, samples: Sequence[Sample]
) -> list[Path]:
    """Write ``results.json``, ``results.md`` and ``grid.png`` into the folder of results."""
    paths = [folder / name for name in ("results.json", "results.md", "grid.png")]
    content = json.dumps(asdict(results), indent=2, ensure_ascii=False) + "\n"
    files.write(paths[0], content.encode())
    files.write(paths[1], markdown(results).encode())
    stream = BytesIO()
    grid(folder, protocol, samples).save(stream, format="PNG")
    files.write(paths[2], stream.getvalue())
    return paths


def markdown(results: Results) -> str:
    """The page: table, gains, what differs from the paper, protocol, environment."""
    has_dino = any(figures.dino_i for figures in results.rows.values())
    heads = ["row", "CLIP-T", "CLIP-I", "cosine under CLIP-T", *(["DINO-I"] if has_dino else [])]
    table = [_cells([f"**{c}**", *_row(f, has_dino)]) for c, f in results.rows.items()]
    if results.paper:
        paper = [f"{results.paper['clip_t']:.3f}", f"{results.paper['clip_i']:.3f}"]
        table.append(_cells(["the paper", *paper, "", *([""] if has_dino else [])]))
    table += [_cells([f"adapter minus {c}", *_row(f, has_dino)]) for c, f in results.gains.items()]
    first = next(iter(results.rows.values())).clip_i
    lines = [
        "# Evaluation",
        "",
        f"{first.samples} samples, {first.pictures} pictures in each row. Means with standard "
        "errors over samples; differences are paired by sample.",
        "",
        _cells(heads),
        _cells(["---"] * len(heads)),
        *table,
        "",
    ]
    if results.deviations:
        lines += ["The paper's row is left out, because the protocol is another one:", ""]
        lines += [f"- {away}" for away in results.deviations] + [""]
    if results.seconds_per_picture is not None:
        lines += [f"{results.seconds_per_picture:.3g} seconds for a picture.", ""]
    for title, entries in (("Protocol", results.protocol), ("Environment", results.environment)):
        if entries:
            lines += [f"## {title}", "", _cells(["choice", "value"]), _cells(["---", "---"])]
            lines += [_cells([f"`{name}`", f"`{value!r}`"]) for name, value in entries.items()]
            lines.append("")
    return "\n".join(lines)


def grid(folder: Path, protocol: Protocol, samples: Sequence[Sample]) -> Image.Image:
    """Some samples, evenly spread: the picture, and the first pictures of each condition.

    Two pictures of the adapter, one of every other condition; before the shuffled one stands the
    reference it was given.
    """
    step = max(1, len(samples) // _GRID_ROWS)
    numbers = range(0, min(len(samples), step * _GRID_ROWS), step)
    columns: list[tuple[str, list[Image.Image]]] = [
        ("reference", [open_picture(samples[i].image) for i in numbers])
    ]
    for condition in protocol.conditions:
        if condition == "shuffled":
            given = rows(protocol, samples, condition)
            shown = [open_picture(given[i].reference or samples[i].image) for i in numbers]
            columns.append(("another's reference", shown))
        count = min(2, protocol.sampling.pictures) if condition == "adapter" else 1
        for k in range(count):
            names = [_name(protocol, condition, samples[i].id, k) for i in numbers]
            made = [open_picture(folder / name) for name in names]
            columns.append((f"{condition}, {k + 1}" if count > 1 else condition, made))
    pitch = _CELL + _GAP
    size = (pitch * len(columns) + _GAP, pitch * len(numbers) + _GAP + _HEAD)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, (title, pictures) in enumerate(columns):
        left = _GAP + x * pitch
        draw.text((left, _GAP), title, fill="black", font=ImageFont.load_default(15))
        for y, picture in enumerate(pictures):
            sheet.paste(_fit(picture), (left, _HEAD + _GAP + y * pitch))
    return sheet


def _columns(
    scores: Sequence[Score], condition: Condition, protocol: Protocol
) -> dict[str, Tensor]:
    """The figures of a condition as ``[S, K]`` tensors, samples in the order of the scores."""
    chosen = [score for score in scores if score.condition == condition]
    count = protocol.sampling.pictures

    def tensor(name: str) -> Tensor:
        values = [getattr(score, name) for score in chosen]
        return torch.tensor(values, dtype=torch.float64).reshape(-1, count)  # [S, K]

    names = ["clip_i", "clip_t"] + (["dino_i"] if protocol.scoring.dino else [])
    return {name: tensor(name) for name in names}


def _figures(
    one: Mapping[str, Tensor], weight: float, other: Mapping[str, Tensor] | None = None
) -> Figures:
    """Summaries of one condition, or of its differences to another."""

    def figure(scores: Tensor, others: Tensor | None) -> Summary:
        return metrics.summarise(scores) if others is None else metrics.difference(scores, others)

    both = {name: (one[name], other[name] if other else None) for name in one}
    mine, theirs = both["clip_t"]
    score = metrics.clip_score(mine, weight)
    score_of_other = None if theirs is None else metrics.clip_score(theirs, weight)
    return Figures(
        clip_i=figure(*both["clip_i"]),
        clip_t=figure(score, score_of_other),
        clip_t_cosine=figure(mine, theirs),
        dino_i=figure(*both["dino_i"]) if "dino_i" in both else None,
    )


def _name(protocol: Protocol, condition: Condition, sample: str, k: int) -> str:
    return picture_name(condition, sample, k, seed_of(protocol.sampling.seed, sample, k))


def _row(figures: Figures, has_dino: bool) -> list[str]:
    shown = [figures.clip_t, figures.clip_i, figures.clip_t_cosine]
    if has_dino and figures.dino_i:
        shown.append(figures.dino_i)
    return [_number(summary) for summary in shown]


def _number(summary: Summary) -> str:
    if summary.standard_error is None:
        return f"{summary.mean:.3f}"
    return f"{summary.mean:.3f} ± {summary.standard_error:.3f}"


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _fit(picture: Image.Image) -> Image.Image:
    """The whole picture in a square cell; pixels of small pictures stay visible."""
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    sampling = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    cell = Image.new("RGB", (_CELL, _CELL), "lightgrey")
    cell.paste(picture.resize(size, sampling), ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    return cell
