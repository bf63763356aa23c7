"""Influence on the real host: layers, moments, regions, and the two sides of guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.conftest import Applier, Sampler
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host


@pytest.fixture(scope="session")
def influence(host: Any) -> Any:
    return host.library("ip_adapter.influence")


@pytest.fixture
def branches(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Any, Any]]:
    """Every forward pass: its noise level, its chunks and the live branches of every layer."""
    run = host.library("ip_adapter.host.run").Run
    seen: list[tuple[float, Any, Any]] = []
    original = run.live

    def spy(self: Any, chunks: Any, sigma: Tensor, device: Any) -> Any:
        live = original(self, chunks, sigma, device)
        seen.append((float(sigma[0]), chunks, live))
        return live

    monkeypatch.setattr(run, "live", spy)
    return seen


def weights_of(live: Any, usual: Any) -> dict[Any, float]:
    """The weight in the values of every layer, against those of weight 1."""
    found = {}
    for address, (branch,) in live.items():
        (plain,) = usual[address]
        assert torch.equal(branch.key, plain.key)
        found[address] = float((branch.value * plain.value).sum() / plain.value.square().sum())
    return found


def test_an_influence_of_nothing_special_changes_nothing(
    model: Any, apply: Applier, sample: Sampler, influence: Any
) -> None:
    plain = sample(apply(model, weight=0.6))
    assert torch.equal(sample(apply(model, weight=0.6, influence=influence.Influence())), plain)
    shared = influence.Influence(weight=0.5)
    assert_close(sample(apply(model, weight=1.2, influence=shared)), plain, relative=1e-5)


def test_only_the_named_layers_get_the_image(
    model: Any, apply: Applier, sample: Sampler, influence: Any, branches: Any
) -> None:
    only = influence.Influence(layers="0-1:0.5, 6:2")
    sample(apply(model), steps=1)
    _, _, usual = branches.pop()
    sample(apply(model, weight=0.4, influence=only))
    assert branches
    for _, _, live in branches:
        expected = {("input", 1, 0): 0.2, ("input", 2, 0): 0.2, ("middle", 0, 0): 0.8}
        assert weights_of(live, usual) == pytest.approx(expected)


def test_no_layer_at_all_is_the_base_model(
    model: Any, apply: Applier, sample: Sampler, influence: Any
) -> None:
    nothing = influence.Influence(layers="0:0")
    assert torch.equal(sample(apply(model, influence=nothing)), sample(model))


def test_keyframes_set_the_weight_of_every_step(
    model: Any, apply: Applier, sample: Sampler, influence: Any, branches: Any
) -> None:
    """At fraction p of the schedule the noise is the host's percent_to_sigma(p)."""
    curve = influence.parse_curve("0.1:1, 0.9:0")
    sample(apply(model), steps=1)
    _, _, usual = branches.pop()
    sample(apply(model, weight=0.5, influence=influence.Influence(curve=curve)), steps=6)
    sampling = model.get_model_object("model_sampling")
    fractions = torch.linspace(0, 1, 4001)
    levels = torch.tensor([float(sampling.percent_to_sigma(float(p))) for p in fractions])
    weights = []
    for sigma, _, live in branches:
        fraction = float(fractions[(levels - sigma).abs().argmin()])
        expected = 0.5 * min(1.0, max(0.0, (0.9 - fraction) / 0.8))
        layers = list(weights_of(live, usual).values()) or [0.0]
        assert layers == pytest.approx([layers[0]] * len(layers), abs=1e-6)
        assert abs(layers[0] - expected) < 2e-3
        weights.append(layers[0])
    assert weights == sorted(weights, reverse=True) and len(set(weights)) > 4


def test_both_windows_hold(
    model: Any, apply: Applier, sample: Sampler, influence: Any, branches: Any
) -> None:
    sampling = model.get_model_object("model_sampling")
    late = influence.Influence(start=0.3, end=1.0)
    sample(apply(model, start=0.0, end=0.7, influence=late), steps=8)
    first, last = (float(sampling.percent_to_sigma(p)) for p in (0.3, 0.7))
    found = {sigma: bool(live) for sigma, _, live in branches}
    assert found == {sigma: last <= sigma <= first for sigma in found}
    assert set(found.values()) == {True, False}


def test_windows_that_never_meet_are_nothing_and_said(
    model: Any,
    apply: Applier,
    sample: Sampler,
    influence: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    early = influence.Influence(end=0.2)
    found = sample(apply(model, start=0.6, influence=early))
    assert torch.equal(found, sample(model))
    assert "has no effect" in caplog.text


def test_masks_multiply(model: Any, apply: Applier, sample: Sampler, influence: Any) -> None:
    left, top = torch.zeros(2, 64, 64)
    left[:, :32] = 1
    top[:32] = 1
    corner = torch.zeros(64, 64)
    corner[:32, :32] = 1
    both = sample(apply(model, mask=left, influence=influence.Influence(mask=top)))
    assert torch.equal(both, sample(apply(model, mask=corner)))
    grey = influence.Influence(mask=torch.full((8, 8), 0.5))
    assert_close(
        sample(apply(model, influence=grey)), sample(apply(model, weight=0.5)), relative=1e-5
    )


def test_one_influence_serves_two_prompts(
    model: Any, apply: Applier, sample: Sampler, influence: Any
) -> None:
    """Two appliers share it, and neither changes it."""
    shared = influence.Influence(weight=0.5, layers="composition")
    both = apply(apply(model, seed=1, influence=shared), seed=2, influence=shared)
    by_hand = influence.Influence(layers=dict(shared.on(apply.adapter.spec.family).weights))
    again = apply(apply(model, seed=1, influence=by_hand), seed=2, influence=by_hand)
    assert torch.equal(sample(both), sample(again))
    assert relative_error(sample(both), sample(model)) > 1e-4


def test_opposed_layers_give_the_image_to_the_negative_side(
    model: Any, apply: Applier, sample: Sampler, influence: Any, branches: Any
) -> None:
    """Keys and values: of the image for negative rows, zeros for positive ones."""
    precise = influence.Influence(layers="style transfer precise", style_boost=0.8)
    sample(apply(model, influence=precise))
    opposed = {("input", 7, 0): 0.2, ("input", 8, 0): 0.8}  # a quarter in the first of the two
    plain_run = apply(model)
    _, chunks, live = branches[-1]
    sample(plain_run)
    _, plain_chunks, plain = branches[-1]
    assert plain_chunks == chunks and len(chunks) == 2
    positive = [chunk.is_positive for chunk in chunks].index(True)
    negative = 1 - positive
    for address, weight in opposed.items():
        (branch,), (usual,) = live[address], plain[address]
        assert not branch.key[positive].any() and not branch.value[positive].any()
        assert torch.equal(branch.key[negative], usual.key[positive])
        assert_close(branch.value[negative], weight * usual.value[positive])
    (branch,), (usual,) = live["input", 1, 0], plain["input", 1, 0]
    assert torch.equal(branch.key, usual.key)


@pytest.mark.parametrize("scaling", ["K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"])
def test_scaling_modes_run_and_weight_zero_is_nothing(
    model: Any, apply: Applier, sample: Sampler, influence: Any, scaling: str
) -> None:
    scaled = influence.Influence(scaling=scaling)
    found = sample(apply(model, weight=0.7, influence=scaled))
    assert found.isfinite().all()
    assert relative_error(found, sample(apply(model, weight=0.7))) > 1e-4
    assert torch.equal(sample(apply(model, weight=0.0, influence=scaled)), sample(model))


def test_a_curve_keeps_one_set_of_branches_only(
    host: Any, model: Any, apply: Applier, sample: Sampler, influence: Any
) -> None:
    """Twenty steps with twenty weights must not leave twenty copies of keys and values."""
    runs: list[Any] = []
    module = host.library("ip_adapter.host.run")
    build: Callable[..., Any] = module.Run._build
    calls: list[int] = []

    def count(self: Any, *arguments: Any) -> Any:
        runs.append(self)
        calls.append(len(self._live))
        return build(self, *arguments)

    curve = influence.parse_curve("0:1, 1:0")
    try:
        module.Run._build = count
        sample(apply(model, influence=influence.Influence(curve=curve)), steps=20)
    finally:
        module.Run._build = build
    assert len(calls) >= 20 and max(calls) <= 1
    assert len(runs[-1]._live) == 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [("style", "style"), ("99:1", "99"), ({2: 1.0}, r"Layers \[2\]")],
)
def test_layers_that_are_not_there_are_refused_and_nothing_applied(
    model: Any, apply: Applier, influence: Any, layers: Any, message: str
) -> None:
    before = dict(model.model_options["transformer_options"])
    with pytest.raises(Exception, match=message) as caught:
        apply(model, influence=influence.Influence(layers=layers))
    assert type(caught.value).__name__ == "InfluenceError"
    assert dict(model.model_options["transformer_options"]) == before


def test_the_node_puts_it_together(host: Any, influence: Any) -> None:
    node = host.node("ImagePromptInfluence")
    made = node.execute(0.5, "composition", "K+V", 0.1, 0.9, keyframes="0:1, 1:0").args[0]
    assert (made.weight, made.layers, made.scaling) == (0.5, "composition", "K+V")
    assert (made.start, made.end, made.curve.at(0.25)) == (0.1, 0.9, 0.75)
    by_hand = node.execute(1.0, "linear", "V only", 0, 1, layer_weights=" 3:1 ").args[0]
    assert by_hand.layers == "3:1"
    with pytest.raises(Exception, match="no keyframe"):
        node.execute(1.0, "linear", "V only", 0, 1, keyframes="soon")
