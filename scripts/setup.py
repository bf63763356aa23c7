"""Make a checkout ready to work in: a ComfyUI, a virtual environment, a browser.

Runs under any Python from 3.10 on with the standard library only; 3.11 is what the project is
tested with. Whatever is there already stays: a ComfyUI named by `COMFYUI_PATH`, a torch inside
`.venv`, a browser. A stamp in `.venv` makes the next run immediate until an input changes.

    python3 -m scripts.setup
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - said here, before 3.10 syntax is imported
    sys.exit(f"Python {sys.version.split()[0]} found, 3.10 or newer needed: make PYTHON=python3.11")

from scripts.host import REPOSITORY, HostError, find_host, host_version, install_host

# One trio: torchaudio 2.11 refuses a torch built for another CUDA, and torchvision's compiled part
# belongs to the torch of the same index.
TORCH_PINS = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_PACKAGES = ("chromium", "fonts-dejavu-core")
ENVIRONMENT = REPOSITORY / ".venv"
STAMP = ENVIRONMENT / ".setup-stamp"


class SetupError(RuntimeError):
    """A step failed; the message says which and what to do."""


@contextmanager
def step(label: str) -> Iterator[None]:
    """Say what is being done, then how long it took."""
    print(f"setup: {label} ...", flush=True)
    started = time.perf_counter()
    yield
    print(f"setup:   done in {time.perf_counter() - started:.1f} s", flush=True)


def venv_python(environment: Path = ENVIRONMENT) -> Path:
    """The interpreter of the virtual environment."""
    return environment / "bin" / "python"


def installed_torch(environment: Path = ENVIRONMENT) -> str | None:
    """The version of torch in the environment, read without starting its Python."""
    for found in environment.glob("lib/python*/site-packages/torch-*.dist-info"):
        return found.name.removeprefix("torch-").removesuffix(".dist-info")
    return None


def torch_requirements(environment: Path = ENVIRONMENT) -> list[str]:
    """What to ask of torch: what is installed, else nothing for a foreign host, else the pins."""
    installed = installed_torch(environment)
    if installed:
        return [f"torch=={installed}"]
    return [] if os.environ.get("COMFYUI_PATH") else list(TORCH_PINS)


def stamp_text(host: Path, repository: Path = REPOSITORY) -> str:
    """Digest of everything that decides what gets installed.

    Args:
        host: The ComfyUI folder.
        repository: Folder of this pack.

    Returns:
        A hexadecimal SHA-256.
    """
    digest = hashlib.sha256("\n".join([*TORCH_PINS, str(host)]).encode())
    for file in (
        host / "requirements.txt",
        repository / "requirements.txt",
        repository / "pyproject.toml",
    ):
        content = file.read_bytes() if file.is_file() else b""
        digest.update(b"%d:" % len(content) + content)
    return digest.hexdigest()


def is_current(host: Path, *, repository: Path = REPOSITORY, stamp: Path = STAMP) -> bool:
    """Whether an earlier run with the same inputs went through."""
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == stamp_text(host, repository)


def find_chromium() -> str | None:
    """Path of a Chromium for the browser tests: `CHROMIUM_PATH`, else what is on the PATH."""
    chosen = os.environ.get("CHROMIUM_PATH")
    names = (chosen,) if chosen else BROWSERS
    return next((found for name in names if (found := shutil.which(name))), None)


def create_environment() -> None:
    """Create `.venv` with this Python and put uv into it."""
    if not venv_python().exists():
        with step(f"creating .venv with Python {sys.version.split()[0]}"):
            _run(
                [sys.executable, "-m", "venv", str(ENVIRONMENT)],
                hint="Does this Python have venv (Debian, Ubuntu: apt install python3-venv)?",
            )
    if not venv_python().with_name("uv").exists():
        with step("installing uv"):
            _run([str(venv_python()), "-m", "pip", "install", "--quiet", "uv"])


def install_requirements(host: Path) -> None:
    """Install torch, the requirements of host and pack, and the `dev` group of pyproject.toml."""
    command = [str(venv_python().with_name("uv")), "pip", "install"]
    command += ["--python", str(venv_python()), *torch_requirements()]
    command += ["-r", str(host / "requirements.txt"), "-r", "requirements.txt", "--group", "dev"]
    if sys.stderr.isatty():  # minutes the first time: let uv draw its progress bars
        _run(command, quiet=False)
    else:
        _run([*command, "--quiet"])


def ensure_chromium() -> None:
    """Try once to install a browser; without one its tests are skipped."""
    if find_chromium():
        return
    apt = shutil.which("apt-get")
    if apt and os.geteuid() == 0:
        with step("installing chromium for the browser tests"):
            command = [apt, "install", "-y", "--no-install-recommends", *BROWSER_PACKAGES]
            subprocess.run(command, capture_output=True, check=False)
    if not find_chromium():
        print(
            "setup: no Chromium, so the browser tests will be skipped; install one with your "
            "package manager, or set CHROMIUM_PATH"
        )


def main() -> None:
    """Bring the checkout up to date, or say that it is."""
    os.chdir(REPOSITORY)
    try:
        host = find_host()
        if host is None or not is_current(host):
            create_environment()
            if host is None:
                with step("fetching ComfyUI into .host"):
                    host = install_host(python=venv_python())
            with step(f"installing requirements for ComfyUI {host_version(host)}"):
                install_requirements(host)
            ensure_chromium()
            STAMP.write_text(stamp_text(host), encoding="utf-8")
    except (HostError, SetupError) as error:
        sys.exit(f"setup: {error}")
    print(f"setup: ready (ComfyUI {host_version(host)}, torch {installed_torch()})")


def _run(command: list[str], *, quiet: bool = True, hint: str = "") -> None:
    ran = subprocess.run(command, capture_output=quiet, text=True)
    if ran.returncode:
        output = (ran.stderr or ran.stdout or "").strip() if quiet else ""
        last = "\n".join(output.splitlines()[-12:])
        text = f"`{' '.join(command)}` ended with {ran.returncode}.\n{last}\n{hint}"
        raise SetupError(text.strip())


if __name__ == "__main__":
    main()
