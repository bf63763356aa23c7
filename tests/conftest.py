"""Fixtures that several rooms of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.synthetic import adapters

ROOT = Path(__file__).resolve().parent.parent
MODEL_FILES = ROOT / ".host" / "base"
"""Small random models under the published names; built once, kept between runs."""

NARROW = (8,) * 16
"""Widths of adapters for tests that need no base model."""


@pytest.fixture(scope="session")
def model_files() -> Path:
    """The ``models`` folder with everything the shipped workflows name."""
    from tests.synthetic.models import build_models, build_openclip

    build_models(MODEL_FILES)
    build_openclip(MODEL_FILES)
    return MODEL_FILES / "models"


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    """A narrow global adapter as .safetensors."""
    return adapters.write_safetensors(adapters.base_sd15(NARROW), tmp_path / "base.safetensors")


@pytest.fixture
def plus_file(tmp_path: Path) -> Path:
    """A narrow plus adapter, with a small resampler, as .safetensors."""
    tensors = adapters.plus_sd15(NARROW, inner=64, heads=2, depth=2)
    return adapters.write_safetensors(tensors, tmp_path / "plus.safetensors")
