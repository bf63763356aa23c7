"""Refusals of the OpenCLIP reader; tests/parity runs a real one."""

from __future__ import annotations

import pytest
import torch

from ip_adapter.errors import CheckpointError
from ip_adapter.openclip import load_tower
from tests.synthetic.adapters import Tensors


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
