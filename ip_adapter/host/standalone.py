"""ComfyUI's library without its server: found, imported, and asked for the models of a command.

Where the host runs already (a node, a test), `start` leaves it as it is.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, MissingFileError

PACK = Path(__file__).resolve().parents[2]
"""Folder of this pack."""


@dataclass(frozen=True, eq=False)
class Models:
    """What the host loads for one base model.

    Attributes:
        model: MODEL.
        clip: CLIP.
        vae: VAE.
        clip_vision: CLIP_VISION or `host.openclip.OpenCLIPVision`; None for adapters that read
            faces alone.
    """

    model: Any
    clip: Any
    vae: Any
    clip_vision: Any | None = None


def find(pack: Path = PACK) -> Path:
    """ComfyUI's folder: ``COMFYUI_PATH``, the one the pack lies in, or the developers' copy.

    Raises:
        MissingFileError: There is none.
    """
    chosen = os.environ.get("COMFYUI_PATH")
    if chosen:
        candidates = [Path(chosen).expanduser()]
    else:
        candidates = [pack.parent.parent, pack / ".host" / "ComfyUI"]
    for folder in candidates:
        if (folder / "main.py").is_file() and (folder / "comfy").is_dir():
            return folder.resolve()
    tried = ", ".join(str(folder) for folder in candidates)
    raise MissingFileError(
        f"There is no ComfyUI in {tried}; its folder holds main.py and comfy. Install this pack in "
        "custom_nodes of a ComfyUI, or set COMFYUI_PATH to the folder of one."
    )


def start(*, cpu: bool = False) -> str:
    """Make ComfyUI's library importable, set up for one process without a server.

    Call it after `torch.cuda.set_device` where there are several processes: each one's host uses
    the current device.

    Args:
        cpu: Compute on the CPU also where there is something faster.

    Returns:
        The device it computes on, as torch names it.

    Raises:
        MissingFileError: See `find`.
    """
    if "comfy.model_management" not in sys.modules:
        _import(cpu)
    import comfy.model_management

    return str(comfy.model_management.get_torch_device())


def _import(cpu: bool) -> None:
    sys.path.insert(0, str(find()))
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = cpu or not _has_accelerator()
        import comfy.model_management
        import comfy.utils
    finally:
        sys.argv = arguments
    comfy.utils.PROGRESS_BAR_ENABLED = False


def load(checkpoint: Path, encoder: Path | None) -> Models:
    """Load a base model and an image encoder as the host's loader nodes do.

    Args:
        checkpoint: A whole checkpoint: UNet, text encoder and VAE.
        encoder: The image encoder; None for adapters that read faces alone.

    Raises:
        MissingFileError: A file is not there.
        CheckpointError: The checkpoint lacks something, or see `host.vision.load`.
    """
    import comfy.sd

    from . import vision

    for path, flag in ((checkpoint, "--checkpoint"), (encoder, "--encoder")):
        if path is not None and not path.is_file():
            raise MissingFileError(
                f"There is no file '{path}'. Give {flag} the path of the file, such as "
                "ComfyUI/models/checkpoints/v1-5-pruned-emaonly.safetensors."
            )
    try:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), output_vae=True, output_clip=True, output_clipvision=False
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"ComfyUI cannot load '{checkpoint}': {error} Needed is a whole checkpoint of SD 1.5, "
            "SD 2 or SDXL."
        ) from error
    parts = {"UNet": model, "text encoder": clip, "VAE": vae}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise CheckpointError(
            f"'{checkpoint}' has no {' and no '.join(missing)}. Needed is a whole checkpoint, "
            "of the kind that Load Checkpoint takes."
        )
    return Models(model, clip, vae, None if encoder is None else vision.load(encoder))


def _has_accelerator() -> bool:
    xpu = getattr(torch, "xpu", None)
    return (
        torch.cuda.is_available()
        or torch.backends.mps.is_available()
        or (xpu is not None and bool(xpu.is_available()))
    )
