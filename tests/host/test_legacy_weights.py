"""The old weight nodes, on the host: lists over FLOAT sockets, and the strategy between nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.host

ANIMATION = {
    "weights": "0.0, 1.0",
    "timing": "linear",
    "frames": 3,
    "start_frame": 0,
    "end_frame": 9999,
    "add_starting_frames": 1,
    "add_ending_frames": 2,
    "method": "alternate batches",
}


def numbered(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)


def greys(pictures: Tensor) -> list[int]:
    return [int(grey) for grey in pictures[:, 0, 0, 0]]


def test_weights_and_the_two_references_of_each_frame(host: Any) -> None:
    done = host.node("IPAdapterWeights").execute(**ANIMATION, image=numbered(3)).args
    weights, inverted, total, first, second, strategy = done
    assert type(weights) is list and weights == [0, 0, 0.5, 1, 1, 0.5, 0, 0, 0]
    assert type(inverted) is list and inverted == [0, 0, 0, 0.5, 1, 1, 0.5, 0, 0]
    assert total == 9
    assert greys(first) == [0, 0, 0, 0, 2, 2, 2, 2, 2]
    assert greys(second) == [0, 1, 1, 1, 1, 1, 1, 2, 2]
    assert strategy == {**ANIMATION, "frame_count": 3}


def test_the_strategy_goes_on_to_other_pictures_and_to_prompts(host: Any) -> None:
    strategy = host.node("IPAdapterWeights").execute(**ANIMATION, image=numbered(3)).args[-1]
    again = host.node("IPAdapterWeightsFromStrategy")
    weights, _, total, first, _, passed = again.execute(strategy, numbered(2)).args
    assert weights == [0, 0, 0.5, 1, 1, 1] and total == 6
    assert greys(first) == [0, 0, 0, 0, 1, 1]
    assert passed == strategy
    weights, inverted, total, first, second, _ = again.execute(strategy).args
    assert (weights, inverted, total) == ([0, 0.5, 1], [1, 0.5, 0], 3)
    assert first is None and second is None
    schedule = host.node("IPAdapterPromptScheduleFromWeightsStrategy")
    (text,) = schedule.execute(strategy, "spring\nautumn").args
    assert (
        text == '"0": "spring",\n"1": "spring",\n"4": "autumn",\n"7": "autumn",\n"10": "autumn",\n'
    )


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [(0.5, 1.0, [0.5, 1.0]), ([0.0, 1.0], 0.25, [0, 1, 0.25]), ([1.0], [0.5, 0.0], [1, 0.5, 0])],
)
def test_weights_are_put_one_after_the_other(
    host: Any, first: Any, second: Any, joined: list[float]
) -> None:
    node = host.node("IPAdapterCombineWeights")
    assert node.execute(first, second).args == (joined, len(joined))


def test_random_weights_of_a_strategy_are_those_of_its_node(host: Any) -> None:
    """The old pack drew new ones, so that two adapters of one animation were out of step."""
    given = {**ANIMATION, "timing": "random", "frames": 9}
    *_, strategy = (first := host.node("IPAdapterWeights").execute(**given).args)
    again = host.node("IPAdapterWeightsFromStrategy").execute(strategy).args
    assert again[0] == first[0] and len(set(first[0])) == 9


def test_the_weights_reach_the_frames_of_an_old_apply_node(host: Any, base_adapter: Any) -> None:
    calls = host.library("ip_adapter.legacy.calls")
    weights = host.node("IPAdapterWeights").execute(**ANIMATION, image=numbered(2)).args[0]
    strength = calls.Strength(weight=weights, by_frame=True)
    (influence,) = strength.influences(base_adapter.spec.family)
    assert influence.frames == (0, 0, 0.5, 1, 1, 1)
