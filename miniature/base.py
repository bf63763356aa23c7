"""Train the miniature's base UNet, and fine-tune it to a style of its own.

python -m miniature base
python -m miniature fine_tune
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ip_adapter.host.standalone import Models
from ip_adapter.host.training import schedule_of

from . import denoise, networks

STEPS, FINE_STEPS = 7000, 1000
PICTURES, FINE_PICTURES = 12_000, 3_000
BATCH = 32


def train(models: Models, steps: int = STEPS, seed: int = 0) -> dict[str, Tensor]:
    """Train the UNet from nothing on captioned pictures of the world.

    Args:
        models: The host's, for their text encoder, VAE and schedule; the UNet is not read.
        steps: Of AdamW, with 32 pictures each.
        seed: Decides everything.

    Returns:
        Tensors under the host's names, without a prefix.
    """
    rows = denoise.paint(PICTURES, models.vae, seed + 1)
    return _train("Base", networks.unet(), models, rows, steps=steps, rate=1e-3, seed=seed)


def fine_tune(
    models: Models, base: Mapping[str, Tensor], steps: int = FINE_STEPS, seed: int = 0
) -> dict[str, Tensor]:
    """Train the base on pictures with a dark outline: the "custom model" of the evidence."""
    rows = denoise.paint(FINE_PICTURES, models.vae, seed + 2, outlined=True)
    unet = networks.unet(base)
    return _train("Fine-tune", unet, models, rows, steps=steps, rate=3e-4, seed=seed)


def _train(
    name: str, unet: nn.Module, models: Models, rows: denoise.Rows, **how: Any
) -> dict[str, Tensor]:
    def predict(noised: Tensor, timesteps: Tensor, text: Tensor, _: list[int]) -> Tensor:
        made: Tensor = unet(
            noised, timesteps.float(), context=text, transformer_options=networks.OPTIONS
        )
        return made

    schedule = schedule_of(models.model)
    texts = denoise.Texts(models.clip)
    return denoise.train(name, unet, predict, rows, texts, schedule, batch=BATCH, **how)
