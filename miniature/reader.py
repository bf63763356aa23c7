"""Read a scene's attributes off a picture by formula: no net, nothing trained.

The oracle of the evidence: whether a picture that the miniature made follows its image prompt and
its text is answered by least squares against what `world` paints, by no part of the miniature.

The ground is the colour nearest to the picture's median, each corner mark the colour nearest to its
corner's. The rest is analysis by synthesis. With the ground's colour ``g``, a shape's coverage
``c``, its outline ``l`` (zero without), a texture's brightness ``p`` and a colour ``k``, `world`
paints

    (1 - l) ((1 - c) g + c p k)  =  g - u g + k v,   u = 1 - (1 - l) (1 - c),   v = (1 - l) c p

so the squared distance between a picture and any scene is a few inner products with ``u`` and
``v``. Pixels are taken relative to the ground as it was measured, so a colour cast of the whole
picture cancels, and the corners are left out. Two passes: all shapes at all places on pixels
averaged two by two, then the best few on all pixels, sharp and blurred, because a blur that the
scene lacks would pass for a texture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import world

_SHIFTS = (-3.0, -1.5, 0.0, 1.5, 3.0)
_SCALES = (0.8, 0.9, 1.0, 1.1)
"""Cover what `world.draw` draws and a little more: a made picture need not keep to it."""

_BLURS = (0.0, 0.8, 1.3, 2.0)
"""Standard deviations, in pixels, that the second pass tries."""

_KEPT = 4
"""Scenes of the first pass that the second looks at, no two of one shape and style."""

_CHUNK = 32
"""Pictures that are compared at a time, for the memory: about 2 MB each."""


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        shape: One of `world.SHAPES`.
        texture: One of `world.TEXTURES`.
        colour: One of `world.COLOURS`.
        place: One of `world.PLACES`.
        ground: One of `world.GROUNDS`.
        marks: Numbers into `world.MARKS`, clockwise from the upper left corner.
        outlined: Whether a dark line is drawn around the shape. On a black ground such a line
            hardly shows and the answer is little better than a guess.
        error: Root mean square difference, in 0..1, from the best scene. The scenes that are tried
            lie up to a pixel beside the drawn one, so even a clean picture has some 0.03, or 0.06
            with an outline.
        mask: Where the shape is, ``[64, 64]`` bool; None where a bare ground explains the picture
            better than any shape. Shape, texture, colour and place are then but the nearest.
    """

    shape: str
    texture: str
    colour: str
    place: str
    ground: str
    marks: tuple[int, int, int, int]
    outlined: bool
    error: float
    mask: Tensor | None = field(repr=False, compare=False)


def read(pictures: Tensor) -> list[Reading]:
    """Read pictures; each reading depends on its own picture only.

    Args:
        pictures: ``[N, 3, 64, 64]`` in 0..1, of any floating type and device.

    Returns:
        One reading per picture.

    Raises:
        ValueError: If the pictures have another shape.
    """
    if pictures.ndim != 4 or pictures.shape[1:] != (3, world.SIZE, world.SIZE):
        raise ValueError(
            f"The reader needs pictures [N, 3, {world.SIZE}, {world.SIZE}]; "
            f"these are {list(pictures.shape)}."
        )
    pictures = pictures.detach().to("cpu", torch.float32).nan_to_num().clamp(0, 1)
    return [reading for chunk in torch.split(pictures, _CHUNK) for reading in _read(chunk)]


def agreement(reading: Reading, scene: world.Scene) -> dict[str, bool]:
    """Whether a picture shows what a scene says, attribute by attribute.

    Returns:
        By ``shape``, ``texture``, ``colour``, ``place``, ``ground`` and ``marks``; the last is true
        if all four are right. Where no shape was found the first four are false.
    """
    found = reading.mask is not None
    return {
        "shape": found and reading.shape == scene.shape,
        "texture": found and reading.texture == scene.texture,
        "colour": found and reading.colour == scene.colour,
        "place": found and reading.place == scene.place,
        "ground": reading.ground == scene.ground,
        "marks": reading.marks == scene.marks,
    }


def marks_right(reading: Reading, scene: world.Scene) -> float:
    """Share of the four corner marks that are as the scene says; guessing gives 0.25."""
    return sum(one == other for one, other in zip(reading.marks, scene.marks, strict=True)) / 4


_Guess = tuple[world.Scene, bool]
"""A scene that has no look yet, and whether its shape is outlined."""


@dataclass(frozen=True)
class _Maps:
    """``u``, then ``v`` of each of ``T`` textures, of ``S`` scenes, with their inner products."""

    maps: Tensor  # [S, 1 + T, pixels]
    uu: Tensor  # [S]
    uv: Tensor  # [S, T]
    vv: Tensor  # [S, T]

    @classmethod
    def of(cls, maps: Tensor) -> _Maps:
        u, v = maps[:, :1], maps[:, 1:]
        return cls(maps, u.square().sum((1, 2)), (u * v).sum(-1), v.square().sum(-1))

    def cost(self, seen: Tensor, g: Tensor) -> Tensor:
        """How much farther than a bare ground scenes are from pictures, squared.

        Beside its ground a scene is ``k v - g u``, so ``|seen - scene|^2 - |seen|^2`` is
        ``k.k vv - 2 k.g uv + g.g uu - 2 (k.seen v - g.seen u)``.

        Args:
            seen: Pictures relative to their grounds, ``[B, 3, pixels]``.
            g: The grounds' colours, ``[B, 3]``.

        Returns:
            ``[B, S, colours, T]``, negative where the scene is the better account.
        """
        k = _table(world.COLOURS.values())
        dots = seen @ self.maps.flatten(0, 1).T
        dots = dots.reshape(*seen.shape[:2], *self.maps.shape[:2])  # [B, 3, S, 1 + T]
        of_u = g.square().sum(-1)[:, None] * self.uu
        of_u = of_u + 2 * torch.einsum("bc,bcs->bs", g, dots[..., 0])
        kk = k.square().sum(-1)[:, None]
        kg = (g @ k.T)[:, None, :, None]
        cost = torch.einsum("kc,bcst->bskt", -2 * k, dots[..., 1:])
        cost += of_u[:, :, None, None]
        cost += kk * self.vv[:, None]
        cost -= 2 * kg * self.uv[:, None]
        return cost


@lru_cache(maxsize=1)
def _bank() -> tuple[list[_Guess], _Maps]:
    """All shapes at all places, without and with an outline, for the first pass."""
    guesses = [
        (world.Scene(shape, "plain", "red", place, "white", (0, 0, 0, 0), (x, y), scale), outlined)
        for outlined, shape, place, x, y, scale in itertools.product(
            (False, True), world.SHAPES, world.PLACES, _SHIFTS, _SHIFTS, _SCALES
        )
    ]
    parts = [_halve(_paint(guesses[at : at + 100])) for at in range(0, len(guesses), 100)]
    return guesses, _Maps.of(torch.cat(parts))


def _paint(guesses: Sequence[_Guess]) -> Tensor:
    """``u`` and ``v`` of guesses, with blank corners: ``[S, 1 + T, 64, 64]``."""
    cover = torch.stack([world.coverage(scene) for scene, _ in guesses])[:, None]
    keep = 1 - torch.stack([world.line(scene) * lined for scene, lined in guesses])[:, None]
    patterns = torch.stack([world.pattern(texture) for texture in world.TEXTURES])
    return torch.cat((1 - keep * (1 - cover), keep * cover * patterns), 1) * _inside()


@lru_cache(maxsize=1)
def _inside() -> Tensor:
    """Zero where corner marks are, with two pixels for their blur: ``[64, 64]``."""
    steps = torch.arange(world.SIZE)
    edge = torch.minimum(steps, world.SIZE - 1 - steps) < world.MARK + 2
    return 1.0 - (edge[:, None] & edge).float()


def _halve(maps: Tensor) -> Tensor:
    """Average two by two and lay pixels in a row: ``[..., 64, 64]`` to ``[..., 1024]``."""
    return F.avg_pool2d(maps, 2).flatten(-2)


def _read(pictures: Tensor) -> list[Reading]:
    """Read a chunk ``[B, 3, 64, 64]``."""
    # Most of every scene is ground, so the median is.
    here = pictures.flatten(2).median(-1).values
    grounds = _table(world.GROUNDS.values())
    ground = torch.cdist(here, grounds).argmin(-1)
    seen = (pictures - here[:, :, None, None]) * _inside()
    guesses = _first_pass(seen, grounds[ground])
    marks = _marks(pictures)
    readings = []
    for row, one in enumerate(seen):
        (scene, outlined), texture, colour, cost = _second_pass(
            one, grounds[ground[row]], guesses[row]
        )
        squares = (one.square().sum() + min(cost, 0.0)).clamp(min=0)
        readings.append(
            Reading(
                shape=scene.shape,
                texture=texture,
                colour=colour,
                place=scene.place,
                ground=list(world.GROUNDS)[int(ground[row])],
                marks=marks[row],
                outlined=outlined,
                error=float((squares / (3 * _inside().sum())).sqrt()),
                mask=world.coverage(scene) > 0.5 if cost < 0 else None,
            )
        )
    return readings


def _first_pass(seen: Tensor, g: Tensor) -> list[list[_Guess]]:
    """The best guess of each shape with and without an outline, and of these the best few."""
    guesses, maps = _bank()
    kinds = 2 * len(world.SHAPES)
    cost = maps.cost(_halve(seen), g).amin((2, 3))
    best = cost.reshape(len(cost), kinds, len(guesses) // kinds).min(-1)  # [B, kinds]
    kept = best.values.topk(_KEPT, largest=False).indices
    places = kept * (len(guesses) // kinds) + best.indices.gather(-1, kept)
    return [[guesses[place] for place in row] for row in places.tolist()]


def _second_pass(seen: Tensor, g: Tensor, guesses: list[_Guess]) -> tuple[_Guess, str, str, float]:
    """Choose a guess, its texture and colour; the last number is `_Maps.cost`.

    Args:
        seen: ``[3, 64, 64]``, relative to the ground, with blank corners.
        g: The ground's colour, ``[3]``.
        guesses: What to choose from.
    """
    maps = _blurs() @ _paint(guesses)[:, None] @ _blurs()  # [guesses, blurs, 1 + T, 64, 64]
    cost = _Maps.of(maps.flatten(0, 1).flatten(-2)).cost(seen.flatten(1)[None], g[None])[0]
    place, texture = divmod(int(cost.argmin()), cost.shape[2])
    place, colour = divmod(place, cost.shape[1])
    return (
        guesses[place // len(_BLURS)],
        world.TEXTURES[texture],
        list(world.COLOURS)[colour],
        float(cost.min()),
    )


@lru_cache(maxsize=1)
def _blurs() -> Tensor:
    """Gaussian blurs of a row of pixels as symmetric matrices, ``[blurs, 1, 64, 64]``."""
    steps = torch.arange(world.SIZE)
    away = (steps[:, None] - steps).float()
    blurs = []
    for sigma in _BLURS:
        weights = torch.exp(-0.5 * (away / sigma) ** 2) if sigma else torch.eye(world.SIZE)
        # Of an inner row, so that all rows are alike: what is blurred is zero at the edge.
        blurs.append(weights / weights[world.SIZE // 2].sum())
    return torch.stack(blurs)[:, None]


def _marks(pictures: Tensor) -> list[tuple[int, int, int, int]]:
    """The mark nearest to each corner's median, clockwise from the upper left."""
    near, far = slice(None, world.MARK), slice(-world.MARK, None)
    corners = [
        pictures[:, :, y, x] for y, x in ((near, near), (near, far), (far, far), (far, near))
    ]
    seen = torch.stack([corner.flatten(2).median(-1).values for corner in corners], 1)
    nearest = torch.cdist(seen, _table(world.MARKS)).argmin(-1).tolist()
    return [(a, b, c, d) for a, b, c, d in nearest]


def _table(colours: Iterable[world.Colour]) -> Tensor:
    return torch.tensor(list(colours))
