"""The host's own nodes that patch a MODEL, a sampler or a conditioning, with an image prompt.

What the picture must be is the host's own, with the node, on a UNet that has the image branch put
in by hand (see `ByHand`). Both orders of node and Apply must give it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import host_process
from tests.host.conftest import Applier, Sampler, draw, text
from tests.host.test_coexistence import ORDERS, ByHand, both, hand
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

__all__ = ["hand"]  # a fixture


FILES = {
    "nodes_apg.py": ("APG",),
    "nodes_attention_multiply.py": ("UNetCrossAttentionMultiply",),
    "nodes_context_windows.py": ("ContextWindowsManual",),
    "nodes_custom_sampler.py": (
        "BasicGuider",
        "BasicScheduler",
        "CFGGuider",
        "DualCFGGuider",
        "DualModelGuider",
        "KSamplerSelect",
        "RandomNoise",
        "SamplerCustomAdvanced",
    ),
    "nodes_easycache.py": ("EasyCache", "LazyCache"),
    "nodes_freelunch.py": ("FreeU", "FreeU_V2"),
    "nodes_hooks.py": (
        "ConditioningSetProperties",
        "CreateHookKeyframe",
        "CreateHookLoraModelOnly",
        "SetHookKeyframes",
    ),
    "nodes_hypertile.py": ("HyperTile",),
    "nodes_model_advanced.py": ("ModelSamplingDiscrete", "RescaleCFG"),
    "nodes_model_downscale.py": ("PatchModelAddDownscale",),
    "nodes_nag.py": ("NAGuidance",),
    "nodes_pag.py": ("PerturbedAttentionGuidance",),
    "nodes_perpneg.py": ("PerpNeg", "PerpNegGuider"),
    "nodes_sag.py": ("SelfAttentionGuidance",),
    "nodes_tcfg.py": ("TCFG",),
    "nodes_tomesd.py": ("TomePatchModel",),
    "nodes_torch_compile.py": ("TorchCompileModel",),
}
"""Where the host keeps its own nodes; a started host loads all of the files."""


@cache
def find_node(host: host_process.Host, node_id: str) -> Any:
    """The class of a node, or None."""
    if node_id not in host.nodes.NODE_CLASS_MAPPINGS:
        name = next(name for name, ids in FILES.items() if node_id in ids)
        path = Path(host.nodes.__file__).parent / "comfy_extras" / name
        if path.exists():
            loading = host.nodes.load_custom_node(str(path), module_parent="comfy_extras")
            assert asyncio.run(loading)
    return host.nodes.NODE_CLASS_MAPPINGS.get(node_id)


def node(host: host_process.Host, node_id: str, *args: Any, **inputs: Any) -> Any:
    """The first output of one of the host's nodes; skips where this host does not have it."""
    kind = find_node(host, node_id)
    if kind is None:
        pytest.skip(f"this host has no node {node_id}")
    call = kind.execute if hasattr(kind, "define_schema") else getattr(kind(), kind.FUNCTION)
    out = call(*args, **inputs)
    return getattr(out, "args", out)[0]


@dataclass(frozen=True)
class Partner:
    """One of the host's nodes from MODEL to MODEL.

    Attributes:
        node_id: Its id.
        inputs: What it gets beside the MODEL.
        steps: How many it needs to show an effect.
        size: Of the latent.
        is_idle: Whether it changes nothing here, because it is of no use without the GPU, say.
    """

    node_id: str
    inputs: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    size: tuple[int, int] = (8, 8)
    is_idle: bool = False


SHRINK = {
    "block_number": 3,
    "downscale_factor": 2.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "downscale_method": "bicubic",
    "upscale_method": "bicubic",
}
CACHE = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
PARTNERS = {
    "FreeU": Partner("FreeU", {"b1": 1.5, "b2": 1.6, "s1": 0.9, "s2": 0.2}),
    "FreeU V2": Partner("FreeU_V2", {"b1": 1.5, "b2": 1.6, "s1": 0.9, "s2": 0.2}, size=(16, 16)),
    "HyperTile": Partner(
        "HyperTile", {"tile_size": 32, "swap_size": 2, "max_depth": 1, "scale_depth": False}
    ),
    "ToMe": Partner("TomePatchModel", {"ratio": 0.5}),
    "PAG": Partner("PerturbedAttentionGuidance", {"scale": 3.0}, size=(16, 16)),
    "SAG": Partner("SelfAttentionGuidance", {"scale": 1.0, "blur_sigma": 2.0}, size=(16, 16)),
    "NAG": Partner("NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}),
    "deep shrink": Partner(
        "PatchModelAddDownscale", {**SHRINK, "downscale_after_skip": True}, size=(16, 16)
    ),
    "deep shrink before the skip": Partner(
        "PatchModelAddDownscale", {**SHRINK, "downscale_after_skip": False}, size=(16, 24)
    ),
    "v prediction": Partner(
        "ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}, steps=2
    ),
    "LCM": Partner("ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": True}),
    "rescaled CFG": Partner("RescaleCFG", {"multiplier": 0.7}),
    "cross-attention weights": Partner(
        "UNetCrossAttentionMultiply", {"q": 0.7, "k": 1.2, "v": 1.3, "out": 0.8}
    ),
    "APG": Partner("APG", {"eta": 0.5, "norm_threshold": 5.0, "momentum": 0.0}),
    "TCFG": Partner("TCFG"),
    "EasyCache": Partner("EasyCache", CACHE, steps=5),
    "LazyCache": Partner("LazyCache", CACHE, steps=5),
    "torch.compile": Partner("TorchCompileModel", {"backend": "cudagraphs"}, is_idle=True),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", PARTNERS)
def test_partner_and_image_prompt_both_act_in_either_order(
    host: Any, model: Any, apply: Applier, sample: Sampler, hand: ByHand, name: str
) -> None:
    """Some nodes draw random numbers, and a cached node keeps state: each run starts afresh."""
    made = PARTNERS[name]
    mask = torch.rand(8 * made.size[0], 8 * made.size[1], generator=torch.manual_seed(7))

    def partner(one: Any) -> Any:
        return node(host, made.node_id, one, **made.inputs)

    def picture(one: Any) -> Tensor:
        torch.manual_seed(0)
        return sample(one, noise=draw(1, 4, *made.size), steps=made.steps)

    with hand.under(model, 0.8, mask):
        alone = picture(model)
        expected = alone if made.is_idle else picture(partner(model))
    if not made.is_idle:
        assert relative_error(expected, alone) > 1e-4
        without = picture(partner(model))
        assert relative_error(expected, without) > 1e-4
    for first in ("theirs", "ours"):
        found = picture(both(partner, model, apply, first, weight=0.8, mask=mask))
        assert_close(found, expected, relative=1e-4)
        if not made.is_idle:
            assert torch.equal(picture(both(partner, model, apply, first, weight=0.0)), without)


@ORDERS
def test_the_old_perp_neg_brings_a_conditioning_of_its_own(
    host: Any, model: Any, apply: Applier, sample: Sampler, hand: ByHand, caplog: Any, first: str
) -> None:
    """It is made in the middle of a step: no run knows it, and it is not the positive one."""

    def partner(one: Any) -> Any:
        return node(host, "PerpNeg", one, text(3), 1.0)

    with hand.under(model):
        expected = sample(partner(model))
        assert relative_error(expected, sample(model)) > 1e-4
    assert_close(sample(both(partner, model, apply, first)), expected, relative=1e-4)
    assert "gets no image prompt" not in caplog.text


GUIDERS: dict[str, dict[str, Any]] = {
    "BasicGuider": {"conditioning": 1},
    "CFGGuider": {"positive": 1, "negative": 2, "cfg": 4.0},
    "DualCFGGuider": {
        "cond1": 1,
        "cond2": 3,
        "negative": 2,
        "cfg_conds": 4.0,
        "cfg_cond2_negative": 2.0,
        "style": "regular",
    },
    "PerpNegGuider": {
        "positive": 1,
        "negative": 2,
        "empty_conditioning": 3,
        "cfg": 4.0,
        "neg_scale": 1.0,
    },
    "DualModelGuider": {"positive": 1, "negative": 2, "cfg": 4.0, "model_negative": None},
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_every_guider_tells_the_sides_apart(
    host: Any, model: Any, apply: Applier, hand: ByHand, guider: str
) -> None:
    """Only the positive conditioning gets the image, in whatever place the guider puts it."""

    def picture(one: Any) -> Tensor:
        given = {
            name: text(value) if type(value) is int else value
            for name, value in GUIDERS[guider].items()
        }
        if "model_negative" in given:
            given["model_negative"] = model
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        out = node(
            host,
            "SamplerCustomAdvanced",
            node(host, "RandomNoise", 5),
            node(host, guider, model=one, **given),
            node(host, "KSamplerSelect", "euler"),
            node(host, "BasicScheduler", one, "normal", 2, 1.0),
            latent,
        )
        return out["samples"]  # type: ignore[no-any-return]

    with hand.under(model):
        expected = picture(model)
    without = picture(model)
    assert_close(picture(apply(model)), expected, relative=1e-4)
    assert torch.equal(picture(apply(model, weight=0.0)), without)
    assert relative_error(expected, without) > 1e-3


@ORDERS
def test_context_windows_keep_the_frames_apart(
    host: Any, model: Any, apply: Applier, sample: Sampler, forwards: Any, hand: ByHand, first: str
) -> None:
    """Every frame has a text and an image of its own, so by hand the text names the image."""
    frames = 6
    tokens = draw(frames + 1, 4, 768, seed=5)
    states = draw(frames, 77, 768, seed=6)
    prompt = host.library("ip_adapter.prompt").from_tokens(
        tokens[1:], tokens[:1], apply.adapter.fingerprint, apply.adapter.label, frames=frames
    )
    patching = host.library("ip_adapter.host.patching")

    def partner(one: Any) -> Any:
        return node(
            host,
            "ContextWindowsManual",
            one,
            context_length=4,
            context_overlap=1,
            context_schedule="standard_static",
            context_stride=1,
            closed_loop=False,
            fuse_method="flat",
            dim=0,
            freenoise=False,
        )

    def ours(one: Any) -> Any:
        return patching.apply(one, apply.adapter, prompt)[0]

    def picture(one: Any) -> Tensor:
        return sample(
            one, noise=draw(frames, 4, 8, 8), positive=[[states, {}]], negative=text(2), steps=1
        )

    by_hand = ByHand(hand.weights, list(zip(states, tokens[1:], strict=True)), tokens[0])
    with by_hand.under(model):
        expected = picture(partner(model))
        assert_close(expected, picture(model), relative=1e-4)  # frames do not see each other
    found = picture(partner(ours(model)) if first == "ours" else ours(partner(model)))
    assert_close(found, expected, relative=1e-4)
    windows = {chunk.frames for chunks, _ in forwards() for chunk in chunks}
    assert {frame for window in windows for frame in window} == set(range(frames))
    assert all(1 < len(window) < frames for window in windows)


@pytest.fixture
def lora(host: host_process.Host) -> Iterator[str]:
    """A LoRA on the queries and the outputs of two cross-attention layers, in the host's folder."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for block, width in (("input_blocks.1.1", 32), ("middle_block.1", 128)):
        for number, linear in enumerate(("to_q", "to_out.0")):
            name = f"diffusion_model.{block}.transformer_blocks.0.attn2.{linear}"
            weights[f"{name}.lora_up.weight"] = 0.3 * draw(width, 4, seed=number)
            weights[f"{name}.lora_down.weight"] = 0.3 * draw(4, width, seed=10 + number)
    path = folder / "coexistence.safetensors"
    save_file(weights, path)
    yield path.name
    with contextlib.suppress(OSError):
        os.remove(path)


@pytest.mark.parametrize("keyframes", [False, True])
def test_a_lora_hooked_to_one_conditioning(
    host: Any,
    model: Any,
    apply: Applier,
    sample: Sampler,
    hand: ByHand,
    lora: str,
    keyframes: bool,
) -> None:
    """The host runs the sides apart then, and changes the weights under us between them."""
    hooks = node(host, "CreateHookLoraModelOnly", lora, 1.0)
    if keyframes:
        frames = node(host, "CreateHookKeyframe", 0.2, 0.0)
        frames = node(host, "CreateHookKeyframe", 1.5, 0.5, prev_hook_kf=frames)
        hooks = node(host, "SetHookKeyframes", hooks, frames)

    def positive() -> Any:
        return node(host, "ConditioningSetProperties", text(1), 1.0, "default", hooks=hooks)

    with hand.under(model):
        expected = sample(model, positive=positive(), steps=2)
        assert relative_error(expected, sample(model, steps=2)) > 1e-3
    without = sample(model, positive=positive(), steps=2)
    assert_close(sample(apply(model), positive=positive(), steps=2), expected, relative=1e-4)
    off = sample(apply(model, weight=0.0), positive=positive(), steps=2)
    assert torch.equal(off, without)
    assert relative_error(expected, without) > 1e-3


@ORDERS
def test_a_deep_clone_carries_the_image_prompt(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, first: str
) -> None:
    """As Select Model Device does it: weights read again from the file, patches taken along."""
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this host has no deepclone_multigpu")

    def partner(one: Any) -> Any:
        out = one.deepclone_multigpu()
        assert out.model is not one.model
        return out

    with hand.under(model):
        expected = sample(model)
    assert_close(sample(both(partner, model, apply, first)), expected, relative=1e-4)


@ORDERS
def test_two_devices_share_the_conditionings(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, monkeypatch: Any, first: str
) -> None:
    """The host's multi-GPU split: one side of guidance on each device, in threads of their own.

    The second device is the processor under another name; the second model is a deep clone.
    """
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this host has no deepclone_multigpu")
    import comfy.model_management
    import comfy.multigpu

    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(
        comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices
    )

    def partner(one: Any) -> Any:
        return comfy.multigpu.create_multigpu_deepclones(one, 2)

    with hand.under(model):
        expected = sample(model)
    split = both(partner, model, apply, first)
    assert len(split.get_additional_models_with_key("multigpu")) == 1
    assert_close(sample(split), expected, relative=1e-4)
