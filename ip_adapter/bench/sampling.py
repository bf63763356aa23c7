"""Steps of the host's sampler, of several sampling runs that are open at the same time.

A step is what a sampler node waits for: guidance over both conditionings, the host's wrappers, the
UNet. To compare MODELs step by step, with nothing between two steps but the reading of a clock, a
run is opened for each of them, one inside the sampler function of the other; the innermost gets
the steps of all. They share the weights, and what a run prepares for itself is done before.

Step by step, and not run by run, because what disturbs a machine lasts for seconds: the closer two
measurements are, the more alike it weighs on both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .models import LATENT, Base, draw

T = TypeVar("T")

STEPS = 20
"""Of the schedule; the numbers of steps go round in it."""


@dataclass(frozen=True, eq=False)
class Scene:
    """What is sampled.

    Attributes:
        base: Its text states are used.
        height: In pixels.
        width: In pixels.
        batch: Pictures.
        guidance: Scale; at 1 the host leaves the negative side out.
    """

    base: Base
    height: int
    width: int
    batch: int = 1
    guidance: float = 7.0

    def noise(self) -> Tensor:
        """``[B, 4, h, w]``."""
        return draw(self.batch, 4, self.height // LATENT, self.width // LATENT, seed=3)

    def guider(self, model: Any) -> Any:
        """The host's guider for a MODEL in this scene."""
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.base.conditioning(1), self.base.conditioning(2))
        guider.set_cfg(self.guidance)
        return guider

    def sigmas(self) -> Tensor:
        """``[STEPS + 1]``."""
        import comfy.samplers

        sampling = self.base.model.get_model_object("model_sampling")
        found = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
        return found  # type: ignore[no-any-return]


class Step:
    """The steps of one open run.

    Args:
        denoise: What the host gives a sampler function.
        patcher: The run's MODEL.
        x: ``[B, 4, h, w]``, the latent that every step is given.
        sigmas: ``[STEPS + 1]``.
        extra: What the host passes along.
    """

    def __init__(
        self, denoise: Any, patcher: Any, x: Tensor, sigmas: Tensor, extra: dict[str, Any]
    ) -> None:
        self._denoise, self._patcher, self._x, self._extra = denoise, patcher, x, extra
        self._sigmas = [sigma.expand(len(x)) for sigma in sigmas[:-1]]

    def prepare(self) -> None:
        """Tell the host's model whose run goes on; it knows one at a time."""
        self._patcher.model.current_patcher = self._patcher

    def __call__(self, number: int) -> Tensor:
        """Do step `number` of the schedule: what the model makes of the latent."""
        self.prepare()
        sigma = self._sigmas[number % len(self._sigmas)]
        return self._denoise(self._x, sigma, **self._extra)  # type: ignore[no-any-return]


def open_runs(scene: Scene, models: Sequence[Any], body: Callable[[list[Step]], T]) -> T:
    """Open a sampling run for each MODEL, and call `body` while all are open.

    Inference mode is the caller's: the host samples in it, counting memory does not.

    Args:
        scene: What is sampled.
        models: Clones of the scene's base model.
        body: Gets the steps of each, in order.

    Returns:
        What `body` returned.
    """
    import comfy.samplers

    steps: list[Step] = []
    results: list[T] = []
    sigmas = scene.sigmas()

    def enter() -> None:
        if len(steps) == len(models):
            results.append(body(list(steps)))
            return
        model = models[len(steps)]

        def sampler(
            denoise: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any
        ) -> Tensor:
            steps.append(Step(denoise, model, x, sigmas, extra_args or {}))
            try:
                enter()
            finally:
                steps.pop().prepare()
            return x

        noise = scene.noise()
        scene.guider(model).sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.KSAMPLER(sampler),
            sigmas,
            disable_pbar=True,
            seed=0,
        )

    enter()
    return results[0]
