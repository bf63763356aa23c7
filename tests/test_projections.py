"""Projections against the formulas, on small sizes; tests/parity has the published ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_adapter.projections import ImageProjModel, Resampler, build_projection
from ip_adapter.spec import LinearProjection, ResamplerProjection
from tests.tolerance import assert_close

LINEAR = LinearProjection(features=6, tokens=3, width=8)
RESAMPLER = ResamplerProjection(
    features=10, tokens=3, inner=12, heads=2, depth=2, hidden=20, width=8
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def shuffle(module: nn.Module) -> dict[str, Tensor]:
    """Random values everywhere, norms included, so that no term of a formula can hide."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return {key: value.double() for key, value in module.state_dict().items()}


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[
        f"{name}.bias"
    ]


def test_linear_projection_is_the_formula() -> None:
    module = build_projection(LINEAR, nn)
    weights = shuffle(module)
    features = torch.randn(2, 6)
    flat = features.double() @ weights["proj.weight"].T + weights["proj.bias"]
    tokens = torch.stack([flat[:, 8 * t : 8 * t + 8] for t in range(3)], dim=1)
    assert_close(module(features), norm(tokens, weights, "norm").float())


def test_resampler_is_the_formula() -> None:
    module = build_projection(RESAMPLER, nn)
    w = shuffle(module)
    features = torch.randn(2, 5, 10)
    x = features.double() @ w["proj_in.weight"].T + w["proj_in.bias"]
    latents = w["latents"].expand(2, -1, -1)
    for i in range(2):
        seen, asking = norm(x, w, f"layers.{i}.0.norm1"), norm(latents, w, f"layers.{i}.0.norm2")
        query = asking @ w[f"layers.{i}.0.to_q.weight"].T
        both = torch.cat([seen, asking], dim=1) @ w[f"layers.{i}.0.to_kv.weight"].T
        key, value = both[..., :128], both[..., 128:]  # two heads of 64
        heads = []
        for cut in (slice(0, 64), slice(64, 128)):
            scores = query[..., cut] @ key[..., cut].transpose(1, 2) / math.sqrt(64)
            heads.append(scores.softmax(-1) @ value[..., cut])
        latents = latents + torch.cat(heads, -1) @ w[f"layers.{i}.0.to_out.weight"].T
        inner = norm(latents, w, f"layers.{i}.1.0") @ w[f"layers.{i}.1.1.weight"].T
        latents = latents + F.gelu(inner) @ w[f"layers.{i}.1.3.weight"].T
    expected = norm(latents @ w["proj_out.weight"].T + w["proj_out.bias"], w, "norm_out")
    assert_close(module(features), expected.float(), relative=1e-4)


def test_spec_decides_the_module() -> None:
    assert isinstance(build_projection(LINEAR, nn), ImageProjModel)
    assert isinstance(build_projection(RESAMPLER, nn), Resampler)
    with pytest.raises(TypeError, match="unsupported projection"):
        build_projection("plus", nn)  # type: ignore[arg-type]
