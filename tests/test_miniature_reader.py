"""The reader against the scenes that were drawn, and against pictures that show none."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from miniature import reader, world

NAMED = ("shape", "texture", "colour", "place", "ground")
SCENE = world.Scene("cross", "checked", "green", "left", "sand", (0, 1, 2, 3), (1.0, -1.0), 0.95)


def draw(count: int, seed: int) -> list[world.Scene]:
    """Every second one of a combination that the miniature never saw."""
    rng = random.Random(seed)
    return [world.draw(rng, held_out=bool(i % 2)) for i in range(count)]


def shares(readings: list[reader.Reading], scenes: list[world.Scene]) -> dict[str, float]:
    """How often each attribute is read as it was drawn; an outline is judged by its own test."""
    agreed = [reader.agreement(*pair) for pair in zip(readings, scenes, strict=True)]
    return {name: sum(one[name] for one in agreed) / len(agreed) for name in agreed[0]}


def outlined_share(readings: list[reader.Reading], scenes: list[world.Scene]) -> float:
    """How often a line is seen, black grounds aside: a black line does not show there."""
    seen = [r.outlined for r, s in zip(readings, scenes, strict=True) if s.ground != "black"]
    return sum(seen) / len(seen)


def spoil(pictures: Tensor, *, blur: int, seed: int, cast: float = 0.05) -> Tensor:
    """Blur, a cast of each picture's colours and noise: what a small decoder does to a picture."""
    generator = torch.Generator().manual_seed(seed)
    pictures = gaussian_blur(pictures, [blur, blur])
    casts = (torch.rand(len(pictures), 3, 1, 1, generator=generator) * 2 - 1) * cast
    noise = 0.05 * torch.randn(pictures.shape, generator=generator)
    return (pictures + casts + noise).clamp(0, 1)


def bend(pictures: Tensor, pixels: float, seed: int) -> Tensor:
    """Move pixels by about this much, smoothly: contours and textures come out slightly wrong."""
    generator = torch.Generator().manual_seed(seed)
    flow = torch.randn(len(pictures), 2, 6, 6, generator=generator) * pixels * 2 / world.SIZE
    flow = F.interpolate(flow, size=pictures.shape[-2:], mode="bicubic", align_corners=True)
    still = F.affine_grid(
        torch.eye(2, 3).expand(len(pictures), -1, -1), list(pictures.shape), align_corners=False
    )
    grid = still + flow.permute(0, 2, 3, 1)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


@pytest.mark.parametrize("outlined", [False, True])
def test_clean_pictures_are_read_as_they_were_drawn(outlined: bool) -> None:
    scenes = draw(240, seed=1)
    readings = reader.read(world.render(scenes, outlined=outlined))
    assert min(shares(readings, scenes).values()) >= 0.99
    assert abs(outlined_share(readings, scenes) - outlined) <= 0.01
    assert max(reading.error for reading in readings) < 0.15
    for reading, scene in zip(readings, scenes, strict=True):
        inside = world.coverage(scene) > 0.5
        assert reading.mask is not None
        assert (reading.mask & inside).sum() / (reading.mask | inside).sum() > 0.7


@pytest.mark.parametrize("outlined", [False, True])
@pytest.mark.parametrize("blur", [3, 5])
def test_blurred_noisy_pictures_with_a_cast_are_read(blur: int, outlined: bool) -> None:
    scenes = draw(160, seed=2)
    pictures = spoil(world.render(scenes, outlined=outlined), blur=blur, seed=3)
    readings = reader.read(pictures)
    assert min(shares(readings, scenes).values()) >= 0.97
    assert abs(outlined_share(readings, scenes) - outlined) <= 0.02


def test_pictures_with_slightly_wrong_contours_are_read() -> None:
    scenes = draw(160, seed=4)
    pictures = spoil(bend(world.render(scenes), 1.0, seed=5), blur=5, seed=6, cast=0.1)
    right = shares(reader.read(pictures), scenes)
    assert right.pop("texture") >= 0.9
    assert min(right.values()) >= 0.95


def test_other_scenes_agree_by_chance_only() -> None:
    scenes = draw(120, seed=7)
    readings = reader.read(world.render(scenes))
    others = [scenes[(i + lag) % 120] for lag in range(1, 40) for i in range(120)]
    right = shares(readings * 39, others)
    options = (world.SHAPES, world.TEXTURES, world.COLOURS, world.PLACES, world.GROUNDS)
    for name, values in zip(NAMED, options, strict=True):
        assert right[name] == pytest.approx(1 / len(values), abs=0.05)
    marks = [reader.marks_right(*pair) for pair in zip(readings * 39, others, strict=True)]
    assert sum(marks) / len(marks) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("shape", world.SHAPES),
        ("texture", world.TEXTURES),
        ("colour", tuple(world.COLOURS)),
        ("place", tuple(world.PLACES)),
        ("ground", tuple(world.GROUNDS)),
    ],
)
def test_one_attribute_changes_one_reading(name: str, values: tuple[str, ...]) -> None:
    scenes = [replace(SCENE, **{name: value}) for value in values]
    readings = reader.read(world.render(scenes))
    assert [getattr(reading, name) for reading in readings] == list(values)
    for other in set(NAMED) - {name}:
        assert {getattr(reading, other) for reading in readings} == {getattr(SCENE, other)}
    assert {reading.marks for reading in readings} == {SCENE.marks}


def test_one_wrong_corner_is_a_quarter() -> None:
    (reading,) = reader.read(world.render([replace(SCENE, marks=(0, 1, 2, 0))]))
    assert reading.marks == (0, 1, 2, 0)
    assert reader.marks_right(reading, SCENE) == 0.75
    assert not reader.agreement(reading, SCENE)["marks"]


def test_a_bare_ground_shows_its_colour_and_no_shape() -> None:
    scenes = [replace(SCENE, ground=ground) for ground in world.GROUNDS]
    pictures = world.render(scenes)
    pictures[:, :, 10:-10] = pictures[:, :, 10:11, -1:]
    pictures[:, :, :, 10:-10] = pictures[:, :, 32:33, -1:]
    readings = reader.read(spoil(pictures, blur=3, seed=8))
    for reading, scene in zip(readings, scenes, strict=True):
        assert reading.mask is None
        agreed = reader.agreement(
            reading, replace(scene, **{n: getattr(reading, n) for n in NAMED})
        )
        assert [name for name, right in agreed.items() if right] == ["ground", "marks"]
        assert reading.ground == scene.ground


def test_noise_shows_no_shape() -> None:
    noise = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    assert all(reading.mask is None for reading in reader.read(noise))
    assert all(reading.error > 0.2 for reading in reader.read(noise))


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 7.0, float("nan")])
def test_flat_pictures_are_read_without_a_shape(value: float) -> None:
    (reading,) = reader.read(torch.full((1, 3, 64, 64), value))
    assert reading.mask is None and reading.error >= 0


def test_a_reading_depends_on_its_own_picture_only() -> None:
    scenes = draw(40, seed=10)
    pictures = world.render(scenes)
    together = reader.read(pictures)[::13]
    alone = [reading for one in pictures[::13] for reading in reader.read(one[None])]
    for one, other in zip(alone, together, strict=True):
        assert replace(one, error=0.0) == replace(other, error=0.0)
        assert one.error == pytest.approx(other.error, abs=1e-5)
    assert reader.read(pictures[:0]) == []


def test_other_float_types_are_read() -> None:
    scenes = draw(12, seed=11)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        readings = reader.read(world.render(scenes).to(dtype))
        assert min(shares(readings, scenes).values()) == 1.0


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, 3, 64, 64\].*\[1, 3, 32, 32\]"):
        reader.read(torch.zeros(1, 3, 32, 32))
