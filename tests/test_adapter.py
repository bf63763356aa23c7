from __future__ import annotations

import torch

from ip_adapter import spec
from ip_adapter.adapter import IPAdapter
from ip_adapter.layers import SD15
from tests.synthetic import adapters

SPEC = spec.AdapterSpec(SD15, spec.LinearProjection(1024, 4, 768), adapters.SD15_WIDTHS)


def test_state_dict_has_the_published_keys_and_shapes() -> None:
    module = IPAdapter(SPEC, device="meta")
    published = {key: value.shape for key, value in adapters.base_sd15().items()}
    assert {key: value.shape for key, value in module.state_dict().items()} == published


def test_the_paper_counts_22_million_parameters() -> None:
    module = IPAdapter(SPEC, device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == 22_319_616


def test_keys_and_values_are_the_projected_tokens_in_checkpoint_order() -> None:
    small = spec.AdapterSpec(SD15, SPEC.projection, tuple(range(8, 24)))
    module = IPAdapter(small)
    tokens = torch.randn(2, 4, 768)
    found = list(module.keys_values(tokens))
    assert [layer.index for layer, _, _ in found] == list(range(1, 32, 2))
    weights = module.state_dict()
    for layer, key, value in found:
        to_k = weights[f"ip_adapter.{layer.index}.to_k_ip.weight"]
        to_v = weights[f"ip_adapter.{layer.index}.to_v_ip.weight"]
        torch.testing.assert_close(key, torch.einsum("btd,cd->btc", tokens, to_k))
        torch.testing.assert_close(value, torch.einsum("btd,cd->btc", tokens, to_v))


def test_a_spec_says_what_it_is() -> None:
    assert SPEC.describe() == "global for SD 1.5, 4 tokens, needs OpenCLIP ViT-H/14"
    odd = spec.AdapterSpec(SD15, spec.LinearProjection(999, 4, 768), adapters.SD15_WIDTHS)
    assert odd.encoder is None and "features of width 999" in odd.describe()


def test_encoders_are_named_from_both_widths() -> None:
    """1280 is ViT-H's hidden and bigG's pooled width; only the pair tells them apart."""
    assert spec.encoder_of(1280, 1024).name == "OpenCLIP ViT-H/14"
    assert spec.encoder_of(1664, 1280).name == "OpenCLIP ViT-bigG/14"
    assert "hidden width 1280" in spec.encoder_of(1280, 1280).name
    base = spec.AdapterSpec(SD15, spec.LinearProjection(1280, 4, 768), adapters.SD15_WIDTHS)
    assert base.encoder is spec.VIT_BIGG
