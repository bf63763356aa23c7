"""Where references act: against the definition written out, and by numbers done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ip_adapter import maps
from ip_adapter.maps import Group, Maps, Sums
from tests.tolerance import assert_close

HEADS, DIM, TOKENS = 2, 5, 3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def definition(
    text: Tensor, query: Tensor, key: Tensor, value: Tensor, owners: list[int], places: Tensor
) -> Tensor:
    """|| places * sum over t of r of p_qt v_t || / || text(q) ||, number by number in float64."""
    found = torch.zeros(max(owners) + 1, *query.shape[:2], dtype=torch.float64)
    for row in range(query.shape[0]):
        for place in range(query.shape[1]):
            said = math.sqrt(float((text[row, place].double() ** 2).sum()))
            for reference in range(len(found)):
                squares = 0.0
                for head in range(HEADS):
                    q = query[row, place, head * DIM : (head + 1) * DIM].double()
                    scores = key[row, head].double() @ q / math.sqrt(DIM)
                    shares = scores.exp() / scores.exp().sum()
                    parts = [
                        float(places[row, place]) * shares[t] * value[row, head, t].double()
                        for t, owner in enumerate(owners)
                        if owner == reference
                    ]
                    squares += float((torch.stack(parts).sum(0) ** 2).sum())
                found[reference, row, place] = math.sqrt(squares) / said
    return found


@pytest.mark.parametrize(
    ("references", "owners"),
    [
        (1, [0] * 6),
        (2, [0, 0, 0, 1, 1, 1]),
        (2, [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]),  # repeated to match the other side
        (1, [0] * 7),
    ],
)
def test_strength_is_its_definition(references: int, owners: list[int]) -> None:
    text, query = draw(2, 4, HEADS * DIM, seed=1), draw(2, 4, HEADS * DIM, seed=2)
    key = draw(2, HEADS, len(owners), DIM, seed=3)
    value = draw(2, HEADS, len(owners), DIM, seed=4)
    places = draw(2, 4, 1, seed=5).sigmoid()
    found = maps.strength(
        text,
        query,
        key,
        value,
        references=references,
        length=TOKENS if references > 1 else None,
        places=places,
    )
    assert found.dtype == torch.float32
    expected = definition(text, query, key, value, owners, places[..., 0])
    assert_close(found, expected.float())


def test_strength_follows_the_weight_and_not_the_softmax() -> None:
    """Attention sums up to 1 whatever the weight is; the strength is proportional to it."""
    text, query, key = draw(1, 4, 10, seed=1), draw(1, 4, 10, seed=2), draw(1, 2, 3, 5, seed=3)
    value = draw(1, 2, 3, 5, seed=4)
    full = maps.strength(text, query, key, value)
    assert_close(maps.strength(text, query, key, -0.25 * value), 0.25 * full)
    assert not maps.strength(text, query, key, 0 * value).any()
    assert_close(maps.strength(2 * text, query, key, value), full / 2)


def test_half_precision_is_near() -> None:
    given = [draw(1, 6, 10, seed=1), draw(1, 6, 10, seed=2)]
    given += [draw(1, 2, 3, 5, seed=3), draw(1, 2, 3, 5, seed=4)]
    found = maps.strength(*(x.half() for x in given))
    assert found.dtype == torch.float32
    assert_close(found, maps.strength(*given), relative=5e-3)


@pytest.mark.parametrize(
    ("area", "grid", "expected"),
    [
        (None, (4, 8), ((0, 4), (0, 8))),
        ((8, 8, 0, 8), (8, 16), ((0, 8), (8, 16))),
        ((8, 8, 0, 8), (4, 8), ((0, 4), (4, 8))),
        ((4, 6, 2, 5), (4, 8), ((1, 3), (2, 6))),  # columns 2.5 to 5.5
        ((1, 1, 7, 15), (1, 2), ((0, 1), (1, 2))),
    ],
)
def test_an_area_covers_the_tokens_that_it_touches(
    area: maps.Area | None, grid: maps.Grid, expected: tuple[tuple[int, int], ...]
) -> None:
    rows, columns = maps.extent(area, (8, 16), grid)
    assert ((rows.start, rows.stop), (columns.start, columns.stop)) == expected


def test_sums_are_means_over_layers_and_passes() -> None:
    """Two layers of one group, two passes of the first step, one of the second, in which one acts.

    A layer that adds nothing counts as nothing, not as missing.
    """
    groups = [Group("down 2", (2, 2), 2), Group("up 4", (4, 4), 1)]
    sums = Sums(groups, references=3, steps=3, latent=(4, 4))
    ones = torch.ones(2, 2, 2)
    for strengths in (1.0, 3.0):
        sums.begin(0)
        sums.add(0, 0, 1, strengths * ones)
        sums.add(0, 0, 1, 2 * strengths * ones)
    sums.begin(1)
    sums.add(0, 1, 0, 5 * ones[:1])
    down, up = sums.means()
    assert down.shape == (3, 3, 2, 2) and up.shape == (3, 3, 4, 4)
    assert not up.any()
    first, second, third = (down[:, step, 0, 0].tolist() for step in range(3))
    assert first == [0, (1 + 2 + 3 + 6) / 4, (1 + 2 + 3 + 6) / 4]
    assert second == [5 / 2, 0, 0]
    assert third == [0, 0, 0]  # no pass
    assert torch.equal(down, down[..., :1, :1].expand_as(down))


def test_sums_put_areas_where_they_are() -> None:
    """The left half in one pass, the whole in another: the left is the mean of both."""
    sums = Sums([Group("up 4", (4, 8), 1)], references=1, steps=1, latent=(4, 8))
    left: maps.Area = (4, 4, 0, 0)
    sums.begin(0, left)
    sums.add(0, 0, 0, torch.full((1, 4, 4), 6.0), left)
    sums.begin(0)
    sums.add(0, 0, 0, torch.full((1, 4, 8), 2.0))
    (found,) = sums.means()
    assert torch.equal(found[0, 0, :, :4], torch.full((4, 4), 4.0))
    assert torch.equal(found[0, 0, :, 4:], torch.full((4, 4), 2.0))


def test_sums_take_a_layer_with_another_grid() -> None:
    """Some packs shrink the picture in the first steps."""
    sums = Sums([Group("up 4", (4, 4), 1)], references=1, steps=1, latent=(4, 4))
    sums.begin(0)
    sums.add(0, 0, 0, torch.full((1, 2, 2), 3.0))
    assert torch.equal(sums.means()[0], torch.full((1, 1, 4, 4), 3.0))


def test_resizing_goes_from_middle_to_middle() -> None:
    found = maps.resize(torch.tensor([[[0.0, 1.0]]]), (1, 4))
    assert found.tolist() == [[[0, 0.25, 0.75, 1]]]
    assert maps.resize(found, (1, 4)) is found


@pytest.fixture
def recorded() -> Maps:
    """Two references, two groups of three layers and one, three steps in two stretches."""
    small = torch.tensor([[1.0, 4.0], [0.0, 2.0]])[..., None, None].expand(2, 2, 1, 2)
    large = torch.tensor([[3.0, 0.0], [1.0, 1.0]])[..., None, None].expand(2, 2, 2, 4)
    return Maps(
        references=("1", "2"),
        labels=("a", "b"),
        groups=(Group("down 1", (1, 2), 3), Group("up 2", (2, 4), 1)),
        steps=((1, 2), (3, 3)),
        means=(small, large),
        latent=(2, 4),
    )


def test_views_are_means_weighted_by_layers_and_steps(recorded: Maps) -> None:
    assert recorded.grid == (2, 4)
    steps = recorded.over_steps()
    assert steps.shape == (2, 2, 2, 4)
    expected = [[(3 * 1 + 3) / 4, (3 * 4 + 0) / 4], [(0 + 1) / 4, (3 * 2 + 1) / 4]]
    assert torch.allclose(steps[..., 0, 0], torch.tensor(expected))
    groups = recorded.by_group()
    assert groups.shape == (2, 2, 2, 4)
    expected = [[(2 * 1 + 4) / 3, (2 * 3 + 0) / 3], [(0 + 2) / 3, (2 * 1 + 1) / 3]]
    assert torch.allclose(groups[..., 0, 0], torch.tensor(expected))
    whole = recorded.by_reference()
    assert whole.shape == (2, 2, 4)
    expected = [(2 * 1.5 + 3) / 3, (2 * 0.25 + 1.75) / 3]
    assert torch.allclose(whole[:, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize(("steps", "most"), [(1, 10), (7, 10), (10, 10), (11, 10), (33, 10)])
def test_stretches_are_all_steps_in_order(steps: int, most: int) -> None:
    found = maps.stretches(steps, most)
    assert len(found) == min(steps, most)
    covered = [step for first, last in found for step in range(first, last + 1)]
    assert covered == list(range(1, steps + 1))
    lengths = [last - first + 1 for first, last in found]
    assert max(lengths) - min(lengths) <= 1


def test_colours_get_lighter_and_stay_within_their_range() -> None:
    colours = maps.colour(torch.linspace(-0.5, 1.5, 201))
    assert colours.shape == (201, 3) and bool(((colours >= 0) & (colours <= 1)).all())
    light = colours @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert bool((light[51:151].diff() > 0).all())
    assert float(light[0]) < 0.1 and float(light[-1]) > 0.9
    assert torch.equal(colours[0], colours[50]) and torch.equal(colours[-1], colours[150])


def test_an_overlay_shows_the_picture_in_grey_below_the_colours() -> None:
    values = torch.tensor([[0.0, 1.0]])
    black, white = (maps.overlay(values, torch.full((1, 2, 3), level)) for level in (0.0, 1.0))
    difference = (white - black)[0]  # what shines through: the same of red, green and blue
    assert torch.allclose(difference, difference[:, :1].expand(-1, 3))
    assert 0.35 < float(difference[0, 0]) < 0.45 and 0.1 < float(difference[1, 0]) < 0.2
    red = maps.overlay(values, torch.tensor([1.0, 0.0, 0.0]).expand(1, 2, 3))[0]
    assert torch.allclose(red - black[0], 0.299 * difference, atol=1e-6)
