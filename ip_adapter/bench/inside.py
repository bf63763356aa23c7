"""Time spent in the image prompts' own code within a step, on a CPU.

Steps differ among themselves by more than an image prompt costs: on a busy machine by a tenth. What
is timed inside of a step is slowed down together with it, so its share is sharp where the ratio of
two steps is not. A GPU works on after a call returns; there this says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import numpy as np

from .clocks import Timed, interleave
from .estimates import Array


def _places() -> tuple[tuple[Any, str], ...]:
    """All that a pass does beside the model's own work; none of these calls another."""
    from ..host import branch, patching, run

    return (branch.Branch, "add"), (run.Run, "live"), (patching, "_with_slots")


class Meter:
    """Adds up the seconds spent in image prompts' code while it watches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put a stop watch around each place."""
        kept = [(owner, name, getattr(owner, name)) for owner, name in _places()]
        for owner, name, function in kept:
            setattr(owner, name, self._timed(function))
        try:
            yield
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def interleaved(calls: Sequence[Timed], rounds: int, clock: Any) -> tuple[Array, Array]:
    """As `clocks.interleave`, with the seconds that are ours.

    Returns:
        ``[R, N]`` seconds, and ``[R, N]`` of them in image prompts' code.
    """
    meter = Meter()
    ours: list[list[float]] = [[] for _ in calls]

    def watched(place: int, number: int) -> None:
        meter.seconds = 0.0
        calls[place](number)
        ours[place].append(meter.seconds)

    with meter.watching():
        seconds = interleave(
            [partial(watched, place) for place in range(len(calls))], rounds, clock
        )
    return seconds, np.array(ours, dtype=float)[:, -rounds:].T
