"""Curves, windows and the texts that say them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip_adapter.errors import InfluenceError
from ip_adapter.influence import Curve, Influence, Timing, parse_curve, parse_frames
from ip_adapter.layers import SD15, SDXL


@pytest.mark.parametrize(
    ("fraction", "factor"),
    [(0.0, 2.0), (0.2, 2.0), (0.3, 1.5), (0.4, 1.0), (0.5, 0.5), (0.55, 0.25), (0.6, 0.0), (1, 0)],
)
def test_a_curve_is_straight_between_its_keyframes(fraction: float, factor: float) -> None:
    curve = Curve(((0.2, 2.0), (0.4, 1.0), (0.6, 0.0)))
    assert math.isclose(curve.at(fraction), factor, abs_tol=1e-12)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6, unique=True),
    st.floats(0, 1),
)
def test_a_curve_stays_between_its_factors(fractions: list[float], at: float) -> None:
    factors = [math.sin(9 * fraction) for fraction in sorted(fractions)]
    curve = Curve(tuple(zip(sorted(fractions), factors, strict=True)))
    assert min(factors) - 1e-9 <= curve.at(at) <= max(factors) + 1e-9
    for fraction, factor in curve.keyframes:
        assert math.isclose(curve.at(fraction), factor, abs_tol=1e-9)


def test_keyframes_are_read_from_text() -> None:
    curve = parse_curve(" 0:1, 0.4 : 1\n0.6:-0.5,\n")
    assert curve == Curve(((0.0, 1.0), (0.4, 1.0), (0.6, -0.5)))
    assert parse_curve("") is None and parse_curve(" \n ") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1, half:0", "'half:0' is no keyframe.*0:1, 0.4:1, 0.6:0"),
        ("0.5", "'0.5' is no keyframe"),
        ("0:1:2", "'0:1:2' is no keyframe"),
        ("0:1, 1.5:0", "from 0 to 1"),
        ("-0.1:1", "from 0 to 1"),
        ("nan:1", "from 0 to 1"),
        ("0.5:1, 0.2:0", "later than the one before"),
        ("0.5:1, 0.5:0", "later than the one before"),
    ],
)
def test_bad_keyframes_are_named(text: str, message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        parse_curve(text)


@pytest.mark.parametrize("window", [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.4), (math.nan, 1.0)])
def test_a_bad_window_is_refused(window: tuple[float, float]) -> None:
    with pytest.raises(InfluenceError, match="step window"):
        Influence(start=window[0], end=window[1])


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(InfluenceError, match=r"Unknown scaling 'K'.*V only, K\+V"):
        Influence(scaling="K")  # type: ignore[arg-type]


def test_layers_are_a_preset_a_text_or_numbers() -> None:
    everywhere = Influence(weight=0.5).on(SD15)
    assert everywhere.weights == {2 * i + 1: 0.5 for i in range(16)} and not everywhere.opposed
    # In SDXL, transformer 6 is up block 0's second: ten layers from number 69 on.
    style = {2 * position + 1 for position in range(34, 44)}
    preset = Influence(weight=0.5, layers="style transfer").on(SDXL)
    by_hand = Influence(weight=0.5, layers="6:1").on(SDXL)
    for found in (preset, by_hand):
        assert {n: w for n, w in found.weights.items() if w} == dict.fromkeys(style, 0.5)
    assert Influence(weight=2, layers={3: 0.25}).on(SD15).weights == {3: 0.5}


def test_diffusers_scales_are_read_as_json() -> None:
    """InstantStyle's own example for SDXL: up block 0's second transformer, ten layers."""
    scales = Influence(weight=0.5, layers=' {"up": {"block_0": [0, 1, 0]}} ').on(SDXL)
    style = Influence(weight=0.5, layers="style transfer").on(SDXL)
    assert {n: w for n, w in scales.weights.items() if w} == dict(style.weights)
    with pytest.raises(InfluenceError, match="no JSON"):
        Influence(layers="{up: 1}").on(SDXL)
    with pytest.raises(InfluenceError, match="sideways"):
        Influence(layers='{"sideways": 1}').on(SDXL)


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(InfluenceError, match=r"Layers \[2, 99\].*1, 3 ... 31"):
        Influence(layers={1: 1.0, 99: 1.0, 2: 1.0}).on(SD15)
    with pytest.raises(InfluenceError, match="16"):
        Influence(layers="16:1").on(SD15)
    Influence(layers="10:1").on(SDXL)
    with pytest.raises(InfluenceError, match="11"):
        Influence(layers="11:1").on(SDXL)


def test_only_a_whole_schedule_without_curve_is_constant() -> None:
    assert Timing().is_constant
    assert not Timing(0.1, 1.0).is_constant and not Timing(0.0, 0.9).is_constant
    assert not Timing(curve=Curve(((0.0, 1.0),))).is_constant


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("1, 0.5,\n0", (1.0, 0.5, 0.0)),
        ("0:0, 2:1, 4:-1", (0.0, 0.5, 1.0, 0.0, -1.0)),
        ("1:0.5, 2:1", (0.5, 0.5, 1.0)),
        ("0:2", (2.0,)),
    ],
)
def test_weights_of_frames_are_read_from_text(text: str, expected: tuple[float, ...]) -> None:
    assert parse_frames(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one, two", "'one, two' are no factors.*1, 0.5, 0"),
        ("0:1, 2", "'2' is no keyframe"),
        ("0:1, 1.5:0", "not whole numbers in order"),
        ("4:1, 2:0", "not whole numbers in order"),
        ("-1:1, 2:0", "not whole numbers in order"),
    ],
)
def test_bad_weights_of_frames_are_named(text: str, message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        parse_frames(text)


def test_factors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InfluenceError, match="finite"):
        Influence(frames=(1.0, float("nan")))
    with pytest.raises(InfluenceError, match="finite"):
        parse_curve("0:1, 1:inf")
