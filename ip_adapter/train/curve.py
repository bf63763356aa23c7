"""The curve of a training's loss, as a picture that may grow while the training runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .. import drawing

WIDTH, HEIGHT = 640, 320
"""Of the picture, in pixels."""

Array = np.ndarray[Any, np.dtype[np.float64]]

_POINTS = 400
"""Points of a line, at most."""

_USUAL = 98
"""Per cent of the losses that the axis reaches; single ones far above would flatten the rest."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, WIDTH - 16, 40, HEIGHT - 34
_PALE, _DARK = "#c9d7ee", "#1f4e9e"


def draw_curve(losses: Sequence[float], steps: int) -> Image.Image:
    """A picture of the loss: that of the steps pale, the mean of the last tenth of them dark.

    Args:
        losses: Of each step so far, in order; 0 or more.
        steps: Where the axis ends.

    Returns:
        RGB, `WIDTH` by `HEIGHT`.
    """
    picture, pen = drawing.canvas(WIDTH, HEIGHT)
    means = moving_mean(losses)
    latest = f", mean of the last tenth {means[-1]:.4f}" if len(means) else ""
    words = f"loss of {len(losses)} of {steps} steps{latest}"
    drawing.label(pen, (16, 10), words, size=14, width=WIDTH - 32)
    pale, dark = _thinned(np.asarray(losses, dtype=float)), _thinned(means)
    high = _reach([loss for _, loss in pale], [loss for _, loss in dark])

    def place(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + (_RIGHT - _LEFT) * (step - 1) / max(steps - 1, 1)
        return x, _BOTTOM - (_BOTTOM - _TOP) * min(loss / high, 1.0)

    for value in _ticks(high):
        _, y = place(1, value)
        pen.line((_LEFT, y, _RIGHT, y), fill=drawing.RULE)
        drawing.label(
            pen, (_LEFT - 8, y - 8), f"{value:g}", size=12, fill=drawing.GREY, anchor="right"
        )
    for step in sorted({1, (steps + 1) // 2, steps}):
        x, _ = place(step, 0)
        anchor: drawing.Anchor = "left" if step == 1 else "right" if step == steps else "centre"
        drawing.label(pen, (x, _BOTTOM + 8), f"{step}", size=12, fill=drawing.GREY, anchor=anchor)
    for points, colour, thick in ((pale, _PALE, 1), (dark, _DARK, 3)):
        dots = [place(step, loss) for step, loss in points]
        if len(dots) > 1:
            pen.line(dots, fill=colour, width=thick, joint="curve")
        for x, y in dots[-1:]:
            pen.ellipse((x - thick, y - thick, x + thick, y + thick), fill=colour)
    return picture


def moving_mean(values: Sequence[float]) -> Array:
    """Mean of the values up to each, over a tenth of them at most; in linear time."""
    count = len(values)
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(values, dtype=float))))
    ends = np.arange(1, count + 1)
    starts = np.maximum(0, ends - max(1, count // 10))
    means: Array = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _reach(pale: Sequence[float], dark: Sequence[float]) -> float:
    """Where the axis of the loss ends, which begins at 0."""
    if not pale:
        return 1.0
    return 1.05 * max(float(np.percentile(pale, _USUAL)), *dark, 0.0) or 1.0


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 up to `high`: three to six."""
    power = 10.0 ** math.floor(math.log10(high / 3))
    step = next(power * part for part in (5, 2, 1) if power * part * 3 <= high * 1.0001)
    return [step * number for number in range(math.floor(high / step) + 1)]


def _thinned(values: Array) -> list[tuple[float, float]]:
    """``(step, value)`` of at most `_POINTS` points, each the mean of its neighbours."""
    parts = np.array_split(np.arange(len(values)), min(_POINTS, len(values)) or 1)
    points = [(float(part.mean()) + 1, float(values[part].mean())) for part in parts if len(part)]
    return [(step, value) for step, value in points if math.isfinite(value)]
