"""The LoRA that FaceID adapters were trained together with.

It sits in every attention layer, self and cross, and is published twice: inside the adapter's file
under the number of the attention processor (even: self-attention, odd: the cross-attention of the
same block), and as a companion file under kohya's names. Both become kohya's names here, which
every LoRA loader knows. There is no alpha: the scale is 1.

Source: h94/IP-Adapter-FaceID, rank 128.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from .layers import CrossAttentionLayer, Family

T = TypeVar("T")

Shapes = Mapping[str, tuple[int, ...]]

_KEY = re.compile(r"ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def rank(shapes: Shapes) -> int | None:
    """The rank of the LoRA that an adapter's tensors hold, or None."""
    downs = (s[0] for k, s in shapes.items() if (m := _KEY.fullmatch(k)) and m[3] == "down" and s)
    return next(downs, None)


def expected(family: Family, widths: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """Shape of every LoRA tensor of a family.

    Args:
        family: Whose layers.
        widths: Width C of each, in the order of `Family.layers`.
        rank: Rank of the LoRA.
    """
    out: dict[str, tuple[int, ...]] = {}
    for layer, width in zip(family.layers, widths, strict=True):
        for number, context in ((layer.index - 1, width), (layer.index, family.context_width)):
            for part, read in (("q", width), ("k", context), ("v", context), ("out", width)):
                stem = f"ip_adapter.{number}.to_{part}_lora."
                out[stem + "down.weight"] = (rank, read)
                out[stem + "up.weight"] = (width, rank)
    return out


def is_lora(key: str) -> bool:
    """Whether a flat key of an adapter's file belongs to the LoRA."""
    return _KEY.fullmatch(key) is not None


def to_kohya(tensors: Mapping[str, T], family: Family) -> dict[str, T]:
    """Rename the LoRA inside an adapter's file to the names of its companion file.

    Args:
        tensors: Flat keys of the adapter's file; others than LoRA keys are left out.
        family: Whose layers the numbers mean.
    """
    blocks = dict(_blocks(family))
    out = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            number, part, side = match.groups()
            module = "to_out_0" if part == "out" else f"to_{part}"
            out[f"lora_unet_{blocks[int(number)]}_{module}.lora_{side}.weight"] = tensor
    return out


def _blocks(family: Family) -> Iterator[tuple[int, str]]:
    """The number of each attention processor, and kohya's name of its module."""
    layer: CrossAttentionLayer
    for layer in family.layers:
        path = layer.diffusers.replace(".", "_")
        yield layer.index - 1, f"{path}_attn1"
        yield layer.index, f"{path}_attn2"
