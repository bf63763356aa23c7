"""Set pictures and captions on one labelled sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, GAP = 1600, 64, 28
PAPER, INK, GREY, RULE = "#f7f5f0", "#22252b", "#6d7178", "#d9d5cb"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Cell:
    """One picture of the sheet.

    Attributes:
        image: The picture, any size and mode.
        label: First line below it.
        note: Second, fainter line.
    """

    image: Image.Image
    label: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with its rows of cells, so many to a row."""

    heading: str
    cells: Sequence[Cell]
    columns: int

    @property
    def side(self) -> int:
        """Width and height of a picture, in pixels."""
        return (WIDTH - 2 * MARGIN - (self.columns - 1) * GAP) // self.columns

    @property
    def height(self) -> int:
        """Height of heading and rows, in pixels."""
        rows = -(-len(self.cells) // self.columns)
        return 64 + rows * (self.side + 84)


def draw_sheet(
    title: str, subtitle: str, sections: Sequence[Section], footnote: str
) -> Image.Image:
    """Lay out the sheet.

    Args:
        title: Large first line.
        subtitle: What the sheet shows, one line.
        sections: From top to bottom; empty ones are left out.
        footnote: Small text at the end, one line.

    Returns:
        An RGB picture, 1600 pixels wide.
    """
    shown = [section for section in sections if section.cells]
    height = 190 + sum(section.height for section in shown) + 86
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 56), title, fill=INK, font=font(46, bold=True))
    draw.text((MARGIN, 122), subtitle, fill=GREY, font=font(21))
    top = 190
    for section in shown:
        _draw_section(sheet, section, top)
        top += section.height
    draw.line((MARGIN, top, WIDTH - MARGIN, top), fill=RULE, width=2)
    draw.text((MARGIN, top + 24), footnote, fill=GREY, font=font(18))
    return sheet


def font(size: int, *, bold: bool = False) -> Font:
    """DejaVu where the system has it, else the font that Pillow carries."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _draw_section(sheet: Image.Image, section: Section, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.line((MARGIN, top, WIDTH - MARGIN, top), fill=RULE, width=2)
    draw.text((MARGIN, top + 18), section.heading, fill=INK, font=font(22, bold=True))
    for index, cell in enumerate(section.cells):
        row, column = divmod(index, section.columns)
        x = MARGIN + column * (section.side + GAP)
        y = top + 64 + row * (section.side + 84)
        _paste(sheet, cell.image, x, y, section.side)
        below = y + section.side + 12
        for text, offset, fill, size in ((cell.label, 0, INK, 17), (cell.note, 25, GREY, 14)):
            line = _fit(draw, text, font(size), section.side)
            draw.text((x, below + offset), line, fill=fill, font=font(size))


def _paste(sheet: Image.Image, image: Image.Image, x: int, y: int, side: int) -> None:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Pixels of small pictures are shown as they are; a smooth enlargement would hide them.
    sampling = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    scaled = image.convert("RGBA").resize(size, sampling)
    frame = Image.new("RGB", (side, side), RULE)
    frame.paste(scaled, ((side - size[0]) // 2, (side - size[1]) // 2), scaled)
    corners = Image.new("L", (side * 4, side * 4))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, side * 4 - 1, side * 4 - 1), 48, fill=255)
    sheet.paste(frame, (x, y), corners.resize((side, side), Image.Resampling.LANCZOS))


def _fit(draw: ImageDraw.ImageDraw, text: str, face: Font, width: int) -> str:
    if draw.textlength(text, font=face) <= width:
        return text
    while text and draw.textlength(f"{text}…", font=face) > width:
        text = text[:-1].rstrip()
    return f"{text}…"
