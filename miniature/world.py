"""The world that the miniature knows: one textured shape on a ground, and marks in the corners.

Endless and seeded. A scene has attributes that a caption may name or leave open, so that text and
image can each carry what the other does not: shape, texture, colour, place, ground. The corner
marks are never named; they are the fine detail that only a picture can give.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from PIL import Image
from torch import Tensor

SIZE = 64
"""Width and height of a picture in pixels."""

MARK = 8
"""Width and height of a corner mark in pixels."""

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.12, 0.25, 0.86),
    "yellow": (0.96, 0.84, 0.10),
    "purple": (0.52, 0.14, 0.70),
    "orange": (0.96, 0.52, 0.08),
    "cyan": (0.10, 0.76, 0.80),
    "pink": (0.96, 0.46, 0.70),
}
GROUNDS: dict[str, Colour] = {
    "white": (0.96, 0.96, 0.96),
    "grey": (0.55, 0.55, 0.55),
    "black": (0.06, 0.06, 0.06),
    "sand": (0.87, 0.78, 0.60),
    "mint": (0.72, 0.90, 0.78),
    "navy": (0.10, 0.14, 0.32),
}
MARKS: tuple[Colour, ...] = ((0.9, 0.1, 0.1), (0.1, 0.7, 0.2), (0.15, 0.3, 0.95), (0.95, 0.85, 0.1))
"""Colours of the corner marks; in these, not in words, lies the detail of a picture."""

SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
TEXTURES = ("plain", "striped", "checked", "dotted")
PLACES: dict[str, tuple[float, float]] = {
    "centre": (0.0, 0.0),
    "left": (-13.0, 0.0),
    "right": (13.0, 0.0),
    "top": (0.0, -13.0),
    "bottom": (0.0, 13.0),
}
RADIUS = 14.0
"""Of a shape in pixels, give or take."""

PERIOD = 8.0
"""Of the textures in pixels: a cell of the VAE's grid, so that a VAE this small can keep them."""

LINE = 3.0
"""Width of the line around a shape in the fine-tune's style, in pixels."""

LOOK = ("texture", "colour", "ground")
"""The attributes of how things look; the others say what is where."""


@dataclass(frozen=True)
class Scene:
    """One picture in words and numbers.

    Attributes:
        shape: One of `SHAPES`.
        texture: One of `TEXTURES`.
        colour: One of `COLOURS`.
        place: One of `PLACES`.
        ground: One of `GROUNDS`.
        marks: Numbers into `MARKS`, clockwise from the upper left corner.
        shift: (x, y) in pixels beside the place.
        scale: Factor of the radius.
    """

    shape: str
    texture: str
    colour: str
    place: str
    ground: str
    marks: tuple[int, int, int, int]
    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0


NAMED = ("texture", "colour", "shape", "place", "ground")
"""The attributes that captions can name, in the order in which they do."""

_CHOICES: dict[str, Sequence[str]] = {
    "shape": SHAPES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "place": tuple(PLACES),
    "ground": tuple(GROUNDS),
}


def is_held_out(scene: Scene) -> bool:
    """Whether a combination of shape, colour and texture is kept from training: one in eight."""
    place = (
        SHAPES.index(scene.shape) * 5
        + list(COLOURS).index(scene.colour) * 3
        + TEXTURES.index(scene.texture) * 2
    )
    return place % 8 == 0


def draw(rng: random.Random, *, held_out: bool = False) -> Scene:
    """Draw a scene, of the combinations for training or of those kept from it."""
    while True:
        scene = Scene(
            **{name: rng.choice(options) for name, options in _CHOICES.items()},
            marks=(rng.randrange(4), rng.randrange(4), rng.randrange(4), rng.randrange(4)),
            shift=(rng.uniform(-2.5, 2.5), rng.uniform(-2.5, 2.5)),
            scale=rng.uniform(0.85, 1.1),
        )
        if is_held_out(scene) == held_out:
            return scene


def like(scene: Scene, rng: random.Random) -> Scene:
    """Another scene with the same look and marks at another place, as a rule of another shape.

    One for training comes of one for training, one that is held out of one that is.
    """
    while True:
        other = replace(
            draw(rng),
            texture=scene.texture,
            colour=scene.colour,
            ground=scene.ground,
            marks=scene.marks,
        )
        if rng.random() < 0.2:
            other = replace(other, shape=scene.shape)
        if is_held_out(other) == is_held_out(scene):
            return other


def caption(scene: Scene, names: Sequence[str] = NAMED) -> str:
    """Say a scene in words, with the attributes that are asked for only.

    ``a striped red circle left on sand``; ``circle`` becomes ``thing`` where it is left open.
    """
    words = []
    if "texture" in names:
        words.append(scene.texture)
    if "colour" in names:
        words.append(scene.colour)
    words.append(scene.shape if "shape" in names else "thing")
    if "place" in names:
        words.append(scene.place)
    if "ground" in names:
        words += ["on", scene.ground]
    return " ".join(words) if set(names) & set(NAMED) else ""


def some_names(rng: random.Random, keep: float = 0.6) -> tuple[str, ...]:
    """Attributes to name, each with this probability."""
    return tuple(name for name in NAMED if rng.random() < keep)


def render(scenes: Sequence[Scene], *, outlined: bool = False) -> Tensor:
    """Paint scenes: ``[N, 3, 64, 64]`` in 0..1, with smooth edges.

    Args:
        scenes: What to paint.
        outlined: Draw a dark line around each shape, which is the style of the fine-tuned base.
    """
    return torch.stack([_paint(scene, outlined) for scene in scenes])


def pil(pictures: Tensor) -> list[Image.Image]:
    """``[N, 3, H, W]`` in 0..1 as 8-bit pictures."""
    levels = (pictures.movedim(1, -1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(one) for one in levels]


def outlines(scenes: Sequence[Scene]) -> Tensor:
    """White shapes on black, ``[N, 3, 64, 64]``: what the ControlNet reads."""
    return torch.stack([coverage(scene).expand(3, SIZE, SIZE) for scene in scenes])


_STEPS = torch.arange(SIZE, dtype=torch.float32) - (SIZE - 1) / 2
_Y, _X = torch.meshgrid(_STEPS, _STEPS, indexing="ij")


def coverage(scene: Scene) -> Tensor:
    """How much of each pixel the shape covers, ``[64, 64]`` in 0..1."""
    x0, y0 = PLACES[scene.place]
    x = _X - x0 - scene.shift[0]
    y = _Y - y0 - scene.shift[1]
    return (0.5 - _distance(scene.shape, x, y, RADIUS * scene.scale)).clamp(0, 1)


def line(scene: Scene) -> Tensor:
    """How much of each pixel the outline of the fine-tune's style covers, ``[64, 64]`` in 0..1."""
    x0, y0 = PLACES[scene.place]
    x = _X - x0 - scene.shift[0]
    y = _Y - y0 - scene.shift[1]
    away = _distance(scene.shape, x, y, RADIUS * scene.scale)
    return (LINE / 2 + 0.5 - (away - LINE / 2).abs()).clamp(0, 1)


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """About how far a pixel is outside of a shape, in pixels; negative inside."""
    r = torch.sqrt(x * x + y * y)
    match shape:
        case "circle":
            return r - radius
        case "square":
            return torch.maximum(x.abs(), y.abs()) - 0.86 * radius
        case "triangle":
            side = 0.866 * x.abs() - 0.5 * (y + radius)
            return torch.maximum(side, y - 0.8 * radius)
        case "ring":
            return (r - 0.75 * radius).abs() - 0.28 * radius
        case "cross":
            arm = 0.33 * radius
            upright = torch.maximum(x.abs() - arm, y.abs() - radius)
            level = torch.maximum(x.abs() - radius, y.abs() - arm)
            return torch.minimum(upright, level)
        case "diamond":
            return (x.abs() + y.abs() - 1.15 * radius) * 0.707
    raise ValueError(f"There is no shape {shape!r}; there are {', '.join(SHAPES)}.")


def pattern(texture: str) -> Tensor:
    """Brightness of a texture, ``[64, 64]``."""
    match texture:
        case "plain":
            return torch.ones(SIZE, SIZE)
        case "striped":
            bright = (_X + _Y) % PERIOD < PERIOD / 2
        case "checked":
            bright = (_X // (PERIOD / 2) + _Y // (PERIOD / 2)) % 2 == 0
        case "dotted":
            dx, dy = _X % PERIOD - PERIOD / 2, _Y % PERIOD - PERIOD / 2
            bright = dx * dx + dy * dy > 2.6**2
        case _:
            raise ValueError(f"There is no texture {texture!r}; there are {', '.join(TEXTURES)}.")
    return torch.where(bright, 1.0, 0.35)


def _paint(scene: Scene, outlined: bool) -> Tensor:
    ground = torch.tensor(GROUNDS[scene.ground]).view(3, 1, 1).expand(3, SIZE, SIZE).clone()
    corners = ((0, 0), (0, SIZE - MARK), (SIZE - MARK, SIZE - MARK), (SIZE - MARK, 0))
    for (top, left), mark in zip(corners, scene.marks, strict=True):
        ground[:, top : top + MARK, left : left + MARK] = torch.tensor(MARKS[mark]).view(3, 1, 1)
    colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1) * pattern(scene.texture)
    inside = coverage(scene)
    picture = ground * (1 - inside) + colour * inside
    if outlined:
        picture = picture * (1 - line(scene))
    return picture


def same(one: Scene, other: Scene) -> dict[str, bool]:
    """Which named attributes two scenes share."""
    return {
        field.name: getattr(one, field.name) == getattr(other, field.name)
        for field in fields(Scene)
        if field.name in NAMED
    }
