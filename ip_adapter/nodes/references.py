"""Nodes for several references, each with its own weight, mask and role."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .. import images
from ..host import adapters, encoding
from ..host.features import schema, show_on_node
from ..references import (
    COMBINATIONS,
    UNCONDITIONALS,
    Combine,
    Reference,
    Unconditional,
    masked,
)
from .common import (
    CATEGORY,
    IPAdapterType,
    ReferencesType,
    fit_input,
    image_prompt_output,
    image_size_input,
    unconditional_input,
)

ROLES = ("positive", "negative")


class AddReference(io.ComfyNode):
    """A picture and how it counts -> IMAGE_REFERENCES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptReference",
            display_name="Image Reference",
            category=CATEGORY,
            description=(
                "One reference of several, with a weight, a mask and a role of its own. Chain them "
                "by 'references'; the pictures may have different sizes."
            ),
            search_aliases=["multiple references", "negative image", "image weight", "ip adapter"],
            inputs=[
                io.Image.Input("image", tooltip="The picture; a batch shares what is set here."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-2.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Factor of what the encoder sees in it, before they are combined.",
                ),
                fit_input("For pictures that are not square: see Encode Image Prompt."),
                io.Combo.Input(
                    "role",
                    options=list(ROLES),
                    default="positive",
                    tooltip="positive: make it like this. negative: away from this; it stands for "
                    "'no image' on the negative side and needs a CFG above 1.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The part of the picture that counts; the rest says nothing.",
                ),
                ReferencesType.Input(
                    "references", optional=True, tooltip="The references before this one."
                ),
            ],
            outputs=[
                ReferencesType.Output(
                    "references",
                    display_name="references",
                    tooltip="For Encode References, or the next Image Reference.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Any,
        weight: float,
        fit: images.Fit,
        role: str,
        mask: Any = None,
        references: tuple[Reference, ...] = (),
    ) -> io.NodeOutput:
        """Add it to those before it."""
        images.check(image)
        seen = image if mask is None else masked(image, mask)
        added = Reference(seen, weight, fit, is_negative=role == "negative")
        return io.NodeOutput((*(references or ()), added))


class EncodeReferences(io.ComfyNode):
    """IMAGE_REFERENCES -> IMAGE_PROMPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptEncodeReferences",
            display_name="Encode References",
            category=CATEGORY,
            description=(
                "Encodes several references to one image prompt: side by side, or mixed to one. "
                "Without negative ones it leads away from no image, as adapters were trained."
            ),
            search_aliases=["combine embeds", "average images", "multiple references"],
            inputs=[
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter that the prompt will be applied with."
                ),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder the adapter was trained with."
                ),
                ReferencesType.Input("references", tooltip="From Image Reference."),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINATIONS),
                    default="concat",
                    tooltip="concat: side by side, each with tokens of its own. average, norm "
                    "average, add: mixed to one. subtract: the first without the others. max, min: "
                    "number by number.",
                ),
                image_size_input(
                    "Side of the square that the encoder sees, in pixels; 0 is its own."
                ),
                unconditional_input(),
            ],
            outputs=[image_prompt_output("For Apply IP-Adapter.")],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: Any,
        clip_vision: Any,
        references: tuple[Reference, ...],
        combine: Combine,
        image_size: int = 0,
        unconditional: Unconditional = UNCONDITIONALS[0],
    ) -> io.NodeOutput:
        """Encode the references."""
        adapter = adapters.require(ip_adapter)
        encoded = encoding.encode_references(
            adapter,
            clip_vision,
            references,
            combine,
            image_size or None,
            unconditional=unconditional,
        )
        show_on_node(f"{encoded.tokens} image tokens of {len(references)} references")
        return io.NodeOutput(encoded)


NODES: list[type[io.ComfyNode]] = [AddReference, EncodeReferences]
