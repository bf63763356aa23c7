"""Nodes for embeds: features of the image encoder on a socket of their own."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .. import images
from ..host import adapters, reading
from ..host import embeds as host
from ..host.features import schema, show_on_node
from ..references import COMBINATIONS, Combine
from .common import CATEGORY, EmbedsType, IPAdapterType, fit_input, image_prompt_output
from .prompts import BATCHES


class EncodeEmbeds(io.ComfyNode):
    """Reference images -> EMBEDS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptEmbeds",
            display_name="Encode to Embeds",
            category=CATEGORY,
            description=(
                "Encodes reference images to the features that an adapter reads, before its "
                "projection. Other nodes can save, combine or change these; any adapter that was "
                "trained with the same image encoder reads them. Without such nodes in between, "
                "Encode Image Prompt does the same in one step."
            ),
            search_aliases=["ip adapter encoder", "image embeds", "clip vision features"],
            inputs=[
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter decides which features are read."
                ),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder the adapter was trained with."
                ),
                io.Image.Input(
                    "image",
                    tooltip="The reference, or a batch of them. Transparent parts say nothing.",
                ),
                fit_input("For pictures that are not square: see Encode Image Prompt."),
            ],
            outputs=[
                EmbedsType.Output(
                    "embeds",
                    display_name="embeds",
                    tooltip="One row per reference; for Image Prompt From Embeds, or nodes of "
                    "other packs.",
                ),
                EmbedsType.Output(
                    "negative",
                    display_name="negative",
                    tooltip="The features of 'no image', as in the adapter's training.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, ip_adapter: Any, clip_vision: Any, image: Any, fit: images.Fit
    ) -> io.NodeOutput:
        """Encode the references and the empty picture."""
        adapter = adapters.require(ip_adapter)
        found = reading.read(adapter, clip_vision, image, fit)
        nothing = reading.no_image(adapter, clip_vision, found, "as trained")
        show_on_node(f"embeds {list(found.shape)}")
        return io.NodeOutput(found, nothing)


class FromEmbeds(io.ComfyNode):
    """EMBEDS -> IMAGE_PROMPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptFromEmbeds",
            display_name="Image Prompt From Embeds",
            category=CATEGORY,
            description=(
                "Makes an image prompt of features that were encoded before: by Encode to Embeds, "
                "by IPAdapter Encoder, or loaded from an .ipadpt file. Features of another image "
                "encoder than the adapter's are refused."
            ),
            search_aliases=["image embeds", "ipadpt", "ip adapter embeds", "load embeds"],
            inputs=[
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter that the prompt will be applied with."
                ),
                EmbedsType.Input(
                    "embeds",
                    tooltip="Features of one or several references; for adapters that read only a "
                    "face, its vectors.",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINATIONS),
                    default="concat",
                    tooltip="How several references become one: see Encode References. Not used "
                    "for one per frame.",
                ),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default=BATCHES[0],
                    tooltip="What several references mean. together: all of them for every "
                    "picture. one per frame: the first for the first picture of the latent batch, "
                    "and so on; the last one serves the rest.",
                ),
                EmbedsType.Input(
                    "negative",
                    optional=True,
                    tooltip="Features of what to lead away from; 'no image' without it.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Encodes 'no image' for the plus adapters where negative is not "
                    "connected; the one that was loaded with the adapter serves, too.",
                ),
            ],
            outputs=[image_prompt_output("For Apply IP-Adapter, Join and Save Image Prompt.")],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: Any,
        embeds: Any,
        combine: Combine,
        batch: str,
        negative: Any = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Check and project the features."""
        made = host.encode(
            adapters.require(ip_adapter),
            clip_vision,
            embeds,
            negative=negative,
            how=combine,
            by_frame=batch == BATCHES[1],
        )
        frames = f" for each of {made.frames} pictures" if made.frames > 1 else ""
        show_on_node(f"{made.tokens} image tokens{frames}")
        return io.NodeOutput(made)


NODES: list[type[io.ComfyNode]] = [EncodeEmbeds, FromEmbeds]
