from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ip_adapter import images
from ip_adapter.errors import ImageError

SIZE = 28


def picture(height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.rand(1, height, width, channels, generator=generator)


def steps(values: Tensor) -> Tensor:
    """CLIP's preprocessing works on 8-bit values."""
    return (values * 255).round() / 255


def test_square_picture_of_the_right_size_is_only_rounded() -> None:
    image = picture(SIZE, SIZE)
    for fit in ("crop", "pad", "tile"):
        torch.testing.assert_close(
            images.squares(image, SIZE, fit), steps(image).movedim(-1, 1), rtol=0, atol=0
        )


@pytest.mark.parametrize(("height", "width"), [(SIZE, 70), (70, SIZE), (SIZE, 45)])
def test_crop_keeps_the_centre(height: int, width: int) -> None:
    image = picture(height, width)
    top, left = (height - SIZE) // 2, (width - SIZE) // 2
    expected = steps(image)[:, top : top + SIZE, left : left + SIZE].movedim(-1, 1)
    torch.testing.assert_close(images.squares(image, SIZE, "crop"), expected, rtol=0, atol=0)


def test_tile_covers_the_long_side_with_even_overlap() -> None:
    image = picture(SIZE, 70)  # 70 / 28 = 2.5, so three tiles
    tiles = images.squares(image, SIZE, "tile")
    assert tiles.shape == (3, 3, SIZE, SIZE)
    for tile, left in zip(tiles, (0, 21, 42), strict=True):
        expected = steps(image)[0, :, left : left + SIZE].movedim(-1, 0)
        torch.testing.assert_close(tile, expected, rtol=0, atol=0)


def test_tiles_of_one_picture_stand_side_by_side() -> None:
    both = torch.cat([picture(SIZE, 56), 1 - picture(SIZE, 56)])
    tiles = images.squares(both, SIZE, "tile")
    torch.testing.assert_close(tiles[:2], images.squares(both[:1], SIZE, "tile"))
    torch.testing.assert_close(tiles[2:], images.squares(both[1:], SIZE, "tile"))


def test_pad_keeps_the_whole_picture_on_ground_that_says_nothing() -> None:
    image = picture(SIZE // 2, SIZE)
    padded = images.squares(image, SIZE, "pad")
    quarter = SIZE // 4
    torch.testing.assert_close(
        padded[:, :, quarter : 3 * quarter], steps(image).movedim(-1, 1), rtol=0, atol=0
    )
    border = images.normalise(padded)[:, :, :quarter]
    assert border.abs().max() < 0.01  # half an 8-bit step, over a deviation of about 0.27


def test_transparent_pixels_are_neutral_and_opaque_ones_unchanged() -> None:
    image = picture(SIZE, SIZE, channels=4)
    image[..., 3] = 1
    opaque = images.squares(image, SIZE, "crop")
    torch.testing.assert_close(opaque, steps(image[..., :3]).movedim(-1, 1), rtol=0, atol=0)
    image[..., 3] = 0
    assert images.normalise(images.squares(image, SIZE, "crop")).abs().max() < 0.01


def test_grey_becomes_three_equal_channels() -> None:
    out = images.squares(picture(SIZE, SIZE, channels=1), SIZE, "crop")
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])


def test_normalise_is_open_clips() -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import Normalize

    pixels = torch.rand(2, 3, 4, 4)
    expected = Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)(pixels)
    torch.testing.assert_close(images.normalise(pixels), expected)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    channels=st.sampled_from([1, 3, 4]),
    fit=st.sampled_from(["crop", "pad", "tile"]),
)
def test_any_size_becomes_squares_of_valid_values(
    height: int, width: int, channels: int, fit: images.Fit
) -> None:
    out = images.squares(picture(height, width, channels), SIZE, fit)
    assert out.shape[1:] == (3, SIZE, SIZE)
    assert len(out) == 1 or fit == "tile"
    assert out.min() >= 0 and out.max() <= 1 and bool(torch.isfinite(out).all())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(8, 8, 3), "has shape (8, 8, 3)"),
        (torch.zeros(0, 8, 8, 3), "is empty"),
        (torch.zeros(1, 0, 8, 3), "is empty"),
        (torch.zeros(1, 8, 8, 2), "has 2 channels"),
        (torch.full((1, 8, 8, 3), float("nan")), "not numbers"),
        (torch.full((1, 8, 8, 3), float("inf")), "not numbers"),
    ],
)
def test_what_is_no_picture_is_refused(image: Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message.replace("(", r"\(").replace(")", r"\)")):
        images.squares(image, SIZE, "crop")


def test_unknown_fit_is_refused() -> None:
    with pytest.raises(ImageError, match="crop, pad, tile"):
        images.squares(picture(8, 8), SIZE, "stretch")  # type: ignore[arg-type]
