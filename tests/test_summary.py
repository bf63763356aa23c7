"""What acts on a MODEL: the words, and the diagram as somebody sees it who knows no layout."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

from ip_adapter import diagram, summary
from ip_adapter.encoders import VIT_H
from ip_adapter.influence import Timing, parse_curve
from ip_adapter.layers import SD15, SDXL, Family
from ip_adapter.spec import AdapterSpec, LinearProjection
from ip_adapter.summary import Applied, Summary

RUN = (1, 3, 5, 7, 9, 11, 31, 13, 15, 17, 19, 21, 23, 25, 27, 29)
"""The checkpoint's numbers of SD 1.5's layers in the order in which the UNet runs them."""

Colour = tuple[int, int, int]


def applied(weights: Any, family: Family = SD15, **more: Any) -> Applied:
    """A base adapter with 4 tokens of one reference.

    Args:
        weights: For each of SD 1.5's layers in the order of the UNet, or by number.
        family: Whose adapter.
        more: See `Applied`.
    """
    spec = AdapterSpec(
        family, LinearProjection(1024, 4, family.context_width), (), "base", encoder=VIT_H
    )
    numbered = weights if isinstance(weights, dict) else dict(zip(RUN, weights, strict=True))
    return Applied("ip-adapter_sd15.safetensors", spec, 4, 1, numbered, **more)


def whole(*shown: Applied, notes: tuple[str, ...] = ()) -> Summary:
    return Summary("SD 1.5", SD15, shown, notes)


def drawn(found: Summary) -> np.ndarray:
    return np.asarray(diagram.draw(found)).astype(int)


def strips(pixels: np.ndarray, count: int = 16) -> list[list[Colour]]:
    """The colours of the squares in each row of squares, found by looking for even runs of pixels.

    Each is seen near its upper left corner, where no number is written.
    """
    found: list[list[Colour]] = []
    last = -100
    for y, line in enumerate(pixels[::4, :660]):
        runs = [(colour, len(list(run))) for colour, run in groupby(map(tuple, line.tolist()))]
        paper = runs[0][0]
        squares = [colour for colour, wide in runs if wide >= 20 and colour != paper]
        if len(squares) == count and y - last > 15:  # not the rest of one, below its numbers
            found.append(squares)
            last = y
    return found


def test_layers_are_colours_on_one_scale() -> None:
    first = applied([0.5] * 6 + [0.0] + [1.0] * 9)
    second = applied([1.0] * 6 + [-0.5] + [0.5] * 9)
    rows = strips(drawn(whole(first, second)))
    assert len(rows) == 2
    (low, *others), zero, (high, *more) = rows[0][:6], rows[0][6], rows[0][7:]
    assert set(others) == {low} and set(more) == {high}
    assert zero[0] == zero[1] == zero[2]
    assert rows[1] == [high] * 6 + [rows[1][6]] + [low] * 9
    negative = rows[1][6]
    assert negative[2] > negative[0] and low[0] > low[2] and high[0] > high[2]
    assert len({low, high, zero, negative}) == 4


def test_a_stronger_weight_is_a_darker_colour() -> None:
    weights = [0.1 * step for step in range(1, 17)]
    (row,) = strips(drawn(whole(applied(weights))))
    lightness = [sum(colour) for colour in row]
    assert lightness == sorted(lightness, reverse=True) and len(set(lightness)) == 16
    (row,) = strips(drawn(whole(applied([-weight for weight in weights]))))
    lightness = [sum(colour) for colour in row]
    assert lightness == sorted(lightness, reverse=True) and len(set(lightness)) == 16


def test_layers_within_one_square_are_stripes_of_it() -> None:
    """SDXL has ten layers in a transformer of its up blocks; here the first five are on."""
    numbers = [
        layer.index
        for layer in SDXL.layers
        if layer.diffusers.startswith("up_blocks.0.attentions.1.")
    ]
    found = applied(dict.fromkeys(numbers[:5], 1.0), SDXL)
    pixels = drawn(Summary("SDXL", SDXL, (found,)))
    (box,) = (
        box
        for box, cell in zip(
            diagram.cell_boxes(found.cells, diagram.row_tops(whole(found))[0]),
            found.cells,
            strict=True,
        )
        if cell.place == 6
    )
    left, top, _, bottom = box
    upper, lower = pixels[top + 2, left + 2], pixels[bottom - 3, left + 2]
    assert upper[0] > upper[2] + 60 and len(set(lower)) == 1
    assert "6: 0 to 1, the others 0" in found.strength()


def test_opposed_layers_are_striped() -> None:
    one = applied([1.0] * 16, opposed=frozenset({RUN[4], RUN[5]}))
    pixels = drawn(whole(one))
    boxes = diagram.cell_boxes(one.cells, diagram.row_tops(whole(one))[0])
    colours = [
        {tuple(pixel) for pixel in pixels[upper + 3, left:right].tolist()}
        for left, upper, right, _ in boxes
    ]
    assert [place for place, seen in enumerate(colours) if len(seen) > 1] == [4, 5]
    assert "layers 4-5" in whole(one).words()


@pytest.mark.parametrize(
    ("timing", "share"),
    [
        (Timing(), 1.0),
        (Timing(0.25, 0.75), 0.5),
        (Timing(0.0, 0.1), 0.1),
        (Timing(0.6, 0.4), 0.0),
        (Timing(0.0, 1.0, parse_curve("0:1, 0.5:0")), 0.5),
    ],
)
def test_the_chart_is_filled_while_the_image_acts(timing: Timing, share: float) -> None:
    pixels = drawn(whole(applied([1.0] * 16, timing=timing)))
    left, right = diagram.CHART
    fill = np.array([int(diagram.FILL[i : i + 2], 16) for i in (1, 3, 5)])
    filled = (pixels[:, left:right] == fill).all(-1).any(0)
    assert filled.sum() == pytest.approx(share * (right - left), abs=4)


def test_the_curve_s_height_is_its_factor() -> None:
    pixels = drawn(whole(applied([1.0] * 16, timing=Timing(0, 1, parse_curve("0:1, 1:0")))))
    left, right = diagram.CHART
    fill = np.array([int(diagram.FILL[i : i + 2], 16) for i in (1, 3, 5)])
    heights = (pixels[:, left:right] == fill).all(-1).sum(0)[4:-4]
    assert (np.diff(heights) <= 0).all()
    middle = heights[len(heights) // 2]
    assert middle == pytest.approx(heights[0] / 2, abs=2)


def test_the_mask_is_shown() -> None:
    mask = torch.zeros(1, 32, 64)
    mask[:, :, 16:] = 1
    pixels = drawn(whole(applied([1.0] * 16, mask=mask)))
    left, _ = diagram.WHERE
    part = pixels[diagram.HEADER :, left:]
    black, white = ((part == level).all(-1) for level in (0, 255))
    assert white.sum() / (black.sum() + white.sum()) == pytest.approx(0.75, abs=0.03)
    assert black.any(0).nonzero()[0].max() < white.any(0).nonzero()[0].min()


def test_the_words_say_what_is_active() -> None:
    mask = torch.zeros(1, 10, 10)
    mask[:, :5, :7] = 1
    one = applied(
        [0.4] * 4 + [0.1] + [0.4] + [0.0] * 3 + [0.4] * 7,
        opposed=frozenset({RUN[4]}),
        timing=Timing(0.2, 0.6, parse_curve("0.2:1, 0.5:0.25")),
        mask=mask,
        factors=(1.0, 0.5, 0.0),
        scaling="K+V",
        notes=("Something is missing.",),
    )
    assert whole(applied([0.8] * 16), one, notes=("The end.",)).words().splitlines() == [
        "2 image prompts on this SD 1.5 model",
        "",
        "1. ip-adapter_sd15.safetensors",
        "   base for SD 1.5, reads OpenCLIP ViT-H/14",
        "   4 tokens of 1 reference",
        "   weight 0.8 in all 16 layers",
        "   all steps",
        "   whole picture",
        "",
        "2. ip-adapter_sd15.safetensors",
        "   base for SD 1.5, reads OpenCLIP ViT-H/14",
        "   4 tokens of 1 reference",
        "   weights of the layers: 0-3: 0.4, 4: 0.1 against, 5: 0.4, 9-15: 0.4, the others 0",
        "   steps 20% to 60%, weight times 1 at 20%, 0.25 at 50%",
        "   mask, 35% of the picture",
        "   Against the image in layer 4: guidance leads away from it there, which needs a CFG "
        "above 1.",
        "   Weight of each picture: times 1, 0.5, 0.",
        "   The weight multiplies K+V.",
        "   Something is missing.",
        "",
        "The end.",
    ]


@pytest.mark.parametrize(
    ("weight", "more", "reason"),
    [
        (0.0, {}, "its weight is 0 in every layer"),
        (1.0, {"factors": (0.0, 0.0)}, "its weight is 0 for every picture"),
        (1.0, {"mask": torch.zeros(1, 4, 4)}, "its mask is 0 everywhere"),
        (1.0, {"timing": Timing(0.6, 0.4)}, "its two step windows have no step in common"),
        (
            1.0,
            {"timing": Timing(0.5, 1.0, parse_curve("0:1, 0.4:0"))},
            "its keyframes are 0 in all of its steps",
        ),
        (1.0, {}, ""),
    ],
)
def test_what_has_no_effect_says_why(weight: float, more: Any, reason: str) -> None:
    one = applied([weight] * 16, **more)
    assert one.idle == reason
    assert (f"no effect: {reason}" in whole(one).words()) == bool(reason)


def test_masks_of_several_pictures() -> None:
    mask = torch.zeros(2, 10, 10)
    mask[0, 0], mask[1, :3] = 1, 1
    assert applied([1.0] * 16, mask=mask).place() == "masks of 2 pictures, 10% to 30% of each"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (-0.0, "0"), (0.0625, "0.062"), (1 / 3, "0.33"), (-2.0, "-2")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert summary.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.004, "under 1%"), (0.999, "99%"), (1.0, "100%")]
)
def test_a_share_is_called_nothing_or_all_only_if_it_is(share: float, text: str) -> None:
    assert summary.percent(share) == text


def test_a_model_without_image_prompts_says_what_to_do() -> None:
    nothing = whole()
    assert nothing.words().startswith("No image prompt on this SD 1.5 model\nConnect the MODEL")
    (row,) = strips(drawn(nothing))
    assert len(set(row)) == 1 and len(set(row[0])) == 1
    other = Summary("Flux", None)
    assert "are not supported" in other.words()
    assert strips(drawn(other)) == []


def test_more_rows_than_fit_are_counted() -> None:
    many = whole(*[applied([1.0] * 16)] * (diagram.MOST + 3))
    assert len(strips(drawn(many))) == diagram.MOST
    assert many.words().count("ip-adapter_sd15.safetensors") == diagram.MOST + 3


def test_file_names_in_any_letters_are_drawn() -> None:
    one = applied([1.0] * 16)
    odd = Applied("\u4eba\u7269 \U0001f600.safetensors", one.spec, 4, 1, one.weights)
    assert len(strips(drawn(whole(odd)))) == 1
    assert "\u4eba\u7269" in whole(odd).words()
