"""A picture of what acts on a MODEL: per image prompt its layers, its steps and its place.

One row for each image prompt, in the order of the chain. The colour of a layer is its weight, on
one scale for all rows; no weight is grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from PIL import Image, ImageColor, ImageDraw

from . import drawing
from .drawing import GREY, INK, PAPER, RULE
from .summary import Applied, Cell, Summary, cells, factor_at, number

WIDTH = 1024
MARGIN, HEADER = 28, 96
STRIP, CHART, WHERE = (MARGIN, 640), (690, 866), (892, WIDTH - MARGIN)
"""From where to where the three columns of a row go, in pixels."""

CELL = 52
"""Height of a layer, and of the chart and the mask beside it."""

MOST = 24
"""Rows at most."""

ZERO = "#d4d4d4"
POSITIVE = ("#fde6cb", "#f2923c", "#b3300f")
NEGATIVE = ("#dbe7f6", "#6796d6", "#1d4a99")
"""Colours of small, middle and large weights."""

ALERT, FILL, FRAME = "#a8330c", "#f6c79a", "#b9b5ab"

_TOP, _BARS = 92, 60
"""Of a row: from its upper edge to the layers; height of the weights of pictures."""

_BOTTOM = 26
"""Height of the numbers below the layers."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom; right and bottom are outside."""


def draw(found: Summary) -> Image.Image:
    """Draw it.

    Returns:
        An RGB picture, 1024 pixels wide, as high as its rows.
    """
    shown = found.applied[:MOST]
    more = len(found.applied) - len(shown)
    notes = [f"And {more} more, which the text lists."] if more else []
    lines = _wrapped([*notes, *found.notes])
    tops = row_tops(found)
    height = tops[-1] + (drawing.line_height(13) * len(lines) + 16 if lines else 0) + 12
    picture, pen = drawing.canvas(WIDTH, height)
    _header(pen, found, scale(shown))
    for place, one in enumerate(shown):
        _row(picture, pen, one, place, tops[place], scale(shown))
    if not shown:
        _nothing(pen, found, tops[0])
    if lines:
        _rule(pen, tops[-1])
        drawing.label(pen, (MARGIN, tops[-1] + 12), lines, size=13, fill=ALERT)
    return picture


def row_tops(found: Summary) -> list[int]:
    """The upper edge of every row in pixels, and the lower one of the last."""
    tops = [HEADER]
    for one in found.applied[:MOST]:
        lines = len(_wrapped([*one.facts(), *one.notes]))
        bars = _BARS if one.factors else 0
        words = drawing.line_height(13) * lines + (6 if lines else 0)
        tops.append(tops[-1] + _TOP + CELL + _BOTTOM + bars + words + 14)
    if not found.applied:
        tops.append(HEADER + 200)
    return tops


def cell_boxes(shown: Sequence[Cell], top: int) -> list[Box]:
    """Where the layers of a row are.

    Args:
        shown: See `summary.cells`.
        top: Of the row.
    """
    left, right = STRIP
    parts = len({cell.part for cell in shown})
    gap, between = 3, 14
    free = right - left - gap * (len(shown) - parts) - between * (parts - 1)
    boxes: list[Box] = []
    x = float(left)
    for place, cell in enumerate(shown):
        if place:
            x += gap if cell.part == shown[place - 1].part else between
        end = x + free / len(shown)
        boxes.append((round(x), top + _TOP, round(end), top + _TOP + CELL))
        x = end
    return boxes


def scale(shown: Sequence[Applied]) -> float:
    """The weight that has the strongest colour: the largest there is, 1 at least."""
    return max([1.0, *(abs(w) for one in shown for w in one.weights.values())])


def colour(weight: float, strongest: float) -> tuple[int, int, int]:
    """The colour of a weight: grey for none, warm above, blue below.

    Args:
        weight: The paper's lambda.
        strongest: See `scale`.
    """
    if weight == 0:
        return _rgb(ZERO)
    stops = POSITIVE if weight > 0 else NEGATIVE
    place = 2 * min(abs(weight) / strongest, 1.0)
    first = min(int(place), 1)
    low, high = _rgb(stops[first]), _rgb(stops[first + 1])
    red, green, blue = (
        round(a + (b - a) * (place - first)) for a, b in zip(low, high, strict=True)
    )
    return red, green, blue


def _header(pen: ImageDraw.ImageDraw, found: Summary, strongest: float) -> None:
    drawing.label(pen, (MARGIN, 22), found.headline(), size=24, width=600)
    if not found.applied:
        return
    about = "Numbers of layers are those of layer_weights in Image Prompt Influence."
    drawing.label(pen, (MARGIN, 58), about, size=13, fill=GREY, width=600)
    left, right = STRIP[1] + 50, WIDTH - MARGIN
    has_negative = any(w < 0 for one in found.applied[:MOST] for w in one.weights.values())
    lowest = -strongest if has_negative else 0.0
    for x in range(left, right):
        weight = lowest + (strongest - lowest) * (x - left) / (right - 1 - left)
        pen.line((x, 30, x, 44), fill=colour(weight, strongest))
    drawing.label(pen, (left, 10), "weight", size=13, fill=GREY)
    drawing.label(pen, (left, 48), number(lowest), size=13, fill=GREY)
    if has_negative:
        drawing.label(pen, ((left + right) / 2, 48), "0", size=13, fill=GREY, anchor="centre")
    drawing.label(pen, (right, 48), number(strongest), size=13, fill=GREY, anchor="right")


def _row(
    picture: Image.Image,
    pen: ImageDraw.ImageDraw,
    one: Applied,
    place: int,
    top: int,
    strongest: float,
) -> None:
    _rule(pen, top)
    title = f"{place + 1}.  {one.file}"
    idle = f"no effect: {one.idle}" if one.idle else ""
    free = WIDTH - 2 * MARGIN - drawing.measure(idle, 14) - 20
    drawing.label(pen, (MARGIN, top + 12), title, size=18, width=free)
    drawing.label(pen, (WIDTH - MARGIN, top + 15), idle, size=14, fill=ALERT, anchor="right")
    about = f"{one.kind()}; {one.amount()}"
    drawing.label(pen, (MARGIN, top + 38), about, size=13, fill=GREY, width=WIDTH - 2 * MARGIN)
    _strip(picture, pen, one.cells, top, strongest)
    y = top + _TOP
    drawing.label(pen, (CHART[0], y - 22), _window(one), size=13, fill=GREY)
    _chart(pen, one, y)
    drawing.label(pen, (WHERE[0], y - 22), "where", size=13, fill=GREY)
    _mask(picture, pen, one, y)
    y += CELL + _BOTTOM
    if one.factors:
        _pictures(pen, one.factors, y, strongest)
        y += _BARS
    usual = _wrapped(one.facts())
    y += 6 + drawing.label(pen, (MARGIN, y + 6), usual, size=13)
    drawing.label(pen, (MARGIN, y), _wrapped(one.notes), size=13, fill=ALERT)


def _window(one: Applied) -> str:
    """The steps without their keyframes, which the chart shows."""
    return one.steps().split(",")[0]


def _strip(
    picture: Image.Image,
    pen: ImageDraw.ImageDraw,
    shown: Sequence[Cell],
    top: int,
    strongest: float,
) -> None:
    boxes = cell_boxes(shown, top)
    for part, group in groupby(zip(shown, boxes, strict=True), lambda pair: pair[0].part):
        held = [box for _, box in group]
        name = part if len(held) > 1 or held[0][2] - held[0][0] > 44 else part[:3]
        drawing.label(pen, (held[0][0], held[0][1] - 22), name, size=13, fill=GREY)
        pen.line((held[0][0], held[0][1] - 4, held[-1][2] - 1, held[0][1] - 4), fill=FRAME)
    for cell, (left, upper, right, lower) in zip(shown, boxes, strict=True):
        for depth, weight in enumerate(cell.weights):
            part_top = upper + CELL * depth // len(cell.weights)
            part_bottom = upper + CELL * (depth + 1) // len(cell.weights)
            fill = colour(weight, strongest)
            pen.rectangle((left, part_top, right - 1, part_bottom - 1), fill=fill)
        if cell.is_opposed:
            _hatch(picture, (left, upper, right, lower))
        middle = (left + right) / 2
        if len(set(cell.weights)) == 1:
            text = number(cell.weights[0])
            fill = colour(cell.weights[0], strongest)
            ink = INK if sum(fill) > 380 or cell.is_opposed else "#ffffff"
            size = 13 if drawing.measure(text, 13) <= right - left - 4 else 11
            x = middle - drawing.measure(text, size) / 2
            if cell.is_opposed:
                pen.rectangle((left + 3, upper + 17, right - 4, lower - 18), fill=PAPER)
            drawing.label(pen, (x, upper + 19), text, size=size, fill=ink, width=right - left)
        drawing.label(
            pen, (middle, lower + 4), str(cell.place), size=12, fill=GREY, anchor="centre"
        )


def _hatch(picture: Image.Image, box: Box) -> None:
    """Stripes over a layer that leads away from the image."""
    left, top, right, bottom = box
    part = picture.crop(box)
    pen = ImageDraw.Draw(part)
    for x in range(-(bottom - top), right - left, 8):
        pen.line((x, bottom - top, x + bottom - top, 0), fill=INK, width=2)
    picture.paste(part, (left, top))


def _chart(pen: ImageDraw.ImageDraw, one: Applied, top: int) -> None:
    """The factor of the weight over the schedule."""
    (left, right), bottom = CHART, top + CELL
    columns = [factor_at(one.timing, x / (right - left - 1)) for x in range(right - left)]
    high, low = max(1.0, *columns) * 1.12, min(0.0, *columns) * 1.12
    pen.rectangle((left, top, right - 1, bottom - 1), fill="#ffffff", outline=FRAME)

    def height(factor: float) -> int:
        return round(bottom - 2 - (CELL - 4) * (factor - low) / (high - low))

    for quarter in (1, 2, 3):
        x = left + (right - left) * quarter // 4
        pen.line((x, top + 1, x, bottom - 2), fill=RULE)
    for x, factor in enumerate(columns[1:-1], start=left + 1):
        if factor:
            pen.line((x, height(factor), x, height(0.0)), fill=FILL)
    dots = [(left + x, height(factor)) for x, factor in enumerate(columns)]
    pen.line(dots[1:-1], fill=ALERT, width=2)
    drawing.label(pen, (left - 5, height(1.0) - 8), "1", size=12, fill=GREY, anchor="right")
    drawing.label(pen, (left - 5, height(0.0) - 9), "0", size=12, fill=GREY, anchor="right")
    drawing.label(pen, (left, bottom + 4), "0%", size=12, fill=GREY)
    middle = (left + right) / 2
    drawing.label(pen, (middle, bottom + 4), "50%", size=12, fill=GREY, anchor="centre")
    drawing.label(pen, (right, bottom + 4), "100%", size=12, fill=GREY, anchor="right")


def _mask(picture: Image.Image, pen: ImageDraw.ImageDraw, one: Applied, top: int) -> None:
    """The first mask, white where the image acts."""
    left, right = WHERE
    if one.mask is None:
        pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill="#ffffff", outline=FRAME)
    else:
        levels = one.mask[0].detach().float().clamp(0, 1).cpu().numpy()
        seen = Image.fromarray((255 * levels).round().astype("uint8"))
        share = min((right - left) / seen.width, CELL / seen.height)
        size = (max(1, round(share * seen.width)), max(1, round(share * seen.height)))
        picture.paste(seen.resize(size, Image.Resampling.BOX).convert("RGB"), (left, top))
        pen.rectangle((left, top, left + size[0] - 1, top + size[1] - 1), outline=FRAME)
    caption = one.place_in_short()
    drawing.label(pen, (left, top + CELL + 4), caption, size=12, fill=GREY, width=right - left)


def _pictures(
    pen: ImageDraw.ImageDraw, factors: Sequence[float], top: int, strongest: float
) -> None:
    """A bar for the factor of each picture of a batch."""
    left, right = STRIP
    drawing.label(pen, (left, top + 4), "pictures", size=13, fill=GREY)
    bottom, high = top + _BARS - 6, 26
    most = max(1.0, *(abs(factor) for factor in factors))
    wide = (right - left) / max(len(factors), 8)
    pen.line((left, bottom, right - 1, bottom), fill=FRAME)
    for place, factor in enumerate(factors):
        x, end = round(left + place * wide), round(left + (place + 1) * wide)
        tall = round(high * abs(factor) / most)
        fill = colour(factor, max(strongest, most))
        if tall:
            pen.rectangle((x, bottom - tall, max(x, end - 3), bottom - 1), fill=fill)


def _nothing(pen: ImageDraw.ImageDraw, found: Summary, top: int) -> None:
    """A model without image prompts: what to do, and its empty layers."""
    _rule(pen, top)
    lines = drawing.wrap(found.advice(), 15, WIDTH - 2 * MARGIN)
    drawing.label(pen, (MARGIN, top + 16), lines, size=15)
    if found.family is not None:
        shown = cells(found.family, {})
        for cell, box in zip(shown, cell_boxes(shown, top), strict=True):
            left, upper, right, lower = box
            pen.rectangle((left, upper, right - 1, lower - 1), fill=ZERO)
            middle = (left + right) / 2
            drawing.label(
                pen, (middle, lower + 4), str(cell.place), size=12, fill=GREY, anchor="centre"
            )


def _wrapped(lines: Sequence[str]) -> list[str]:
    width = WIDTH - 2 * MARGIN
    return [part for line in lines for part in drawing.wrap(line, 13, width)]


def _rule(pen: ImageDraw.ImageDraw, top: int) -> None:
    pen.line((MARGIN, top, WIDTH - MARGIN - 1, top), fill=RULE)


def _rgb(name: str) -> tuple[int, int, int]:
    red, green, blue = ImageColor.getrgb(name)[:3]
    return red, green, blue
