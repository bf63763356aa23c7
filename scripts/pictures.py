"""Draw the pictures that the shipped workflows load: references, pose, depth map, photo, face.

Drawn rather than photographed, so that they need no licence, no download and no space in the
repository. All are 512 x 512 and the same on every run.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 512
SMOOTH = 2
"""Drawn this many times larger, then scaled down."""

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

PIECES = 9
HEAD = 62
"""Radius of the head in pixels; the detector's smallest search halves it, and sees up to 41."""


def _mix(first: Colour, second: Colour, fraction: float) -> Colour:
    red, green, blue = (round(a + (b - a) * fraction) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _sky(top: Colour, bottom: Colour) -> Image.Image:
    """A vertical gradient at drawing size."""
    size = SIZE * SMOOTH
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    for y in range(size):
        draw.line([(0, y), (size, y)], fill=_mix(top, bottom, y / size))
    return image


def _scaled(points: Points) -> Points:
    return [(x * SMOOTH, y * SMOOTH) for x, y in points]


def _hills(
    draw: ImageDraw.ImageDraw, base: float, height: float, colour: Colour, seed: int
) -> None:
    """A ridge of a few random waves, filled down to the lower edge."""
    chance = random.Random(seed)
    waves = [(chance.uniform(0.5, 3.0), chance.uniform(0, math.tau)) for _ in range(4)]
    ridge: Points = []
    for x in range(0, SIZE + 4, 4):
        wave = sum(math.sin(math.tau * f * x / SIZE + p) / (1 + f) for f, p in waves)
        ridge.append((float(x), base - height * wave))
    draw.polygon(_scaled([(0, SIZE), *ridge, (SIZE, SIZE)]), fill=colour)


def _disc(image: Image.Image, centre: tuple[float, float], radius: float, colour: Colour) -> None:
    x, y = (value * SMOOTH for value in centre)
    r = radius * SMOOTH
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _finish(image: Image.Image) -> Image.Image:
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def reference() -> Image.Image:
    """Evening hills in orange and violet, a low sun and its glow."""
    image = _sky((62, 38, 102), (255, 168, 92))
    glow = Image.new("RGB", image.size)
    _disc(glow, (330, 250), 130, (120, 62, 20))
    image = ImageChops.add(image, glow.filter(ImageFilter.GaussianBlur(60)))
    _disc(image, (330, 250), 52, (255, 236, 170))
    draw = ImageDraw.Draw(image)
    layers: list[tuple[float, float, Colour]] = [
        (300, 60, (170, 84, 122)),
        (350, 48, (122, 56, 112)),
        (405, 40, (78, 38, 92)),
        (460, 26, (42, 24, 62)),
    ]
    for seed, (base, height, colour) in enumerate(layers, start=11):
        _hills(draw, base, height, colour, seed)
    return _finish(image)


def reference_2() -> Image.Image:
    """A cut-paper pattern of leaves and berries in teal, cream and red."""
    chance = random.Random(5)
    image = Image.new("RGB", (SIZE * SMOOTH, SIZE * SMOOTH), (240, 228, 204))
    draw = ImageDraw.Draw(image)
    leaves: list[Colour] = [(20, 92, 96), (44, 130, 122), (118, 168, 130), (232, 168, 74)]
    step = SIZE / PIECES
    for row in range(PIECES + 1):
        for column in range(PIECES + 1):
            x = (column + 0.5 * (row % 2)) * step
            y, angle = row * step, chance.uniform(0, math.tau)
            long, wide = step * chance.uniform(0.55, 0.8), step * chance.uniform(0.16, 0.26)
            leaf: Points = []
            for turn in range(48):
                t = math.tau * turn / 48
                u, v = long * math.cos(t), wide * math.sin(t) * abs(math.sin(t)) ** 0.5
                leaf.append(
                    (
                        x + u * math.cos(angle) - v * math.sin(angle),
                        y + u * math.sin(angle) + v * math.cos(angle),
                    )
                )
            draw.polygon(_scaled(leaf), fill=chance.choice(leaves))
            spot = (x + step * 0.5, y + step * 0.25)
            _disc(image, spot, step * 0.1, (196, 52, 48))
    return _finish(image)


# OpenPose's limbs: which joints they join, and the colours its ControlNet was trained on.
JOINTS: Points = [
    (256, 100), (256, 150), (206, 152), (160, 200), (118, 150), (306, 152), (356, 196), (398, 140),
    (228, 276), (196, 366), (170, 458), (284, 276), (330, 356), (312, 452),
    (243, 86), (269, 86), (226, 96), (286, 96),
]  # fmt: skip
LIMBS = [
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
]  # fmt: skip
RAINBOW: list[Colour] = [
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
]  # fmt: skip


def pose() -> Image.Image:
    """A dancing OpenPose figure on black."""
    image = Image.new("RGB", (SIZE * SMOOTH, SIZE * SMOOTH))
    draw = ImageDraw.Draw(image)
    for (start, end), colour in zip(LIMBS, RAINBOW, strict=False):
        dim = _mix((0, 0, 0), colour, 0.6)
        draw.line(_scaled([JOINTS[start], JOINTS[end]]), fill=dim, width=9 * SMOOTH)
    for joint, colour in zip(JOINTS, RAINBOW, strict=True):
        _disc(image, joint, 5, colour)
    return _finish(image)


def depth() -> Image.Image:
    """A depth map, white near and black far: ridges that come closer, a ball in front."""
    image = Image.new("RGB", (SIZE * SMOOTH, SIZE * SMOOTH), (12, 12, 12))
    draw = ImageDraw.Draw(image)
    for seed, (base, shade) in enumerate([(220, 50), (290, 95), (360, 145), (430, 195)], start=31):
        _hills(draw, base, 55, (shade, shade, shade), seed)
    for ring in range(70, 0, -2):
        shade = round(250 - 60 * (ring / 70) ** 2)
        _disc(image, (170, 400), ring, (shade, shade, shade))
    return _finish(image.filter(ImageFilter.GaussianBlur(2)))


@dataclass(frozen=True)
class Palette:
    """Colours of a coast with a lighthouse."""

    sky: Colour
    horizon: Colour
    cloud: Colour
    sea: Colour
    wave: Colour
    island: Colour
    tower: Colour
    stripe: Colour
    lamp: Colour
    roof: Colour


DAY = Palette(
    (86, 158, 222), (216, 236, 244), (250, 252, 252), (38, 104, 150), (62, 132, 176),
    (74, 110, 66), (244, 244, 240), (206, 54, 50), (250, 226, 120), (60, 60, 70),
)  # fmt: skip


def coast(colours: Palette) -> Image.Image:
    """Sea, island and lighthouse, at drawing size."""
    image = _sky(colours.sky, colours.horizon)
    clouds = [(96, 110, 26), (126, 100, 34), (160, 112, 24), (404, 74, 20), (428, 70, 26)]
    for x, y, radius in clouds:
        _disc(image, (x, y), radius, colours.cloud)
    draw = ImageDraw.Draw(image)
    draw.rectangle(_scaled([(0, 340), (SIZE, SIZE)]), fill=colours.sea)
    for row in range(350, SIZE, 14):
        ends = _scaled([(row % 60, row), (row % 60 + 380, row)])
        draw.line(ends, fill=colours.wave, width=4)
    island: Points = [(220, 350), (300, 280), (410, 268), (512, 330), (512, 380)]
    draw.polygon(_scaled(island), fill=colours.island)
    tower: Points = [(328, 284), (338, 150), (372, 150), (382, 284)]
    draw.polygon(_scaled(tower), fill=colours.tower)
    for y in (175, 225):
        stripe: Points = [(335, y), (375, y), (378, y + 25), (333, y + 25)]
        draw.polygon(_scaled(stripe), fill=colours.stripe)
    draw.rectangle(_scaled([(338, 122), (372, 150)]), fill=colours.lamp)
    draw.polygon(_scaled([(330, 124), (355, 96), (380, 124)]), fill=colours.roof)
    return image


def photo() -> Image.Image:
    """A bright landscape by day."""
    return _finish(coast(DAY))


def inpaint() -> Image.Image:
    """The photo with its lighthouse transparent: what is see-through is to be repainted."""
    keep = Image.new("L", (SIZE, SIZE), 255)
    ImageDraw.Draw(keep).rounded_rectangle((290, 70, 420, 310), radius=50, fill=0)
    image = photo().convert("RGBA")
    image.putalpha(keep.filter(ImageFilter.GaussianBlur(4)))
    return image


@dataclass(frozen=True)
class Clothes:
    """Colours of a traveller, and where the head is in pixels."""

    coat: Colour
    scarf: Colour
    collar: Colour
    cap: Colour
    veil: Colour
    head: tuple[float, float] = (256, 238)


RED_CAP = Clothes((34, 92, 80), (82, 150, 118), (52, 116, 96), (216, 44, 52), (40, 52, 214))
WHITE_CAP = Clothes((206, 148, 44), (240, 206, 120), (170, 112, 40), (246, 244, 238), (122, 62, 44))


def traveller(image: Image.Image, worn: Clothes, scale: float = 1.0) -> None:
    """Draw a person with a cap, a veil and a slit for the eyes onto a picture at drawing size.

    Args:
        image: Drawn on.
        worn: What the person wears, and where the head is.
        scale: 1 for a head of `HEAD`.
    """
    draw = ImageDraw.Draw(image)
    x, y = worn.head

    def polygon(points: Points, colour: Colour) -> None:
        moved: Points = [(x + (u - 256) * scale, y + (v - 238) * scale) for u, v in points]
        draw.polygon(_scaled(moved), fill=colour)

    shoulders: Points = [(72, 512), (92, 420), (134, 346), (196, 304)]
    shoulders += [(316, 304), (378, 346), (420, 420), (440, 512)]
    polygon([(72, 2 * SIZE), *shoulders, (440, 2 * SIZE)], worn.coat)
    polygon([(190, 308), (322, 308), (256, 470)], worn.scarf)
    polygon([(206, 286), (306, 286), (322, 308), (190, 308)], worn.collar)
    head = HEAD * scale
    _disc(image, (x, y), head, worn.veil)
    middle = y - 0.25 * head
    cap = [SMOOTH * edge for edge in (x - head, y - head, x + head, y + head)]
    draw.chord((cap[0], cap[1], cap[2], cap[3]), 180, 360, fill=worn.cap)
    left, right = x - 0.7 * head, x + 0.7 * head
    slit = [SMOOTH * v for v in (left, middle - 0.13 * head, right, middle + 0.13 * head)]
    draw.rounded_rectangle(
        (slit[0], slit[1], slit[2], slit[3]), 0.13 * head * SMOOTH, fill=(240, 226, 206)
    )
    for eye in (x - 0.38 * head, x + 0.38 * head):
        _disc(image, (eye, middle), 0.09 * head, (30, 34, 32))


def _among_hills() -> Image.Image:
    """A traveller with a red cap before green hills, at drawing size."""
    image = _sky((150, 178, 170), (226, 232, 206))
    _disc(image, (404, 104), 38, (246, 250, 222))
    draw = ImageDraw.Draw(image)
    _hills(draw, 330, 46, (150, 178, 136), 21)
    _hills(draw, 400, 40, (96, 140, 104), 24)
    traveller(image, RED_CAP)
    return image


def face() -> Image.Image:
    """A traveller with a red cap and a blue veil before green hills.

    The synthetic detector (tests/synthetic/face_models.py) takes a disc for a face whose upper half
    is red and whose lower half is blue. So nothing else may be redder or bluer than it is green.
    """
    return _finish(_among_hills())


def _close(image: Image.Image) -> Image.Image:
    """What is around the head of a traveller in a picture at drawing size."""
    x, y = RED_CAP.head
    far = 1.6 * HEAD
    left, top, right, bottom = (round(SMOOTH * v) for v in (x - far, y - far, x + far, y + far))
    large = image.crop((left, top, right, bottom)).resize(image.size, Image.Resampling.LANCZOS)
    return _finish(large.filter(ImageFilter.GaussianBlur(2.5)))


def portrait() -> Image.Image:
    """The traveller with the red cap from near by."""
    return _close(_among_hills())


def portrait_2() -> Image.Image:
    """A traveller with a white cap and a brown veil before dunes, from near by."""
    image = _sky((120, 176, 206), (244, 226, 188))
    draw = ImageDraw.Draw(image)
    _hills(draw, 320, 40, (232, 196, 140), 43)
    traveller(image, WHITE_CAP)
    return _close(image)


PICTURES = {
    "ip_adapter_reference.png": reference,
    "ip_adapter_reference_2.png": reference_2,
    "ip_adapter_pose.png": pose,
    "ip_adapter_depth.png": depth,
    "ip_adapter_photo.png": photo,
    "ip_adapter_inpaint.png": inpaint,
    "ip_adapter_face.png": face,
    "ip_adapter_portrait.png": portrait,
    "ip_adapter_portrait_2.png": portrait_2,
}


def write_pictures(folder: Path) -> None:
    """Write every picture that is not there yet.

    Args:
        folder: The host's input folder; made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        if not (folder / name).exists():
            draw().save(folder / name)
