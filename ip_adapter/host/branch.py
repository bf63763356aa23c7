"""Image prompts inside of one layer, ready for the rows of one kind of forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .. import attention, masks
from ..errors import IncompatibleModelError


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


@dataclass(frozen=True, eq=False)
class Places:
    """Where each of several image prompts acts, on the token grid of any layer.

    Attributes:
        masks: Latent-sized ``[B, 1, h, w]`` of each, or None for everywhere; not all are None.
        grids: What was computed, per token grid ``(height, width)``.
    """

    masks: tuple[Tensor | None, ...]
    grids: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def on(self, height: int, width: int, like: Tensor) -> Tensor:
        """``[B, L, N]`` on a grid; computed once, for all layers that have it."""
        found = self.grids.get((height, width))
        if found is None:
            given = [mask for mask in self.masks if mask is not None]
            everywhere = torch.ones_like(given[0])
            stack = [everywhere if mask is None else mask for mask in self.masks]
            found = torch.cat([masks.to_tokens(mask, height, width) for mask in stack], dim=-1)
            found = found.to(like)
            if not torch.compiler.is_compiling():
                self.grids[height, width] = found
        return found


@dataclass(frozen=True, eq=False)
class Branch:
    """Image prompts of equal length in one layer.

    Attributes:
        key: ``[G, H, N*T, D]``, of N prompts side by side.
        value: Like `key`; the weights are in it.
        tokens: T, the length of one prompt.
        chunks: What the rows are, as the host announced them.
        places: Where the prompts act, or None for everywhere.
        entries: The numbers of the N prompts on the model.
    """

    key: Tensor
    value: Tensor
    tokens: int
    chunks: tuple[Chunk, ...]
    places: Places | None = None
    entries: tuple[int, ...] = ()

    def inputs(
        self, query: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and places for a query ``[B, L, C]``, as `attention.image_attention` asks.

        Raises:
            IncompatibleModelError: Its rows are not those that were announced.
        """
        key, value = self.key, self.value
        places = None
        if self.places is not None:
            height, width = options["activations_shape"][-2:]
            places = self.places.on(height, width, query)
        announced = sum(len(chunk.frames) for chunk in self.chunks)
        if query.shape[0] != announced:
            rows = self._rows(query.shape[0], announced, options)
            groups = [row * len(key) // announced for row in rows]
            key, value = key[groups], value[groups]
            places = None if places is None else places[rows]
        return key, value, places

    def add(self, text: Tensor, query: Tensor, options: dict[str, Any]) -> Tensor:
        """``[B, L, C]`` text attention -> with these image prompts added."""
        key, value, places = self.inputs(query, options)
        image = attention.image_attention(
            query,
            key,
            value,
            tokens=self.tokens,
            places=places,
            precision=options.get("attn_precision"),
        )
        return attention.add(text, image)

    def _rows(self, rows: int, announced: int, options: dict[str, Any]) -> list[int]:
        """Which of the announced rows each row of a layer comes from, where they differ in number.

        Tiled samplers give the UNet all rows again for each tile; packs for regional prompts give a
        layer the positive rows again for each region.
        """
        entered = options.get("original_shape", (rows,))[0]
        positive = sum(len(chunk.frames) for chunk in self.chunks if chunk.is_positive)
        if entered == rows:
            by_row = len(self.key) == announced > len(self.chunks)
            if rows % announced == 0 and self.places is None and not by_row:
                return list(range(announced)) * (rows // announced)
        elif entered == announced and positive:
            regions, rest = divmod(rows - announced + positive, positive)
            if regions > 0 and rest == 0:
                found: list[int] = []
                numbers = iter(range(announced))
                for chunk in self.chunks:
                    own = list(islice(numbers, len(chunk.frames)))
                    found += own * (regions if chunk.is_positive else 1)
                return found
        raise IncompatibleModelError(
            f"A layer got {rows} rows where the sampler announced {announced}: another node pack "
            "(a tiled sampler, for example) cuts the picture up behind the sampler's back. Use it "
            "without a mask or weights per frame, or without that pack."
        )
