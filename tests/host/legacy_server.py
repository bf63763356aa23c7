"""A ComfyUI for the workflows of the old pack: the models they name, encoders of two layers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from scripts.server import Server
from tests.host.server_fixtures import running
from tests.legacy_graphs import COMPOSITION, EMBEDS
from tests.synthetic.models import (
    ADAPTER_BASE,
    ADAPTER_FACE,
    ADAPTER_PLUS,
    CHECKPOINT,
    CLIP_VISION,
    FACE_DETECTOR,
    FACE_RECOGNISER,
    FIXTURE_PACK,
)

SHALLOW_PACK = FIXTURE_PACK.with_name("shallow_pack")

FILES = {
    path: path
    for path in (
        *(CHECKPOINT, CLIP_VISION, FACE_DETECTOR, FACE_RECOGNISER),
        *(ADAPTER_BASE, ADAPTER_PLUS, ADAPTER_FACE),
    )
} | {COMPOSITION: ADAPTER_PLUS}
"""What the workflows name -> the built file: a composition adapter is a plus by another name."""


@contextlib.contextmanager
def legacy_server(base: Path, model_files: Path) -> Iterator[Server]:
    """Start a host with a base folder of its own.

    Args:
        base: The folder.
        model_files: The built files.
    """
    chosen = base / "chosen"
    for name, file in FILES.items():
        (chosen / name).parent.mkdir(parents=True, exist_ok=True)
        (chosen / name).symlink_to(model_files / file)
    saved = base / "input" / EMBEDS
    saved.parent.mkdir(parents=True)
    # As the old pack wrote them: one tensor, pickled by torch.
    torch.save(torch.randn(1, 1024, generator=torch.Generator().manual_seed(0)), saved)
    shutil.copytree(SHALLOW_PACK, base / "custom_nodes" / SHALLOW_PACK.name)
    with running(base, chosen) as server:
        yield server
