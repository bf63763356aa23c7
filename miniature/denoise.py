"""What the trainings of the base, the fine-tune and the ControlNet share.

Rows of latents and captions, the forward diffusion, and a loop with an average of the weights. The
adapters are not trained here: they go through the project's own trainer, `ip_adapter.train`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ip_adapter.objective import Schedule
from ip_adapter.train import features

from . import family, progress, world

DROPPED = 0.12
"""Share of the rows that see no text, so that guidance knows what a text adds."""

STEADY = 5.0
"""Rows with little noise count by this over their ratio of signal to noise (min-SNR weighting).

Source: arXiv 2303.09556.
"""


@dataclass(frozen=True, eq=False)
class Rows:
    """Pictures of the world as the UNet sees them, with what a caption may say.

    Attributes:
        scenes: What was painted.
        latents: ``[N, 4, 8, 8]``.
    """

    scenes: Sequence[world.Scene]
    latents: Tensor


class Texts:
    """States of captions, computed when they are first asked for; the world has some 13 000.

    Args:
        clip: The host's CLIP.
    """

    def __init__(self, clip: Any) -> None:
        self._clip = clip
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """``[N, 77, D]``."""
        return torch.stack([self._state(caption) for caption in captions]).float()

    def _state(self, caption: str) -> Tensor:
        if caption not in self._known:
            with torch.inference_mode(False), torch.no_grad():
                self._known[caption] = features.text(self._clip, caption)["text"].half()
        return self._known[caption]


def paint(count: int, vae: Any, seed: int, *, outlined: bool = False) -> Rows:
    """Draw scenes and encode their pictures.

    Args:
        count: How many.
        vae: The host's VAE of the miniature.
        seed: Decides which.
        outlined: The style of the fine-tune.
    """
    rng = random.Random(seed)
    scenes = [world.draw(rng) for _ in range(count)]
    latents = []
    # The host may hold its own in half precision; this one is for many pictures at once.
    device = family.device()
    encoder = copy.deepcopy(vae.first_stage_model).float().to(device)
    for start in progress.steps("Encode", range(0, count, 32)):
        pictures = world.render(scenes[start : start + 32], outlined=outlined)
        with torch.no_grad(), family.autocast():
            latents.append(encoder.encode(2 * pictures.to(device) - 1).float().cpu())
    return Rows(scenes, family.SCALE * torch.cat(latents))


def train(
    name: str,
    trained: nn.Module,
    predict: Callable[[Tensor, Tensor, Tensor, list[int]], Tensor],
    rows: Rows,
    texts: Texts,
    schedule: Schedule,
    *,
    steps: int,
    batch: int = 64,
    rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Train a network to predict noise.

    Args:
        name: For the progress bar.
        trained: Whose weights change.
        predict: Noised latents ``[B, 4, 8, 8]``, time steps ``[B]``, text states ``[B, 77, D]`` and
            the numbers of the rows -> the noise ``[B, 4, 8, 8]``.
        rows: What to train on.
        texts: States of their captions.
        schedule: The forward diffusion.
        steps: Of AdamW.
        batch: Rows in each.
        rate: Highest learning rate; it rises for a twentieth of the steps and then falls to zero.
        seed: Decides rows, words, noise and time steps.

    Returns:
        The average of the weights over the last steps, in float32.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    device = family.device()
    trained.to(device)
    weights = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    average = copy.deepcopy(trained)
    ratio = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    importance = (STEADY / ratio).clamp(max=1)
    for step in progress.steps(name, range(steps)):
        numbers = [rng.randrange(len(rows.scenes)) for _ in range(batch)]
        latents = rows.latents[numbers]
        # One time step from each of as many equal parts of the schedule.
        parts = (torch.arange(batch) + torch.rand(batch)) / batch
        timesteps = (parts * schedule.steps).long().clamp(max=schedule.steps - 1)
        noise = torch.randn_like(latents)
        text = texts([_words(rows.scenes[number], rng) for number in numbers])
        noised = schedule.noised(latents, noise, timesteps)
        made = predict(noised.to(device), timesteps.to(device), text.to(device), numbers)
        error = (made.float().cpu() - noise).square().mean((1, 2, 3))
        loss = (error * importance[timesteps]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        falling.step()
        share = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - share)
        progress.show(step=step, loss=loss, error=error.mean())
    return {key: tensor.detach().cpu() for key, tensor in average.state_dict().items()}


def _words(scene: world.Scene, rng: random.Random) -> str:
    if rng.random() < DROPPED:
        return ""
    return world.caption(scene, world.some_names(rng, 0.7))
