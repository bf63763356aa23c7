"""What thumbnails show of faces and of composition: drawings, for the miniature knows neither.

It has no faces, and its adapters carry the look of a reference but not where things are
(docs/evidence.md).
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from PIL import Image, ImageDraw

from scripts import pictures
from scripts.pictures import HEAD, RED_CAP, SIZE, SMOOTH, WHITE_CAP, Clothes, Colour, Palette

ACCENT: Colour = (246, 178, 46)
SUIT = Clothes((226, 228, 232), (176, 182, 192), (120, 128, 140), RED_CAP.cap, RED_CAP.veil)
JACKET = Clothes((150, 50, 70), (228, 120, 110), (110, 34, 52), RED_CAP.cap, RED_CAP.veil)


def astronaut() -> Image.Image:
    """The traveller in a space suit among stars."""
    chance = random.Random(3)
    size = SIZE * SMOOTH
    image = Image.new("RGB", (size, size), (14, 18, 40))
    draw = ImageDraw.Draw(image)
    for _ in range(90):
        x, y, r = chance.uniform(0, size), chance.uniform(0, size), chance.uniform(1.5, 5)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(236, 238, 250))
    draw.ellipse(tuple(SMOOTH * edge for edge in (340, 40, 480, 180)), fill=(92, 120, 196))
    draw.ellipse(tuple(SMOOTH * edge for edge in (360, 40, 500, 170)), fill=(14, 18, 40))
    pictures.traveller(image, SUIT)
    x, y = SUIT.head
    edges = (x - 92, y - 96, x + 92, y + 88)
    draw.ellipse(tuple(SMOOTH * edge for edge in edges), outline=(226, 228, 232), width=26)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def dancer() -> Image.Image:
    """The traveller on a stage."""
    size = SIZE * SMOOTH
    image = Image.new("RGB", (size, size), (44, 20, 52))
    draw = ImageDraw.Draw(image)
    for left in (90, 420):
        cone = [(left, -20), (left - 110, 512), (left + 110, 512)]
        draw.polygon([(x * SMOOTH, y * SMOOTH) for x, y in cone], fill=(92, 48, 92))
    pictures.traveller(image, JACKET)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def found() -> Image.Image:
    """The portrait with the face that a detector would find: its box and its five points."""
    image = pictures.face()
    draw = ImageDraw.Draw(image)
    x, y = RED_CAP.head
    far = 1.35 * HEAD
    draw.rectangle((x - far, y - far, x + far, y + far), outline=ACCENT, width=12)
    eyes = y - 0.25 * HEAD
    for u, v in [(-24, eyes), (24, eyes), (0, y + 4), (-20, y + 30), (20, y + 30)]:
        draw.ellipse((x + u - 8, v - 8, x + u + 8, v + 8), fill=ACCENT)
    return image


def fingerprint() -> Image.Image:
    """A face as numbers: bars of a vector."""
    image = Image.new("RGB", (256, 256), (34, 37, 43))
    draw = ImageDraw.Draw(image)
    for number in range(16):
        height = 90 * abs(math.sin(1.7 * number + 0.6)) + 8
        x = 16 + 14 * number
        draw.rectangle((x, 128 - height, x + 8, 128 + height), fill=ACCENT)
    return image


def couple() -> Image.Image:
    """Both travellers in one wide picture."""
    size = SIZE * SMOOTH
    image = Image.new("RGB", (size, size), (206, 196, 216))
    draw = ImageDraw.Draw(image)
    for number, left in enumerate(range(0, SIZE, 64)):
        stripe = (222, 96, 84) if number % 2 else (244, 238, 226)
        draw.rectangle([SMOOTH * edge for edge in (left, 60, left + 63, 130)], fill=stripe)
    draw.rectangle([SMOOTH * edge for edge in (0, 400, SIZE, SIZE)], fill=(164, 140, 132))
    for worn, x in ((RED_CAP, 136), (WHITE_CAP, 376)):
        pictures.traveller(image, replace(worn, head=(x, 262)), 0.72)
    wide = (0, 60 * SMOOTH, size, 400 * SMOOTH)
    return image.crop(wide).resize((SIZE, 340), Image.Resampling.LANCZOS)


EVENING = Palette(
    (62, 38, 102), (255, 168, 92), (226, 120, 110), (78, 38, 92), (122, 56, 112),
    (42, 24, 62), (255, 200, 140), (170, 84, 122), (255, 236, 170), (42, 24, 62),
)  # fmt: skip
"""Of `pictures.reference`."""

FIELD = Palette(
    (240, 206, 120), (252, 242, 214), (255, 250, 236), (96, 146, 70), (206, 66, 74),
    (70, 116, 60), (150, 96, 60), (124, 76, 48), (240, 226, 200), (90, 54, 36),
)  # fmt: skip


def evening_coast() -> Image.Image:
    """The photo's composition in the colours of the first reference."""
    return pictures.coast(EVENING).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def windmill() -> Image.Image:
    """The photo's composition: a field for the sea, a windmill for the lighthouse."""
    image = pictures.coast(FIELD)
    draw = ImageDraw.Draw(image)
    x, y = 355, 136
    for turn in range(4):
        angle = math.tau * (turn / 4 + 0.09)
        ahead, aside = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        corners = [(12, 0), (92, 0), (92, 18), (12, 18)]
        sail = [
            (SMOOTH * (x + a * ahead[0] + b * aside[0]), SMOOTH * (y + a * ahead[1] + b * aside[1]))
            for a, b in corners
        ]
        draw.polygon(sail, fill=(250, 246, 234), outline=(90, 54, 36), width=4)
    draw.ellipse([SMOOTH * v for v in (x - 9, y - 9, x + 9, y + 9)], fill=(60, 40, 30))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
