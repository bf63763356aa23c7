"""The ids of before March 2024, when ComfyUI_IPAdapter_plus changed most of its nodes.

They have the inputs of that time and do what their successors do, in the older words. An id that
got other inputs then, IPAdapterEncoder, means the newer node. Noise is made as IPAdapter Noise's
``shuffle`` makes it today.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from .. import retouch
from ..attention import Scaling
from ..encoders import PUBLIC
from ..errors import IncompatibleModelError
from ..faces import Pick
from ..host import adapters, encoding, faces, reading
from ..host import embeds as host_embeds
from ..host.adapters import LoadedAdapter
from ..nodes.common import FaceModelType
from ..spec import GUESSED
from . import calls, common, loaders
from .calls import Strength
from .common import Choice, EmbedsType
from .masked_tiles import masked_tiles

log = logging.getLogger(__name__)

Kind = Literal["original", "linear", "channel penalty"]

SCALINGS: dict[Kind, Scaling] = {
    "original": "V only",
    "linear": "K+V",
    "channel penalty": "K+mean(V) w/ C penalty",
}
"""The weight types of that time: what a weight multiplied."""

FACE_SIDE = 256
"""Side of the aligned crop of a face in pixels, then for every adapter."""

_POSITIONS = {encoder.tokens for encoder in PUBLIC}
"""Tokens that encoders make of a picture."""

_CATEGORY = "ipadapter"
_APPLY = "IPAdapter Advanced, or Encode Image Prompt and Apply IP-Adapter"


class Apply(io.ComfyNode):
    """Pictures on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "IPAdapterApply",
            "Apply IPAdapter",
            _CATEGORY,
            _APPLY,
            inputs=[
                *_pictures_in(),
                *_strength_in(1.0, with_noise=True),
                _unfold_in(),
                common.mask_in(),
            ],
            outputs=[common.model_out("MODEL")],
        )

    @classmethod
    def execute(
        cls,
        ipadapter: Any,
        clip_vision: Any,
        image: Tensor,
        model: Any,
        weight: float,
        noise: float,
        weight_type: Kind,
        start_at: float,
        end_at: float,
        unfold_batch: bool,
        attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        """Apply them."""
        strength = _strength(weight, weight_type, start_at, end_at, attn_mask, unfold_batch)
        return _pictures(model, ipadapter, clip_vision, image, noise, strength)


class ApplyFaceID(io.ComfyNode):
    """Faces on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "IPAdapterApplyFaceID",
            "Apply IPAdapter FaceID",
            _CATEGORY,
            "IPAdapter FaceID, or Detect Face, Encode Face Prompt and Apply IP-Adapter",
            inputs=[
                common.adapter_in(),
                io.ClipVision.Input("clip_vision"),
                FaceModelType.Input("insightface"),
                common.image_in(),
                common.model_in(),
                *_strength_in(1.0, with_noise=True),
                io.Boolean.Input("faceid_v2", default=False),
                common.weight_in(3, "weight_v2"),
                _unfold_in(),
                common.mask_in(),
            ],
            outputs=[common.model_out("MODEL")],
        )

    @classmethod
    def execute(
        cls,
        ipadapter: Any,
        clip_vision: Any,
        insightface: Any,
        image: Tensor,
        model: Any,
        weight: float,
        noise: float,
        weight_type: Kind,
        start_at: float,
        end_at: float,
        faceid_v2: bool,
        weight_v2: float,
        unfold_batch: bool,
        attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        """Apply them."""
        adapter = adapters.require(ipadapter)
        strength = _strength(weight, weight_type, start_at, end_at, attn_mask, unfold_batch)
        if adapter.spec.projection.face is None:
            return _pictures(model, adapter, clip_vision, image, noise, strength)
        adapter = _of_version(adapter, faceid_v2)
        found = faces.detect(calls.face_model_for(adapter, insightface), image, Pick("confidence"))
        prompt = encoding.encode_faces(
            adapter,
            found,
            calls.encoder_for(adapter, clip_vision),
            weight_v2,
            crop=FACE_SIDE,
            negative=_noised(found.crops(FACE_SIDE), noise) if noise > 0 else None,
            frames=len(image) if unfold_batch else 1,
            unconditional=calls.BLACK,
        )
        return io.NodeOutput(calls.apply(model, adapter, prompt, strength))


class ApplyEncoded(io.ComfyNode):
    """EMBEDS on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "IPAdapterApplyEncoded",
            "Apply IPAdapter from Encoded",
            _CATEGORY,
            "IPAdapter Embeds",
            inputs=[
                common.adapter_in(),
                EmbedsType.Input("embeds"),
                common.model_in(),
                *_strength_in(1.0),
                _unfold_in(),
                common.mask_in(),
            ],
            outputs=[common.model_out("MODEL")],
        )

    @classmethod
    def execute(
        cls,
        ipadapter: Any,
        embeds: Tensor,
        model: Any,
        weight: float,
        weight_type: Kind,
        start_at: float,
        end_at: float,
        unfold_batch: bool,
        attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        """Apply them."""
        adapter = adapters.require(ipadapter)
        prompt = host_embeds.encode(
            adapter, None, embeds, by_frame=unfold_batch, unconditional=calls.BLACK
        )
        strength = _strength(weight, weight_type, start_at, end_at, attn_mask, unfold_batch)
        return io.NodeOutput(calls.apply(model, adapter, prompt, strength))


class TilesMasked(io.ComfyNode):
    """A large picture on a MODEL, in tiles, each where it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "IPAdapterTilesMasked",
            "IPAdapter Masked Tiles (experimental)",
            _CATEGORY,
            "IPAdapter Tiled",
            inputs=[
                *_pictures_in(),
                *_strength_in(0.7, with_noise=True),
                io.Int.Input("short_side_tiles", default=1, min=0, max=12, step=1),
                common.number_in("tile_weight", 0.0, 1.0, 0.6),
            ],
            outputs=[common.model_out("MODEL")],
        )

    @classmethod
    def execute(
        cls,
        ipadapter: Any,
        clip_vision: Any,
        image: Tensor,
        model: Any,
        weight: float,
        noise: float,
        weight_type: Kind,
        start_at: float,
        end_at: float,
        short_side_tiles: int,
        tile_weight: float,
    ) -> io.NodeOutput:
        """Cut, and apply each tile."""
        strength = _strength(weight, weight_type, start_at, end_at, None, False)
        if short_side_tiles == 0:
            return _pictures(model, ipadapter, clip_vision, image, noise, strength)
        adapter = adapters.require(ipadapter)
        vision = calls.encoder_for(adapter, clip_vision)
        tiles, masks = masked_tiles(image, short_side_tiles, tile_weight)
        features = reading.read(adapter, vision, tiles, "crop")
        noised = _noised(tiles, noise)
        against = None if noised is None else reading.read(adapter, vision, noised, "crop")
        for i, mask in enumerate(masks):
            prompt = calls.encode(
                adapter,
                vision,
                features[i : i + 1],
                negative=None if against is None else against[i : i + 1],
            )
            model = calls.apply(model, adapter, prompt, replace(strength, mask=mask[None]))
        return io.NodeOutput(model)


class BatchEmbeds(io.ComfyNode):
    """EMBEDS + EMBEDS -> EMBEDS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "IPAdapterBatchEmbeds",
            "IPAdapter Batch Embeds",
            _CATEGORY,
            "IPAdapter Combine Embeds",
            inputs=[EmbedsType.Input("embed1"), EmbedsType.Input("embed2")],
            outputs=[EmbedsType.Output("EMBEDS", display_name="EMBEDS")],
        )

    @classmethod
    def execute(cls, embed1: Tensor, embed2: Tensor) -> io.NodeOutput:
        """Join them: stacks of a picture's and those of "no image" along the pictures."""
        axis = 1 if _is_stack(embed1) else 0
        wanted, given = list(embed1.shape), list(embed2.shape)
        if len(wanted) != len(given) or wanted[:axis] + wanted[axis + 1 :] != (
            given[:axis] + given[axis + 1 :]
        ):
            raise IncompatibleModelError(
                f"The embeds have shapes {wanted} and {given}, which do not belong together: "
                "needed are two of one encoder and one kind. Encode both pictures in the same way."
            )
        return io.NodeOutput(torch.cat((embed1, embed2), dim=axis))


class InsightFaceLoader(io.ComfyNode):
    """The usual face model -> INSIGHTFACE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "InsightFaceLoader",
            "Load InsightFace",
            _CATEGORY,
            "Load Face Model",
            inputs=[Choice("provider", options=["CPU", "CUDA", "ROCM"])],
            outputs=[FaceModelType.Output("INSIGHTFACE", display_name="INSIGHTFACE")],
        )

    @classmethod
    def fingerprint_inputs(cls, provider: str) -> str:
        """Load again when the files changed."""
        return loaders.stamp_of_faces()

    @classmethod
    def execute(cls, provider: str) -> io.NodeOutput:
        """Load the pack."""
        return io.NodeOutput(loaders.face_model(provider))


class PrepImageForInsightFace(io.ComfyNode):
    """IMAGE -> IMAGE of the size at which faces are searched."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return common.old(
            "PrepImageForInsightFace",
            "Prepare Image For InsightFace",
            _CATEGORY,
            "Detect Face, which needs no preparation",
            inputs=[
                common.image_in(),
                Choice("crop_position", options=["center", "top", "bottom", "left", "right"]),
                common.number_in("sharpening", 0, 1, 0.0),
                io.Boolean.Input("pad_around", default=True),
            ],
            outputs=[io.Image.Output("IMAGE", display_name="IMAGE")],
        )

    @classmethod
    def execute(
        cls, image: Tensor, crop_position: retouch.Position, sharpening: float, pad_around: bool
    ) -> io.NodeOutput:
        """Crop and resize to 640 pixels; with a white border of 30 of them, if asked for."""
        border = 30 if pad_around else 0
        square = retouch.prepare(
            image, position=crop_position, size=640 - 2 * border, sharpening=sharpening
        )
        return io.NodeOutput(F.pad(square, (0, 0, border, border, border, border), value=1.0))


def _pictures_in() -> tuple[Any, ...]:
    return (
        common.adapter_in(),
        io.ClipVision.Input("clip_vision"),
        common.image_in(),
        common.model_in(),
    )


def _strength_in(default: float, *, with_noise: bool = False) -> tuple[Any, ...]:
    noise = (common.number_in("noise", 0.0, 1.0, 0.0, 0.01),) if with_noise else ()
    return (
        common.number_in("weight", -1, 3, default),
        *noise,
        Choice("weight_type", options=list(SCALINGS)),
        *common.window_in(),
    )


def _unfold_in() -> io.Boolean.Input:
    return io.Boolean.Input("unfold_batch", default=False)


def _strength(
    weight: float,
    kind: Kind,
    start_at: float,
    end_at: float,
    mask: Tensor | None,
    by_frame: bool,
) -> Strength:
    return Strength(
        weight,
        start_at=start_at,
        end_at=end_at,
        mask=mask,
        scaling=SCALINGS[kind],
        by_frame=by_frame,
    )


def _pictures(
    model: Any, ipadapter: Any, clip_vision: Any, image: Tensor, noise: float, strength: Strength
) -> io.NodeOutput:
    negative = _noised(image, noise)
    patched, _ = calls.run(
        model, ipadapter, image, strength, clip_vision=clip_vision, negative=negative
    )
    return io.NodeOutput(patched)


def _noised(image: Tensor, noise: float) -> Tensor | None:
    """What to lead away from; the less noise was asked for, the more of it there was."""
    return retouch.noise(image, "shuffle", 1 - noise) if noise > 0 else None


def _is_stack(given: Tensor) -> bool:
    """Whether embeds are a picture's and those of "no image", ``[2, N, E]`` or ``[2, N, P, W]``."""
    if given.ndim == 3:
        return len(given) == 2 and given.shape[1] not in _POSITIONS
    return given.ndim == 4


def _of_version(adapter: LoadedAdapter, is_v2: bool) -> LoadedAdapter:
    """Take a FaceID Plus file for what the user said it is, where nothing surer says it.

    The two versions have equal tensors, and used the other way give a weak likeness.
    """
    spec, said = adapter.spec, "faceid-plusv2" if is_v2 else "faceid-plus"
    if spec.variant == said or said not in spec.alternatives:
        return adapter
    if spec.evidence in GUESSED:
        return replace(
            adapters.load(adapter.path, said),
            clip_vision=adapter.clip_vision,
            face_model=adapter.face_model,
        )
    log.warning(
        "IP-Adapter: faceid_v2 says that %s is %s; used is what its content says",
        *(adapter.label, said),
    )
    return adapter


NODES: list[type[io.ComfyNode]] = [
    Apply,
    ApplyFaceID,
    ApplyEncoded,
    TilesMasked,
    BatchEmbeds,
    InsightFaceLoader,
    PrepImageForInsightFace,
]
