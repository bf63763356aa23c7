"""The old nodes that prepare pictures, on the host; their numbers are tested with the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from tests.host.conftest import draw

pytestmark = pytest.mark.host


def picture(height: int, width: int, channels: int = 3, count: int = 1) -> Tensor:
    """What Load Image gives: bytes as fractions."""
    return (draw(count, height, width, channels).sigmoid() * 255).round() / 255


@pytest.mark.parametrize("name", ["LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST"])
@pytest.mark.parametrize("where", ["top", "bottom", "left", "right", "center", "pad"])
def test_preparing_is_a_square_by_pillow(host: Any, name: str, where: str) -> None:
    image = picture(250, 400, count=2)
    (found,) = host.node("PrepImageForClipVision").execute(image, name, where, 0.0).args
    left = {"left": 0, "right": 150}.get(where, 75)
    box = (0, -75, 400, 325) if where == "pad" else (left, 0, left + 250, 250)
    for one, made in zip(image, found, strict=True):
        bytes_of = Image.fromarray((one.numpy() * 255).round().astype(np.uint8))
        expected = bytes_of.crop(box).resize((224, 224), getattr(Image.Resampling, name))
        np.testing.assert_allclose(made.numpy() * 255, np.asarray(expected), atol=1e-3)


def test_values_between_two_bytes_become_the_lower_one(host: Any) -> None:
    """As torchvision's picture of a tensor, which the old pack resized."""
    image = draw(1, 224, 224, 3).sigmoid()
    (found,) = host.node("PrepImageForClipVision").execute(image, "BOX", "center", 0.0).args
    expected = v2.functional.to_pil_image(image[0].movedim(-1, 0))
    np.testing.assert_allclose(found[0].numpy() * 255, np.asarray(expected), atol=1e-3)


def test_sharpening_raises_contrast_and_stays_a_picture(host: Any) -> None:
    image = picture(300, 300, 4)
    node = host.node("PrepImageForClipVision")
    plain, sharp = (node.execute(image, "LANCZOS", "top", s).args[0] for s in (0.0, 1.0))
    assert sharp.shape == plain.shape == (1, 224, 224, 4)
    assert float(sharp.std()) > 1.2 * float(plain.std())
    assert float(sharp.min()) >= 0 and float(sharp.max()) <= 1


@pytest.mark.parametrize("kind", ["fade", "dissolve", "gaussian", "shuffle"])
def test_noise_of_nothing_and_of_a_picture(host: Any, kind: str) -> None:
    node = host.node("IPAdapterNoise")
    (alone,) = node.execute(kind, 0.5, 0).args
    assert alone.shape == (1, 224, 224, 3)
    seeded = torch.Generator().manual_seed(0)  # black sums to 0
    uniform = torch.rand(1, 224, 224, 3, generator=seeded)
    if kind == "fade":
        torch.testing.assert_close(alone, uniform / 2)
    if kind == "dissolve":
        replaced = torch.rand(1, 224, 224, 3, generator=seeded)
        torch.testing.assert_close(alone, replaced * (uniform < 0.5))
    (of_picture,) = node.execute(kind, 0.5, 5, picture(300, 200, count=2)).args
    assert of_picture.shape == (2, 224, 224, 3)
    assert float(of_picture.min()) >= 0 and float(of_picture.max()) <= 1.00001
    again = node.execute(kind, 0.5, 5, picture(300, 200, count=2)).args[0]
    assert torch.equal(of_picture, again)
