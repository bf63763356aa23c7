"""Row 1: a step with image prompts against the same step without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..influence import Curve, Influence
from . import estimates
from .errors import BenchError
from .estimates import Array
from .inside import interleaved
from .models import Base, FamilyName, Kind
from .results import Figure, Row, figure
from .sampling import Scene, Step, open_runs
from .words import GOALS
from .world import Job, World, count_steps, time_steps

MEASURE = "step / step without"
SHARE = "step / the same step less our own code"
CONTROL = "no adapter (control of the rows below)"


@dataclass(frozen=True)
class Case:
    """The image prompts that are applied.

    Attributes:
        kinds: One adapter each, chained.
        is_masked: Whether each acts in a disc of the picture only.
        is_scheduled: Whether its weight changes at every step.
    """

    kinds: tuple[Kind, ...]
    is_masked: bool = False
    is_scheduled: bool = False

    @property
    def words(self) -> str:
        """For the table: ``3 adapters (plus, masked)``."""
        alike = self.kinds[:1] if len(set(self.kinds)) == 1 else self.kinds
        more = [
            word
            for word, holds in (("masked", self.is_masked), ("weight per step", self.is_scheduled))
            if holds
        ]
        if len(self.kinds) == 1:
            return ", ".join((*alike, *more))
        return f"{len(self.kinds)} adapters ({', '.join((*alike, *more))})"

    def apply(self, base: Base, height: int, width: int, model: Any = None) -> Any:
        """A clone of the base model's MODEL with these image prompts."""
        from ..host import patching

        mask = _disc(height, width) if self.is_masked else None
        curve = Curve(((0.0, 1.0), (1.0, 0.2))) if self.is_scheduled else None
        patched = base.model if model is None else model
        for seed, kind in enumerate(self.kinds):
            adapter = base.adapter(kind, seed)
            patched, _ = patching.apply(
                patched,
                adapter,
                base.prompt(adapter, seed),
                weight=0.7,
                mask=mask,
                influence=Influence(curve=curve),
            )
        return patched

    def goal(self, device: str) -> float | None:
        """The most that a step may take, by the number of adapters."""
        return GOALS["step"].get((device, len(self.kinds)))


@dataclass(frozen=True)
class Set:
    """Cases that are timed together, against one base.

    Attributes:
        family: The base model's.
        published: Side of the picture in pixels.
        cases: What is compared with the step without.
        on_cpu: Side of the picture on a CPU, where the published one takes too long.
        batch: Pictures.
        guidance: Scale.
    """

    family: FamilyName
    published: int
    cases: tuple[Case, ...] = field(repr=False)
    on_cpu: int | None = None
    batch: int = 1
    guidance: float = 7.0


def _cases(*chains: str, **more: bool) -> tuple[Case, ...]:
    return tuple(Case(tuple(chain.split()), **more) for chain in chains)  # type: ignore[arg-type]


SETS: tuple[Set, ...] = (
    Set("SD 1.5", 512, _cases("global", "plus", "full", "faceid-plus")),
    Set(
        "SD 1.5",
        512,
        _cases("plus plus plus", "global plus faceid-plus", "plus " * 6),
        on_cpu=256,
    ),
    Set(
        "SD 1.5",
        512,
        (*_cases("plus", "plus plus plus", is_masked=True), *_cases("plus", is_scheduled=True)),
        on_cpu=256,
    ),
    Set("SD 1.5", 512, _cases("global", "plus", "plus plus plus"), on_cpu=256, guidance=1.0),
    Set("SD 1.5", 512, _cases("plus"), on_cpu=128, batch=4),
    Set("SD 1.5", 512, _cases("plus"), on_cpu=64, batch=16),
    Set("SDXL", 1024, _cases("global", "plus", "faceid-plus", "plus plus plus"), on_cpu=256),
)


def jobs(world: World) -> Iterator[Job]:
    """Every set in every precision; on a GPU also compiled and captured steps."""
    settings = world.settings
    for dtype in settings.dtypes:
        for number, one in enumerate(SETS, start=1):
            name = f"{number}: {_place(world, one)}, {dtype}"
            yield Job(name, partial(_measure, world, one, dtype))
    if settings.device == "cuda":
        for one in (SETS[0], SETS[-1]):
            for how, prepare in (("captured graph", _captured), ("torch.compile", _compiled)):
                name = f"{_place(world, one)}, {how}"
                yield Job(name, partial(_prepared, world, one, how, prepare))


def _measure(world: World, one: Set, dtype: str) -> list[Row]:
    base = world.base(one.family, dtype)
    side = world.settings.pixels(one.published, one.on_cpu)
    scene = Scene(base, side, side, one.batch, one.guidance)
    patched = [case.apply(base, side, side) for case in one.cases]
    work = count_steps(scene, [base.model, *patched])
    models = [base.model.clone(), base.model.clone(), *patched]
    seconds, inside = _time(world, scene, models)
    note = ""
    if world.settings.size == "real" and side != one.published:
        note = f"{one.published} x {one.published} as published is left to GPUs"
    precision = f", {dtype}" if len(world.settings.dtypes) > 1 else ""
    control = _figure(seconds, 1)
    rows = [Row(f"{_place(world, one)}, {CONTROL}{precision}", (control,), note=note)]
    for place, case in enumerate(one.cases, start=2):
        goal = case.goal(world.settings.device)
        shown = [_figure(seconds, place, goal)]
        context = {"seconds": seconds[:, [0, place]].tolist()}
        if inside is not None:
            rest = seconds[:, place] - inside[:, place]
            shown.append(figure(SHARE, estimates.ratio(rest, seconds[:, place]), goal=goal))
            context["inside"] = inside[:, place].tolist()
        name = f"{_place(world, one)}, {case.words}{precision}"
        rows.append(Row(name, tuple(shown), (work[0], work[place - 1]), note, context))
    return rows


@torch.inference_mode()
def _time(world: World, scene: Scene, models: list[Any]) -> tuple[Array, Array | None]:
    """Seconds of steps, and on a CPU those of them that image prompts take."""
    settings = world.settings
    if settings.device != "cpu":
        return time_steps(settings, scene, models), None
    return open_runs(
        scene, models, lambda steps: interleaved(steps, settings.rounds, settings.clock)
    )


def _figure(seconds: Any, place: int, goal: float | None = None) -> Figure:
    return figure(MEASURE, estimates.ratio(seconds[:, 0], seconds[:, place]), goal=goal)


def _place(world: World, one: Set) -> str:
    side = world.settings.pixels(one.published, one.on_cpu)
    batch = f", batch {one.batch}" if one.batch > 1 else ""
    return f"{one.family} {side} x {side}{batch}, CFG {one.guidance:g}"


@torch.inference_mode()
def _prepared(
    world: World,
    one: Set,
    how: str,
    prepare: Callable[[Base, Case | None, Scene], tuple[Any, Callable[[Step], Any]]],
) -> list[Row]:
    """Rows of one set whose steps are compiled or captured; a case that cannot be says why."""
    base = world.base(one.family, world.settings.dtypes[0])
    side = world.settings.pixels(one.published)
    scene = Scene(base, side, side, one.batch, one.guidance)
    rows = []
    for case in one.cases:
        name = f"{_place(world, one)}, {case.words}, {how}"
        made = [prepare(base, given, scene) for given in (None, case)]

        def body(steps: Sequence[Step], made: Any = made) -> Any:
            from .clocks import interleave

            calls = [ready(step) for (_, ready), step in zip(made, steps, strict=True)]
            return interleave(calls, world.settings.rounds, world.settings.clock, warm_up=3)

        try:
            seconds = open_runs(scene, [model for model, _ in made], body)
        except (RuntimeError, BenchError) as error:
            rows.append(Row(name, note=f"cannot be measured: {str(error).splitlines()[0]}"))
            continue
        goal = GOALS["step"]["graph", 1] if len(case.kinds) == 1 else None
        rows.append(Row(name, (_figure(seconds, 1, goal),), context={"seconds": seconds.tolist()}))
    return rows


def _captured(base: Base, case: Case | None, scene: Scene) -> tuple[Any, Callable[[Step], Any]]:
    """A step as a CUDA graph: what is left of the time when nothing is launched by Python."""

    def ready(step: Step) -> Callable[[int], object]:
        step.prepare()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(0)
        return lambda _: graph.replay()

    return _applied(base, case, scene), ready


def _compiled(base: Base, case: Case | None, scene: Scene) -> tuple[Any, Callable[[Step], Any]]:
    """A step of a MODEL that went through the host's compile node, before the image prompts."""
    from importlib import import_module

    host = import_module("comfy_api.torch_helpers")
    model = base.model.clone()
    host.set_torch_compile_wrapper(model=model, backend="inductor")
    return _applied(base, case, scene, model), lambda step: step


def _applied(base: Base, case: Case | None, scene: Scene, model: Any = None) -> Any:
    if case is None:
        return base.model.clone() if model is None else model
    return case.apply(base, scene.height, scene.width, model)


def _disc(height: int, width: int) -> torch.Tensor:
    """``[H, W]``, 1 in the middle and 0 in the corners, soft between."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None]
    return (1.5 - (x**2 + y**2).sqrt() * 1.5).clamp(0, 1)
