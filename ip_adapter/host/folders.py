"""Model folders, registered with the host so that extra_model_paths.yaml and sub-folders work."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import folder_paths

from ..errors import MissingFileError

ADAPTERS = "ipadapter"
IMAGE_PROMPTS = "image_prompts"
ENCODERS = "clip_vision"
LORAS = "loras"
FACE_MODELS = "insightface"

_EXTENSIONS = {
    ADAPTERS: {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".sft"},
    IMAGE_PROMPTS: {".safetensors"},
    FACE_MODELS: {".onnx"},
}
_ADVICE = {
    ADAPTERS: (
        "Put ip-adapter_sd15.safetensors there, from "
        "https://huggingface.co/h94/IP-Adapter/tree/main/models"
    ),
    IMAGE_PROMPTS: "Save Image Prompt writes there",
    LORAS: (
        "Put the companion file of a FaceID adapter there, from "
        "https://huggingface.co/h94/IP-Adapter-FaceID"
    ),
    ENCODERS: (
        "Put open_clip_model.safetensors or open_clip_pytorch_model.bin there, from "
        "https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    ),
}


def register() -> None:
    """Add our folders to what the user configured, and filter what is listed in them.

    A yaml file's folders are already there when packs are imported; they stay, and stay first.
    """
    for name, extensions in _EXTENSIONS.items():
        default = os.path.join(folder_paths.models_dir, name)
        folder_paths.add_model_folder_path(name, default)
        paths, listed = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(listed) | extensions)


def names(folder: str) -> list[str]:
    """The files a user can choose from."""
    return list(folder_paths.get_filename_list(folder))


def choices(folder: str) -> list[str]:
    """The options of a node; where there are no files, one that says so and cannot be loaded."""
    return names(folder) or [f"(no files in models/{folder})"]


def find(folder: str, name: str) -> Path:
    """Return the path of a file that was chosen by name.

    Raises:
        MissingFileError: It is in none of the folders; says which ones, what is there, and where
            to get it.
    """
    path = folder_paths.get_full_path(folder, name)
    if path is not None:
        return Path(path)
    searched = ", ".join(folder_paths.get_folder_paths(folder))
    present = names(folder)
    advice = f"{_ADVICE[folder]}; then refresh the node list (R)."
    if not present:
        raise MissingFileError(f"There are no files in {searched}. {advice}")
    near = difflib.get_close_matches(name, present, n=3, cutoff=0.3) or present[:3]
    raise MissingFileError(
        f"'{name}' is not in {searched}, which has {len(present)} other files, such as "
        f"{', '.join(near)}. {advice}"
    )


def new_file(folder: str, prefix: str) -> Path:
    """A path for a new file, numbered after those that exist.

    Args:
        folder: A registered folder; its first path is written to.
        prefix: File name without number and extension; may name sub-folders.

    Raises:
        MissingFileError: The prefix leads out of the folder.
    """
    root = Path(folder_paths.get_folder_paths(folder)[0]).resolve()
    target = (root / prefix).resolve()
    if root not in target.parents:
        raise MissingFileError(
            f"The file name prefix {prefix!r} leads out of {root}. Use a plain name, or "
            "sub-folders of it such as 'people/anna'."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    taken = [
        int(number)
        for path in target.parent.glob(f"{target.name}_*.safetensors")
        if (number := path.stem.removeprefix(f"{target.name}_")).isdigit()
    ]
    return target.with_name(f"{target.name}_{max(taken, default=0) + 1:05}.safetensors")


def stamp(folder: str, name: str) -> str:
    """Size and time of a file, so that the host notices when its content changes."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        return "missing"
    return stamp_of(os.stat(path))


def stamp_of(status: os.stat_result) -> str:
    """Changes whenever a file's content does, as far as its size and time tell."""
    return f"{status.st_size}-{status.st_mtime_ns}"
