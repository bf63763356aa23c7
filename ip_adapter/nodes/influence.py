"""The node that says how strongly, where and when an image prompt acts."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..attention import Scaling
from ..host.features import schema, show_on_node
from ..influence import EXAMPLE, FRAMES, Influence, parse_curve, parse_frames
from ..presets import PRESETS
from .common import CATEGORY, InfluenceType, window_inputs


class InfluenceNode(io.ComfyNode):
    """Numbers -> INFLUENCE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptInfluence",
            display_name="Image Prompt Influence",
            category=CATEGORY,
            description=(
                "Says how strongly, where and when image prompts act: per layer, over the "
                "schedule, in a region. One influence may serve several Apply IP-Adapter nodes, "
                "whose own weight, window and mask it multiplies with."
            ),
            search_aliases=[
                "style transfer",
                "composition transfer",
                "instantstyle",
                "weight type",
                "layer weights",
                "ip adapter schedule",
            ],
            inputs=[
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How strongly the image counts; multiplies with the weight of Apply.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(PRESETS),
                    default="linear",
                    tooltip="Where in the network. linear: everywhere. style transfer: colours and "
                    "brush, not the layout. composition: the layout, not the style. The precise "
                    "kinds also lead away from the other half of the image.",
                ),
                io.Combo.Input(
                    "scaling",
                    options=list(get_args(Scaling)),
                    default="V only",
                    tooltip="What the weight multiplies. V only: the result, as in the paper. The "
                    "K+V kinds also sharpen or flatten what the image is looked at for.",
                ),
                *window_inputs("it begins to act.", "it stops."),
                io.Float.Input(
                    "composition",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    tooltip="Weight of the composition, for 'style and composition' and 'strong "
                    "style and composition' only.",
                ),
                io.Float.Input(
                    "style_boost",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    tooltip="For 'style transfer precise' only: how strongly it leads away from "
                    "the image's composition.",
                ),
                io.Float.Input(
                    "composition_boost",
                    default=0.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    tooltip="For 'composition precise' only: how strongly it leads away from the "
                    "image's style.",
                ),
                io.String.Input(
                    "layer_weights",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Weights by hand instead of a preset: number:weight with commas, such "
                    "as '3:1, 6:0.5' or '0-5:0.2'. The number counts the network's transformers as "
                    "they run: 0 to 15 in SD 1.5, 0 to 10 in SDXL. Or the scales of diffusers, as "
                    'JSON: {"up": {"block_0": [0, 1, 0]}}.',
                ),
                io.String.Input(
                    "keyframes",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=f"How the weight changes: fraction:factor with commas, such as "
                    f"'{EXAMPLE}', with straight lines in between.",
                ),
                io.String.Input(
                    "frame_weights",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Factors for the pictures of a batch, for animations: one for each, "
                    f"'1, 0.5, 0', or keyframes picture:factor counted from 0, '{FRAMES}'. The "
                    "last one serves the rest.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture it acts; multiplies with the mask of Apply.",
                ),
            ],
            outputs=[
                InfluenceType.Output(
                    "influence",
                    display_name="influence",
                    tooltip="For Apply IP-Adapter; may go to several.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        weight: float,
        layers: str,
        scaling: Scaling,
        start_at: float,
        end_at: float,
        composition: float = 1.0,
        style_boost: float = 1.0,
        composition_boost: float = 0.0,
        layer_weights: str = "",
        keyframes: str = "",
        frame_weights: str = "",
        mask: Any = None,
    ) -> io.NodeOutput:
        """Put the numbers together; texts are checked here, layers when a model is known."""
        influence = Influence(
            weight=weight,
            layers=layer_weights.strip() or layers,
            composition=composition,
            style_boost=style_boost,
            composition_boost=composition_boost,
            start=start_at,
            end=end_at,
            curve=parse_curve(keyframes),
            frames=parse_frames(frame_weights),
            mask=mask,
            scaling=scaling,
        )
        show_on_node(layer_weights.strip() or layers)
        return io.NodeOutput(influence)


NODES: list[type[io.ComfyNode]] = [InfluenceNode]
