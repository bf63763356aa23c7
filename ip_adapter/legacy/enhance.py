"""The old nodes that read a picture in more detail, tile by tile; see `ip_adapter.enhance`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from .. import enhance
from ..attention import Scaling
from ..host import adapters, reading
from ..host.adapters import LoadedAdapter
from ..references import Combine
from . import calls, common
from .calls import Strength, Weight

log = logging.getLogger(__name__)

SUCCESSOR = "Encode Image Prompt, where fit is tile or image_size is larger"
MOST = 16
"""Tiles in each direction."""


class Enhancer(io.ComfyNode):
    """References in more detail on a MODEL.

    One picture becomes two references, the whole one times the ratio and its tiles; of several
    pictures each is blended with its tiles.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _schema(
            "IPAdapterClipVisionEnhancer",
            "IPAdapter ClipVision Enhancer",
            common.weight_in(5),
            common.weight_type_in(),
            common.combine_in(),
            *common.window_in(),
            common.scaling_in(),
            *_tiles_in(ratio=1.0),
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
        enhance_tiles: int,
        enhance_ratio: float,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        return _run(
            model,
            ipadapter,
            image,
            Strength(weight, weight_type, start_at, end_at, attn_mask, embeds_scaling),
            (enhance_tiles, enhance_ratio),
            clip_vision,
            image_negative,
            combine_embeds,
        )


class EnhancerBatch(io.ComfyNode):
    """A reference in more detail for each picture of a batch.

    Each is blended with its tiles, also a single one. (The old pack gave a single one to the first
    picture of the batch and its tiles to all others.)
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return _schema(
            "IPAdapterClipVisionEnhancerBatch",
            "IPAdapter ClipVision Enhancer Batch",
            common.weight_in(5),
            common.weight_type_in(),
            *common.window_in(),
            common.scaling_in(),
            *_tiles_in(ratio=0.5),
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
        enhance_tiles: int,
        enhance_ratio: float,
        encode_batch_size: int,
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = Strength(
            *(weight, weight_type, start_at, end_at, attn_mask, embeds_scaling), by_frame=True
        )
        enhancement = (enhance_tiles, enhance_ratio)
        return _run(model, ipadapter, image, strength, enhancement, clip_vision, image_negative)


def _run(
    model: Any,
    ipadapter: Any,
    image: Tensor,
    strength: Strength,
    enhancement: tuple[int, float],
    clip_vision: Any,
    negative: Tensor | None,
    how: Combine = "concat",
) -> io.NodeOutput:
    adapter = adapters.require(ipadapter)
    if adapter.spec.projection.face is not None:
        log.warning("IP-Adapter: %s reads a face, which has no tiles", adapter.label)
        patched, _ = calls.run(
            model, adapter, image, strength, clip_vision=clip_vision, negative=negative, how=how
        )
        return io.NodeOutput(patched)
    vision = calls.encoder_for(adapter, clip_vision)
    prompt = calls.encode(
        adapter,
        vision,
        _features(adapter, vision, image, *enhancement, by_frame=strength.by_frame),
        negative=None if negative is None else reading.read(adapter, vision, negative, "crop"),
        how=how,
        by_frame=strength.by_frame,
    )
    return io.NodeOutput(calls.apply(model, adapter, prompt, strength))


def _features(
    adapter: LoadedAdapter, vision: Any, image: Tensor, tiles: int, ratio: float, *, by_frame: bool
) -> Tensor:
    whole = reading.read(adapter, vision, image, "crop")
    count = min(tiles, MOST, *image.shape[1:3])
    if count == 1:
        return whole
    tiled = torch.cat(
        [  # picture by picture: up to 256 tiles of each are held at once
            enhance.merge(
                reading.read(adapter, vision, enhance.split(one[None], count), "crop"), count
            )
            for one in image
        ]
    )
    if len(image) == 1 and not by_frame:
        return enhance.side_by_side(whole, tiled, ratio)
    return enhance.mix(whole, tiled, ratio)


def _tiles_in(ratio: float) -> tuple[Any, ...]:
    return (
        io.Int.Input("enhance_tiles", default=2, min=1, max=MOST),
        common.number_in("enhance_ratio", 0.0, 1.0, ratio),
    )


def _schema(node_id: str, display_name: str, *middle: Any) -> io.Schema:
    return common.apply_schema(node_id, display_name, "ipadapter/dev", SUCCESSOR, *middle)


NODES: list[type[io.ComfyNode]] = [Enhancer, EnhancerBatch]
