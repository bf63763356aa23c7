"""Drawn maps: what is where in the picture, told by its colours."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from ip_adapter import heatmap, maps
from ip_adapter.errors import ImageError
from ip_adapter.heatmap import View
from ip_adapter.maps import Group, Maps

HOT = maps.colour(torch.ones(()))
COLD = maps.colour(torch.zeros(()))


def uniform(*strengths: float, steps: int = 2, latent: tuple[int, int] = (4, 8)) -> Maps:
    """Each reference acts alike everywhere, in both of two groups and all steps."""
    count = len(strengths)
    height, width = latent
    grids = ((height, width), (height // 2, width // 2))
    values = torch.tensor(strengths).view(-1, 1, 1, 1)
    return Maps(
        references=tuple(str(number + 1) for number in range(count)),
        labels=("adapter",) * count,
        groups=tuple(Group(f"down {h}", (h, w), 1) for h, w in grids),
        steps=tuple((step, step) for step in range(1, steps + 1)),
        means=tuple(values.expand(count, steps, *grid) for grid in grids),
        latent=latent,
    )


def count(drawn: Tensor, colour: Tensor) -> int:
    """Pixels of a colour."""
    return int(((drawn[0] - colour).abs().amax(-1) < 0.005).sum())


@pytest.mark.parametrize("view", get_args(View))
def test_each_reference_adds_the_same_number_of_cells(view: View) -> None:
    """By reference there is one more beside it, else one more row; all within four columns."""
    drawn = [heatmap.draw(uniform(*[1.0] * number), view) for number in (1, 2, 3)]
    found = [count(one, HOT) for one in drawn]
    assert all(one.shape[0] == 1 and one.shape[-1] == 3 for one in drawn)
    assert found[1] > found[0] and found[2] > found[1]
    if view != "by reference":
        assert found[2] - found[1] == found[1] - found[0]
        alone = heatmap.draw(uniform(1.0, 1.0, 1.0), view, reference=2)
        assert alone.shape == drawn[0].shape and count(alone, HOT) == found[0]


def test_columns_are_groups_or_steps_and_one_for_all_of_them() -> None:
    sheets = {n: heatmap.draw(uniform(1.0, steps=n), "over steps") for n in (2, 3, 5, 6)}
    assert sheets[3].shape[2] > sheets[2].shape[2]
    assert sheets[6].shape[1] > sheets[5].shape[1]  # seven cells are two rows
    groups = [heatmap.draw(uniform(1.0, steps=n), "by layer group").shape for n in (3, 6)]
    assert groups[0] == groups[1] == sheets[2].shape  # three cells


def test_one_scale_compares_and_own_scales_show_each() -> None:
    """A weak reference is as bright as a strong one on a scale of its own."""
    shown = uniform(1.0, 0.4)
    same = heatmap.draw(shown, "over steps")
    own = heatmap.draw(shown, "over steps", scale="each its own")
    one = count(heatmap.draw(shown, "over steps", reference=1), HOT)
    assert count(same, HOT) == one
    assert count(own, HOT) > 1.9 * one
    middle = maps.colour(torch.tensor(0.4))
    assert count(same, middle) > 0.9 * one


def test_cells_have_the_shape_of_the_picture_and_lie_as_the_map_does() -> None:
    """The upper left quarter acts: so much of each cell is hot, and it is left of the rest."""
    shown = uniform(0.0, latent=(64, 128))
    sized = [torch.zeros(1, 2, h, w) for h, w in ((64, 128), (32, 64))]
    for one in sized:
        one[..., : one.shape[2] // 2, : one.shape[3] // 2] = 1
    quarter = Maps(**{**vars(shown), "means": tuple(sized)})
    drawn = heatmap.draw(quarter, "by reference")
    hot = (drawn[0] - HOT).abs().amax(-1) < 0.005
    cold = (drawn[0] - COLD).abs().amax(-1) < 0.005
    assert 0.28 < int(hot.sum()) / int(cold.sum()) < 0.4
    rows, columns = (torch.where(hot.any(dim))[0] for dim in (1, 0))
    top, bottom = int(rows[0]), int(rows[0]) + 96
    edge = int(columns[0]) + 192  # of cells of 384; colours change within six pixels around it
    assert bool(hot[top : bottom - 8, columns[0] : edge - 4].all())
    assert bool(cold[top : bottom - 8, edge + 4 : edge + 190].all())


def test_the_picture_shines_through() -> None:
    shown = uniform(0.0)
    picture = torch.zeros(32, 64, 3)
    picture[:, 32:] = 1
    without, over = (heatmap.draw(shown, "over steps", picture=p) for p in (None, picture))
    assert without.shape == over.shape
    dark, light = (maps.overlay(torch.zeros(1, 1), picture[:1, x : x + 1])[0, 0] for x in (0, 63))
    assert 0.9 < count(over, dark) / count(over, light) < 1.1
    assert count(over, dark) > 0.4 * count(without, COLD)


def test_masks_are_maps_of_what_acts_most() -> None:
    shown = uniform(0.2, 0.0, 0.8)
    same = heatmap.as_masks(shown, (32, 64))
    assert same.shape == (3, 32, 64)
    assert same[:, 0, 0].tolist() == pytest.approx([0.25, 0, 1])
    own = heatmap.as_masks(shown, (32, 64), scale="each its own")
    assert own[:, 0, 0].tolist() == pytest.approx([1, 0, 1])
    assert torch.equal(heatmap.as_masks(shown, (32, 64), reference=3), same[2:])


def test_nothing_at_all_is_drawn_as_nothing() -> None:
    drawn = heatmap.draw(uniform(0.0, 0.0), "by layer group")
    assert bool(torch.isfinite(drawn).all()) and count(drawn, COLD) > 0


def test_a_reference_that_is_not_there_is_refused() -> None:
    words = "reference is 3, but in these maps there are 2 references"
    with pytest.raises(ImageError, match=words):
        heatmap.draw(uniform(1.0, 1.0), "by reference", reference=3)
    with pytest.raises(ImageError, match="Set it to 1 to 2, or to 0 for all"):
        heatmap.as_masks(uniform(1.0, 1.0), (8, 8), reference=3)
    with pytest.raises(ImageError, match=r"there is 1 reference \(1\). Set it to 1, or to 0"):
        heatmap.as_masks(uniform(1.0), (8, 8), reference=2)
