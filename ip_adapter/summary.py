"""What acts on a MODEL, as values and in words: each image prompt, its layers, steps and places.

`host.inspection` finds it, `diagram` draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from torch import Tensor

from .attention import Scaling
from .influence import Timing
from .layers import Block, Family, transformers
from .spec import GUESSED, AdapterSpec

Part = Literal["down", "middle", "up"]

_PARTS: dict[Block, Part] = {"input": "down", "middle": "middle", "output": "up"}

_LISTED = 6
"""Factors of pictures that a line names."""

CONNECT = (
    "Connect the MODEL that comes out of Apply IP-Adapter, Apply Image Prompt Regions or another "
    "node that applies one. It has to be the same one that goes to the sampler."
)


@dataclass(frozen=True)
class Cell:
    """One layer as users number layers: a spatial transformer of the UNet.

    Attributes:
        place: Its number, from 0 in the order in which the UNet runs them.
        part: Where it is.
        weights: Of each cross-attention layer in it; one in SD 1.5, 2 or 10 in SDXL.
        is_opposed: Whether the image is given to the negative side there.
    """

    place: int
    part: Part
    weights: tuple[float, ...]
    is_opposed: bool = False


@dataclass(frozen=True, eq=False)
class Applied:
    """One image prompt as it is applied to a MODEL.

    Attributes:
        file: The adapter's file.
        spec: What that file holds.
        tokens: The number T of image tokens.
        references: Of how many references they are, or None where that cannot be told.
        frames: The number of pictures of a batch that have a prompt of their own.
        weights: The paper's lambda by layer number; none where it is missing.
        opposed: Layers in which the image is given to the negative side.
        timing: When it acts.
        mask: ``[M, H, W]`` in image space, or None for everywhere.
        factors: Of the weight for each picture of a batch; empty for 1.
        scaling: What the weight multiplies.
        notes: What else is to be said, a sentence each.
    """

    file: str
    spec: AdapterSpec
    tokens: int
    references: int | None
    weights: Mapping[int, float]
    frames: int = 1
    opposed: frozenset[int] = frozenset()
    timing: Timing = field(default_factory=Timing)
    mask: Tensor | None = None
    factors: tuple[float, ...] = ()
    scaling: Scaling = "V only"
    notes: tuple[str, ...] = ()

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The layers in the order in which the UNet runs them."""
        return cells(self.spec.family, self.weights, self.opposed)

    @property
    def idle(self) -> str:
        """Why it has no effect at all; empty where it has one."""
        if not any(self.weights.values()):
            return "its weight is 0 in every layer"
        if self.factors and not any(self.factors):
            return "its weight is 0 for every picture"
        if self.mask is not None and not bool((self.mask > 0).any()):
            return "its mask is 0 everywhere"
        if self.timing.start > self.timing.end:
            return "its two step windows have no step in common"
        if not any(factor_at(self.timing, step / 1000) for step in range(1001)):
            return "its keyframes are 0 in all of its steps"
        return ""

    def kind(self) -> str:
        """Which adapter it is and what it reads."""
        return f"{self.spec.variant} for {self.spec.family.name}, reads {self.spec.needs}"

    def amount(self) -> str:
        """How many tokens of how many references."""
        text = _many(self.tokens, "token")
        if self.references is not None:
            text += f" of {_many(self.references, self._reference)}"
        return text + (f", for each of {self.frames} pictures" if self.frames > 1 else "")

    def strength(self) -> str:
        """The weights of its layers."""
        found = self.cells
        levels = {weight for cell in found for weight in cell.weights}
        if len(levels) == 1 and not any(cell.is_opposed for cell in found):
            return f"weight {number(levels.pop())} in all {len(found)} layers"
        acting = [span for span in _spans(found, _kind) if any(span[0].weights)]
        text = ", ".join(f"{_places(span)}: {_weights(span[0])}" for span in acting)
        counted = sum(len(span) for span in acting)
        return f"weights of the layers: {text}" + (", the others 0" if counted < len(found) else "")

    def steps(self) -> str:
        """When it acts."""
        timing = self.timing
        if timing.is_constant:
            return "all steps"
        text = f"steps {timing.start:.0%} to {timing.end:.0%}"
        if timing.start <= 0 and timing.end >= 1:
            text = "all steps"
        if timing.curve is not None:
            keyframes = ", ".join(f"{number(v)} at {p:.0%}" for p, v in timing.curve.keyframes)
            text += f", weight times {keyframes}"
        return text

    def place(self) -> str:
        """Where in the picture it acts."""
        if self.mask is None:
            return "whole picture"
        if len(self.mask) == 1:
            return f"mask, {self._share} of the picture"
        return f"masks of {len(self.mask)} pictures, {self._share} of each"

    def place_in_short(self) -> str:
        """The same in a few letters."""
        if self.mask is None:
            return "whole picture"
        return f"{_many(len(self.mask), 'mask')}, {self._share}"

    def facts(self) -> list[str]:
        """What is unusual about it, a line each."""
        lines = []
        opposed = [span for span in _spans(self.cells, _side) if span[0].is_opposed]
        if opposed:
            places = ", ".join(_places(span) for span in opposed)
            lines.append(
                f"Against the image in layer{'' if places.isdigit() else 's'} {places}: "
                "guidance leads away from it there, which needs a CFG above 1."
            )
        if self.factors:
            lines.append(f"Weight of each picture: times {_few(self.factors)}.")
        if self.scaling != "V only":
            lines.append(f"The weight multiplies {self.scaling}.")
        if self.spec.evidence in GUESSED and self.spec.alternatives:
            others = " or ".join(self.spec.alternatives)
            lines.append(
                f"Its kind is a guess, {others} would have equal tensors: 'variant' in Load "
                "IP-Adapter corrects it."
            )
        return lines

    @property
    def _share(self) -> str:
        """How much of the picture its masks let through, or of each picture."""
        assert self.mask is not None
        shares = [float(one) for one in self.mask.float().mean(dim=(1, 2))]
        low, high = percent(min(shares)), percent(max(shares))
        return low if low == high else f"{low} to {high}"

    @property
    def _reference(self) -> str:
        return "reference" if self.spec.projection.face is None else "face"


@dataclass(frozen=True, eq=False)
class Summary:
    """What acts on a MODEL.

    Attributes:
        base: What the model is, in a word or two.
        family: Its family, or None where adapters for it are not supported.
        applied: The image prompts in the order of the chain.
        notes: What else matters on this model, a sentence each.
    """

    base: str
    family: Family | None
    applied: tuple[Applied, ...] = ()
    notes: tuple[str, ...] = ()

    def headline(self) -> str:
        """One line."""
        count = len(self.applied)
        what = _many(count, "image prompt") if count else "No image prompt"
        return f"{what} on this {self.base} model"

    def advice(self) -> str:
        """What to do where there is no image prompt."""
        if self.family is None:
            return (
                "IP-Adapters for this kind of model are not supported. Load a checkpoint of "
                "SD 1.5, SD 2.x, SDXL or Kolors."
            )
        return CONNECT

    def words(self) -> str:
        """All of it, on lines."""
        lines = [self.headline()]
        if not self.applied:
            lines.append(self.advice())
        for place, one in enumerate(self.applied, start=1):
            lines += ["", f"{place}. {one.file}", *(f"   {line}" for line in in_lines(one))]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)


def in_lines(one: Applied) -> list[str]:
    """What is said of one image prompt, without its file."""
    lines = [one.kind(), one.amount(), one.strength(), one.steps(), one.place()]
    lines += [*one.facts(), *one.notes]
    if one.idle:
        lines.insert(0, f"no effect: {one.idle}")
    return lines


def cells(
    family: Family, weights: Mapping[int, float], opposed: frozenset[int] = frozenset()
) -> tuple[Cell, ...]:
    """The layers of a family with weights.

    Args:
        family: Whose UNet.
        weights: By layer number; 0 where it is missing.
        opposed: See `Applied.opposed`; a layer of weight 0 does not count.
    """
    parts = {layer.index: _PARTS[layer.address[0]] for layer in family.layers}
    return tuple(
        Cell(
            place,
            parts[numbers[0]],
            tuple(weights.get(layer, 0.0) for layer in numbers),
            any(layer in opposed and weights.get(layer, 0.0) != 0 for layer in numbers),
        )
        for place, numbers in enumerate(transformers(family))
    )


def factor_at(timing: Timing, fraction: float) -> float:
    """Factor of the weights at a fraction of the schedule; 0 outside of the window."""
    if not timing.start <= fraction <= timing.end:
        return 0.0
    return 1.0 if timing.curve is None else timing.curve.at(fraction)


def number(value: float) -> str:
    """A weight in as few letters as tell it."""
    if abs(value) < 0.1:
        return f"{value + 0.0:.2g}"  # + 0.0: no minus before nothing
    return f"{round(value, 2):g}"


def percent(share: float) -> str:
    """A share of 0..1; what is not nothing or all is never called so."""
    if 0 < share < 0.01:
        return "under 1%"
    return f"{min(share, 0.99) if share < 1 else share:.0%}"


def _spans(shown: Sequence[Cell], key: Callable[[Cell], object]) -> list[list[Cell]]:
    """Neighbours that are alike."""
    return [list(span) for _, span in groupby(shown, key)]


def _kind(cell: Cell) -> object:
    return min(cell.weights), max(cell.weights), cell.is_opposed


def _side(cell: Cell) -> object:
    return cell.is_opposed


def _places(span: Sequence[Cell]) -> str:
    first, last = span[0].place, span[-1].place
    return f"{first}" if first == last else f"{first}-{last}"


def _weights(cell: Cell) -> str:
    low, high = number(min(cell.weights)), number(max(cell.weights))
    return (low if low == high else f"{low} to {high}") + (" against" if cell.is_opposed else "")


def _few(factors: Sequence[float]) -> str:
    text = ", ".join(number(factor) for factor in factors[:_LISTED])
    more = len(factors) - _LISTED
    return f"{text} and {more} more" if more > 0 else text


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
