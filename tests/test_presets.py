"""Presets against their formulas written out, by the number t of each transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ip_adapter import layers, presets
from ip_adapter.errors import InfluenceError
from ip_adapter.layers import KOLORS, MINIATURE, SD2, SD15, SDXL

SD_ORDER: list[Any] = [(n,) for n in (1, 3, 5, 7, 9, 11, 31, *range(13, 30, 2))]
SDXL_ORDER: list[Any] = [
    (1, 3), (5, 7), range(9, 29, 2), range(29, 49, 2), range(121, 141, 2), range(49, 69, 2),
    range(69, 89, 2), range(89, 109, 2), (109, 111), (113, 115), (117, 119),
]  # fmt: skip
ORDER = {
    "SD 1.5": SD_ORDER,
    "SD 2.x": SD_ORDER,
    "SDXL": SDXL_ORDER,
    "Kolors": SDXL_ORDER,
    "Miniature": [(n,) for n in (1, 3, 13, 5, 7, 9, 11)],
}
MIDDLE = {16: 6, 11: 4, 7: 2}


def is_input(t: int, count: int) -> bool:
    return t < MIDDLE[count]


def is_output(t: int, count: int) -> bool:
    return t > MIDDLE[count]


LINEAR: dict[str, Callable[[int, int], float]] = {
    "linear": lambda t, n: 1.0,
    "ease in": lambda t, n: 0.05 + 0.95 * (1 - t / n),
    "ease out": lambda t, n: 0.05 + 0.95 * t / n,
    "ease in-out": lambda t, n: 0.05 + 0.95 * (1 - abs(t - n / 2) / (n / 2)),
    "reverse in-out": lambda t, n: 0.05 + 0.95 * abs(t - n / 2) / (n / 2),
    "weak input": lambda t, n: 0.2 if is_input(t, n) else 1.0,
    "weak middle": lambda t, n: 0.2 if t == MIDDLE[n] else 1.0,
    "weak output": lambda t, n: 0.2 if is_output(t, n) else 1.0,
    "strong middle": lambda t, n: 1.0 if t == MIDDLE[n] else 0.2,
}


def sdxl_map(name: str, t: int, w: float, wc: float, sb: float, cb: float) -> float | None:
    """The weight at t, or None for nothing."""
    match name:
        case "style transfer":
            return {6: w}.get(t)
        case "composition":
            return {3: w}.get(t)
        case "strong style transfer":
            return {0: w, 1: w, 2: w, 4: w, 5: w, 6: w, 7: w, 8: w, 9: w, 10: w}.get(t)
        case "style and composition":
            return {3: wc, 6: w}.get(t)
        case "strong style and composition":
            return wc if t == 3 else w
        case "style transfer precise":
            return {3: sb, 6: w}.get(t)
        case "composition precise":
            return {3: w, 6: cb}.get(t, 0.1 * cb)
    raise AssertionError(name)


def sd_map(name: str, t: int, w: float, wc: float, sb: float, cb: float) -> float | None:
    is_style = t in (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15)
    match name:
        case "style transfer":
            return w if is_style else None
        case "composition":
            return {4: 0.25 * w, 5: w}.get(t)
        case "strong style transfer":
            return None if t in (4, 5) else w
        case "style and composition":
            return w if is_style else {4: 0.25 * wc, 5: wc}.get(t)
        case "strong style and composition":
            return wc if t in (4, 5) else w
        case "style transfer precise":
            return w if is_style else {4: 0.25 * sb, 5: sb}.get(t)
        case "composition precise":
            return cb if is_style else {4: 0.25 * w, 5: w}.get(t, 0.1 * cb)
    raise AssertionError(name)


def opposed_at(name: str, count: int) -> set[int]:
    composition = {16: {4, 5}, 11: {3}, 7: set[int]()}[count]
    if name == "style transfer precise":
        return composition
    return set(range(count)) - composition if name == "composition precise" else set()


AMOUNTS: list[tuple[float, dict[str, float]]] = [
    (1.0, {}),
    (-0.6, {}),
    (0.8, {"composition": 0.3, "style_boost": 2.5, "composition_boost": -1.25}),
    (1.5, {"composition": 0.0, "style_boost": 0.0, "composition_boost": 0.0}),
]


@pytest.mark.parametrize("amounts", AMOUNTS, ids=str)
@pytest.mark.parametrize(
    ("preset", "family"),
    [
        (preset, family)
        for family in layers.FAMILIES
        for preset in presets.PRESETS
        if family in layers.PUBLIC or preset in LINEAR
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_presets_follow_their_formulas(
    preset: presets.Preset, family: layers.Family, amounts: tuple[float, dict[str, float]]
) -> None:
    w, boosts = amounts
    names = ("composition", "style_boost", "composition_boost")
    wc, sb, cb = (boosts.get(name, w) for name in names)
    order = ORDER[family.name]
    count = len(order)
    weights: dict[int, float] = {}
    opposed: set[int] = set()
    for t in range(count):
        expected: float | None
        if preset in LINEAR:
            expected = w * LINEAR[preset](t, count)
        else:
            expected = (sd_map if count == 16 else sdxl_map)(preset, t, w, wc, sb, cb)
        if expected is not None:
            weights.update(dict.fromkeys(order[t], expected))
        if t in opposed_at(preset, count):
            opposed.update(order[t])

    found = presets.layer_weights(preset, family, w, **boosts)
    assert found.weights == pytest.approx(weights, rel=1e-12, abs=1e-15)
    assert found.opposed == opposed


def test_there_are_sixteen_presets_and_linear_is_the_plain_weight() -> None:
    assert len(presets.PRESETS) == 16
    for family in layers.FAMILIES:
        found = presets.layer_weights("linear", family, 0.7)
        assert found.weights == {layer.index: 0.7 for layer in family.layers}


@pytest.mark.parametrize("preset", [name for name in presets.PRESETS if name not in LINEAR])
def test_style_and_layout_are_not_invented(preset: presets.Preset) -> None:
    """Nobody found out which layers of the miniature carry them."""
    with pytest.raises(InfluenceError) as caught:
        presets.layer_weights(preset, MINIATURE)
    message = str(caught.value)
    assert f"'{preset}'" in message and "not known for Miniature" in message
    assert f"Choose one of: {', '.join(LINEAR)}; or" in message and "0 to 6" in message


def test_the_middle_block_is_served() -> None:
    assert presets.layer_weights("weak middle", SD15).weights[31] == 0.2
    assert presets.layer_weights("weak middle", SDXL).weights[139] == 0.2
    assert presets.layer_weights("weak middle", MINIATURE).weights[13] == 0.2


def test_unknown_presets_and_weights_are_refused() -> None:
    with pytest.raises(InfluenceError, match="no preset 'easy'; needed is one of: linear, ease in"):
        presets.layer_weights("easy", SD15)  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match="The weight is nan"):
        presets.layer_weights("linear", SD15, math.nan)
    with pytest.raises(InfluenceError, match="The style boost is inf"):
        presets.layer_weights("linear", SD15, style_boost=math.inf)
    with pytest.raises(InfluenceError, match="no preset 'easy'"):
        presets.layer_weights("easy", MINIATURE)  # type: ignore[arg-type]


def test_parse_reads_pairs_and_ranges() -> None:
    found = presets.parse("0:0.5, 3 : 1,\n 6 - 8:-.2\n15:1e-1,", SD15, 2.0)
    expected = {1: 1.0, 7: 2.0, 31: -0.4, 13: -0.4, 15: -0.4, 29: 0.2}
    assert found.weights == pytest.approx(expected)
    assert found.opposed == frozenset()
    found = presets.parse("3:1, 9:0.5", KOLORS)
    assert found.weights == {n: 1.0 for n in range(29, 49, 2)} | {113: 0.5, 115: 0.5}


def test_in_parse_the_later_part_counts() -> None:
    assert presets.parse("0-1:1, 1:0", SD2).weights == {1: 1.0, 3: 0.0}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("0:1, 3", "'3' is no"),
        ("0:1, 3:x", "'3:x' is no"),
        ("3:nan", "'3:nan' is no"),
        ("3:inf", "'3:inf' is no"),
        ("-1:1", "'-1:1' is no"),
        ("1.5:1", "'1.5:1' is no"),
        ("0:1 3:1", "'0:1 3:1' is no"),
        ("styel transfer", "'styel transfer' is no"),
        ("99999999999999:1", "'99999999999999:1' is no"),
        ("11:1", "'11:1' names no transformer of SDXL"),
        ("4-11:1", "'4-11:1' names no transformer of SDXL"),
        ("5-4:1", "'5-4:1' names no transformer of SDXL"),
        (" ,\n", "The layer weights are empty"),
    ],
)
def test_parse_names_the_bad_part(text: str, part: str) -> None:
    with pytest.raises(InfluenceError) as caught:
        presets.parse(text, SDXL)
    message = str(caught.value)
    assert part in message
    assert "from 0 to 10" in message
    assert "such as '0:0.5, 3:1, 4-8:0.2'" in message


factors = st.floats(-5, 5, allow_nan=False)
families = st.sampled_from(layers.FAMILIES)


@settings(max_examples=100, deadline=None)
@given(families, st.dictionaries(st.integers(0, 10), factors, min_size=1), factors)
def test_parse_of_written_weights(
    family: layers.Family, by_place: dict[int, float], weight: float
) -> None:
    order = ORDER[family.name]
    by_place = {t % len(order): factor for t, factor in by_place.items()}
    text = ",".join(f"{t}:{factor!r}" for t, factor in by_place.items())
    expected = {n: factor * weight for t, factor in by_place.items() for n in order[t]}
    assert presets.parse(text, family, weight).weights == expected


@settings(max_examples=300, deadline=None)
@given(families, st.text("0123456789:-,. \nex", max_size=20) | st.text(max_size=20))
def test_parse_reads_or_refuses(family: layers.Family, text: str) -> None:
    try:
        found = presets.parse(text, family)
    except InfluenceError:
        return
    assert found.weights.keys() <= {n for numbers in ORDER[family.name] for n in numbers}
    assert all(math.isfinite(weight) for weight in found.weights.values())


def test_scales_of_instant_style() -> None:
    """What the presets of the same name are in SDXL."""
    style = dict.fromkeys(range(69, 89, 2), 1.0)
    layout = dict.fromkeys(range(29, 49, 2), 1.0)
    scales: dict[str, Any] = {"up": {"block_0": [0.0, 1.0, 0.0]}}
    found = presets.from_scales(scales, SDXL)
    assert {n: weight for n, weight in found.weights.items() if weight} == style
    scales["down"] = {"block_2": [0.0, 1.0]}
    found = presets.from_scales(scales, SDXL)
    assert {n: weight for n, weight in found.weights.items() if weight} == style | layout
    assert found.opposed == frozenset()


def test_scales_of_whole_halves() -> None:
    found = presets.from_scales({"down": 0.5, "mid": (2,)}, SD15).weights
    assert found == {n: 0.5 for n in range(1, 12, 2)} | {31: 2.0}
    assert presets.from_scales(3, SD15).weights == {n: 3.0 for n in range(1, 32, 2)}
    scales = {"down": {"block_1": 0.5}, "up": {"block_0": [1.0, 2.0]}, "mid": 3.0}
    assert presets.from_scales(scales, MINIATURE).weights == {3: 0.5, 5: 1.0, 7: 2.0, 13: 3.0}


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"middle": 1.0}, r"\['middle'\]; .*SD 1.5 is in \['down', 'up', 'mid'\]"),
        ({"up": {"block_0": 1.0}}, r"'up' .*\['block_0'\]; .*'block_1', 'block_2', 'block_3'"),
        ({"down": {"block_0": [1.0, 2.0, 3.0]}}, "down block_0 are .*a list of 2"),
        ({"down": {"block_0": []}}, "down block_0 are .*a list of 2"),
        ({"mid": [1.0, 2.0]}, "mid block are .*a list of 1"),
        ({"mid": {"block_0": 1.0}}, "A scale of mid block is {'block_0': 1.0}; .*finite number"),
        ({"up": {"block_1": ["1", 2.0, 3.0]}}, "A scale of up block_1 is '1'; .*finite number"),
        ({"up": {"block_1": [[1.0, 2.0], 0.0, 0.0]}}, "A scale of up block_1 is .*finite number"),
        (math.inf, "is inf; needed is a finite number"),
        (10**400, "needed is a finite number"),
        (None, "is None; needed is a finite number"),
    ],
)
def test_bad_scales_are_refused(scales: Any, message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        presets.from_scales(scales, SD15)
