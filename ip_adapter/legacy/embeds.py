"""The old nodes that take the encoder's features out of the graph's hands: EMBEDS and .ipadpt."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from .. import embeds as library
from ..attention import Scaling
from ..errors import IPAdapterError
from ..host import adapters, reading
from ..host import embeds as host
from ..references import Combine, combine
from .calls import BLACK, Strength, Weight, apply, encoder_for, to_count
from .common import (
    COMBINE_ALL,
    Choice,
    EmbedsType,
    adapter_in,
    encoder_in,
    image_in,
    mask_in,
    model_in,
    model_out,
    number_in,
    old,
    scaling_in,
    weight_in,
    weight_type_in,
    window_in,
)

log = logging.getLogger(__name__)

CATEGORY = "ipadapter/embeds"


class Encoder(io.ComfyNode):
    """A picture -> its features, and those of "no image"."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterEncoder",
            "IPAdapter Encoder",
            CATEGORY,
            "Encode to Embeds",
            inputs=[
                adapter_in(),
                image_in(),
                number_in("weight", -1.0, 3.0, step=0.01),
                mask_in("mask"),
                encoder_in(),
            ],
            outputs=[
                EmbedsType.Output("pos_embed", display_name="pos_embed"),
                EmbedsType.Output("neg_embed", display_name="neg_embed"),
            ],
        )

    @classmethod
    def execute(
        cls, ipadapter: Any, image: Any, weight: float, mask: Any = None, clip_vision: Any = None
    ) -> io.NodeOutput:
        """Encode; zeros are the negative of pooled features, a black picture that of hidden."""
        adapter = adapters.require(ipadapter)
        encoder = encoder_for(adapter, clip_vision)
        if mask is None:
            positive = reading.read(adapter, encoder, image, "crop")
        else:
            positive = host.read_masked(adapter, encoder, image, _mask(mask, len(image)))
        negative = reading.no_image(adapter, encoder, positive, BLACK)
        if adapter.spec.projection.image == "pooled":
            negative = to_count(negative, len(positive))
        return io.NodeOutput(weight * positive, negative)


class CombineEmbeds(io.ComfyNode):
    """Features of several pictures -> one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterCombineEmbeds",
            "IPAdapter Combine Embeds",
            CATEGORY,
            "Image Reference and Encode References",
            inputs=[
                EmbedsType.Input("embed1"),
                Choice("method", options=list(COMBINE_ALL)),
                *(EmbedsType.Input(f"embed{number}", optional=True) for number in range(2, 6)),
            ],
            outputs=[EmbedsType.Output("EMBEDS")],
        )

    @classmethod
    def execute(
        cls,
        embed1: Any,
        method: Combine,
        embed2: Any = None,
        embed3: Any = None,
        embed4: Any = None,
        embed5: Any = None,
    ) -> io.NodeOutput:
        """Combine what is connected."""
        given = [one for one in (embed1, embed2, embed3, embed4, embed5) if one is not None]
        return io.NodeOutput(combine(library.together(given), method))


class SaveEmbeds(io.ComfyNode):
    """Features -> file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterSaveEmbeds",
            "IPAdapter Save Embeds",
            CATEGORY,
            "Save Image Prompt",
            inputs=[
                EmbedsType.Input("embeds"),
                io.String.Input("filename_prefix", default="IP_embeds", multiline=None),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeds: Any, filename_prefix: str) -> io.NodeOutput:
        """Write the file."""
        path = host.new_file(filename_prefix)
        library.save(embeds, path)
        return io.NodeOutput(ui={"text": [path.name]})


class LoadEmbeds(io.ComfyNode):
    """File -> features."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterLoadEmbeds",
            "IPAdapter Load Embeds",
            CATEGORY,
            "Load Image Prompt",
            inputs=[Choice("embeds", options=host.names())],
            outputs=[EmbedsType.Output("EMBEDS")],
        )

    @classmethod
    def validate_inputs(cls, embeds: str) -> bool | str:
        """Say where the file was looked for when it is not there."""
        try:
            host.find(embeds)
        except IPAdapterError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, embeds: str) -> str:
        """Load again when the file changed."""
        return host.stamp(embeds)

    @classmethod
    def execute(cls, embeds: str) -> io.NodeOutput:
        """Read the file."""
        return io.NodeOutput(library.load(host.find(embeds)))


def _apply_inputs() -> list[Any]:
    return [
        model_in(),
        adapter_in(),
        EmbedsType.Input("pos_embed"),
        weight_in(3),
        weight_type_in(),
        *window_in(),
        scaling_in(),
        EmbedsType.Input("neg_embed", optional=True),
        mask_in(),
        encoder_in(),
    ]


class ApplyEmbeds(io.ComfyNode):
    """MODEL and features -> MODEL."""

    BY_FRAME = False

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterEmbeds",
            "IPAdapter Embeds",
            CATEGORY,
            "Image Prompt From Embeds and Apply IP-Adapter",
            inputs=_apply_inputs(),
            outputs=[model_out("MODEL")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        pos_embed: Any,
        weight: Weight,
        weight_type: str,
        start_at: float,
        end_at: float,
        embeds_scaling: Scaling,
        neg_embed: Any = None,
        attn_mask: Any = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Project and apply."""
        adapter = adapters.require(ipadapter)
        positive, negative = library.split(pos_embed, adapter.spec)
        if neg_embed is not None:
            negative = to_count(
                library.check(neg_embed, adapter.spec, "negative embeds"), len(positive)
            )
        prompt = host.encode(
            adapter,
            clip_vision,
            positive,
            negative=negative,
            by_frame=cls.BY_FRAME,
            unconditional=BLACK,
        )
        strength = Strength(
            weight=weight,
            kind=weight_type,
            start_at=start_at,
            end_at=end_at,
            mask=attn_mask,
            scaling=embeds_scaling,
            by_frame=cls.BY_FRAME,
        )
        return io.NodeOutput(apply(model, adapter, prompt, strength))


class ApplyEmbedsBatch(ApplyEmbeds):
    """MODEL and features of a picture for each frame -> MODEL."""

    BY_FRAME = True

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterEmbedsBatch",
            "IPAdapter Embeds Batch",
            CATEGORY,
            "Image Prompt From Embeds and Apply IP-Adapter",
            inputs=_apply_inputs(),
            outputs=[model_out("MODEL")],
        )


def _mask(mask: Any, count: int) -> Any:
    if not bool((mask != 0).any()):
        log.warning(
            "IP-Adapter: the mask of IPAdapter Encoder is 0 everywhere, as Load Image gives it for "
            "a picture without transparency, so nothing of the picture counts"
        )
    if mask.ndim == 3 and len(mask) not in (1, count):
        log.warning(
            "IP-Adapter: IPAdapter Encoder got %d masks for %d pictures; needed is one, or one for "
            "each",
            *(len(mask), count),
        )
        return to_count(mask, count)
    return mask


NODES: list[type[io.ComfyNode]] = [
    Encoder,
    CombineEmbeds,
    SaveEmbeds,
    LoadEmbeds,
    ApplyEmbeds,
    ApplyEmbedsBatch,
]
