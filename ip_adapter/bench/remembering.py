"""Row 5: memory of image prompts: while sampling, after /free, and over a long queue."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from . import counting, estimates, queueing
from .models import KINDS, LATENT, Base, Kind
from .results import Figure, Row
from .sampling import Scene, open_runs
from .steps import Case
from .words import GOALS
from .world import Job, Settings, World, free

MEGA = 1e6

COLLECT = 10
"""Python's garbage is collected after so many prompts; the host does it every ten seconds."""

CASES = (
    *(Case((kind,)) for kind in KINDS),
    Case(("plus",) * 3),
    Case(("plus",), is_masked=True),
)


def jobs(world: World) -> Iterator[Job]:
    """Peaks, and the long queue."""
    yield Job("peak, SD 1.5", partial(_peaks, world))
    yield Job("queue, SD 1.5", partial(_queue, world))
    yield Job("control of the queue, SD 1.5", partial(_queue, world, is_control=True))


@torch.inference_mode(False)
@torch.no_grad()
def _peaks(world: World) -> list[Row]:
    base = world.base("SD 1.5")
    side = world.settings.pixels(512)
    scene = Scene(base, side, side)
    device = world.settings.device

    def peak(model: Any) -> int:
        free()
        open_runs(scene, [base.model], lambda steps: None)  # the base model's weights are there
        return counting.peak_bytes(
            lambda: open_runs(scene, [model], lambda steps: [steps[0](n) for n in range(2)]),
            device,
        )

    without = peak(base.model)
    rows = []
    for case in CASES:
        extra = peak(case.apply(base, side, side)) - without
        least = needed(base, case, scene)
        rows.append(
            Row(
                f"SD 1.5 {side} x {side}, {case.words}",
                (
                    Figure(
                        "extra peak / keys, values, masks",
                        extra / least,
                        goal=GOALS["memory"]["peak"],
                    ),
                    Figure("extra peak", extra / MEGA, unit="MB"),
                ),
                context={"extra": extra, "needed": least, "base": without},
            )
        )
    return rows


def needed(base: Base, case: Case, scene: Scene) -> int:
    """Bytes of the keys and values of both sides, and of the masks on every layer's grid."""
    item = torch.empty((), dtype=base.dtype).element_size()
    total = 0
    for number, kind in enumerate(case.kinds):
        spec = base.adapter(kind, number).spec
        total += 2 * 2 * spec.projection.tokens * sum(spec.widths) * item
        if case.is_masked:
            levels = sorted({width // min(spec.widths) for width in spec.widths})
            grids = [(scene.height // LATENT // n) * (scene.width // LATENT // n) for n in levels]
            total += sum(grids) * item
    return total


def _queue(world: World, *, is_control: bool = False) -> list[Row]:
    settings = world.settings
    world.let_go()
    with queueing.inside(settings) as queue:
        readings, stays = long_queue(queue, settings, is_control=is_control)
    slope = estimates.growth(readings)
    where = "VRAM" if settings.device == "cuda" else "resident memory"
    what = (
        "no image prompt, the UNet not run (control)"
        if is_control
        else "two adapters, all changed at random"
    )
    return [
        Row(
            f"{len(readings)} prompts, {what}",
            (
                Figure(
                    f"growth of {where}",
                    slope.value / 1000,
                    slope.low / 1000,
                    slope.high / 1000,
                    "kB per prompt",
                    goal=None if is_control else 0.0,
                    is_noise_met=True,
                ),
                Figure(f"{where}, last / first reading", float(readings[-1] / readings[0])),
                Figure(
                    "tensors that stay after /free",
                    stays / MEGA,
                    unit="MB",
                    goal=GOALS["memory"]["stays"],
                ),
            ),
            context={"readings": readings.tolist()},
        )
    ]


def long_queue(
    queue: Any, settings: Settings, *, is_control: bool = False
) -> tuple[estimates.Array, int]:
    """Run many prompts that differ at random.

    Args:
        queue: A `queueing.Queue`.
        settings: How many, and where memory is read.
        is_control: Whether it is the host's own work alone: no image prompts, the UNet not run.

    Returns:
        Bytes after each prompt, and bytes of tensors that are left after /free.
    """
    kinds: tuple[Kind, ...] = ("global", "plus")
    choices = [(kind, number) for kind in kinds for number in range(2)]
    for kind, number in choices:
        queue.source(kind, number)
    rng = random.Random(0)
    run = queue.executor()
    readings = []
    for seed in range(settings.prompts):
        prompt = queueing.graph(
            [] if is_control else [("global", 0), rng.choice(choices)],
            seed=seed,
            reference=rng.randrange(10_000),
            weight=rng.random(),
            model="IdleModel" if is_control else "Model",
        )
        run(prompt)
        if seed % COLLECT == 0:
            gc.collect()
        readings.append(_reading(settings))
    run.reset()
    queue.let_go()
    free()
    return np.array(readings, dtype=float), counting.tensor_bytes() - queue.bare


def _reading(settings: Settings) -> int:
    if settings.device == "cuda":
        return int(torch.cuda.memory_allocated())
    return counting.resident()
