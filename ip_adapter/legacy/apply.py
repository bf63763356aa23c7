"""The old nodes that apply an image prompt of pictures.

Those named Batch give each picture of the latent batch a reference and a weight of its own. The
encoder is the one that is connected, else the one that a unified loader put beside the adapter.
"""

from __future__ import annotations

from typing import Any, ClassVar

from comfy_api.latest import io
from torch import Tensor

from ..attention import Scaling
from ..references import Combine
from . import calls, common, composition
from .calls import Strength, Weight

SUCCESSOR = "Encode Image Prompt and Apply IP-Adapter"

SIMPLE = {
    "standard": "linear",
    "prompt is more important": "ease out",
    "style transfer": "style transfer",
}
"""The words of the simple node for presets."""


class Simple(io.ComfyNode):
    """References on a MODEL, with three presets."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "IPAdapter",
            "IPAdapter",
            "ipadapter",
            SUCCESSOR,
            inputs=[
                common.model_in(),
                common.adapter_in(),
                common.image_in(),
                common.weight_in(3),
                *common.window_in(),
                common.Choice("weight_type", options=list(SIMPLE)),
                common.mask_in(),
            ],
            outputs=[common.model_out("MODEL")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Weight,
        start_at: float,
        end_at: float,
        weight_type: str,
        attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = Strength(weight, SIMPLE[weight_type], start_at, end_at, attn_mask)
        return io.NodeOutput(calls.run(model, ipadapter, image, strength)[0])


class Advanced(io.ComfyNode):
    """References on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _schema(
            "IPAdapterAdvanced",
            "IPAdapter Advanced",
            common.weight_in(5),
            common.weight_type_in(),
            common.combine_in(),
            *common.window_in(),
            common.scaling_in(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Weight,
        weight_type: str,
        combine_embeds: Combine,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = Strength(weight, weight_type, start_at, end_at, attn_mask, embeds_scaling)
        return _put(model, ipadapter, image, strength, clip_vision, image_negative, combine_embeds)


class Batch(io.ComfyNode):
    """A reference for each picture of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _schema(
            "IPAdapterBatch",
            "IPAdapter Batch (Adv.)",
            common.weight_in(5),
            common.weight_type_in(),
            *common.window_in(),
            common.scaling_in(),
            common.batch_size_in(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Weight,
        weight_type: str,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        encode_batch_size: int,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = Strength(
            weight, weight_type, start_at, end_at, attn_mask, embeds_scaling, by_frame=True
        )
        return _put(model, ipadapter, image, strength, clip_vision, image_negative)


class MadScientist(io.ComfyNode):
    """References on a MODEL, with a weight for each of its transformers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "IPAdapterMS",
            "IPAdapter Mad Scientist",
            "ipadapter/dev",
            f"Image Prompt Influence, {SUCCESSOR}",
            inputs=[
                common.model_in(),
                common.adapter_in(),
                common.image_in(),
                common.weight_in(5),
                common.weight_in(5.0, "weight_faceidv2"),
                common.weight_type_in(),
                common.combine_in(),
                *common.window_in(),
                common.scaling_in(),
                io.String.Input("layer_weights", default="", multiline=True),
                *common.extras_in(),
                common.face_model_in(),
            ],
            outputs=[common.model_out("MODEL")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Weight,
        weight_faceidv2: float,
        weight_type: str,
        combine_embeds: Combine,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        layer_weights: str,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
        insightface: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = Strength(
            *(weight, weight_type, start_at, end_at, attn_mask, embeds_scaling),
            layer_weights=layer_weights,
        )
        patched, _ = calls.run(
            model,
            ipadapter,
            image,
            strength,
            clip_vision=clip_vision,
            insightface=insightface,
            negative=image_negative,
            how=combine_embeds,
            structure=weight_faceidv2,
        )
        return io.NodeOutput(patched)


class _PreciseStyle(io.ComfyNode):
    """The style of references, and what pushes their layout away."""

    named: ClassVar[tuple[str, str]]
    by_frame: ClassVar[bool] = False

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _precise(*cls.named, "style_boost", 1.0)

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Weight,
        style_boost: Weight,
        combine_embeds: Combine,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = Strength(
            *(weight, "style transfer precise", start_at, end_at, attn_mask, embeds_scaling),
            style_boost=style_boost,
            by_frame=cls.by_frame,
        )
        return _put(model, ipadapter, image, strength, clip_vision, image_negative, combine_embeds)


class PreciseStyle(_PreciseStyle):
    """The style of references, and what pushes their layout away."""

    named: ClassVar[tuple[str, str]] = (
        "IPAdapterPreciseStyleTransfer",
        "IPAdapter Precise Style Transfer",
    )


class PreciseStyleBatch(_PreciseStyle):
    """The same, with a reference for each picture of a batch."""

    by_frame: ClassVar[bool] = True
    named: ClassVar[tuple[str, str]] = (
        "IPAdapterPreciseStyleTransferBatch",
        "IPAdapter Precise Style Transfer Batch",
    )


class _PreciseComposition(io.ComfyNode):
    """The layout of references, and what pushes their style away."""

    named: ClassVar[tuple[str, str]]
    by_frame: ClassVar[bool] = False

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _precise(*cls.named, "composition_boost", 0.0)

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Weight,
        composition_boost: Weight,
        combine_embeds: Combine,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = Strength(
            *(weight, "composition precise", start_at, end_at, attn_mask, embeds_scaling),
            composition_boost=composition_boost,
            by_frame=cls.by_frame,
        )
        return _put(model, ipadapter, image, strength, clip_vision, image_negative, combine_embeds)


class PreciseComposition(_PreciseComposition):
    """The layout of references, and what pushes their style away."""

    named: ClassVar[tuple[str, str]] = (
        "IPAdapterPreciseComposition",
        "IPAdapter Precise Composition",
    )


class PreciseCompositionBatch(_PreciseComposition):
    """The same, with a reference for each picture of a batch."""

    by_frame: ClassVar[bool] = True
    named: ClassVar[tuple[str, str]] = (
        "IPAdapterPreciseCompositionBatch",
        "IPAdapter Precise Composition Batch",
    )


def _put(
    model: Any,
    ipadapter: Any,
    image: Tensor,
    strength: Strength,
    clip_vision: Any,
    negative: Tensor | None,
    how: Combine = "concat",
) -> io.NodeOutput:
    """Patch a clone of the MODEL with references."""
    patched, _ = calls.run(
        model, ipadapter, image, strength, clip_vision=clip_vision, negative=negative, how=how
    )
    return io.NodeOutput(patched)


def _schema(node_id: str, display_name: str, *middle: Any) -> io.Schema:
    return common.apply_schema(node_id, display_name, "ipadapter", SUCCESSOR, *middle)


def _precise(node_id: str, display_name: str, boost: str, default: float) -> io.Schema:
    return _schema(
        node_id,
        display_name,
        common.weight_in(5),
        common.number_in(boost, -5, 5, default),
        common.combine_in(),
        *common.window_in(),
        common.scaling_in(),
    )


NODES: list[type[io.ComfyNode]] = [
    Simple,
    Advanced,
    Batch,
    MadScientist,
    PreciseStyle,
    PreciseStyleBatch,
    PreciseComposition,
    PreciseCompositionBatch,
    *composition.NODES,
]
