"""One denoising prediction with every published adapter that diffusers knows, LoRA included.

Files of equal layout are here once.
Narrow UNets of the true topology, projections in their published sizes; `test_denoising` has the
real width. The reference is diffusers throughout: loader, projection, attention and, for FaceID,
its LoRA through PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity import reference, unets
from tests.parity.unets import draw
from tests.synthetic import adapters, catalogue
from tests.tolerance import assert_close, relative_error

pytestmark = [pytest.mark.parity, pytest.mark.host]

POOLED_H, POOLED_G, HIDDEN = (1024,), (1280,), (257, 1280)


@dataclass(frozen=True)
class Case:
    """What an adapter reads.

    Attributes:
        image: Shape of an image encoder's features.
        face: Whether it reads a face vector.
        structure: Weight of the face's structure, for files with the shortcut of V2.
    """

    image: tuple[int, ...] | None = None
    face: bool = False
    structure: float | None = None


CASES: dict[str, Case] = {
    "sd15": Case(POOLED_H),
    "sd15_vit-G": Case(POOLED_G),
    "plus_sd15": Case(HIDDEN),
    "full-face_sd15": Case(HIDDEN),
    "faceid_sd15": Case(face=True),
    "faceid-plus_sd15": Case(HIDDEN, face=True),
    "faceid-plusv2_sd15": Case(HIDDEN, face=True, structure=1.0),
    "portrait_sd15": Case(face=True),
    "sd2": Case(POOLED_H),
    "plus_sd2": Case(HIDDEN),
    "sdxl": Case(POOLED_G),
    "sdxl_vit-h": Case(POOLED_H),
    "plus_sdxl_vit-h": Case(HIDDEN),
    "faceid_sdxl": Case(face=True),
    "faceid-plusv2_sdxl": Case(HIDDEN, face=True, structure=0.5),
    "portrait_sdxl": Case(face=True),
    "kolors_plus": Case((577, 1024)),
}

Pairs = Callable[[str], unets.Pair]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    made: dict[str, unets.Pair] = {}

    def get(family: str) -> unets.Pair:
        if family not in made:
            made[family] = unets.pair(family)
        return made[family]

    return get


@dataclass(frozen=True)
class Given:
    """The features of ``[no image, image]``."""

    image: Tensor | None
    face: Tensor | None


def features(case: Case) -> Given:
    image = None if case.image is None else draw(2, *case.image, seed=3)
    face = torch.nn.functional.normalize(draw(2, 512, seed=5)) if case.face else None
    if image is not None and image.ndim == 2:
        image[0] = 0  # the paper's dropped image condition
    if face is not None:
        face[0] = 0
    return Given(image, face)


def in_diffusers(
    pair: unets.Pair, tensors: adapters.Tensors, case: Case, lora: float | None = None
) -> Tensor:
    """The guided prediction of diffusers, at weight 1."""
    unet = reference.load(pair.reference, [tensors], lora=lora)
    given = features(case)
    embeds = given.image if given.face is None else given.face
    assert embeds is not None
    if given.face is not None and given.image is not None:
        projector = unet.encoder_hid_proj.image_projection_layers[0]
        projector.clip_embeds = given.image[:, None]
        if case.structure is not None:
            projector.shortcut, projector.shortcut_scale = True, case.structure
    return unets.guided(
        reference.predict(unet, unets.inputs(pair.family), [embeds[:, None]]), cfg=7.5
    )


def on_host(model: Any, family: str, adapter: Any, case: Case, weight: float = 1.0) -> Tensor:
    """The guided prediction of the host with our patch."""
    given = features(case)
    structure = {} if case.structure is None else {"structure": case.structure}
    tokens = unets.tokens(adapter, image=given.image, face=given.face, **structure)
    patched = unets.apply(model, adapter, tokens, weight=weight)
    return unets.predict(patched, unets.inputs(family))


def with_lora(pair: unets.Pair, adapter: Any, strength: float) -> Any:
    """Our patch of the LoRA inside an adapter's file."""
    face_lora = unets.library("ip_adapter.host.face_lora")
    return face_lora.apply(pair.model, face_lora.inside(adapter), strength, "the LoRA")[0]


@pytest.mark.parametrize("name", CASES)
def test_one_prediction_agrees_with_diffusers(pairs: Pairs, name: str, tmp_path: Path) -> None:
    row, case = catalogue.ROWS[name], CASES[name]
    pair = pairs(row.family)
    adapter = unets.load(adapters.write(row, tmp_path, nano=True, seed=6))
    tensors = adapters.make(row, nano=True, seed=6)
    model = with_lora(pair, adapter, 1.0) if row.has_lora else pair.model
    expected = in_diffusers(pair, tensors, case, lora=1.0 if row.has_lora else None)
    found = on_host(model, row.family, adapter, case)
    bare = on_host(model, row.family, adapter, case, weight=0)
    print(f"{name}: {relative_error(found, expected):.1e}, {relative_error(found, bare):.1e}")
    assert_close(found, expected, relative=1e-4)
    # Two sides that both ignored the adapter would agree.
    assert relative_error(found, bare) > 1e-2
    if row.has_lora:
        assert relative_error(on_host(pair.model, row.family, adapter, case), found) > 1e-2


@pytest.mark.parametrize("strength", [-0.5, 0.6])
def test_the_strength_of_a_lora_is_that_of_diffusers(
    pairs: Pairs, strength: float, tmp_path: Path
) -> None:
    row, case = catalogue.ROWS["faceid_sd15"], CASES["faceid_sd15"]
    pair = pairs(row.family)
    adapter = unets.load(adapters.write(row, tmp_path, nano=True, seed=6))
    expected = in_diffusers(pair, adapters.make(row, nano=True, seed=6), case, lora=strength)
    found = on_host(with_lora(pair, adapter, strength), row.family, adapter, case)
    print(f"strength {strength}: {relative_error(found, expected):.1e}")
    assert_close(found, expected, relative=1e-4)
    whole = on_host(with_lora(pair, adapter, 1.0), row.family, adapter, case)
    assert relative_error(found, whole) > 1e-2


@pytest.mark.parametrize("name", ["faceid_sd15", "faceid_sdxl"])
def test_the_companion_file_is_the_lora_of_diffusers(
    pairs: Pairs, name: str, tmp_path: Path
) -> None:
    """SDXL's companion carries alphas, which the keys inside the adapter do not."""
    row, case = catalogue.ROWS[name], CASES[name]
    pair = pairs(row.family)
    adapter = unets.load(adapters.write(row, tmp_path, nano=True, seed=6))
    face_lora = unets.library("ip_adapter.host.face_lora")
    companion = face_lora.companion(adapters.write_lora(row, tmp_path, nano=True, seed=6))
    model, _ = face_lora.apply(pair.model, companion, 1.0, "the companion")
    expected = in_diffusers(pair, adapters.make(row, nano=True, seed=6), case, lora=1.0)
    found = on_host(model, row.family, adapter, case)
    assert_close(found, expected, relative=1e-4)
    assert relative_error(on_host(pair.model, row.family, adapter, case), found) > 1e-2


@pytest.mark.parametrize("structure", [0.0, 0.5, 1.5])
def test_the_weight_of_the_structure_is_the_shortcut_scale_of_diffusers(
    pairs: Pairs, structure: float, tmp_path: Path
) -> None:
    row = catalogue.ROWS["faceid-plusv2_sd15"]
    pair = pairs(row.family)
    adapter = unets.load(adapters.write(row, tmp_path, nano=True, seed=6))
    tensors = adapters.make(row, nano=True, seed=6)
    case = Case(HIDDEN, face=True, structure=structure)
    found = on_host(pair.model, row.family, adapter, case)
    assert_close(found, in_diffusers(pair, tensors, case), relative=1e-4)
    default = on_host(pair.model, row.family, adapter, Case(HIDDEN, face=True))
    assert relative_error(found, default) > 1e-2
