"""What a training shows: when, what is on it, and samples by the formula of the paper of DDIM."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ip_adapter.objective import Schedule
from ip_adapter.train import curve, live
from ip_adapter.train.loop import Step

DARK = np.array([0x1F, 0x4E, 0x9E])


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(number: int, loss: float = 0.5) -> Step:
    return Step(number, loss, 1e-4, number)


def run(
    view: live.Live, clock: Clock, steps: int, seconds: float
) -> Iterator[tuple[int, Image.Image | None]]:
    for number in range(1, steps + 1):
        clock.now += seconds
        yield number, view(step(number, 1 / number))


def test_a_picture_comes_every_two_seconds_and_at_the_end() -> None:
    clock = Clock()
    view = live.Live(23, clock=clock)
    shown = [number for number, picture in run(view, clock, 23, 0.5) if picture is not None]
    assert shown == [1, 5, 9, 13, 17, 21, 23]


def sampling(clock: Clock, cost: float, made: list[float]) -> live.Sampler:
    def make() -> Image.Image:
        clock.now += cost
        made.append(clock.now)
        return Image.new("RGB", (64, 64), (10 * len(made), 0, 200))

    return make


@pytest.mark.parametrize(
    ("every", "cost", "expected"),
    [
        (10, 0.01, [10, 20, 30, 40, 45]),
        (0, 0.01, []),
        (100, 0.01, [45]),
        # The first costs what nobody knows yet; ten times its cost must then have passed.
        (10, 1.5, [10, 30, 45]),
    ],
)
def test_samples_come_when_it_is_their_turn_and_there_is_time(
    every: int, cost: float, expected: list[int]
) -> None:
    clock, made = Clock(), list[float]()
    view = live.Live(45, every, clock)
    view.begin(Image.new("RGB", (64, 64)), sampling(clock, cost, made))
    at = []
    for number, picture in run(view, clock, 45, 1.0):
        if len(made) > len(at):
            at.append(number)
            assert picture is not None and picture.height > curve.HEIGHT
    assert at == expected


def test_samples_take_a_tenth_of_the_time_at_most() -> None:
    clock, made = Clock(), list[float]()
    view = live.Live(2001, 1, clock)
    view.begin(Image.new("RGB", (64, 64)), sampling(clock, 0.7, made))
    began = clock.now
    for _ in run(view, clock, 2000, 0.1):
        pass
    assert 0.08 < 0.7 * len(made) / (clock.now - began) <= 0.1


def test_a_failing_sample_ends_samples_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    view = live.Live(10, 2, clock)
    calls: list[int] = []

    def fail() -> Image.Image:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    view.begin(Image.new("RGB", (64, 64)), fail)
    assert len(list(run(view, clock, 10, 1.0))) == 10
    assert len(calls) == 1 and "CUDA out of memory" in caplog.text
    assert view.picture().size == (curve.WIDTH, curve.HEIGHT)


def test_the_strip_has_the_reference_and_the_newest_samples() -> None:
    clock, made = Clock(), list[float]()
    view = live.Live(50, 10, clock)
    view.begin(Image.new("RGB", (90, 60), (0, 200, 0)), sampling(clock, 0.0, made))
    list(run(view, clock, 50, 1.0))
    strip = np.asarray(view.picture())[curve.HEIGHT :].reshape(-1, 3)
    colours, counts = np.unique(strip, axis=0, return_counts=True)
    large = {tuple(c) for c, n in zip(colours.tolist(), counts, strict=True) if n > 10_000}
    assert {(0, 200, 0), (30, 0, 200), (40, 0, 200), (50, 0, 200)} <= large
    assert not {(10, 0, 200), (20, 0, 200)} & large


def test_after_closing_nothing_is_made_or_held() -> None:
    clock, made = Clock(), list[float]()
    view = live.Live(10, 1, clock)
    view.begin(Image.new("RGB", (64, 64)), sampling(clock, 0.0, made))
    view.close()
    list(run(view, clock, 10, 1.0))
    assert made == [] and view.picture().size == (curve.WIDTH, curve.HEIGHT)


def test_the_moving_mean_looks_back_a_tenth() -> None:
    values = np.random.default_rng(0).normal(size=57).tolist()
    expected = [np.mean(values[max(0, i - 4) : i + 1]) for i in range(57)]
    np.testing.assert_allclose(curve.moving_mean(values), expected, atol=1e-12)
    assert curve.moving_mean([3.0, 5.0]).tolist() == [3.0, 5.0]


def dark(picture: Image.Image) -> list[float | None]:
    """The mean height of the dark line in each column, in pixels from the top."""
    hits = np.abs(np.asarray(picture).astype(int) - DARK).sum(axis=-1) < 30
    return [float(np.nonzero(column)[0].mean()) if column.any() else None for column in hits.T]


@pytest.mark.parametrize("count", [90, 4000])
def test_the_curve_falls_and_ends_where_the_training_is(count: int) -> None:
    losses = [1 - i / count for i in range(count // 2)]
    found = dark(curve.draw_curve(losses, count))
    heights = [y for y in found if y is not None]
    assert heights[0] < heights[len(heights) // 2] < heights[-1]
    last = max(x for x, y in enumerate(found) if y is not None)
    left, right = 64, curve.WIDTH - 16  # of the axis
    assert abs(last - (left + right) / 2) < 8


def test_a_single_large_loss_does_not_flatten_the_rest() -> None:
    losses = [1 - i / 400 for i in range(200)]
    calm = [y for y in dark(curve.draw_curve(losses, 200)) if y is not None]
    losses[70] = 40.0  # the mean of 20 steps is then 3 instead of 0.8
    wild = [y for y in dark(curve.draw_curve(losses, 200)) if y is not None]
    assert wild[-1] - wild[0] > 0.2 * (calm[-1] - calm[0]) > 10


@pytest.mark.parametrize("losses", [[], [0.5], [0.3, 0.3], [0.0], [math.nan] * 3, [1e9, 1e-9]])
def test_a_curve_is_drawn_of_whatever_there_is(losses: list[float]) -> None:
    assert curve.draw_curve(losses, 10).size == (curve.WIDTH, curve.HEIGHT)


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_ddim_finds_what_a_perfect_model_knows(target: str) -> None:
    """Where the model always says the noise of one picture, that picture is what comes out."""
    alphas = torch.linspace(0.999, 0.01, 100)
    schedule = Schedule(alphas, target)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 6, 6, generator=generator) for _ in range(2))
    seen: list[int] = []

    def predict(noised: Tensor, timesteps: Tensor) -> Tensor:
        (place,) = timesteps.tolist()
        seen.append(place)
        a, s = math.sqrt(float(alphas[place])), math.sqrt(1 - float(alphas[place]))
        eps = (noised - a * clean) / s
        return eps if target == "epsilon" else a * eps - s * clean

    found = live.ddim(predict, schedule, noise, 7)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)
    assert seen == sorted(seen, reverse=True) and len(seen) == 7 and seen[0] == 99


@pytest.mark.parity
def test_ddim_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    count, steps = 1000, 10
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, count) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    noise = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))

    def predict(noised: Tensor, timesteps: Tensor) -> Tensor:
        return torch.tanh(noised * 0.7 + timesteps.view(-1, 1, 1, 1) / count)

    theirs = diffusers.DDIMScheduler(
        num_train_timesteps=count,
        trained_betas=betas.numpy(),
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(steps)
    latents = noise
    for timestep in theirs.timesteps:
        found = predict(latents, timestep.repeat(2))
        latents = theirs.step(found, timestep, latents).prev_sample
    torch.testing.assert_close(
        live.ddim(predict, Schedule(alphas), noise, steps), latents, rtol=1e-4, atol=1e-4
    )
