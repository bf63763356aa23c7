"""Weights per block against diffusers: its own expansion, on a UNet with an adapter loaded."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from ip_adapter import layers, presets
from tests.parity import reference, unets
from tests.synthetic import adapters, catalogue

pytestmark = pytest.mark.parity

SD: list[reference.Scale] = [
    0.7,
    {"down": {"block_2": [0.25, 1.0]}},
    {"down": {"block_0": 0.1, "block_1": [0.2, 0.3]}, "mid": 0.4, "up": {"block_3": [5, 6, 7]}},
    {"down": 0.5, "up": [0.1, 0.2, 0.3], "mid": [-1.0]},
    {"up": {"block_1": [2.0], "block_2": -0.5}},
]
SDXL: list[reference.Scale] = [
    0.7,
    {"up": {"block_0": [0.0, 1.0, 0.0]}},
    {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
    {"down": {"block_1": [0.1, 0.2]}, "mid": 0.3, "up": {"block_0": 0.4, "block_1": [5, 6, 7]}},
    {"down": 0.5, "up": [0.1, 0.2, 0.3], "mid": [-1.0]},
]


@pytest.mark.parametrize(
    ("family", "name", "cases"), [(layers.SD15, "sd15", SD), (layers.SDXL, "sdxl", SDXL)]
)
def test_scales_are_those_of_diffusers(
    family: layers.Family, name: str, cases: list[reference.Scale]
) -> None:
    import diffusers
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import IPAdapterMixin

    diffusers.logging.set_verbosity_error()  # it warns of every cast of an adapter's float16 file
    unet: Any = UNet2DConditionModel(**unets.CONFIGS[family.name] | unets.NARROW[family.name])
    tensors = adapters.make(catalogue.ROWS[name], nano=True)
    reference.load(unet, [tensors], in_place=True)
    pipeline = SimpleNamespace(unet=unet, unet_name="unet")
    for scales in cases:
        # diffusers fills in the dictionary it is given
        IPAdapterMixin.set_ip_adapter_scale(pipeline, copy.deepcopy(scales))
        expected = {
            number: processor.scale[0]
            for number, processor in enumerate(unet.attn_processors.values())
            if hasattr(processor, "scale") and processor.scale[0]
        }
        found = presets.from_scales(scales, family)
        assert {n: weight for n, weight in found.weights.items() if weight} == expected
        assert expected
