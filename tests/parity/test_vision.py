"""Image features beside transformers and open_clip: same weights, same pixels, small towers.

The towers are the real ones' kind (activation, class token, names) at a small width, at their own
picture size and at a larger one. transformers and open_clip are the judges, in float32; the host
stores float16, so the weights are drawn in it.
"""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import host_process
from tests.tolerance import assert_close, relative_error

pytestmark = [pytest.mark.parity, pytest.mark.host]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GEOMETRY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_channels": 3,
}


@dataclass(frozen=True)
class Case:
    """One kind of tower.

    Attributes:
        activation: In the feed-forward layers.
        size: Its own picture size.
        patch: Side of a patch.
    """

    activation: str
    size: int
    patch: int = 14
    siglip: bool = False


CASES = {
    "ViT-L/14-336, quick_gelu": Case("quick_gelu", 336),
    "ViT-H/14, gelu": Case("gelu", 224),
    "SigLIP 384, not a multiple of its patch": Case("gelu_pytorch_tanh", 384, siglip=True),
    "SigLIP 512, patch 16": Case("gelu_pytorch_tanh", 64, patch=16, siglip=True),
}


def pictures(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def normalised(pixels: Tensor, case: Case) -> Tensor:
    mean, std = ((0.5,) * 3, (0.5,) * 3) if case.siglip else (CLIP_MEAN, CLIP_STD)
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def draw(model: nn.Module) -> None:
    """Weights that float16 holds exactly, large enough that every part shows in the output."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scale = 1.0 if "embedding" in name else parameter.shape[-1] ** -0.5
        norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
        parameter.data.copy_(((1 + 0.1 * values) if norm else scale * values).half().float())


def judge(case: Case) -> Any:
    """The tower in transformers."""
    import transformers as hf

    sizes = {"image_size": case.size, "patch_size": case.patch, "hidden_act": case.activation}
    if case.siglip:
        model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**GEOMETRY, **sizes))
    else:
        config = hf.CLIPVisionConfig(**GEOMETRY, **sizes, projection_dim=32)
        model = hf.CLIPVisionModelWithProjection(config)
    draw(model)
    return model.eval()


def on_host(model: nn.Module, case: Case) -> Any:
    """The same weights in the host's class."""
    import comfy.clip_vision

    config = {**GEOMETRY, "image_size": case.size, "patch_size": case.patch}
    config |= {"hidden_act": case.activation, "model_type": "clip_vision_model"}
    if case.siglip:
        config |= {"model_type": "siglip_vision_model"}
        config |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        config["projection_dim"] = 32
    with tempfile.TemporaryDirectory() as folder:  # older hosts want a path
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        vision = comfy.clip_vision.ClipVisionModel(str(path))
    tensors = model.state_dict()
    if not any(key.startswith("vision_model.") for key in tensors):
        tensors = {f"vision_model.{key}": value for key, value in tensors.items()}
    missing, _ = vision.load_sd(tensors)
    assert not missing
    return vision


@pytest.fixture(scope="module")
def library() -> Any:
    return host_process.start().library("ip_adapter.host.vision")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, 4])
def test_features_are_those_of_transformers(library: Any, name: str, steps: int) -> None:
    """At the own size and four patches beyond it, as interpolate_pos_encoding does it."""
    case = CASES[name]
    size = case.size if steps == 0 else (case.size // case.patch + steps) * case.patch
    reference = judge(case)
    pixels = pictures(3, size)
    with torch.no_grad():
        truth = reference(
            normalised(pixels, case), output_hidden_states=True, interpolate_pos_encoding=steps > 0
        )
        vision = on_host(reference, case)
        found = library.features(vision, pixels, "hidden")
        assert_close(found, truth.hidden_states[-2], relative=1e-4)
        assert relative_error(found, truth.hidden_states[-1]) > 0.01
        if not case.siglip:
            assert_close(
                library.features(vision, pixels, "pooled"), truth.image_embeds, relative=1e-4
            )


@pytest.mark.parametrize("size", [448, 224])
@pytest.mark.parametrize("kind", ["pooled", "hidden"])
def test_the_zero_picture_is_that_of_transformers(library: Any, kind: str, size: int) -> None:
    case = CASES["ViT-H/14, gelu"]
    reference = judge(case)
    with torch.no_grad():
        truth = reference(
            torch.zeros(1, 3, size, size),
            output_hidden_states=True,
            interpolate_pos_encoding=True,
        )
        found = library.zero_features(on_host(reference, case), size, kind)
    expected = truth.image_embeds if kind == "pooled" else truth.hidden_states[-2]
    assert_close(found, expected, relative=1e-4)


def test_a_table_of_448_pixels_is_not_the_stretched_one(library: Any) -> None:
    """NoobAI's ViT-bigG holds 1025 positions of its own: at 448 pixels they are used as they are,
    which transformers does too when its configuration says 448."""
    case = Case("gelu", 448)
    reference = judge(case)
    pixels = pictures(2, 448)
    with torch.no_grad():
        truth = reference(normalised(pixels, case), output_hidden_states=True)
        found = library.features(on_host(reference, case), pixels, "pooled")
    assert_close(found, truth.image_embeds, relative=1e-4)


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def towers(request: pytest.FixtureRequest, library: Any) -> tuple[Any, Any]:
    """A small tower of open_clip, and our encoder around a copy of it."""
    import open_clip

    config = {"image_size": 56, "layers": 4, "width": 64, "head_width": 16, "patch_size": 14}
    visual = open_clip.model._build_vision_tower(32, config, request.param).eval()
    draw(visual)
    tower = (
        host_process.start()
        .library("ip_adapter.openclip")
        .OpenCLIPTower(copy.deepcopy(visual), "small", hidden=64, pooled=32)
    )
    ours = host_process.start().library("ip_adapter.host.openclip").OpenCLIPVision(tower)
    return visual, ours


def test_features_are_those_of_open_clip(library: Any, towers: tuple[Any, Any]) -> None:
    visual, ours = towers
    pixels = pictures(3, 56)
    layers: list[Tensor] = []
    hook = visual.transformer.resblocks[-2].register_forward_hook(
        lambda _module, _given, out: layers.append(out)
    )
    with torch.no_grad():
        truth = visual(normalised(pixels, Case("gelu", 56)))
        assert_close(library.features(ours, pixels, "pooled"), truth, relative=1e-4)
        assert_close(library.features(ours, pixels, "hidden"), layers[0], relative=1e-4)
    hook.remove()


def test_an_open_clip_tower_at_another_size(library: Any, towers: tuple[Any, Any]) -> None:
    """open_clip resizes positions when it loads weights, with antialiasing; transformers does not.

    The judge is transformers' own table of the larger size in an open_clip tower of that size.
    """
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    visual, ours = towers
    embeddings = CLIPVisionEmbeddings(CLIPVisionConfig(**GEOMETRY, image_size=56, patch_size=14))
    embeddings.position_embedding.weight.data.copy_(visual.positional_embedding)
    with torch.no_grad():
        table = embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 64), 112, 112)
        larger = copy.deepcopy(visual)
        larger.positional_embedding = nn.Parameter(table[0])
        pixels = pictures(2, 112)
        truth = larger(normalised(pixels, Case("gelu", 56)))
        assert_close(library.features(ours, pixels, "pooled"), truth, relative=1e-4)
        assert ours.model.visual.positional_embedding.shape == (17, 64)
