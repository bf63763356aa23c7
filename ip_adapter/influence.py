"""How strongly, where and when an image prompt acts; one value that several appliers may share.

All of it multiplies: the weight of each layer, the factor of the moment, the mask. A window and a
curve are laid over the schedule, whose fraction 0 is pure noise and 1 the finished picture.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast, get_args

from torch import Tensor

from . import presets
from .attention import Scaling
from .errors import InfluenceError
from .layers import Family
from .presets import LayerWeights

EXAMPLE = "0:1, 0.4:1, 0.6:0"
FRAMES = "0:0, 8:1, 15:0"


@dataclass(frozen=True)
class Curve:
    """Factor of the weight over the schedule: straight lines between keyframes.

    Attributes:
        keyframes: ``(fraction, factor)`` in order; before the first and after the last the factor
            stays.
    """

    keyframes: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        fractions = [fraction for fraction, _ in self.keyframes]
        if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
            raise InfluenceError(
                f"The keyframes are at {fractions}; needed is at least one, each at a fraction of "
                f"the schedule from 0 to 1, such as '{EXAMPLE}'."
            )
        _check_finite([factor for _, factor in self.keyframes])
        if any(later <= earlier for earlier, later in pairwise(fractions)):
            raise InfluenceError(
                f"The keyframes are at {fractions}; each must be later than the one before."
            )

    def at(self, fraction: float) -> float:
        """The factor at a fraction of the schedule."""
        fractions = [place for place, _ in self.keyframes]
        after = bisect_right(fractions, fraction)
        if after == 0:
            return self.keyframes[0][1]
        if after == len(self.keyframes):
            return self.keyframes[-1][1]
        (start, low), (end, high) = self.keyframes[after - 1 : after + 1]
        return low + (high - low) * (fraction - start) / (end - start)


@dataclass(frozen=True, eq=False)
class Influence:
    """How strongly, where and when.

    Attributes:
        weight: The paper's lambda.
        layers: Where in the network: a preset's name, a text such as ``"3:1, 6:0.5"`` (see
            `presets.parse`), diffusers' dictionary of scales as JSON (see `presets.from_scales`),
            weights by the numbers of layers (layers not named get none), or a whole plan.
        composition: Weight of the composition layers, for presets that have them apart.
        style_boost: See `presets.layer_weights`.
        composition_boost: See `presets.layer_weights`.
        start: Fraction of the schedule at which it begins to act.
        end: Fraction at which it stops.
        curve: Factor of the weight in between, or None.
        mask: ``[H, W]`` or ``[M, H, W]`` in image space, or None for everywhere.
        frames: Factor of the weight for each picture of a batch, the last one for those that come
            after; none of it for every picture alike.
        scaling: What the weight multiplies; see `attention.scale`.
    """

    weight: float = 1.0
    layers: str | Mapping[int, float] | LayerWeights = "linear"
    composition: float | None = None
    style_boost: float | None = None
    composition_boost: float | None = None
    start: float = 0.0
    end: float = 1.0
    curve: Curve | None = None
    mask: Tensor | None = None
    frames: tuple[float, ...] = ()
    scaling: Scaling = "V only"

    def __post_init__(self) -> None:
        check_window(self.start, self.end)
        _check_finite(self.frames)
        if self.scaling not in get_args(Scaling):
            raise InfluenceError(
                f"Unknown scaling {self.scaling!r}; needed is one of "
                f"{', '.join(get_args(Scaling))}."
            )

    def __deepcopy__(self, memo: object) -> Influence:
        return self

    def on(self, family: Family) -> LayerWeights:
        """The weight of every layer of a family.

        Raises:
            InfluenceError: The text means nothing, or a layer is named that is not there.
        """
        if isinstance(self.layers, str):
            if self.layers.lstrip().startswith("{"):
                return self._scaled(presets.from_scales(_read_json(self.layers), family))
            if self.layers not in presets.PRESETS:
                return presets.parse(self.layers, family, self.weight)
            return presets.layer_weights(
                self.layers,
                family,
                self.weight,
                composition=self.composition,
                style_boost=self.style_boost,
                composition_boost=self.composition_boost,
            )
        plan = self.layers if isinstance(self.layers, LayerWeights) else LayerWeights(self.layers)
        numbers = [layer.index for layer in family.layers]
        unknown = sorted(set(plan.weights) - set(numbers))
        if unknown:
            raise InfluenceError(
                f"Layers {unknown} are given a weight, but {family.name} adapters have the layers "
                f"{numbers[0]}, {numbers[1]} ... {numbers[-1]}."
            )
        return self._scaled(plan)

    def _scaled(self, plan: LayerWeights) -> LayerWeights:
        weights = {number: self.weight * factor for number, factor in plan.weights.items()}
        return LayerWeights(weights, plan.opposed)


@dataclass(frozen=True)
class Timing:
    """When an image prompt acts.

    Attributes:
        start: Fraction of the schedule at which it begins; after `end` where it never acts.
        end: Fraction at which it stops.
        curve: Factor of the weight in between, or None.
    """

    start: float = 0.0
    end: float = 1.0
    curve: Curve | None = None

    @property
    def is_constant(self) -> bool:
        """Whether every moment of the schedule is like every other."""
        return self.curve is None and self.start <= 0 and self.end >= 1


def check_window(start: float, end: float) -> None:
    """Refuse a window that is none.

    Raises:
        InfluenceError: It is not within 0..1, or ends before it starts.
    """
    if not 0 <= start <= end <= 1:
        raise InfluenceError(
            f"The step window is {start} to {end}; needed is 0 <= start_at <= end_at <= 1, as "
            "fractions of the schedule."
        )


def parse_curve(text: str) -> Curve | None:
    """Read keyframes such as ``"0:1, 0.4:1, 0.6:0"``; an empty text is no curve.

    Raises:
        InfluenceError: A part is no pair of numbers, or the order is wrong.
    """
    keyframes = tuple(_pairs(text, f"pairs fraction:factor with commas between them: '{EXAMPLE}'"))
    return Curve(keyframes) if keyframes else None


def parse_frames(text: str) -> tuple[float, ...]:
    """Read the factors of the pictures of a batch.

    Args:
        text: A factor for each picture, ``"1, 0.5, 0"``; or keyframes ``"0:0, 8:1, 15:0"``, the
            numbers of pictures counted from 0, with straight lines between. Empty for none.

    Raises:
        InfluenceError: It is neither, or the keyframes are not in order.
    """
    need = f"a factor for each picture, '1, 0.5, 0', or keyframes picture:factor, '{FRAMES}'"
    if ":" not in text:
        try:
            return tuple(float(part) for part in _parts(text))
        except ValueError:
            raise InfluenceError(f"'{text.strip()}' are no factors; needed is {need}.") from None
    keyframes = list(_pairs(text, need))
    if any(place < 0 or place % 1 for place, _ in keyframes) or any(
        later <= earlier for (earlier, _), (later, _) in pairwise(keyframes)
    ):
        raise InfluenceError(
            f"The pictures in '{text.strip()}' are not whole numbers in order; needed is {need}."
        )
    last = int(keyframes[-1][0])
    curve = Curve(tuple((place / max(last, 1), factor) for place, factor in keyframes))
    return tuple(curve.at(frame / max(last, 1)) for frame in range(last + 1))


def _check_finite(factors: Sequence[float]) -> None:
    if not all(math.isfinite(factor) for factor in factors):
        raise InfluenceError(f"The factors are {list(factors)}; needed are finite numbers.")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]


def _pairs(text: str, need: str) -> Iterator[tuple[float, float]]:
    for part in _parts(text):
        try:
            place, factor = (float(number) for number in part.split(":"))
        except ValueError:
            raise InfluenceError(f"'{part}' is no keyframe; needed are {need}.") from None
        yield place, factor


def _read_json(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InfluenceError(
            f"The layer weights begin like a dictionary of scales, but are no JSON ({error}). "
            'Needed is one such as {"up": {"block_0": [0, 1, 0]}}.'
        ) from None
    return cast(Mapping[str, Any], found)
