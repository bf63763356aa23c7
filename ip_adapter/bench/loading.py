"""Row 4: our loader against a plain read of the same file.

safetensors' own loader maps a file and reads nothing until a tensor is used, and so does ours; both
therefore copy every tensor once, or there would be nothing to compare.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from . import clocks, estimates, models
from .counting import peak_resident
from .models import KINDS, FamilyName, Kind
from .results import Figure, Row, figure
from .words import GOALS
from .world import Job, World

LOOKS = 5
"""How often memory is watched; the median counts."""


def jobs(world: World) -> Iterator[Job]:
    """Every kind for SD 1.5, and the largest for SDXL."""
    for kind in KINDS:
        yield Job(f"SD 1.5, {kind}", partial(_measure, world, "SD 1.5", kind))
    yield Job("SDXL, plus", partial(_measure, world, "SDXL", "plus"))


def _measure(world: World, family: FamilyName, kind: Kind) -> list[Row]:
    adapter = world.base(family).adapter(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = models.save(adapter, Path(folder) / "adapter.safetensors")
        calls = [partial(plain, path), partial(ours, path)]
        rounds = max(2 * world.settings.rounds, 10)
        seconds = clocks.interleave(calls, rounds, clocks.wall_clock, warm_up=2)
        peaks: list[list[int]] = [[], []]
        for number, order in enumerate(clocks.orders(2, LOOKS)):
            for place in order:
                with peak_resident() as seen:
                    calls[place](number)
                peaks[place] += seen
        size = path.stat().st_size
    least, most = (statistics.median(one) for one in peaks)
    memory = most / least if least > 0 else float(most > 0)
    return [
        Row(
            f"{family}, {kind}, {size / 1e6:.0f} MB",
            (
                figure(
                    "time / plain read",
                    estimates.ratio(seconds[:, 0], seconds[:, 1]),
                    goal=GOALS["loading"]["time"],
                ),
                Figure("peak memory / plain read", memory, goal=GOALS["loading"]["memory"]),
            ),
            context={"seconds": seconds.tolist(), "peaks": peaks, "bytes": size},
        )
    ]


def plain(path: Path, _: int = 0) -> list[Tensor]:
    """All tensors of a file, in memory."""
    from safetensors.torch import load_file

    return [tensor.clone() for tensor in load_file(path).values()]


def ours(path: Path, _: int = 0) -> list[Tensor]:
    """The adapter in a file, recognised, built and in memory."""
    from ..host import adapters

    loaded = adapters.load(path)
    return [tensor.clone() for tensor in loaded.module.state_dict().values()]
