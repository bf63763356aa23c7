"""One sampling run: everything that is constant in it, computed once, gone when it ends.

The host decides per step which conditionings share a forward pass, in which order, cropped to
which area, restricted to which frames of a context window. `PromptCond` rides along as a model
condition, so those decisions reach us as data instead of being guessed from list positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import comfy.conds
import comfy.model_management
import torch
from torch import Tensor
from torch.nn import functional

from .. import attention, masks
from ..errors import IncompatibleModelError
from ..influence import Timing
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
        weight: The paper's lambda; ``[B, 1, 1]`` where the rows differ in it.
        chunks: What the rows are, as the host announced them.
        mask: Latent-sized ``[B, 1, h, w]``, or None.
        grids: The mask per token grid ``(height, width)``, shared by the layers.
    """

    key: Tensor
    value: Tensor
    weight: float | Tensor
    chunks: tuple[Chunk, ...]
    mask: Tensor | None
    grids: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def add(self, text: Tensor, query: Tensor, options: dict[str, Any]) -> Tensor:
        """``[B, L, C]`` text attention -> with this image prompt added."""
        key, value, factor = self.key, self.value, self.weight
        mask = None if self.mask is None else self._grid(query, options)
        announced = sum(len(chunk.frames) for chunk in self.chunks)
        if query.shape[0] != announced:
            places = self._places(query.shape[0], announced, options)
            groups = [place * len(key) // announced for place in places]
            key, value = key[groups], value[groups]
            factor = factor[places] if isinstance(factor, Tensor) else factor
            mask = None if mask is None else mask[places]
        if isinstance(factor, Tensor):
            factor = factor.to(query)
        if mask is not None:
            factor = factor * mask
        return attention.decoupled_attention(
            text, query, key, value, factor, precision=options.get("attn_precision")
        )

    def _places(self, rows: int, announced: int, options: dict[str, Any]) -> list[int]:
        """Which of the announced rows each row of a layer comes from, where they differ in number.

        Tiled samplers give the UNet all rows again for each tile; packs for regional prompts give a
        layer the positive rows again for each region.
        """
        entered = options.get("original_shape", (rows,))[0]
        positive = sum(len(chunk.frames) for chunk in self.chunks if chunk.is_positive)
        if entered == rows:
            if rows % announced == 0 and self.mask is None and not isinstance(self.weight, Tensor):
                return list(range(announced)) * (rows // announced)
        elif entered == announced and positive:
            regions, rest = divmod(rows - announced + positive, positive)
            if regions > 0 and rest == 0:
                places: list[int] = []
                numbers = iter(range(announced))
                for chunk in self.chunks:
                    own = list(islice(numbers, len(chunk.frames)))
                    places += own * (regions if chunk.is_positive else 1)
                return places
        raise IncompatibleModelError(
            f"A layer got {rows} rows where the sampler announced {announced}: another node pack "
            "(a tiled sampler, for example) cuts the picture up behind the sampler's back. Use it "
            "without a mask or weights per frame, or without that pack."
        )

    def _grid(self, query: Tensor, options: dict[str, Any]) -> Tensor:
        """The mask on this layer's tokens, ``[B, L, 1]``."""
        height, width = options["activations_shape"][-2:]
        grid = self.grids.get((height, width))
        if grid is None:
            assert self.mask is not None
            grid = self.grids[height, width] = masks.to_tokens(self.mask, height, width).to(query)
        return grid


class Schedule:
    """When an entry acts, in the noise levels of a model.

    Args:
        timing: In fractions of the schedule.
        sampling: The model's ``model_sampling``, which turns fractions into sigmas.
    """

    def __init__(self, timing: Timing, sampling: Any) -> None:
        self.is_constant = timing.is_constant
        self._curve = timing.curve
        self._sigma_at: Callable[[float], Any] = sampling.percent_to_sigma
        self._first = float(self._sigma_at(timing.start))
        self._last = float(self._sigma_at(timing.end))

    def acts_at(self, sigma: float) -> bool:
        """Whether a noise level lies in the window."""
        return self._last <= sigma <= self._first

    def factor_at(self, sigma: float) -> float:
        """Factor of the weights at a noise level; 0 outside of the window."""
        if not self.acts_at(sigma):
            return 0.0
        return 1.0 if self._curve is None else self._curve.at(self._fraction(sigma))

    def _fraction(self, sigma: float) -> float:
        """The fraction of the schedule with this noise level, by halving: it only ever falls."""
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            if float(self._sigma_at(middle)) > sigma:
                low = middle
            else:
                high = middle
        return high


@dataclass(frozen=True, eq=False)
class LayerPrompt:
    """One image prompt in one layer.

    Attributes:
        key: ``[F' + F + 1, H, T, D]``, of no image, of the image of each frame, and zeros.
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

    def groups(self, chunks: Sequence[Chunk], *, by_row: bool) -> list[int]:
        """Which row of keys each group of the batch's rows attends to.

        A chunk is one group; where frames have prompts of their own, or `by_row` asks for it, each
        of its rows is one.
        """
        without, with_image = self.frames
        nothing, image, zeros = (0, without), (without, with_image), (without + with_image, 1)
        positive, negative = (zeros, image) if self.is_opposed else (image, nothing)
        out: list[int] = []
        for chunk in chunks:
            first, count = positive if chunk.is_positive else negative
            places = [first + min(frame, count - 1) for frame in chunk.frames]
            out += places if by_row or self.frames != (1, 1) else places[:1]
        return out


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is constant of one entry in a run."""

    entry: Entry
    layers: dict[Address, LayerPrompt]
    schedule: Schedule


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
        self._live: dict[Any, tuple[tuple[float, ...], LiveLayers]] = {}
        self._prepared = [
            _prepare(entry, layers, sampling, dtype, bridge) for entry in entries if entry.active
        ]

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
        if all(prepared.schedule.is_constant for prepared in self._prepared):
            factors = (1.0,) * len(self._prepared)
        else:
            now = float(sigma.max())
            factors = tuple(prepared.schedule.factor_at(now) for prepared in self._prepared)
        # The latest only: a curve has another factor at every step.
        known = self._live.get((chunks, device))
        if known is None or known[0] != factors:
            known = (factors, self._build(chunks, factors, device))
            self._live[chunks, device] = known
        return known[1]

    def _build(
        self, chunks: tuple[Chunk, ...], factors: tuple[float, ...], device: torch.device
    ) -> LiveLayers:
        live: dict[Address, list[Branch]] = {}
        for prepared, factor in zip(self._prepared, factors, strict=True):
            if factor == 0:
                continue
            entry = prepared.entry
            mask = self._mask(entry.masks, chunks, device)
            grids: dict[tuple[int, int], Tensor] = {}
            each = _per_row(entry.frames, chunks, device)
            for address, layer in prepared.layers.items():
                chosen = layer.groups(chunks, by_row=each is not None)
                now = layer.weight * factor
                key, value, weight = attention.scale(
                    layer.key[chosen].to(device),
                    layer.value[chosen].to(device),
                    now if each is None else now * each,
                    entry.scaling,
                    entry.adapter.spec.projection.tokens,
                )
                branch = Branch(key, value, weight, chunks, mask, grids)
                live.setdefault(address, []).append(branch)
        return {address: tuple(branches) for address, branches in live.items()}

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
    entry: Entry,
    layers: dict[Address, HostLayer],
    sampling: Any,
    dtype: torch.dtype,
    bridge: Any | None,
) -> Prepared:
    sides = (entry.prompt.unconditional, entry.prompt.conditional)
    tokens = torch.cat(sides)  # [F' + F, T, D]
    if tokens.shape[-1] != entry.adapter.spec.family.context_width:
        tokens = _cross(bridge, tokens)
    device = entry.adapter.load(memory=tokens.numel() * 256)
    found = entry.adapter.module.keys_values(tokens.to(device), entry.active)
    prepared = {
        layer.address: LayerPrompt(
            _heads(key, layers[layer.address].heads, dtype),
            _heads(value, layers[layer.address].heads, dtype),
            (len(sides[0]), len(sides[1])),
            entry.weights[layer.index],
            layer.index in entry.opposed,
        )
        for layer, key, value in found
    }
    return Prepared(entry, prepared, Schedule(entry.timing, sampling))


def _heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[N, T, C]`` -> ``[N + 1, H, T, D]``, zeros last."""
    split = attention.split_heads(x, heads).to(dtype)
    return torch.cat((split, torch.zeros_like(split[:1])))


def _cross(bridge: Any, tokens: Tensor) -> Tensor:
    """Send ``[N, T, 4096]`` tokens through the model's Linear, wherever its weights lie now."""
    weight, bias = bridge.weight, bridge.bias
    moved = tokens.to(weight.device).float()
    return functional.linear(moved, weight.float(), None if bias is None else bias.float())
