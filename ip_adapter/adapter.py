"""The adapter: a projection, and a pair of key/value projections per cross-attention layer.

| paper        | checkpoint key                | here                                   |
|--------------|-------------------------------|----------------------------------------|
| projection   | ``image_proj.*``              | `IPAdapter.image_proj`                 |
| W'_k, W'_v   | ``ip_adapter.{n}.to_[kv]_ip`` | `IPAdapter.ip_adapter`                 |
| c_i          |                               | image tokens, `IPAdapter.image_tokens` |
| K', V'       |                               | `IPAdapter.keys_values`                |
| lambda       |                               | ``weight``, in `attention`             |
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from .layers import CrossAttentionLayer
from .projections import Features, Ops, build_projection, project
from .spec import AdapterSpec


class ImageKeyValue(nn.Module):
    """The paper's W'_k and W'_v of one cross-attention layer."""

    def __init__(
        self, context_width: int, width: int, ops: Ops, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.to_k_ip = ops.Linear(context_width, width, bias=False, device=device)
        self.to_v_ip = ops.Linear(context_width, width, bias=False, device=device)


class IPAdapter(nn.Module):
    """All weights of an IP-Adapter; its state dict has the keys of the published flat files.

    Args:
        spec: What the checkpoint holds.
        ops: Builds the layers: ``torch.nn``, or the host's casting twin.
        device: Where parameters are made; ``"meta"`` when a checkpoint is assigned next.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        ops: Ops = nn,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.image_proj = build_projection(spec.projection, ops, device)
        self.ip_adapter = nn.ModuleDict(
            {
                str(layer.index): ImageKeyValue(spec.family.context_width, width, ops, device)
                for layer, width in zip(spec.family.layers, spec.widths, strict=True)
            }
        )

    def image_tokens(self, features: Features) -> Tensor:
        """Project features to image tokens.

        Args:
            features: What `AdapterSpec.projection` reads.

        Returns:
            ``[N, T, D]``.

        Raises:
            IncompatibleModelError: Something that the projection reads was not given.
        """
        return project(self.image_proj, self.spec.projection, features)

    def keys_values(
        self, tokens: Tensor, indices: Container[int] | None = None
    ) -> Iterator[tuple[CrossAttentionLayer, Tensor, Tensor]]:
        """Compute the image's keys and values for each layer, in checkpoint order.

        Args:
            tokens: ``[N, T, D]``.
            indices: Numbers of the layers to compute; all of them unless given.

        Yields:
            The layer, its keys ``[N, T, C]`` and its values ``[N, T, C]``.
        """
        for layer in self.spec.family.layers:
            if indices is not None and layer.index not in indices:
                continue
            pair = cast(ImageKeyValue, self.ip_adapter[str(layer.index)])
            yield layer, pair.to_k_ip(tokens), pair.to_v_ip(tokens)
