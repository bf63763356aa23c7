"""Face models in the host: where packs lie, one kept loaded, one face of each picture."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from torch import Tensor

from .. import face_models
from ..errors import MissingFileError
from ..face_models import WHERE, FaceModel
from ..faces import Faces, Pick, rgb
from .features import require_own
from .folders import FACE_MODELS, stamp_of

log = logging.getLogger(__name__)

PROVIDERS = (face_models.AUTO, *face_models.PROVIDERS)
"""Choices of a loader; onnxruntime is not imported to ask which of them exist."""

_NONE = f"(no face models in models/{FACE_MODELS}/models)"

_kept: dict[tuple[str, str, str], FaceModel] = {}
"""At most one: its folder, what its files looked like, and the provider that was asked for."""


def packs() -> list[str]:
    """Names of the packs that are there; whether they are complete shows when one is loaded."""
    return sorted(_folders())


def choices() -> list[str]:
    """The options of a node; where there are no packs, one that says so and cannot be loaded."""
    return packs() or [_NONE]


def find(pack: str) -> Path:
    """Return the folder of a pack.

    Raises:
        MissingFileError: There is none of this name; says where one belongs and where to get it.
    """
    found = _folders()
    if pack in found:
        return found[pack]
    name = "buffalo_l" if pack == _NONE else pack
    place = _roots()[0] / "models" / name
    others = f"there are {', '.join(found)}" if found else "there are no others"
    raise MissingFileError(
        f"There is no face model '{pack}' ({others}). Unpack it to {place}, so that its .onnx "
        f"files lie there; get it from {WHERE} Then refresh the node list (R)."
    )


def stamp(pack: str) -> str:
    """Names, sizes and times of a pack's files, so that a change is noticed."""
    folder = _folders().get(pack)
    if folder is None:
        return "missing"
    files = face_models.files_of(folder)
    return " ".join(f"{path.name}-{stamp_of(path.stat())}" for path in files)


def load(pack: str, provider: str = face_models.AUTO) -> FaceModel:
    """Load a pack, unless it is the one that was loaded last.

    Raises:
        MissingFileError: See `find`.
        IPAdapterError: See `face_models.load`.
    """
    folder = find(pack)
    key = (str(folder), stamp(pack), provider)
    if key not in _kept:
        _kept.clear()  # before loading: both at once may not fit
        _kept[key] = face_models.load(folder, pack, provider)
    return _kept[key]


def detect(model: FaceModel, image: Tensor, pick: Pick) -> Faces:
    """Find and read one face of each picture.

    Args:
        model: What `load` returned.
        image: ``[B, H, W, C]`` in 0..1, C 1, 3 or 4.
        pick: Which face of each picture.

    Raises:
        ImageError: A picture is unusable, has no face, or not as many as the pick needs.
    """
    pictures = rgb(image)
    progress = comfy.utils.ProgressBar(len(pictures))
    landmarks = []
    for i, picture in enumerate(pictures):
        comfy.model_management.throw_exception_if_processing_interrupted()
        name = "the image" if len(pictures) == 1 else f"image {i + 1} of {len(pictures)}"
        points, count = model.find(picture, pick, name)
        log.info(
            "Face model %s: %d in %s, took number %d of them, %s",
            *(model.label, count, name, pick.index, pick.by),
        )
        landmarks.append(points)
        progress.update(1)
    return model.read(pictures, landmarks)


def require(value: object) -> FaceModel:
    """Return the value of an INSIGHTFACE socket, or say what is connected instead.

    Raises:
        IncompatibleModelError: Another pack's object came in on a socket of the same name.
    """
    return require_own(value, FaceModel, "face_model", "Load Face Model")


def _roots() -> list[Path]:
    return [Path(path) for path in folder_paths.get_folder_paths(FACE_MODELS)]


def _folders() -> dict[str, Path]:
    """Every pack by name: a folder with .onnx files, or with one such folder inside.

    The release's antelopev2.zip unpacks to antelopev2/antelopev2.
    """
    found: dict[str, Path] = {}
    for root in _roots():
        for parent in (root / "models", root):
            for folder in _subfolders(parent):
                place = next((p for p in (folder, *_subfolders(folder)) if _is_pack(p)), None)
                if place is not None and not (parent == root and folder.name == "models"):
                    found.setdefault(folder.name, place)
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _is_pack(folder: Path) -> bool:
    return bool(face_models.files_of(folder))
