"""Who is timed when: interleaved rounds, on the clock of the device.

In each round everything is timed once, close together, and the order is turned round from one round
to the next: A B C, C B A, A B C. A drift that goes on through two rounds then weighs on all alike,
and what comes after what is balanced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from .estimates import Array

Timed = Callable[[int], object]
"""Gets the number of the round; only the time counts."""


class Clock(Protocol):
    """Times one call."""

    def __call__(self, call: Callable[[], object]) -> float:
        """Returns seconds until all of its work is done."""


def wall_clock(call: Callable[[], object]) -> float:
    """Time by the processor's clock, for a CPU and for what waits for files."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def event_clock(call: Callable[[], object]) -> float:
    """Time between two events on a CUDA stream: what the GPU saw, waiting for launches included."""
    torch.cuda.synchronize()
    first, last = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def clock(device: str) -> Clock:
    """The clock for work on a device."""
    return event_clock if device.startswith("cuda") else wall_clock


def orders(count: int, rounds: int) -> Iterator[Sequence[int]]:
    """Who comes when: forwards, backwards, forwards."""
    for number in range(rounds):
        yield range(count) if number % 2 == 0 else range(count - 1, -1, -1)


def interleave(calls: Sequence[Timed], rounds: int, timed: Clock, *, warm_up: int = 1) -> Array:
    """Time calls in interleaved rounds.

    Args:
        calls: What is compared.
        rounds: How often each is timed.
        timed: The clock.
        warm_up: Rounds before, which are not timed.

    Returns:
        ``[R, N]`` seconds.
    """
    for number in range(warm_up):
        for call in calls:
            call(number)
    seconds = np.empty((rounds, len(calls)))
    for number, order in enumerate(orders(len(calls), rounds)):
        for place in order:
            seconds[number, place] = timed(lambda c=calls[place], n=number: c(n))  # type: ignore[misc]
    return seconds
