"""The LoRA inside FaceID files, against the companion files and diffusers' numbering."""

from __future__ import annotations

import pytest
import torch

from ip_adapter import lora
from ip_adapter.layers import FAMILIES, Family
from tests.synthetic import catalogue
from tests.synthetic.catalogue import ROWS

WITH_LORA = [name for name, row in ROWS.items() if row.has_lora]


def family_of(row: str) -> Family:
    return next(family for family in FAMILIES if family.name == ROWS[row].family)


@pytest.mark.parametrize("row", WITH_LORA)
def test_it_gets_the_companion_files_names(row: str) -> None:
    tensors = catalogue.hollow(catalogue.layout(ROWS[row]))
    expected = catalogue.companion(ROWS[row], tensors)
    found = lora.to_kohya(tensors, family_of(row))
    assert set(found) == {key for key in expected if not key.endswith(".alpha")}
    assert all(found[key].shape == expected[key].shape for key in found)


@pytest.mark.parametrize("row", WITH_LORA)
def test_what_is_expected_is_what_is_published(row: str) -> None:
    shapes = catalogue.layout(ROWS[row])
    published = {key: shape for key, shape in shapes.items() if lora.is_lora(key)}
    assert lora.rank(shapes) == 128
    assert lora.expected(family_of(row), catalogue.widths(ROWS[row].family), 128) == published


def test_adapters_without_one_have_no_rank() -> None:
    assert lora.rank(catalogue.layout(ROWS["portrait_sd15"])) is None
    assert lora.to_kohya({"ip_adapter.1.to_k_ip.weight": torch.zeros(1)}, FAMILIES[0]) == {}


@pytest.mark.parametrize("number", [0, 1, 17, 30, 31])
def test_numbers_are_diffusers_processors(number: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768
        )
    processor = list(unet.attn_processors)[number]  # down_blocks...attn1.processor
    path = processor.removesuffix(".processor").replace(".", "_")
    for part, module in (("q", "to_q"), ("out", "to_out_0")):
        key = f"ip_adapter.{number}.to_{part}_lora.down.weight"
        (name,) = lora.to_kohya({key: None}, FAMILIES[0])
        assert name == f"lora_unet_{path}_{module}.lora_down.weight"
