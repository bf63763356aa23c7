"""How much an image prompt makes the machine do: counted, since times differ by machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.host.conftest import Applier, Sampler, draw

pytestmark = pytest.mark.host

SD15_LAYERS = 16
FUSED = "aten::scaled_dot_product_attention"


class Work(TorchDispatchMode):
    """Counts what fills memory: anything else is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {_place(x) for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        found = function(*args, **(kwargs or {}))
        name = function.name().split(".")[0]
        is_view = all(_place(x) in given for x in tree_leaves(found) if is_tensor(x))
        if name.endswith("_") or not is_view:
            self.calls[name] += 1
        return found


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def work(run: Callable[[], Any]) -> Counter[str]:
    with Work() as seen:
        run()
    return seen.calls


def step(sample: Sampler, model: Any, **how: Any) -> Counter[str]:
    """What each further step costs."""
    sample(model, steps=1, **how)
    few, many = (work(lambda n=n: sample(model, steps=n, **how)) for n in (2, 6))
    return Counter({name: (many[name] - few[name]) / 4 for name in many})


def added(sample: Sampler, model: Any, patched: Any, **how: Any) -> dict[str, float]:
    base, found = step(sample, model, **how), step(sample, patched, **how)
    return {name: found[name] - base[name] for name in found if found[name] != base[name]}


@pytest.fixture(autouse=True)
def _torchs_attention(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has its own, its products would be counted with ours."""
    import comfy.ldm.modules.attention as attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)


def test_an_image_prompt_is_one_attention_and_one_sum_in_a_layer(
    model: Any, apply: Applier, sample: Sampler
) -> None:
    more = added(sample, model, apply(model, weight=0.7))
    few = {name for name in more if more[name] < SD15_LAYERS}
    assert {name: more[name] for name in more.keys() - few} == {
        FUSED: SD15_LAYERS,
        "aten::add_": SD15_LAYERS,
    }
    assert few <= {"aten::repeat"}  # the frame numbers of a conditioning


@pytest.mark.parametrize("count", [2, 3, 6])
def test_prompts_of_equal_length_share_their_products(
    model: Any, apply: Applier, sample: Sampler, count: int
) -> None:
    patched = model
    for seed in range(count):
        patched = apply(patched, seed, weight=0.5)
    more = added(sample, model, patched)
    assert more["aten::matmul"] == 2 * SD15_LAYERS
    assert more["aten::softmax"] == more["aten::add_"] == SD15_LAYERS
    assert FUSED not in more


def test_no_layer_of_weight_zero_and_no_step_outside_the_window_does_anything(
    model: Any, apply: Applier, sample: Sampler, host: Any
) -> None:
    influence = host.library("ip_adapter.influence").Influence
    some = added(sample, model, apply(model, influence=influence(layers="4:1, 6:1")))
    assert some[FUSED] == some["aten::add_"] == 2
    base = work(lambda: sample(model, steps=6))
    late = work(lambda: sample(apply(model, start=0.5), steps=6))
    assert late[FUSED] - base[FUSED] in {2 * SD15_LAYERS, 3 * SD15_LAYERS}


def test_masks_are_brought_to_each_grid_once_in_a_run(
    model: Any, apply: Applier, sample: Sampler
) -> None:
    patched = apply(model, mask=draw(1, 64, 64).sigmoid())
    found = work(lambda: sample(patched, steps=5))
    grids = 4  # 8, 4, 2 and 1 latent pixels wide
    resized = found["aten::_adaptive_avg_pool2d"] + found["aten::adaptive_avg_pool2d"]
    base = work(lambda: sample(model, steps=5))
    assert resized - base["aten::_adaptive_avg_pool2d"] <= grids + 1


def test_keys_and_values_are_computed_once_for_a_prompt(
    host: Any, model: Any, apply: Applier, sample: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    patching = host.library("ip_adapter.host.patching")
    kind = host.library("ip_adapter.adapter").IPAdapter
    computed: list[Any] = []
    original = kind.keys_values

    def count(self: Any, tokens: Any, indices: Any) -> Any:
        computed.append(set(indices))
        return original(self, tokens, indices)

    monkeypatch.setattr(kind, "keys_values", count)
    prompt = apply.prompt(3)
    for weight, seed in ((0.5, 0), (1.0, 0), (-1.0, 1)):
        patched, _ = patching.apply(model, apply.adapter, prompt, weight=weight)
        sample(patched, noise=draw(1, 4, 8, 8, seed=seed))
    both, _ = patching.apply(patched, apply.adapter, prompt, weight=0.2)
    sample(both)
    assert len(computed) == 1 and len(computed[0]) == SD15_LAYERS
    other, _ = patching.apply(model, apply.adapter, apply.prompt(4))
    sample(other)
    assert len(computed) == 2


def test_keys_and_values_go_with_their_prompt(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    import gc

    known = host.library("ip_adapter.host.run")._known
    gc.collect()
    before = len(known)
    patching = host.library("ip_adapter.host.patching")
    prompt = apply.prompt(9)
    patched, _ = patching.apply(model, apply.adapter, prompt)
    sample(patched)
    assert len(known) == before + 1
    del prompt, patched
    gc.collect()
    assert len(known) == before


def test_many_frames_are_not_kept_and_only_those_in_view_are_moved(
    host: Any, model: Any, apply: Applier
) -> None:
    """A thousand pictures with context windows: the device holds one window's keys and values."""
    library = host.library("ip_adapter.host.run")
    branch = host.library("ip_adapter.host.branch")
    unets = host.library("ip_adapter.host.unet")
    patching = host.library("ip_adapter.host.patching")
    tokens = draw(101, 4, 768)
    prompt = host.library("ip_adapter.prompt").from_tokens(
        tokens[1:], tokens[:1], apply.adapter.fingerprint, apply.adapter.label, frames=100
    )
    patched, _ = patching.apply(model, apply.adapter, prompt)
    run = library.Run(
        patched.model_options["transformer_options"]["image_prompts"],
        {layer.address: layer for layer in unets.cross_attention_layers(model)},
        model.get_model_object("model_sampling"),
        torch.float32,
        (8, 8),
    )
    assert prompt not in library._known
    for start in range(0, 96, 4):
        window = tuple(range(start, start + 4))
        live = run.live((branch.Chunk(True, None, window),), torch.ones(1), torch.device("cpu"))
        for branches in live.values():
            assert [len(one.key) for one in branches] == [4]
    assert len(run._live) <= 8
