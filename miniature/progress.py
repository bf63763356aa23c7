"""Progress of a training of the miniature: one bar with a few smoothed figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor
from tqdm import tqdm

_bar: tqdm[int] | None = None
_smooth: dict[str, float] = {}


def steps(name: str, numbers: range) -> Iterator[int]:
    """Go through numbers with a bar."""
    global _bar
    _smooth.clear()
    # A log gets a line a minute, a terminal a moving bar.
    calm = 30.0 if not sys.stderr.isatty() else 0.5
    _bar = tqdm(numbers, desc=name, mininterval=calm, maxinterval=calm, ascii=True)
    try:
        yield from _bar
    finally:
        _bar.close()
        _bar = None


def show(*, step: int, **figures: Tensor) -> None:
    """Show figures beside the bar, smoothed; read only now and then."""
    if _bar is None or step % 20:
        return
    for name, value in figures.items():
        found = float(value.detach())
        _smooth[name] = 0.8 * _smooth.get(name, found) + 0.2 * found
    _bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in _smooth.items()), False)
