from __future__ import annotations

import pytest
import torch

from ip_adapter import masks
from ip_adapter.errors import ImageError


def test_mask_is_averaged_over_the_cells_of_the_latent() -> None:
    mask = torch.rand(2, 24, 32)
    out = masks.to_latent(mask, 3, 4)
    assert out.shape == (2, 1, 3, 4)
    for y in range(3):
        for x in range(4):
            cell = mask[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            torch.testing.assert_close(out[:, 0, y, x], cell.mean(dim=(1, 2)))


def test_tokens_are_row_major() -> None:
    latent = torch.arange(6.0).view(1, 1, 2, 3)
    assert masks.to_tokens(latent, 2, 3).flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (9, 130), (5, 5)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_masks_stay_exact_at_any_size(size: tuple[int, int], value: float) -> None:
    latent = masks.to_latent(torch.full((1, *size), value), 11, 7)
    for grid in ((11, 7), (6, 4), (3, 2), (2, 1)):
        assert bool((masks.to_tokens(latent, *grid) == value).all())


def test_rank_two_is_one_mask() -> None:
    assert masks.check(torch.ones(4, 5)).shape == (1, 4, 5)
    assert masks.check(torch.ones(3, 4, 5)).shape == (3, 4, 5)


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4, 4), (1, 4, 4, 3)])
def test_wrong_rank_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="Convert Image to Mask"):
        masks.check(torch.ones(shape))


def test_empty_mask_is_refused() -> None:
    with pytest.raises(ImageError, match="empty"):
        masks.check(torch.ones(1, 0, 4))
