"""Rows of figures and the file they are kept in, which is written after each measurement.

A file belongs to one machine, one set of versions and one size; it refuses others, so that no
table mixes them. A measurement that is in it is not made again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from .. import files
from .counting import Work
from .errors import BenchError
from .estimates import Estimate

FORMAT = 1

Verdict = Literal["met", "missed", "open", ""]


@dataclass(frozen=True)
class Figure:
    """One number of a row.

    Attributes:
        measure: What it is, in words.
        value: The number.
        low: Lower end of its 95 % interval; None for what is counted.
        high: Upper end.
        unit: Behind the number; empty for a ratio.
        goal: At most this; None where there is no goal.
        is_noise_met: Whether the goal is met where the interval holds it, as a slope of zero is.
    """

    measure: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    goal: float | None = None
    is_noise_met: bool = False

    @property
    def verdict(self) -> Verdict:
        """Whether the goal is met; ``open`` where the interval holds it."""
        if self.goal is None:
            return ""
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        if high <= self.goal or (self.is_noise_met and low <= self.goal):
            return "met"
        return "missed" if low > self.goal else "open"


def figure(
    measure: str, estimate: Estimate, *, goal: float | None = None, unit: str = ""
) -> Figure:
    """A figure of an estimate."""
    return Figure(measure, estimate.value, estimate.low, estimate.high, unit, goal)


@dataclass(frozen=True)
class Row:
    """What one case came to.

    Attributes:
        case: What was measured, in words.
        figures: Its numbers.
        work: What one unit of it is made of, without and with an image prompt, if it was counted.
        note: What a reader must know of it, such as a smaller picture.
        context: What is kept but not shown: seconds.
    """

    case: str
    figures: tuple[Figure, ...] = ()
    work: tuple[Work, Work] | None = None
    note: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """The rows of what was measured together.

    Attributes:
        group: Its group of rows.
        name: Unique in the group.
        rounds: How often everything was timed.
        rows: What came of it.
    """

    group: str
    name: str
    rounds: int
    rows: tuple[Row, ...]


class Results:
    """A file of measurements.

    Args:
        path: Where it is, or will be.
        environment: See `environment`; None to take the file's, for reading.

    Raises:
        BenchError: The file is of another environment, or is none of ours.
    """

    def __init__(self, path: Path, environment: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.measurements: list[Measurement] = []
        self.environment = dict(environment or {})
        if not path.is_file():
            if environment is None:
                raise BenchError(f"There are no results in '{path}'. Measure first.")
            return
        found = _read(path)
        differing = [
            f"{name}: {found['environment'].get(name)!r} there, {value!r} now"
            for name, value in self.environment.items()
            if found["environment"].get(name) != value
        ]
        if differing:
            raise BenchError(
                f"'{path}' was measured elsewhere or with other versions ({'; '.join(differing)}). "
                "Name another file with --results, or delete this one."
            )
        self.environment = found["environment"]
        self.measurements = [_measurement(one) for one in found["measurements"]]

    def has(self, group: str, name: str) -> bool:
        """Whether a measurement is there."""
        return any((one.group, one.name) == (group, name) for one in self.measurements)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement, in the place of an older one, and write the file."""
        key = (measurement.group, measurement.name)
        kept = [one for one in self.measurements if (one.group, one.name) != key]
        self.measurements = [*kept, measurement]
        content = {
            "format": FORMAT,
            "environment": self.environment,
            "measurements": [asdict(one) for one in self.measurements],
        }
        files.write(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def rows(self, group: str) -> list[Row]:
        """The rows of a group, in the order in which they were measured."""
        return [row for one in self.measurements if one.group == group for row in one.rows]


def environment(device: str, size: str) -> dict[str, str]:
    """What figures depend on: the kind of machine and the versions; nothing that names a machine.

    Args:
        device: As torch names it.
        size: Of the models.
    """
    is_cuda = device.startswith("cuda")
    kind = torch.cuda.get_device_name() if is_cuda else _processor()
    found = {
        "device": "cuda" if is_cuda else "cpu",
        "machine": kind if is_cuda else f"{kind}, {torch.get_num_threads()} threads",
        "size": size,
        "system": platform.system(),
        "python": platform.python_version(),
    }
    for name in ("torch", "diffusers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    try:
        found["comfyui"] = str(import_module("comfyui_version").__version__)
    except ImportError:
        found["comfyui"] = "unknown"
    return found


def _processor() -> str:
    """The processor's kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"'{path}' cannot be read as results: {error}. Delete it.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BenchError(
            f"'{path}' holds no results of format {FORMAT}. Name another file with --results."
        )
    return found


def _measurement(found: Mapping[str, Any]) -> Measurement:
    rows = tuple(_row(one) for one in found["rows"])
    return Measurement(found["group"], found["name"], found["rounds"], rows)


def _row(found: Mapping[str, Any]) -> Row:
    counted: Sequence[Mapping[str, int]] | None = found["work"]
    return Row(
        found["case"],
        tuple(Figure(**one) for one in found["figures"]),
        None if counted is None else (Work(**counted[0]), Work(**counted[1])),
        found["note"],
        found["context"],
    )
