"""Texts that become a grid, and the sheet that its pictures become."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ip_adapter import ImageError, InfluenceError, grid
from ip_adapter.grid import Grid
from ip_adapter.presets import PRESETS

PAPER = torch.tensor([0xF7, 0xF5, 0xF0]) / 255


def plain(level: float, height: int = 300, width: int = 300, count: int = 1) -> Tensor:
    """Pictures of one colour that nothing else on a sheet has; the last digit counts the batch."""
    pictures = torch.zeros(count, height, width, 3)
    pictures[..., 0] = level
    pictures[..., 2] = (torch.arange(count) / 100)[:, None, None] + 0.5
    return pictures


def box(sheet: Tensor, colour: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of what has this colour; all of it must be filled."""
    ys, xs = ((sheet - colour).abs().amax(dim=-1) < 1e-6).nonzero().unbind(1)
    top, left = int(ys.min()), int(xs.min())
    height, width = int(ys.max()) - top + 1, int(xs.max()) - left + 1
    assert len(ys) == height * width
    return top, left, height, width


def ink(part: Tensor) -> int:
    """How many pixels are far from the ground: those of words."""
    return int(((part - PAPER).abs().amax(dim=-1) > 0.4).sum())


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0, 0.3, 0.6, 1", (0.0, 0.3, 0.6, 1.0)),
        (" 1 ", (1.0,)),
        ("0 .5;1\n-1,\t3,", (0.0, 0.5, 1.0, -1.0, 3.0)),
        ("1e-1,+2", (0.1, 2.0)),
    ],
)
def test_weights_are_read(text: str, weights: tuple[float, ...]) -> None:
    assert grid.parse_weights(text) == weights


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "are empty"),
        (" ,; ", "are empty"),
        ("0, high", "hold 'high'"),
        ("0:1", "hold '0:1'"),
        ("0, nan", "hold nan"),
        ("inf", "hold inf"),
        ("0, 3.01", "hold 3.01"),
        ("-1.5", "hold -1.5"),
    ],
)
def test_what_is_no_weight_is_refused(text: str, said: str) -> None:
    with pytest.raises(InfluenceError, match=f"{said}.*numbers from -1 to 3") as caught:
        grid.parse_weights(text)
    assert grid.parse_weights(grid.WEIGHTS) and grid.WEIGHTS in str(caught.value)


def test_presets_are_read() -> None:
    assert grid.parse_presets("linear") == ("linear",)
    text = " Style  Transfer,\ncomposition ;\n\nlinear, linear"
    assert grid.parse_presets(text) == ("style transfer", "composition", "linear", "linear")
    assert grid.parse_presets(", ".join(PRESETS)) == PRESETS


@pytest.mark.parametrize(("text", "said"), [(" ,\n", "empty"), ("linear, styl", "hold 'styl'")])
def test_an_unknown_preset_is_refused_with_the_list(text: str, said: str) -> None:
    with pytest.raises(InfluenceError, match=said) as caught:
        grid.parse_presets(text)
    assert all(name in str(caught.value) for name in PRESETS)


def test_a_grid_has_a_row_for_each_preset_and_a_column_for_each_weight() -> None:
    found = grid.of((0.0, 0.25), ("linear", "composition", "weak input"))
    assert found == Grid(("linear", "composition", "weak input"), ("weight 0", "weight 0.25"))
    assert found.cells == 6


def test_cells_stand_in_reading_order_with_room_for_labels() -> None:
    shape = Grid(("linear", "strong style and composition"), ("weight 0", "weight 0.5", "weight 1"))
    images = [plain((1 + cell) / 10, 280, 320) for cell in range(6)]
    sheet = grid.draw([shape], images)
    assert sheet.shape[0] == 1 and sheet.dtype == torch.float32
    places = [box(sheet[0], image[0, 0, 0]) for image in images]
    assert all(place[2:] == (280, 320) for place in places)
    rows, columns = ([place[axis] for place in places] for axis in (0, 1))
    assert rows == [rows[0]] * 3 + [rows[3]] * 3 and rows[3] > rows[0] + 280
    assert columns == columns[:3] * 2 and columns[1] - columns[0] == columns[2] - columns[1] > 320
    top, left = places[0][:2]
    assert torch.allclose(sheet[0, -1, -1], PAPER) and torch.allclose(sheet[0, 0, 0], PAPER)
    for column in columns[:3]:
        assert ink(sheet[0, :top, column : column + 320]) > 50
    for row in (rows[0], rows[3]):
        assert ink(sheet[0, row : row + 280, :left]) > 50
    # Words stay off the edge, and the longer name is broken into lines.
    assert ink(sheet[0, :4]) == ink(sheet[0, :, :4]) == 0
    lines = ((sheet[0, rows[3] : rows[3] + 280, :left] - PAPER).abs().amax(-1) > 0.4).any(dim=1)
    assert int((lines[1:] & ~lines[:-1]).sum()) >= 2


def test_pictures_keep_their_values() -> None:
    image = torch.rand(1, 256, 300, 3, generator=torch.Generator().manual_seed(0))
    sheet = grid.draw([Grid(("a",), ("b", "c"))], [plain(0.1, 256), image])
    top, left, *_ = box(sheet[0], plain(0.1)[0, 0, 0])
    tail = sheet[0, top : top + 256]
    found = [x for x in range(left, tail.shape[1] - 299) if torch.equal(tail[:, x], image[0, :, 0])]
    assert len(found) == 1 and torch.equal(tail[:, found[0] : found[0] + 300], image[0])


def test_small_pictures_become_larger_in_whole_steps() -> None:
    image = torch.rand(1, 50, 60, 3, generator=torch.Generator().manual_seed(0))
    image[0, 0, 0] = torch.tensor([0.123, 0.456, 0.789])
    sheet = grid.draw([Grid(("a",), ("b",))], [image])[0]
    top, left, height, width = box(sheet, image[0, 0, 0])
    assert height == width == 5  # 60 pixels become 300, the first whole step from 256
    enlarged = sheet[top : top + 250, left : left + 300]
    for dy, dx in ((0, 0), (4, 4), (2, 3)):
        assert torch.equal(enlarged[dy::5, dx::5], image[0])


@pytest.mark.parametrize(
    ("size", "expected"), [(96, (48, 96)), (600, (300, 600)), (400, (200, 400))]
)
def test_a_size_is_that_of_the_longer_side(size: int, expected: tuple[int, int]) -> None:
    sheet = grid.draw([Grid(("a",), ("b",))], [plain(0.3, 200, 400)], size)
    close = (sheet[0] - plain(0.3)[0, 0, 0]).abs().amax(dim=-1) < 1e-3
    ys, xs = close.nonzero().unbind(1)
    assert (int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1) == expected


def test_a_batch_makes_a_sheet_for_each_picture() -> None:
    images = [plain((1 + cell) / 10, count=3) for cell in range(2)]
    sheets = grid.draw([Grid(("a",), ("b", "c"))], images)
    assert len(sheets) == 3
    for number, sheet in enumerate(sheets):
        places = [box(sheet, image[number, 0, 0]) for image in images]
        assert places[0][0] == places[1][0] and places[0][1] < places[1][1]


def test_a_batch_may_stand_side_by_side() -> None:
    image = plain(0.2, 64, 128, count=3)
    row = grid.beside(image)
    assert row.shape == (1, 64, 3 * 128 + 2 * 2, 3)
    lefts = [box(row[0], image[number, 0, 0])[1] for number in range(3)]
    assert lefts == [0, 130, 260]
    assert torch.allclose(row[0, :, 128:130], PAPER)
    assert torch.equal(grid.beside(image[:1]), image[:1])


def test_pictures_of_other_sizes_are_put_in_the_middle() -> None:
    sheet = grid.draw([Grid(("a",), ("b", "c"))], [plain(0.1, 400, 300), plain(0.2, 300, 260)])[0]
    tall, small = (box(sheet, plain(level)[0, 0, 0]) for level in (0.1, 0.2))
    assert small[0] - tall[0] == 50 and small[2:] == (300, 260)


def test_grey_and_transparent_pictures_are_taken() -> None:
    grey, rgba = torch.full((1, 300, 300, 1), 0.4), torch.zeros(1, 300, 300, 4)
    rgba[..., :3] = torch.tensor([0.9, 0.1, 0.3])
    sheet = grid.draw([Grid(("a",), ("b", "c"))], [grey, rgba])[0]
    assert box(sheet, torch.tensor([0.4] * 3))[2:] == (300, 300)
    assert box(sheet, torch.tensor([0.9, 0.1, 0.3]))[2:] == (300, 300)


def test_two_grids_become_sheets_of_one_size() -> None:
    first, second = Grid(("a",), ("b", "c")), Grid(("a", "b"), ("c",))
    images = [plain((1 + cell) / 10) for cell in range(4)]
    sheets = grid.draw([first, second], images)
    assert len(sheets) == 2
    side, below = ([box(sheets[n], images[2 * n + k][0, 0, 0]) for k in (0, 1)] for n in (0, 1))
    assert side[0][0] == side[1][0] and below[0][1] == below[1][1]
    assert torch.allclose(sheets[0, -1], PAPER)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([plain(0.1)] * 3, "2 x 2 has 4 cells, and 3 images came in;"),
        ([plain(0.1)] * 5, "4 cells, and 5 images"),
        ([plain(0.1, count=4)], r"1 images came in \(one batch of 4 pictures\)"),
        ([plain(0.1)] * 3 + [plain(0.1, count=2)], "1 to 2 pictures"),
        ([plain(0.1)] * 3 + [torch.zeros(0, 8, 8, 3)], r"Image 4 .* shape \(0, 8, 8, 3\)"),
        ([torch.zeros(8, 8, 3)] * 4, r"Image 1 .* shape \(8, 8, 3\)"),
    ],
)
def test_what_does_not_fill_the_cells_is_refused(images: list[Tensor], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        grid.draw([Grid(("a", "b"), ("c", "d"))], images)
