"""Weights and prompts over the pictures of a batch: curves, cross fades, schedules.

The numbers are those of the weight nodes of ComfyUI_IPAdapter_plus. A strategy travels between
nodes as the dictionary that the old pack used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .errors import IncompatibleModelError, InfluenceError
from .prompt import ImagePrompt

Curve = Literal["linear", "ease_in_out", "ease_in", "ease_out"]
"""How a number goes from one to another: ``ease_in`` is slow at the end, ``ease_out`` is slow at
the start (so the old pack named them), ``ease_in_out`` is slow at both."""

CURVES: tuple[Curve, ...] = get_args(Curve)

Weights = float | Sequence[float]
"""One, or one for each picture of a batch."""

Timing = Literal["custom", "linear", "ease_in_out", "ease_in", "ease_out", "random"]
"""A curve from the first weight to the last; ``custom`` takes the weights as written, ``random``
draws between the two."""

Method = Literal["full batch", "shift batches", "alternate batches"]
"""How pictures follow one another. ``full batch``: each has the weights to itself. The others fade
between neighbours by two adapters: ``shift batches`` runs the weights anew for each pair,
``alternate batches`` runs them to and fro, so that each picture stays with its adapter."""

TIMINGS: tuple[Timing, ...] = get_args(Timing)
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Strategy:
    """Weights for the pictures of an animation, as its nodes describe them.

    Attributes:
        weights: Numbers with commas or line breaks between them.
        timing: What becomes of them.
        frames: How many weights a curve has, at least 2; ``custom`` has as many as are written.
        start_frame: Where the curve begins; the first weight stands before it.
        end_frame: Where the curve ends; the last weight stands after it.
        add_starting_frames: How often the first picture stands before all, with its weight.
        add_ending_frames: How often the last picture stands after all, with its weight.
        method: How pictures follow one another.
        frame_count: The number of pictures; 0 without any.
    """

    weights: str = "1.0, 0.0"
    timing: Timing = "linear"
    frames: int = 0
    start_frame: int = 0
    end_frame: int = 9999
    add_starting_frames: int = 0
    add_ending_frames: int = 0
    method: Method = "full batch"
    frame_count: int = 0

    def __post_init__(self) -> None:
        if self.timing not in TIMINGS or self.method not in METHODS:
            raise InfluenceError(
                f"The strategy has the timing {self.timing!r} and the method {self.method!r}; "
                f"needed is one of {', '.join(TIMINGS)}, and one of {', '.join(METHODS)}."
            )

    def as_dict(self) -> dict[str, Any]:
        """What goes over a wire, and what the old pack's nodes read."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Sequenced:
    """A strategy carried out.

    Attributes:
        weights: One for each picture of the batch.
        first: ``[F, H, W, C]``, the reference of each picture, or None without references.
        second: The same for a second adapter, whose weights are `backwards`; None for one.
    """

    weights: list[float]
    first: Tensor | None = None
    second: Tensor | None = None

    @property
    def backwards(self) -> list[float]:
        """The weights from last to first."""
        return self.weights[::-1]


def from_dict(given: Mapping[str, Any]) -> Strategy:
    """Read a strategy as it travels between nodes.

    Raises:
        InfluenceError: Something is missing, or a choice does not exist.
    """
    names = Strategy.__dataclass_fields__
    missing = [name for name in names if name not in given]
    if missing:
        raise InfluenceError(
            f"The weights strategy has no {', '.join(missing)}. Connect the weights_strategy of "
            "IPAdapter Weights."
        )
    return Strategy(**{name: given[name] for name in names})


def eased(fraction: float, curve: Curve) -> float:
    """Where a curve is at a fraction of its way; both are 0..1.

    Raises:
        InfluenceError: There is no such curve.
    """
    match curve:
        case "linear":
            return fraction
        case "ease_in":
            return math.sin(fraction * math.pi / 2)
        case "ease_out":
            return 1 - math.cos(fraction * math.pi / 2)
        case "ease_in_out":
            return (1 - math.cos(fraction * math.pi)) / 2
    raise InfluenceError(f"Unknown curve {curve!r}; needed is one of {', '.join(CURVES)}.")


def fractions(count: int, curve: Curve) -> list[float]:
    """`count` fractions from 0 to 1 along a curve; a single one is 1."""
    return [eased(i / (count - 1), curve) for i in range(count - 1)] + [1.0] * (count > 0)


def weights(strategy: Strategy) -> list[float]:
    """The weights for one picture, or for one pair of them.

    Random ones are drawn from the strategy itself, so that they are the same each time.

    Raises:
        InfluenceError: A part of the text is no number.
    """
    written = _numbers(strategy.weights)
    if strategy.timing == "custom":
        return written or [0.0]
    low, high = (written[0], written[-1]) if written else (0.0, 1.0)
    frames = max(strategy.frames, 2)
    end = min(strategy.end_frame, frames)
    length = max(0, end - strategy.start_frame)
    ramp = [low] * strategy.start_frame
    if strategy.timing == "random":
        dice = random.Random(repr((strategy.weights, frames, strategy.start_frame, end)))
        ramp += [dice.uniform(low, high) for _ in range(length)]
    else:
        ramp += [low + (high - low) * part for part in fractions(length, strategy.timing)]
        ramp[-1:] = [high] * bool(ramp)  # also where a curve is over before it begins
    return ramp + [high] * (frames - end)


def carry_out(strategy: Strategy, image: Tensor | None) -> Sequenced:
    """Give each picture of a batch a weight, and one reference or two.

    Args:
        strategy: What to do; its `frame_count` does not matter here.
        image: ``[N, H, W, C]``, the references in order; or None for weights alone, which then
            stand once and without frames added. A single one fades to itself.

    Raises:
        InfluenceError: See `weights`.
    """
    once = weights(strategy)
    if image is None:
        return Sequenced(once)
    first, second, values = _runs(len(image), once, strategy.method)
    before, after = strategy.add_starting_frames, strategy.add_ending_frames

    def held(pictures: list[int]) -> Tensor:
        rows = [picture for picture in pictures for _ in once]
        return image[[0] * before + rows + [-1] * after]

    return Sequenced(
        weights=values[:1] * before + values + values[-1:] * after,
        first=held(first),
        second=held(second) if second else None,
    )


def prompt_schedule(strategy: Strategy, prompt: str) -> str:
    """Lines ``"frame": "text",`` for a prompt schedule: a text for each picture of the strategy.

    Args:
        strategy: Where each of its pictures begins.
        prompt: One text on each line; the last one serves the pictures that have none.

    Returns:
        An empty text without pictures or without prompts.
    """
    given = [line for line in prompt.split("\n") if line.strip()]
    count = strategy.frame_count
    if not given or not count:
        return ""
    given = given[:count] + given[-1:] * (count - len(given))
    start = strategy.add_starting_frames
    frames = strategy.frames if strategy.timing == "custom" else max(strategy.frames, 2)
    frames = frames or len(weights(strategy))
    keyframes = [(start + i * frames, text) for i, text in enumerate(given)]
    if start:
        keyframes.insert(0, (0, given[0]))
    if strategy.add_ending_frames:
        keyframes.append((start + count * frames, given[-1]))
    return "".join(f'"{frame}": "{text}",\n' for frame, text in keyframes)


def joined(*parts: Weights) -> list[float]:
    """Put weights one after another, single ones and lists."""
    many = [[part] if isinstance(part, (int, float)) else list(part) for part in parts]
    return [weight for part in many for weight in part]


def fade(first: ImagePrompt, second: ImagePrompt, parts: Sequence[float]) -> ImagePrompt:
    """Go from one image prompt to another over the pictures of a batch.

    The tokens of picture i are ``first + (second - first) * parts[i]``, on both sides of the
    guidance.

    Args:
        first: What is there at 0; where it has tokens for each picture, picture i has its own.
        second: What is there at 1; the same.
        parts: How far each picture is, 0..1.

    Raises:
        IncompatibleModelError: The prompts come from two adapters, or differ in their number of
            tokens.
        InfluenceError: There are no parts.
    """
    if not parts:
        raise InfluenceError("A fade over 0 pictures was asked for; needed is at least one.")
    if first.adapter != second.adapter:
        raise IncompatibleModelError(
            f"Image prompts of two adapters cannot fade into one another: {first.label} and "
            f"{second.label}. Encode both with the same adapter."
        )
    if first.tokens != second.tokens:
        raise IncompatibleModelError(
            f"The first image prompt has {first.tokens} tokens and the second {second.tokens}, "
            "so they cannot fade into one another. Give both as many references, encoded in the "
            "same way; several can be combined to one by Encode References."
        )
    unconditional, other = first.unconditional, second.unconditional.to(first.unconditional)
    if len(unconditional) > 1 or not torch.equal(unconditional, other):
        unconditional = _mixed(unconditional, other, parts)
    return ImagePrompt(
        conditional=_mixed(first.conditional, second.conditional, parts),
        unconditional=unconditional,
        adapter=first.adapter,
        label=first.label,
    )


def _numbers(text: str) -> list[float]:
    found = []
    for part in text.replace("\n", ",").split(","):
        if not part.strip():
            continue
        try:
            found.append(float(part))
        except ValueError:
            raise InfluenceError(
                f"'{part.strip()}' is no weight; needed are numbers with commas or line breaks "
                "between them, such as '1.0, 0.0'."
            ) from None
    return found


def _runs(
    count: int, once: list[float], method: Method
) -> tuple[list[int], list[int], list[float]]:
    """The picture that each run of the weights has, that of the second adapter, and all weights."""
    if method == "full batch":
        return list(range(count)), [], once * count
    if count == 1:  # nothing to fade to
        return [0], [0], once
    runs = range(count - 1)
    if method == "shift batches":
        return list(runs), [run + 1 for run in runs], once * len(runs)
    # The first adapter has the even pictures, the second the odd ones.
    first, second = [(run + 1) // 2 * 2 for run in runs], [run // 2 * 2 + 1 for run in runs]
    back = [max(once) - (weight - min(once)) for weight in once]
    return first, second, [weight for run in runs for weight in (back if run % 2 else once)]


def _rows(tokens: Tensor, count: int) -> Tensor:
    """``[F, T, D]`` -> ``[count, T, D]``: the last row serves those that have none."""
    return tokens[torch.arange(count, device=tokens.device).clamp(max=len(tokens) - 1)]


def _mixed(first: Tensor, second: Tensor, parts: Sequence[float]) -> Tensor:
    share = torch.tensor(parts, device=first.device).view(-1, 1, 1)
    count = len(parts)
    here, there = _rows(first, count).float(), _rows(second.to(first.device), count).float()
    return here.lerp(there, share.float()).to(first.dtype)
