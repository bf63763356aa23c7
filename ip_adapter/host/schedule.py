"""When an image prompt acts, in the noise levels of a model."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property
from typing import Any

from ..influence import Timing

_LAST = 999
"""Last timestep of Stable Diffusion; between its timesteps the logarithm of sigma is straight."""


class Schedule:
    """When an entry acts.

    Args:
        timing: In fractions of the schedule.
        sampling: The model's ``model_sampling``, which turns fractions into sigmas.
    """

    def __init__(self, timing: Timing, sampling: Any) -> None:
        self.is_constant = timing.is_constant
        self._curve = timing.curve
        self._sigma_at: Callable[[float], Any] = sampling.percent_to_sigma
        self._first = float(self._sigma_at(timing.start))
        self._last = float(self._sigma_at(timing.end))

    def acts_at(self, sigma: float) -> bool:
        """Whether a noise level lies in the window."""
        return self._last <= sigma <= self._first

    def factor_at(self, sigma: float) -> float:
        """Factor of the weights at a noise level; 0 outside of the window."""
        if not self.acts_at(sigma):
            return 0.0
        return 1.0 if self._curve is None else self._curve.at(self._fraction(sigma))

    def _fraction(self, sigma: float) -> float:
        """The fraction of the schedule with this noise level."""
        table = self._falling
        place = bisect_left(table, -sigma, key=lambda level: -level)
        if place == 0 or place == len(table):
            return 0.0 if place == 0 else 1.0
        high, low = table[place - 1 : place + 1]
        if low > 0:
            high, low, sigma = math.log(high), math.log(low), math.log(sigma)
        inside = (high - sigma) / (high - low) if high > low else 1.0
        return (place - 1 + inside) / _LAST

    @cached_property
    def _falling(self) -> list[float]:
        """The noise levels of all timesteps, once a run: asking the host may stop the device."""
        # The host calls 0 and 1 themselves infinitely noisy and clean.
        fractions = [1e-9, *(place / _LAST for place in range(1, _LAST)), 1 - 1e-9]
        return [float(self._sigma_at(fraction)) for fraction in fractions]
