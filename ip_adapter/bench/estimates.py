"""Figures with their spread: ratios, differences, exponents and slopes of repeated measurements.

A round is one pass over everything that is compared. Whatever slows a machine down for a while
slows a whole round down, so ratios are taken within rounds, and their intervals come from drawing
rounds again with replacement (percentile bootstrap): that assumes nothing about the noise but that
rounds are alike.

Arrays are ``[R]`` or ``[R, S]``: R rounds, S sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 2000
"""Bootstrap samples of each interval."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval it lies in.

    Attributes:
        value: Of the rounds as measured.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[..., Any], *columns: Array, seed: int = 0) -> Estimate:
    """Estimate a statistic of rounds, with its interval.

    Args:
        statistic: Columns with equally many rounds -> a number.
        columns: ``[R, ...]`` each; the same rounds are drawn from all of them.
        seed: Of the drawing.
    """
    rounds = len(columns[0])
    picked = np.random.default_rng(seed).integers(0, rounds, (DRAWS, rounds))
    drawn = [float(statistic(*(column[rows] for column in columns))) for rows in picked]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(float(statistic(*columns)), float(low), float(high))


def ratio(base: Array, case: Array) -> Estimate:
    """Median over rounds of case / base, both ``[R]``."""
    return bootstrap(np.median, case / base)


def overhead_beyond(ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> Estimate:
    """Our overhead less a third of theirs; below 0 where ours is the smaller by far.

    A difference and not a quotient, which has no bounds where their overhead is noise.

    Args:
        ours: Times ``[R]`` without and with.
        theirs: Likewise, of the same rounds.
    """

    def statistic(a: Array, b: Array, c: Array, d: Array) -> float:
        return float((np.median(b / a) - 1) - (np.median(d / c) - 1) / 3)

    return bootstrap(statistic, *ours, *theirs)


def exponent(sizes: Sequence[float], costs: Array) -> Estimate:
    """The p of ``cost = c * size ** p``: the slope of the logarithms, by least squares.

    Args:
        sizes: S of them.
        costs: ``[R, S]``, above 0; their medians over rounds are fitted.
    """

    def statistic(rounds: Array) -> float:
        return fit(np.log(np.asarray(sizes, float)), np.log(np.median(rounds, axis=0)))

    return bootstrap(statistic, costs)


def growth(values: Array, blocks: int = 20, warm_up: float = 0.2) -> Estimate:
    """The slope of a long row of readings that follow one another, such as memory after each job.

    Memory moves in jumps and stays, so neighbours are not independent; their means in blocks
    nearly are. The interval is Student's, for bootstrapped lines through few points are too sure.

    Args:
        values: ``[N]``, in order.
        blocks: How many blocks; fewer where there are fewer readings.
        warm_up: Fraction at the beginning that is left out: caches and pools fill.

    Returns:
        Slope per reading.
    """
    places = np.arange(len(values), dtype=float)[int(warm_up * len(values)) :]
    kept = np.asarray(values, float)[int(warm_up * len(values)) :]
    count = max(2, min(blocks, len(kept)))
    x = np.array([part.mean() for part in np.array_split(places, count)])
    y = np.array([part.mean() for part in np.array_split(kept, count)])
    slope = fit(x, y)
    left = y - y.mean() - slope * (x - x.mean())
    freedom = max(1, count - 2)
    error = math.sqrt(float((left**2).sum()) / freedom / float(((x - x.mean()) ** 2).sum()))
    reach = _student(freedom) * error
    return Estimate(slope, slope - reach, slope + reach)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by Fisher's expansion around the normal one."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(freedom) ** (i + 1) for i, term in enumerate(terms))


def fit(x: Array, y: Array) -> float:
    """Least squares slope of y over x; 0 where all x are one."""
    away = x - x.mean()
    spread = float((away**2).sum())
    return float((away * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
