"""Decoupled cross-attention: the paper's equation, as pure functions.

    Z_new = softmax(Q K^T / sqrt(d)) V + weight * softmax(Q K'^T / sqrt(d)) V'

with the text's keys and values K, V and the image's K', V', one query Q for both (eq. 5 and 8 of
arXiv 2308.06721). The image branch is plain scaled dot-product attention: it has a handful of
tokens, any head size, and must not depend on which attention back end the host runs.

Shapes use the legend of `ip_adapter`.
"""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
"""What a weight multiplies; see `scale`."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, L, H*D]`` -> ``[B, H, L, D]``, without copying."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` -> ``[B, L, H*D]``."""
    batch, heads, length, dim = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * dim)


def image_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tokens: int | None = None,
    places: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Attend from the latent to the image tokens: ``softmax(Q K'^T / sqrt(d)) V'``.

    Consecutive rows of the batch that share an image prompt share one row of keys: the batch is
    folded into the query length, so that keys and values are never repeated. The tokens of several
    prompts may stand side by side; each of them gets a softmax of its own, and the results are
    added up.

    Args:
        query: ``[G*n, L, C]``, the layer's own query.
        key: ``[G, H, N*T, D]`` with ``H*D == C``; row g serves query rows ``g*n .. g*n + n - 1``.
        value: ``[G, H, N*T, D]``.
        tokens: T, of each of the N prompts; all of the keys are one prompt's unless given.
        places: ``[G*n or 1, L, N]``, how far each prompt counts at each place of the latent; 1
            everywhere unless given.
        precision: Compute in this dtype (some models ask for float32 attention) instead of the
            query's. Keys and values follow the query in any case.

    Returns:
        ``[G*n, L, C]`` in the query's dtype.
    """
    groups, heads, length = key.shape[:3]
    count = 1 if tokens is None else length // tokens
    dtype = precision or query.dtype
    folded = query.reshape(groups, -1, query.shape[-1])  # [G, n*L, C]
    split = split_heads(folded, heads).to(dtype)
    key, value = key.to(query.device, dtype), value.to(query.device, dtype)
    if places is not None:
        places = places.to(dtype).expand(len(query), -1, -1).reshape(groups, 1, -1, count)
    if count > 1 and dtype == torch.float32:
        out = _joint_attention(split, key, value, count, places)
    else:
        # Half precision keeps the scores in float32 inside of the fused kernel only.
        out = _fused_attention(split, key, value, count, places)
    return merge_heads(out).reshape(query.shape).to(query.dtype)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, count: int, places: Tensor | None
) -> Tensor:
    """As `_joint_attention`, one prompt after the other."""
    if count == 1:
        out = F.scaled_dot_product_attention(query, key, value)
        return out if places is None else out * places
    parts = [
        _fused_attention(query, k, v, 1, None if places is None else places[..., n, None])
        for n, (k, v) in enumerate(zip(key.chunk(count, 2), value.chunk(count, 2), strict=True))
    ]
    return reduce(add, parts)


def _joint_attention(
    query: Tensor, key: Tensor, value: Tensor, count: int, places: Tensor | None
) -> Tensor:
    """Several prompts of equal length in two products, which also add their results up.

    Args:
        query: ``[G, H, L, D]``.
        key: ``[G, H, N*T, D]``.
        value: Like `key`.
        count: N.
        places: ``[G, 1, L, N]`` or None.

    Returns:
        ``[G, H, L, D]``.
    """
    scores = query @ (key * query.shape[-1] ** -0.5).transpose(-1, -2)  # [G, H, L, N*T]
    shares = scores.view(*scores.shape[:-1], count, -1).softmax(dim=-1)  # [G, H, L, N, T]
    if places is not None:
        shares = shares * places[..., None]
    out: Tensor = shares.flatten(-2) @ value
    return out


def scale(
    key: Tensor, value: Tensor, weight: float | Tensor, scaling: Scaling, tokens: int
) -> tuple[Tensor, Tensor]:
    """Bring a weight into keys and values; then nothing is left to multiply in the layer.

    Scaling the keys sharpens or flattens the softmax; the mean of the values is what an image says
    everywhere alike. ``C`` is the layer's width and ``w' = w * C / 1280``:

        V only                  K, w V
        K+V                     w K, w V
        K+V w/ C penalty        w' K, w' V
        K+mean(V) w/ C penalty  w' K, V - m + w' m             m: mean over the tokens of an image

    Args:
        key: ``[G, H, N*T, D]`` of N references.
        value: Like `key`.
        weight: w, the paper's lambda; ``[G, 1, 1]`` for one of each row.
        scaling: The mode, by the names that saved workflows of ComfyUI_IPAdapter_plus use.
        tokens: T, the number of tokens of one reference.
    """
    if isinstance(weight, Tensor):
        weight = weight[..., None].to(key)  # [G, 1, 1, 1]
    if scaling == "V only":
        return key, value * weight if isinstance(weight, Tensor) or weight != 1 else value
    if scaling != "K+V":
        weight = weight * key.shape[1] * key.shape[3] / 1280
    if scaling != "K+mean(V) w/ C penalty":
        return weight * key, weight * value
    groups, heads, length, width = value.shape
    each = value.view(groups, heads, length // tokens, tokens, width)
    mean = each.mean(dim=3, keepdim=True)
    if not isinstance(weight, Tensor):
        return weight * key, (each - mean + weight * mean).view_as(value)
    centred = (each - mean + weight[..., None] * mean).view_as(value)
    # What is left of the values at weight 0 must not count either.
    return weight * key, centred * (weight != 0)


def decoupled_attention(
    text: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: float | Tensor,
    *,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Add one image prompt to the text branch: ``text + weight * image_attention``.

    Args:
        text: ``[B, L, C]``, the result of the text branch (and of image prompts added before).
        query: ``[B, L, C]``.
        key: ``[G, H, T, D]``, see `image_attention`.
        value: ``[G, H, T, D]``.
        weight: The paper's lambda. A tensor ``[B or 1, L, 1]`` weighs each place of the latent.
        precision: See `image_attention`.

    Returns:
        ``[B, L, C]``.
    """
    return add(text, weight * image_attention(query, key, value, precision=precision))


def add(text: Tensor, image: Tensor) -> Tensor:
    """``text + image``, in the memory of `image` where nobody else needs that."""
    if image.requires_grad or image.dtype != text.dtype:
        return text + image
    return image.add_(text)
