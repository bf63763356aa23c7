"""The laws of an image prompt, on the host's own ModelPatcher, guider and sampler."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.host.conftest import Applier, Sampler, draw, text
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def plain(model: Any, sample: Sampler) -> Tensor:
    with torch.inference_mode():
        return sample(model)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_weight_zero_is_no_adapter_bit_for_bit(
    model: Any, apply: Applier, sample: Sampler, cfg: float, batch: int
) -> None:
    noise = draw(batch, 4, 8, 8)
    without = sample(model, cfg=cfg, noise=noise)
    assert torch.equal(sample(apply(model, weight=0.0), cfg=cfg, noise=noise), without)
    assert not torch.equal(sample(apply(model, weight=0.1), cfg=cfg, noise=noise), without)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 16)])
def test_masks_of_one_and_zero_are_exact_at_any_size(
    model: Any, apply: Applier, sample: Sampler, size: tuple[int, int]
) -> None:
    noise = draw(2, 4, *size)
    ones, zeros = torch.ones(1, 50, 30), torch.zeros(1, 50, 30)
    everywhere = sample(apply(model), noise=noise)
    assert torch.equal(sample(apply(model, mask=ones), noise=noise), everywhere)
    assert torch.equal(sample(apply(model, mask=zeros), noise=noise), sample(model, noise=noise))


def test_applying_leaves_the_incoming_model_alone(
    model: Any, apply: Applier, sample: Sampler, plain: Tensor
) -> None:
    first = apply(model, seed=1)
    alone = sample(first)
    apply(first, seed=2, weight=0.7)
    sample(apply(first, seed=3))
    assert torch.equal(sample(first), alone)
    assert torch.equal(sample(model), plain)


def test_another_weight_leaves_no_trace_of_the_first(
    model: Any, apply: Applier, sample: Sampler
) -> None:
    """The frozen pack kept the second of two chained adapters when its weight was changed."""
    first = apply(model, seed=1)
    fresh = sample(apply(first, seed=2, weight=0.3))
    for weight in (0.9, 0.5, 0.3):
        again = apply(first, seed=2, weight=weight)
        found = sample(again)
        assert len(again.model_options["transformer_options"]["image_prompts"]) == 2
    assert torch.equal(found, fresh)


def test_order_of_a_chain_does_not_matter(model: Any, apply: Applier, sample: Sampler) -> None:
    one = sample(apply(apply(model, seed=1), seed=2, weight=0.4))
    other = sample(apply(apply(model, seed=2, weight=0.4), seed=1))
    assert_close(one, other, relative=1e-4)


def test_the_same_prompt_twice_is_its_weights_added(
    model: Any, apply: Applier, sample: Sampler
) -> None:
    twice = sample(apply(apply(model, weight=0.25), weight=0.5))
    assert_close(twice, sample(apply(model, weight=0.75)), relative=1e-4)


def test_a_reference_given_twice_is_one_reference(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    library = host.library("ip_adapter.prompt")
    doubled = library.join([apply.prompt(1), apply.prompt(1)])
    patched, _ = host.library("ip_adapter.host.patching").apply(model, apply.adapter, doubled)
    assert_close(sample(patched), sample(apply(model, seed=1)), relative=1e-4)


def test_every_picture_of_a_batch_is_its_own(model: Any, apply: Applier, sample: Sampler) -> None:
    noise = draw(3, 4, 8, 8)
    together = sample(apply(model), noise=noise)
    for i in range(3):
        alone = sample(apply(model), noise=noise[i : i + 1])
        assert_close(together[i : i + 1], alone, relative=1e-4)


def test_forwards_may_be_split(
    model: Any, apply: Applier, sample: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low memory, ControlNets and hooks make the host run conditionings one by one."""
    import comfy.samplers

    together = sample(apply(model))
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    assert_close(sample(apply(model)), together, relative=1e-4)


def test_the_image_counts_for_the_positive_and_no_image_for_the_negative(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    """Guidance is linear: the same tokens on both sides must give what swapping them undoes."""
    prompt = apply.prompt(1)
    make = host.library("ip_adapter.prompt").ImagePrompt
    swapped = make(prompt.unconditional, prompt.conditional, prompt.adapter, prompt.label)
    patch = host.library("ip_adapter.host.patching").apply
    straight = sample(
        patch(model, apply.adapter, prompt)[0],
        steps=1,
        cfg=3.0,
        positive=text(1),
        negative=text(2),
    )
    # cfg * p - (cfg - 1) * n with p and n exchanged is the same for cfg' = 1 - cfg.
    exchanged = sample(
        patch(model, apply.adapter, swapped)[0],
        steps=1,
        cfg=-2.0,
        positive=text(2),
        negative=text(1),
    )
    assert_close(exchanged, straight, relative=1e-4)


@pytest.mark.filterwarnings("ignore:Should have tb<=t1")  # torchsde, of the host's own sigmas
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc"])
def test_samplers_agree_that_weight_zero_is_nothing(
    model: Any, apply: Applier, sample: Sampler, sampler: str
) -> None:
    found = sample(apply(model, weight=0.0), steps=3, sampler=sampler)
    assert torch.equal(found, sample(model, steps=3, sampler=sampler))


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.4, 1.0), (0.3, 0.6), (0.5, 0.5)])
def test_the_window_acts_on_the_steps_inside_it(
    model: Any, apply: Applier, sample: Sampler, forwards: Any, start: float, end: float
) -> None:
    import comfy.samplers

    steps = 10
    sample(apply(model, start=start, end=end), steps=steps)
    sampling = model.get_model_object("model_sampling")
    schedule = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[:-1]
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    expected = [int(last <= float(sigma) <= first) for sigma in schedule]
    assert [live for _, live in forwards()] == expected
    assert 0 < sum(expected) < steps or start == end


def test_a_window_without_a_step_is_said(
    model: Any, apply: Applier, sample: Sampler, plain: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert torch.equal(sample(apply(model, start=0.2, end=0.4)), plain)
    assert "none of the 2 steps lies between 20% and 40%" in caplog.text
    caplog.clear()
    sample(apply(model, start=0.2))
    assert "no effect" not in caplog.text


def test_keys_and_values_are_computed_once_per_run(
    model: Any, apply: Applier, sample: Sampler
) -> None:
    calls: Counter[str] = Counter()
    handles = [
        pair.to_k_ip.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, pair in apply.adapter.module.ip_adapter.items()
    ]
    try:
        sample(apply(model), steps=7)
    finally:
        for handle in handles:
            handle.remove()
    assert set(calls.values()) == {1} and len(calls) == 16


class CountReads(TorchDispatchMode):
    """Counts how often a value is read back from a tensor, which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inference mode shows the call that Python makes, other modes what it is made of.
        self.reads += str(func) in ("aten.item.default", "aten._local_scalar_dense.default")
        return func(*args, **(kwargs or {}))


def reads(sample: Sampler, model: Any, steps: int) -> int:
    with CountReads() as counter:
        sample(model, steps=steps)
    return counter.reads


def test_nothing_is_read_back_during_the_steps(model: Any, apply: Applier, sample: Sampler) -> None:
    per_step = (reads(sample, model, 8) - reads(sample, model, 4)) // 4
    whole, window = apply(model), apply(model, end=0.5)
    assert (reads(sample, whole, 8) - reads(sample, whole, 4)) // 4 == per_step
    assert (reads(sample, window, 8) - reads(sample, window, 4)) // 4 == per_step + 1


def test_nothing_of_a_run_outlives_it(
    host: Any, model: Any, apply: Applier, sample: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = host.library("ip_adapter.host.run").Run
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    original = run.__init__

    def remember(self: Any, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        alive.add(self)

    monkeypatch.setattr(run, "__init__", remember)
    patched = apply(model)
    sample(patched)
    gc.collect()
    assert not alive


def test_an_interrupted_run_leaves_nothing_on_its_guider(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(apply(model))
    guider.set_conds(text(1), text(2))
    guider.set_cfg(4.0)
    noise = draw(1, 4, 8, 8)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)

    class Stop(Exception):
        pass

    def stop(step: int, *_: Any) -> None:
        if step == 1:
            raise Stop

    euler = comfy.samplers.sampler_object("euler")
    arguments = (noise, torch.zeros_like(noise), euler, sigmas)
    with pytest.raises(Stop):
        guider.sample(*arguments, callback=stop, disable_pbar=True, seed=0)
    for conds in guider.conds.values():
        assert all("image_prompts" not in cond["model_conds"] for cond in conds)
    found = guider.sample(*arguments, disable_pbar=True, seed=0)
    assert_close(found, sample(apply(model), steps=4), relative=1e-5)


def test_old_hosts_may_deep_copy_the_options(model: Any, apply: Applier, sample: Sampler) -> None:
    """Before 2026 every clone deep-copied them; weights and tokens must stay shared."""
    patched = apply(apply(model, seed=1), seed=2)
    options = patched.model_options["transformer_options"]
    copied = copy.deepcopy(options)
    assert copied["image_prompts"][0] is options["image_prompts"][0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_model_dtype_runs(
    host: Any, model_files: Any, apply: Applier, sample: Sampler, dtype: torch.dtype
) -> None:
    import comfy.sd

    from tests.synthetic.models import CHECKPOINT

    half = comfy.sd.load_checkpoint_guess_config(
        str(model_files / CHECKPOINT),
        output_vae=False,
        output_clip=False,
        model_options={"dtype": dtype},
    )[0]
    half.set_model_compute_dtype(dtype)
    without, with_it = sample(half), sample(apply(half))
    assert bool(torch.isfinite(with_it).all())
    assert relative_error(with_it, without) > 1e-3
    assert torch.equal(sample(apply(half, weight=0.0)), without)
