"""ComfyUI's model folders and what lies in them, without ComfyUI; for the command line.

Inside the host `host.folders` and `host.installed` answer the same questions, and remember.

Source: the layout of extra_model_paths.yaml as the host's example file describes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint
from .downloads import ADAPTERS, DOWNLOADS, ENCODERS, Present, collect, held_by, tower
from .encoders import recognise
from .errors import DownloadError

_EXTENSIONS = {".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt"}

_LEGACY = b"\x80\x02\x8a\x0a"
"""How torch's files began before they were zip archives; all is read to see what is in one."""

_Held = tuple[str, bool]
"""The name of a download, and whether it is certain that a file holds it."""

_YAML = "extra_model_paths.yaml"


@dataclass(frozen=True)
class ModelFolders:
    """Where models of each kind are; new files go to the first folder of theirs.

    Attributes:
        adapters: Folders of adapters, at least one.
        encoders: Folders of image encoders, at least one.
    """

    adapters: tuple[Path, ...]
    encoders: tuple[Path, ...]

    def of(self, kind: str) -> tuple[Path, ...]:
        """The folders of a kind, `ADAPTERS` or `ENCODERS`."""
        return self.adapters if kind == ADAPTERS else self.encoders

    def place(self, kind: str) -> Path:
        """The folder that new files of a kind go to."""
        return self.of(kind)[0]

    def where(self, kind: str, name: str) -> Path:
        """The path of a file by its name in the folders of its kind; the first that has it."""
        return next(path for folder in self.of(kind) if (path := folder / name).is_file())


def of_models(models: Path) -> ModelFolders:
    """The folders below a folder of models, such as ``ComfyUI/models``."""
    return ModelFolders((models / ADAPTERS,), (models / ENCODERS,))


def of_comfyui(comfyui: Path) -> ModelFolders:
    """The folders that a ComfyUI is configured with, in its order.

    Its own come before those of extra_model_paths.yaml for encoders and, because a pack registers
    its folder last, after them for adapters.

    Raises:
        DownloadError: The yaml file cannot be read.
    """
    own = of_models(comfyui / "models")
    adapters, encoders = list[Path](), list(own.encoders)
    for kind, path, is_default in _configured(comfyui / _YAML):
        folders = adapters if kind == ADAPTERS else encoders
        if path in folders:
            if not is_default:
                continue
            folders.remove(path)
        folders.insert(0 if is_default else len(folders), path)
    adapters += [path for path in own.adapters if path not in adapters]
    return ModelFolders(tuple(adapters), tuple(encoders))


def find_comfyui(chosen: Path | None = None, pack: Path | None = None) -> Path | None:
    """The ComfyUI that a person means: the one chosen, `COMFYUI_PATH`, or the one around the pack.

    Args:
        chosen: Its folder.
        pack: The folder of this pack, by default of the one that runs.

    Returns:
        Its folder, or None where there is none of these.

    Raises:
        DownloadError: A folder was named that holds no ComfyUI.
    """
    named = chosen or (Path(value) if (value := os.environ.get("COMFYUI_PATH")) else None)
    if named is not None:
        folder = named.expanduser().absolute()
        if not (folder / "models").is_dir():
            raise DownloadError(
                f"{folder} is not a ComfyUI: there is no models folder in it. Give the folder that "
                "holds ComfyUI's main.py and models."
            )
        return folder
    pack = pack or Path(__file__).absolute().parents[1]
    around = pack.parent.parent
    is_inside = pack.parent.name == "custom_nodes" and (around / "models").is_dir()
    return around if is_inside else None


def installed(folders: ModelFolders) -> dict[str, Present]:
    """What lies in the folders, known by content; see `downloads.Installed`."""
    found = [*_look(folders.adapters, _adapter), *_look(folders.encoders, _encoder)]
    return collect((name, Present(file, sure)) for file, (name, sure) in found)


def _look(
    folders: tuple[Path, ...], identify: Callable[[Path], _Held | None]
) -> Iterator[tuple[str, _Held]]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in _EXTENSIONS or not path.is_file():
                continue
            try:
                held = identify(path)
            except Exception:  # whatever is wrong with one file, the others count
                continue
            if held is not None:
                yield str(path.relative_to(folder)), held


def _adapter(path: Path) -> _Held | None:
    if _is_legacy(path):
        sha256 = checkpoint.digest(path)
        for one in DOWNLOADS:
            if sha256 in one.remote.sha256:
                return one.name, True
    found = checkpoint.read(path)
    found.check()
    return held_by(found.spec)


def _encoder(path: Path) -> _Held | None:
    held = recognise(checkpoint.shapes(checkpoint.read_shapes(path)))
    name = tower(held)
    return None if name is None else (name, True)


def _is_legacy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY


def _configured(yaml_file: Path) -> Iterator[tuple[str, Path, bool]]:
    """What extra_model_paths.yaml says of our kinds: kind, folder, whether it comes first."""
    if not yaml_file.is_file():
        return
    import yaml

    try:
        sections = yaml.safe_load(yaml_file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise DownloadError(
            f"{yaml_file} cannot be read ({error}). Mend it, or name a folder with --to."
        ) from error
    for section in (sections or {}).values():
        section = section or {}
        base = Path(os.path.expandvars(str(section.get("base_path", "."))))
        base = Path(os.path.normpath(yaml_file.absolute().parent / base.expanduser()))
        for kind in (ADAPTERS, ENCODERS):
            for line in str(section.get(kind) or "").splitlines():
                if line.strip():
                    path = Path(os.path.normpath(base / line.strip()))
                    yield kind, path, bool(section.get("is_default"))
