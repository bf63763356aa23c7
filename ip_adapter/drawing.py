"""Words on pictures: a canvas, labels that fit their place, and the way to an IMAGE and back.

The one place that draws text. Letters are those of the font that Pillow carries, so that a picture
is the same on every machine; it has the letters of English only, and others are written as the
nearest that it has (see `printable`). It plots no data and knows no adapter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, GREY, RULE = "#f7f5f0", "#22252b", "#6d7178", "#d9d5cb"
"""Colours of the ground, of words, of words of less weight, and of lines."""

LINE = 1.35
"""Height of a line in sizes of its letters."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

Anchor = Literal["left", "centre", "right"]
"""Which point of a label is put at its place."""

_DOTS = "..."

_NEAR = {
    "\t": " ",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{MIDDLE DOT}": "-",
    "\N{HORIZONTAL ELLIPSIS}": _DOTS,
    **dict.fromkeys("\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}", "-"),
    **dict.fromkeys("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}", "'"),
    **dict.fromkeys("\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}", '"'),
    **dict(zip("ßæœøłđ", ("ss", "ae", "oe", "o", "l", "d"), strict=True)),
}
"""What is written for letters that the font lacks and that do not come apart into others."""


@lru_cache(maxsize=32)
def font(size: int) -> Font:
    """Return the font that Pillow carries.

    Args:
        size: Height of the letters in pixels; Pillow below 10.1 has one size only.
    """
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def printable(text: str) -> str:
    """Return a text in the letters that the font has.

    Accents are left out (``é`` becomes ``e``), and ``?`` stands for what is left, such as Chinese
    letters in the name of a file. Line breaks stay.
    """
    return "".join(_near(letter) for letter in unicodedata.normalize("NFC", text))


def measure(text: str, size: int) -> float:
    """The width in pixels of one line."""
    return font(size).getlength(printable(text))


def shorten(text: str, size: int, width: float) -> str:
    """Return one line that fits, the end of which is dots where something was left out.

    Args:
        text: Line breaks become spaces.
        size: Of the letters, in pixels.
        width: In pixels.
    """
    line = " ".join(printable(text).split("\n"))
    if measure(line, size) <= width:
        return line
    while line and measure(f"{line}{_DOTS}", size) > width:
        line = line[:-1].rstrip()
    return f"{line}{_DOTS}" if measure(_DOTS, size) <= width else ""


def wrap(text: str, size: int, width: float, most: int | None = None) -> list[str]:
    """Break a text into lines that fit.

    Args:
        text: Its own line breaks stay. A word that is wider than a line is broken.
        size: Of the letters, in pixels.
        width: Of a line, in pixels.
        most: The number of lines at most; the last one ends in dots where there were more.
    """
    lines: list[str] = []
    for paragraph in printable(text).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if measure(joined, size) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while len(line) > 1 and measure(line, size) > width:
                fitting = _fitting(line, size, width)
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line)
    if most is None or len(lines) <= most:
        return lines
    return [*lines[: most - 1], shorten(" ".join(lines[most - 1 :]), size, width)]


def line_height(size: int) -> int:
    """From one line to the next, in pixels."""
    return round(LINE * size)


def label(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str | Sequence[str],
    *,
    size: int = 14,
    fill: str = INK,
    width: float | None = None,
    anchor: Anchor = "left",
) -> int:
    """Write a line, or several below one another.

    Args:
        pen: Of the canvas.
        place: ``(x, y)``, where the top of the first line is.
        text: One line, or what `wrap` returns.
        size: Of the letters, in pixels.
        fill: Their colour.
        width: In pixels; a line that is wider is cut and ends in dots.
        anchor: Whether x is the left end of each line, its middle or its right end.

    Returns:
        The height in pixels.
    """
    lines = [text] if isinstance(text, str) else text
    x, y = place
    share = {"left": 0.0, "centre": 0.5, "right": 1.0}[anchor]
    for number, line in enumerate(lines):
        fitting = printable(line) if width is None else shorten(line, size, width)
        left = x - share * measure(fitting, size)
        pen.text((left, y + number * line_height(size)), fitting, fill=fill, font=font(size))
    return len(lines) * line_height(size)


def canvas(width: int, height: int, ground: str = PAPER) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty RGB picture, and the pen that draws on it."""
    picture = Image.new("RGB", (width, height), ground)
    return picture, ImageDraw.Draw(picture)


def to_image(picture: Image.Image) -> Tensor:
    """A picture as the host wants it: ``[1, H, W, 3]`` in 0..1."""
    values = np.array(picture.convert("RGB"))
    return torch.from_numpy(values)[None].float() / 255


def from_image(image: Tensor) -> list[Image.Image]:
    """The pictures of ``[B, H, W, 1|3|4]`` in 0..1, each RGB; transparency is left out."""
    colour = image[..., :3].expand(*image.shape[:-1], 3)
    levels = colour.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    return [Image.fromarray(one.numpy()) for one in levels]


def _fitting(line: str, size: int, width: float) -> int:
    """How many letters of a line fit, one at least."""
    count = len(line)
    while count > 1 and measure(line[:count], size) > width:
        count -= 1
    return count


def _near(letter: str) -> str:
    if letter == "\n" or " " <= letter <= "~":
        return letter
    if letter in _NEAR:
        return _NEAR[letter]
    apart = unicodedata.normalize("NFKD", letter)
    plain = "".join(part for part in apart if not unicodedata.combining(part))
    return plain if plain and all(" " <= part <= "~" for part in plain) else "?"
