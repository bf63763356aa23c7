"""The cross-attention layers of each base model: checkpoint number <-> block address.

A published adapter numbers its key/value pairs by the position of the attention processor in
diffusers' enumeration (down blocks, up blocks, middle block last; self-attention even,
cross-attention odd). ComfyUI addresses the same layers as ``(block, number, depth)`` and runs the
middle block between the two halves. These tables are the only place that knows both.

Source: diffusers ``UNet2DConditionModel.attn_processors`` of the published configurations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Block = Literal["input", "middle", "output"]
"""The halves of the UNet and what is between them, in the order in which they run."""

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


def _table(rows: list[tuple[Block, int, str, int]]) -> tuple[CrossAttentionLayer, ...]:
    """Number the layers of some blocks, each given with its count of transformer blocks."""
    places = [
        ((block, number, depth), f"{path}.transformer_blocks.{depth}")
        for block, number, path, count in rows
        for depth in range(count)
    ]
    return tuple(
        CrossAttentionLayer(2 * position + 1, address, path)
        for position, (address, path) in enumerate(places)
    )


_SD_LAYERS = _table(
    [
        ("input", 1, "down_blocks.0.attentions.0", 1),
        ("input", 2, "down_blocks.0.attentions.1", 1),
        ("input", 4, "down_blocks.1.attentions.0", 1),
        ("input", 5, "down_blocks.1.attentions.1", 1),
        ("input", 7, "down_blocks.2.attentions.0", 1),
        ("input", 8, "down_blocks.2.attentions.1", 1),
        ("output", 3, "up_blocks.1.attentions.0", 1),
        ("output", 4, "up_blocks.1.attentions.1", 1),
        ("output", 5, "up_blocks.1.attentions.2", 1),
        ("output", 6, "up_blocks.2.attentions.0", 1),
        ("output", 7, "up_blocks.2.attentions.1", 1),
        ("output", 8, "up_blocks.2.attentions.2", 1),
        ("output", 9, "up_blocks.3.attentions.0", 1),
        ("output", 10, "up_blocks.3.attentions.1", 1),
        ("output", 11, "up_blocks.3.attentions.2", 1),
        ("middle", 0, "mid_block.attentions.0", 1),
    ]
)

_SDXL_LAYERS = _table(
    [
        ("input", 4, "down_blocks.1.attentions.0", 2),
        ("input", 5, "down_blocks.1.attentions.1", 2),
        ("input", 7, "down_blocks.2.attentions.0", 10),
        ("input", 8, "down_blocks.2.attentions.1", 10),
        ("output", 0, "up_blocks.0.attentions.0", 10),
        ("output", 1, "up_blocks.0.attentions.1", 10),
        ("output", 2, "up_blocks.0.attentions.2", 10),
        ("output", 3, "up_blocks.1.attentions.0", 2),
        ("output", 4, "up_blocks.1.attentions.1", 2),
        ("output", 5, "up_blocks.1.attentions.2", 2),
        ("middle", 0, "mid_block.attentions.0", 10),
    ]
)

_MINIATURE_LAYERS = _table(
    [
        ("input", 1, "down_blocks.0.attentions.0", 1),
        ("input", 3, "down_blocks.1.attentions.0", 1),
        ("output", 0, "up_blocks.0.attentions.0", 1),
        ("output", 1, "up_blocks.0.attentions.1", 1),
        ("output", 2, "up_blocks.1.attentions.0", 1),
        ("output", 3, "up_blocks.1.attentions.1", 1),
        ("middle", 0, "mid_block.attentions.0", 1),
    ]
)

SD15 = Family("SD 1.5", context_width=768, layers=_SD_LAYERS)
SD2 = Family("SD 2.x", context_width=1024, layers=_SD_LAYERS)
SDXL = Family("SDXL", context_width=2048, layers=_SDXL_LAYERS)
KOLORS = Family("Kolors", context_width=2048, layers=_SDXL_LAYERS)
"""SDXL's UNet, trained with other text states; its adapters do not serve SDXL, nor the reverse."""

MINIATURE = Family("Miniature", context_width=128, layers=_MINIATURE_LAYERS)
"""The project's own family of pocket size, in ``miniature/``: for the demo and as evidence.

It paints coloured shapes of 64 pixels. Its adapters are trained by the project, and no user has to
know it.
"""

PUBLIC: tuple[Family, ...] = (SD15, SD2, SDXL, KOLORS)
"""The families whose base models are published; what messages name."""

FAMILIES: tuple[Family, ...] = (*PUBLIC, MINIATURE)
"""Every family of UNets that adapters are made for."""


def transformers(family: Family) -> tuple[tuple[int, ...], ...]:
    """The layers of each spatial transformer, in the order in which the UNet runs them.

    A transformer's place in this order is what users number layers by; unlike the checkpoint's
    numbers it has the middle block in the middle.

    Args:
        family: Whose UNet.

    Returns:
        For each transformer the `CrossAttentionLayer.index` of its layers, from the input blocks
        over the middle to the output blocks: 16 for SD 1.5 and 2.x, 11 for SDXL and Kolors, 7
        for the miniature.
    """
    found: dict[tuple[Block, int], list[int]] = {}
    for layer in sorted(family.layers, key=lambda layer: get_args(Block).index(layer.address[0])):
        found.setdefault(layer.address[:2], []).append(layer.index)
    return tuple(tuple(numbers) for numbers in found.values())


def find_families(context_width: int, layer_count: int) -> tuple[Family, ...]:
    """Return the families with this signature; SDXL and Kolors share one."""
    return tuple(
        family
        for family in FAMILIES
        if (family.context_width, len(family.layers)) == (context_width, layer_count)
    )


def family_name(context_width: int, layer_count: int) -> str:
    """Name what has this signature, for messages."""
    found = find_families(context_width, layer_count)
    if found:
        return " or ".join(family.name for family in found)
    return f"an unknown family ({layer_count} cross-attention layers, context {context_width})"
