"""Projections against diffusers' own, on the published shapes and the same weights.

Those that diffusers does not know are in `test_formulas`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ip_adapter.checkpoint import load_adapter
from ip_adapter.projections import Features
from tests.parity.reference import projection
from tests.synthetic import adapters, catalogue
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.parity

IMAGES: dict[str, tuple[int, ...]] = {
    "sd15": (1024,),
    "sd15_vit-G": (1280,),
    "plus_sd15": (257, 1280),
    "full-face_sd15": (257, 1280),
    "sd2": (1024,),
    "plus_sd2": (257, 1280),
    "sdxl": (1280,),
    "sdxl_vit-h": (1024,),
    "plus_sdxl_vit-h": (257, 1280),
    "noobai": (1280,),
    "kolors_plus": (577, 1024),
}
"""Shape of what each published file reads; files of equal layout are here once."""

FACES = ("faceid_sd15", "portrait_sd15", "faceid_sdxl", "portrait_sdxl")


@dataclass(frozen=True)
class Sides:
    ours: Any
    reference: Any


def sides(name: str, folder: Path) -> Sides:
    row = catalogue.ROWS[name]
    path = adapters.write(row, folder, nano=True, seed=1)
    return Sides(load_adapter(path).float(), projection(adapters.make(row, nano=True, seed=1)))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", IMAGES)
def test_image_tokens_agree_with_diffusers(name: str, tmp_path: Path) -> None:
    both = sides(name, tmp_path)
    features = draw(2, *IMAGES[name])
    for given in (features, torch.zeros_like(features)):
        found = both.ours.image_tokens(Features(image=given))
        assert_close(found, both.reference(given), relative=1e-5)


@pytest.mark.parametrize("name", FACES)
def test_face_tokens_agree_with_diffusers(name: str, tmp_path: Path) -> None:
    both = sides(name, tmp_path)
    face = torch.nn.functional.normalize(draw(3, 512))
    for given in (face, torch.zeros_like(face)):
        found = both.ours.image_tokens(Features(face=given))
        assert_close(found, both.reference(given), relative=1e-5)


@pytest.mark.parametrize("name", ["faceid-plus_sd15", "faceid-plusv2_sd15", "faceid-plusv2_sdxl"])
def test_faces_with_structure_agree_with_diffusers(name: str, tmp_path: Path) -> None:
    """diffusers does not tell V2 from V1; its users set the shortcut, and its scale, by hand."""
    both = sides(name, tmp_path)
    face, image = torch.nn.functional.normalize(draw(2, 512)), draw(2, 257, 1280, seed=2)
    both.reference.clip_embeds = image[:, None]
    both.reference.shortcut = "v2" in name
    found = {}
    for structure in (0.0, 0.5, 1.0):
        both.reference.shortcut_scale = structure
        given = Features(face=face, image=image, structure=structure)
        found[structure] = both.ours.image_tokens(given)
        assert_close(found[structure], both.reference(face), relative=1e-5)
    if "v2" in name:
        assert relative_error(found[0.5], found[1.0]) > 1e-2
    else:
        assert torch.equal(found[0.5], found[1.0])
