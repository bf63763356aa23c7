"""The paper's equation against a reference written out from the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ip_adapter.attention import (
    Scaling,
    add,
    decoupled_attention,
    image_attention,
    merge_heads,
    scale,
    split_heads,
)
from tests.tolerance import assert_close

HEADS, DIM = 2, 5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, head by head, row by row, in float64."""
    out = torch.zeros_like(query, dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(HEADS):
            cut = slice(head * DIM, (head + 1) * DIM)
            q, k, v = (t[row, :, cut].double() for t in (query, key, value))
            out[row, :, cut] = (q @ k.T / math.sqrt(DIM)).softmax(dim=-1) @ v
    return out


def test_image_attention_is_the_formula() -> None:
    query, key, value = draw(3, 7, 10, seed=1), draw(3, 4, 10, seed=2), draw(3, 4, 10, seed=3)
    found = image_attention(query, split_heads(key, HEADS), split_heads(value, HEADS))
    assert_close(found, formula(query, key, value).float())


@pytest.mark.parametrize("weight", [0.5, 1.0, -0.3])
def test_decoupled_attention_adds_the_weighted_image_branch(weight: float) -> None:
    text, query = draw(2, 7, 10, seed=4), draw(2, 7, 10, seed=1)
    key, value = draw(2, 4, 10, seed=2), draw(2, 4, 10, seed=3)
    found = decoupled_attention(
        text, query, split_heads(key, HEADS), split_heads(value, HEADS), weight
    )
    assert_close(found, (text + weight * formula(query, key, value)).float())


def test_rows_that_share_a_prompt_share_its_keys() -> None:
    """Folding the batch into the query length equals repeating keys and values."""
    query = draw(6, 7, 10, seed=1)
    key, value = draw(2, 4, 10, seed=2), draw(2, 4, 10, seed=3)
    found = image_attention(query, split_heads(key, HEADS), split_heads(value, HEADS))
    repeated = formula(query, key.repeat_interleave(3, 0), value.repeat_interleave(3, 0))
    assert_close(found, repeated.float())


def test_repeated_tokens_do_not_change_the_result() -> None:
    """Why unconditional tokens may be repeated to the length of several references."""
    query, key, value = draw(1, 7, 10, seed=1), draw(1, 4, 10, seed=2), draw(1, 4, 10, seed=3)
    once, thrice = (
        image_attention(query, *(split_heads(t.repeat(1, n, 1), HEADS) for t in (key, value)))
        for n in (1, 3)
    )
    assert_close(thrice, once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("placed", [False, True])
def test_prompts_side_by_side_add_up(dtype: torch.dtype, placed: bool) -> None:
    """A softmax for each, in one product where precision allows, and a place for each."""
    query = draw(4, 7, 10, seed=1).to(dtype)
    keys, values = (
        [draw(2, 5, 10, seed=10 * kind + n).to(dtype) for n in range(3)] for kind in (1, 2)
    )
    places = draw(4, 7, 3, seed=7).sigmoid() if placed else None
    expected = torch.zeros(4, 7, 10, dtype=torch.float64)
    for n, (key, value) in enumerate(zip(keys, values, strict=True)):
        alone = formula(query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0))
        expected += alone if places is None else alone * places[..., n, None]
    found = image_attention(
        query,
        torch.cat([split_heads(key, HEADS) for key in keys], dim=2),
        torch.cat([split_heads(value, HEADS) for value in values], dim=2),
        tokens=5,
        places=places,
    )
    assert_close(found, expected.to(dtype))


def test_adding_takes_memory_that_nobody_needs() -> None:
    text, image = draw(2, 3, seed=1), draw(2, 3, seed=2)
    expected, untouched = text + image, text.clone()
    assert add(text, image) is image
    assert torch.equal(image, expected) and torch.equal(text, untouched)
    learning = draw(2, 3, seed=2).requires_grad_()
    assert add(text, learning) is not learning
    assert add(text, draw(2, 3, seed=2).half()).dtype == torch.float32


def test_weight_may_differ_by_place() -> None:
    text, query = draw(1, 6, 10, seed=4), draw(1, 6, 10, seed=1)
    key, value = (split_heads(draw(1, 4, 10, seed=s), HEADS) for s in (2, 3))
    where = torch.tensor([0, 0, 0, 1, 1, 1.0]).view(1, 6, 1)
    found = decoupled_attention(text, query, key, value, where)
    assert torch.equal(found[:, :3], text[:, :3])
    assert torch.equal(found[:, 3:], decoupled_attention(text, query, key, value, 1.0)[:, 3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_querys_dtype_wins(dtype: torch.dtype) -> None:
    query = draw(1, 7, 10, seed=1)
    key, value = draw(1, 4, 10, seed=2), draw(1, 4, 10, seed=3)
    found = image_attention(
        query.to(dtype), split_heads(key, HEADS), split_heads(value, HEADS).double()
    )
    assert found.dtype == dtype
    assert_close(found, formula(query, key, value).to(dtype))


def test_asked_for_precision_is_used() -> None:
    query = draw(1, 7, 10, seed=1).half()
    key, value = (split_heads(draw(1, 4, 10, seed=s), HEADS) for s in (2, 3))
    found = image_attention(query, key, value, precision=torch.float32)
    exact = image_attention(query.float(), key, value)
    assert found.dtype == torch.float16
    assert torch.equal(found, exact.half())


def test_heads_split_and_merge() -> None:
    x = draw(2, 7, 10, seed=1)
    assert torch.equal(merge_heads(split_heads(x, HEADS)), x)


@pytest.mark.parametrize("weight", [0.4, 1.0, -0.7])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("scaling", ["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"])
def test_scaling_modes_are_the_formulas(scaling: Scaling, images: int, weight: float) -> None:
    """On a layer of 10 channels, whose penalty is 10 / 1280."""
    tokens = 4
    query, key, value = (
        draw(2, length, 10, seed=s).double()  # what the last mode leaves is small
        for s, length in enumerate((7, images * tokens, images * tokens))
    )
    penalised = weight * 10 / 1280
    if scaling == "V only":
        expected = weight * formula(query, key, value)
    elif scaling == "K+V":
        expected = formula(query, weight * key, weight * value)
    elif scaling == "K+V w/ C penalty":
        expected = formula(query, penalised * key, penalised * value)
    else:
        shifted = value.clone()
        for image in range(images):
            own = slice(image * tokens, (image + 1) * tokens)
            mean = value[:, own].mean(dim=1, keepdim=True)
            shifted[:, own] = value[:, own] - mean + penalised * mean
        expected = formula(query, penalised * key, shifted)
    k, v = scale(split_heads(key, HEADS), split_heads(value, HEADS), weight, scaling, tokens)
    assert_close(image_attention(query, k, v), expected, relative=1e-9)


@pytest.mark.parametrize("scaling", ["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"])
def test_a_weight_for_each_row_is_each_weight_alone(scaling: Scaling) -> None:
    """A row of weight 0 gets nothing in any mode."""
    weights = (0.8, 0.0, -0.5)
    query, key, value = (draw(3, n, 10, seed=s).double() for s, n in enumerate((7, 8, 8)))
    keys, values = split_heads(key, HEADS), split_heads(value, HEADS)
    together = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    k, v = scale(keys, values, together, scaling, 4)
    found = image_attention(query, k, v)
    for row, weight in enumerate(weights):
        own = slice(row, row + 1)
        k, v = scale(keys[own], values[own], weight, scaling, 4)
        expected = image_attention(query[own], k, v) if weight else torch.zeros(1, 7, 10)
        assert_close(found[own], expected.double(), relative=1e-9)
