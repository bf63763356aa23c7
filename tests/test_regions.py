from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ip_adapter import regions, retouch, tiles
from ip_adapter.errors import ImageError
from ip_adapter.prompt import ImagePrompt


def mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_masks_multiply() -> None:
    first, second = mask(1, 6, 8), mask(1, 6, 8, seed=1)
    found = regions.intersect(first, second)
    assert found is not None and torch.equal(found, first * second)


def test_no_mask_is_everywhere() -> None:
    given = mask(2, 6, 8)
    assert regions.intersect(None, None) is None
    for pair in ((given, None), (None, given)):
        found = regions.intersect(*pair)
        assert found is not None and torch.equal(found, given)
    found = regions.intersect(given[0], None)
    assert found is not None and found.shape == (1, 6, 8)


def test_masks_of_several_sizes_and_counts_meet() -> None:
    first, second = mask(3, 4, 16), mask(1, 8, 5, seed=1)
    found = regions.intersect(first, second)
    assert found is not None and found.shape == (3, 8, 16)
    ones = torch.ones(1, 4, 16)
    found = regions.intersect(ones, torch.ones(2, 9, 5))
    assert found is not None and torch.equal(found, torch.ones(2, 9, 16))


def test_a_small_mask_keeps_its_edges() -> None:
    """Its pixels are areas of the picture, as they are when it is averaged to a latent's size."""
    halves = torch.zeros(1, 2, 2)
    halves[..., 1] = 1
    found = regions.intersect(halves, torch.ones(1, 8, 8))
    assert found is not None
    assert found[0].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 8


def test_the_last_mask_serves_the_pictures_that_come_after() -> None:
    first, second = mask(3, 4, 4), mask(2, 4, 4, seed=1)
    found = regions.intersect(first, second)
    assert found is not None
    assert torch.equal(found, first * torch.stack((second[0], second[1], second[1])))


def test_wrong_masks_are_refused() -> None:
    with pytest.raises(ImageError, match="mask has shape"):
        regions.intersect(torch.zeros(3), torch.zeros(4, 4))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_whole_picture_is_sharpened_before_it_is_cut(channels: int) -> None:
    """Its colour only; no edge of a tile is an edge of the picture."""
    image = mask(1, 200, 420, channels)
    scaled = tiles.scale(image)
    expected = scaled.clone()
    expected[..., :3] = retouch.sharpen(scaled[..., :3], 0.5)
    found = regions.tile(image, 0.5)
    assert torch.equal(found.pictures[0, 0], expected[0, :, :256])
    assert torch.equal(found.pictures[-1, 0], expected[0, :, -256:])
    plain = regions.tile(image)
    assert torch.equal(plain.pictures[0, 0], scaled[0, :, :256])
    assert not torch.equal(plain.pictures[..., 0], found.pictures[..., 0])


def test_a_region_is_never_copied() -> None:
    """Hosts copy options deeply; tokens must not be."""
    prompt = ImagePrompt(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), "", "")
    region = regions.Region(prompt, mask(4, 4))
    assert copy.deepcopy(region) is region
    assert copy.deepcopy((region,))[0] is region
