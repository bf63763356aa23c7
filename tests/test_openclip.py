"""The OpenCLIP reader: a small tower, refusals; tests/parity runs a large one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ip_adapter.errors import CheckpointError
from ip_adapter.openclip import load_tower
from tests.synthetic.adapters import Tensors
from tests.tolerance import assert_close


def tower(width: int, layers: int) -> Tensors:
    tensors = {"visual.conv1.weight": torch.zeros(width, 3, 14, 14)}
    for i in range(layers):
        tensors[f"visual.transformer.resblocks.{i}.attn.in_proj_weight"] = torch.zeros(1)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"vision_model.x": torch.zeros(1)}, "Load CLIP Vision"),
        ({"x": torch.zeros(1)}, "open_clip_pytorch_model.bin"),
        (tower(768, 12), "width 768 with 12 layers"),
        (tower(1280, 32), "looks like ViT-H-14 but"),
        (tower(1664, 48), "looks like ViT-bigG-14 but"),
    ],
)
def test_other_files_are_refused(tensors: Tensors, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tower(tensors, "x.bin")


@pytest.fixture(scope="module")
def miniature() -> Any:
    """The project's own CLIP with random weights, in open_clip."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(
            embed_dim=128,
            vision_cfg={
                "image_size": 64,
                "layers": 4,
                "width": 128,
                "head_width": 32,
                "patch_size": 8,
            },
            text_cfg={
                "context_length": 77,
                "vocab_size": 40,
                "width": 128,
                "heads": 4,
                "layers": 3,
            },
        )
        for name, parameter in model.visual.named_parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            offset = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.data = offset + 0.5 * scale * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def test_the_miniatures_tower_gives_what_open_clip_gives(miniature: Any) -> None:
    tower = load_tower(miniature.state_dict(), "open_clip_model.safetensors")
    assert (tower.architecture, tower.image_size) == ("Miniature CLIP", 64)
    assert (tower.hidden, tower.pooled) == (128, 128)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    layers: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, given, output: layers.append(output))
        for block in miniature.visual.transformer.resblocks
    ]
    embedding = miniature.encode_image(pixels)
    for hook in hooks:
        hook.remove()
    last, penultimate, pooled, _ = tower(pixels)
    assert penultimate.shape == (3, 65, 128)
    assert_close(pooled, embedding)
    assert_close(last, layers[3])
    assert_close(penultimate, layers[2])


def test_a_tower_of_its_widths_with_other_patches_is_refused(miniature: Any) -> None:
    tensors = dict(miniature.state_dict())
    tensors["visual.conv1.weight"] = torch.zeros(128, 3, 16, 16)
    with pytest.raises(CheckpointError, match=r"like Miniature CLIP but 0 .* 2 have another"):
        load_tower(tensors, "x.bin")
