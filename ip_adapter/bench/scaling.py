"""Row 6: how the cost of image prompts grows with the work, as exponents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from . import counting, estimates
from .estimates import Array, Estimate
from .models import Base
from .results import Figure, Row, figure
from .sampling import Scene, open_runs
from .world import Job, World, count_steps, time_steps

Grown = Literal["tokens", "references", "adapters"]
"""What grows on one and the same picture."""

SIZES: Mapping[str, tuple[int, ...]] = {
    "tokens": (4, 16, 64, 256, 1024),
    "references": (1, 4, 16, 64),
    "adapters": (1, 2, 4, 8),
    "resolution": (512, 768, 1024, 1536, 2048),
    "frames": (1, 8, 32, 128),
}
"""As the issue names them."""

ON_CPU = {"resolution": (256, 384, 512, 640)}
FOR_TRY = {"resolution": (64, 128, 192), "frames": (1, 2, 4)}


def jobs(world: World) -> Iterator[Job]:
    """One for each thing that grows."""
    grown: tuple[Grown, ...] = ("tokens", "references", "adapters")
    for what in grown:
        yield Job(what, partial(_on_one_picture, world, what))
    yield Job("resolution", partial(_with_the_base, world, "resolution"))
    yield Job("frames", partial(_with_the_base, world, "frames"))


def _sizes(world: World, what: str) -> tuple[int, ...]:
    if world.settings.size == "small":
        return FOR_TRY.get(what, SIZES[what])
    return ON_CPU.get(what, SIZES[what]) if world.settings.device == "cpu" else SIZES[what]


def _rounds(world: World) -> int:
    return max(3, world.settings.rounds // 3)


def _on_one_picture(world: World, what: Grown) -> list[Row]:
    """Everything at once: the base model's step is the same for all sizes."""
    base = world.base("SD 1.5")
    sizes = _sizes(world, what)
    side = world.settings.pixels(512, 256)
    scene = Scene(base, side, side)
    patched = [_patched(base, what, size) for size in sizes]
    work = count_steps(scene, [base.model, *patched])
    memory = _peaks(world, scene, [base.model, *patched])
    seconds = time_steps(world.settings, scene, [base.model, *patched], rounds=_rounds(world))
    return [
        _row(
            f"{what} {sizes[0]} to {sizes[-1]}, {side} x {side}",
            (
                figure("step: exponent", estimates.exponent(sizes, seconds[:, 1:])),
                figure(
                    "largest step / step without", estimates.ratio(seconds[:, 0], seconds[:, -1])
                ),
                _counted(
                    "added arithmetic: exponent", sizes, [(w - work[0]).flops for w in work[1:]]
                ),
                _counted("added memory: exponent", sizes, [m - memory[0] for m in memory[1:]]),
            ),
            sizes,
            seconds,
        )
    ]


def _with_the_base(world: World, what: Literal["resolution", "frames"]) -> list[Row]:
    """Size by size, each against the base model's own step, which grows as well."""
    base = world.base("SD 1.5")
    sizes = _sizes(world, what)
    taken, flops, memory = [], [], []
    for size in sizes:
        side, batch = (size, 1) if what == "resolution" else (world.settings.pixels(512, 64), size)
        scene = Scene(base, side, side, batch)
        both = [base.model, _patched(base, what, size)]
        less, more = count_steps(scene, both)
        flops.append((more - less).flops)
        less_bytes, more_bytes = _peaks(world, scene, both)
        memory.append(more_bytes - less_bytes)
        taken.append(time_steps(world.settings, scene, both, rounds=_rounds(world)))
    seconds = np.stack(taken, axis=1)  # [R, S, 2]
    where = "" if what == "resolution" else f", {side} x {side}"
    return [
        _row(
            f"{what} {sizes[0]} to {sizes[-1]}{where}",
            (
                figure("step: exponent", estimates.exponent(sizes, seconds[..., 1])),
                figure("step without: exponent", estimates.exponent(sizes, seconds[..., 0])),
                figure("difference of the two", _difference(sizes, seconds)),
                _counted("added arithmetic: exponent", sizes, flops),
                _counted("added memory: exponent", sizes, memory),
            ),
            sizes,
            seconds,
        )
    ]


def _patched(base: Base, what: str, size: int) -> Any:
    from ..host import patching

    count = size if what == "adapters" else 1
    changes = {what: size} if what in ("tokens", "references", "frames") else {}
    patched = base.model
    for number in range(count):
        adapter = base.adapter("plus", number)
        prompt = base.prompt(adapter, number, **changes)
        patched, _ = patching.apply(patched, adapter, prompt, weight=0.5)
    return patched


@torch.inference_mode(False)
@torch.no_grad()
def _peaks(world: World, scene: Scene, models: Sequence[Any]) -> list[int]:
    """Of a run of one step each, in bytes."""
    return [
        counting.peak_bytes(
            lambda m=model: open_runs(scene, [m], lambda steps: steps[0](0)),  # type: ignore[misc]
            world.settings.device,
        )
        for model in models
    ]


def _difference(sizes: Sequence[int], seconds: Array) -> Estimate:
    logs = np.log(np.asarray(sizes, float))

    def statistic(rounds: Array) -> float:
        medians = np.log(np.median(rounds, axis=0))
        return estimates.fit(logs, medians[:, 1]) - estimates.fit(logs, medians[:, 0])

    return estimates.bootstrap(statistic, seconds)


def _counted(measure: str, sizes: Sequence[int], costs: Sequence[int]) -> Figure:
    """An exponent without noise; 0 where nothing is added at any size."""
    logs = np.log(np.asarray(sizes, float))
    return Figure(measure, estimates.fit(logs, np.log(np.maximum(np.asarray(costs, float), 1.0))))


def _row(case: str, figures: tuple[Figure, ...], sizes: Sequence[int], seconds: Array) -> Row:
    return Row(case, figures, context={"sizes": list(sizes), "seconds": seconds.tolist()})
