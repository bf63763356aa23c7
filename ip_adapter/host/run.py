"""One sampling run: everything that is constant in it, computed once, gone when it ends.

The host decides per step which conditionings share a forward pass, in which order, cropped to
which area, restricted to which frames of a context window. `PromptCond` rides along as a model
condition, so those decisions reach us as data instead of being guessed from list positions.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import comfy.conds
import comfy.model_management
import torch
from torch import Tensor
from torch.nn import functional

from .. import attention, masks
from ..influence import Timing
from ..layers import Address
from ..prompt import ImagePrompt
from .adapters import LoadedAdapter
from .branch import Branch, Chunk, Places
from .schedule import Schedule
from .unet import HostLayer

log = logging.getLogger(__name__)

_KEPT = 8
"""Kinds of forward passes whose branches are kept: conditionings and context windows."""

_FRAMES = 16
"""Prompts of so many pictures at a time are turned into keys and values; of more, none is kept."""

_known: WeakKeyDictionary[
    ImagePrompt, WeakKeyDictionary[LoadedAdapter, dict[tuple[int, int, torch.dtype], Pair]]
] = WeakKeyDictionary()
"""By prompt, adapter, and layer, heads and precision; they live as long as the prompt does."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One applied image prompt; immutable, shared by every clone of the MODEL that carries it.

    Attributes:
        adapter: Whose keys and values to use.
        prompt: What to attend to.
        weights: The paper's lambda in each layer, by the layer's number; none where it is missing.
        opposed: Layers in which the image is withheld from the positive side and given to the
            negative one, so that guidance leads away from it.
        timing: When it acts.
        masks: Each ``[M, H, W]`` in image space; it acts where all of them let it.
        frames: Factor of the weights for each picture of a batch, the last one for those that come
            after; none of it for every picture alike.
        scaling: What a weight multiplies.
    """

    adapter: LoadedAdapter
    prompt: ImagePrompt
    weights: Mapping[int, float]
    opposed: frozenset[int] = frozenset()
    timing: Timing = field(default_factory=Timing)
    masks: tuple[Tensor, ...] = ()
    frames: tuple[float, ...] = ()
    scaling: attention.Scaling = "V only"

    @property
    def active(self) -> frozenset[int]:
        """The numbers of the layers in which it does anything at all."""
        if self.frames and not any(self.frames):
            return frozenset()
        return frozenset(number for number, weight in self.weights.items() if weight != 0)

    def __deepcopy__(self, memo: object) -> Entry:
        return self


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


Pair = tuple[Tensor, Tensor]
"""Keys and values."""


@dataclass(frozen=True, eq=False)
class LayerPrompt:
    """One image prompt in one layer.

    Attributes:
        key: ``[F' + F, H, T, D]``, of no image and of the image of each frame.
        value: Like `key`.
        frames: F' and F; 1 each, unless the pictures of a batch have prompts of their own.
        weight: The paper's lambda.
        is_opposed: See `Entry.opposed`.
    """

    key: Tensor
    value: Tensor
    frames: tuple[int, int]
    weight: float
    is_opposed: bool

    def rows(self, chunks: Sequence[Chunk], *, by_row: bool) -> Pair:
        """What each group of the batch's rows attends to, ``[G, H, T, D]`` each.

        Args:
            chunks: What the rows are.
            by_row: Whether each row is a group, instead of each chunk.
        """
        without, with_image = self.frames
        chosen: list[int] = []
        empty: list[int] = []
        for chunk in chunks:
            has_image = chunk.is_positive != self.is_opposed
            first, count = (without, with_image) if has_image else (0, without)
            places = [first + min(frame, count - 1) for frame in chunk.frames]
            places = places if by_row else places[:1]
            if self.is_opposed and not has_image:
                empty += range(len(chosen), len(chosen) + len(places))
            chosen += places
        if chosen == list(range(chosen[0], chosen[0] + len(chosen))):  # no need of a copy
            key, value = (x[chosen[0] : chosen[0] + len(chosen)] for x in (self.key, self.value))
        else:
            key, value = self.key[chosen], self.value[chosen]
        if empty:
            key, value = key.clone(), value.clone()
            key[empty] = value[empty] = 0
        return key, value


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is constant of one entry in a run.

    Attributes:
        number: Its place among the entries of the model.
        entry: What was applied.
        layers: Keys and values where it is active.
        schedule: When it acts.
    """

    number: int
    entry: Entry
    layers: dict[Address, LayerPrompt]
    schedule: Schedule

    @property
    def is_by_row(self) -> bool:
        """Whether the rows of one conditioning differ in keys or weight."""
        frames = {layer.frames for layer in self.layers.values()}
        return bool(self.entry.frames) or bool(frames - {(1, 1)})


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
        compiled: The UNet as `compiling.take` gives it. All layers stay live then, also at a factor
            of 0, so that every forward pass has the same structure.
        recorded: The `recording.Recording` of it, or None.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        layers: dict[Address, HostLayer],
        sampling: Any,
        dtype: torch.dtype,
        latent: tuple[int, int],
        bridge: Any | None = None,
        *,
        compiled: Any | None = None,
        recorded: Any | None = None,
    ) -> None:
        self.compiled = compiled
        self.recorded = recorded
        self._latent = latent
        self._live: OrderedDict[Any, tuple[tuple[float, ...], LiveLayers]] = OrderedDict()
        self._prepared = [
            _prepare(number, entry, layers, sampling, dtype, bridge)
            for number, entry in enumerate(entries)
            if entry.active
        ]
        self._is_constant = all(prepared.schedule.is_constant for prepared in self._prepared)
        self._is_by_frame = any(
            prepared.is_by_row or prepared.entry.masks for prepared in self._prepared
        )

    def warn_of_idle_entries(self, sigmas: Tensor) -> None:
        """Say so when no step of a schedule lies in an entry's window.

        Args:
            sigmas: ``[steps + 1]``, the noise levels at the start of each step and at the end.
        """
        for prepared in self._prepared:
            if prepared.schedule.is_constant:
                continue
            steps = sigmas[:-1].tolist()
            if not any(prepared.schedule.acts_at(sigma) for sigma in steps):
                log.warning(
                    "IP-Adapter: an image prompt has no effect, because none of the %d steps lies "
                    "between %.0f%% and %.0f%% of the schedule; widen its window, or take more",
                    len(steps),
                    100 * prepared.entry.timing.start,
                    100 * prepared.entry.timing.end,
                )

    def live(self, chunks: tuple[Chunk, ...], sigma: Tensor, device: torch.device) -> LiveLayers:
        """The branches of every layer for one forward pass.

        Args:
            chunks: What the rows are.
            sigma: ``[B]``, the noise level. It is read only if an entry changes over the schedule.
            device: Where the model computes.
        """
        if self._is_constant:
            factors = (1.0,) * len(self._prepared)
        else:
            now = float(sigma.max())
            factors = tuple(prepared.schedule.factor_at(now) for prepared in self._prepared)
        if not self._is_by_frame:  # every context window is like the others
            chunks = tuple(Chunk(c.is_positive, None, (0,) * len(c.frames)) for c in chunks)
        # Of each the latest only: a curve has another factor at every step.
        known = self._live.pop((chunks, device), None)
        if known is None or known[0] != factors:
            known = (factors, self._build(chunks, factors, device))
        self._live[chunks, device] = known
        if len(self._live) > _KEPT:
            self._live.popitem(last=False)
        return known[1]

    def _build(
        self, chunks: tuple[Chunk, ...], factors: tuple[float, ...], device: torch.device
    ) -> LiveLayers:
        acting = [
            (prepared, factor)
            for prepared, factor in zip(self._prepared, factors, strict=True)
            if factor != 0 or self.compiled is not None
        ]
        by_row = any(prepared.is_by_row for prepared, _ in acting)
        masked = {id(p): self._mask(p.entry.masks, chunks, device) for p, _ in acting}
        parts: dict[Address, dict[int, list[_Part]]] = {}
        for prepared, factor in acting:
            entry = prepared.entry
            each = _per_row(entry.frames, chunks, device)
            for address, layer in prepared.layers.items():
                key, value = layer.rows(chunks, by_row=by_row)
                now = layer.weight * factor
                key, value = attention.scale(
                    key.to(device),
                    value.to(device),
                    now if each is None else now * each,
                    entry.scaling,
                    entry.adapter.spec.projection.tokens,
                )
                alike = parts.setdefault(address, {}).setdefault(key.shape[2], [])
                alike.append(_Part(prepared.number, key, value, masked[id(prepared)]))
        places: dict[tuple[int, ...], Places] = {}
        return {
            address: tuple(
                _branch(same, tokens, chunks, places) for tokens, same in by_length.items()
            )
            for address, by_length in parts.items()
        }

    def _mask(
        self, given: tuple[Tensor, ...], chunks: tuple[Chunk, ...], device: torch.device
    ) -> Tensor | None:
        if not given:
            return None
        product = torch.ones((), device=device)
        for mask in given:
            whole = masks.to_latent(mask.to(device), *self._latent)  # [M, 1, h, w]
            rows = []
            for chunk in chunks:
                part = whole
                if chunk.area is not None:
                    height, width, top, left = chunk.area
                    part = part[..., top : top + height, left : left + width]
                rows.append(part[[min(frame, len(part) - 1) for frame in chunk.frames]])
            product = product * torch.cat(rows)
        return product


@dataclass(frozen=True, eq=False)
class _Part:
    """One image prompt in one layer for one kind of forward pass, its weight in the values."""

    number: int
    key: Tensor
    value: Tensor
    mask: Tensor | None


def _branch(
    parts: Sequence[_Part],
    tokens: int,
    chunks: tuple[Chunk, ...],
    places: dict[tuple[int, ...], Places],
) -> Branch:
    """Put prompts of equal length side by side; layers with the same masks share their grids."""
    shared = None
    if any(part.mask is not None for part in parts):
        shared = places.setdefault(
            tuple(id(part.mask) for part in parts), Places(tuple(part.mask for part in parts))
        )
    numbers = tuple(part.number for part in parts)
    if len(parts) == 1:
        return Branch(parts[0].key, parts[0].value, tokens, chunks, shared, numbers)
    key = torch.cat([part.key for part in parts], dim=2)
    value = torch.cat([part.value for part in parts], dim=2)
    return Branch(key, value, tokens, chunks, shared, numbers)


def _per_row(
    frames: tuple[float, ...], chunks: tuple[Chunk, ...], device: torch.device
) -> Tensor | None:
    """The factor of each row, ``[B, 1, 1]``, or None where all are alike."""
    if not frames:
        return None
    last = len(frames) - 1
    rows = [frames[min(frame, last)] for chunk in chunks for frame in chunk.frames]
    return torch.tensor(rows, device=device).view(-1, 1, 1)


def _prepare(
    number: int,
    entry: Entry,
    layers: dict[Address, HostLayer],
    sampling: Any,
    dtype: torch.dtype,
    bridge: Any | None,
) -> Prepared:
    given = entry.prompt
    found = _keys_values(entry, layers, dtype, bridge)
    prepared = {
        layer.address: LayerPrompt(
            *found[layer.index],
            (len(given.unconditional), len(given.conditional)),
            entry.weights[layer.index],
            layer.index in entry.opposed,
        )
        for layer in entry.adapter.spec.family.layers
        if layer.index in found
    }
    return Prepared(number, entry, prepared, Schedule(entry.timing, sampling))


def _keys_values(
    entry: Entry, layers: dict[Address, HostLayer], dtype: torch.dtype, bridge: Any | None
) -> dict[int, Pair]:
    """Keys and values of the active layers, ``[F' + F, H, T, D]`` each."""
    prompt, adapter = entry.prompt, entry.adapter
    heads = {layer.index: layers[layer.address].heads for layer in adapter.spec.family.layers}
    known: dict[tuple[int, int, torch.dtype], Pair] = {}
    is_bridged = prompt.conditional.shape[-1] != adapter.spec.family.context_width
    if prompt.frames <= _FRAMES and not is_bridged:
        known = _known.setdefault(prompt, WeakKeyDictionary()).setdefault(adapter, {})
    places = {index: (index, heads[index], dtype) for index in entry.active}
    missing = {index for index, place in places.items() if place not in known}
    if missing:
        tokens = torch.cat((prompt.unconditional, prompt.conditional))  # [F' + F, T, D]
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in missing}
        for some in torch.split(tokens, _FRAMES):
            states = _cross(bridge, some) if is_bridged else some
            computed = adapter.module.keys_values(states.to(adapter.device), missing)
            for layer, key, value in computed:
                split = (_heads(x, heads[layer.index], dtype) for x in (key, value))
                parts[layer.index].append((next(split), next(split)))
        for index, pairs in parts.items():
            key, value = (torch.cat(part) for part in zip(*pairs, strict=True))
            known[places[index]] = (key, value)
    return {index: known[place] for index, place in places.items()}


def _heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[N, T, C]`` -> ``[N, H, T, D]``, where it waits for its rows."""
    waiting: torch.device = comfy.model_management.intermediate_device()
    return attention.split_heads(x, heads).to(waiting, dtype)


def _cross(bridge: Any, tokens: Tensor) -> Tensor:
    """Send ``[N, T, 4096]`` tokens through the model's Linear, wherever its weights lie now."""
    weight, bias = bridge.weight, bridge.bias
    moved = tokens.to(weight.device).float()
    return functional.linear(moved, weight.float(), None if bias is None else bias.float())
