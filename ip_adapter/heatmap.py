"""Draw attention maps: cells with headings in rows, a scale of colours below.

What is in the maps is `maps`' affair, how words get on a picture is `drawing`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from . import drawing, maps
from .errors import ImageError
from .maps import Maps

View = Literal["by reference", "by layer group", "over steps"]
"""What is beside one another."""

Scale = Literal["same for all", "each its own"]
"""What the lightest colour stands for: the highest value of all maps, or of each map."""

_TITLES: dict[View, tuple[str, str]] = {
    "by reference": ("Where each reference acts", "Mean over all layers and steps."),
    "by layer group": (
        "Where each reference acts, by layer group",
        "Mean over all steps. Down, middle and up are the parts of the network in their order; "
        "the number is the height of their token grid.",
    ),
    "over steps": ("Where each reference acts, over the steps", "Mean over all layers."),
}
_CAPTION = (
    "What the reference adds at a place, against what the text says there: 0 is nothing, 1 is as "
    "much as the text."
)
_COLUMNS: dict[View, int] = {"by reference": 4, "by layer group": 6, "over steps": 6}
"""Cells beside one another, at most."""

_LARGEST, _WIDEST = 384, 1380
"""Long side of a cell in pixels at most, and of all cells of a row together."""

_MARGIN, _GAP, _BAR = 32, 22, 20
_TITLE, _HEAD, _TEXT = 32, 23, 19


@dataclass(frozen=True, eq=False)
class Cell:
    """One map ``[h, w]`` with its heading; the picture itself where it has none."""

    heading: str
    values: Tensor | None


@dataclass(frozen=True, eq=False)
class Row:
    """Cells beside one another, below a line that says what they are, if there is one."""

    title: str
    cells: Sequence[Cell]


def choose(shown: Maps, reference: int) -> list[int]:
    """The references to show, counted from 0.

    Args:
        shown: All there are.
        reference: Which one, counted from 1; 0 is all.

    Raises:
        ImageError: There are not so many.
    """
    count = len(shown.references)
    if reference > count:
        are, choices = (
            ("is 1 reference", "1") if count == 1 else (f"are {count} references", f"1 to {count}")
        )
        raise ImageError(
            f"reference is {reference}, but in these maps there {are} "
            f"({', '.join(shown.references)}). Set it to {choices}, or to 0 for all."
        )
    return list(range(count)) if reference == 0 else [reference - 1]


def draw(
    shown: Maps,
    view: View,
    *,
    scale: Scale = "same for all",
    reference: int = 0,
    picture: Tensor | None = None,
) -> Tensor:
    """Draw the maps of one sampling.

    Args:
        shown: What was recorded.
        view: What is beside one another.
        scale: What the lightest colour stands for.
        reference: See `choose`.
        picture: ``[H, W, C]`` in 0..1, to lay the colours over; it has the shape of the latent.

    Returns:
        ``[1, H, W, 3]`` in 0..1.

    Raises:
        ImageError: See `choose`.
    """
    rows = _rows(shown, view, choose(shown, reference), has_picture=picture is not None)
    title, note = _TITLES[view]
    if shown.picture:
        note += f" Picture {shown.picture} of the batch, counted from 0."
    columns = max(len(row.cells) for row in rows)
    long = min(_LARGEST, _WIDEST // columns)
    height, width = (round(long * side / max(shown.latent)) for side in shown.latent)
    values = [c.values for row in rows for c in row.cells if c.values is not None]
    most = max(float(one.max()) for one in values) if scale == "same for all" else None

    inside = max(columns * (width + _GAP) - _GAP, 2 * _LARGEST)
    notes = drawing.wrap(note, _TEXT, inside)
    caption = drawing.wrap(_CAPTION, _TEXT, inside)
    head, line = drawing.line_height(_HEAD), drawing.line_height(_TEXT)
    tall = 2 * line + height + _GAP  # of a row without its title
    top = _MARGIN + drawing.line_height(_TITLE) + line * len(notes) + _GAP
    below = top + sum(tall + head * bool(row.title) for row in rows) + _GAP
    bottom = _BAR + 8 + line * (1 + len(caption))
    sheet, pen = drawing.canvas(inside + 2 * _MARGIN, below + bottom + _MARGIN)
    y = _MARGIN + drawing.label(pen, (_MARGIN, _MARGIN - 6), title, size=_TITLE)
    drawing.label(pen, (_MARGIN, y), notes, size=_TEXT, fill=drawing.GREY)
    y = top
    for row in rows:
        if row.title:
            y += drawing.label(pen, (_MARGIN, y), row.title, size=_HEAD, width=inside)
        for column, cell in enumerate(row.cells):
            x = _MARGIN + column * (width + _GAP)
            drawing.label(pen, (x, y), cell.heading, size=_TEXT, width=width)
            sheet.paste(_paint(cell.values, most, (height, width), picture), (x, y + line))
            place = (x, y + line + height + 3)
            drawing.label(pen, place, _figures(cell), size=_TEXT, fill=drawing.GREY, width=width)
        y += tall
    _draw_scale(sheet, pen, below, most)
    y = sheet.height - _MARGIN - line * len(caption)
    drawing.label(pen, (_MARGIN, y), caption, size=_TEXT, fill=drawing.GREY)
    return drawing.to_image(sheet)


def as_masks(
    shown: Maps, size: tuple[int, int], *, scale: Scale = "same for all", reference: int = 0
) -> Tensor:
    """The map of each reference, mean over all layers and steps, as masks.

    Args:
        shown: What was recorded.
        size: Height and width of the masks in pixels.
        scale: What becomes 1.
        reference: See `choose`.

    Returns:
        ``[R, H, W]`` in 0..1; 0 everywhere where a reference did nothing.

    Raises:
        ImageError: See `choose`.
    """
    values = shown.by_reference()[choose(shown, reference)]
    most = values.amax(dim=(1, 2), keepdim=True)
    if scale == "same for all":
        most = most.amax(dim=0, keepdim=True)
    return maps.resize(values / most.clamp(min=maps.TINY), size).clamp(0, 1)


def _rows(shown: Maps, view: View, chosen: Sequence[int], *, has_picture: bool) -> list[Row]:
    titles = [
        f"{name}: {label}" for name, label in zip(shown.references, shown.labels, strict=True)
    ]
    whole = shown.by_reference()
    if view == "by reference":
        cells = [Cell("the picture", None)] if has_picture else []
        cells += [Cell(titles[r], whole[r]) for r in chosen]
        return _broken("", cells, _COLUMNS[view])
    if view == "by layer group":
        found, headings = shown.by_group(), [group.name for group in shown.groups]
    else:
        found = shown.over_steps()
        headings = [
            f"step {first}" if first == last else f"steps {first} to {last}"
            for first, last in shown.steps
        ]
    rows = []
    for r in chosen:
        cells = [Cell(heading, found[r, n]) for n, heading in enumerate(headings)]
        rows += _broken(titles[r], [Cell("all", whole[r]), *cells], _COLUMNS[view])
    return rows


def _broken(title: str, cells: Sequence[Cell], most: int) -> list[Row]:
    """Cells in rows of nearly equal length; the title is the first one's."""
    count = -(-len(cells) // most)
    length = -(-len(cells) // count)
    return [
        Row("" if first else title, cells[first : first + length])
        for first in range(0, len(cells), length)
    ]


def _paint(
    values: Tensor | None, most: float | None, size: tuple[int, int], picture: Tensor | None
) -> Image.Image:
    """A map's colours, over the picture if there is one; the picture alone without a map."""
    under = None
    if picture is not None:
        pixels = picture[..., :3].float().cpu().movedim(-1, 0)[None]
        under = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0].movedim(0, -1)
        under = under.expand(*size, 3)
    if values is None:
        painted = torch.zeros(*size, 3) if under is None else under
    else:
        highest = float(values.max()) if most is None else most
        shares = maps.resize(values / max(highest, maps.TINY), size)
        painted = maps.colour(shares) if under is None else maps.overlay(shares, under)
    return drawing.from_image(painted[None])[0]


def _figures(cell: Cell) -> str:
    if cell.values is None:
        return ""
    return f"mean {float(cell.values.mean()):.2f}, max {float(cell.values.max()):.2f}"


def _draw_scale(sheet: Image.Image, pen: ImageDraw.ImageDraw, top: int, most: float | None) -> None:
    """The colours from nothing to the most, with numbers below."""
    width = sheet.width - 2 * _MARGIN
    ramp = maps.colour(torch.linspace(0, 1, width).expand(_BAR, -1))
    sheet.paste(drawing.from_image(ramp[None])[0], (_MARGIN, top))
    ends: tuple[drawing.Anchor, ...] = ("left", "centre", "centre", "centre", "right")
    for number, anchor in enumerate(ends):
        share = number / (len(ends) - 1)
        if most is not None:
            said = f"{share * most:.2f}"
        elif number in (0, len(ends) - 1):
            said = "max of the map" if number else "0"
        else:
            continue
        place = (_MARGIN + share * width, top + _BAR + 6)
        drawing.label(pen, place, said, size=_TEXT, fill=drawing.GREY, anchor=anchor)
