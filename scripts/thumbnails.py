"""Make the pictures of the template browser: what goes into each workflow and what comes out.

    python -m scripts.thumbnails [NAME ...]

The results are true: the shipped graph ran on the miniature in the real host, with its coloured
shapes in place of photos. It knows no faces, and its adapters do not carry where things are
(docs/evidence.md); what shows these is drawn, and says so.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from scripts import drawn_cards
from scripts import miniature_templates as templates
from scripts import pictures as drawings
from scripts.contact_sheet import GREY, INK, PAPER, RULE, font
from scripts.demo import PACK, pictures
from scripts.graphs import GRAPHS
from scripts.graphs_batches import FRAMES
from scripts.prompts import FOLDER
from scripts.server import Server
from scripts.shots import SHOTS

SIDE = 512
"""Of a thumbnail, in pixels; the template browser shows it at half of that."""

EDGE, GAP, WORDS = 24, 16, 26
"""Around the card, between pictures, height of letters; in pixels."""

SMALL, LARGE = 128, 304
"""Sides of what goes in and of what comes out."""

PILL = 48
"""Height of the text prompt's box."""

QUALITY = 88


@dataclass(frozen=True)
class Shown:
    """A picture with what it is."""

    picture: Image.Image
    label: str = ""


def enlarged(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Any size, with pixels that stay squares; drawn pictures are scaled smoothly.

    What is transparent becomes a chequerboard.
    """
    if picture.mode == "RGBA":
        tiles = Image.new("RGB", picture.size, "#8a8d94")
        draw = ImageDraw.Draw(tiles)
        for x, y in itertools.product(range(0, picture.width, 4), range(0, picture.height, 4)):
            if (x + y) // 4 % 2:
                draw.rectangle((x, y, x + 3, y + 3), "#e6e6e8")
        tiles.paste(picture, mask=picture.getchannel("A"))
        picture = tiles
    if picture.width >= width:
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    factor = -(-4 * width // picture.width)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST).resize(
        (width, height), Image.Resampling.BOX
    )


def paste(card: Image.Image, shown: Shown, box: tuple[int, int, int, int]) -> None:
    """Put a picture into (left, top, width, height), with round corners and its label below."""
    left, top, width, height = box
    corners = Image.new("L", (4 * width, 4 * height))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 4 * width - 1, 4 * height - 1), 40, 255)
    mask = corners.resize((width, height), Image.Resampling.LANCZOS)
    card.paste(enlarged(shown.picture, width, height), (left, top), mask)
    if shown.label:
        centre = (left + width // 2, top + height + 4 + WORDS // 2)
        ImageDraw.Draw(card).text(centre, shown.label, GREY, font(WORDS - 4), anchor="mm")


def arrow(card: Image.Image, start: tuple[int, int], end: tuple[int, int]) -> None:
    """From what goes in to what comes out, level or upright."""
    draw = ImageDraw.Draw(card)
    draw.line((*start, *end), INK, 5)
    u, v = end
    if start[0] == u:
        head = [(u, v + 10), (u - 9, v), (u + 9, v)]
    else:
        head = [(u + 10, v), (u, v - 9), (u, v + 9)]
    draw.polygon(head, INK)


def pill(card: Image.Image, text: str) -> None:
    """The text prompt at the lower edge."""
    draw = ImageDraw.Draw(card)
    words = f"“{text}”"
    width = min(SIDE - 2 * EDGE, int(draw.textlength(words, font(WORDS))) + 40)
    left, top = (SIDE - width) // 2, SIDE - EDGE - PILL + 8
    draw.rounded_rectangle((left, top, left + width, top + PILL), PILL // 2, RULE)
    draw.text((SIDE // 2, top + PILL // 2), words, INK, font(WORDS), anchor="mm")


def blank() -> Image.Image:
    """An empty card."""
    return Image.new("RGB", (SIDE, SIDE), PAPER)


def beside(
    given: Sequence[Shown], made: Sequence[Image.Image], text: str = "", label: str = ""
) -> Image.Image:
    """What goes in on the left, one or four results on the right, the text prompt below."""
    card = blank()
    bottom = SIDE - EDGE - (PILL + 8 if text else 0)
    middle = (EDGE + bottom) // 2
    small = min(SMALL, (bottom - EDGE) // len(given) - WORDS - 12)
    heights = [small + (WORDS + 4 if one.label else 0) for one in given]
    top = middle - (sum(heights) + GAP * (len(given) - 1)) // 2
    left = EDGE + (SMALL - small) // 2
    for one, height in zip(given, heights, strict=True):
        paste(card, one, (left, top, small, small))
        top += height + GAP
    right = SIDE - EDGE - LARGE
    arrow(card, (EDGE + SMALL + 8, middle), (right - 18, middle))
    if len(made) == 1:
        paste(card, Shown(made[0], label), (right, middle - LARGE // 2, LARGE, LARGE))
    else:
        _square(card, made[:4], (right, middle - LARGE // 2))
    if text:
        pill(card, text)
    return card


def _square(card: Image.Image, made: Sequence[Image.Image], corner: tuple[int, int]) -> None:
    side = (LARGE - GAP) // 2
    for number, picture in enumerate(made):
        row, column = divmod(number, 2)
        place = (corner[0] + column * (side + GAP), corner[1] + row * (side + GAP))
        paste(card, Shown(picture), (*place, side, side))


def below(given: Sequence[Shown], made: Image.Image, label: str = "") -> Image.Image:
    """What goes in above, one wide result below."""
    card = blank()
    width = SIDE - 2 * EDGE - 48
    height = round(width * made.height / made.width)
    top = SIDE - EDGE - height - (WORDS + 2 if label else 0)
    side = min(SMALL, top - EDGE - 36 - WORDS)
    left = (SIDE - len(given) * side - (len(given) - 1) * 5 * GAP) // 2
    for number, one in enumerate(given):
        paste(card, one, (left + number * (side + 5 * GAP), EDGE - 8, side, side))
    arrow(card, (SIDE // 2, top - 44), (SIDE // 2, top - 18))
    paste(card, Shown(made, label), ((SIDE - width) // 2, top, width, height))
    return card


def film(given: Sequence[Shown], frames: Sequence[Image.Image]) -> Image.Image:
    """A photo and two references above, eight frames below in two rows."""
    card = blank()
    side, gap = 112, 8
    left, top = (SIDE - 4 * side - 3 * gap) // 2, SIDE - EDGE - 2 * side - gap
    for number, frame in enumerate(frames):
        row, column = divmod(number, 4)
        place = (left + column * (side + gap), top + row * (side + gap))
        paste(card, Shown(frame), (*place, side, side))
    small = 136
    for one, x in zip(given, (left, (SIDE - small) // 2, SIDE - left - small), strict=True):
        paste(card, one, (x, EDGE, small, small))
    arrow(card, (SIDE // 2, top - 42), (SIDE // 2, top - 16))
    return card


def grid(one: Shown, made: Sequence[Image.Image], weights: Sequence[str], text: str) -> Image.Image:
    """A reference and a text above, six weights below."""
    card = blank()
    side, gap = 140, 12
    left, top = (SIDE - 3 * side - 2 * gap) // 2, 132
    for number, (picture, weight) in enumerate(zip(made, weights, strict=True)):
        row, column = divmod(number, 3)
        place = (left + column * (side + gap), top + row * (side + gap + WORDS))
        paste(card, Shown(picture, weight), (*place, side, side))
    small = 96
    paste(card, one, (left, EDGE - 8, small, small))
    draw = ImageDraw.Draw(card)
    x, y = left + small + 24, EDGE - 8 + small // 2
    width = int(draw.textlength(f"“{text}”", font(WORDS))) + 40
    draw.rounded_rectangle((x, y - PILL // 2, x + width, y + PILL // 2), PILL // 2, RULE)
    draw.text((x + width // 2, y), f"“{text}”", INK, font(WORDS), anchor="mm")
    return card


def rows(given: Sequence[Shown], made: Sequence[Image.Image]) -> Image.Image:
    """What goes in and what comes out of it, one run in a row."""
    card = blank()
    side = (SIDE - 2 * EDGE - (len(given) - 1) * GAP) // len(given)
    for number, (one, result) in enumerate(zip(given, made, strict=True)):
        top = EDGE + number * (side + GAP)
        paste(card, one, (SIDE // 2 - side - 44, top, side, side))
        arrow(card, (SIDE // 2 - 28, top + side // 2), (SIDE // 2 + 18, top + side // 2))
        paste(card, Shown(result), (SIDE // 2 + 44, top, side, side))
    return card


FILES = ("model.safetensors", "plus (2).bin", "download", "adapter_v1")
TAKEN = 1


def files() -> Image.Image:
    """A folder with files of any name, one of which is taken; in the colours of the card."""
    picture = Image.new("RGB", (SMALL * 2, SMALL * 2), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, name in enumerate(FILES):
        box = (0, number * 64 + 4, 2 * SMALL - 1, number * 64 + 58)
        draw.rounded_rectangle(box, 14, INK if number == TAKEN else RULE)
        ink = PAPER if number == TAKEN else GREY
        draw.text((SMALL, number * 64 + 31), name, ink, font(25), anchor="mm")
    return picture


def compose(name: str, made: Sequence[Image.Image]) -> Image.Image:
    """The card of a workflow from what it made."""
    shot = SHOTS[name]
    given = [Shown(shot.pictures[middle], label) for middle, label in shot.labels.items()]
    match shot.card:
        case "beside":
            return beside(given, made, next(iter(shot.texts.values()), ""))
        case "files":
            return beside([Shown(files()), *given], made)
        case "grid":
            weights = str(shot.inputs["ImagePromptGrid"]["weights"]).split(", ")
            return grid(given[0], made, weights, next(iter(shot.texts.values())))
        case "film":
            return film(given, made[:FRAMES])  # without the animated file
        case "rows":
            return rows(given, made)


def composition_only() -> Image.Image:
    """Where things are, from a picture; what they are, from the text."""
    given = [Shown(drawings.photo(), "layout")]
    return beside(given, [drawn_cards.windmill()], "windmill, tulips", DRAWN)


def style_and_composition() -> Image.Image:
    """The look of one picture, the layout of another."""
    given = [Shown(drawings.reference(), "style"), Shown(drawings.photo(), "layout")]
    return beside(given, [drawn_cards.evening_coast()], label=DRAWN)


def face() -> Image.Image:
    """What the plus-face adapter does."""
    given = [Shown(drawings.portrait(), "face")]
    return beside(given, [drawn_cards.astronaut()], "astronaut", DRAWN)


def face_identity() -> Image.Image:
    """What FaceID does."""
    given = [Shown(drawn_cards.found(), "found"), Shown(drawn_cards.fingerprint(), "who")]
    return beside(given, [drawn_cards.dancer()], "on a stage", DRAWN)


def two_people() -> Image.Image:
    """What regions do."""
    given = [Shown(drawings.portrait(), "left"), Shown(drawings.portrait_2(), "right")]
    return below(given, drawn_cards.couple(), DRAWN)


DRAWN = "drawing"
CARDS = {
    "03_composition_only": composition_only,
    "04_face": face,
    "05_face_identity": face_identity,
    "06_two_people": two_people,
    "16_style_and_composition": style_and_composition,
}
"""Those that the miniature cannot show."""


def run(names: Sequence[str]) -> dict[str, list[Image.Image]]:
    """What the workflows make on the miniature."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        for name in names:
            templates.write_inputs(name, SHOTS[name], base / "input")
        with Server(base, packs=[PACK]) as server:
            return {name: list(_run(server, name)) for name in names}


def _run(server: Server, name: str) -> Iterator[Image.Image]:
    shot = SHOTS[name]
    for reference in shot.runs:
        yield from pictures(server.run(templates.prompt(name, shot, reference), timeout=300))


def main(arguments: Sequence[str] = ()) -> None:
    """Write the thumbnails of all workflows, or of those that are named."""
    names = list(arguments or GRAPHS)
    made = run([name for name in names if name in SHOTS])
    for name in names:
        card = CARDS[name]() if name in CARDS else compose(name, made[name])
        path = FOLDER / f"{name}.jpg"
        card.save(path, quality=QUALITY, optimize=True)
        print(f"workflows/{path.name}  {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
