"""What the training loss hides: whether the adapter uses its reference at all, and how strongly.

The loss of a diffusion model is nearly all noise, and flat long before an adapter is good. What
moves is its difference: the same rows, noise and timesteps with the right reference, with none and
with somebody else's. Beside it stands the size of the image branch against the text branch in each
layer. Pictures are made in `samples`; what was found is kept by `journal`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IPAdapterError
from ..layers import Family
from ..objective import Base, Batch, Draws, Drops, Nothing, withhold

HEALTHY = (0.1, 0.5)
"""Image branch over text branch, at which adapters that work were seen."""


def derangement(count: int, seed: int) -> list[int]:
    """A permutation that leaves nothing in its place (one cycle, by Sattolo's algorithm).

    Args:
        count: How many, 2 or more.
        seed: Equal seeds give equal permutations.

    Raises:
        IPAdapterError: One row cannot be given another one's reference.
    """
    if count < 2:
        raise IPAdapterError(
            f"Validation has {count} row; needed are 2 or more, so that each can be given the "
            "reference of another one. Hold out more rows."
        )
    order = list(range(count))
    draw = random.Random(seed)
    for i in range(count - 1, 0, -1):
        j = draw.randrange(i)
        order[i], order[j] = order[j], order[i]
    return order


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows that are not trained on, with noise that never changes.

    Attributes:
        rows: N rows; see `objective.Batch`.
        noise: ``[D, N, C, h, w]``, of D draws.
        timesteps: ``[D, N]``, spread evenly over the schedule.
        others: For each row, whose reference it gets when references are shuffled.
    """

    rows: Batch
    noise: Tensor
    timesteps: Tensor
    others: tuple[int, ...]


def hold_out(rows: Batch, *, schedule: int = 1000, draws: int = 4, seed: int = 0) -> HeldOut:
    """Fix what validation depends on beside the weights.

    Args:
        rows: N >= 2 rows.
        schedule: The number of timesteps that the model was trained with.
        draws: How often each row is asked, each time with other noise.
        seed: Of noise, timesteps and the shuffling of references.

    Raises:
        IPAdapterError: See `derangement`.
    """
    latents = rows["latents"]
    others = derangement(len(latents), seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((draws, *latents.shape), generator=generator)
    count = draws * len(latents)
    # One from each of `count` equal parts: far less spread than independent draws.
    parts = (torch.randperm(count, generator=generator) + 0.5) * schedule / count
    timesteps = parts.long().view(draws, len(latents))
    return HeldOut(rows, noise, timesteps, tuple(others))


@dataclass(frozen=True)
class Validation:
    """Losses of the same rows, noise and timesteps with three references.

    Attributes:
        reference: With the right one.
        none: With the zero features, as classifier-free guidance has them.
        shuffled: With another row's.
        gain: ``none - reference``: what a reference is worth.
        gain_error: Standard error of `gain` over the rows.
        margin: ``shuffled - reference``: what the right one is worth more than another one.
        margin_error: Standard error of `margin` over the rows.
    """

    reference: float
    none: float
    shuffled: float
    gain: float
    gain_error: float
    margin: float
    margin_error: float

    def scalars(self) -> dict[str, float]:
        """Names and values, for a log."""
        return dict(vars(self))

    def in_words(self) -> str:
        """One line that says whether the reference is used."""
        if self.margin > 2 * self.margin_error:
            said = "the right reference helps"
        elif self.gain > 2 * self.gain_error:
            said = "a reference helps, but any other does as well"
        else:
            said = "the reference is not used yet"
        return (
            f"{said}: validation loss {self.reference:.5f}, without reference {self.gain:+.5f} "
            f"(± {self.gain_error:.5f}), with another one {self.margin:+.5f} "
            f"(± {self.margin_error:.5f})"
        )


def validate(
    trainee: nn.Module,
    base: Any,
    held_out: HeldOut,
    nothing: Nothing,
    *,
    batch_size: int = 8,
    sizes: BranchSizes | None = None,
) -> Validation:
    """Measure what the reference is worth; nothing else is dropped.

    Args:
        trainee: An `objective.Decoupled` or `objective.Simple` with the weights of now.
        base: Frozen; an `objective.Base`, or one that also takes `sizes` as ``record``.
        held_out: Rows, noise and timesteps.
        nothing: What "no image" is.
        batch_size: Rows per forward pass.
        sizes: Measures the image branch on the way, with the right references.
    """
    rows = dict(held_out.rows)
    count = len(rows["latents"])
    features = [name for name in ("image", "face") if name in rows]
    everywhere = Draws(held_out.timesteps[0], torch.zeros(count), held_out.noise[0])
    none = withhold(rows, everywhere, Drops(text=0, image=1, both=0), nothing)
    wrong = rows | {name: rows[name][list(held_out.others)] for name in features}
    found: list[Tensor] = []
    for given in (rows, none, wrong):
        record = {"record": sizes} if sizes is not None and given is rows else {}
        each = torch.zeros(count, dtype=torch.float64)
        with torch.no_grad():
            for noise, timesteps in zip(held_out.noise, held_out.timesteps, strict=True):
                for part in torch.split(torch.arange(count), batch_size):
                    batch = {name: tensor[part] for name, tensor in given.items()}
                    errors = _errors(trainee, base, batch, noise[part], timesteps[part], record)
                    each[part] += errors.cpu().double()
        found.append(each / len(held_out.noise))
    right, without, other = found
    gain, margin = without - right, other - right
    return Validation(
        reference=float(right.mean()),
        none=float(without.mean()),
        shuffled=float(other.mean()),
        gain=float(gain.mean()),
        gain_error=_standard_error(gain),
        margin=float(margin.mean()),
        margin_error=_standard_error(margin),
    )


def _errors(
    trainee: nn.Module,
    base: Base,
    batch: Batch,
    noise: Tensor,
    timesteps: Tensor,
    record: Mapping[str, Any],
) -> Tensor:
    """`objective.loss` of each row, ``[B]``."""
    batch = {name: tensor.to(base.device) for name, tensor in batch.items()}
    dtype = next((weight.dtype for weight in trainee.parameters()), torch.float32)
    made = trainee(**{name: batch[name].to(dtype) for name in ("image", "face") if name in batch})
    text, keys_values = batch["text"], made
    if isinstance(made, Tensor):
        text, keys_values = torch.cat((text, made.to(text)), dim=1), {}
    latents = batch["latents"].float()
    noise, timesteps = noise.to(latents), timesteps.to(latents.device)
    found = base.predict(
        base.schedule.noised(latents, noise, timesteps),
        timesteps,
        text,
        keys_values,
        pooled=batch.get("pooled"),
        size=batch.get("size"),
        **record,
    )
    wanted = base.schedule.wanted(latents, noise, timesteps)
    return (found.float() - wanted).square().flatten(1).mean(dim=1)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


class BranchSizes:
    """Measures the image branch against the text branch, layer by layer.

    It is a `host.training.Record`: a model reports to it what the branches of each layer gave.
    """

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, index: int, text: Tensor, image: Tensor) -> None:
        """Take in one pass through a layer.

        Args:
            index: The layer's number in the checkpoint.
            text: ``[B, L, C]`` of the text branch.
            image: ``[B, L, C]``, what the image branch adds to it, its weight included.
        """
        squares = [part.detach().float().square().sum() for part in (image, text)]
        before = self._sums.get(index)
        if before is not None:
            squares = [old + new for old, new in zip(before, squares, strict=True)]
        self._sums[index] = (squares[0], squares[1])

    def ratios(self) -> dict[int, float]:
        """``|image branch| / |text branch|`` by the layer's number, over all that was measured.

        The norm is taken over rows, places and channels together.
        """
        return {
            index: math.sqrt(float(image) / max(float(text), 1e-30))
            for index, (image, text) in self._sums.items()
        }


def named(ratios: Mapping[int, float], family: Family) -> dict[str, float]:
    """Ratios by the layer's place in the UNet, such as ``image_over_text/input 4.0``."""
    places = {layer.index: layer.address for layer in family.layers}
    return {
        f"image_over_text/{block} {number}.{depth}": ratios[index]
        for index, (block, number, depth) in places.items()
        if index in ratios
    }


def in_words(ratios: Mapping[int, float]) -> str:
    """One line on the size of the image branch."""
    if not ratios:
        return "no image branch was seen"
    low, high = HEALTHY
    ordered = sorted(ratios.values())
    middle = ordered[len(ordered) // 2]
    if middle < low:
        said = "the image branch is still small"
    elif middle > high:
        said = "the image branch is large, see whether the text is still followed"
    else:
        said = "the image branch is of healthy size"
    return (
        f"{said}: image over text {middle:.3f} in the middle layer, {ordered[0]:.3f} to "
        f"{ordered[-1]:.3f} (healthy: about {low:g} to {high:g})"
    )
