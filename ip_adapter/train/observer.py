"""What happens beside the steps, now and then: validation, branch sizes, samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..objective import Decoupled, Simple
from ..projections import Features
from . import samples, watch
from .journal import Log
from .loop import Step
from .pieces import load_picture
from .session import Session

log = logging.getLogger(__name__)

LOSS_EVERY = 10
"""Steps whose mean loss is one line of the log."""


class Observer:
    """Watches a run; give it to `loop.train` as ``on_step``.

    Args:
        session: The run.
        out: Its folder.
        step: Where it begins.
        say: Gets lines for whoever watches.
        shown: How many references the sample grids have; 0 for no grids.
        sample_every: Steps between grids; `Recipe.validate_every` unless given.
        sample_steps: Of the sampler.
    """

    def __init__(
        self,
        session: Session,
        out: Path,
        step: int = 0,
        *,
        say: Callable[[str], object] = log.info,
        shown: int = 4,
        sample_every: int | None = None,
        sample_steps: int = 20,
    ) -> None:
        self.session, self.say, self.sample_steps = session, say, sample_steps
        self.log = Log(out, step)
        recipe = session.recipe
        self.validate_every = recipe.validate_every
        # The simple design has no weight: its image tokens are text to the model.
        can_sample = recipe.design == "decoupled"
        every = recipe.validate_every if sample_every is None else sample_every
        self.sample_every = every if can_sample and shown else 0
        self._losses: list[float] = []
        self._held: watch.HeldOut | None = None
        if session.held_cache is not None and self.validate_every:
            rows = session.ready(session.held_cache.read(range(len(session.held_out))))
            self._held = watch.hold_out(
                rows, schedule=session.base.schedule.steps, seed=recipe.seed
            )
        source = session.held_out or session.rows
        self._shown = source[:shown]

    def __call__(self, step: Step) -> None:
        """Take note of a step, and look closer if it is time to."""
        recipe = self.session.recipe
        is_last = step.number >= recipe.steps
        self._losses.append(step.loss)
        if len(self._losses) >= LOSS_EVERY or is_last:
            mean = sum(self._losses) / len(self._losses)
            self._losses.clear()
            self.log.numbers(step.number, {"loss": mean, "samples": step.samples})
        if self.validate_every and (is_last or step.number % self.validate_every == 0):
            self.validate(step.number)
        if self.sample_every and (is_last or step.number % self.sample_every == 0):
            self.sample(step.number)

    def validate(self, step: int) -> watch.Validation | None:
        """Measure and note what the reference is worth; None where no rows are held out."""
        if self._held is None:
            return None
        session, sizes = self.session, watch.BranchSizes()
        simple = session.recipe.design == "simple"
        trainee = Simple(session.adapter) if simple else Decoupled(session.adapter)
        found = watch.validate(
            trainee,
            session.base,
            self._held,
            session.nothing,
            batch_size=session.recipe.batch_size,
            sizes=None if simple else sizes,
        )
        numbers = {f"validation/{name}": value for name, value in found.scalars().items()}
        ratios = sizes.ratios()
        self.log.numbers(step, numbers | watch.named(ratios, session.adapter.spec.family))
        self.say(f"step {step}: {found.in_words()}")
        if ratios:
            self.say(f"step {step}: {watch.in_words(ratios)}")
        return found

    def sample(self, step: int) -> Path:
        """Make and write a grid: reference | weight 0 | 0.5 | 1; return its path.

        Noise is the same in every grid of a run, so that grids can be compared.
        """
        import comfy.model_management

        session = self.session
        with torch.inference_mode():
            loaded = samples.snapshot(session.adapter)
            shape = session.cache.read([0])["latents"].shape
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(session.recipe.seed))
            pixels = samples.sample_grid(
                session.models.model,
                session.models.vae,
                loaded,
                self._prompts(loaded),
                self._conditioning(session.cache.no_text, session.cache.no_pooled),
                noise,
                steps=self.sample_steps,
            )
        # The host's UNet and VAE would otherwise stay beside the copy that is trained with.
        comfy.model_management.unload_all_models()
        path = self.log.picture(step, "samples", pixels)
        self.say(f"step {step}: {path} (reference | weight 0 | 0.5 | 1)")
        return path

    def close(self) -> None:
        """Finish the log."""
        self.log.close()

    def _prompts(self, loaded: Any) -> Sequence[samples.Shown]:
        from ..host import encoding

        session = self.session
        known = session.held_cache if session.held_out else session.cache
        assert known is not None
        out = []
        for i, row in enumerate(self._shown):
            rows = known.read([i])
            prompt = encoding.from_features(
                loaded,
                Features(image=_float(rows.get("image")), face=_float(rows.get("face"))),
                Features(image=_float(known.no_image), face=_float(known.no_face)),
            )
            picture = load_picture(row.reference or row.image)[0, ..., :3]
            out.append(
                samples.Shown(picture, prompt, self._conditioning(rows["text"], rows.get("pooled")))
            )
        return out

    def _conditioning(self, text: Tensor, pooled: Tensor | None) -> Any:
        size = self.session.size
        more: dict[str, Any] = {"width": size, "height": size}
        if pooled is not None:
            more["pooled_output"] = pooled.float()
        return [[text.float(), more]]


def _float(features: Tensor | None) -> Tensor | None:
    return None if features is None else features.float()
