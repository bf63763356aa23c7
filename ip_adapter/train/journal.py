"""The log of a training: JSON lines and pictures beside the weights, and TensorBoard's events."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from .board import Board

FILE = "watch.jsonl"
"""The log, in the folder of the weights: one JSON object per line."""

BOARD = Path("log", "watch")
"""Folder of TensorBoard's events, below the one in which `loop` logs each step's loss."""


class Log:
    """Writes what is watched: JSON lines, PNG pictures and, where installed, TensorBoard events.

    Args:
        folder: Where the weights are written; it is made if it is not there.
        step: Where training goes on. What an interrupted run had noted of later steps is dropped,
            as these steps come again.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.folder = folder
        self.file = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._forget(step)
        self._board = Board(folder / BOARD, step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Note named numbers of a step; what is not finite is null in the file."""
        plain = {
            name: float(value) if math.isfinite(value) else None for name, value in values.items()
        }
        line = json.dumps({"step": step, **plain})
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        for name, value in values.items():
            self._board.number(name, value, step)

    def picture(self, step: int, name: str, pixels: Tensor) -> Path:
        """Write a picture ``[H, W, 3]`` in 0..1 under ``samples``; return its path."""
        from PIL import Image

        path = self.folder / "samples" / f"{name}_{step:07}.png"
        path.parent.mkdir(exist_ok=True)
        values = pixels.clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
        Image.fromarray(values.numpy()).save(path)
        self._board.picture(name, values, step)
        return path

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        self._board.close()

    def _forget(self, step: int) -> None:
        if not self.file.is_file():
            return
        kept = [json.dumps(line) for line in read_log(self.file) if line["step"] <= step]
        files.write(self.file, "".join(f"{line}\n" for line in kept).encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that a stopped process left unfinished is not counted."""
    return list(_whole_lines(path.read_text(encoding="utf-8").splitlines()))


def _whole_lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "step" in found:
            yield found
