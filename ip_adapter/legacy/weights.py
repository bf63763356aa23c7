"""The old pack's nodes for animations: a weight, a reference and a text for each picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from .. import strategies
from ..strategies import METHODS, TIMINGS, Strategy
from .common import Choice, StrategyType, number_in, old


def _outputs() -> list[Any]:
    return [
        io.Float.Output("weights", display_name="weights"),
        io.Float.Output("weights_invert", display_name="weights_invert"),
        io.Int.Output("total_frames", display_name="total_frames"),
        io.Image.Output("image_1", display_name="image_1"),
        io.Image.Output("image_2", display_name="image_2"),
        StrategyType.Output("weights_strategy", display_name="weights_strategy"),
    ]


def _carried_out(strategy: Strategy, image: Any) -> io.NodeOutput:
    done = strategies.carry_out(strategy, image)
    return io.NodeOutput(
        *(done.weights, done.backwards, len(done.weights)),
        *(done.first, done.second, strategy.as_dict()),
    )


def _frames_in(name: str, default: int = 0) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=0, max=9999, step=1)


class Weights(io.ComfyNode):
    """A strategy, carried out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterWeights",
            "IPAdapter Weights",
            "ipadapter/weights",
            "the frame_weights of Image Prompt Influence, or Fade Between Prompts",
            inputs=[
                io.String.Input("weights", default="1.0, 0.0", multiline=True),
                Choice("timing", options=list(TIMINGS), default="linear"),
                _frames_in("frames"),
                _frames_in("start_frame"),
                _frames_in("end_frame", 9999),
                _frames_in("add_starting_frames"),
                _frames_in("add_ending_frames"),
                Choice("method", options=list(METHODS), default="full batch"),
                io.Image.Input("image", optional=True),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        weights: str,
        timing: strategies.Timing,
        frames: int,
        start_frame: int,
        end_frame: int,
        add_starting_frames: int,
        add_ending_frames: int,
        method: strategies.Method,
        image: Any = None,
    ) -> io.NodeOutput:
        """Carry it out."""
        strategy = Strategy(
            weights=weights,
            timing=timing,
            frames=frames,
            start_frame=start_frame,
            end_frame=end_frame,
            add_starting_frames=add_starting_frames,
            add_ending_frames=add_ending_frames,
            method=method,
            frame_count=0 if image is None else len(image),
        )
        return _carried_out(strategy, image)


class WeightsFromStrategy(io.ComfyNode):
    """The same strategy for other pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterWeightsFromStrategy",
            "IPAdapter Weights From Strategy",
            "ipadapter/weights",
            "the frame_weights of Image Prompt Influence, or Fade Between Prompts",
            inputs=[
                StrategyType.Input("weights_strategy"),
                io.Image.Input("image", optional=True),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, weights_strategy: Mapping[str, Any], image: Any = None) -> io.NodeOutput:
        """Carry it out."""
        return _carried_out(strategies.from_dict(weights_strategy), image)


class PromptSchedule(io.ComfyNode):
    """A text for each picture of a strategy."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterPromptScheduleFromWeightsStrategy",
            "Prompt Schedule From Weights Strategy",
            "ipadapter/weights",
            "a prompt schedule node",
            inputs=[
                StrategyType.Input("weights_strategy"),
                io.String.Input("prompt", default="", multiline=True),
            ],
            outputs=[io.String.Output("prompt_schedule", display_name="prompt_schedule")],
        )

    @classmethod
    def execute(cls, weights_strategy: Mapping[str, Any], prompt: str) -> io.NodeOutput:
        """Write the schedule."""
        strategy = strategies.from_dict(weights_strategy)
        return io.NodeOutput(strategies.prompt_schedule(strategy, prompt))


class CombineWeights(io.ComfyNode):
    """Two weights, or lists of them, one after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterCombineWeights",
            "IPAdapter Combine Weights",
            "ipadapter/utils",
            "the frame_weights of Image Prompt Influence",
            inputs=[
                number_in("weights_1", 0.0, 1.0, 0.0),
                number_in("weights_2", 0.0, 1.0, 0.0),
            ],
            outputs=[
                io.Float.Output("weights", display_name="weights"),
                io.Int.Output("count", display_name="count"),
            ],
        )

    @classmethod
    def execute(cls, weights_1: strategies.Weights, weights_2: strategies.Weights) -> io.NodeOutput:
        """Join them."""
        joined = strategies.joined(weights_1, weights_2)
        return io.NodeOutput(joined, len(joined))


NODES: list[type[io.ComfyNode]] = [Weights, WeightsFromStrategy, PromptSchedule, CombineWeights]
