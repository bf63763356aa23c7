"""Tiles of a picture as one set of features, against torch's own adaptive pooling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ip_adapter import enhance
from tests.tolerance import assert_close


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("height", "width", "count"), [(8, 8, 2), (7, 11, 3), (20, 9, 1)])
def test_tiles_are_equal_and_row_by_row(height: int, width: int, count: int) -> None:
    image = draw(2, height, width, 3)
    tiles = enhance.split(image, count)
    h, w = height // count, width // count
    assert tiles.shape == (2 * count * count, h, w, 3)
    for picture in range(2):
        for row in range(count):
            for column in range(count):
                found = tiles[picture * count * count + row * count + column]
                expected = image[picture, row * h : row * h + h, column * w : column * w + w]
                assert torch.equal(found, expected)


def test_a_picture_of_few_pixels_has_few_tiles() -> None:
    assert enhance.split(draw(1, 3, 40, 3), 16).shape == (9, 1, 13, 3)


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize(("side", "count"), [(16, 2), (4, 3), (24, 4), (2, 16)])
def test_hidden_states_are_stitched_and_pooled(
    side: int, count: int, has_class_token: bool
) -> None:
    first, width = int(has_class_token), 5
    features = draw(2 * count * count, first + side * side, width)
    found = enhance.merge(features, count)
    rows = []
    for tiles in features.split(count * count):
        grids = tiles[:, first:].reshape(-1, side, side, width).permute(0, 3, 1, 2)
        lines = [
            torch.cat([grids[row * count + column] for column in range(count)], dim=2)
            for row in range(count)
        ]
        stitched = torch.cat(lines, dim=1)  # [W, k*S, k*S]
        assert stitched.shape == (width, count * side, count * side)
        pooled = F.adaptive_avg_pool2d(stitched[None], (side, side))
        patches = pooled.permute(0, 2, 3, 1).reshape(side * side, width)
        rows.append(torch.cat((tiles[:, :first].mean(dim=0), patches)))
    assert_close(found, torch.stack(rows), 1e-5)


@pytest.mark.parametrize("width", [1024, 1280, 768, 7])
def test_pooled_embeddings_are_averaged_whatever_their_width(width: int) -> None:
    features = draw(3 * 4, width)
    expected = torch.stack([features[i * 4 : i * 4 + 4].mean(dim=0) for i in range(3)])
    assert_close(enhance.merge(features, 2), expected)


@pytest.mark.parametrize("shape", [(6,), (17, 6)])
def test_whole_and_tiled_are_blended_or_kept_apart(shape: tuple[int, ...]) -> None:
    whole, tiled = draw(2, *shape), draw(4, *shape)[2:]
    assert_close(enhance.mix(whole, tiled, 0.3), 0.3 * whole + 0.7 * tiled)
    assert_close(enhance.mix(whole, tiled, 1.0), whole)
    apart = enhance.side_by_side(whole, tiled, 0.3)
    assert_close(apart[:2], 0.3 * whole)
    assert torch.equal(apart[2:], tiled)


def test_one_tile_is_the_picture() -> None:
    image, features = draw(2, 9, 7, 3), draw(2, 17, 4)
    assert torch.equal(enhance.split(image, 1), image)
    assert torch.equal(enhance.merge(features, 1), features)
