"""The layer table against diffusers, which numbers its attention processors in that order."""

from __future__ import annotations

import torch

from ip_adapter import layers
from tests.synthetic.adapters import SD15_WIDTHS


def test_sd15_table_follows_diffusers() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768
        )
    processors = list(unet.attn_processors)
    for layer in layers.SD15.layers:
        assert processors[layer.index] == f"{layer.diffusers}.attn2.processor"
    assert len(processors) == 2 * len(layers.SD15.layers)

    queries = dict(unet.named_modules())
    widths = tuple(queries[f"{la.diffusers}.attn2.to_q"].out_features for la in layers.SD15.layers)
    assert widths == SD15_WIDTHS


def test_addresses_are_unique() -> None:
    for family in layers.FAMILIES:
        assert len({layer.address for layer in family.layers}) == len(family.layers)


def test_families_are_named_from_their_signature() -> None:
    assert layers.find_family(768, 16) is layers.SD15
    assert layers.find_family(2048, 70) is None
    assert layers.family_name(2048, 70) == "SDXL"
    assert layers.family_name(1024, 16) == "SD 2.x"
    assert layers.family_name(5, 7) == "an unknown family (7 cross-attention layers, context 5)"
