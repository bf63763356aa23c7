"""What the groups of rows share: the settings, the base models, and the measuring of steps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import clocks, counting, models, sampling
from .clocks import Clock
from .counting import Work
from .estimates import Array
from .models import Base, FamilyName, Size
from .results import Row

Device = Literal["cpu", "cuda"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: Where the host computes.
        size: ``real`` for figures; ``small`` tries the benchmark itself.
        rounds: How often everything is timed.
    """

    device: Device
    size: Size = "real"
    rounds: int = 12

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What models compute in: half precisions on a GPU."""
        return ("float16", "bfloat16") if self.device == "cuda" else ("float32",)

    @property
    def prompts(self) -> int:
        """Length of the queue whose memory is watched."""
        return 500 if self.size == "real" else 12

    @property
    def clock(self) -> Clock:
        """The device's."""
        return clocks.clock(self.device)

    def pixels(self, published: int, on_cpu: int | None = None) -> int:
        """The side of a picture: as published, less on a CPU where it says so, tiny for a try."""
        if self.size == "small":
            return 64
        return published if self.device == "cuda" or on_cpu is None else on_cpu


@dataclass(frozen=True)
class Job:
    """Something that is measured in one go.

    Attributes:
        name: Unique in its group.
        measure: Does it.
    """

    name: str
    measure: Callable[[], Sequence[Row]]


class World:
    """The models, made when they are asked for; one base model at a time.

    Args:
        settings: How to measure. The host runs already.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._base: Base | None = None

    def base(self, family: FamilyName, dtype: str | None = None) -> Base:
        """A base model; another one is let go of."""
        wanted = DTYPES[dtype or self.settings.dtypes[0]]
        found = self._base
        if found is None or (found.family, found.dtype) != (family, wanted):
            found = None
            self.let_go()
            self._base = found = models.base(family, self.settings.size, wanted)
        return found

    def let_go(self) -> None:
        """Keep no base model."""
        self._base = None
        free()


Jobs = Callable[[World], Iterator[Job]]
"""A group of rows."""


def free() -> None:
    """What the host's /free does: unload all models, collect, give memory back."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


@torch.inference_mode()
def time_steps(
    settings: Settings, scene: sampling.Scene, patched: Sequence[Any], *, rounds: int | None = None
) -> Array:
    """Time steps of several MODELs, interleaved.

    Args:
        settings: Clock and rounds.
        scene: What is sampled.
        patched: The MODELs.
        rounds: Another number of them.

    Returns:
        ``[R, N]`` seconds.
    """
    return sampling.open_runs(
        scene,
        patched,
        lambda steps: clocks.interleave(steps, rounds or settings.rounds, settings.clock),
    )


@torch.inference_mode()
def count_steps(scene: sampling.Scene, patched: Sequence[Any]) -> list[Work]:
    """What one step of each MODEL is made of, after the first of its run."""

    def body(steps: list[sampling.Step]) -> list[Work]:
        for step in steps:
            step(0)
        return [counting.count(lambda s=step: s(1)) for step in steps]  # type: ignore[misc]

    return sampling.open_runs(scene, patched, body)
