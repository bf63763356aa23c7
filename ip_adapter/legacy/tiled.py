"""The old ids that cut a reference into tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..attention import Scaling
from ..references import Combine
from ..regions import tile
from ..tiles import scale_mask
from .calls import Strength, Weight, run
from .common import (
    adapter_in,
    batch_size_in,
    combine_in,
    extras_in,
    image_in,
    model_in,
    model_out,
    number_in,
    old,
    scaling_in,
    weight_in,
    weight_type_in,
    window_in,
)

SUCCESSOR = "Image Prompt Tiles and Apply Image Prompt Regions"


def _outputs() -> list[Any]:
    return [
        model_out("MODEL"),
        io.Image.Output("tiles", display_name="tiles"),
        io.Mask.Output("masks", display_name="masks"),
    ]


def _apply(
    model: Any,
    ipadapter: Any,
    clip_vision: Any,
    image: Tensor,
    negative: Tensor | None,
    sharpening: float,
    strength: Strength,
    how: Combine = "concat",
) -> io.NodeOutput:
    """Apply each tile where it lies, with the part of the mask that it covers."""
    tiles = tile(image, sharpening, "add")
    within = tiles.masks[:, None]  # [N, M, h, w]
    if strength.mask is not None:
        within = within * scale_mask(strength.mask, *image.shape[1:3])
    for picture, mask in zip(tiles.pictures, within, strict=True):
        here = replace(strength, mask=mask)
        model, _ = run(
            model, ipadapter, picture, here, clip_vision=clip_vision, negative=negative, how=how
        )
    return io.NodeOutput(model, tiles.pictures.flatten(0, 1), within.flatten(0, 1))


class IPAdapterTiled(io.ComfyNode):
    """MODEL + a large reference -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterTiled",
            "IPAdapter Tiled",
            "ipadapter/tiled",
            SUCCESSOR,
            inputs=[
                model_in(),
                adapter_in(),
                image_in(),
                weight_in(3),
                weight_type_in(),
                combine_in(),
                *window_in(),
                number_in("sharpening", 0.0, 1.0, 0.0),
                scaling_in(),
                *extras_in(),
            ],
            outputs=_outputs(),
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
        sharpening: float,
        embeds_scaling: Scaling,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply each tile."""
        strength = Strength(weight, weight_type, start_at, end_at, attn_mask, embeds_scaling)
        return _apply(
            model,
            ipadapter,
            clip_vision,
            image,
            image_negative,
            sharpening,
            strength,
            combine_embeds,
        )


class IPAdapterTiledBatch(io.ComfyNode):
    """MODEL + a large reference for each picture of a batch -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterTiledBatch",
            "IPAdapter Tiled Batch",
            "ipadapter/tiled",
            SUCCESSOR,
            inputs=[
                model_in(),
                adapter_in(),
                image_in(),
                weight_in(3),
                weight_type_in(),
                *window_in(),
                number_in("sharpening", 0.0, 1.0, 0.0),
                scaling_in(),
                batch_size_in(),
                *extras_in(),
            ],
            outputs=_outputs(),
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
        sharpening: float,
        embeds_scaling: Scaling,
        encode_batch_size: int,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply each tile, of each reference to its picture of the batch."""
        strength = Strength(
            *(weight, weight_type, start_at, end_at, attn_mask, embeds_scaling), by_frame=True
        )
        return _apply(model, ipadapter, clip_vision, image, image_negative, sharpening, strength)


NODES: list[type[io.ComfyNode]] = [IPAdapterTiled, IPAdapterTiledBatch]
