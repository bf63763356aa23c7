"""The old nodes that apply an image prompt of faces.

They take the detector's most confident face of each picture. With an adapter that reads pictures
they do what IPAdapter Advanced does, and show the picture in the place of the face.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from comfy_api.latest import io
from torch import Tensor

from ..adapter import IPAdapter
from ..attention import Scaling
from ..host import adapters
from ..host.adapters import LoadedAdapter
from ..layers import CrossAttentionLayer
from ..projections import Features
from ..references import Combine
from ..spec import AdapterSpec
from . import calls, common
from .calls import Strength, Weight

SUCCESSOR = "Detect Face, Encode Face Prompt and Apply IP-Adapter"


class _Face(io.ComfyNode):
    """Faces on a MODEL."""

    by_frame: ClassVar[bool] = False

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
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
        insightface: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = Strength(
            *(weight, weight_type, start_at, end_at, attn_mask, embeds_scaling),
            by_frame=cls.by_frame,
        )
        return io.NodeOutput(
            *calls.run(
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
        )


class FaceID(_Face):
    """Faces on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _schema("IPAdapterFaceID", "IPAdapter FaceID")


class FaceIDBatch(_Face):
    """A face for each picture of a batch; the id is spelt as in the old pack."""

    by_frame: ClassVar[bool] = True

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _schema("IPAAdapterFaceIDBatch", "IPAdapter FaceID Batch")


class FaceIDKolors(io.ComfyNode):
    """Faces on a MODEL, with a factor for what Kolors' own Linear makes of their tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _schema(
            "IPAdapterFaceIDKolors",
            "IPAdapter FaceID Kolors",
            common.weight_in(5.0, "weight_kolors"),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Weight,
        weight_faceidv2: float,
        weight_kolors: float,
        weight_type: str,
        combine_embeds: Combine,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
        insightface: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        return FaceID.execute(
            model,
            _bridged(adapters.require(ipadapter), weight_kolors),
            image,
            weight,
            weight_faceidv2,
            weight_type,
            combine_embeds,
            start_at,
            end_at,
            embeds_scaling,
            image_negative,
            attn_mask,
            clip_vision,
            insightface,
        )


@dataclass(frozen=True, eq=False)
class _Weighted:
    """An adapter's weights, with keys and values times a factor.

    The old pack multiplies weight and bias of the Linear that the tokens of Kolors FaceID go
    through on their way to keys and values; these have no bias, so the factor is theirs.
    """

    module: IPAdapter
    factor: float

    @property
    def spec(self) -> AdapterSpec:
        return self.module.spec

    def image_tokens(self, features: Features) -> Tensor:
        return self.module.image_tokens(features)

    def keys_values(
        self, tokens: Tensor, indices: Container[int] | None = None
    ) -> Iterator[tuple[CrossAttentionLayer, Tensor, Tensor]]:
        for layer, key, value in self.module.keys_values(tokens, indices):
            yield layer, self.factor * key, self.factor * value


def _bridged(adapter: LoadedAdapter, weight: float) -> LoadedAdapter:
    """Weigh the keys and values of an adapter whose tokens go through the model's own Linear."""
    spec = adapter.spec
    if weight == 1 or spec.projection.width == spec.family.context_width:
        return adapter
    return replace(adapter, module=cast(IPAdapter, _Weighted(adapter.module, weight)))


def _schema(node_id: str, display_name: str, *more: Any) -> io.Schema:
    return common.old(
        node_id,
        display_name,
        "ipadapter/faceid",
        SUCCESSOR,
        inputs=[
            common.model_in(),
            common.adapter_in(),
            common.image_in(),
            common.weight_in(3),
            common.weight_in(5.0, "weight_faceidv2"),
            *more,
            common.weight_type_in(),
            common.combine_in(),
            *common.window_in(),
            common.scaling_in(),
            *common.extras_in(),
            common.face_model_in(),
        ],
        outputs=[
            common.model_out("MODEL"),
            io.Image.Output("face_image", display_name="face_image"),
        ],
    )


NODES: list[type[io.ComfyNode]] = [FaceID, FaceIDBatch, FaceIDKolors]
