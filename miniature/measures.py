"""Figures with intervals, tables of them, and the lab in which the evidence is measured.

What a picture shows is read by `miniature.reader`, which is a formula and has learnt nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ip_adapter.evaluate import metrics, scorer

from . import family, reader, world
from .studio import Studio
from .world import Scene

SEED = 20
"""Of the scenes that are drawn."""

NOISE = 1000
"""Seed of the first picture's noise, the same in every condition: differences are paired."""

GROUPS: dict[str, tuple[str, ...]] = {"look": world.LOOK, "layout": ("shape", "place")}
"""Figures that are the mean of several attributes: how things look, and what is where."""

OPTIONS: dict[str, int] = {
    "texture": len(world.TEXTURES),
    "colour": len(world.COLOURS),
    "ground": len(world.GROUNDS),
    "shape": len(world.SHAPES),
    "place": len(world.PLACES),
    "marks": len(world.MARKS),
}

ALL = ("texture", "colour", "ground", "look", "shape", "place", "marks")

Z = 1.959964
"""Of the normal distribution: 95 % lie within."""

Bounds = Literal["Wilson", "bootstrap", "standard error", "seeds", "exact"]


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        value: The mean.
        low: Of its interval.
        high: Of its interval.
        n: Pictures that it is measured on.
        bounds: What the interval is: 95 % after Wilson (of a share), by bootstrap over pictures
            (of any other mean), or by 1.96 standard errors over samples; the least and the greatest
            mean of several training seeds; or nothing, where the figure follows from counting.
    """

    value: float
    low: float
    high: float
    n: int
    bounds: Bounds


def share(values: Sequence[float]) -> Figure:
    """Share of true ones, with Wilson's interval.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212.
    """
    n = len(values)
    p = sum(values) / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return Figure(p, max(centre - half, 0.0), min(centre + half, 1.0), n, "Wilson")


def mean(values: Sequence[float], resamples: int = 2000) -> Figure:
    """Mean, with the percentiles of means of resampled pictures (seeded)."""
    seen = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(seen), (resamples, len(seen)), generator=generator)
    low, high = torch.quantile(
        seen[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return Figure(float(seen.mean()), low, high, len(seen), "bootstrap")


def over_seeds(figures: Sequence[Figure]) -> Figure:
    """Mean over training seeds with the least and the greatest."""
    values = [figure.value for figure in figures]
    pictures = sum(figure.n for figure in figures)
    return Figure(sum(values) / len(values), min(values), max(values), pictures, "seeds")


def summary(found: metrics.Summary) -> Figure:
    """The evaluator's summary with 1.96 standard errors on either side."""
    half = Z * (found.standard_error or 0.0)
    return Figure(
        found.mean, found.mean - half, found.mean + half, found.pictures, "standard error"
    )


def exact(value: float) -> Figure:
    """A number that follows from counting."""
    return Figure(value, value, value, 0, "exact")


def chance(name: str) -> float:
    """What any answer that does not depend on the scene gets: one over the number of options.

    It holds for shape, colour and texture also where the scenes are those held out, for each of
    them is as frequent there as the others.
    """
    parts = GROUPS.get(name, (name,))
    return sum(1 / OPTIONS[part] for part in parts) / len(parts)


def verdict(one: Figure, other: Figure) -> str:
    """How a figure over seeds compares with another one."""
    if one.low > other.high:
        return "higher with every seed"
    if one.high < other.low:
        return "lower with every seed"
    return "not clear of the spread over seeds"


@dataclass(frozen=True)
class Table:
    """Figures by row and column.

    Attributes:
        title: What the rows have in common.
        columns: Names of the figures.
        rows: By name, as many figures as columns; None where a figure has no meaning.
    """

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Figure | None, ...]]

    def __getitem__(self, place: tuple[str, str]) -> Figure:
        """The figure in a row and a column."""
        row, column = place
        found = self.rows[row][self.columns.index(column)]
        if found is None:
            raise KeyError(place)
        return found

    def column(self, name: str) -> list[float]:
        """Values of one column, row by row."""
        return [self[row, name].value for row in self.rows]


@dataclass(frozen=True, eq=False)
class Shots:
    """Pictures of one condition.

    Attributes:
        pictures: ``[N, 3, 64, 64]`` in 0..1.
        latents: ``[N, 4, 8, 8]``, as the sampler left them.
        start: The same of the pictures that were started from, if there were any.
        clip: Embeds pictures.
    """

    pictures: Tensor
    latents: Tensor
    start: Tensor | None = None
    clip: scorer.Scorer | None = field(default=None, repr=False)

    @cached_property
    def readings(self) -> list[reader.Reading]:
        """What they show."""
        return reader.read(self.pictures)

    @cached_property
    def embedded(self) -> Tensor:
        """``[N, E]`` in CLIP's space."""
        assert self.clip is not None
        return self.clip.images(world.pil(self.pictures))

    def agreement(self, scenes: Sequence[Scene], name: str) -> Figure:
        """How far pictures show what scenes, one each, say of an attribute or of a group."""
        if name in GROUPS:
            return mean(self.values(scenes, name))
        if name == "marks":
            return mean(self.values(scenes, name))
        return share(self.values(scenes, name))

    def values(self, scenes: Sequence[Scene], name: str) -> list[float]:
        """As `agreement`, picture by picture."""
        pairs = zip(self.readings, scenes, strict=True)
        if name == "marks":
            return [reader.marks_right(reading, scene) for reading, scene in pairs]
        parts = GROUPS.get(name, (name,))
        found = [reader.agreement(reading, scene) for reading, scene in pairs]
        return [sum(one[part] for part in parts) / len(parts) for one in found]

    def line(self, scenes: Sequence[Scene], names: Sequence[str]) -> tuple[Figure, ...]:
        """A row of a table."""
        return tuple(self.agreement(scenes, name) for name in names)

    def outlined(self) -> Figure:
        """Share with a dark line around the shape, of those on which one can be told.

        That is not so on a black ground, nor where no shape is found.
        """
        told = [r for r in self.readings if r.mask is not None and r.ground != "black"]
        return share([float(reading.outlined) for reading in told])

    def clip_i(self, references: Tensor) -> Figure:
        """CLIP-I with one picture for each reference ``[N, E]``."""
        return summary(metrics.summarise(metrics.clip_i(self.embedded[:, None], references)))


class _Watched:
    """A VAE that keeps the latents which go through it."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self.encoded: list[Tensor] = []
        self.decoded: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, pictures: Tensor) -> Tensor:
        found: Tensor = self._vae.encode(pictures)
        self.encoded.append(found)
        return found

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents)
        found: Tensor = self._vae.decode(latents)
        return found


_USUAL = {"on": "base", "weight": 1.0}
"""What `Studio.make` does unless told: a condition is the same whether it is said or not."""

Mask = Literal["half", "shape"]
"""Where inpainting may change a picture: its left half, or the latents that its shape touches."""


class Lab:
    """Scenes that were kept from training, and pictures for them, each condition made once.

    Attributes:
        studio: Makes the pictures.
        count: Pictures in a condition.
        references: What reference pictures show; held out.
        others: Scenes that share no named attribute with the reference of the same row; held out.
        targets: What text and reference together ask for; held out.
        givers: What the reference then shows: the target's look and marks, but another shape at
            another place. No second shape of the same look is held out, so these are not.
    """

    def __init__(self, studio: Studio, count: int, seed: int = SEED) -> None:
        self.studio = studio
        self.count = count
        rng = random.Random(seed)
        self.references = [world.draw(rng, held_out=True) for _ in range(count)]
        self.others = [_unlike(scene, rng) for scene in self.references]
        self.targets = [world.draw(rng, held_out=True) for _ in range(count)]
        self.givers = [_elsewhere(scene, rng) for scene in self.targets]
        self._made: dict[Any, Shots] = {}

    @cached_property
    def clip(self) -> scorer.Scorer:
        """The miniature's own CLIP, in the evaluator's hands."""
        return scorer.load_clip(f"local-dir:{family.CLIP}")

    def make(
        self,
        texts: Sequence[str] | None = None,
        references: Sequence[Scene] | None = None,
        *,
        hints: Sequence[Scene] | None = None,
        starts: Sequence[Scene] | None = None,
        mask: Mask | None = None,
        **how: Any,
    ) -> Shots:
        """Pictures for texts, references, hints and starts of equal number.

        Args:
            texts: None for no text.
            references: Scenes that the reference pictures show.
            hints: Scenes whose silhouettes the ControlNet reads.
            starts: Scenes to start from.
            mask: Where the start may change.
            how: Further arguments of `Studio.make`, such as ``adapter``.
        """
        given = next((x for x in (texts, references, hints, starts) if x is not None), None)
        count = self.count if given is None else len(given)
        how = {name: value for name, value in how.items() if _USUAL.get(name) != value}
        # The masks that a key needs follow from the scenes, so scenes and words are the whole key.
        key = tuple(None if x is None else tuple(x) for x in (texts, references, hints, starts))
        key = (*key, count, mask, *sorted(how.items()))
        if key not in self._made:
            vae = _Watched(self.studio.models.vae)
            models = replace(self.studio.models, vae=vae)
            pictures = replace(self.studio, models=models).make(
                texts if texts is not None else [""] * count,
                references=None if references is None else world.render(references),
                hints=None if hints is None else world.outlines(hints),
                start=None if starts is None else world.render(starts),
                mask=None if starts is None or mask is None else masks(starts, mask),
                seed=NOISE,
                **how,
            )
            self._made[key] = Shots(
                pictures,
                torch.cat(vae.decoded),
                torch.cat(vae.encoded) if vae.encoded else None,
                self.clip,
            )
        return self._made[key]

    def shown(self, scenes: Sequence[Scene], *, coded: bool = False) -> Shots:
        """Scenes as they are painted, or as the VAE gives them back."""
        pictures = world.render(scenes)
        with torch.inference_mode():
            latents = self.studio.models.vae.encode(pictures.movedim(1, -1))
            if coded:
                pictures = self.decode(latents)
        return Shots(pictures, latents, clip=self.clip)

    def decode(self, latents: Tensor) -> Tensor:
        """``[N, 4, 8, 8]`` -> ``[N, 3, 64, 64]`` in 0..1."""
        with torch.inference_mode():
            found: Tensor = self.studio.models.vae.decode(latents).movedim(-1, 1)
        return found.float().clamp(0, 1)


def masks(scenes: Sequence[Scene], kind: Mask) -> Tensor:
    """``[N, 64, 64]`` of zeros and ones, whole latents each."""
    found = torch.zeros(len(scenes), world.SIZE, world.SIZE)
    if kind == "half":
        found[:, :, : world.SIZE // 2] = 1.0
        return found
    covers = torch.stack([world.coverage(scene) for scene in scenes])[:, None]
    touched = (F.max_pool2d(covers, 8) > 0).float()
    return F.interpolate(touched, scale_factor=8.0, mode="nearest")[:, 0]


def shuffled(scenes: Sequence[Scene]) -> list[Scene]:
    """Each row gets the scene of the next one, so none its own."""
    return [*scenes[1:], scenes[0]]


def _unlike(scene: Scene, rng: random.Random) -> Scene:
    while True:
        other = world.draw(rng, held_out=True)
        if not any(world.same(scene, other).values()):
            return other


def _elsewhere(scene: Scene, rng: random.Random) -> Scene:
    while True:
        drawn = world.draw(rng)
        if drawn.shape != scene.shape and drawn.place != scene.place:
            same = {name: getattr(scene, name) for name in (*world.LOOK, "marks")}
            return replace(drawn, **same)
