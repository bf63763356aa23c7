from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ip_adapter import strategies
from ip_adapter.errors import IncompatibleModelError, InfluenceError
from ip_adapter.prompt import ImagePrompt
from ip_adapter.strategies import CURVES, METHODS, TIMINGS, Strategy


def numbered(count: int) -> Tensor:
    """Pictures that are told apart by their grey."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 2, 3, 3)


def greys(pictures: Tensor | None) -> list[int]:
    assert pictures is not None and pictures.shape[1:] == (2, 3, 3)
    return [int(grey) for grey in pictures[:, 0, 0, 0]]


@st.composite
def any_strategies(draw: st.DrawFn) -> Strategy:
    written = draw(
        st.lists(st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3)), max_size=5)
    )
    few = st.integers(0, 8)
    return Strategy(
        weights=draw(st.sampled_from([", ", ",", "\n", ",\n"])).join(map(str, written)),
        timing=draw(st.sampled_from(TIMINGS)),
        frames=draw(st.integers(0, 12)),
        start_frame=draw(few),
        end_frame=draw(st.one_of(few, st.just(9999))),
        add_starting_frames=draw(few),
        add_ending_frames=draw(few),
        method=draw(st.sampled_from(METHODS)),
    )


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        ("linear", [0.2, 0.4, 0.6, 0.8, 1.0]),
        ("ease_in", [0.2 + 0.8 * math.sin(math.radians(a)) for a in (0, 22.5, 45, 67.5, 90)]),
        ("ease_out", [1.0 - 0.8 * math.cos(math.radians(a)) for a in (0, 22.5, 45, 67.5, 90)]),
        ("ease_in_out", [0.6 - 0.4 * math.cos(math.radians(a)) for a in (0, 45, 90, 135, 180)]),
    ],
)
def test_curves(timing: strategies.Timing, expected: list[float]) -> None:
    strategy = Strategy("0.2\n5, 1.0,", timing, frames=5)  # what is between the ends has no part
    assert strategies.weights(strategy) == pytest.approx(expected, abs=1e-12)
    assert strategies.weights(strategy)[-1] == 1.0
    held = replace(strategy, frames=9, start_frame=3, end_frame=8)
    wide = [0.2] * 3 + expected + [1.0]
    assert strategies.weights(held) == pytest.approx(wide, abs=1e-12)


def test_custom_weights_stand_as_written() -> None:
    strategy = Strategy(" 1.0, -0.5\n\n2,,", "custom", frames=40, start_frame=3, end_frame=5)
    assert strategies.weights(strategy) == [1.0, -0.5, 2.0]
    assert strategies.weights(Strategy("", "custom")) == [0.0]
    assert strategies.weights(Strategy("", "linear", frames=3)) == [0.0, 0.5, 1.0]
    assert strategies.weights(Strategy("0.3", "linear", frames=2)) == [0.3, 0.3]


@pytest.mark.parametrize(
    ("frames", "start", "end", "expected"),
    [
        (0, 0, 9999, [1, 0]),  # two at least
        (4, 0, 0, [0, 0, 0, 0]),  # the old pack stopped with an error at this one
        (4, 3, 4, [1, 1, 1, 0]),  # and at this one, a curve of one weight
        (4, 4, 9999, [1, 1, 1, 0]),  # no room: the last weight is the curve's end all the same
        (4, 6, 2, [1, 1, 1, 1, 1, 0, 0, 0]),  # ends before it starts: longer, as there
    ],
)
def test_windows_without_room(frames: int, start: int, end: int, expected: list[float]) -> None:
    strategy = Strategy("1, 0", "linear", frames=frames, start_frame=start, end_frame=end)
    assert strategies.weights(strategy) == expected


def test_random_weights_are_between_the_two_and_the_same_again() -> None:
    strategy = Strategy("0.8, 0.2", "random", frames=2000)
    drawn = strategies.weights(strategy)
    assert drawn == strategies.weights(strategies.from_dict(strategy.as_dict()))
    assert 0.2 <= min(drawn) < 0.22 and 0.78 < max(drawn) <= 0.8
    assert sum(drawn) / 2000 == pytest.approx(0.5, abs=0.02)
    assert strategies.weights(replace(strategy, weights="0.8,0.2,")) != drawn
    held = strategies.weights(replace(strategy, frames=8, start_frame=2, end_frame=6))
    assert held[:2] == [0.8, 0.8] and held[6:] == [0.2, 0.2] and len(held) == 8


# Worked by hand for the weights 1, 0.2: forth 1, 0.2 and back 1 - (w - 0.2) = 0.2, 1.
FORTH, BACK = [1.0, 0.2], [0.2, 1.0]
WORKED: list[tuple[str, int, list[int], list[int] | None, list[list[float]]]] = [
    ("full batch", 1, [0], None, [FORTH]),
    ("full batch", 3, [0, 1, 2], None, [FORTH] * 3),
    ("shift batches", 2, [0], [1], [FORTH]),
    ("shift batches", 4, [0, 1, 2], [1, 2, 3], [FORTH] * 3),
    ("alternate batches", 2, [0], [1], [FORTH]),
    ("alternate batches", 3, [0, 2], [1, 1], [FORTH, BACK]),
    ("alternate batches", 4, [0, 2, 2], [1, 1, 3], [FORTH, BACK, FORTH]),
    ("alternate batches", 5, [0, 2, 2, 4], [1, 1, 3, 3], [FORTH, BACK] * 2),
    ("shift batches", 1, [0], [0], [FORTH]),  # the old pack gave no picture at all
    ("alternate batches", 1, [0], [0], [FORTH]),
]


@pytest.mark.parametrize(("method", "count", "first", "second", "runs"), WORKED)
def test_methods(
    method: strategies.Method,
    count: int,
    first: list[int],
    second: list[int] | None,
    runs: list[list[float]],
) -> None:
    done = strategies.carry_out(Strategy("1, 0.2", "custom", method=method), numbered(count))
    assert done.weights == pytest.approx([weight for run in runs for weight in run])
    assert greys(done.first) == [grey for grey in first for _ in FORTH]
    if second is None:
        assert done.second is None
    else:
        assert greys(done.second) == [grey for grey in second for _ in FORTH]
    longer = Strategy(
        *("1, 0.2", "custom"), method=method, add_starting_frames=2, add_ending_frames=3
    )
    held = strategies.carry_out(longer, numbered(count))
    assert held.weights == [1.0] * 2 + done.weights + [done.weights[-1]] * 3
    for long, short in ((held.first, done.first), (held.second, done.second)):
        if short is not None:
            assert greys(long) == [0] * 2 + greys(short) + [count - 1] * 3


def test_without_pictures_weights_stand_once() -> None:
    done = strategies.carry_out(Strategy("1, 2, 3", "custom", add_starting_frames=4), None)
    assert done.weights == [1, 2, 3] and done.backwards == [3, 2, 1]
    assert done.first is None and done.second is None


@given(strategy=any_strategies(), count=st.integers(1, 6))
def test_everything_is_as_long_as_the_rest(strategy: Strategy, count: int) -> None:
    once = strategies.weights(strategy)
    if strategy.timing == "custom":
        expected = max(1, len(strategy.weights.replace("\n", ",").replace(",", " ").split()))
    else:
        frames = max(2, strategy.frames)
        end = min(frames, strategy.end_frame)
        expected = frames + max(0, strategy.start_frame - end)
    assert len(once) == expected
    runs = count if strategy.method == "full batch" else max(1, count - 1)
    done = strategies.carry_out(strategy, numbered(count))
    total = runs * expected + strategy.add_starting_frames + strategy.add_ending_frames
    assert len(done.weights) == len(done.backwards) == total
    assert len(greys(done.first)) == total
    if strategy.method == "full batch":
        assert done.second is None
    else:
        assert len(greys(done.second)) == total
    assert done.backwards[::-1] == done.weights


@given(strategy=any_strategies())
def test_a_strategy_travels_as_the_old_dictionary(strategy: Strategy) -> None:
    wire = json.loads(json.dumps(strategy.as_dict()))
    assert list(wire) == [
        *("weights", "timing", "frames", "start_frame", "end_frame"),
        *("add_starting_frames", "add_ending_frames", "method", "frame_count"),
    ]
    assert strategies.from_dict({**wire, "another": 1}) == strategy


def test_what_is_no_strategy_is_refused() -> None:
    good = asdict(Strategy())
    del good["frames"], good["method"]
    with pytest.raises(InfluenceError, match="no frames, method"):
        strategies.from_dict(good)
    with pytest.raises(InfluenceError, match="ease_in_out"):
        Strategy(timing="eased")  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match="alternate batches"):
        Strategy(method="batch")  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match=r"'0\.5\.1' is no weight"):
        strategies.weights(Strategy("1, 0.5.1"))
    with pytest.raises(InfluenceError, match="Unknown curve"):
        strategies.eased(0.5, "sine")  # type: ignore[arg-type]


def schedule(text: str) -> dict[str, str]:
    """Read a schedule as the nodes do that take one: the inside of a JSON object."""
    return dict(json.loads("{" + text.rstrip().rstrip(",") + "}"))


def test_prompt_schedule_has_a_text_for_each_picture() -> None:
    strategy = Strategy("0, 1", "linear", frames=16, frame_count=3)
    text = strategies.prompt_schedule(strategy, "a cat\n\n  \na dog")
    assert text == '"0": "a cat",\n"16": "a dog",\n"32": "a dog",\n'
    longer = replace(strategy, add_starting_frames=4, add_ending_frames=2)
    assert schedule(strategies.prompt_schedule(longer, "a\nb\nc\nd")) == {
        "0": "a",
        "4": "a",
        "20": "b",
        "36": "c",
        "52": "c",
    }


def test_prompt_schedule_of_nothing_is_nothing() -> None:
    assert strategies.prompt_schedule(Strategy(frames=16), "a cat") == ""
    assert strategies.prompt_schedule(Strategy(frames=16, frame_count=2), " \n") == ""


@pytest.mark.parametrize(
    ("weights", "timing", "frames", "second"),
    [("1, 0.5, 0", "custom", 0, 3), ("1, 0", "linear", 0, 2), ("1, 0", "random", 1, 2)],
)
def test_prompt_schedule_keeps_step_with_the_weights(
    weights: str, timing: strategies.Timing, frames: int, second: int
) -> None:
    """The old pack put every text on the same frame where frames is 0."""
    strategy = Strategy(weights, timing, frames=frames, frame_count=2)
    found = schedule(strategies.prompt_schedule(strategy, "a\nb"))
    assert found == {"0": "a", str(second): "b"}
    assert len(strategies.weights(strategy)) == second


def test_weights_are_joined() -> None:
    assert strategies.joined(0.5, [1, 2]) == [0.5, 1, 2]
    assert strategies.joined([1.0], (0.0, 0.25)) == [1, 0, 0.25]
    assert strategies.joined(1, 0) == [1, 0]


def prompt_of(frames: int, without: int = 1, seed: int = 0, **other: Any) -> ImagePrompt:
    generator = torch.Generator().manual_seed(seed)
    fields = {"adapter": "abc", "label": "an adapter", **other}
    tokens = int(fields.pop("tokens", 4))
    return ImagePrompt(
        torch.randn(frames, tokens, 8, generator=generator),
        torch.randn(without, tokens, 8, generator=generator),
        **fields,
    )


@pytest.mark.parametrize(("left", "right"), [(1, 1), (3, 1), (1, 5), (2, 7)])
@pytest.mark.parametrize("per_frame", [False, True])
def test_a_fade_is_a_line_between_the_tokens(left: int, right: int, per_frame: bool) -> None:
    first = prompt_of(left, left if per_frame else 1, seed=1)
    second = prompt_of(right, right if per_frame else 1, seed=2)
    parts = [0.0, 0.1, 0.5, 0.75, 1.0]
    faded = strategies.fade(first, second, parts)
    assert faded.frames == 5 and faded.tokens == 4
    assert (faded.adapter, faded.label) == ("abc", "an adapter")
    for side in ("conditional", "unconditional"):
        a, b, mixed = (getattr(one, side) for one in (first, second, faded))
        assert len(mixed) == 5
        for i, part in enumerate(parts):
            here, there = a[min(i, len(a) - 1)], b[min(i, len(b) - 1)]
            torch.testing.assert_close(mixed[i], (1 - part) * here + part * there)
        assert torch.equal(mixed[0], a[0]) and torch.equal(mixed[4], b[min(4, len(b) - 1)])


def test_a_fade_keeps_the_one_row_of_no_image_that_both_have() -> None:
    first = prompt_of(1, seed=1)
    second = replace(prompt_of(1, seed=2), unconditional=first.unconditional.clone())
    faded = strategies.fade(first, second, [0.0, 0.5])
    assert torch.equal(faded.unconditional, first.unconditional)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fade_keeps_the_precision(dtype: torch.dtype) -> None:
    first, second = prompt_of(1, seed=1), prompt_of(1, seed=2)
    small = replace(
        first,
        conditional=first.conditional.to(dtype),
        unconditional=first.unconditional.to(dtype),
    )
    faded = strategies.fade(small, second, [0.25])
    assert faded.conditional.dtype == faded.unconditional.dtype == dtype
    expected = 0.75 * first.conditional + 0.25 * second.conditional
    torch.testing.assert_close(faded.conditional.float(), expected, rtol=0.02, atol=0.02)


def test_what_cannot_fade_is_refused() -> None:
    first = prompt_of(1)
    with pytest.raises(IncompatibleModelError, match="an adapter and another"):
        strategies.fade(first, prompt_of(1, adapter="xyz", label="another"), [0.5])
    with pytest.raises(IncompatibleModelError, match="4 tokens and the second 8"):
        strategies.fade(first, prompt_of(1, tokens=8), [0.5])
    with pytest.raises(InfluenceError, match="0 pictures"):
        strategies.fade(first, first, [])


@given(count=st.integers(1, 50), curve=st.sampled_from(CURVES))
def test_fractions_rise_from_0_to_1(count: int, curve: strategies.Curve) -> None:
    found = strategies.fractions(count, curve)
    assert len(found) == count and found == sorted(found) and found[-1] == 1.0
    assert count == 1 or found[0] == pytest.approx(0)
    if count > 2:
        middle = {"linear": 0.5, "ease_in_out": 0.5, "ease_in": 0.5**0.5, "ease_out": 1 - 0.5**0.5}
        assert strategies.eased(0.5, curve) == pytest.approx(middle[curve])
