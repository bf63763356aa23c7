"""What a training shows while it runs: the curve of its loss, and what the adapter makes by now.

It only looks. It changes no weight and draws from no random stream of the training, so the numbers
are the same with it and without; and its pictures take a tenth of the time at most.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import drawing
from ..objective import Decoupled, KeysValues, Schedule, usable
from .curve import HEIGHT, WIDTH, draw_curve
from .loop import Step
from .pieces import load_picture
from .session import Session

log = logging.getLogger(__name__)

PERIOD = 2.0
"""Seconds from one picture to the next."""

SHARE = 0.1
"""Of the time since the first step, which samples may take."""

STEPS, GUIDANCE = 12, 4.0
"""Of the sampler."""

_SHOWN = 3
"""Samples beside the reference, the newest ones."""

_EDGE, _GAP, _LETTERS = 16, 8, 14
_SIDE = (WIDTH - 2 * _EDGE - _SHOWN * _GAP) // (_SHOWN + 1)

Sampler = Callable[[], Image.Image]
"""Makes a sample with the adapter as it is."""


class Live:
    """Follows a training and draws it now and then.

    Args:
        steps: That the training will have.
        every: Steps from one sample to the next, at least; 0 for the curve alone.
        clock: Seconds.
    """

    def __init__(
        self, steps: int, every: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps, self.every = steps, every
        self.losses: list[float] = []
        self.samples: list[tuple[int, Image.Image]] = []
        self._clock = clock
        self._began, self._shown = clock(), -math.inf
        self._spent = self._cost = 0.0
        self._reference: Image.Image | None = None
        self._sampler: Sampler | None = None

    def begin(self, reference: Image.Image, sampler: Sampler) -> None:
        """Say before the first step how samples are made, and from which reference."""
        self._reference, self._sampler = reference, sampler
        self._began = self._clock()

    def __call__(self, step: Step) -> Image.Image | None:
        """Take note of a step, and make a sample if it is time to.

        Returns:
            A picture where a new one is due.
        """
        self.losses.append(step.loss)
        is_last = step.number >= self.steps
        sampled = self._is_due(step.number, is_last) and self._sample(step.number)
        now = self._clock()
        if not (is_last or sampled or now - self._shown >= PERIOD):
            return None
        self._shown = now
        return self.picture()

    def picture(self) -> Image.Image:
        """The curve so far, with the newest samples below it."""
        curve = draw_curve(self.losses, self.steps)
        if not self.samples:
            return curve
        strip = drawing.line_height(_LETTERS) + _SIDE + _EDGE
        sheet, pen = drawing.canvas(WIDTH, HEIGHT + strip)
        sheet.paste(curve, (0, 0))
        cells = [(f"step {number}", sample) for number, sample in self.samples[-_SHOWN:]]
        if self._reference is not None:
            cells.insert(0, ("reference", self._reference))
        for place, (name, seen) in enumerate(cells):
            x = _EDGE + place * (_SIDE + _GAP)
            drawing.label(pen, (x, HEIGHT), name, size=_LETTERS, fill=drawing.GREY, width=_SIDE)
            top = HEIGHT + drawing.line_height(_LETTERS)
            sheet.paste(ImageOps.fit(seen.convert("RGB"), (_SIDE, _SIDE)), (x, top))
        return sheet

    def close(self) -> None:
        """Make no more samples, and let go of what makes them."""
        self._sampler = None

    def _is_due(self, number: int, is_last: bool) -> bool:
        """The last one is always made; others where it is their turn and there is time."""
        if not self.every or self._sampler is None:
            return False
        if not is_last and number % self.every:
            return False
        ends = self._spent + self._cost
        return is_last or ends <= SHARE * (self._clock() - self._began)

    def _sample(self, number: int) -> bool:
        """Whether there is one more; where it fails, training goes on without."""
        assert self._sampler is not None
        before = self._clock()
        try:
            sample = self._sampler()
        except (RuntimeError, MemoryError) as error:  # torch's lack of memory is the first
            log.warning("IP-Adapter: no more samples in this training, one failed: %s", error)
            self.close()
            return False
        self._cost = self._clock() - before
        self._spent += self._cost
        self.samples = [*self.samples[1 - _SHOWN :], (number, sample)]
        return True


def sampler(session: Session, steps: int = STEPS, guidance: float = GUIDANCE) -> Sampler:
    """Make samples of a session: its first row's text and reference, always with the same noise.

    The UNet is the one that is trained with, so no second one needs memory; the VAE is the host's,
    and leaves again.

    Args:
        session: Whose base and adapter are used as they are at each call.
        steps: Of the sampler.
        guidance: Of classifier-free guidance.
    """
    generator = torch.Generator().manual_seed(session.recipe.seed)
    with torch.inference_mode(False):
        row = session.ready(session.cache.read([0]))
        noise = torch.randn(row["latents"].shape, generator=generator)

    def make() -> Image.Image:
        device = session.base.device
        # Nothing here draws; what another pack hangs into the VAE might.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            latents = _latents(session, row, noise, steps, guidance)
            return _decoded(session, latents)

    return make


def first_reference(session: Session) -> Image.Image:
    """What the samples of `sampler` are made from."""
    row = session.rows[0]
    return drawing.from_image(load_picture(row.reference or row.image))[0]


def _latents(session: Session, row: Any, noise: Tensor, steps: int, guidance: float) -> Tensor:
    base, nothing, size = session.base, session.nothing, row.get("size")
    given = {name: row[name] for name in ("image", "face") if name in row}
    none = {name: torch.zeros_like(rows) for name, rows in given.items()}
    if nothing.image is not None and "image" in none:
        none["image"] = nothing.image.float()
    read = Decoupled(session.adapter)
    texts = (row["text"], row.get("pooled")), (nothing.text, nothing.pooled)
    sides: list[tuple[Tensor, Tensor | None, KeysValues]] = []
    for (text, pooled), features in zip(texts, (given, none), strict=True):
        moved = {name: usable(rows).to(base.device) for name, rows in features.items()}
        sides.append((text, pooled, read(**moved)))

    def predict(noised: Tensor, timestep: Tensor) -> Tensor:
        given, none = (
            cast(Tensor, base.predict(noised, timestep, text, image, pooled=pooled, size=size))
            for text, pooled, image in sides
        )
        return none + guidance * (given - none)

    return ddim(predict, base.schedule, noise.to(base.device), steps)


def ddim(
    predict: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, noise: Tensor, steps: int
) -> Tensor:
    """Sample by DDIM without fresh noise (arXiv 2010.02502, eq. 12 with sigma 0).

    Args:
        predict: Of noised latents and time steps ``[B]``, as the schedule's target says.
        schedule: Of the base.
        noise: ``[B, C, h, w]``, where it begins.
        steps: How many, 1 or more.

    Returns:
        ``[B, C, h, w]``, latents as the UNet sees them.
    """
    places = [round(schedule.steps * left / steps) - 1 for left in range(steps, 0, -1)]
    alphas = [float(schedule.alphas_cumprod[place]) for place in places]
    latents = noise
    for place, alpha, after in zip(places, alphas, [*alphas[1:], 1.0], strict=True):
        signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
        timesteps = torch.full((len(noise),), place, device=noise.device)
        found = predict(latents, timesteps)
        if schedule.target == "v":
            clean, drift = signal * latents - spread * found, signal * found + spread * latents
        else:
            clean, drift = (latents - spread * found) / signal, found
        latents = math.sqrt(after) * clean + math.sqrt(1 - after) * drift
    return latents


def _decoded(session: Session, latents: Tensor) -> Image.Image:
    import comfy.model_management

    plain = session.models.model.model.process_latent_out(latents.float().cpu())
    try:
        return drawing.from_image(session.models.vae.decode(plain))[0]
    finally:  # the VAE would stay beside the copy that is trained with
        comfy.model_management.unload_all_models()
