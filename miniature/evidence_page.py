"""docs/evidence.md and its pictures, from the figures that `miniature.evidence` measured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ip_adapter import files

from . import adapters, family, measures, studio, world
from .evidence_words import CLOSING, OPENING, WORDS
from .measures import Figure, Lab, Table

if TYPE_CHECKING:
    from .evidence import Section

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "evidence.md"
FIGURES = DOCS / "evidence.json"

_ROWS, _ZOOM, _GAP, _HEAD = 5, 2, 6, 34


def keep(sections: Sequence[Section], environment: dict[str, Any]) -> None:
    """Write the figures and the pictures."""
    for section in sections:
        sheet = grid(section.columns)
        stream = BytesIO()
        sheet.save(stream, format="PNG", optimize=True)
        files.write(picture(section.key), stream.getvalue())
    found = {
        "environment": environment,
        "sections": [
            {
                "key": section.key,
                "tables": [asdict(table) for table in section.tables],
                "notes": section.notes,
            }
            for section in sections
        ],
    }
    text = json.dumps(_rounded(found), indent=1)
    files.write(FIGURES, (text + "\n").encode())


def write() -> None:
    """Write the page from the kept figures."""
    files.write(PAGE, page(json.loads(FIGURES.read_text(encoding="utf-8"))).encode())


def page(found: dict[str, Any]) -> str:
    """The page's text."""
    about = found["environment"]
    parts = [OPENING.format(**about)]
    for section in found["sections"]:
        title, before, after = WORDS[section["key"]]
        parts.append(f"## {title}\n\n{before}")
        parts.append(f"![{title}](images/{picture(section['key']).name})")
        for table in section["tables"]:
            parts.append(f"**{table['title']}**\n\n" + "\n".join(_lines(read(table))))
        parts += [textwrap.fill(note, 100) for note in section["notes"]]
        if after:
            parts.append(after)
    parts.append(CLOSING.format(**about))
    made = [f"| {name} | `{digest[:16]}` |" for name, digest in about["files"].items()]
    parts.append("\n".join(["| file | SHA-256 begins |", "|---|---|", *made]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def read(table: dict[str, Any]) -> Table:
    """A table as it was kept."""
    return Table(
        table["title"],
        tuple(table["columns"]),
        {
            name: tuple(None if figure is None else Figure(**figure) for figure in row)
            for name, row in table["rows"].items()
        },
    )


def picture(key: str) -> Path:
    """Where a section's pictures are."""
    return DOCS / "images" / f"evidence_{key}.png"


def environment(lab: Lab, seconds: float) -> dict[str, Any]:
    """What the figures were measured with and on."""
    import comfyui_version
    import open_clip

    return {
        "count": lab.count,
        "seed": measures.SEED,
        "noise": measures.NOISE,
        "steps": studio.STEPS,
        "guidance": studio.GUIDANCE,
        "sampler": f"{studio.SAMPLER}, {studio.SCHEDULER}",
        "budget": f"{adapters.STEPS} steps of {adapters.FIELDS['batch_size']}",
        "pairs": adapters.PAIRS,
        "minutes": f"{seconds / 60:.0f}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread used",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": comfyui_version.__version__,
        "open_clip": open_clip.__version__,
        "scorer": lab.clip.card.sha256[:16],
        "files": digests(),
    }


def digests() -> dict[str, str]:
    """SHA-256 of the weights that were measured, by their place in the miniature's folder."""
    home = family.MODELS.parent
    weights = [*family.MODELS.rglob("*.safetensors"), *family.ABLATION.glob("*.safetensors")]
    return {
        path.relative_to(home).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(weights)
    }


def grid(columns: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """The first rows of several conditions side by side, twice their size, with captions."""
    side = world.SIZE * _ZOOM
    step = side + _GAP
    rows = min(_ROWS, *(len(pictures) for _, pictures in columns))
    size = (len(columns) * step + _GAP, _HEAD + rows * step)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (name, pictures) in enumerate(columns):
        left = _GAP + column * step
        lines = textwrap.wrap(name, 19)
        for number, line in enumerate(lines[:2]):
            top = _HEAD - 16 * (min(len(lines), 2) - number) - 1
            pen.text((left + side / 2, top), line, fill="black", font=font, anchor="ma")
        for row, one in enumerate(world.pil(pictures[:rows])):
            large = one.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (left, _HEAD + row * step))
    return sheet


def _lines(table: Table) -> list[str]:
    """A table in Markdown."""
    lines = [
        "| | " + " | ".join(table.columns) + " | n |",
        "|---|" + "---|" * (len(table.columns) + 1),
    ]
    for name, row in table.rows.items():
        cells = ["" if figure is None else _cell(figure) for figure in row]
        lines.append(f"| {name} | " + " | ".join([*cells, _counts(table.columns, row)]) + " |")
    return lines


def _counts(columns: Sequence[str], row: Sequence[Figure | None]) -> str:
    """Pictures under a row, and under those figures in it that have fewer."""
    counts = {c: f.n for c, f in zip(columns, row, strict=True) if f is not None and f.n}
    most = max(counts.values(), default=0)
    fewer = [f"{column} {count}" for column, count in counts.items() if count < most]
    return f"{most or ''}" + (f" ({', '.join(fewer)})" if fewer else "")


def _cell(figure: Figure) -> str:
    if figure.bounds == "exact":
        return _number(figure.value, 2)
    digits = 3 if figure.bounds == "standard error" else 2
    low, high = _number(figure.low, digits), _number(figure.high, digits)
    return f"{_number(figure.value, digits)} ({low}..{high})"


def _number(value: float, digits: int) -> str:
    return f"{value:.2g}" if 0 < abs(value) < 0.05 else f"{value:.{digits}f}"


def _rounded(value: Any) -> Any:
    """Figures to four digits after the point or four in all: more are noise."""
    if isinstance(value, float):
        return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.3e}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value
