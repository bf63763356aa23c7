"""The tiles of IPAdapterTilesMasked, an experiment of before March 2024.

IPAdapter Tiled, which came after it, cuts otherwise: see `ip_adapter.tiles`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 224
"""Side of a tile in pixels."""


def masked_tiles(image: Tensor, count: int, weight: float) -> tuple[Tensor, Tensor]:
    """Cut a picture into squares, with a mask for each that says where it was.

    The picture is scaled so that its short side is `count` tiles. What is too much of the long
    side is left out, half of it at each end, if it is less than a quarter of a tile; else one more
    tile is fitted in at the end. With more than one row and column, tiles over the whole short
    side come first.

    Args:
        image: ``[B, H, W, C]``, of which the first picture is used.
        count: Tiles along the short side, at least 1.
        weight: What the masks hold; 1 in a single row or column.

    Returns:
        ``[N, 224, 224, C]`` and ``[N, h, w]``, the masks of the size of the scaled picture.
    """
    height, width = image.shape[1:3]
    short = count * TILE
    if width < height:
        height, width = height * short // width, short
    else:
        height, width = short, width * short // height
    pixels = image[:1].movedim(-1, 1).float()
    scaled = F.interpolate(pixels, size=(height, width), mode="bicubic").clamp(0, 1).movedim(1, -1)
    rows, columns = _starts(height), _starts(width)
    is_strip = len(rows) == 1 or len(columns) == 1
    tiles, masks = [], []
    for top in rows:
        for left in columns:
            tiles.append(scaled[0, top : top + TILE, left : left + TILE])
            mask = scaled.new_zeros(height, width)
            mask[top : top + TILE, left : left + TILE] = 1.0 if is_strip else weight
            masks.append(mask)
    found = torch.stack(tiles), torch.stack(masks)
    if is_strip:
        return found
    whole, places = masked_tiles(scaled, 1, 1.0)
    places = F.interpolate(places[:, None], size=(height, width), mode="nearest")[:, 0]
    return torch.cat((whole, found[0])), torch.cat((places, found[1]))


def _starts(length: int) -> list[int]:
    count, rest = divmod(length, TILE)
    if rest < TILE // 4:
        return [rest // 2 + i * TILE for i in range(count)]
    return [*(i * TILE for i in range(count)), length - TILE]
