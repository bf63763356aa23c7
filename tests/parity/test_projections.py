"""Projections against diffusers' own, on the published shapes and the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from ip_adapter.checkpoint import load_adapter
from tests.parity.reference import projection
from tests.synthetic import adapters
from tests.tolerance import assert_close

pytestmark = pytest.mark.parity

CASES: dict[str, tuple[Callable[[], adapters.Tensors], tuple[int, ...]]] = {
    "ip-adapter_sd15": (adapters.base_sd15, (2, 1024)),
    "ip-adapter_sd15_vit-G": (partial(adapters.base_sd15, features=1280), (2, 1280)),
    "ip-adapter-plus_sd15": (adapters.plus_sd15, (2, 257, 1280)),
}


@pytest.mark.parametrize("name", CASES)
def test_image_tokens_agree_with_diffusers(name: str, tmp_path: Path) -> None:
    make, shape = CASES[name]
    tensors = make()
    ours = load_adapter(adapters.write_safetensors(tensors, tmp_path / name)).float()
    reference = projection(tensors)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for given in (features, torch.zeros_like(features)):
        assert_close(ours.image_tokens(given), reference(given), relative=1e-5)
