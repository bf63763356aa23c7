"""Set small pictures in titled columns on one sheet, each pixel large enough to be seen."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SCALE = 3
"""A picture's pixel is so many of the sheet's."""

MARGIN, GAP, NUMBERS = 56, 26, 44
"""Around the sheet; between pictures; for the numbers of the rows. All in pixels of the sheet."""

PAPER, INK, GREY, RULE = "#f7f5f0", "#22252b", "#6d7178", "#d9d5cb"
TITLE, HEADING, SMALL, LINE = 50, 27, 23, 33
"""Sizes of letters, and the height of a line. Where the sheet is shown smaller, so are they."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Column:
    """Pictures below one another that came about in the same way.

    Attributes:
        heading: First line above them.
        note: Second, fainter line above them.
        pictures: From top to bottom.
        figures: Fainter lines below them.
    """

    heading: str
    note: str
    pictures: Sequence[Image.Image]
    figures: Sequence[str] = ()

    @property
    def width(self) -> int:
        """In pixels of the sheet."""
        return SCALE * max(picture.width for picture in self.pictures)


@dataclass(frozen=True)
class Section:
    """A heading with columns beside one another; their rows have numbers if there are several."""

    heading: str
    columns: Sequence[Column]

    @property
    def width(self) -> int:
        """In pixels of the sheet."""
        return NUMBERS + sum(column.width + GAP for column in self.columns) - GAP

    @property
    def height(self) -> int:
        """In pixels of the sheet."""
        lines = max(len(column.figures) for column in self.columns)
        return 164 + sum(height + GAP for height in self.rows) + LINE * lines + 20

    @property
    def rows(self) -> list[int]:
        """Heights of the rows in pixels of the sheet."""
        rows = range(max(len(column.pictures) for column in self.columns))
        return [
            SCALE * max(c.pictures[row].height for c in self.columns if row < len(c.pictures))
            for row in rows
        ]


def draw_sheet(
    title: str, subtitle: str, sections: Sequence[Section], footnote: str
) -> Image.Image:
    """Lay out the sheet.

    Args:
        title: Large first line.
        subtitle: What the sheet shows, one line.
        sections: From top to bottom.
        footnote: Small text at the end, broken into lines.

    Returns:
        An RGB picture, as wide as its widest section.
    """
    width = 2 * MARGIN + max(section.width for section in sections)
    lines = textwrap.wrap(footnote, int((width - 2 * MARGIN) / (0.56 * SMALL)))
    top = MARGIN + 150
    height = top + sum(section.height for section in sections) + LINE * len(lines) + 24 + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), title, fill=INK, font=font(TITLE, bold=True))
    draw.text((MARGIN, MARGIN + 72), subtitle, fill=GREY, font=font(HEADING))
    for section in sections:
        _draw_section(sheet, section, top)
        top += section.height
    _rule(draw, top, width)
    for number, line in enumerate(lines):
        draw.text((MARGIN, top + 24 + LINE * number), line, fill=GREY, font=font(SMALL))
    return sheet


def font(size: int, *, bold: bool = False) -> Font:
    """DejaVu where the system has it, else the font that Pillow carries."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _draw_section(sheet: Image.Image, section: Section, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    _rule(draw, top, sheet.width)
    draw.text((MARGIN, top + 20), section.heading, fill=INK, font=font(HEADING + 3, bold=True))
    rows = section.rows
    x = MARGIN + NUMBERS
    for column in section.columns:
        _lines(draw, x, top + 84, column.width, (column.heading,), INK, HEADING)
        _lines(draw, x, top + 84 + LINE, column.width, (column.note,), GREY, SMALL)
        y = top + 164
        for height, picture in zip(rows, column.pictures, strict=False):
            _paste(sheet, picture, x, y)
            y += height + GAP
        y = top + 164 + sum(rows) + GAP * len(rows)
        _lines(draw, x, y - 12, column.width, column.figures, GREY, SMALL)
        x += column.width + GAP
    y = top + 164
    for number, height in enumerate(rows if len(rows) > 1 else (), start=1):
        draw.text((MARGIN, y + (height - HEADING) // 2), str(number), INK, font(HEADING))
        y += height + GAP


def _rule(draw: ImageDraw.ImageDraw, top: int, width: int) -> None:
    draw.line((MARGIN, top, width - MARGIN, top), fill=RULE, width=2)


def _lines(
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    width: int,
    lines: Sequence[str],
    fill: str,
    size: int,
) -> None:
    for number, line in enumerate(lines):
        fitting = _fit(draw, line, font(size), width + GAP // 2)
        draw.text((x, y + LINE * number), fitting, fill=fill, font=font(size))


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    size = (SCALE * picture.width, SCALE * picture.height)
    enlarged = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    corners = Image.new("L", (4 * size[0], 4 * size[1]))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 4 * size[0] - 1, 4 * size[1] - 1), 32, 255)
    sheet.paste(enlarged, (x, y), corners.resize(size, Image.Resampling.LANCZOS))


def _fit(draw: ImageDraw.ImageDraw, text: str, face: Font, width: int) -> str:
    if draw.textlength(text, font=face) <= width:
        return text
    while text and draw.textlength(f"{text}…", font=face) > width:
        text = text[:-1].rstrip()
    return f"{text}…"
