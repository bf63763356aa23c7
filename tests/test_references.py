"""Combining references, against the formulas; masks on references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ip_adapter import images
from ip_adapter.attention import image_attention
from ip_adapter.errors import ImageError
from ip_adapter.prompt import from_tokens
from ip_adapter.references import COMBINATIONS, Combine, combine, masked
from tests.tolerance import assert_close


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(rows: list[list[float]], how: str) -> list[float]:
    """Number by number, in plain Python."""
    out = []
    for column in zip(*rows, strict=True):
        norm = math.sqrt(sum(x * x for x in column))
        out.append(
            {
                "average": sum(column) / len(column),
                "norm average": sum(x / norm for x in column) / len(column),
                "add": sum(column),
                "subtract": column[0] - sum(column[1:]) / (len(column) - 1),
                "max": max(column),
                "min": min(column),
            }[how]
        )
    return out


@pytest.mark.parametrize("how", [c for c in COMBINATIONS if c != "concat"])
@pytest.mark.parametrize("shape", [(7,), (5, 3)], ids=["pooled", "hidden"])
def test_ways_are_the_formulas(how: Combine, shape: tuple[int, ...]) -> None:
    features = draw(4, *shape)
    expected = by_hand(features.flatten(1).double().tolist(), how)
    found = combine(features, how)
    assert found.shape == (1, *shape)
    assert_close(found.flatten(), torch.tensor(expected).float())


@pytest.mark.parametrize("how", COMBINATIONS)
def test_one_reference_is_itself(how: Combine) -> None:
    features = draw(1, 7)
    assert torch.equal(combine(features, how), features)


def test_concat_leaves_them_apart() -> None:
    features = draw(3, 5, 7)
    assert torch.equal(combine(features, "concat"), features)


def test_a_number_that_is_zero_everywhere_stays_zero() -> None:
    features = torch.zeros(2, 3)
    features[:, 0] = 1
    assert torch.equal(combine(features, "norm average")[0, 1:], torch.zeros(2))


@pytest.mark.parametrize(("positive", "negative"), [(1, 1), (3, 1), (1, 2), (3, 2), (2, 4)])
def test_sides_of_any_number_attend_as_they_are(positive: int, negative: int) -> None:
    """Repeating a whole set leaves what attention over it returns."""
    first, second = draw(positive, 4, 6, seed=1), draw(negative, 4, 6, seed=2)
    prompt = from_tokens(first, second, "a", "b")
    assert prompt.conditional.shape == prompt.unconditional.shape
    query = draw(1, 5, 6, seed=3)

    def attend(tokens: Tensor) -> Tensor:
        return image_attention(query, tokens[:, None], tokens[:, None])

    for side, tokens in ((prompt.conditional, first), (prompt.unconditional, second)):
        assert_close(attend(side), attend(tokens.flatten(0, 1)[None]))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_a_mask_hides_says_nothing(channels: int) -> None:
    """The encoder sees CLIP's mean colour there, zero once normalised."""
    image = torch.rand(2, 40, 40, channels, generator=torch.Generator().manual_seed(0))
    if channels == 4:
        image[..., 3] = 1
    mask = torch.zeros(20, 20)
    mask[:, :10] = 1
    seen = images.normalise(images.squares(masked(image, mask), 40, "crop"))
    assert seen[..., 24:].abs().max() < 0.01  # a level of 8 bit
    plain = images.normalise(images.squares(image, 40, "crop"))
    assert torch.allclose(seen[..., :16], plain[..., :16], atol=1e-5)


def test_a_mask_and_transparency_both_hide() -> None:
    image = torch.ones(1, 8, 8, 4)
    image[..., :4, :, 3] = 0
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    expected = torch.zeros(8, 8)
    expected[4:, :4] = 1
    assert torch.equal(masked(image, mask)[0, ..., 3], expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 8, 8), "3 masks for 2 pictures"),
        (torch.ones(1, 1, 8, 8), "mask has shape"),
        (torch.ones(0, 8), "empty"),
        (torch.zeros(64, 64), "0 everywhere"),
    ],
)
def test_bad_masks_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        masked(torch.rand(2, 8, 8, 3), mask)
