"""Adapters that diffusers does not know, against their formulas written out in `plain`.

The UNets are diffusers' own, with the paper's attention in place of its processors. What the
formulas are worth is checked too: they give what diffusers gives for an adapter that it knows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity import plain, reference, unets
from tests.parity.unets import draw
from tests.synthetic import adapters, catalogue
from tests.tolerance import assert_close, relative_error

pytestmark = [pytest.mark.parity, pytest.mark.host]


@pytest.fixture(scope="module")
def sd15() -> unets.Pair:
    return unets.pair("SD 1.5")


@pytest.fixture(scope="module")
def sdxl() -> unets.Pair:
    return unets.pair("SDXL")


@pytest.fixture(scope="module")
def kolors() -> unets.Pair:
    return unets.pair("Kolors")


def check_prediction(
    pair: unets.Pair,
    adapter: Any,
    found_tokens: Tensor,
    weights: plain.Weights,
    tokens: Tensor,
    weight: float = 0.8,
) -> None:
    """Compare the guided predictions, and show that the adapter changes them.

    Args:
        pair: The UNets.
        adapter: Ours.
        found_tokens: Our tokens of ``[no image, image]``.
        weights: The ``ip_adapter`` part of the file.
        tokens: The reference's tokens, as keys and values read them.
        weight: The paper's lambda.
    """
    unet, given = copy.deepcopy(pair.reference), unets.inputs(pair.family)
    plain.install(unet, pair.family, [plain.ImageBranch(weights, tokens, weight)])
    expected = unets.guided(reference.predict(unet, given), cfg=7.5)
    found = unets.predict(unets.apply(pair.model, adapter, found_tokens, weight=weight), given)
    bare = unets.predict(pair.model, given)
    print(f"{relative_error(found, expected):.1e}, {relative_error(found, bare):.1e}")
    assert_close(found, expected, relative=1e-4)
    assert relative_error(found, bare) > 1e-2


def file_of(name: str, folder: Path) -> tuple[Any, dict[str, Mapping[str, Tensor]]]:
    """Our adapter of a published file, and the parts of that file."""
    row = catalogue.ROWS[name]
    path = adapters.write(row, folder, nano=True, seed=6)
    # Read again rather than made again: the largest holds a billion numbers.
    nested = torch.load(path, weights_only=True, mmap=row.container == "bin-zip")
    adapter = unets.load(path)
    return adapter, {"image_proj": nested["image_proj"], "ip_adapter": nested[row.part]}


def test_the_formulas_are_those_of_diffusers(sd15: unets.Pair) -> None:
    row = catalogue.ROWS["plus_sd15"]
    tensors = adapters.make(row, nano=True, seed=6)
    features, given = draw(2, 257, 1280, seed=3), unets.inputs("SD 1.5")
    loaded = reference.load(sd15.reference, [tensors], [0.7])
    expected = reference.predict(loaded, given, [features[:, None]])
    nested, unet = adapters.nested(tensors), copy.deepcopy(sd15.reference)
    tokens = plain.resampler(nested["image_proj"], features)
    plain.install(unet, "SD 1.5", [plain.ImageBranch(nested["ip_adapter"], tokens, 0.7)])
    assert_close(reference.predict(unet, given), expected, relative=1e-4)


@pytest.mark.parametrize("name", ["instantid", "portrait-unnorm_sdxl"])
def test_a_resampler_of_a_face_vector(sdxl: unets.Pair, name: str, tmp_path: Path) -> None:
    """The vector is raw (about 20 long) and a sequence of one; diffusers' resampler agrees."""
    adapter, file = file_of(name, tmp_path)
    face = draw(2, 512, seed=5)
    face[0] = 0
    tokens = plain.resampler(file["image_proj"], face[:, None].double()).float()
    found = unets.tokens(adapter, face=face)
    assert_close(found, tokens, relative=1e-5)
    projection = reference.projection(adapters.make(catalogue.ROWS[name], nano=True, seed=6))
    assert_close(found, projection(face[:, None]), relative=1e-5)
    check_prediction(sdxl, adapter, found, file["ip_adapter"], tokens)


INSTRUCT = {"instruct_sd15": "sd15", "instruct_sdxl": "sdxl"}


@pytest.mark.parametrize("name", INSTRUCT)
def test_instruct(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pair = request.getfixturevalue(INSTRUCT[name])
    adapter, file = file_of(name, tmp_path)
    image = draw(2, 257, 1280, seed=3)
    instruction, prompt = draw(2, 77, 768, seed=7), draw(2, 77, 768, seed=8)
    read = [each.double() for each in (image, instruction, prompt)]
    tokens = plain.instruct(file["image_proj"], *read).float()
    found = unets.tokens(adapter, image=image, instruction=instruction, prompt=prompt)
    assert_close(found, tokens, relative=1e-5)
    swapped = unets.tokens(adapter, image=image, instruction=prompt, prompt=instruction)
    assert relative_error(swapped, found) > 1e-2
    check_prediction(pair, adapter, found, file["ip_adapter"], tokens)


def test_faceid_of_kolors(kolors: unets.Pair, tmp_path: Path) -> None:
    """Its six tokens are as wide as Kolors' text states and go through the same Linear."""
    adapter, file = file_of("kolors_faceid-plus", tmp_path)
    face, image = draw(2, 512, seed=5), draw(2, 577, 1024, seed=3)
    face[0] = image[0] = 0
    tokens = plain.face_perceiver(file["image_proj"], face, image, 1.0)
    found = unets.tokens(adapter, face=face, image=image)
    assert found.shape == (2, 6, 4096)
    assert_close(found, tokens, relative=1e-5)
    bridge = kolors.reference.encoder_hid_proj
    narrowed = torch.nn.functional.linear(tokens, bridge.weight, bridge.bias)
    check_prediction(kolors, adapter, found, file["ip_adapter"], narrowed)
