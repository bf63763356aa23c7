"""Train the miniature's VAE: the shape of TAESD, which the host loads, on pictures of the world.

python -m miniature vae
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import family, progress, world

Tensors = dict[str, Tensor]

STEPS, REFINING = 3000, 2200
CROP = 32
"""Side of the pieces that most steps see; the last quarter sees whole pictures."""


def train(steps: int = STEPS, seed: int = 0) -> Tensors:
    """Make a VAE.

    Its latents have a deviation of about 1 as the UNet sees them, as Stable Diffusion's have.

    Args:
        steps: Of AdamW, with 16 pieces of 32 x 32 or 4 pictures of 64 x 64 pixels each.
        seed: Decides weights and pictures.

    Returns:
        Tensors under the host's names for TAESD.
    """
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(seed)
    vae = TAESD()
    _initialise(vae)
    vae.to(family.device(), memory_format=torch.channels_last)
    encoder, decoder = vae.taesd_encoder, vae.taesd_decoder
    weights = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.1)
    pictures = _pieces(random.Random(seed), steps)
    for step in progress.steps("VAE", range(steps)):
        wanted = next(pictures).to(family.device(), memory_format=torch.channels_last)
        with family.autocast():
            latents = encoder(wanted)
            made = decoder(latents)
        made, latents = made.float(), latents.float()
        error = made - wanted
        # Latents beyond 3 are lost to the decoder's clamp.
        loss = (
            error.square().mean() * 4
            + error.abs().mean() * 0.2
            + latents.square().mean() * 1e-3
            + F.relu(latents.abs() - 2.5).mean() * 0.1
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        progress.show(loss=loss, error=error.abs().mean(), size=latents.std(), step=step)
    with torch.no_grad():
        rng = random.Random(seed + 1)
        scenes = [world.draw(rng) for _ in range(64)]
        sample = encoder(world.render(scenes).to(family.device()))
    tensors = {name: tensor.detach().cpu() for name, tensor in vae.state_dict().items()}
    # The host multiplies latents by its scale before the UNet, and divides by it after.
    tensors["vae_scale"] = family.SCALE * sample.std().cpu()
    return tensors


def refine(tensors: Mapping[str, Tensor], steps: int = REFINING, seed: int = 1) -> Tensors:
    """Train the decoder alone, on whole pictures; the latents, and so the base, stay as they are.

    Args:
        tensors: What `train` returns.
        steps: Of AdamW, with 6 pictures each.
        seed: Decides the pictures.

    Returns:
        All of them, with a better decoder.
    """
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = TAESD()
    vae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    vae.to(family.device(), memory_format=torch.channels_last).requires_grad_(False)
    decoder = vae.taesd_decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in progress.steps("Decoder", range(steps)):
        wanted = _pictures(rng, 6).to(family.device(), memory_format=torch.channels_last)
        with family.autocast():
            with torch.no_grad():
                latents = vae.taesd_encoder(wanted)
            made = decoder(latents)
        error = made.float() - wanted
        loss = error.square().mean() * 4 + error.abs().mean() * 0.2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.show(step=step, loss=loss, error=error.abs().mean())
    return {name: tensor.detach().cpu() for name, tensor in vae.state_dict().items()}


def _pictures(rng: random.Random, count: int) -> Tensor:
    """Whole pictures, a quarter of them in the style of the fine-tune."""
    return torch.cat(
        [world.render([world.draw(rng)], outlined=rng.random() < 0.25) for _ in range(count)]
    )


def _initialise(vae: nn.Module) -> None:
    for parameter in vae.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
            parameter.data.mul_(0.7)  # without a norm, full gain grows along the residual path
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)


def _pieces(rng: random.Random, steps: int) -> Iterator[Tensor]:
    for step in range(steps):
        whole = step >= steps * 3 // 4
        pictures = _pictures(rng, 4 if whole else 16)
        if whole:
            yield pictures
            continue
        room = (world.SIZE - CROP) // 8
        corners = [(8 * rng.randint(0, room), 8 * rng.randint(0, room)) for _ in pictures]
        yield torch.stack(
            [
                picture[:, top : top + CROP, left : left + CROP]
                for picture, (top, left) in zip(pictures, corners, strict=True)
            ]
        )
