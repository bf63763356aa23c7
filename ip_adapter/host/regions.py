"""Regions on the host: tiles become regions, regions become patches, texts keep to their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import node_helpers
from torch import Tensor

from .. import masks
from ..influence import Influence
from ..references import Unconditional
from ..regions import Region, intersect
from ..tiles import Tiles
from . import encoding, patching
from .adapters import LoadedAdapter


def apply(
    model: Any,
    adapter: LoadedAdapter,
    regions: Sequence[Region],
    *,
    weight: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    mask: Tensor | None = None,
    influence: Influence | None = None,
) -> tuple[Any, str]:
    """Add the image prompt of every region to a clone of a MODEL.

    Args:
        model: The host's MODEL; it is not changed.
        adapter: Whose keys and values to use; the one that encoded every region.
        regions: Their weights and masks multiply with those here.
        weight: See `patching.apply`.
        start: See `patching.apply`.
        end: See `patching.apply`.
        mask: Where any of them acts, or None for everywhere.
        influence: For the regions that have none of their own.

    Returns:
        The clone, and a line that says what was patched.

    Raises:
        IncompatibleModelError: See `patching.apply`.
        ImageError: See `masks.check`.
        InfluenceError: See `patching.apply`.
    """
    reports = []
    for region in regions:
        model, report = patching.apply(
            model,
            adapter,
            region.prompt,
            weight=weight * region.weight,
            start=start,
            end=end,
            mask=intersect(region.mask, mask),
            influence=region.influence or influence,
        )
        reports.append(report)
    return model, "\n".join(reports)


def from_tiles(
    adapter: LoadedAdapter,
    clip_vision: Any,
    tiles: Tiles,
    *,
    per_frame: bool = False,
    unconditional: Unconditional = "as trained",
) -> tuple[Region, ...]:
    """Encode each tile of a picture as a region.

    Args:
        adapter: Its projection makes the tokens.
        clip_vision: See `encoding.encode`.
        tiles: Of one picture, or of a batch: the tiles in one place are one prompt.
        per_frame: Whether the picture i is for the picture i of the batch only.
        unconditional: See `encoding.encode`.

    Raises:
        ImageError: See `encoding.encode`.
        IncompatibleModelError: See `encoding.encode`.
    """
    return tuple(
        Region(
            encoding.encode(
                adapter,
                clip_vision,
                picture,
                "crop",
                per_frame=per_frame,
                unconditional=unconditional,
            ),
            mask,
        )
        for picture, mask in zip(tiles.pictures, tiles.masks, strict=True)
    )


def restrict(conditioning: Any, mask: Tensor | None, strength: float) -> Any:
    """Let a text act in a part of the picture, as the host's Conditioning (Set Mask) does.

    Args:
        conditioning: The host's CONDITIONING, or None.
        mask: ``[H, W]`` or ``[M, H, W]``, or None for the whole picture.
        strength: Weight of the text against others in the same place.

    Returns:
        A new CONDITIONING, unless nothing is to be changed; the given one stays as it is.

    Raises:
        ImageError: See `masks.check`.
    """
    if conditioning is None or (mask is None and strength == 1):
        return conditioning
    values: dict[str, Any] = {"strength": strength}
    if mask is not None:
        values = {
            "mask": masks.check(mask),
            "set_area_to_bounds": False,
            "mask_strength": strength,
        }
    return node_helpers.conditioning_set_values(conditioning, values)
