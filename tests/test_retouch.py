from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ip_adapter import retouch
from ip_adapter.errors import ImageError

KINDS = ("fade", "dissolve", "gaussian", "shuffle")
SIDE = 224


def picture(height: int, width: int, channels: int = 3, count: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + height * 1000 + width)
    return torch.rand(count, height, width, channels, generator=generator)


def smooth(height: int, width: int) -> Tensor:
    """A gradient, of which a smooth warp keeps the statistics."""
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack([rows.expand(-1, width), columns.expand(height, -1), rows * columns], -1)[
        None
    ]


def expected_sharp(image: np.ndarray, amount: float) -> np.ndarray:
    """The formula of contrast-adaptive sharpening, pixel by pixel, of one channel."""
    out = image.copy()
    for y in range(1, image.shape[0] - 1):
        for x in range(1, image.shape[1] - 1):
            (a, b, c), (d, e, f), (g, h, i) = image[y - 1 : y + 2, x - 1 : x + 2].tolist()
            low = min(b, d, e, f, h) + min(a, c, g, i)
            high = max(b, d, e, f, h) + max(a, c, g, i)
            weight = -(1 / 8 + (1 / 5 - 1 / 8) * amount)
            weight *= (min(low, 2 - high) / high) ** 0.5 if high else 0.0
            out[y, x] = min(max((e + weight * (b + d + f + h)) / (1 + 4 * weight), 0), 1)
    return out


@pytest.mark.parametrize("amount", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sharpening_is_the_formula(amount: float, channels: int) -> None:
    image = picture(9, 12, channels, count=2)
    image[0, :4, :4] = 0  # black, where the formula would divide by zero
    image[1, 5:, 5:] = 1
    found = retouch.sharpen(image, amount)
    for b in range(2):
        for c in range(channels):
            expected = expected_sharp(image[b, ..., c].double().numpy(), amount)
            np.testing.assert_allclose(found[b, ..., c].numpy(), expected, atol=2e-6)


def test_sharpening_keeps_the_border_and_what_is_flat() -> None:
    """The old pack surrounds the picture with zeros, of which the formula makes weight zero."""
    image = picture(8, 10)
    found = retouch.sharpen(image, 1.0)
    for edge in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
        assert torch.equal(found[edge], image[edge])
    padded = np.pad(image[0, ..., 0].double().numpy(), 1)
    expected = expected_sharp(padded, 1.0)[1:-1, 1:-1]
    np.testing.assert_allclose(found[0, ..., 0].numpy(), expected, atol=2e-6)
    flat = torch.full((1, 8, 8, 3), 0.3)
    torch.testing.assert_close(retouch.sharpen(flat, 1.0), flat)


def test_sharpening_raises_contrast_with_the_amount_and_touches_no_input() -> None:
    image = 0.5 + 0.2 * (picture(32, 32) - 0.5)
    before = image.clone()
    spread = [float(retouch.sharpen(image, amount).std()) for amount in (0.0, 0.25, 0.5, 1.0)]
    assert spread == sorted(spread) and spread[-1] > 1.5 * spread[0]
    assert torch.equal(image, before)
    assert torch.equal(retouch.sharpen(image, 0.0), image)
    tiny = picture(2, 5)
    assert torch.equal(retouch.sharpen(tiny, 1.0), tiny)


CROPS = {  # of a picture 60 high and 40 wide, then 40 high and 60 wide: left, top, right, bottom
    "top": ((0, 0, 40, 40), (10, 0, 50, 40)),
    "bottom": ((0, 20, 40, 60), (10, 0, 50, 40)),
    "left": ((0, 10, 40, 50), (0, 0, 40, 40)),
    "right": ((0, 10, 40, 50), (20, 0, 60, 40)),
    "center": ((0, 10, 40, 50), (10, 0, 50, 40)),
    "pad": ((-10, 0, 50, 60), (0, -10, 60, 50)),  # Pillow puts zeros outside
}


@pytest.mark.parametrize("position", CROPS)
@pytest.mark.parametrize(
    "resample", ["LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST"]
)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_preparing_is_pillows_crop_and_resize(position: str, resample: str, mode: str) -> None:
    channels = len(mode)
    for (height, width), box in zip(((60, 40), (40, 60)), CROPS[position], strict=True):
        generator = np.random.default_rng(1)
        levels = generator.integers(0, 256, (2, height, width, channels), dtype=np.uint8)
        found = retouch.prepare(torch.from_numpy(levels) / 255, resample, position, 32)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        for one, result in zip(levels, found, strict=True):
            cut = Image.fromarray(one.squeeze(-1) if channels == 1 else one).crop(box)
            scaled = cut.resize((32, 32), getattr(Image.Resampling, resample))
            expected = np.asarray(scaled, np.float32).reshape(32, 32, channels) / 255
            np.testing.assert_array_equal(result.numpy(), expected)


def test_preparing_is_224_pixels_and_sharpens_last() -> None:
    image = smooth(300, 500)
    plain = retouch.prepare(image)
    assert plain.shape == (1, 224, 224, 3)
    found = retouch.prepare(image, sharpening=0.7)
    expected = expected_sharp(plain[0, ..., 1].double().numpy(), 0.7)
    np.testing.assert_allclose(found[0, ..., 1].numpy(), expected, atol=2e-6)


def test_preparing_keeps_to_the_range() -> None:
    """Values above 1 would wrap around to black in bytes."""
    image = torch.tensor([-0.5, 0.5, 1.5]).expand(1, 4, 4, 3)
    found = retouch.prepare(image, "NEAREST", size=4)
    np.testing.assert_allclose(found[0, 0, 0].numpy(), [0, 127 / 255, 1], rtol=1e-6)


def test_padding_can_have_another_ground() -> None:
    image = torch.ones(1, 10, 30, 3)
    found = retouch.prepare(image, "BOX", "pad", 30, ground=(0.2, 0.4, 0.6))
    ground = np.floor(np.array([0.2, 0.4, 0.6]) * 255 + 1e-4) / 255
    np.testing.assert_allclose(found[0, 0, 0].numpy(), ground, rtol=1e-6)
    np.testing.assert_allclose(found[0, 29, 7].numpy(), ground, rtol=1e-6)
    assert (found[0, 10:20] == 1).all()


def turned(image: Tensor, *steps: v2.Transform) -> Tensor:
    """Run torchvision's transforms on ``[B, H, W, C]``."""
    return v2.Compose([*steps])(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def expected_noise(image: Tensor | None, kind: str, strength: float) -> Tensor:
    """With torchvision, and torch's global random numbers, as the old pack had them."""
    start = torch.zeros(1, SIDE, SIDE, 3)
    if image is not None:
        shrink = v2.Resize((SIDE, SIDE), v2.InterpolationMode.BICUBIC, antialias=True)
        start = turned(image, v2.CenterCrop(min(image.shape[1:3])), shrink)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(start.sum()) % 1_000_000_007)
        if kind == "fade":
            out = torch.lerp(start, torch.rand_like(start), strength)
        elif kind == "dissolve":
            chosen = torch.rand_like(start) < strength
            out = torch.where(chosen, torch.rand_like(start), start)
        elif kind == "gaussian":
            out = start + strength * torch.randn_like(start)
        else:
            warp = v2.ElasticTransform(alpha=75.0, sigma=3.5 - 3.5 * strength)
            out = turned(start, warp, v2.RandomVerticalFlip(1.0), v2.RandomHorizontalFlip(1.0))
            out = torch.lerp(out, torch.ones_like(out), 0.75 * strength * torch.randn_like(out))
    return out.clamp(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.0, 0.35, 1.0])
def test_noise_is_that_of_the_same_seed(kind: retouch.Noise, strength: float) -> None:
    sizes = [(SIDE, SIDE, 3), (SIDE, 300, 3), (301, 250, 3), (250, 300, 3), (90, 131, 4)]
    pictures = [picture(*size, count=i // 2 + 1) for i, size in enumerate(sizes)]
    for image in (None, *pictures):
        found = retouch.noise(image, kind, strength)
        expected = expected_noise(image, kind, strength)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("blur", [1, 4, 9, 32])
def test_noise_is_blurred_last(blur: int) -> None:
    image = picture(SIDE, 231)
    width = blur + 1 - blur % 2
    blurred = v2.GaussianBlur(width, sigma=0.15 * width + 0.35)  # torchvision's own choice
    expected = turned(expected_noise(image, "fade", 0.5), blurred)
    found = retouch.noise(image, "fade", 0.5, blur)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_the_same_again_and_leaves_the_global_random_numbers_alone(
    kind: retouch.Noise,
) -> None:
    image = picture(SIDE, SIDE, seed=1)
    state = torch.random.get_rng_state()
    first = retouch.noise(image, kind, 0.8)
    torch.rand(7)
    torch.testing.assert_close(retouch.noise(image, kind, 0.8), first, rtol=0, atol=0)
    torch.random.set_rng_state(state)
    retouch.noise(image, kind, 0.8)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = retouch.noise(picture(SIDE, SIDE, seed=2), kind, 0.8)
    assert float((other - first).abs().mean()) > 0.05


@pytest.mark.parametrize("kind", ["fade", "dissolve", "gaussian"])
def test_no_strength_is_the_picture(kind: retouch.Noise) -> None:
    image = picture(SIDE, SIDE)
    assert torch.equal(retouch.noise(image, kind, 0.0), image)


def test_shuffle_without_strength_only_warps_and_turns() -> None:
    found = retouch.noise(smooth(SIDE, SIDE), "shuffle", 0.0)
    turned = smooth(SIDE, SIDE).flip(1, 2)
    inner = np.s_[:, 40:-40, 40:-40]
    assert float((found[inner] - turned[inner]).abs().mean()) < 0.03
    assert float((found[inner] - turned[inner]).abs().max()) < 38 / SIDE


def test_full_fade_is_uniform_noise_and_says_nothing_of_the_picture() -> None:
    image = picture(SIDE, SIDE)
    found = retouch.noise(image, "fade", 1.0)
    assert abs(float(found.mean()) - 0.5) < 0.005
    assert abs(float(found.std()) - 12**-0.5) < 0.005
    both = torch.stack((found.flatten(), image.flatten()))
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01


@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_dissolve_replaces_that_share_of_the_values(strength: float) -> None:
    image = picture(SIDE, SIDE)
    changed = (retouch.noise(image, "dissolve", strength) != image).float().mean()
    assert abs(float(changed) - strength) < 0.005


@pytest.mark.parametrize("strength", [0.05, 0.1])
def test_gaussian_has_that_deviation(strength: float) -> None:
    image = torch.full((1, SIDE, SIDE, 3), 0.5)
    found = retouch.noise(image, "gaussian", strength)
    assert abs(float(found.std()) - strength) < 0.01 * strength + 1e-4
    assert abs(float(found.mean()) - 0.5) < 0.001


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(3, 300),
    width=st.integers(3, 300),
    kind=st.sampled_from(KINDS),
    strength=st.floats(0, 1),
    blur=st.integers(0, 32),
)
def test_noise_is_a_picture_of_any_picture(
    height: int, width: int, kind: retouch.Noise, strength: float, blur: int
) -> None:
    found = retouch.noise(picture(height, width), kind, strength, blur)
    assert found.shape == (1, SIDE, SIDE, 3)
    assert float(found.min()) >= 0 and float(found.max()) <= 1 + 1e-5


def test_refusals_name_the_choices() -> None:
    image = picture(4, 4)
    with pytest.raises(ImageError, match="dissolve"):
        retouch.noise(image, "salt", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="center"):
        retouch.prepare(image, position="middle")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="LANCZOS"):
        retouch.prepare(image, resample="SINC")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="NaN"):
        retouch.noise(image * float("nan"), "fade", 1.0)
