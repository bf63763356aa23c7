"""The command line of the benchmark: what an image prompt costs on this machine.

Usage, in the pack's folder:
    python -m ip_adapter.bench                      all groups; goes on where it was stopped
    python -m ip_adapter.bench steps --again        one group anew
    python -m ip_adapter.bench --page               only write docs/performance.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from ..errors import IPAdapterError
from ..host import standalone
from . import (
    loading,
    page,
    queueing,
    remembering,
    results,
    rival,
    scaling,
    steps,
    training,
)
from .errors import BenchError
from .models import Size
from .results import Measurement, Results
from .words import TITLES
from .world import Job, Jobs, Settings, World

GROUPS: Mapping[str, Jobs] = {
    "steps": steps.jobs,
    "diffusers": rival.jobs,
    "queue": queueing.jobs,
    "loading": loading.jobs,
    "memory": remembering.jobs,
    "scaling": scaling.jobs,
    "training": training.jobs,
}

FOLDER = standalone.PACK / "docs" / "performance"
"""Results of each machine, as JSON; the page lies beside it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit status is 0, 1 if something was refused, 130 if stopped."""
    options = _parser().parse_args(arguments)
    try:
        if options.groups or not options.page:
            _measure(options)
        if options.page:
            files = options.results or sorted(FOLDER.glob("*.json"))
            if not files:
                raise BenchError(f"There are no results in '{FOLDER}'. Measure first.")
            page.write(options.page, [Results(file) for file in files])
            _say(str(options.page))
    except (IPAdapterError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. The same command goes on from here.\n")
        return 130
    return 0


def _measure(options: argparse.Namespace) -> None:
    device = standalone.start(cpu=options.device == "cpu")
    kind = "cuda" if device.startswith("cuda") else device.split(":")[0]
    if kind not in ("cpu", "cuda") or options.device not in ("auto", kind):
        raise BenchError(
            f"The host computes on {device}, and {options.device} is asked for; measured can be "
            "cpu and cuda. Choose --device cpu, or run it where there is a GPU."
        )
    settings = Settings("cuda" if kind == "cuda" else "cpu", options.size, options.rounds)
    path = options.results[0] if options.results else FOLDER / f"{kind}.json"
    kept = Results(path, results.environment(device, options.size))
    world = World(settings)
    chosen = [name for name in TITLES if name in options.groups] or list(TITLES)
    for group, job in _jobs(world, list(TITLES) if "all" in options.groups else chosen):
        if kept.has(group, job.name) and not options.again:
            _say(f"{group}: {job.name}: measured before")
            continue
        started = time.perf_counter()
        rows = tuple(job.measure())
        kept.add(Measurement(group, job.name, settings.rounds, rows))
        _say(f"{group}: {job.name}: {time.perf_counter() - started:.0f} s")
        for row in rows:
            for one in row.figures:
                goal = f", {one.verdict}" if one.verdict else ""
                _say(f"    {row.case}: {one.measure} {page.shown(one)}{goal}")
            if row.note and not row.figures:
                _say(f"    {row.case}: {row.note}")


def _jobs(world: World, groups: Sequence[str]) -> Iterator[tuple[str, Job]]:
    for group in groups:
        for job in GROUPS[group](world):
            yield group, job


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ip_adapter.bench",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "groups",
        nargs="*",
        type=_group,
        metavar="group",
        default=[],
        help=f"{', '.join(TITLES)}; all of them unless named",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--size", choices=get_args(Size), default="real", help="small: to try the tool itself")
    add("--rounds", type=int, default=12, help="how often everything is timed")
    add(
        "--results",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="JSON to add to (the first), and to make the page of; docs/performance/*.json",
    )
    add(
        "--page",
        type=Path,
        nargs="?",
        const=FOLDER.with_suffix(".md"),
        metavar="FILE",
        help="write the page, and measure only the groups that are named",
    )
    add("--again", action="store_true", help="measure also what is in the results")
    return parser


def _group(name: str) -> str:
    if name not in (*TITLES, "all"):
        raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(TITLES)}, all")
    return name


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
