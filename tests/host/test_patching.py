"""What meets us in a graph: other packs' patches, other guiders, areas, context windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ip_adapter.layers import SD15
from tests.host.conftest import Applier, Sampler, draw, text
from tests.synthetic import adapters
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host


def unet(family: str) -> Any:
    """A real-size UNet without weights, in the host's ModelPatcher."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.model_patcher
    import comfy.ops

    shared = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "use_spatial_transformer": True,
        "legacy": False,
        "dtype": torch.float16,
        "device": "meta",
        "operations": comfy.ops.manual_cast,
    }
    sizes: dict[str, dict[str, Any]] = {
        "SD 1.5": {
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "transformer_depth_middle": 1,
            "context_dim": 768,
            "num_heads": 8,
        },
        "SDXL": {
            "channel_mult": [1, 2, 4],
            "num_res_blocks": [2, 2, 2],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "context_dim": 2048,
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
            "num_head_channels": 64,
        },
    }
    base = nn.Module()
    base.diffusion_model = openaimodel.UNetModel(**shared, **sizes[family])
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, device, device, size=1)


def test_the_hosts_sd15_has_the_tables_layers(host: Any) -> None:
    layers = host.library("ip_adapter.host.unet").cross_attention_layers(unet("SD 1.5"))
    widths = {layer.address: layer.width for layer in layers}
    table = zip(SD15.layers, adapters.SD15_WIDTHS, strict=True)
    assert widths == {layer.address: width for layer, width in table}
    assert {layer.context_width for layer in layers} == {768}
    assert {layer.heads for layer in layers} == {8}


def test_every_layer_of_the_adapter_is_called(model: Any, apply: Applier, sample: Sampler) -> None:
    """The frozen pack registers the middle block under a key that the host never looks up."""
    seen = set()

    def probe(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        block, number = extra_options["block"]
        seen.add((block, number, extra_options["block_index"]))
        return q

    probed = model.clone()
    for layer in SD15.layers:
        probed.set_model_attn2_replace(probe, *layer.address)
    sample(apply(probed), steps=1)
    assert seen == {layer.address for layer in SD15.layers}


@pytest.mark.parametrize("keys", [2, 3])
def test_another_packs_patch_is_wrapped_not_overwritten(
    model: Any, apply: Applier, sample: Sampler, keys: int
) -> None:
    """Our branch on top of theirs; they may have named the layer with or without its depth."""
    said: list[str] = []

    class Foreign:
        def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Any) -> Tensor:
            said.append("called")
            return torch.zeros_like(q)

        def to(self, target: Any) -> Foreign:
            said.append("to")
            return self

        def models(self) -> list[Any]:
            said.append("models")
            return []

    foreign = model.clone()
    for layer in SD15.layers:
        foreign.set_model_attn2_replace(Foreign(), *layer.address[:keys])
    theirs = sample(foreign, steps=1)
    patched = apply(foreign)
    both = sample(patched, steps=1)
    assert torch.equal(sample(apply(foreign, weight=0.0), steps=1), theirs)
    assert relative_error(both, theirs) > 1e-3
    assert {"called", "to", "models"} <= set(said)


@pytest.mark.parametrize(
    ("guider", "conditionings", "expected"),
    [
        ("Guider_Basic", 1, {True: 1}),
        ("Guider_DualCFG", 3, {True: 1, False: 2}),
        ("Guider_PerpNeg", 3, {True: 1, False: 2}),
    ],
)
def test_roles_come_from_the_conditioning_not_from_its_place(
    host: Any,
    model: Any,
    apply: Applier,
    forwards: Any,
    guider: str,
    conditionings: int,
    expected: dict[bool, int],
) -> None:
    import comfy.samplers
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_perpneg as perpneg

    patched = apply(model)
    conds = [text(i) for i in range(conditionings)]
    guide = getattr(custom, guider, None) or getattr(perpneg, guider)
    made = guide(patched)
    if guider == "Guider_DualCFG":
        made.set_conds(*conds)
        made.set_cfg(4.0, 2.0)
    elif guider == "Guider_PerpNeg":
        made.set_conds(*conds)
        made.set_cfg(4.0, 1.0)
    else:
        made.set_conds(conds[0])
    noise = draw(1, 4, 8, 8)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 1)
    made.sample(
        noise,
        torch.zeros_like(noise),
        comfy.samplers.sampler_object("euler"),
        sigmas,
        disable_pbar=True,
        seed=0,
    )
    found: dict[bool, int] = {}
    for chunks, _ in forwards():
        for chunk in chunks:
            found[chunk.is_positive] = found.get(chunk.is_positive, 0) + 1
    assert found == expected


def live_branches(host: Any, apply: Applier, model: Any, chunks: Any, mask: Tensor) -> Any:
    patched = apply(model, mask=mask)
    entries = patched.model_options["transformer_options"]["image_prompts"]
    unets = host.library("ip_adapter.host.unet")
    run = host.library("ip_adapter.host.run").Run(
        entries,
        {layer.address: layer for layer in unets.cross_attention_layers(model)},
        model.get_model_object("model_sampling"),
        torch.float32,
        (8, 12),
    )
    return run.live(chunks, torch.ones(1), torch.device("cpu"))


def test_half_a_mask_touches_only_its_half(host: Any, model: Any, apply: Applier) -> None:
    chunk = host.library("ip_adapter.host.run").Chunk
    mask = torch.zeros(1, 64, 96)
    mask[:, :, 48:] = 1
    live = live_branches(host, apply, model, (chunk(True, None, (0,)),), mask)
    for address, width, grid in ((("input", 1, 0), 32, (8, 12)), (("middle", 0, 0), 128, (1, 2))):
        query = draw(1, grid[0] * grid[1], width)
        zero = torch.zeros_like(query)
        out = live[address][0].add(zero, query, {"activations_shape": [1, width, *grid]})
        out = out.view(*grid, width)
        assert bool((out[:, : grid[1] // 2] == 0).all())
        assert bool((out[:, grid[1] // 2 :] != 0).all())


def test_a_mask_that_hides_everything_is_said(
    host: Any,
    model: Any,
    apply: Applier,
    sample: Sampler,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Load Image's mask of an opaque picture is one: easily connected by mistake."""
    patching = host.library("ip_adapter.host.patching")
    for mask, said in ((torch.zeros(1, 64, 64), True), (torch.eye(64), False)):
        caplog.clear()
        patched, report = patching.apply(model, apply.adapter, apply.prompt(), mask=mask)
        assert ("a mask is 0 everywhere" in report) == said
        assert ("its mask is 0 everywhere" in caplog.text) == said
        assert torch.equal(sample(patched), sample(model)) == said


def test_masks_follow_areas_and_frames(host: Any, model: Any, apply: Applier) -> None:
    """A conditioning with an area gets that part of the mask; a frame gets its own mask."""
    chunk = host.library("ip_adapter.host.run").Chunk
    masks = torch.rand(3, 8, 12)
    area = (4, 6, 2, 5)  # height, width, top, left
    live = live_branches(host, apply, model, (chunk(True, area, (2, 0)),), masks)
    (found,) = live["input", 1, 0][0].places.masks
    expected = torch.stack([masks[2, 2:6, 5:11], masks[0, 2:6, 5:11]])[:, None]
    torch.testing.assert_close(found, expected)


def test_areas_run_with_masks(host: Any, model: Any, apply: Applier, sample: Sampler) -> None:
    left = [[text(1)[0][0], {"area": (8, 8, 0, 0), "strength": 1.0}]]
    right = [[text(3)[0][0], {"area": (8, 8, 0, 4), "strength": 1.0}]]
    mask = torch.zeros(1, 64, 96)
    mask[:, :, 80:] = 1
    noise = draw(1, 4, 8, 12)
    without, with_it = (
        sample(m, noise=noise, positive=left + right, steps=1)
        for m in (model, apply(model, mask=mask))
    )
    assert bool(torch.isfinite(with_it).all())
    assert relative_error(with_it, without) > 1e-4


def test_context_windows_give_every_frame_its_own_mask(
    host: Any, model: Any, apply: Applier, sample: Sampler, forwards: Any
) -> None:
    import comfy.context_windows as windows

    patched = apply(model, mask=torch.rand(6, 64, 64))
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
    sample(patched, noise=draw(6, 4, 8, 8), steps=1)
    seen = {chunk.frames for chunks, _ in forwards() for chunk in chunks}
    assert {frame for frames in seen for frame in frames} == set(range(6))
    assert len(seen) > 1 and all(1 < len(frames) < 6 for frames in seen), seen


def test_tiles_of_the_whole_batch_are_understood(host: Any, model: Any, apply: Applier) -> None:
    """Tiled samplers repeat all rows, one tile after the other."""
    run = host.library("ip_adapter.host.run")
    chunks = (run.Chunk(True, None, (0,)), run.Chunk(False, None, (0,)))
    entries = apply(model).model_options["transformer_options"]["image_prompts"]
    unets = host.library("ip_adapter.host.unet")
    layers = {layer.address: layer for layer in unets.cross_attention_layers(model)}
    sampling = model.get_model_object("model_sampling")
    live = run.Run(entries, layers, sampling, torch.float32, (8, 8)).live(
        chunks, torch.ones(1), torch.device("cpu")
    )
    branch = live["input", 1, 0][0]
    query = draw(4, 10, 32)
    text_branch = torch.zeros_like(query)
    whole = branch.add(text_branch, query, {})
    for tile in (slice(0, 2), slice(2, 4)):
        assert_close(whole[tile], branch.add(text_branch[tile], query[tile], {}))
    with pytest.raises(Exception, match="3 rows where the sampler announced 2"):
        branch.add(text_branch[:3], query[:3], {})


@pytest.mark.parametrize(
    ("influence", "message"),
    [
        ({"start": 0.6, "end": 0.4}, "0.6 to 0.4"),
        ({"start": -0.1}, "-0.1 to 1"),
        ({"end": 1.1}, "0.0 to 1.1"),
        ({"mask": torch.zeros(1, 1, 8, 8)}, r"shape \(1, 1, 8, 8\)"),
        ({"mask": torch.zeros(1, 0, 8)}, "empty"),
    ],
)
def test_bad_influence_is_refused_and_nothing_applied(
    model: Any, apply: Applier, influence: dict[str, Any], message: str
) -> None:
    before = dict(model.model_options["transformer_options"])
    with pytest.raises(Exception, match=message) as caught:
        apply(model, **influence)
    assert type(caught.value).__name__ in ("InfluenceError", "ImageError")
    assert model.model_options["transformer_options"] == before


def test_another_family_is_refused_by_both_names(host: Any, apply: Applier) -> None:
    with pytest.raises(Exception, match=r"is for SD 1\.5 .* the model is SDXL \(70 layers"):
        apply(unet("SDXL"))


def test_other_widths_are_refused(host: Any, apply: Applier) -> None:
    with pytest.raises(Exception, match=r"layer 1 is 32 wide, the model's layer .* is 320 wide"):
        apply(unet("SD 1.5"))


def test_a_transformer_model_is_refused(host: Any, apply: Applier) -> None:
    import comfy.model_patcher

    class Flux(nn.Module):
        pass

    base = nn.Module()
    base.diffusion_model = Flux()
    device = torch.device("cpu")
    with pytest.raises(Exception, match="The model is a Flux, not a UNet"):
        apply(comfy.model_patcher.ModelPatcher(base, device, device, size=1))


def test_a_prompt_of_another_adapter_is_refused(
    host: Any, model: Any, apply: Applier, plus_adapter: Any
) -> None:
    patch = host.library("ip_adapter.host.patching").apply
    with pytest.raises(Exception, match=r"encoded with ip-adapter_sd15.*applied with .*plus"):
        patch(model, plus_adapter, apply.prompt())


def test_another_packs_adapter_object_is_refused(host: Any) -> None:
    with pytest.raises(Exception, match="another pack made"):
        host.library("ip_adapter.host.adapters").require({"ip_adapter": {}})


def test_two_kinds_of_adapter_chain(
    host: Any, model: Any, apply: Applier, plus_adapter: Any, sample: Sampler
) -> None:
    plus = Applier(host, plus_adapter)
    one = sample(plus(apply(model, weight=0.5), weight=0.3))
    other = sample(apply(plus(model, weight=0.3), weight=0.5))
    assert_close(one, other, relative=1e-4)
    assert relative_error(one, sample(apply(model, weight=0.5))) > 1e-3
