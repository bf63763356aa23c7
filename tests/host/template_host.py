"""A ComfyUI that has every model which the shipped workflows name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from scripts.parts import PLUS, PLUS_FACE
from scripts.server import Server
from tests.host.server_fixtures import running


@contextlib.contextmanager
def serving(base: Path, model_files: Path) -> Iterator[Server]:
    """As `running`, with one adapter more.

    Plus-face has the tensors of plus, so that its file is the nano plus under the published name.
    """
    folder = base / "models" / "ipadapter"
    folder.mkdir(parents=True)
    (folder / PLUS_FACE).symlink_to(model_files / "ipadapter" / PLUS)
    with running(base, model_files) as started:
        yield started
