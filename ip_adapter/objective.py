"""The training objective: predict the noise of a noised latent, with text and image as conditions.

    L = E || eps - eps_theta(x_t, c_t, c_i, t) ||^2                                        (eq. 6)

Pure torch; the frozen base stands behind `Base`. All chance is a function of the seed and of the
number of the sample, never of a process, a batch or what was drawn before: two processes see what
one would, and a resumed run what an uninterrupted one would.

Source: section 3.2 of arXiv 2308.06721, and its training details (section 4.1.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import IPAdapter
from .errors import IncompatibleModelError
from .projections import Features

Batch = Mapping[str, Tensor]
"""Rows of training data: ``latents`` ``[B, 4, h, w]`` as the UNet sees them, ``text``
``[B, 77, D]``, ``pooled`` ``[B, P]`` and ``size`` ``[B, 6]`` for SDXL (see `Base.predict`),
``image`` ``[B, E]`` or ``[B, P, E]``, ``face`` ``[B, 512]``."""

Target = Literal["epsilon", "v"]
"""What a base predicts: the noise, or ``sqrt(a) noise - sqrt(1 - a) latent``."""

KeysValues = Mapping[int, tuple[Tensor, Tensor]]
"""Keys and values ``[B, T, C]`` of the image in each layer, by the layer's number."""


def usable(tensor: Tensor) -> Tensor:
    """A tensor that autograd may save: itself, or a copy where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """The forward diffusion of a base.

    Attributes:
        alphas_cumprod: ``[S]``, how much of the latent's variance is left at each time step.
        target: What the base predicts.
    """

    alphas_cumprod: Tensor
    target: Target = "epsilon"

    @property
    def steps(self) -> int:
        """The number S of time steps."""
        return len(self.alphas_cumprod)

    def _scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
        alphas = alphas.view(-1, *(1,) * (like.ndim - 1)).to(like.device)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps``.

        Args:
            latents: ``[B, 4, h, w]``, x_0.
            noise: Like `latents`.
            timesteps: ``[B]``, whole numbers in 0..S-1.

        Returns:
            ``[B, 4, h, w]``.
        """
        signal, spread = self._scales(timesteps, latents)
        return signal * latents + spread * noise

    def wanted(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the base should predict, ``[B, 4, h, w]``; arguments as for `noised`."""
        if self.target == "epsilon":
            return noise
        signal, spread = self._scales(timesteps, latents)
        return signal * noise - spread * latents


class Base(Protocol):
    """A frozen denoiser that image keys and values can be given to."""

    schedule: Schedule

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def to(self, device: torch.device) -> Any:
        """Move it there."""

    def predict(
        self,
        noised: Tensor,
        timesteps: Tensor,
        text: Tensor,
        keys_values: KeysValues,
        *,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
    ) -> Tensor:
        """One forward pass.

        Args:
            noised: ``[B, 4, h, w]``.
            timesteps: ``[B]``.
            text: ``[B, 77, D]``, or longer.
            keys_values: Of the image; empty for none.
            pooled: ``[B, P]``, the pooled text of SDXL.
            size: ``[B, 6]``, SDXL's size conditions in pixels: height and width of the picture,
                top and left of the crop, height and width of the target.

        Returns:
            ``[B, 4, h, w]`` in float32.
        """


@dataclass(frozen=True)
class Drops:
    """How often a sample's conditions are withheld, so that guidance knows what they add.

    Attributes:
        text: Fraction of samples without text only.
        image: Fraction of samples without image only.
        both: Fraction of samples with neither.
    """

    text: float = 0.05
    image: float = 0.05
    both: float = 0.05

    def decide(self, chance: Tensor) -> tuple[Tensor, Tensor]:
        """Cut 0..1 into image, text, both, neither, in this order.

        Args:
            chance: ``[B]``, uniform in 0..1; one draw decides of both conditions.

        Returns:
            ``[B]`` whether to drop the text, and ``[B]`` whether to drop the image.
        """
        first, second = self.image, self.image + self.text
        third = second + self.both
        text = (chance >= first) & (chance < third)
        image = (chance < first) | ((chance >= second) & (chance < third))
        return text, image


@dataclass(frozen=True, eq=False)
class Draws:
    """The chance of some samples.

    Attributes:
        timesteps: ``[B]``.
        chance: ``[B]``, for `Drops.decide`.
        noise: ``[B, 4, h, w]``.
    """

    timesteps: Tensor
    chance: Tensor
    noise: Tensor


def draw(seed: int, numbers: Sequence[int], shape: Sequence[int], steps: int) -> Draws:
    """Draw time step, drop and noise of samples from their numbers, on the CPU.

    Each sample has a Philox generator of its own with the key ``(seed, number)``, read in the
    order time step (uniform, times `steps`, rounded down), drop (uniform), noise (float32 normal).

    Args:
        seed: Of the run; 0 or more.
        numbers: The place of each sample in the whole run, from 0.
        shape: Of one latent.
        steps: Time steps of the schedule.
    """
    streams = [
        np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))
        for number in numbers
    ]
    timesteps = [int(stream.random() * steps) for stream in streams]
    chance = [stream.random() for stream in streams]
    noise = [
        torch.from_numpy(stream.standard_normal(tuple(shape), dtype=np.float32))
        for stream in streams
    ]
    return Draws(torch.tensor(timesteps), torch.tensor(chance), torch.stack(noise))


@dataclass(frozen=True, eq=False)
class Nothing:
    """What stands for a condition that is withheld; each with one row.

    Attributes:
        text: ``[1, 77, D]``, the states of the empty prompt.
        pooled: ``[1, P]``, its pooled text for SDXL.
        image: The encoder's features of the picture whose normalised pixels are zero, where the
            adapter reads patches; None for zeros, as for pooled features.
    """

    text: Tensor
    pooled: Tensor | None = None
    image: Tensor | None = None


def withhold(batch: Batch, draws: Draws, drops: Drops, nothing: Nothing) -> dict[str, Tensor]:
    """Drop conditions of a batch by chance.

    A dropped image is the zero feature, sent through the projection like any other; never zero
    tokens.

    Returns:
        A new batch; the given one is not changed.
    """
    without_text, without_image = drops.decide(draws.chance)
    out = dict(batch)
    for name, without, empty in (
        ("text", without_text, nothing.text),
        ("pooled", without_text, nothing.pooled),
        ("image", without_image, nothing.image),
        ("face", without_image, None),
    ):
        if name in out:
            out[name] = _replaced(out[name], without, empty)
    return out


def _replaced(rows: Tensor, where: Tensor, by: Tensor | None) -> Tensor:
    where = where.to(rows.device).view(-1, *(1,) * (rows.ndim - 1))
    return torch.where(where, torch.zeros_like(rows) if by is None else by.to(rows), rows)


class Decoupled(nn.Module):
    """What is trained of an IP-Adapter: projection, keys and values, as one forward pass.

    The base stays outside, so that a wrapper for many processes holds nothing frozen.
    """

    def __init__(self, adapter: IPAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(
        self, image: Tensor | None = None, face: Tensor | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """``[B, E]`` or ``[B, P, E]`` features -> keys and values ``[B, T, C]`` of each layer."""
        tokens = self.adapter.image_tokens(Features(image=image, face=face))
        return {layer.index: (key, value) for layer, key, value in self.adapter.keys_values(tokens)}


class Simple(nn.Module):
    """The coupled "simple adapter" of the paper's ablation, which it beats.

    Image tokens are put behind the text tokens and read through the *frozen* keys and values of
    the text, with one softmax over both. The paper says no more than that image features are
    concatenated to text features and go into the pretrained cross-attention; so only the
    projection is trained here, and `adapter`'s own keys and values are not used.
    """

    def __init__(self, adapter: IPAdapter) -> None:
        super().__init__()
        self.adapter = adapter
        adapter.ip_adapter.requires_grad_(False)

    def forward(self, image: Tensor | None = None, face: Tensor | None = None) -> Tensor:
        """``[B, E]`` or ``[B, P, E]`` features -> image tokens ``[B, T, D]``."""
        return self.adapter.image_tokens(Features(image=image, face=face))


def loss(
    trainee: nn.Module,
    base: Base,
    batch: Batch,
    draws: Draws,
    *,
    drops: Drops | None = None,
    nothing: Nothing | None = None,
) -> Tensor:
    """Mean squared error of the base's prediction, over all samples, channels and places.

    Args:
        trainee: A `Decoupled` or a `Simple`, or what an accelerator made of it.
        base: Frozen.
        batch: On the base's device.
        draws: See `draw`.
        drops: How often conditions are withheld; None to keep all.
        nothing: What then stands for them.

    Returns:
        A scalar, float32, with a gradient.

    Raises:
        IncompatibleModelError: The batch lacks something that the adapter reads.
    """
    if drops is not None and nothing is not None:
        batch = withhold(batch, draws, drops, nothing)
    features = {name: batch[name] for name in ("image", "face") if name in batch}
    if not features:
        raise IncompatibleModelError(
            f"A batch holds {', '.join(sorted(batch))}, but neither 'image' nor 'face' features. "
            "Give the references' features, as the cache makes them for this projection."
        )
    made = trainee(**features)
    text = batch["text"]
    keys_values: KeysValues = {}
    if isinstance(made, Tensor):
        text = torch.cat((text, made.to(text)), dim=1)
    else:
        keys_values = made
    latents = batch["latents"].float()
    noise = draws.noise.to(latents)
    timesteps = draws.timesteps.to(latents.device)
    found = base.predict(
        base.schedule.noised(latents, noise, timesteps),
        timesteps,
        text,
        keys_values,
        pooled=batch.get("pooled"),
        size=batch.get("size"),
    )
    return F.mse_loss(found.float(), base.schedule.wanted(latents, noise, timesteps))
