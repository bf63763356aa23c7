"""The node that shows what an image encoder sees."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .. import images
from ..host import adapters, viewing
from ..host.features import schema, show_on_node
from .common import CATEGORY, IPAdapterType, fit_input, image_size_input

SHOWN = 16
"""Squares that the node shows at most; the output has all of them."""


class Preview(io.ComfyNode):
    """A reference -> the squares that the encoder reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptPreview",
            display_name="Preview Encoder View",
            category=CATEGORY,
            description=(
                "Shows what the image encoder really sees of a reference: how it is cropped, "
                "padded, tiled and scaled, and what a mask hides. With the same settings, an "
                "encode node reads exactly these squares."
            ),
            search_aliases=["preview crop", "clip vision preview", "what clip sees", "tiles"],
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder; it sets the size of the squares."
                ),
                io.Image.Input(
                    "image",
                    tooltip="The reference, or a batch of them. Transparent parts say nothing.",
                ),
                fit_input("For pictures that are not square: see Encode Image Prompt."),
                image_size_input(
                    "Side of the square that the encoder sees, in pixels; 0 is its own."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The part of the picture that counts, as in Image Reference; the rest "
                    "is filled with the colour that says nothing.",
                ),
                IPAdapterType.Input(
                    "ip_adapter",
                    optional=True,
                    tooltip="The adapter, to see that the encoder is the one it was trained with.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The squares, those of one picture side by side.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        clip_vision: Any,
        image: Any,
        fit: images.Fit,
        image_size: int = 0,
        mask: Any = None,
        ip_adapter: Any = None,
    ) -> io.NodeOutput:
        """Cut the squares."""
        adapter = None if ip_adapter is None else adapters.require(ip_adapter)
        squares, words = viewing.view(
            clip_vision, image, fit, image_size or None, mask=mask, adapter=adapter
        )
        show_on_node(words)
        return io.NodeOutput(squares, ui=ui.PreviewImage(squares[:SHOWN]))


NODES: list[type[io.ComfyNode]] = [Preview]
