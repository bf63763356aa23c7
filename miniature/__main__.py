"""Make the miniature: train every part of it that is not there yet.

    python -m miniature                      all, two trainings at a time
    python -m miniature base --again         one part, also where it is there
    python -m miniature train ARGS           ip_adapter.train in a host that knows the miniature
    python -m miniature evaluate ARGS        ip_adapter.evaluate likewise

Parts that were trained from others are not made anew when those are: take them away, or name them
with --again.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from .recipe import PARTS

CORES = 2
"""Trainings at a time; each computes on one core, which is faster than two on one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is asked for; the exit status is 0, or 1 if a training failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in ("train", "evaluate"):
        from . import process

        process.start(cpu="--cpu" in given)
        tool = importlib.import_module(f"ip_adapter.{given[0]}.__main__")
        return int(tool.main(given[1:]))
    parser = argparse.ArgumentParser(
        prog="python -m miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"there is no part '{unknown[0]}'; there are {', '.join(PARTS)}")
    names = options.parts or list(PARTS)
    if options.here:
        for name in names:
            PARTS[name].train()
        return 0
    return _all(names if options.again else missing(options.parts))


def missing(names: Sequence[str] = ()) -> list[str]:
    """Parts to train so that these are there, in the order of the recipe.

    A part that only serves others which are there already is not missed.

    Args:
        names: The parts that are wanted; all that are shipped unless given.
    """
    wanted = list(names) or [name for name, part in PARTS.items() if part.is_shipped]
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in found and not PARTS[name].made.exists():
            found.add(name)
            wanted += PARTS[name].needs
    return [name for name in PARTS if name in found]


def _all(names: list[str]) -> int:
    """Run trainings, each in a process of its own, as soon as those they need are done."""
    waiting, running = list(names), dict[str, subprocess.Popen[bytes]]()
    began = time.monotonic()
    try:
        while waiting or running:
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                minutes = (time.monotonic() - began) / 60
                if process.returncode:
                    sys.stderr.write(f"miniature: {name} failed; see above.\n")
                    return 1
                sys.stderr.write(f"miniature: {name} is done, {minutes:.0f} min after the start\n")
            for name in list(waiting):
                if len(running) < CORES and not set(PARTS[name].needs) & {*waiting, *running}:
                    waiting.remove(name)
                    running[name] = _start(name)
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return 0


def _start(name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "miniature", name, "--here"]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    sys.exit(main())
