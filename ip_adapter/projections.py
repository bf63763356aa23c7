"""Projections: image features -> image tokens.

Attribute names equal the published checkpoint keys, so that loading is a plain strict
``load_state_dict``. Layers are built through `ops`, which is ``torch.nn`` or the host's casting
twin, so the same module trains, is tested without ComfyUI, and runs in ComfyUI's memory.

Source: section 3.2 of the paper (global), and the fine-grained variant described there.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .spec import LinearProjection, Projection, ResamplerProjection

HEAD_WIDTH = 64
"""Width of one attention head in every published resampler."""


class Ops(Protocol):
    """The two kinds of layers that projections and adapters are made of."""

    Linear: Any
    LayerNorm: Any


class ImageProjModel(nn.Module):
    """Global image prompt: one linear layer cut into tokens, then a LayerNorm.

    Source: h94/IP-Adapter ``ip-adapter_sd15``; keys ``proj.*`` and ``norm.*``.
    """

    def __init__(self, spec: LinearProjection, ops: Ops, device: torch.device | str | None) -> None:
        super().__init__()
        self.tokens = spec.tokens
        self.proj = ops.Linear(spec.features, spec.tokens * spec.width, device=device)
        self.norm = ops.LayerNorm(spec.width, device=device)

    def forward(self, features: Tensor) -> Tensor:
        """``[N, E]`` pooled embeddings -> ``[N, T, D]`` image tokens."""
        tokens = rearrange(self.proj(features), "n (t d) -> n t d", t=self.tokens)
        return self.norm(tokens)  # type: ignore[no-any-return]


class PerceiverAttention(nn.Module):
    """Queries read the image features and themselves.

    Keys and values come from the normed features followed by the normed queries, so the queries
    also attend to one another.
    """

    def __init__(self, spec: ResamplerProjection, ops: Ops, device: torch.device | str | None):
        super().__init__()
        self.heads = spec.heads
        across = spec.heads * HEAD_WIDTH
        self.norm1 = ops.LayerNorm(spec.inner, device=device)
        self.norm2 = ops.LayerNorm(spec.inner, device=device)
        self.to_q = ops.Linear(spec.inner, across, bias=False, device=device)
        self.to_kv = ops.Linear(spec.inner, across * 2, bias=False, device=device)
        self.to_out = ops.Linear(across, spec.inner, bias=False, device=device)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """``[N, P, W]`` features and ``[N, T, W]`` latents -> ``[N, T, W]``."""
        features, latents = self.norm1(features), self.norm2(latents)
        q = rearrange(self.to_q(latents), "n t (h d) -> n h t d", h=self.heads)
        k, v = rearrange(
            self.to_kv(torch.cat((features, latents), dim=1)),
            "n p (two h d) -> two n h p d",
            two=2,
            h=self.heads,
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "n h t d -> n t (h d)"))  # type: ignore[no-any-return]


class Resampler(nn.Module):
    """Fine-grained image prompt: learned queries read the patch features through a few layers.

    Source: h94/IP-Adapter ``ip-adapter-plus_sd15``; 51 keys.
    """

    def __init__(
        self, spec: ResamplerProjection, ops: Ops, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, spec.tokens, spec.inner, device=device))
        if self.latents.device.type != "meta":
            nn.init.normal_(self.latents, std=spec.inner**-0.5)
        self.proj_in = ops.Linear(spec.features, spec.inner, device=device)
        self.proj_out = ops.Linear(spec.inner, spec.width, device=device)
        self.norm_out = ops.LayerNorm(spec.width, device=device)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(spec, ops, device),
                    nn.Sequential(
                        ops.LayerNorm(spec.inner, device=device),
                        ops.Linear(spec.inner, spec.hidden, bias=False, device=device),
                        nn.GELU(),
                        ops.Linear(spec.hidden, spec.inner, bias=False, device=device),
                    ),
                ]
            )
            for _ in range(spec.depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """``[N, P, E]`` patch features -> ``[N, T, D]`` image tokens."""
        # Under the host's memory management a bare parameter may lie on another device.
        latents = repeat(self.latents.to(features), "1 t w -> n t w", n=features.shape[0])
        features = self.proj_in(features)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            latents = attention(features, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm_out(self.proj_out(latents))  # type: ignore[no-any-return]


def build_projection(
    spec: Projection, ops: Ops, device: torch.device | str | None = None
) -> nn.Module:
    """Build the module that a projection's spec describes."""
    match spec:
        case LinearProjection():
            return ImageProjModel(spec, ops, device)
        case ResamplerProjection():
            return Resampler(spec, ops, device)
    raise TypeError(f"unsupported projection {spec!r}")
