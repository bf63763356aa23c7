"""Attention maps on the host: against the definition, and that recording changes nothing else."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miniature import family
from tests.host.conftest import Applier, Sampler, draw
from tests.host.test_compiling import Graphs, compiled
from tests.miniature_parts import held_out
from tests.synthetic.models import CHECKPOINT
from tests.tolerance import assert_close

pytestmark = [
    pytest.mark.host,
    # torch's own, where it imports its compiler
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
]

STEPS = 4
WIDE = (8, 16)
"""A latent of 128 x 64 pixels; the miniature's grids are it and its half."""

Sample = Callable[..., Tensor]


@pytest.fixture(scope="module")
def model(miniature_model: Any) -> Any:
    return miniature_model


@pytest.fixture(scope="module")
def apply(miniature_apply: Applier) -> Applier:
    return miniature_apply


@pytest.fixture(scope="module")
def prompts(host: Any, registered: Any, apply: Applier) -> list[Any]:
    """Of two pictures of the miniature's world, by the adapter that was trained on it."""
    import comfy.clip_vision

    with torch.inference_mode():
        vision = comfy.clip_vision.load(str(family.CLIP_VISION))
        encode = host.library("ip_adapter.host.encoding").encode
        pictures = held_out(2).movedim(1, -1)
        return [encode(apply.adapter, vision, one[None], "crop") for one in pictures]


@pytest.fixture(scope="module")
def sample() -> Sample:
    states = [[[draw(1, 77, family.WIDTH, seed=seed), {}]] for seed in range(2)]
    noise = draw(1, 4, *WIDE)
    return partial(Sampler(), positive=states[0], negative=states[1], noise=noise, steps=STEPS)


def put(host: Any, model: Any, apply: Applier, prompt: Any, **influence: Any) -> Any:
    patching = host.library("ip_adapter.host.patching")
    return patching.apply(model, apply.adapter, prompt, **influence)[0]


def record(host: Any, model: Any, picture: int = 0) -> tuple[Any, Any]:
    patched, recorder = host.node("ImagePromptRecordMaps").execute(model, picture).args
    return patched, recorder


def recorded(host: Any, model: Any, sample: Sample, picture: int = 0, **how: Any) -> Any:
    """The maps of one sampling."""
    patched, recorder = record(host, model, picture)
    return recorder.find(sample(patched, **how))


def half(is_right: bool) -> Tensor:
    mask = torch.zeros(1, 64, 128)
    mask[..., 64:] = 1
    return mask if is_right else 1 - mask


# What is in the maps


class Spy:
    """Another pack's attention in one layer: computed plainly, the positive row remembered."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        heads = options["n_heads"]
        parts = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        scores = parts[0] @ parts[1].transpose(-1, -2) / math.sqrt(parts[0].shape[-1])
        out = (scores.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2)
        row = options["cond_or_uncond"].index(0)
        self.seen.append((q[row].clone(), out[row].clone()))
        return out


@pytest.mark.parametrize("count", [1, 2])
def test_maps_are_the_definition_in_every_layer(
    host: Any, model: Any, apply: Applier, sample: Sample, count: int
) -> None:
    """Queries and text parts as the UNet has them; keys and values by the adapter's matrices."""
    spied, spies = model.clone(), {}
    groups = {
        "down 8": [("input", 1)],
        "down 4": [("input", 3)],
        "middle 4": [("middle", 0)],
        "up 4": [("output", 0), ("output", 1)],
        "up 8": [("output", 2), ("output", 3)],
    }
    numbers = {
        ("input", 1): 1,
        ("input", 3): 3,
        **{("output", n): 5 + 2 * n for n in range(4)},
        ("middle", 0): 13,
    }
    for block, number in numbers:
        spies[block, number] = Spy()
        spied.set_model_attn2_replace(spies[block, number], block, number)
    prompt = apply.prompt(4, count)
    found = recorded(host, put(host, spied, apply, prompt, weight=0.6), sample)

    assert found.references == (("1",) if count == 1 else ("1.1", "1.2"))
    assert [group.name for group in found.groups] == list(groups)
    assert found.steps == tuple((step, step) for step in range(1, STEPS + 1))
    matrices = apply.adapter.module.state_dict()
    heads, each = 4, prompt.tokens // count
    for group, mean in zip(found.groups, found.means, strict=True):
        expected = torch.zeros(count, STEPS, math.prod(group.grid))
        for place in groups[group.name]:
            keys, values = (
                prompt.conditional[0]
                @ matrices[f"ip_adapter.{numbers[place]}.to_{kind}_ip.weight"].float().T
                for kind in "kv"
            )
            for step, (query, text) in enumerate(spies[place].seen):
                width = query.shape[-1] // heads
                for reference in range(count):
                    own = slice(reference * each, (reference + 1) * each)
                    squares = torch.zeros(len(query))
                    for head in range(heads):
                        cut = slice(head * width, (head + 1) * width)
                        scores = query[:, cut] @ keys[:, cut].T / math.sqrt(width)
                        part = 0.6 * scores.softmax(-1)[:, own] @ values[own, cut]
                        squares += part.square().sum(-1)
                    expected[reference, step] += squares.sqrt() / text.norm(dim=-1)
        expected /= len(groups[group.name])
        assert_close(mean, expected.view_as(mean), relative=1e-4)


def test_two_references_in_two_masks_act_left_and_right(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    patched = model
    for prompt, is_right in zip(prompts, (False, True), strict=True):
        patched = put(host, patched, apply, prompt, mask=half(is_right))
    found = recorded(host, patched, sample)
    assert found.references == ("1", "2") and found.labels == ("miniature_global",) * 2
    for mean in found.means:
        left, right = mean.chunk(2, dim=-1)
        assert bool((left[0] > 0).all()) and not right[0].any()
        assert bool((right[1] > 0).all()) and not left[1].any()
    drawn = host.library("ip_adapter.heatmap").as_masks(found, (64, 128))
    for one, is_right in zip(drawn, (False, True), strict=True):
        inside = half(is_right)[0] > 0
        assert one[inside].mean() > 10 * one[~inside].mean()


def test_weight_zero_is_zero_and_other_weights_are_proportional_at_first(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    patched = put(host, put(host, model, apply, prompts[0], weight=0.0), apply, prompts[1])
    found = recorded(host, patched, sample)
    assert found.references == ("1", "2")
    assert all(not mean[0].any() and bool((mean[1] > 0).all()) for mean in found.means)
    alone = recorded(host, put(host, model, apply, prompts[0], weight=0.0), sample)
    assert not any(mean.any() for mean in alone.means)
    # In the very first layer nothing was changed before.
    full, less = (
        recorded(host, put(host, model, apply, prompts[0], weight=weight), sample, steps=1)
        for weight in (1.0, 0.3)
    )
    assert_close(less.means[0], 0.3 * full.means[0], relative=1e-4)


def test_a_window_leaves_the_other_steps_dark(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    patched = put(host, put(host, model, apply, prompts[0], start=0.5), apply, prompts[1])
    found = recorded(host, patched, sample, steps=6).over_steps()
    acts = [bool(one.any()) for one in found[0].unbind(0)]
    assert acts == sorted(acts) and 2 <= sum(acts) <= 4
    assert all(bool((one > 0).all()) for one in found[1].unbind(0))


def test_a_long_schedule_has_ten_stretches(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    found = recorded(host, put(host, model, apply, prompts[0]), sample, steps=12)
    assert len(found.steps) == 10 and found.steps[-1][1] == 12
    assert all(bool((mean > 0).all()) for mean in found.means)


def test_layer_presets_show_in_their_groups(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    """The second transformer of seven, alone, is all of its group."""
    influence = host.library("ip_adapter.influence").Influence(layers="1:1")
    found = recorded(host, put(host, model, apply, prompts[0], influence=influence), sample)
    assert [bool(mean.any()) for mean in found.means] == [False, True, False, False, False]


def test_the_wanted_picture_of_a_batch_is_recorded(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    """The image acts on the second of three pictures only."""
    influence = host.library("ip_adapter.influence").Influence(frames=(0.0, 1.0, 0.0))
    patched = put(host, model, apply, prompts[0], influence=influence)
    noise = draw(3, 4, *WIDE)
    found = [recorded(host, patched, sample, picture, noise=noise) for picture in (0, 1, 2, 9)]
    assert [one.picture for one in found] == [0, 1, 2, 2]
    assert [bool(one.by_reference().any()) for one in found] == [False, True, False, False]
    alone = recorded(host, put(host, model, apply, prompts[0]), sample, noise=noise[1:2])
    assert_close(found[1].by_reference(), alone.by_reference(), relative=1e-3)


def test_two_adapters_are_two_references(
    host: Any, model: Any, apply: Applier, sample: Sample
) -> None:
    """Prompts of unlike lengths are computed apart; each is as it is alone, in the first layer."""
    adapters = host.library("ip_adapter.host.adapters")
    plus = Applier(host, adapters.load(family.ADAPTERS / "miniature_plus.safetensors"))
    chain = apply(plus(apply(model, 1, weight=0.4), 2), 3, weight=0.0)
    found = recorded(host, chain, sample, steps=1)
    assert found.references == ("1", "2", "3")
    assert found.labels == ("miniature_global", "miniature_plus", "miniature_global")
    alone = [
        recorded(host, one, sample, steps=1)
        for one in (apply(model, 1, weight=0.4), plus(model, 2))
    ]
    for number, one in enumerate(alone):
        assert_close(found.means[0][number], one.means[0][0], relative=1e-4)


def test_groups_of_sd_15(host: Any, model_files: Path, base_adapter: Any) -> None:
    """Its 16 layers on a latent that does not halve evenly, in the order in which they run."""
    import comfy.sd

    nano = comfy.sd.load_checkpoint_guess_config(
        str(model_files / CHECKPOINT), output_vae=False, output_clip=False
    )[0]
    patched = Applier(host, base_adapter)(nano)
    found = recorded(host, patched, Sampler(), noise=draw(1, 4, 10, 8), steps=1)
    assert [(group.name, group.grid, group.layers) for group in found.groups] == [
        ("down 10", (10, 8), 2),
        ("down 5", (5, 4), 2),
        ("down 3", (3, 2), 2),
        ("middle 2", (2, 1), 1),
        ("up 3", (3, 2), 3),
        ("up 5", (5, 4), 3),
        ("up 10", (10, 8), 3),
    ]
    assert all(bool((mean > 0).all()) for mean in found.means)


def test_repeated_tokens_are_one_reference(host: Any, model: Any, apply: Applier) -> None:
    """One reference beside two for the negative side: its tokens stand there twice."""
    library = host.library("ip_adapter.prompt")
    tokens = draw(3, apply.adapter.spec.projection.tokens, family.WIDTH)
    prompt = library.from_tokens(
        tokens[:1], tokens[1:], apply.adapter.fingerprint, apply.adapter.label
    )
    patched = put(host, model, apply, prompt)
    (entry,) = patched.model_options["transformer_options"]["image_prompts"]
    count = host.library("ip_adapter.host.recording").count_references
    assert prompt.tokens == 2 * len(tokens[0]) and count(entry) == 1


# What recording leaves alone


@pytest.mark.parametrize("is_first", [True, False])
def test_the_picture_is_the_same_bit_for_bit_in_either_order(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any], is_first: bool
) -> None:
    mask = draw(1, 64, 128).sigmoid()
    applied = put(host, model, apply, prompts[0], mask=mask)
    if is_first:
        base, recorder = record(host, model)
        watched = put(host, base, apply, prompts[0], mask=mask)
    else:
        watched, recorder = record(host, applied)
    made = sample(watched)
    assert torch.equal(made, sample(applied))
    assert bool((recorder.find(made).by_reference() > 0).all())


def test_a_model_is_not_changed_and_without_image_prompts_nothing_is_recorded(
    host: Any, model: Any, sample: Sample
) -> None:
    before = dict(model.model_options["transformer_options"])
    watched, recorder = record(host, model)
    assert model.model_options["transformer_options"] == before
    made = sample(watched)
    assert torch.equal(made, sample(model))
    with pytest.raises(Exception, match="No attention maps were recorded"):
        recorder.find(made)


def test_a_second_sampling_does_not_add_to_the_first(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    watched, recorder = record(host, put(host, model, apply, prompts[0]))
    first = recorder.find(sample(watched))
    second = recorder.find(sample(watched))
    assert first is not second
    assert torch.equal(first.by_reference(), second.by_reference())


def test_the_latent_says_which_sampling(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any], caplog: Any
) -> None:
    watched, recorder = record(host, put(host, model, apply, prompts[0]))
    noises = [draw(1, 4, *WIDE, seed=1), draw(1, 4, *WIDE, seed=2), draw(1, 4, 8, 8, seed=3)]
    made = [sample(watched, noise=noise) for noise in noises]
    found = [recorder.find(one) for one in made]
    assert [one.latent for one in found] == [WIDE, WIDE, (8, 8)]
    assert len({id(one) for one in found}) == 3
    assert [recorder.find(one.half()) for one in made] == found
    assert not caplog.text
    assert recorder.find(torch.zeros(1, 4, *WIDE)) is found[-1]
    assert "shown is the latest one" in caplog.text
    for seed in range(4):
        sample(watched, noise=draw(1, 4, 8, 8, seed=10 + seed), steps=1)
    assert recorder.find(made[0]) not in found  # four are kept


READS = {"aten::item", "aten::is_nonzero", "aten::_local_scalar_dense"}


class Reads(TorchDispatchMode):
    """Counts numbers that leave the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function.name() in READS
        return function(*args, **(kwargs or {}))


def test_no_layer_waits_for_the_device(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    """Numbers that are read: a forward pass has one, the noise level."""
    applied = put(host, model, apply, prompts[0])
    watched, _ = record(host, applied)
    sample(watched, steps=1)

    def read(one: Any) -> int:
        """In four further steps."""
        found = []
        for steps in (2, 6):
            with Reads() as reads:
                sample(one, steps=steps)
            found.append(reads.count)
        return found[1] - found[0]

    assert read(watched) - read(applied) == 4


def test_everything_goes_with_the_recorder(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    watched, recorder = record(host, put(host, model, apply, prompts[0]))
    shown = recorder.find(sample(watched))
    gone = [weakref.ref(recorder), weakref.ref(shown), weakref.ref(shown.means[0])]
    del watched, recorder, shown
    gc.collect()
    assert [one() for one in gone] == [None] * 3


# Together with others


def test_areas_are_put_where_they_are(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    """Two texts for two halves; the reference's mask is the left one."""
    states = [draw(1, 77, family.WIDTH, seed=seed) for seed in (5, 6)]
    areas = [(8, 8, 0, 0), (8, 8, 0, 8)]
    positive = [
        [state, {"area": area, "strength": 1.0, "set_area_to_bounds": False}]
        for state, area in zip(states, areas, strict=True)
    ]
    patched = put(host, model, apply, prompts[0], mask=half(False))
    found = recorded(host, patched, sample, positive=positive)
    for mean in found.means:
        left, right = mean.chunk(2, dim=-1)
        assert bool((left > 0).all()) and not right.any()
    free = recorded(host, put(host, model, apply, prompts[0]), sample, positive=positive)
    assert all(bool((mean > 0).all()) for mean in free.means)


def test_context_windows_are_averaged(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    import comfy.context_windows as windows

    influence = host.library("ip_adapter.influence").Influence(frames=(0, 0, 0, 0, 0, 1.0))
    patched = put(host, model, apply, prompts[0], influence=influence)
    patched.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule(
            windows.ContextSchedules.STATIC_STANDARD
        ),
        fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.FLAT),
        context_length=4,
        context_overlap=1,
        dim=0,
    )
    windows.create_prepare_sampling_wrapper(patched)
    noise = draw(6, 4, *WIDE)
    last, third = (recorded(host, patched, sample, n, noise=noise, steps=1) for n in (5, 3))
    assert bool((last.by_reference() > 0).all()) and not third.by_reference().any()


def test_another_pack_s_rows_are_left_out_and_said(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any], caplog: Any
) -> None:
    """A tiled sampler gives the UNet all rows once more for each tile."""

    def tiled(forward: Any, given: dict[str, Any]) -> Any:
        twice = torch.cat([given["input"], given["input"]])
        condition = {
            name: torch.cat([value, value]) if isinstance(value, Tensor) else value
            for name, value in given["c"].items()
        }
        times = torch.cat([given["timestep"], given["timestep"]])
        return forward(twice, times, **condition)[: len(given["input"])]

    applied = put(host, model, apply, prompts[0])
    for one in (applied, record(host, applied)[0]):
        one.set_model_unet_function_wrapper(tiled)
    watched, recorder = record(host, applied)
    made = sample(watched)
    assert torch.equal(made, sample(applied))
    assert not recorder.find(made).by_reference().any()
    assert "the attention maps are not complete" in caplog.text


def test_a_compiled_model_records_without_its_graphs_and_says_so(
    host: Any,
    model: Any,
    apply: Applier,
    sample: Sample,
    prompts: list[Any],
    caplog: Any,
) -> None:
    graphs = Graphs()
    applied = put(host, model, apply, prompts[0])
    watched, recorder = record(host, compiled(applied, graphs))
    made = sample(watched)
    assert graphs.count == 0 and "without torch.compile, to record" in caplog.text
    assert torch.equal(made, sample(applied))
    assert bool((recorder.find(made).by_reference() > 0).all())


# The nodes


def test_the_node_shows_maps_as_picture_preview_and_masks(
    host: Any, model: Any, apply: Applier, sample: Sample, prompts: list[Any]
) -> None:
    patched = put(host, put(host, model, apply, prompts[0]), apply, prompts[1], mask=half(True))
    watched, recorder = record(host, patched)
    latent = {"samples": sample(watched)}
    show = host.node("ImagePromptShowMaps").execute
    out = show(recorder, latent, "by reference", "same for all")
    image, masks = out.args
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[-1] == 3
    assert masks.shape == (2, 64, 128) and float(masks.max()) > 0.95
    assert len(out.ui.as_dict()["images"]) == 1
    picture = torch.rand(1, 96, 192, 3, generator=torch.Generator().manual_seed(0))
    over, sized = show(recorder, latent, "over steps", "each its own", 2, picture).args
    assert sized.shape == (1, 96, 192)
    assert not torch.equal(over, show(recorder, latent, "over steps", "each its own", 2).args[0])


def test_what_is_no_recorder_is_refused(host: Any) -> None:
    show = host.node("ImagePromptShowMaps").execute
    with pytest.raises(Exception, match="Connect the output of Record Attention Maps"):
        show({"maps": 1}, {"samples": torch.zeros(1, 4, 8, 8)}, "by reference", "same for all")
