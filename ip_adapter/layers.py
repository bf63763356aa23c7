"""The cross-attention layers of each base model: checkpoint number <-> block address.

A published adapter numbers its key/value pairs by the position of the attention processor in
diffusers' enumeration (down blocks, up blocks, middle block last; self-attention even,
cross-attention odd). ComfyUI addresses the same layers as ``(block, number, depth)`` and runs the
middle block between the two halves. These tables are the only place that knows both.

Source: diffusers ``UNet2DConditionModel.attn_processors`` of the published configurations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Block = Literal["input", "middle", "output"]
Address = tuple[Block, int, int]


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One cross-attention layer of a UNet.

    Attributes:
        index: The number in the checkpoint's keys, ``{index}.to_k_ip.weight``; always odd.
        address: ``(block, number, depth)`` in the original UNet layout that ComfyUI keeps.
        diffusers: The path of the transformer block that holds the layer in diffusers.
    """

    index: int
    address: Address
    diffusers: str


@dataclass(frozen=True)
class Family:
    """A base model family that adapters are made for.

    Attributes:
        name: What users call it.
        context_width: Width of the text tokens, and so of the image tokens.
        layers: Its cross-attention layers in checkpoint order.
    """

    name: str
    context_width: int
    layers: tuple[CrossAttentionLayer, ...]


def _table(rows: list[tuple[Block, int, str]]) -> tuple[CrossAttentionLayer, ...]:
    return tuple(
        CrossAttentionLayer(2 * position + 1, (block, number, 0), f"{path}.transformer_blocks.0")
        for position, (block, number, path) in enumerate(rows)
    )


SD15 = Family(
    name="SD 1.5",
    context_width=768,
    layers=_table(
        [
            ("input", 1, "down_blocks.0.attentions.0"),
            ("input", 2, "down_blocks.0.attentions.1"),
            ("input", 4, "down_blocks.1.attentions.0"),
            ("input", 5, "down_blocks.1.attentions.1"),
            ("input", 7, "down_blocks.2.attentions.0"),
            ("input", 8, "down_blocks.2.attentions.1"),
            ("output", 3, "up_blocks.1.attentions.0"),
            ("output", 4, "up_blocks.1.attentions.1"),
            ("output", 5, "up_blocks.1.attentions.2"),
            ("output", 6, "up_blocks.2.attentions.0"),
            ("output", 7, "up_blocks.2.attentions.1"),
            ("output", 8, "up_blocks.2.attentions.2"),
            ("output", 9, "up_blocks.3.attentions.0"),
            ("output", 10, "up_blocks.3.attentions.1"),
            ("output", 11, "up_blocks.3.attentions.2"),
            ("middle", 0, "mid_block.attentions.0"),
        ]
    ),
)

FAMILIES: tuple[Family, ...] = (SD15,)
"""The families an adapter can be applied to, told apart by ``(context_width, layer count)``."""

_OTHER_NAMES = {(1024, 16): "SD 2.x", (2048, 70): "SDXL"}


def find_family(context_width: int, layer_count: int) -> Family | None:
    """Return the supported family with this signature, or None."""
    for family in FAMILIES:
        if (family.context_width, len(family.layers)) == (context_width, layer_count):
            return family
    return None


def family_name(context_width: int, layer_count: int) -> str:
    """Name a family from its signature, supported or not, for messages."""
    family = find_family(context_width, layer_count)
    if family is not None:
        return family.name
    known = _OTHER_NAMES.get((context_width, layer_count))
    if known is not None:
        return known
    return f"an unknown family ({layer_count} cross-attention layers, context {context_width})"
