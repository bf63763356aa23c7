"""The old nodes that take the style of one picture and the layout of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..attention import Scaling
from ..references import Combine
from . import calls, common
from .calls import Strength, Weight

_LAYERS = {False: "style and composition", True: "strong style and composition"}
"""Preset by whether the style is expanded."""


class StyleComposition(io.ComfyNode):
    """The style of one reference and the layout of another.

    Each is applied in its own layers: the layout in t = 3 of SDXL, in t = 4 and 5 of SD 1.5, the
    style elsewhere. (The old pack looked for the second picture at t = 3 in every model, which is a
    layer of style in SD 1.5, and refused SD 1.5 altogether.)
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        name = "IPAdapter Style & Composition SDXL"
        return _two("IPAdapterStyleComposition", name, common.combine_in("average"))

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image_style: Tensor,
        image_composition: Tensor,
        weight_style: Weight,
        weight_composition: Weight,
        expand_style: bool,
        combine_embeds: Combine,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply both."""
        shared = Strength(1.0, _LAYERS[expand_style], start_at, end_at, attn_mask, embeds_scaling)
        return _apply(
            model,
            ipadapter,
            shared,
            (image_style, weight_style),
            (image_composition, weight_composition),
            clip_vision=clip_vision,
            negative=image_negative,
            how=combine_embeds,
        )


class StyleCompositionBatch(io.ComfyNode):
    """The same, with two references for each picture of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        name = "IPAdapter Style & Composition Batch SDXL"
        return _two("IPAdapterStyleCompositionBatch", name)

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image_style: Tensor,
        image_composition: Tensor,
        weight_style: Weight,
        weight_composition: Weight,
        expand_style: bool,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply both."""
        shared = Strength(
            *(1.0, _LAYERS[expand_style], start_at, end_at, attn_mask, embeds_scaling),
            by_frame=True,
        )
        return _apply(
            model,
            ipadapter,
            shared,
            (image_style, weight_style),
            (image_composition, weight_composition),
            clip_vision=clip_vision,
            negative=image_negative,
        )


def _apply(
    model: Any,
    ipadapter: Any,
    shared: Strength,
    style: tuple[Tensor, Weight],
    layout: tuple[Tensor, Weight],
    **more: Any,
) -> io.NodeOutput:
    """Apply two references with their weights, each in its own layers."""
    for image, own in (
        (style[0], replace(shared, weight=style[1], composition=0.0)),
        (layout[0], replace(shared, weight=0.0, composition=layout[1])),
    ):
        model, _ = calls.run(model, ipadapter, image, own, **more)
    return io.NodeOutput(model)


def _two(node_id: str, display_name: str, *combine: Any) -> io.Schema:
    return common.old(
        node_id,
        display_name,
        "ipadapter/style_composition",
        "Encode Image Prompt and Apply IP-Adapter with an Image Prompt Influence, for each picture",
        inputs=[
            common.model_in(),
            common.adapter_in(),
            common.image_in("image_style"),
            common.image_in("image_composition"),
            common.weight_in(5, "weight_style"),
            common.weight_in(5, "weight_composition"),
            io.Boolean.Input("expand_style", default=False),
            *combine,
            *common.window_in(),
            common.scaling_in(),
            *common.extras_in(),
        ],
        outputs=[common.model_out("MODEL")],
    )


NODES: list[type[io.ComfyNode]] = [StyleComposition, StyleCompositionBatch]
