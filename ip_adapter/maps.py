"""Where references act: the size of what each adds to a picture, place by place.

Decoupled cross-attention (see `attention`) gives a place q of the latent

    Z(q) = Attn(Q, K, V)(q) + sum over references r of  w * sum over t in r of p_qt v'_t

The image's attention p is a softmax: it sums up to 1 at every place, so by itself it does not tell
where an image acts. What is recorded here is what a reference adds there, against what the text
says there:

    strength_r(q) = || w * sum over t in r of p_qt v'_t || / || Attn(Q, K, V)(q) ||

with norms over the channels of all heads, and with everything in it that makes w: weights of layers
and pictures, window, curve and mask. 0 is no effect; at 0.5 a reference adds half of what the text
does. Strengths are averaged over the layers of a part of the UNet and over the steps.

Shapes use the legend of `ip_adapter`; R references, S stretches of the schedule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention

Grid = tuple[int, int]
"""Height and width in tokens, or in pixels of the latent."""

Area = tuple[int, int, int, int]
"""Height, width, top and left of a part of the latent, in its pixels."""

TINY = 1e-12
"""Least norm of the text's part; where it says nothing at all, a ratio has no meaning."""

_RAMP = (
    (0.04, 0.03, 0.12),
    (0.25, 0.08, 0.42),
    (0.62, 0.15, 0.45),
    (0.92, 0.38, 0.28),
    (0.99, 0.70, 0.32),
    (1.00, 0.98, 0.80),
)
"""Colours from nothing to the most, at equal distances; each is lighter than the one before."""


def strength(
    text: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    references: int = 1,
    length: int | None = None,
    places: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> Tensor:
    """How strongly the references of one image prompt act at each place, in one layer.

    Args:
        text: ``[B, L, C]``, the result of the text's attention alone.
        query: ``[B, L, C]``.
        key: ``[G, H, T, D]``, see `attention.image_attention`.
        value: Like `key`; the weight is in it.
        references: R; their tokens take turns if there are more than ``R * length``.
        length: Tokens of one reference; T unless given.
        places: ``[B or 1, L, 1]``, how far the prompt counts at each place.
        precision: See `attention.image_attention`.

    Returns:
        ``[R, B, L]`` in float32, 0 and more.
    """
    said = torch.linalg.vector_norm(text, dim=-1, dtype=torch.float32).clamp(min=TINY)
    tokens = key.shape[2]
    owner = torch.arange(tokens, device=value.device) // (length or tokens) % references
    found = []
    for number in range(references):
        own = value if references == 1 else value * (owner == number)[:, None]
        image = attention.image_attention(query, key, own, places=places, precision=precision)
        found.append(torch.linalg.vector_norm(image, dim=-1, dtype=torch.float32) / said)
    return torch.stack(found)


@dataclass(frozen=True)
class Group:
    """Layers that have a part of the UNet and the size of their token grid in common.

    Attributes:
        name: Such as ``down 64``: the part, and the height of the grid.
        grid: Height and width in tokens, of the whole latent.
        layers: How many they are.
    """

    name: str
    grid: Grid
    layers: int


class Sums:
    """The strengths of one sampling, added up on the device that computes them.

    Args:
        groups: In the order in which they run.
        references: R, of all image prompts together.
        steps: S; a long schedule has several steps in one.
        latent: Height and width of the whole latent.
    """

    def __init__(self, groups: Sequence[Group], references: int, steps: int, latent: Grid) -> None:
        self.groups = tuple(groups)
        self._shape = (references, steps)
        self._latent = latent
        self._totals: dict[int, Tensor] = {}
        self._passes: Counter[tuple[int, Area | None]] = Counter()

    def begin(self, step: int, area: Area | None = None) -> None:
        """Count a forward pass, which layers may have nothing to add to.

        Args:
            step: 0 to S - 1.
            area: The part of the latent that it sees; all of it unless given.
        """
        self._passes[step, area] += 1

    def add(
        self, group: int, step: int, first: int, strengths: Tensor, area: Area | None = None
    ) -> None:
        """Add what one layer says in one forward pass; the device is not waited for.

        Args:
            group: Number of the layer's group.
            step: 0 to S - 1.
            first: Number of the first of the references.
            strengths: ``[n, h, w]`` of n references, on the grid that the layer has.
            area: As in `begin`.
        """
        grid = self.groups[group].grid
        if group not in self._totals:
            self._totals[group] = torch.zeros(*self._shape, *grid, device=strengths.device)
        total = self._totals[group]
        rows, columns = extent(area, self._latent, grid)
        size = (rows.stop - rows.start, columns.stop - columns.start)
        here = total[first : first + len(strengths), step, rows, columns]
        here += resize(strengths.to(total.device), size)

    def means(self) -> tuple[Tensor, ...]:
        """For each group ``[R, S, h, w]`` on the CPU, the mean over its layers and the passes."""
        found = []
        for number, group in enumerate(self.groups):
            count = torch.zeros(self._shape[1], *group.grid)
            for (step, area), passes in self._passes.items():
                rows, columns = extent(area, self._latent, group.grid)
                count[step, rows, columns] += passes
            total = self._totals.get(number)
            total = torch.zeros(*self._shape, *group.grid) if total is None else total.cpu()
            found.append(total / (count.clamp(min=1) * group.layers))
        return tuple(found)


def extent(area: Area | None, latent: Grid, grid: Grid) -> tuple[slice, slice]:
    """The rows and columns of a token grid that a part of the latent covers, one at least."""
    if area is None:
        return slice(0, grid[0]), slice(0, grid[1])
    rows, columns = (
        slice(start * tokens // whole, -(-(start + length) * tokens // whole))
        for length, start, whole, tokens in zip(area[:2], area[2:], latent, grid, strict=True)
    )
    return rows, columns


def resize(maps: Tensor, size: Grid) -> Tensor:
    """``[..., h, w]`` to another size, with straight lines between the middles of tokens."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    sized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return sized.reshape(*maps.shape[:-2], *size)


@dataclass(frozen=True, eq=False)
class Maps:
    """Where the references acted in one sampling.

    Attributes:
        references: What each is called: ``1``, or ``1.2`` for the second of the first prompt.
        labels: The adapter of each.
        groups: The parts of the UNet.
        steps: First and last step of each stretch of the schedule, counted from 1.
        means: For each group ``[R, S, h, w]``, the mean over its layers and the passes of a step.
        latent: Height and width of the latent.
        picture: Number of the picture in the batch.
    """

    references: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[Group, ...]
    steps: tuple[tuple[int, int], ...]
    means: tuple[Tensor, ...]
    latent: Grid
    picture: int = 0

    @property
    def grid(self) -> Grid:
        """Of the group with most tokens; everything is brought to it."""
        return max(group.grid for group in self.groups)

    def by_reference(self) -> Tensor:
        """``[R, h, w]``, the mean over all layers and steps."""
        return _mean(self.over_steps(), self._lengths)

    def by_group(self) -> Tensor:
        """``[R, G, h, w]``, the mean over the layers of each group and all steps."""
        sized = [resize(_mean(one, self._lengths), self.grid) for one in self.means]
        return torch.stack(sized, dim=1)

    def over_steps(self) -> Tensor:
        """``[R, S, h, w]``, the mean over all layers."""
        sized = torch.stack([resize(one, self.grid) for one in self.means], dim=2)
        return _mean(sized, [group.layers for group in self.groups], dim=2)

    @property
    def _lengths(self) -> list[int]:
        return [last - first + 1 for first, last in self.steps]


def _mean(maps: Tensor, weights: Sequence[int], dim: int = 1) -> Tensor:
    """The weighted mean over a dimension."""
    shape = [-1] + [1] * (maps.ndim - dim - 1)
    shares = torch.tensor(weights, dtype=maps.dtype).view(shape) / sum(weights)
    return (maps * shares).sum(dim)


def stretches(steps: int, most: int) -> tuple[tuple[int, int], ...]:
    """Cut a schedule into stretches of nearly equal length.

    Args:
        steps: Of the schedule, 1 and more.
        most: The number of stretches at most.

    Returns:
        First and last step of each, counted from 1.
    """
    count = min(steps, most)
    ends = [steps * number // count for number in range(count + 1)]
    return tuple((first + 1, last) for first, last in pairwise(ends))


def colour(values: Tensor) -> Tensor:
    """Colours for ``[...]`` in 0..1: ``[..., 3]``, from nearly black over red to a pale yellow."""
    ramp = torch.tensor(_RAMP, device=values.device)
    place = values.float().clamp(0, 1) * (len(ramp) - 1)
    low = place.floor().long().clamp(max=len(ramp) - 2)
    share = (place - low)[..., None]
    return ramp[low] * (1 - share) + ramp[low + 1] * share


def overlay(values: Tensor, picture: Tensor) -> Tensor:
    """Lay colours over a picture, the more of them the higher the value.

    Args:
        values: ``[H, W]`` in 0..1.
        picture: ``[H, W, 3]`` in 0..1; it is shown in grey, so that all colour is the map's.

    Returns:
        ``[H, W, 3]`` in 0..1.
    """
    grey = picture.float() @ picture.new_tensor([0.299, 0.587, 0.114]).float()
    share = (0.6 + 0.25 * values.clamp(0, 1))[..., None]
    return grey[..., None] * (1 - share) + colour(values) * share
