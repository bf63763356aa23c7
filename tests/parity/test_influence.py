"""How strongly, where and with what else an image prompt acts: the host against diffusers.

Narrow UNets, weight and places varied: several adapters, several images, negative weights, weights
per block as InstantStyle sets them, masks. diffusers makes every mask black and white and resizes
it by points, this pack averages it; the masks for diffusers therefore follow the coarsest grid of
tokens, where both give zeros and ones, and grey masks are compared with the formula.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Loaded:
    """A file on both sides, and features of ``[no image, images ...]``."""

    tensors: adapters.Tensors
    adapter: Any
    features: Tensor

    @property
    def tokens(self) -> Tensor:
        return unets.tokens(self.adapter, image=self.features)

    @property
    def embeds(self) -> Tensor:
        """diffusers' ``[2, images, ...]``; every image has the same "no image" beside it."""
        images = self.features[1:]
        return torch.stack([self.features[:1].expand_as(images), images])


def loaded(name: str, folder: Path, images: int = 1) -> Loaded:
    row = catalogue.ROWS[name]
    adapter = unets.load(adapters.write(row, folder, nano=True, seed=6))
    features = draw(images + 1, *((257, 1280) if "plus" in name else (1024,)), seed=3)
    if "plus" not in name:
        features[0] = 0
    return Loaded(adapters.make(row, nano=True, seed=6), adapter, features)


@pytest.fixture(scope="module")
def sd15() -> unets.Pair:
    return unets.pair("SD 1.5")


@pytest.fixture(scope="module")
def sdxl() -> unets.Pair:
    return unets.pair("SDXL")


def in_diffusers(
    pair: unets.Pair,
    files: list[Loaded],
    scales: list[reference.Scale],
    size: tuple[int, int] = (16, 16),
    masks: tuple[Tensor, ...] = (),
) -> Tensor:
    unet = reference.load(pair.reference, [file.tensors for file in files], scales)
    given = unets.inputs(pair.family, size)
    embeds = [file.embeds for file in files]
    return unets.guided(reference.predict(unet, given, embeds, masks), cfg=7.5)


def on_host(
    pair: unets.Pair,
    applied: list[tuple[Loaded, Mapping[str, Any]]],
    size: tuple[int, int] = (16, 16),
) -> Tensor:
    model = pair.model
    for file, influence in applied:
        model = unets.apply(model, file.adapter, file.tokens, **influence)
    return unets.predict(model, unets.inputs(pair.family, size))


@pytest.mark.parametrize("weight", [-0.6, 0.0, 0.3, 2.0])
def test_weights(sd15: unets.Pair, weight: float, tmp_path: Path) -> None:
    file = loaded("sd15", tmp_path)
    found = on_host(sd15, [(file, {"weight": weight})])
    assert_close(found, in_diffusers(sd15, [file], [weight]), relative=1e-4)
    assert relative_error(on_host(sd15, [(file, {"weight": 1.0})]), found) > 1e-2


def test_two_adapters_at_once(sd15: unets.Pair, tmp_path: Path) -> None:
    base, plus = loaded("sd15", tmp_path), loaded("plus_sd15", tmp_path)
    found = on_host(sd15, [(base, {"weight": 0.7}), (plus, {"weight": -0.4})])
    assert_close(found, in_diffusers(sd15, [base, plus], [0.7, -0.4]), relative=1e-4)
    for one in ([(base, {"weight": 0.7})], [(plus, {"weight": -0.4})]):
        assert relative_error(on_host(sd15, list(one)), found) > 1e-2


@pytest.mark.parametrize("name", ["sd15", "plus_sd15"])
def test_three_images_of_one_adapter(sd15: unets.Pair, name: str, tmp_path: Path) -> None:
    """One softmax over the tokens of all of them."""
    file = loaded(name, tmp_path, images=3)
    found = on_host(sd15, [(file, {})])
    assert_close(found, in_diffusers(sd15, [file], [1.0]), relative=1e-4)
    first = Loaded(file.tensors, file.adapter, file.features[:2])
    assert relative_error(on_host(sd15, [(first, {})]), found) > 1e-2


def by_layer(family: str, chosen: Mapping[str, float]) -> dict[int, float]:
    """Factors by number in the checkpoint; what begins with no key of `chosen` gets 0."""
    return {
        2 * position + 1: next((f for key, f in chosen.items() if path.startswith(key)), 0.0)
        for position, path in enumerate(catalogue.paths(family))
    }


SD15_SCALES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "one number per half": (
        {"down": 0.3, "mid": 0.8, "up": 1.2},
        {"down_blocks": 0.3, "mid_block": 0.8, "up_blocks": 1.2},
    ),
    "one number per module": (
        {"down": {"block_2": [0.0, 1.0]}, "up": {"block_1": [0.5, 0.0, -0.5], "block_3": 1.0}},
        {
            "down_blocks.2.attentions.1": 1.0,
            "up_blocks.1.attentions.0": 0.5,
            "up_blocks.1.attentions.2": -0.5,
            "up_blocks.3": 1.0,
        },
    ),
}
SDXL_SCALES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "style": ({"up": {"block_0": [0.0, 1.0, 0.0]}}, {"up_blocks.0.attentions.1": 1.0}),
    "style and layout": (
        {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down_blocks.2.attentions.1": 1.0, "up_blocks.0.attentions.1": 1.0},
    ),
}
"""The examples of diffusers' documentation, which are InstantStyle's, and what they address."""


@pytest.mark.parametrize("name", SD15_SCALES)
def test_weights_per_block_of_sd15(sd15: unets.Pair, name: str, tmp_path: Path) -> None:
    scales, chosen = SD15_SCALES[name]
    file = loaded("sd15", tmp_path)
    found = on_host(sd15, [(file, {"layers": by_layer("SD 1.5", chosen)})])
    assert_close(found, in_diffusers(sd15, [file], [scales]), relative=1e-4)
    for weight in (0.0, 1.0):
        assert relative_error(on_host(sd15, [(file, {"weight": weight})]), found) > 1e-2


@pytest.mark.parametrize("name", SDXL_SCALES)
def test_instant_style_on_sdxl(sdxl: unets.Pair, name: str, tmp_path: Path) -> None:
    scales, chosen = SDXL_SCALES[name]
    file = loaded("sdxl_vit-h", tmp_path)
    found = on_host(sdxl, [(file, {"layers": by_layer("SDXL", chosen)})])
    assert_close(found, in_diffusers(sdxl, [file], [scales]), relative=1e-4)
    for weight in (0.0, 1.0):
        assert relative_error(on_host(sdxl, [(file, {"weight": weight})]), found) > 1e-2


def test_style_of_one_image_and_layout_of_another(sdxl: unets.Pair, tmp_path: Path) -> None:
    """The same file twice, each time with its own blocks."""
    style = loaded("sdxl_vit-h", tmp_path)
    layout = Loaded(style.tensors, style.adapter, draw(2, 1024, seed=8))
    layout.features[0] = 0
    chosen = [{"up_blocks.0.attentions.1": 1.0}, {"down_blocks.2.attentions.1": 0.8}]
    scales = [{"up": {"block_0": [0.0, 1.0, 0.0]}}, {"down": {"block_2": [0.0, 0.8]}}]
    found = on_host(
        sdxl,
        [
            (file, {"layers": by_layer("SDXL", where)})
            for file, where in zip((style, layout), chosen, strict=True)
        ],
    )
    assert_close(found, in_diffusers(sdxl, [style, layout], list(scales)), relative=1e-4)
    both = [(file, {"layers": by_layer("SDXL", chosen[0])}) for file in (style, layout)]
    assert relative_error(on_host(sdxl, list(both)), found) > 1e-2


# Masks. The latent is 16 wide, and 16 or 24 high; the middle of SD 1.5 sees an eighth of it.

SIZES = {"square": (16, 16), "portrait": (24, 16)}


def left_half(size: tuple[int, int]) -> Tensor:
    mask = torch.zeros(8 * size[0], 8 * size[1])
    mask[:, : 4 * size[1]] = 1
    return mask


def for_diffusers(*masks: Tensor) -> Tensor:
    """``[1, images, H, W]`` through diffusers' own preparation."""
    from diffusers.image_processor import IPAdapterMaskProcessor

    height, width = masks[0].shape
    stacked = torch.stack(masks)[:, None]
    return IPAdapterMaskProcessor().preprocess(stacked, height, width).movedim(1, 0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SIZES)
def test_a_mask(sd15: unets.Pair, shape: str, tmp_path: Path) -> None:
    size, file = SIZES[shape], loaded("sd15", tmp_path)
    mask = left_half(size)
    found = on_host(sd15, [(file, {"mask": mask, "weight": 0.8})], size)
    expected = in_diffusers(sd15, [file], [0.8], size, (for_diffusers(mask),))
    assert_close(found, expected, relative=1e-4)
    for other in ({"weight": 0.0}, {"weight": 0.8}, {"weight": 0.8, "mask": 1 - mask}):
        assert relative_error(on_host(sd15, [(file, other)], size), found) > 1e-2


def test_a_mask_of_another_size(sd15: unets.Pair, tmp_path: Path) -> None:
    """A user's mask need not have the picture's size, only its proportions."""
    file = loaded("sd15", tmp_path)
    small = torch.zeros(16, 16)
    small[:, :8] = 1
    expected = in_diffusers(sd15, [file], [1.0], masks=(for_diffusers(left_half((16, 16))),))
    assert_close(on_host(sd15, [(file, {"mask": small})]), expected, relative=1e-4)


def test_two_images_in_two_places(sd15: unets.Pair, tmp_path: Path) -> None:
    """diffusers gives one adapter two images with a mask each; here they are two applications."""
    file = loaded("sd15", tmp_path, images=2)
    mask = left_half((16, 16))
    placed = [
        (Loaded(file.tensors, file.adapter, file.features[[0, 1 + image]]), {"mask": where})
        for image, where in enumerate((mask, 1 - mask))
    ]
    found = on_host(sd15, list(placed))
    expected = in_diffusers(sd15, [file], [1.0], masks=(for_diffusers(mask, 1 - mask),))
    assert_close(found, expected, relative=1e-4)
    swapped = [(file, {"mask": 1 - where["mask"]}) for file, where in placed]
    assert relative_error(on_host(sd15, list(swapped)), found) > 1e-2


def test_two_adapters_with_masks_on_sdxl(sdxl: unets.Pair, tmp_path: Path) -> None:
    base, plus = loaded("sdxl_vit-h", tmp_path), loaded("plus_sdxl_vit-h", tmp_path)
    mask = left_half((16, 16))
    found = on_host(
        sdxl, [(base, {"mask": mask, "weight": 0.6}), (plus, {"mask": 1 - mask, "weight": 0.9})]
    )
    masks = (for_diffusers(mask), for_diffusers(1 - mask))
    assert_close(found, in_diffusers(sdxl, [base, plus], [0.6, 0.9], masks=masks), relative=1e-4)
    unmasked = on_host(sdxl, [(base, {"weight": 0.6}), (plus, {"weight": 0.9})])
    assert relative_error(unmasked, found) > 1e-2


@pytest.mark.parametrize("shape", SIZES)
def test_a_grey_mask_is_averaged(sd15: unets.Pair, shape: str, tmp_path: Path) -> None:
    """Each latent token is weighed with the mean of the mask over the pixels it stands for."""
    (height, width), file = SIZES[shape], loaded("sd15", tmp_path)
    mask = torch.rand(8 * height, 8 * width, generator=torch.Generator().manual_seed(9))
    mask[:, : 4 * width] *= 0.2

    def weigh(count: int) -> Tensor:
        step = round((mask.numel() / count) ** 0.5)  # pixels per side of a token
        cells = mask.reshape(8 * height // step, step, 8 * width // step, step)
        return cells.mean((1, 3)).reshape(count, 1)

    unet = copy.deepcopy(sd15.reference)
    weights = adapters.nested(file.tensors)["ip_adapter"]
    tokens = reference.projection(file.tensors)(file.features)
    plain.install(unet, "SD 1.5", [plain.ImageBranch(weights, tokens, 0.8, weigh)])
    given = unets.inputs("SD 1.5", (height, width))
    expected = unets.guided(reference.predict(unet, given), cfg=7.5)
    found = on_host(sd15, [(file, {"mask": mask, "weight": 0.8})], (height, width))
    assert_close(found, expected, relative=1e-4)
    even = on_host(sd15, [(file, {"weight": 0.8 * float(mask.mean())})], (height, width))
    assert relative_error(even, found) > 1e-2
