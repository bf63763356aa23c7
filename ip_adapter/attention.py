"""Decoupled cross-attention: the paper's equation, as pure functions.

    Z_new = softmax(Q K^T / sqrt(d)) V + weight * softmax(Q K'^T / sqrt(d)) V'

with the text's keys and values K, V and the image's K', V', one query Q for both (eq. 5 and 8 of
arXiv 2308.06721). The image branch is plain scaled dot-product attention: it has a handful of
tokens, any head size, and must not depend on which attention back end the host runs.

Shapes use the legend of `ip_adapter`.
"""

from __future__ import annotations

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
    query: Tensor, key: Tensor, value: Tensor, *, precision: torch.dtype | None = None
) -> Tensor:
    """Attend from the latent to the image tokens: ``softmax(Q K'^T / sqrt(d)) V'``.

    Consecutive rows of the batch that share an image prompt share one row of keys: the batch is
    folded into the query length, so that keys and values are never repeated.

    Args:
        query: ``[G*n, L, C]``, the layer's own query.
        key: ``[G, H, T, D]`` with ``H*D == C``; row g serves query rows ``g*n .. g*n + n - 1``.
        value: ``[G, H, T, D]``.
        precision: Compute in this dtype (some models ask for float32 attention) instead of the
            query's. Keys and values follow the query in any case.

    Returns:
        ``[G*n, L, C]`` in the query's dtype.
    """
    groups, heads = key.shape[:2]
    dtype = precision or query.dtype
    folded = query.reshape(groups, -1, query.shape[-1])  # [G, n*L, C]
    out = F.scaled_dot_product_attention(
        split_heads(folded, heads).to(dtype),
        key.to(query.device, dtype),
        value.to(query.device, dtype),
    )  # [G, H, n*L, D]
    return merge_heads(out).reshape(query.shape).to(query.dtype)


def scale(
    key: Tensor, value: Tensor, weight: float | Tensor, scaling: Scaling, tokens: int
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Bring a weight into keys and values, for the modes that do not simply multiply the result.

    Scaling the keys sharpens or flattens the softmax; the mean of the values is what an image says
    everywhere alike. ``C`` is the layer's width and ``w' = w * C / 1280``:

        V only                  K, V                           result times w
        K+V                     w K, w V
        K+V w/ C penalty        w' K, w' V
        K+mean(V) w/ C penalty  w' K, V - m + w' m             m: mean over the tokens of an image

    Args:
        key: ``[G, H, N*T, D]`` of N references.
        value: Like `key`.
        weight: w; ``[G, 1, 1]`` for one of each row.
        scaling: The mode, by the names that saved workflows of ComfyUI_IPAdapter_plus use.
        tokens: T, the number of tokens of one reference.

    Returns:
        Keys, values, and the factor of the result.
    """
    if scaling == "V only":
        return key, value, weight
    if isinstance(weight, Tensor):
        weight = weight[..., None].to(key)  # [G, 1, 1, 1]
    if scaling != "K+V":
        weight = weight * key.shape[1] * key.shape[3] / 1280
    if scaling != "K+mean(V) w/ C penalty":
        return weight * key, weight * value, 1.0
    groups, heads, length, width = value.shape
    each = value.view(groups, heads, length // tokens, tokens, width)
    mean = each.mean(dim=3, keepdim=True)
    if not isinstance(weight, Tensor):
        return weight * key, (each - mean + weight * mean).view_as(value), 1.0
    centred = each - mean + weight[..., None] * mean
    # What is left of the values at weight 0 must not count either.
    return weight * key, centred.view_as(value), (weight[..., 0] != 0).to(key)


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
    return text + weight * image_attention(query, key, value, precision=precision)
