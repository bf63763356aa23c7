"""Embeds: features of an image encoder before any projection, as they travel and as .ipadpt files.

They are what an adapter's projection reads: ``[N, E]`` pooled, ``[N, P, W]`` hidden, or vectors of
a face recogniser, ``[N, 512]``. Unlike an image prompt they fit every adapter that was trained with
the same encoder. A file is one tensor that ``torch.save`` wrote, as ComfyUI_IPAdapter_plus has it;
before March 2024 that was a stack of the picture's and those of "no image", ``[2, N, ...]``.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .encoders import ENCODERS, FeatureKind
from .errors import CheckpointError, ImageError, IncompatibleModelError
from .files import replacing
from .spec import AdapterSpec

EXTENSION = ".ipadpt"

_FACE = 512
"""Width of a face recogniser's vector."""

_RANK: dict[FeatureKind, int] = {"pooled": 2, "hidden": 3}

_AGAIN = "Save the embeds again with IPAdapter Save Embeds."


def save(embeds: Tensor, path: Path) -> None:
    """Write embeds; the file is whole or not there, and ``torch.load`` gives the same numbers.

    Raises:
        IncompatibleModelError: It is no tensor.
    """
    # Cloned: of a view, the whole storage behind it would be written.
    whole = _tensor(embeds, "embeds").detach().cpu().clone(memory_format=torch.contiguous_format)
    with replacing(path) as partial:
        torch.save(whole, partial)


def load(path: Path) -> Tensor:
    """Read embeds that `save` or ComfyUI_IPAdapter_plus wrote; no code in the file is run.

    Returns:
        The tensor as it was saved, on the CPU.

    Raises:
        CheckpointError: The file holds something else, is damaged, or wants to run code.
    """
    with path.open("rb") as file:
        head = file.read(1)
    if head != b"\x80" and not zipfile.is_zipfile(path):  # torch's format before 2020, and since
        raise CheckpointError(
            f"'{path.name}' is no file of embeds, or not all of it ({path.stat().st_size} bytes): "
            f"needed is a tensor that torch.save wrote. {_AGAIN}"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise CheckpointError(
            f"'{path.name}' is a pickle that holds more than a tensor and was not loaded, because "
            f"loading it could run code ({reason}). Needed is a file of one tensor. {_AGAIN}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path.name}' is a damaged file of embeds ({type(error).__name__}: {error}). {_AGAIN}"
        ) from error
    if not isinstance(found, Tensor):
        raise CheckpointError(
            f"'{path.name}' holds a {type(found).__name__}; needed is one tensor of features of an "
            f"image encoder. {_AGAIN}"
        )
    if found.layout != torch.strided or not found.is_floating_point() or not found.numel():
        raise CheckpointError(
            f"'{path.name}' holds {found.dtype} numbers of shape {tuple(found.shape)}; needed are "
            f"features of an image encoder, such as [1, 1024]. {_AGAIN}"
        )
    return found.detach()


def check(embeds: Tensor, spec: AdapterSpec, name: str = "embeds") -> Tensor:
    """Return embeds as an adapter's projection reads them, or refuse them.

    Args:
        embeds: See the module; face vectors may also be ``[N, 1, 512]``.
        spec: The adapter's.
        name: What to call them in a message.

    Returns:
        ``[N, E]``, ``[N, P, W]`` or ``[N, 512]``, float32.

    Raises:
        IncompatibleModelError: They are no tensor, or of another width or rank than the adapter
            reads: another encoder made them, or they are of the other kind.
        ImageError: Some values are not numbers.
    """
    shape = tuple(_tensor(embeds, name).shape)
    kind, width = spec.projection.image, spec.projection.features
    if kind is None:
        fits = shape[-1:] == (width,) and (len(shape) == 2 or (len(shape) == 3 and shape[1] == 1))
    else:
        fits = shape[-1:] == (width,) and len(shape) == _RANK[kind]
    if not fits or 0 in shape:
        raise IncompatibleModelError(
            f"The {name} have shape {list(shape)}, which is {_made_by(shape)}. Needed is "
            f"{_needed(spec)} for this adapter ({spec.summary()}). Encode the picture again with "
            "this adapter, in Encode to Embeds or IPAdapter Encoder, or connect the adapter that "
            f"the {name} were made for."
        )
    if not bool(torch.isfinite(embeds).all()):
        raise ImageError(
            f"The {name} have values that are not numbers (NaN or infinite). The image encoder may "
            "have overflowed in float16: start ComfyUI with --fp32-text-enc and encode again."
        )
    found = embeds.detach().float()
    return found[:, 0] if kind is None and found.ndim == 3 else found


def split(embeds: Tensor, spec: AdapterSpec) -> tuple[Tensor, Tensor | None]:
    """Part the embeds of a picture from those of "no image", where both are in one tensor.

    Args:
        embeds: As `check` takes them, or ``[2, N, ...]``, as files from before March 2024 are.
        spec: The adapter's.

    Returns:
        Two tensors as `check` returns them; the second is None where there is only one.

    Raises:
        IncompatibleModelError: See `check`.
        ImageError: See `check`.
    """
    kind = spec.projection.image
    shape = tuple(_tensor(embeds, "embeds").shape)
    if kind is None or len(shape) != _RANK[kind] + 1 or shape[0] != 2 or _encoders(shape):
        return check(embeds, spec), None
    return check(embeds[0], spec), check(embeds[1], spec, "negative embeds")


def together(many: Sequence[Tensor]) -> Tensor:
    """Put embeds of several pictures into one batch.

    Args:
        many: At least one, all of the same kind and width.

    Returns:
        ``[N, ...]``, where N is the sum over all.

    Raises:
        IncompatibleModelError: They differ in kind or width, or one is no tensor.
    """
    shapes = [tuple(_tensor(one, "embeds").shape) for one in many]
    if len({shape[1:] for shape in shapes}) > 1:
        described = "; ".join(f"{list(shape)}, {_made_by(shape)}" for shape in shapes)
        raise IncompatibleModelError(
            f"These embeds cannot be combined, because they differ in kind or width: {described}. "
            "Encode all pictures with the same adapter and image encoder."
        )
    return torch.cat([one.to(many[0].device) for one in many])


def _tensor(value: object, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise IncompatibleModelError(
        f"The {name} are a {type(value).__module__}.{type(value).__qualname__}, which another pack "
        "made; needed is a tensor. Connect Encode to Embeds, IPAdapter Encoder or IPAdapter Load "
        "Embeds."
    )


def _encoders(shape: tuple[int, ...]) -> list[str]:
    """The published encoders whose features have this shape, without the number of pictures."""
    if len(shape) == 2:
        return [encoder.name for encoder in ENCODERS if encoder.pooled == shape[1]]
    return [e.name for e in ENCODERS if len(shape) == 3 and (e.tokens, e.hidden) == shape[1:]]


def _made_by(shape: tuple[int, ...]) -> str:
    names = _encoders(shape)
    if names:
        return f"{'pooled' if len(shape) == 2 else 'hidden'} features of {' or '.join(names)}"
    if shape[-1:] == (_FACE,) and (len(shape) == 2 or (len(shape) == 3 and shape[1] == 1)):
        return "vectors of a face recogniser"
    return "no output of an image encoder that is known here"


def _needed(spec: AdapterSpec) -> str:
    kind, width = spec.projection.image, spec.projection.features
    if kind is None:
        return f"[faces, {width}], vectors of a face recogniser,"
    form = f"[pictures, {width}]" if kind == "pooled" else f"[pictures, patches, {width}]"
    by = f" of {spec.encoder.name}" if spec.encoder is not None else ""
    return f"{form}, {kind} features{by},"
