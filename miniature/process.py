"""The host in this process, knowing the miniature, and its models as the host loads them."""

from __future__ import annotations

from pathlib import Path

import torch

from ip_adapter.host import standalone
from ip_adapter.host.standalone import Models

from . import family


def start(*, cpu: bool = False) -> None:
    """Start the host's library, unless it runs, and make it know the miniature.

    Args:
        cpu: Compute on the CPU also where there is something faster.
    """
    standalone.start(cpu=cpu)
    from . import host

    host.register()


def load(checkpoint: Path = family.BASE) -> Models:
    """Load a checkpoint, and the image encoder where it is there; `start` comes first."""
    import comfy.clip_vision

    with torch.inference_mode():
        models = standalone.load(checkpoint, None)
        encoder = comfy.clip_vision.load(str(family.CLIP_VISION))
    return Models(models.model, models.clip, models.vae, encoder)
