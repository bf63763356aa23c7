"""What an IP-Adapter is, without ComfyUI: read, project, attend.

Shapes, in every docstring of this package:

    B  batch (rows of the latent)     N  reference images       G  groups of rows with one prompt
    T  image tokens                   P  patches of an image    L  latent tokens, height * width
    C  width of an attention layer    H  attention heads        D  width of a token or of a head
    E  width of the image features    M  masks

Images are ``[B, H, W, C]`` in 0..1 at the host's border and ``[N, 3, H, W]`` inside.
`ip_adapter.host` is the only room that imports ComfyUI.
"""

from __future__ import annotations

from .adapter import IPAdapter
from .attention import decoupled_attention, image_attention
from .checkpoint import load_adapter
from .errors import (
    CheckpointError,
    DownloadError,
    ImageError,
    IncompatibleModelError,
    InfluenceError,
    IPAdapterError,
    MissingFileError,
)
from .projections import Features
from .prompt import ImagePrompt
from .spec import AdapterSpec

__version__ = "0.1.0"

__all__ = [
    "AdapterSpec",
    "CheckpointError",
    "DownloadError",
    "Features",
    "IPAdapter",
    "IPAdapterError",
    "ImageError",
    "ImagePrompt",
    "IncompatibleModelError",
    "InfluenceError",
    "MissingFileError",
    "decoupled_attention",
    "image_attention",
    "load_adapter",
]
