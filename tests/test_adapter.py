from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ip_adapter import spec
from ip_adapter.adapter import IPAdapter
from ip_adapter.encoders import VIT_H
from ip_adapter.layers import SD15
from tests.synthetic import adapters

SPEC = spec.AdapterSpec(
    SD15, spec.LinearProjection(1024, 4, 768), adapters.SD15_WIDTHS, "base", encoder=VIT_H
)


def test_state_dict_has_the_published_keys_and_shapes() -> None:
    module = IPAdapter(SPEC, device="meta")
    published = {key: value.shape for key, value in adapters.base_sd15().items()}
    assert {key: value.shape for key, value in module.state_dict().items()} == published


def test_the_paper_counts_22_million_parameters() -> None:
    module = IPAdapter(SPEC, device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == 22_319_616


def test_keys_and_values_are_the_projected_tokens_in_checkpoint_order() -> None:
    small = spec.AdapterSpec(SD15, SPEC.projection, tuple(range(8, 24)), "base")
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


def test_only_the_asked_layers_are_computed() -> None:
    module = IPAdapter(spec.AdapterSpec(SD15, SPEC.projection, (8,) * 16, "base"))
    found = module.keys_values(torch.randn(1, 4, 768), {3, 31})
    assert [layer.index for layer, _, _ in found] == [3, 31]


def test_a_spec_says_what_it_is() -> None:
    assert SPEC.describe() == "base for SD 1.5, 4 tokens, needs OpenCLIP ViT-H/14"
    odd = replace(SPEC, projection=spec.LinearProjection(999, 4, 768), encoder=None)
    assert "features of width 999" in odd.describe()
    guessed = replace(SPEC, evidence="name", alternatives=("light", "light-v11"))
    assert guessed.describe() == (
        "base for SD 1.5, 4 tokens, needs OpenCLIP ViT-H/14 (by its file's name; light or "
        "light-v11 would have equal tensors: 'variant' in Load IP-Adapter corrects it)"
    )
    assert guessed.summary() == SPEC.describe()


def test_a_spec_says_everything_that_is_needed() -> None:
    identity = spec.FaceProjection(512, 1024, 4, 768)
    resampler = spec.ResamplerProjection(1280, 16, 768, 12, 4, 3072, 768)
    needs = {
        "a face": identity,
        "OpenCLIP ViT-H/14 and a face": spec.FacePerceiverProjection(identity, resampler, True),
        "OpenCLIP ViT-H/14 and an instruction": spec.InstructProjection(resampler, 768, 1536),
    }
    for words, projection in needs.items():
        assert replace(SPEC, projection=projection).needs == words


@pytest.mark.parametrize(
    ("features", "encoder"), [(1024, "ViT-H/14"), (1280, "ViT-bigG/14"), (768, "ViT-L/14")]
)
def test_the_encoder_follows_from_the_width(features: int, encoder: str) -> None:
    """1280 is ViT-H's hidden and bigG's pooled width: the kind of feature decides."""
    found = spec.encoder_for(spec.LinearProjection(features, 4, 768))
    assert found is not None and found.name.endswith(encoder)
    resampler = spec.ResamplerProjection(1280, 16, 768, 12, 4, 3072, 768)
    assert spec.encoder_for(resampler) == VIT_H
    assert spec.encoder_for(spec.FaceProjection(512, 1024, 4, 768)) is None
