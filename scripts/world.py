"""Draw the documentation's picture of the miniature's world.

`python -m scripts.world` writes docs/images/miniature_world.png.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from miniature import world
from scripts.contact_sheet import INK, PAPER, font
from scripts.host import REPOSITORY

TARGET = REPOSITORY / "docs" / "images" / "miniature_world.png"
COLUMNS, ROWS = 8, 3
SIDE, GAP, WORDS = 96, 12, 34
"""Of a scene, between scenes, and height of a caption, in pixels."""


def scenes(seed: int = 5) -> list[world.Scene]:
    """As training sees them, each with another shape and colour than the one before."""
    rng = random.Random(seed)
    found: list[world.Scene] = []
    while len(found) < COLUMNS * ROWS:
        scene = world.draw(rng)
        last = found[-1] if found else None
        if last is None or (scene.shape != last.shape and scene.colour != last.colour):
            found.append(scene)
    return found


def draw(shown: Sequence[world.Scene]) -> Image.Image:
    """Set scenes over their whole captions, eight to a row."""
    width = COLUMNS * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, ROWS * (SIDE + WORDS + GAP) + GAP), PAPER)
    canvas = ImageDraw.Draw(sheet)
    pictures = world.pil(world.render(shown))
    for number, (scene, picture) in enumerate(zip(shown, pictures, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, top = GAP + column * (SIDE + GAP), GAP + row * (SIDE + WORDS + GAP)
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        words = "\n".join(textwrap.wrap(world.caption(scene), 18))
        canvas.multiline_text((left, top + SIDE + 4), words, fill=INK, font=font(10), spacing=2)
    return sheet


def main() -> None:
    """Write the picture, in as many colours as it needs."""
    sheet = draw(scenes()).quantize(128, dither=Image.Dither.NONE)
    sheet.save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
