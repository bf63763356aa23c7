"""The layer table against diffusers, which numbers its attention processors in that order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ip_adapter import layers
from tests.synthetic.adapters import SD15_WIDTHS

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
"""The published unet/config.json of SDXL, where it concerns the blocks."""

CONFIGS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    "SD 2.x": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
    },
    "SDXL": SDXL,
    "Kolors": SDXL,
    "Miniature": {  # 64 channels at both levels, one block each
        "block_out_channels": (64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 128,
    },
}
WIDTHS = {
    "SD 1.5": SD15_WIDTHS,
    "SD 2.x": SD15_WIDTHS,
    # four of 640, then fifty, six of 640, and the ten of the middle block
    "SDXL": (640,) * 4 + (1280,) * 50 + (640,) * 6 + (1280,) * 10,
    "Kolors": (640,) * 4 + (1280,) * 50 + (640,) * 6 + (1280,) * 10,
    "Miniature": (64,) * 7,
}

SD_ORDER = ((1,), (3,), (5,), (7,), (9,), (11,), (31,), (13,), (15,), (17,), (19,), (21,), (23,),
            (25,), (27,), (29,))  # fmt: skip
SDXL_ORDER = (
    (1, 3),
    (5, 7),
    (9, 11, 13, 15, 17, 19, 21, 23, 25, 27),
    (29, 31, 33, 35, 37, 39, 41, 43, 45, 47),
    (121, 123, 125, 127, 129, 131, 133, 135, 137, 139),  # the middle block, last in the files
    (49, 51, 53, 55, 57, 59, 61, 63, 65, 67),
    (69, 71, 73, 75, 77, 79, 81, 83, 85, 87),
    (89, 91, 93, 95, 97, 99, 101, 103, 105, 107),
    (109, 111),
    (113, 115),
    (117, 119),
)
MINIATURE_ORDER = ((1,), (3,), (13,), (5,), (7,), (9,), (11,))


@pytest.mark.parametrize("family", layers.FAMILIES, ids=lambda family: family.name)
def test_table_follows_diffusers(family: layers.Family) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[family.name])
    processors = list(unet.attn_processors)
    for layer in family.layers:
        assert processors[layer.index] == f"{layer.diffusers}.attn2.processor"
        assert processors[layer.index - 1] == f"{layer.diffusers}.attn1.processor"
    assert len(processors) == 2 * len(family.layers)

    modules = dict(unet.named_modules())
    attentions = [modules[f"{layer.diffusers}.attn2"] for layer in family.layers]
    assert tuple(one.to_q.out_features for one in attentions) == WIDTHS[family.name]
    assert {one.to_k.in_features for one in attentions} == {family.context_width}


def test_addresses_are_unique() -> None:
    for family in layers.FAMILIES:
        assert len({layer.address for layer in family.layers}) == len(family.layers)


@pytest.mark.parametrize("family", layers.FAMILIES, ids=lambda family: family.name)
def test_transformers_are_in_the_order_in_which_they_run(family: layers.Family) -> None:
    orders = {"SDXL": SDXL_ORDER, "Kolors": SDXL_ORDER, "Miniature": MINIATURE_ORDER}
    assert layers.transformers(family) == orders.get(family.name, SD_ORDER)


def test_users_are_told_of_published_families_only() -> None:
    assert [family.name for family in layers.PUBLIC] == ["SD 1.5", "SD 2.x", "SDXL", "Kolors"]
    assert set(layers.FAMILIES) - set(layers.PUBLIC) == {layers.MINIATURE}


def test_families_are_named_from_their_signature() -> None:
    assert layers.find_families(768, 16) == (layers.SD15,)
    assert layers.find_families(2048, 70) == (layers.SDXL, layers.KOLORS)
    assert layers.find_families(2048, 69) == ()
    assert layers.family_name(2048, 70) == "SDXL or Kolors"
    assert layers.family_name(1024, 16) == "SD 2.x"
    assert layers.find_families(128, 7) == (layers.MINIATURE,)
    assert layers.family_name(5, 7) == "an unknown family (7 cross-attention layers, context 5)"
