"""torch.compile: image prompts are seen, and what changes from run to run needs no new graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from miniature import family
from tests.host.conftest import Applier, Sampler, draw
from tests.tolerance import assert_close

pytestmark = [
    pytest.mark.host,
    # torch's own, where it imports its compiler
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
]


class Graphs:
    """A back end of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


Sample = Callable[..., Tensor]


@pytest.fixture(scope="module")
def model(miniature_model: Any) -> Any:
    """The miniature's: a compilation takes as long as a UNet has layers, and it has seven."""
    return miniature_model


@pytest.fixture(scope="module")
def apply(miniature_apply: Applier) -> Applier:
    return miniature_apply


@pytest.fixture(scope="module")
def sample() -> Sample:
    states = [[[draw(1, 77, family.WIDTH, seed=seed), {}]] for seed in range(2)]
    return partial(Sampler(), positive=states[0], negative=states[1])


@pytest.fixture
def graphs(host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """With the attention of a GPU; that of a CPU asks for free memory, which no graph can."""
    import comfy.ldm.modules.attention as attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def compiled(model: Any, graphs: Graphs, **how: Any) -> Any:
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    out = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=out, backend=graphs, options=options, **how)
    return out


@pytest.mark.parametrize("compile_first", [True, False])
def test_a_compiled_model_sees_the_image(
    model: Any, apply: Applier, sample: Sample, graphs: Graphs, compile_first: bool
) -> None:
    without = compiled(model, graphs, fullgraph=True)
    assert_close(sample(without), sample(model), relative=1e-4)
    for weight in (0.7, 0.3):
        if compile_first:
            patched = apply(without, weight=weight)
        else:
            patched = compiled(apply(model, weight=weight), graphs, fullgraph=True)
        assert_close(sample(patched), sample(apply(model, weight=weight)), relative=1e-4)
    assert_close(sample(without), sample(model), relative=1e-4)


def test_reference_weight_and_window_need_no_other_graph(
    model: Any, apply: Applier, sample: Sample, graphs: Graphs
) -> None:
    base = compiled(model, graphs, fullgraph=True)
    sample(apply(base))
    made = graphs.count
    assert made == 1
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"weight": 0.3},
        {"weight": -2.0},
        {"start": 0.4},
        {"start": 0.2, "end": 0.7, "seed": 5},
    ]
    for change in changes:
        patched = sample(apply(base, **change), steps=3)
        assert_close(patched, sample(apply(model, **change), steps=3), relative=1e-4)
    assert graphs.count == made


def test_masks_are_inputs_too(model: Any, apply: Applier, sample: Sample, graphs: Graphs) -> None:
    base = compiled(model, graphs, fullgraph=True)
    for seed in range(2):
        mask = draw(1, 64, 64, seed=seed).sigmoid()
        found = sample(apply(base, mask=mask))
        assert_close(found, sample(apply(model, mask=mask)), relative=1e-4)
    assert graphs.count == 1


def test_several_image_prompts_are_one_graph(
    model: Any, apply: Applier, sample: Sample, graphs: Graphs
) -> None:
    base = compiled(model, graphs, fullgraph=True)
    for seed in (0, 3):
        found, expected = (
            sample(apply(apply(one, seed), seed + 1, weight=0.5)) for one in (base, model)
        )
        assert_close(found, expected, relative=1e-4)
    assert graphs.count == 1


def test_a_compilation_that_cannot_be_repeated_is_left_out_and_said(
    model: Any, apply: Applier, sample: Sample, graphs: Graphs, caplog: Any
) -> None:
    """Other packs compile parts of the UNet, without any guard on what we put in."""
    parts = compiled(model, graphs, keys=["diffusion_model.middle_block"])
    assert torch.equal(sample(apply(parts)), sample(apply(model)))
    assert graphs.count == 0 and "runs without torch.compile" in caplog.text


def test_another_packs_wrapper_is_left_out_and_said(
    model: Any, apply: Applier, sample: Sample, graphs: Graphs, caplog: Any
) -> None:
    from comfy.patcher_extension import WrappersMP

    class Wrapper:
        def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("a wrapper that compiles would not see the image")

    patched = apply(model)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", Wrapper())
    assert torch.equal(sample(patched), sample(apply(model)))
    assert "runs without torch.compile" in caplog.text


def test_a_model_that_breaks_the_graph_runs_without_and_it_is_said_once(
    host: Any, model: Any, apply: Applier, sample: Sample, caplog: Any
) -> None:
    """The attention of a CPU asks for free memory, which no graph can."""
    base = compiled(model, Graphs())
    mask = draw(1, 64, 64).sigmoid()
    for weight in (0.5, 0.9):
        found = sample(apply(base, weight=weight, mask=mask))
        assert torch.equal(found, sample(apply(model, weight=weight, mask=mask)))
    assert caplog.text.count("cannot be compiled as one graph") == 1
    torch._dynamo.reset()
