"""The benchmark's statistics, against scipy and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ip_adapter.bench import clocks, estimates


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    base = np.array([1.0, 2.0, 4.0, 8.0, 16.0])  # a machine that gets slower all the time
    case = base * np.array([1.1, 1.3, 1.2, 1.0, 1.5])
    found = estimates.ratio(base, case)
    assert found.value == pytest.approx(1.2)
    assert 1.0 <= found.low <= 1.2 <= found.high <= 1.5


def test_intervals_are_those_of_scipys_percentile_bootstrap() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(0.9, 1.1, 25)
    case = base * rng.normal(1.05, 0.02, 25)
    found = estimates.ratio(base, case)
    theirs = stats.bootstrap(
        (case / base,), np.median, n_resamples=20_000, method="percentile", rng=rng
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=0.003)
    assert found.high == pytest.approx(theirs.high, abs=0.003)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for seed in range(100):
        found = estimates.bootstrap(np.mean, rng.normal(3.0, 1.0, 30), seed=seed)
        held += found.low <= 3.0 <= found.high
    assert held >= 86  # of 95; the percentile interval is a little narrow


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponents_of_known_power_laws(power: float) -> None:
    sizes = (4, 16, 64, 256)
    rng = np.random.default_rng(3)
    exact = 0.3 * np.array(sizes, float) ** power
    found = estimates.exponent(sizes, np.tile(exact, (5, 1)))
    assert (found.value, found.low, found.high) == pytest.approx((power,) * 3, abs=1e-9)
    noisy = exact * rng.lognormal(0, 0.02, (15, 4))
    found = estimates.exponent(sizes, noisy)
    slope = stats.linregress(np.log(sizes), np.log(np.median(noisy, axis=0))).slope
    assert found.value == pytest.approx(slope, abs=1e-9)
    assert found.low - 0.01 <= power <= found.high + 0.01


def test_growth_is_the_slope_of_block_means_after_warming_up() -> None:
    readings = np.concatenate([np.linspace(0, 900, 100), 1000 + 3.0 * np.arange(400)])
    readings += np.random.default_rng(4).normal(0, 20, 500)
    found = estimates.growth(readings)
    places = np.arange(100, 500).reshape(20, 20).mean(axis=1)
    line = stats.linregress(places, readings[100:].reshape(20, 20).mean(axis=1))
    reach = stats.t.ppf(0.975, 18) * line.stderr
    assert found.value == pytest.approx(line.slope)
    assert found.low == pytest.approx(line.slope - reach, abs=reach / 1000)
    assert found.high == pytest.approx(line.slope + reach, abs=reach / 1000)


@pytest.mark.parametrize("count", [8, 30, 500])
def test_growth_of_short_rows_has_students_interval_too(count: int) -> None:
    readings = np.random.default_rng(6).normal(0, 1, count)
    found = estimates.growth(readings, warm_up=0.25)
    kept = np.arange(count, dtype=float)[count // 4 :]
    size = min(20, len(kept))
    means = [
        np.array([part.mean() for part in np.array_split(one, size)])
        for one in (kept, readings[count // 4 :])
    ]
    line = stats.linregress(*means)
    expected = 2 * stats.t.ppf(0.975, size - 2) * line.stderr
    assert found.high - found.low == pytest.approx(expected, rel=5e-3)


def test_no_growth_holds_zero() -> None:
    """In 19 of 20 queues, for memory that moves in jumps around a level."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        found = estimates.growth(rng.choice([100.0, 104.0, 108.0], 500))
        held += found.low <= 0 <= found.high
    assert 180 <= held <= 199
    assert estimates.growth(np.full(30, 7.0)) == estimates.Estimate(0.0, 0.0, 0.0)


def test_overhead_beyond_a_third() -> None:
    one = np.ones(6)
    found = estimates.overhead_beyond((one, 1.02 * one), (2 * one, 2.18 * one))
    assert found.value == pytest.approx(0.02 - 0.09 / 3)
    assert found.low == pytest.approx(found.high)


def test_rounds_are_interleaved_and_their_order_turned_round() -> None:
    seen: list[tuple[str, int]] = []

    def note(name: str) -> clocks.Timed:
        return lambda number: seen.append((name, number))

    ticks = iter(range(100))

    def timed(call: object) -> float:
        assert callable(call)
        call()
        return float(next(ticks))

    found = clocks.interleave([note(name) for name in "abc"], 3, timed, warm_up=1)
    assert seen == [
        *(("a", 0), ("b", 0), ("c", 0)),  # warming up, not timed
        *(("a", 0), ("b", 0), ("c", 0)),
        *(("c", 1), ("b", 1), ("a", 1)),
        *(("a", 2), ("b", 2), ("c", 2)),
    ]
    assert found.tolist() == [[0, 1, 2], [5, 4, 3], [6, 7, 8]]


def test_a_steady_drift_weighs_on_all_alike() -> None:
    now = 0.0

    def timed(call: object) -> float:
        nonlocal now
        now += 1
        return 100 + now

    found = clocks.interleave([lambda _: None] * 4, 10, timed)
    assert np.ptp(found.mean(axis=0)) == 0


def test_the_wall_clock_times_the_call() -> None:
    import time

    assert clocks.wall_clock(lambda: time.sleep(0.01)) >= 0.01
