"""The same ViT-H/14 numbers in three programs: host, open_clip through our tower, transformers.

Both files are written by one recipe, once in Hugging Face naming and once in OpenCLIP's, at the
real size, because the host's loader knows no other. transformers is the judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ip_adapter import images
from tests import host_process
from tests.parity.reference import projection
from tests.synthetic import adapters
from tests.synthetic.models import CLIP_VISION, OPENCLIP
from tests.tolerance import assert_close

pytestmark = [pytest.mark.parity, pytest.mark.host]


PICTURE = torch.rand(1, 240, 320, 3, generator=torch.Generator().manual_seed(1))
Features = tuple[Tensor, Tensor]
"""Projected embedding and penultimate hidden states."""


@pytest.fixture(scope="module")
def truth(model_files: Path) -> dict[str, Features]:
    """transformers' features of the picture, and of zero pixel values, in float32."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        projection_dim=1024,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        judge = CLIPVisionModelWithProjection(config)
    tensors = {key: value.float() for key, value in load_file(model_files / CLIP_VISION).items()}
    missing, _ = judge.load_state_dict(tensors, strict=False, assign=True)
    assert not missing
    judge.vision_model.embeddings.position_ids = torch.arange(257)[None]
    judge.eval()

    def features(pixel_values: Tensor) -> Features:
        with torch.no_grad():
            out = judge(pixel_values, output_hidden_states=True)
        return out.image_embeds, out.hidden_states[-2]

    pixel_values = images.normalise(images.squares(PICTURE, 224, "crop"))
    return {"picture": features(pixel_values), "zero": features(torch.zeros_like(pixel_values))}


@pytest.fixture(scope="module", params=["host", "open_clip"])
def encoder(request: pytest.FixtureRequest, model_files: Path) -> Any:
    host = host_process.start()
    if request.param == "open_clip":
        return host.library("ip_adapter.host.openclip").load(model_files / OPENCLIP)
    import comfy.clip_vision

    return comfy.clip_vision.load(str(model_files / CLIP_VISION))


def test_encoder_agrees_with_transformers(encoder: Any, truth: dict[str, Features]) -> None:
    pooled, penultimate = truth["picture"]
    found = encoder.encode_image(PICTURE)
    assert_close(found.image_embeds, pooled, relative=1e-4)
    assert_close(found.penultimate_hidden_states, penultimate, relative=1e-4)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_image_prompt_is_the_papers(
    kind: str, encoder: Any, truth: dict[str, Features], tmp_path: Path
) -> None:
    """Conditional and unconditional tokens, the latter from the *zero* embedding or pixels."""
    make = {"base": adapters.base_sd15, "plus": adapters.plus_sd15}[kind]
    tensors = make(adapters.NANO_WIDTHS)
    host = host_process.start()
    loaded = host.library("ip_adapter.host.adapters").load(
        adapters.write_safetensors(tensors, tmp_path / "adapter.safetensors")
    )
    prompt = host.library("ip_adapter.host.encoding").encode(loaded, encoder, PICTURE, "crop")

    project = projection(tensors)
    if kind == "base":
        feature = truth["picture"][0]
        dropped = torch.zeros_like(feature)
    else:
        feature, dropped = truth["picture"][1], truth["zero"][1]
    assert_close(prompt.conditional, project(feature), relative=1e-4)
    assert_close(prompt.unconditional, project(dropped), relative=1e-4)
