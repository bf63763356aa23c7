"""Embeds on the host: features before the projection, to an image prompt, from and to its folders.

Files are those of ComfyUI_IPAdapter_plus: written to the output folder, read from the input folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
import torch.nn.functional as F
from torch import Tensor

from .. import embeds, images, masks
from ..errors import IncompatibleModelError, MissingFileError
from ..faces import from_tensor
from ..projections import Features
from ..prompt import ImagePrompt
from ..references import Combine, Unconditional, combine
from . import encoding, reading
from .adapters import LoadedAdapter
from .folders import stamp_of


def encode(
    adapter: LoadedAdapter,
    clip_vision: Any | None,
    given: Tensor,
    *,
    negative: Tensor | None = None,
    how: Combine = "concat",
    by_frame: bool = False,
    unconditional: Unconditional = "as trained",
) -> ImagePrompt:
    """Turn embeds into one image prompt.

    Args:
        adapter: Whose projection.
        clip_vision: For "no image" of adapters that read hidden features; the one that was loaded
            with the adapter unless given.
        given: ``[N, E]``, ``[N, P, W]`` or ``[N, 512]``; see `embeds.split`.
        negative: The same for what to lead away from. Without it, and without one in `given`, it
            is "no image".
        how: How several become one.
        by_frame: Whether row i is for the picture i of the batch; `how` says nothing then.
        unconditional: What stands for "no image".

    Raises:
        ImageError: See `embeds.check`.
        IncompatibleModelError: See `embeds.check`; or the image encoder is missing or wrong, or the
            adapter reads something beside the embeds.
    """
    spec = adapter.spec
    positive, own = embeds.split(given, spec)
    frames = len(positive) if by_frame else 1
    how = "concat" if by_frame else how
    if spec.projection.image is None:
        if negative is not None:
            raise IncompatibleModelError(
                f"{adapter.label} reads faces, whose 'no face' is fixed. Leave the negative embeds "
                "unconnected."
            )
        return encoding.encode_faces(adapter, from_tensor(positive), None, how=how, frames=frames)
    if negative is not None:
        nothing = embeds.check(negative, spec, "negative embeds")
    elif own is not None:
        nothing = own
    else:
        nothing = _no_image(adapter, clip_vision, positive, unconditional)
    return encoding.from_features(
        adapter,
        Features(image=combine(positive, how)),
        Features(image=combine(nothing, how)),
        frames,
    )


def read_masked(adapter: LoadedAdapter, clip_vision: Any, image: Tensor, mask: Tensor) -> Tensor:
    """Features of pictures whose normalised pixels are multiplied by a mask.

    That is CLIP's mean colour where the mask is 0, as in `references.masked`; but the mask is cut
    to its own central square instead of being stretched over the picture, and may be 0 everywhere.
    So does ComfyUI_IPAdapter_plus.

    Args:
        adapter: Whose kind of features.
        clip_vision: Its image encoder.
        image: ``[B, H, W, C]`` in 0..1.
        mask: ``[M, H', W']`` of any size; M is 1 or B.

    Returns:
        ``[B, E]`` or ``[B, P, W]``.

    Raises:
        ImageError: See `reading.read` and `masks.check`.
        IncompatibleModelError: See `reading.read`.
    """
    if adapter.spec.projection.image is None:
        return reading.read(adapter, clip_vision, image, "crop")  # says why it cannot
    reading.check_encoder(adapter.spec, clip_vision, adapter.label)
    side = int(clip_vision.image_size)
    pixels = images.squares(image, side, "crop")
    neutral = pixels.new_tensor(images.CLIP_MEAN).view(1, 3, 1, 1)
    alpha = _square(masks.check(mask).to(pixels), side)
    seen = neutral + alpha * (pixels - neutral)
    return reading.read_squares(adapter, clip_vision, seen, "picture and mask")


def names() -> list[str]:
    """The files of embeds in the host's input folder and below it."""
    root = Path(folder_paths.get_input_directory())
    return sorted(
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root)
        for file in files
        if file.endswith(embeds.EXTENSION)
    )


def find(name: str) -> Path:
    """Return the path of a file in the input folder, or in the one that is named after it.

    Args:
        name: As in `names`; ``[output]`` or ``[temp]`` at its end means that folder.

    Raises:
        MissingFileError: There is no such file, or it is no file of embeds.
    """
    inner, folder = folder_paths.annotated_filepath(name)
    root = Path(os.path.abspath(folder or folder_paths.get_input_directory()))
    path = Path(os.path.abspath(root / str(inner)))  # links may lead where they like
    # Hosts before mid-2026 do not mind a name that leads out of the folder.
    if root in path.parents and path.is_file() and path.suffix == embeds.EXTENSION:
        return path
    present = names()
    others = f"which has {', '.join(present[:3])}" if present else "which has none"
    raise MissingFileError(
        f"'{name}' is no file of embeds ({embeds.EXTENSION}) in "
        f"{folder_paths.get_input_directory()}, {others}. Move a file that IPAdapter Save Embeds "
        "wrote from the output folder there; then refresh the node list (R)."
    )


def stamp(name: str) -> str:
    """Size and time of a file, so that the host notices when its content changes."""
    try:
        return stamp_of(find(name).stat())
    except MissingFileError:
        return "missing"


def new_file(prefix: str) -> Path:
    """A path in the host's output folder, numbered after those that exist, with the host's names.

    Args:
        prefix: File name without number and extension; may name sub-folders and dates.
    """
    folder, name, number, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    while (path := Path(folder) / f"{name}_{number:05}{embeds.EXTENSION}").exists():
        number += 1  # hosts before mid-2026 only count names that go on after the number
    return path


def _no_image(
    adapter: LoadedAdapter, clip_vision: Any | None, like: Tensor, unconditional: Unconditional
) -> Tensor:
    if adapter.spec.projection.image == "hidden":
        clip_vision = adapter.clip_vision if clip_vision is None else clip_vision
        if clip_vision is None:
            raise IncompatibleModelError(
                f"{adapter.label} needs the features of 'no image', and neither negative embeds "
                f"nor clip_vision is connected. Connect {adapter.spec.encoder_name}, or the "
                "negative embeds that were encoded with the others."
            )
        reading.check_encoder(adapter.spec, clip_vision, adapter.label)
    return reading.no_image(adapter, clip_vision, like, unconditional)


def _square(mask: Tensor, side: int) -> Tensor:
    """``[M, H, W]`` -> ``[M, 1, side, side]``: the central square, resized like a picture."""
    height, width = mask.shape[-2:]
    short = min(height, width)
    top, left = round((height - short) / 2), round((width - short) / 2)
    cut = mask[:, None, top : top + short, left : left + short]
    if short == side:
        return cut
    return F.interpolate(cut, size=(side, side), mode="bicubic", antialias=True)
