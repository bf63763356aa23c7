"""Words on pictures: what fits, what is written for letters that are missing, pixels both ways."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from PIL import Image, ImageFont

from ip_adapter import drawing

SENTENCE = "An image prompt acts beside the text prompt and never in its place"


def length(text: str, size: int) -> float:
    """As Pillow has it."""
    return ImageFont.load_default(size).getlength(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text 0-9 ~", "plain text 0-9 ~"),
        ("Ünïcødé", "Unicode"),
        ("\N{LEFT DOUBLE QUOTATION MARK}a\N{RIGHT DOUBLE QUOTATION MARK}", '"a"'),
        ("2 \N{MULTIPLICATION SIGN} 3 \N{EN DASH} 4\N{HORIZONTAL ELLIPSIS}", "2 x 3 - 4..."),
        ("\u65e5\u672c.safetensors", "??.safetensors"),
        ("\ud55c", "?"),
        ("e\u0301", "e"),
        ("a\nb\tc\0", "a\nb c?"),
    ],
)
def test_letters_that_the_font_lacks_are_replaced(text: str, expected: str) -> None:
    assert drawing.printable(text) == expected


@pytest.mark.parametrize("size", [11, 14, 24])
def test_a_shortened_line_fits_and_says_that_something_is_missing(size: int) -> None:
    whole = length(SENTENCE, size)
    assert drawing.measure(SENTENCE, size) == whole
    assert drawing.shorten(SENTENCE, size, whole) == SENTENCE
    cut = drawing.shorten(SENTENCE, size, whole / 2)
    assert cut.endswith("...") and SENTENCE.startswith(cut.removesuffix("..."))
    assert whole / 3 < length(cut, size) <= whole / 2
    assert drawing.shorten(SENTENCE, size, 1) == ""


@pytest.mark.parametrize("width", [60, 120, 300])
def test_wrapped_lines_fit_and_lose_nothing(width: int) -> None:
    lines = drawing.wrap(SENTENCE, 14, width)
    assert " ".join(lines) == SENTENCE
    assert all(length(line, 14) <= width for line in lines)
    for line, after in pairwise(lines):
        assert length(f"{line} {after.split()[0]}", 14) > width


def test_a_word_that_is_too_wide_is_broken() -> None:
    word = "ip-adapter-plus-face_sdxl_vit-h.safetensors"
    lines = drawing.wrap(word, 14, 100)
    assert "".join(lines) == word and len(lines) > 2
    assert all(length(line, 14) <= 100 for line in lines)


def test_too_many_lines_end_in_dots() -> None:
    lines = drawing.wrap(f"{SENTENCE}\n{SENTENCE}", 14, 120, most=2)
    assert len(lines) == 2 and lines[-1].endswith("...")
    assert drawing.wrap("one\n\ntwo", 14, 120) == ["one", "", "two"]


@pytest.mark.parametrize(("anchor", "sides"), [("left", 0), ("centre", 1), ("right", 2)])
def test_a_label_stands_where_it_is_anchored(anchor: drawing.Anchor, sides: int) -> None:
    picture, pen = drawing.canvas(400, 100, "#ffffff")
    height = drawing.label(pen, (200, 10), ["MM", "M"], size=20, fill="#ff0000", anchor=anchor)
    ink = (drawing.to_image(picture)[0, ..., 1] < 0.5).nonzero()  # [N, 2], rows and columns
    (top, left), (bottom, right) = ink.amin(0).tolist(), ink.amax(0).tolist()
    assert height == 2 * round(1.35 * 20)
    assert top >= 10 and bottom < 10 + height
    wide = length("MM", 20)
    assert left == pytest.approx(200 - wide * sides / 2, abs=3)
    assert right == pytest.approx(200 + wide * (2 - sides) / 2, abs=3)


def test_a_label_in_any_letters_is_drawn() -> None:
    picture, pen = drawing.canvas(200, 40)
    drawing.label(pen, (5, 5), "\u65e5\u672c\u8a9e \U0001f600", width=100)
    values = drawing.to_image(picture)
    assert float(values.std(dim=(1, 2)).max()) > 0.01
    assert bool((values[:, :, 110:] == values[0, 0, 0]).all())


def test_pictures_become_images_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    levels[1, ..., 0] = 255 - levels[1, ..., 0]
    image = levels.float() / 255
    pictures = drawing.from_image(image)
    assert [picture.size for picture in pictures] == [(16, 16), (16, 16)]
    assert pictures[1].getpixel((3, 2)) == (255 - 35, 35, 35)
    assert torch.equal(torch.cat([drawing.to_image(one) for one in pictures]), image)
    grey = drawing.from_image(image[:1, ..., :1])[0]
    assert grey.getpixel((1, 0)) == (1, 1, 1)
    assert drawing.to_image(Image.new("L", (3, 2), 51)).tolist()[0][0][0] == pytest.approx(
        [0.2] * 3
    )
