"""Train the miniature's ControlNet, which reads the white silhouette of a shape on black.

python -m miniature control
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ip_adapter.host.standalone import Models
from ip_adapter.host.training import schedule_of

from . import denoise, family, networks, world

STEPS = 2000
PICTURES = 5_000
BATCH = 32
BLIND = 0.5
"""Share of the rows whose text is withheld, so that the hint alone must tell the shape."""


def train(
    models: Models, base: Mapping[str, Tensor], steps: int = STEPS, seed: int = 0
) -> dict[str, Tensor]:
    """Train a ControlNet on the frozen base.

    Args:
        models: The host's, for their text encoder, VAE and schedule.
        base: Tensors of the UNet.
        steps: Of AdamW, with 32 pictures each.
        seed: Decides everything.

    Returns:
        Tensors under the names of the original ControlNet.
    """
    rows = denoise.paint(PICTURES, models.vae, seed + 3)
    unet = networks.unet(base).requires_grad_(False).to(family.device())
    control = networks.controlnet(base)

    def predict(noised: Tensor, timesteps: Tensor, text: Tensor, numbers: list[int]) -> Tensor:
        hints = world.outlines([rows.scenes[number] for number in numbers])
        blind = torch.rand(len(text), 1, 1).to(text) < BLIND
        text = torch.where(blind, texts([""]).to(text), text)
        moments = timesteps.float()
        found = control(noised, hints.to(noised.device), moments, text)
        made: Tensor = unet(
            noised, moments, context=text, control=found, transformer_options=networks.OPTIONS
        )
        return made

    texts = denoise.Texts(models.clip)
    return denoise.train(
        "ControlNet",
        control,
        predict,
        rows,
        texts,
        schedule_of(models.model),
        steps=steps,
        batch=BATCH,
        rate=5e-4,
        seed=seed,
    )
