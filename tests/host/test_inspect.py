"""Inspection on the real host: what was applied is what is said, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tests.host.conftest import Applier, draw
from tests.synthetic.models import ADAPTER_BASE, ADAPTER_FACE, ADAPTER_PLUS

pytestmark = pytest.mark.host


@pytest.fixture
def words(host: Any) -> Callable[[Any], list[str]]:
    """The node's text, without the space at the beginning of lines."""

    def read(model: Any) -> list[str]:
        text = host.node("ImagePromptInspect").execute(model).result[0]
        return [line.strip() for line in text.splitlines()]

    return read


@pytest.fixture(scope="session")
def influence(host: Any) -> Any:
    return host.library("ip_adapter.influence")


def test_a_chain_is_told_in_its_order(
    host: Any, model: Any, apply: Applier, plus_adapter: Any, words: Any
) -> None:
    both = Applier(host, plus_adapter)(apply(model, weight=0.5), weight=0.7)
    assert words(both) == [
        "2 image prompts on this SD 1.5 model",
        "",
        f"1. {ADAPTER_BASE.name}",
        "base for SD 1.5, reads OpenCLIP ViT-H/14",
        "4 tokens of 1 reference",
        "weight 0.5 in all 16 layers",
        "all steps",
        "whole picture",
        "Its kind is a guess, light-v11 or light would have equal tensors: 'variant' in Load "
        "IP-Adapter corrects it.",
        "",
        f"2. {ADAPTER_PLUS.name}",
        "plus for SD 1.5, reads OpenCLIP ViT-H/14",
        "16 tokens of 1 reference",
        "weight 0.7 in all 16 layers",
        "all steps",
        "whole picture",
        "Its kind is a guess, plus-face or composition would have equal tensors: 'variant' in "
        "Load IP-Adapter corrects it.",
    ]


def test_what_is_set_twice_multiplies(
    model: Any, apply: Applier, influence: Any, words: Any
) -> None:
    """Weights 0.5 x 0.8, windows 10-70% and 20-90%, the left half of the upper half."""
    left, upper = torch.zeros(8, 8), torch.zeros(4, 16)
    left[:, :4], upper[:2] = 1, 1
    more = influence.Influence(
        weight=0.8, layers="0-3:1, 6:-2", start=0.2, end=0.9, mask=upper, frames=(1.0, 0.0)
    )
    found = words(apply(model, weight=0.5, start=0.1, end=0.7, mask=left, influence=more))
    assert "weights of the layers: 0-3: 0.4, 6: -0.8, the others 0" in found
    assert "steps 20% to 70%" in found
    assert "mask, 25% of the picture" in found
    assert "Weight of each picture: times 1, 0." in found


def test_presets_curves_and_scaling(model: Any, apply: Applier, influence: Any, words: Any) -> None:
    """Of SD 1.5, style transfer precise opposes layers 4 (at a quarter) and 5."""
    more = influence.Influence(
        layers="style transfer precise",
        curve=influence.parse_curve("0:1, 0.5:0"),
        scaling="K+V w/ C penalty",
    )
    found = words(apply(model, influence=more))
    layers = "0-3: 1, 4: 0.25 against, 5: 1 against, 9-15: 1, the others 0"
    assert f"weights of the layers: {layers}" in found
    assert "all steps, weight times 1 at 0%, 0 at 50%" in found
    assert "The weight multiplies K+V w/ C penalty." in found
    assert any(line.startswith("Against the image in layers 4-5: ") for line in found)


@pytest.mark.parametrize(("positive", "negative"), [(1, 1), (2, 1), (2, 3), (3, 3), (4, 2)])
def test_references_are_counted_once(
    host: Any, model: Any, base_adapter: Any, words: Any, positive: int, negative: int
) -> None:
    """Both sides are repeated until they are as long; that is no further reference."""
    tokens = draw(positive + negative, 4, 768)
    made = host.library("ip_adapter.prompt").from_tokens(
        tokens[:positive], tokens[positive:], base_adapter.fingerprint, base_adapter.label
    )
    patched, _ = host.library("ip_adapter.host.patching").apply(model, base_adapter, made)
    plural = "" if positive == 1 else "s"
    assert f"{4 * positive} tokens of {positive} reference{plural}" in words(patched)


def test_prompts_of_frames_are_counted(
    host: Any, model: Any, base_adapter: Any, words: Any
) -> None:
    tokens = draw(6, 4, 768)
    made = host.library("ip_adapter.prompt").from_tokens(
        tokens, draw(1, 4, 768, seed=1), base_adapter.fingerprint, base_adapter.label, 3
    )
    patched, _ = host.library("ip_adapter.host.patching").apply(model, base_adapter, made)
    assert "8 tokens of 2 references, for each of 3 pictures" in words(patched)


def test_regions_are_image_prompts_with_masks(
    host: Any, model: Any, apply: Applier, base_adapter: Any, words: Any
) -> None:
    region = host.library("ip_adapter.regions").Region
    left = torch.zeros(1, 8, 8)
    left[..., :2] = 1
    regions = (region(apply.prompt(0), left, 0.5), region(apply.prompt(1), 1 - left))
    patched, _ = host.library("ip_adapter.host.regions").apply(model, base_adapter, regions)
    found = words(patched)
    assert found[0] == "2 image prompts on this SD 1.5 model"
    assert [line for line in found if line.startswith("mask")] == [
        "mask, 25% of the picture",
        "mask, 75% of the picture",
    ]


def test_without_image_prompts_it_says_what_to_do(model: Any, words: Any) -> None:
    first, second = words(model)
    assert first == "No image prompt on this SD 1.5 model"
    assert "Apply IP-Adapter" in second


def test_a_model_that_is_no_unet_is_named(model: Any, words: Any) -> None:
    other = model.clone()
    other.add_object_patch("diffusion_model", nn.Identity())
    first, second = words(other)
    assert first == f"No image prompt on this {type(model.model).__name__} model"
    assert "not supported" in second and "SDXL" in second


def test_a_missing_lora_is_told(host: Any, model: Any, model_files: Path, words: Any) -> None:
    face = host.library("ip_adapter.host.adapters").load(model_files / ADAPTER_FACE)
    patched = Applier(host, face)(model)
    missing = "Its LoRA is not on this model"
    assert any(line.startswith(missing) for line in words(patched))
    lora, _ = host.library("ip_adapter.host.face_lora").add(model, face, "inside", 0.6)
    found = words(Applier(host, face)(lora))
    assert not any(line.startswith(missing) for line in found)
    assert "4 tokens of 1 face" in found


def test_torch_compile_is_told(model: Any, apply: Applier, words: Any) -> None:
    from comfy.patcher_extension import WrappersMP

    compiled = model.clone()
    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", lambda *a, **k: None)
    assert any(line.startswith("torch.compile is set") for line in words(apply(compiled)))
    assert not any("torch.compile" in line for line in words(compiled))
    assert not any("torch.compile" in line for line in words(apply(model)))


def foreign(module: str, name: str = "Patch", **attributes: Any) -> Any:
    """A patch as another pack's would look, which the host imported under this name."""
    return type(name, (), {"__module__": module, **attributes})()


def test_image_prompts_of_another_pack_are_told(model: Any, apply: Applier, words: Any) -> None:
    """The host imports a folder under its whole path, with ``_x_`` for dots."""
    theirs = foreign("/srv/custom_nodes/ComfyUI_IPAdapter_plus.CrossAttentionPatch")
    patched = model.clone()
    for number in (1, 2, 4):
        patched.set_model_attn2_replace(theirs, "input", number, 0)
    for found in (words(patched), words(apply(patched))):
        assert found[-1].startswith(
            "ComfyUI_IPAdapter_plus has applied an image prompt, too, in 3 layers"
        )


def test_image_prompts_are_known_by_what_a_shared_patch_calls(model: Any, words: Any) -> None:
    def ipadapter_attention() -> None: ...

    theirs = foreign(r"C:\ComfyUI\custom_nodes\some_x_pack.patch", callback=[ipadapter_attention])
    patched = model.clone()
    patched.set_model_attn2_replace(theirs, "middle", 0, 0)
    assert words(patched)[-1].startswith("some.pack has applied an image prompt, too, in 1 layer.")


def test_other_attention_patches_are_told(model: Any, apply: Applier, words: Any) -> None:
    patched = model.clone()
    patched.set_model_attn2_replace(foreign("custom_nodes.regional.nodes"), "middle", 0, 0)
    patched.set_model_attn2_patch(partial(foreign("comfy_extras.nodes_x", __call__=print)))
    found = words(apply(patched))
    assert found[-2:] == [
        "regional replaces the text's attention in 1 layer; image prompts are added to it.",
        "ComfyUI changes the text's attention in every layer.",
    ]


def test_inspecting_changes_nothing(model: Any, apply: Applier, words: Any) -> None:
    patched = apply(model, weight=0.5)
    options = patched.model_options["transformer_options"]
    before = {key: options[key] for key in options}
    assert words(patched) == words(patched)
    assert patched.model_options["transformer_options"] is options
    assert {key: options[key] for key in options} == before


def test_the_diagram_is_an_image_and_a_preview(host: Any, model: Any, apply: Applier) -> None:
    import folder_paths

    output = host.node("ImagePromptInspect").execute(apply(model, weight=0.5))
    _, picture = output.result
    assert (
        picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[2:] == (1024, 3)
    )
    assert 0 <= float(picture.min()) < 0.5 < float(picture.max()) <= 1
    ui = output.ui.as_dict() if hasattr(output.ui, "as_dict") else output.ui
    (saved,) = ui["images"]
    assert saved["type"] == "temp"
    file = Path(folder_paths.get_temp_directory(), saved["subfolder"], saved["filename"])
    with Image.open(file) as shown:
        assert shown.size == (1024, picture.shape[1])


def test_an_object_of_another_kind_of_model_does_not_fail(words: Any) -> None:
    """What stands for a MODEL in other packs may have no options at all."""
    odd = SimpleNamespace(
        model_options={},
        model=SimpleNamespace(),
        get_model_object=lambda name: nn.Identity(),
        get_wrappers=lambda *names: [],
    )
    assert words(odd)[0] == "No image prompt on this SimpleNamespace model"
