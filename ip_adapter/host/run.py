"""One sampling run: everything that is constant in it, computed once, gone when it ends.

The host decides per step which conditionings share a forward pass, in which order, cropped to
which area, restricted to which frames of a context window. `PromptCond` rides along as a model
condition, so those decisions reach us as data instead of being guessed from list positions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import comfy.model_management
import torch
from torch import Tensor
from torch.nn import functional

from .. import attention, masks
from ..errors import IncompatibleModelError
from ..layers import Address
from ..prompt import ImagePrompt
from .adapters import LoadedAdapter
from .unet import HostLayer

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Entry:
    """One applied image prompt; immutable, shared by every clone of the MODEL that carries it.

    Attributes:
        adapter: Whose keys and values to use.
        prompt: What to attend to.
        weight: The paper's lambda.
        start: Fraction of the schedule at which it begins to act, 0..1.
        end: Fraction at which it stops.
        mask: ``[M, H, W]`` in image space, or None for everywhere.
        layers: Factor of the weight per layer, by its number in the checkpoint; 1 where there is
            none. A layer at 0 is skipped.
    """

    adapter: LoadedAdapter
    prompt: ImagePrompt
    weight: float
    start: float
    end: float
    mask: Tensor | None
    layers: Mapping[int, float] = field(default_factory=dict)

    def weight_at(self, index: int) -> float:
        """The weight in one layer."""
        return self.weight * self.layers.get(index, 1.0)

    def __deepcopy__(self, memo: object) -> Entry:
        return self


@dataclass(frozen=True)
class Chunk:
    """The rows of a forward pass that come from one conditioning.

    Attributes:
        is_positive: Whether they get the image, or the "no image" tokens.
        area: The host's crop ``(h, w, y, x)`` in latent pixels, or None.
        frames: For each row, its place in the whole latent batch.
    """

    is_positive: bool
    area: tuple[int, ...] | None
    frames: tuple[int, ...]


class PromptCond(comfy.conds.CONDRegular):  # type: ignore[misc]
    """A model condition that says which rows of a batch a run's image prompts belong to.

    ``cond`` holds the frame numbers ``[B]`` on the CPU, so that the host's context windows slice
    them like any per-frame condition; no value of it is ever read back from a device otherwise.
    """

    def __init__(
        self, run: Run, frames: Tensor, is_positive: bool, area: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(frames)
        self.run = run
        self.is_positive = is_positive
        self.area = area

    def _copy_with(self, cond: Tensor) -> PromptCond:
        return PromptCond(self.run, cond, self.is_positive, self.area)

    def process_cond(
        self, batch_size: int, area: Sequence[int] | None = None, **kwargs: Any
    ) -> PromptCond:
        """Give the condition the batch size and the area of the rows it goes with."""
        repeats = -(-batch_size // len(self.cond))
        frames = self.cond.repeat(repeats)[:batch_size]
        return PromptCond(self.run, frames, self.is_positive, tuple(area) if area else None)

    def can_concat(self, other: Any) -> bool:
        """Conditions of one run and batch size may share a forward pass."""
        return (
            isinstance(other, PromptCond)
            and other.run is self.run
            and len(other.cond) == len(self.cond)
        )

    def concat(self, others: Sequence[PromptCond]) -> tuple[Run, tuple[Chunk, ...]]:
        """What the model wrapper gets: the run, and a chunk per conditioning, in row order."""
        return self.run, tuple(
            Chunk(c.is_positive, c.area, tuple(c.cond.tolist())) for c in (self, *others)
        )

    def size(self) -> list[int]:
        """The host asks for it when it estimates memory."""
        return list(self.cond.shape)


@dataclass(frozen=True, eq=False)
class Branch:
    """One image prompt in one layer, ready for the rows of one kind of forward pass.

    Attributes:
        key: ``[G, H, T, D]``.
        value: ``[G, H, T, D]``.
        weight: The paper's lambda.
        rows: The number of rows B that the host announced.
        mask: Latent-sized ``[B, 1, h, w]``, or None.
        grids: The mask per token grid ``(height, width)``, shared by the layers.
    """

    key: Tensor
    value: Tensor
    weight: float
    rows: int
    mask: Tensor | None
    grids: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def add(self, text: Tensor, query: Tensor, options: dict[str, Any]) -> Tensor:
        """``[B, L, C]`` text attention -> with this image prompt added."""
        key, value = self.key, self.value
        repeats, rest = divmod(query.shape[0], self.rows)
        if rest or (repeats > 1 and self.mask is not None):
            raise IncompatibleModelError(
                f"A layer got {query.shape[0]} rows where the sampler announced {self.rows}: "
                "another node pack (a tiled sampler, for example) cuts the picture up behind the "
                "sampler's back. Use it without a mask on Apply IP-Adapter, or without that pack."
            )
        if repeats > 1:  # tiles of the whole batch, one after the other
            key, value = key.repeat(repeats, 1, 1, 1), value.repeat(repeats, 1, 1, 1)
        factor = self.weight if self.mask is None else self.weight * self._grid(query, options)
        return attention.decoupled_attention(
            text, query, key, value, factor, precision=options.get("attn_precision")
        )

    def _grid(self, query: Tensor, options: dict[str, Any]) -> Tensor:
        """The mask on this layer's tokens, ``[B, L, 1]``."""
        height, width = options["activations_shape"][-2:]
        grid = self.grids.get((height, width))
        if grid is None:
            assert self.mask is not None
            grid = self.grids[height, width] = masks.to_tokens(self.mask, height, width).to(query)
        return grid


@dataclass(frozen=True, eq=False)
class Prepared:
    """One entry's constants: keys and values of ``[no image, image]`` and its window in sigmas."""

    entry: Entry
    layers: dict[Address, tuple[Tensor, Tensor, float]]  # K, V: [2, H, T, D], and the weight
    sigma_start: float
    sigma_end: float

    @property
    def is_whole_schedule(self) -> bool:
        """Whether no step lies outside the window."""
        return self.entry.start <= 0 and self.entry.end >= 1

    def acts_at(self, sigma: Any) -> Any:
        """Whether a noise level lies in the window: a bool for a float, a mask for a tensor."""
        return (self.sigma_end <= sigma) & (sigma <= self.sigma_start)


LiveLayers = dict[Address, tuple[Branch, ...]]


class Run:
    """The state of one sampling run.

    Args:
        entries: What is applied to the model, in order.
        layers: The model's cross-attention layers by address.
        sampling: The model's ``model_sampling``, which turns fractions into sigmas.
        dtype: What the model computes in.
        latent: ``(height, width)`` of the latent.
        bridge: The model's `unet.token_bridge`.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        layers: dict[Address, HostLayer],
        sampling: Any,
        dtype: torch.dtype,
        latent: tuple[int, int],
        bridge: Any | None = None,
    ) -> None:
        self._latent = latent
        self._live: dict[Any, LiveLayers] = {}
        self._prepared = [
            _prepare(entry, layers, sampling, dtype, bridge)
            for entry in entries
            if entry.weight != 0
        ]

    def warn_of_idle_entries(self, sigmas: Tensor) -> None:
        """Say so when no step of a schedule lies in an entry's window.

        Args:
            sigmas: ``[steps + 1]``, the noise levels at the start of each step and at the end.
        """
        for prepared in self._prepared:
            if not bool(prepared.acts_at(sigmas[:-1]).any()):
                log.warning(
                    "IP-Adapter: an image prompt has no effect, because none of the %d steps lies "
                    "between %.0f%% and %.0f%% of the schedule; widen its window, or take more",
                    len(sigmas) - 1,
                    100 * prepared.entry.start,
                    100 * prepared.entry.end,
                )

    def live(self, chunks: tuple[Chunk, ...], sigma: Tensor, device: torch.device) -> LiveLayers:
        """The branches of every layer for one forward pass.

        Args:
            chunks: What the rows are.
            sigma: ``[B]``, the noise level. It is read only if an entry has a step window.
            device: Where the model computes.
        """
        if all(prepared.is_whole_schedule for prepared in self._prepared):
            active = tuple(range(len(self._prepared)))
        else:
            now = float(sigma.max())
            active = tuple(i for i, one in enumerate(self._prepared) if one.acts_at(now))
        key = (chunks, active, device)
        found = self._live.get(key)
        if found is None:
            found = self._build(chunks, active, device)
            self._live[key] = found
        return found

    def _build(
        self, chunks: tuple[Chunk, ...], active: tuple[int, ...], device: torch.device
    ) -> LiveLayers:
        roles = [int(chunk.is_positive) for chunk in chunks]
        rows = sum(len(chunk.frames) for chunk in chunks)
        live: dict[Address, list[Branch]] = {}
        for prepared in (self._prepared[i] for i in active):
            mask = self._mask(prepared.entry.mask, chunks, device)
            grids: dict[tuple[int, int], Tensor] = {}
            for address, (key, value, weight) in prepared.layers.items():
                live.setdefault(address, []).append(
                    Branch(
                        key[roles].to(device),
                        value[roles].to(device),
                        weight,
                        rows,
                        mask,
                        grids,
                    )
                )
        return {address: tuple(branches) for address, branches in live.items()}

    def _mask(
        self, mask: Tensor | None, chunks: tuple[Chunk, ...], device: torch.device
    ) -> Tensor | None:
        if mask is None:
            return None
        whole = masks.to_latent(mask.to(device), *self._latent)  # [M, 1, h, w]
        rows = []
        for chunk in chunks:
            part = whole
            if chunk.area is not None:
                height, width, top, left = chunk.area
                part = part[..., top : top + height, left : left + width]
            rows.append(part[[frame % len(part) for frame in chunk.frames]])
        return torch.cat(rows)


def _prepare(
    entry: Entry,
    layers: dict[Address, HostLayer],
    sampling: Any,
    dtype: torch.dtype,
    bridge: Any | None,
) -> Prepared:
    tokens = torch.cat((entry.prompt.unconditional, entry.prompt.conditional))  # [2, T, D]
    if tokens.shape[-1] != entry.adapter.spec.family.context_width:
        tokens = _cross(bridge, tokens)
    device = entry.adapter.load(memory=tokens.numel() * 256)
    active = {i for i in entry.adapter.spec.indices if entry.weight_at(i) != 0}
    keys_values = {
        layer.address: (
            attention.split_heads(key, layers[layer.address].heads).to(dtype),
            attention.split_heads(value, layers[layer.address].heads).to(dtype),
            entry.weight_at(layer.index),
        )
        for layer, key, value in entry.adapter.module.keys_values(tokens.to(device), active)
    }
    return Prepared(
        entry,
        keys_values,
        sigma_start=float(sampling.percent_to_sigma(entry.start)),
        sigma_end=float(sampling.percent_to_sigma(entry.end)),
    )


def _cross(bridge: Any, tokens: Tensor) -> Tensor:
    """Send ``[2, T, 4096]`` tokens through the model's Linear, wherever its weights lie now."""
    weight, bias = bridge.weight, bridge.bias
    moved = tokens.to(weight.device).float()
    return functional.linear(moved, weight.float(), None if bias is None else bias.float())
