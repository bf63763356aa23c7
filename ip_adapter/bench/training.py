"""Row 7: our training against a plain loop over diffusers' UNet, with the same weights and batch.

Ours is the whole loop that users run. The plain one is what one would write by hand: a UNet with
diffusers' IP-Adapter processors, AdamW on what they add, mean squared error. Their steps are taken
within our callback, in the order ours theirs, theirs ours.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..objective import Nothing
from . import estimates, rival
from .counting import peak_bytes
from .models import LATENT, Base, Kind, draw
from .results import Figure, Row, figure
from .steps import Case
from .world import Job, World

RATE, DECAY = 1e-4, 0.01
WARM_UP = 2
"""Rounds that are not counted."""

Batch = Mapping[str, Tensor]


def jobs(world: World) -> Iterator[Job]:
    """Both kinds of encoder features."""
    kinds: tuple[Kind, ...] = ("global", "plus")
    for kind in kinds:
        yield Job(f"SD 1.5, {kind}", partial(_measure, world, kind))


def _measure(world: World, kind: Kind) -> list[Row]:
    settings = world.settings
    base = world.base("SD 1.5", "bfloat16" if settings.device == "cuda" else None)
    side = settings.pixels(512, 256)
    rows = 4 if settings.device == "cuda" else 1
    batch = make_batch(base, kind, rows, side)
    rounds = WARM_UP + settings.rounds
    ours, theirs = Ours(base, kind, batch, settings.device), Theirs(base, kind, batch)

    seconds = np.empty((rounds, 2))
    started = time.perf_counter()

    def on_step(step: Any) -> None:
        nonlocal started
        number = step.number - 1
        if number >= rounds:
            return
        seconds[number, 0] = _now(settings.device) - started
        if number % 2 == 0:  # ours theirs, theirs ours
            for place in (number, number + 1):
                before = _now(settings.device)
                theirs.step()
                if place < rounds:
                    seconds[place, 1] = _now(settings.device) - before
        started = _now(settings.device)

    # One more than is timed: the last one writes weights and state.
    ours.train(rounds + 1, on_step)
    kept = seconds[WARM_UP:]
    theirs = Theirs(base, kind, batch)
    memory = [
        peak_bytes(lambda: ours.train(2, None), settings.device),
        peak_bytes(lambda: [theirs.step() for _ in range(2)], settings.device),
    ]
    return [
        Row(
            f"SD 1.5 {side} x {side}, batch {rows}, {kind}",
            (
                figure("time of a step / plain loop", estimates.ratio(kept[:, 1], kept[:, 0])),
                Figure("peak memory / plain loop", memory[0] / memory[1]),
            ),
            note="" if side == 512 or settings.size == "small" else "512 x 512 is left to GPUs",
            context={"seconds": kept.tolist(), "bytes": memory},
        )
    ]


@torch.inference_mode(False)
def make_batch(base: Base, kind: Kind, rows: int, side: int) -> dict[str, Tensor]:
    """Random latents, text states and image features, as our cache gives them."""
    read = base.adapter(kind).spec.projection
    shape = (read.features,) if read.image == "pooled" else (257, read.features)
    return {
        "latents": draw(rows, 4, side // LATENT, side // LATENT, seed=5),
        "text": base.conditioning(1)[0][0].repeat(rows, 1, 1),
        "image": draw(rows, *shape, seed=6),
    }


class Ours:
    """`ip_adapter.train` on a batch that comes again and again.

    Args:
        base: Whose UNet is copied, frozen.
        kind: Of the adapter.
        batch: See `make_batch`.
        device: ``cuda`` trains in bf16.
    """

    def __init__(self, base: Base, kind: Kind, batch: Batch, device: str) -> None:
        from ..host import training

        self.base, self.batch, self.device = base, batch, device
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.trainable = training.TrainableModel(base.model, dtype=dtype)
        self.adapter = training.new_adapter(base.adapter(kind).spec, base.model)
        self.nothing = Nothing(base.conditioning(2)[0][0])

    def train(self, steps: int, on_step: Callable[[Any], None] | None) -> None:
        """A whole training; its files are thrown away."""
        from ..host.training import training_mode
        from ..train import loop, recipe

        asked = recipe.make(
            {
                "steps": steps,
                "batch_size": len(self.batch["latents"]),
                "learning_rate": RATE,
                "weight_decay": DECAY,
                "mixed_precision": "bf16" if self.device == "cuda" else "no",
                "save_every": steps,
            }
        )
        with tempfile.TemporaryDirectory() as folder, training_mode():
            loop.train(
                asked,
                self.trainable,
                self.adapter,
                self._source,
                self.nothing,
                Path(folder),
                on_step=on_step,
                is_quiet=True,
                cpu=self.device == "cpu",
            )

    def _source(self, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        while True:
            yield self.batch


class Theirs:
    """A loop as one writes it by hand.

    Args:
        base: Whose weights diffusers' UNet gets.
        kind: Of the adapter.
        batch: See `make_batch`.
    """

    def __init__(self, base: Base, kind: Kind, batch: Batch) -> None:
        from ..host.training import schedule_of

        self.device = base.model.load_device
        self.schedule = schedule_of(base.model)
        self.batch = {name: rows.to(self.device) for name, rows in batch.items()}
        self.precision = base.dtype
        with torch.inference_mode(False), torch.enable_grad():
            self.unet = rival.unet(base, Case((kind,)))
            self.trained = _added(self.unet)
            self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=DECAY)

    def step(self) -> float:
        """One optimizer step; returns the loss."""
        is_half = self.precision != torch.float32
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=is_half),
        ):
            latents = self.batch["latents"]
            noise = torch.randn_like(latents)
            steps = torch.randint(self.schedule.steps, (len(latents),), device=self.device)
            image = self.batch["image"]
            found = self.unet(
                self.schedule.noised(latents, noise, steps),
                steps,
                encoder_hidden_states=self.batch["text"],
                added_cond_kwargs={"image_embeds": [image[:, None]]},
                return_dict=False,
            )[0]
            loss = F.mse_loss(found.float(), noise)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            return float(loss.detach())


def _added(unet: Any) -> list[torch.nn.Parameter]:
    """What an IP-Adapter adds to diffusers' UNet, in float32 and with gradients."""
    modules = [unet.encoder_hid_proj]
    modules += [one for one in unet.attn_processors.values() if isinstance(one, torch.nn.Module)]
    found = []
    for module in modules:
        module.float().requires_grad_(True)
        found += list(module.parameters())
    return found


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
