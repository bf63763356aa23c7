"""The published projections and the paper's attention, written out on the tensors of a file.

For adapters that diffusers does not know. Nothing here comes from the library; keys and formulas
are those of the reference implementations (h94/IP-Adapter, InstantID, Kolors, IP-Adapter-Instruct).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from tests.synthetic import catalogue

Weights = Mapping[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    out = x @ weights[f"{name}.weight"].to(x).T
    return out + weights[f"{name}.bias"].to(x) if f"{name}.bias" in weights else out


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return out * weights[f"{name}.weight"].to(x) + weights[f"{name}.bias"].to(x)


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / sqrt(2)))


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).movedim(-2, -3)  # [..., H, L, D]


def attend(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Softmax attention of `count` heads over ``[B, L, C]``."""
    q, k, v = heads(q, count), heads(k, count), heads(v, count)
    scores = (q @ k.transpose(-1, -2) / sqrt(q.shape[-1])).softmax(-1)
    return (scores @ v).movedim(-3, -2).flatten(-2)


def perceive(weights: Weights, name: str, x: Tensor, latents: Tensor) -> Tensor:
    """One layer: the latents read the features and themselves, then a feed-forward."""
    features = norm(weights, f"{name}.0.norm1", x)
    queries = norm(weights, f"{name}.0.norm2", latents)
    q = linear(weights, f"{name}.0.to_q", queries)
    kv = linear(weights, f"{name}.0.to_kv", torch.cat([features, queries], dim=1))
    k, v = kv[..., : q.shape[-1]], kv[..., q.shape[-1] :]
    latents = latents + linear(weights, f"{name}.0.to_out", attend(q, k, v, q.shape[-1] // 64))
    hidden = gelu(linear(weights, f"{name}.1.1", norm(weights, f"{name}.1.0", latents)))
    return latents + linear(weights, f"{name}.1.3", hidden)


def resampler(weights: Weights, features: Tensor, latents: Tensor | None = None) -> Tensor:
    """``[N, P, E]`` -> ``[N, T, D]``; the latents are the learned ones unless given."""
    if latents is None:
        latents = weights["latents"].to(features).repeat(len(features), 1, 1)
    x = linear(weights, "proj_in", features)
    for depth in range(4):
        latents = perceive(weights, f"layers.{depth}", x, latents)
    return norm(weights, "norm_out", linear(weights, "proj_out", latents))


def face_perceiver(weights: Weights, face: Tensor, features: Tensor, scale: float) -> Tensor:
    """FaceID-Plus with its shortcut: ``identity + scale * resampled``."""
    hidden = linear(weights, "proj.2", gelu(linear(weights, "proj.0", face)))
    width = len(weights["norm.weight"])
    identity = norm(weights, "norm", hidden.unflatten(-1, (-1, width)))
    inner = {key.removeprefix("perceiver_resampler."): value for key, value in weights.items()}
    return identity + scale * resampler(inner, features, identity)


def instruct(weights: Weights, features: Tensor, instruction: Tensor, prompt: Tensor) -> Tensor:
    """In each depth the latents read the image, the prompt and the instruction in this order."""
    latents = weights["latents"].to(features).repeat(len(features), 1, 1)
    read = {
        "layers": linear(weights, "proj_in", features),
        "prompt_layers": linear(weights, "proj_prompt_input", prompt),
        "new_input_layers": linear(weights, "proj_new_input", instruction),
    }
    for depth in range(4):
        for stack, x in read.items():
            latents = perceive(weights, f"{stack}.{depth}", x, latents)
    return norm(weights, "norm_out", linear(weights, "proj_out", latents))


@dataclass(frozen=True)
class ImageBranch:
    """One image prompt of a UNet.

    Attributes:
        weights: The ``ip_adapter`` part of a file.
        tokens: ``[rows, T, D]`` as keys and values read them.
        scale: The paper's lambda.
        mask: Turns a number of query tokens into factors ``[L, 1]``, or None for everywhere.
    """

    weights: Weights
    tokens: Tensor
    scale: float = 1.0
    mask: Callable[[int], Tensor] | None = None


class DecoupledAttention:
    """A diffusers attention processor: eq. 5 of the paper, once for each image prompt."""

    def __init__(self, number: int, branches: Sequence[ImageBranch]) -> None:
        self.number = number
        self.branches = branches

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any
    ) -> Tensor:
        q = attn.to_q(hidden_states)
        text = encoder_hidden_states
        out = attend(q, attn.to_k(text), attn.to_v(text), attn.heads)
        for branch in self.branches:
            k = linear(branch.weights, f"{self.number}.to_k_ip", branch.tokens)
            v = linear(branch.weights, f"{self.number}.to_v_ip", branch.tokens)
            image = attend(q, k, v, attn.heads)
            if branch.mask is not None:
                image = image * branch.mask(image.shape[1])
            out = out + branch.scale * image
        return attn.to_out[0](out)  # type: ignore[no-any-return]


def install(unet: Any, family: str, branches: Sequence[ImageBranch]) -> None:
    """Give every cross-attention of a diffusers UNet these image prompts, in place.

    Args:
        unet: It stays as it is but for its processors.
        family: Whose numbering the files have: down blocks, up blocks, middle; cross is odd.
        branches: One for each image prompt.
    """
    processors = dict(unet.attn_processors)
    for position, path in enumerate(catalogue.paths(family)):
        name = f"{path}.attn2.processor"
        assert name in processors
        processors[name] = DecoupledAttention(2 * position + 1, branches)
    unet.set_attn_processor(processors)
