"""The miniature's world: what is painted is what is said, and what is held out stays out."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from miniature import world

SCENE = world.Scene("circle", "plain", "red", "centre", "white", (0, 1, 2, 3))

AREA = {
    "circle": math.pi,
    "square": (2 * 0.86) ** 2,
    "ring": math.pi * ((0.75 + 0.28) ** 2 - (0.75 - 0.28) ** 2),
    "cross": 2 * (2 * 0.33 * 2) - (2 * 0.33) ** 2,
    "diamond": 2 * 1.15**2,
    "triangle": 1.8 * (0.5 * 1.8 / 0.866),
}
"""Of each shape, in squares of the radius."""


@pytest.mark.parametrize("shape", world.SHAPES)
def test_shapes_have_their_area_and_place(shape: str) -> None:
    cover = world.coverage(replace(SCENE, shape=shape, place="left", shift=(0.0, 2.0)))
    assert float(cover.sum()) == pytest.approx(AREA[shape] * world.RADIUS**2, rel=0.03)
    steps = torch.arange(world.SIZE) - (world.SIZE - 1) / 2
    x = float((cover.sum(0) * steps).sum() / cover.sum())
    assert x == pytest.approx(-13.0, abs=0.1)


def area(shape: str, radius: float, more: float) -> float:
    """Of a shape whose every edge is moved outwards, both edges of a ring."""
    match shape:
        case "circle":
            return math.pi * (radius + more) ** 2
        case "square":
            return (2 * (0.86 * radius + more)) ** 2
        case "ring":
            outer, inner = 1.03 * radius + more, 0.47 * radius - more
            return math.pi * (outer**2 - inner**2)
        case "cross":
            arm, length = 2 * (0.33 * radius + more), 2 * (radius + more)
            return 2 * arm * length - arm**2
        case "diamond":
            return 2 * (1.15 * radius + more / 0.707) ** 2
    height = 1.8 * radius + 3 * more  # the top of a triangle with these sides goes up by twice
    return height * 0.5 * height / 0.866


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_line_lies_around_the_shape_three_pixels_wide(shape: str) -> None:
    scene = replace(SCENE, shape=shape)
    radius = world.RADIUS
    expected = area(shape, radius, 3.0) - area(shape, radius, 0.0)
    line, inside = world.line(scene), world.coverage(scene)
    assert float(line.sum()) == pytest.approx(expected, rel=0.03)
    assert line.min() >= 0 and line.max() == 1
    assert not line[inside == 1].any(), "within the shape"


@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_style_of_the_fine_tune_is_a_black_line_and_nothing_else(shape: str) -> None:
    scene = replace(SCENE, shape=shape, texture="striped", place="top", shift=(1.5, -2.0))
    (plain,), (outlined,) = world.render([scene]), world.render([scene], outlined=True)
    line = world.line(scene)
    assert not outlined[:, line == 1].any() and (line == 1).sum() > 100
    assert torch.equal(outlined[:, line == 0], plain[:, line == 0])
    assert bool((outlined <= plain).all())


def test_hints_are_white_shapes_on_black_whatever_the_look() -> None:
    others = [
        replace(SCENE, colour=colour, ground=ground, texture=texture)
        for colour, ground, texture in (("pink", "black", "dotted"), ("cyan", "mint", "striped"))
    ]
    hints = world.outlines([SCENE, *others, replace(SCENE, shape="square", place="left")])
    assert hints.shape == (4, 3, 64, 64) and hints.min() == 0 and hints.max() == 1
    assert torch.equal(hints[0], hints[1]) and torch.equal(hints[0], hints[2])
    assert torch.equal(hints[:, 0], hints[:, 1]) and torch.equal(hints[:, 0], hints[:, 2])
    assert float(hints[0, 0].sum()) == pytest.approx(math.pi * world.RADIUS**2, rel=0.03)
    assert hints[3, 0, 32, 19] == 1 and hints[3, 0, 32, 45] == 0


def test_colours_are_where_they_belong() -> None:
    (picture,) = world.render([SCENE])
    assert picture.shape == (3, 64, 64) and picture.min() >= 0 and picture.max() <= 1
    assert picture[:, 32, 32].tolist() == pytest.approx(world.COLOURS["red"])
    assert picture[:, 32, 4].tolist() == pytest.approx(world.GROUNDS["white"])
    corners = ((4, 4), (4, 60), (60, 60), (60, 4))
    for (y, x), mark in zip(corners, SCENE.marks, strict=True):
        assert picture[:, y, x].tolist() == pytest.approx(world.MARKS[mark])


@pytest.mark.parametrize("texture", world.TEXTURES)
def test_textures_darken_a_part_of_the_shape_and_nothing_else(texture: str) -> None:
    plain, textured = world.render([SCENE, replace(SCENE, texture=texture)])
    inside = world.coverage(SCENE) == 1
    assert torch.equal(
        plain[:, world.coverage(SCENE) == 0], textured[:, world.coverage(SCENE) == 0]
    )
    dark = (textured[0][inside] < 0.5 * world.COLOURS["red"][0]).float().mean()
    low, high = {"plain": (0, 0), "dotted": (0.15, 0.45)}.get(texture, (0.4, 0.6))
    assert low <= float(dark) <= high


def test_equal_seeds_draw_equal_scenes() -> None:
    first, second = (world.draw(random.Random(7)) for _ in range(2))
    assert first == second
    assert torch.equal(world.render([first]), world.render([second]))


def test_what_is_held_out_is_never_drawn_for_training() -> None:
    rng = random.Random(0)
    assert not any(world.is_held_out(world.draw(rng)) for _ in range(500))
    assert all(world.is_held_out(world.draw(rng, held_out=True)) for _ in range(100))
    every = [
        world.is_held_out(replace(SCENE, shape=shape, colour=colour, texture=texture))
        for shape in world.SHAPES
        for colour in world.COLOURS
        for texture in world.TEXTURES
    ]
    assert sum(every) == len(every) / 8


def test_every_single_attribute_is_seen_in_training() -> None:
    rng = random.Random(1)
    scenes = [world.draw(rng) for _ in range(600)]
    for name in ("shape", "colour", "texture", "place", "ground"):
        assert len({getattr(scene, name) for scene in scenes}) > 3
    assert {scene.shape for scene in scenes} == set(world.SHAPES)
    assert {scene.colour for scene in scenes} == set(world.COLOURS)


def test_a_scene_of_the_same_look() -> None:
    rng = random.Random(2)
    scene = replace(SCENE, colour="green")
    others = [world.like(scene, rng) for _ in range(60)]
    for other in others:
        shared = world.same(scene, other)
        assert all(shared[name] for name in world.LOOK)
        assert other.marks == scene.marks
    assert len({other.shape for other in others}) > 3
    assert len({other.place for other in others}) == len(world.PLACES)
    for held_out in (False, True):
        scenes = [world.draw(rng, held_out=held_out) for _ in range(50)]
        assert {world.is_held_out(world.like(scene, rng)) for scene in scenes} == {held_out}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (world.NAMED, "plain red circle centre on white"),
        (("shape",), "circle"),
        (("colour", "ground"), "red thing on white"),
        (("place",), "thing centre"),
        ((), ""),
    ],
)
def test_captions_name_what_is_asked_for(names: tuple[str, ...], words: str) -> None:
    assert world.caption(SCENE, names) == words


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="no shape 'heart'"):
        world.coverage(replace(SCENE, shape="heart"))
    with pytest.raises(ValueError, match="no texture 'silk'"):
        world.render([replace(SCENE, texture="silk")])
