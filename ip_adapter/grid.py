"""A grid of pictures that differ in weight and preset: what its cells are, and its labelled sheet.

The cells are made elsewhere, one sampling for each. Here texts become weights and presets, and
pictures become one sheet with presets beside the rows and weights above the columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import drawing
from .errors import ImageError, InfluenceError
from .presets import PRESETS, Preset

WEIGHTS = "0, 0.3, 0.6, 1"
"""What `parse_weights` reads."""

LOWEST, HIGHEST = -1.0, 3.0
"""Weights that may be asked for, as in Apply IP-Adapter."""

SMALL = 256
"""Pictures whose longer side has fewer pixels are enlarged to it or beyond, unless a size is given:
the labels need room."""

_LETTERS = 15
"""A cell is as wide as so many letters are high."""

_BESIDE = 8.6
"""Width of the labels beside the rows, in sizes of their letters; the longest word of a preset's
name fits."""


@dataclass(frozen=True)
class Grid:
    """What the cells of a grid are; they come in reading order.

    Attributes:
        rows: A label for each row, from the top.
        columns: A label for each column, from the left.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def cells(self) -> int:
        """How many pictures it takes."""
        return len(self.rows) * len(self.columns)


def of(weights: Sequence[float], presets: Sequence[str]) -> Grid:
    """A grid with a row for each preset and a column for each weight."""
    return Grid(tuple(presets), tuple(f"weight {weight:g}" for weight in weights))


def parse_weights(text: str) -> tuple[float, ...]:
    """Read weights such as ``"0, 0.3, 0.6, 1"``.

    Args:
        text: Numbers with commas, semicolons, blanks or line ends between them.

    Raises:
        InfluenceError: There are none, a part is no number, or it is not within `LOWEST` and
            `HIGHEST`.
    """
    needed = f"needed are numbers from {LOWEST:g} to {HIGHEST:g} with commas between: '{WEIGHTS}'"
    parts = re.split(r"[,;\s]+", text.strip(" ,;\t\r\n"))
    if parts == [""]:
        raise InfluenceError(f"The weights of the grid are empty; {needed}.")
    weights = []
    for part in parts:
        try:
            weight = float(part)
        except ValueError:
            raise InfluenceError(f"The weights of the grid hold '{part}'; {needed}.") from None
        if not (math.isfinite(weight) and LOWEST <= weight <= HIGHEST):
            raise InfluenceError(f"The weights of the grid hold {part}; {needed}.")
        weights.append(weight)
    return tuple(weights)


def parse_presets(text: str) -> tuple[Preset, ...]:
    """Read names of presets such as ``"linear, style transfer"``.

    Args:
        text: Names of `presets.PRESETS` with commas, semicolons or line ends between them; large
            letters and more blanks do not matter.

    Raises:
        InfluenceError: There are none, or a name is unknown.
    """
    needed = f"needed are names with commas between, of: {', '.join(PRESETS)}"
    names = [" ".join(part.lower().split()) for part in re.split(r"[,;\n]", text)]
    names = [name for name in names if name]
    if not names:
        raise InfluenceError(f"The presets of the grid are empty; {needed}.")
    for name in names:
        if name not in PRESETS:
            raise InfluenceError(f"The presets of the grid hold '{name}'; {needed}.")
    return cast(tuple[Preset, ...], tuple(names))


def beside(image: Tensor) -> Tensor:
    """Set the pictures of a batch side by side.

    Args:
        image: ``[B, H, W, 1|3|4]`` in 0..1.

    Returns:
        ``[1, H, W', 3]``, with the sheet's ground between them.
    """
    pictures = _colour(image)
    gap = max(1, pictures.shape[2] // 64)
    between = _ground(pictures.shape[1], gap)
    parts = [part for one in torch.split(pictures, 1) for part in (one, between)]
    return torch.cat(parts[:-1], dim=2)


def draw(grids: Sequence[Grid], images: Sequence[Tensor], size: int = 0) -> Tensor:
    """Lay out labelled sheets.

    Args:
        grids: Usually one.
        images: ``[B, H, W, 1|3|4]`` in 0..1 for each cell of the first grid in reading order, then
            of the next. Pictures of unlike sizes are put in the middle of their cells.
        size: Longer side of each picture on the sheet in pixels. 0 leaves pictures as they are, but
            for small ones: see `SMALL`.

    Returns:
        ``[sheets, H', W', 3]`` on the CPU: for each grid as many sheets as there are pictures in a
        cell. A picture that keeps its size keeps its values, too.

    Raises:
        ImageError: See `check`.
    """
    check(grids, images)
    cells, done = [_fitted(_colour(image), size) for image in images], 0
    sheets = []
    for grid in grids:
        sheets.append(_sheet(grid, cells[done : done + grid.cells]))
        done += grid.cells
    height, width = (max(sheet.shape[side] for sheet in sheets) for side in (1, 2))
    out = _ground(height, width).repeat(sum(map(len, sheets)), 1, 1, 1)
    done = 0
    for sheet in sheets:
        out[done : done + len(sheet), : sheet.shape[1], : sheet.shape[2]] = sheet
        done += len(sheet)
    return out


def check(grids: Sequence[Grid], images: Sequence[Tensor]) -> None:
    """Refuse what does not fill the cells.

    Args:
        grids: See `draw`.
        images: See `draw`.

    Raises:
        ImageError: There are more or fewer images than cells, an image has no pixels, or the cells
            have unlike numbers of pictures.
    """
    cells = sum(grid.cells for grid in grids)
    if len(images) != cells:
        shapes = " and ".join(f"{len(grid.rows)} x {len(grid.columns)}" for grid in grids)
        batch = f" (one batch of {len(images[0])} pictures)" if len(images) == 1 else ""
        raise ImageError(
            f"The grid of {shapes} has {cells} cells, and {len(images)} images came in{batch}; "
            "needed is a list with one for each cell. Connect the model output of the same Image "
            "Prompt Grid to the sampler, and the sampler's pictures straight to Label Grid."
        )
    for number, image in enumerate(images, start=1):
        if image.ndim != 4 or 0 in image.shape:
            raise ImageError(
                f"Image {number} of the grid has shape {tuple(image.shape)}; needed is [batch, "
                "height, width, channels] with pixels in it. Check the nodes between sampler and "
                "Label Grid."
            )
    counts = sorted({len(image) for image in images})
    if len(counts) > 1:
        raise ImageError(
            f"The cells of the grid have {counts[0]} to {counts[-1]} pictures; needed are as many "
            "in each. Give the sampler one latent batch for all cells."
        )


def _sheet(grid: Grid, cells: Sequence[Tensor]) -> Tensor:
    height, width = (max(cell.shape[side] for cell in cells) for side in (1, 2))
    letters = max(11, round(min(width, 1.5 * height) / _LETTERS))
    line = drawing.line_height(letters)
    gap, margin = max(3, letters // 3), letters
    names = [
        drawing.wrap(label, letters, _BESIDE * letters, most=max(1, height // line))
        for label in grid.rows
    ]
    widest = max(drawing.measure(one, letters) for name in names for one in name)
    left, top = margin + math.ceil(widest) + margin // 2 + gap, margin + line + gap
    across, down = width + gap, height + gap
    picture, pen = drawing.canvas(
        left + across * len(grid.columns) - gap + margin,
        top + down * len(grid.rows) - gap + margin,
    )
    for column, label in enumerate(grid.columns):
        middle = left + across * column + width / 2
        drawing.label(
            pen, (middle, margin - gap / 2), label, size=letters, width=width, anchor="centre"
        )
    for row, name in enumerate(names):
        middle = top + down * row + height / 2
        drawing.label(pen, (margin, middle - line * len(name) / 2), name, size=letters)
    sheet = drawing.to_image(picture).repeat(len(cells[0]), 1, 1, 1)
    for number, cell in enumerate(cells):
        row, column = divmod(number, len(grid.columns))
        y = top + down * row + (height - cell.shape[1]) // 2
        x = left + across * column + (width - cell.shape[2]) // 2
        sheet[:, y : y + cell.shape[1], x : x + cell.shape[2]] = cell
    return sheet


def _colour(image: Tensor) -> Tensor:
    """``[B, H, W, 1|3|4]`` -> ``[B, H, W, 3]`` on the CPU; transparency is left out."""
    return image[..., :3].detach().float().cpu().expand(*image.shape[:-1], 3)


def _fitted(pixels: Tensor, size: int) -> Tensor:
    """``[B, H, W, 3]`` in the size that the sheet has them in."""
    longer = max(pixels.shape[1:3])
    if size <= 0:
        times = math.ceil(SMALL / longer)
        return pixels.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    if size == longer:
        return pixels
    height, width = (max(1, round(side * size / longer)) for side in pixels.shape[1:3])
    planes = pixels.movedim(-1, 1)
    resized = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return resized.clamp(0, 1).movedim(1, -1)


def _ground(height: int, width: int) -> Tensor:
    """``[1, H, W, 3]`` of the sheet's ground."""
    return drawing.to_image(drawing.canvas(width, height)[0])
