"""Stand-ins for the evaluator: data, a scorer to compute by hand, a generator that counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ip_adapter.evaluate import data
from ip_adapter.evaluate.data import DataCard
from ip_adapter.evaluate.protocol import (
    Condition,
    ModelCard,
    Models,
    Protocol,
    Row,
    Sampling,
    Scoring,
)
from ip_adapter.evaluate.scorer import Scorer, ScorerCard

SIZE = 16
CARD = ScorerCard("fake", "", "0" * 64, "gelu", "{}", "mean of 4 x 4 fields")


# ---- stand-ins: a scorer that can be computed by hand, a generator that counts its calls --------


def fields(picture: Image.Image) -> Tensor:
    """``[48]``: mean colours of 4 x 4 fields, less the middle grey."""
    pixels = np.asarray(picture.resize((SIZE, SIZE)), dtype=np.float64) / 255 - 0.5
    return torch.from_numpy(pixels.reshape(4, 4, 4, 4, 3).mean(axis=(1, 3)).reshape(-1)).float()


def word(caption: str) -> Tensor:
    digest = hashlib.sha256(caption.encode()).digest()
    return torch.tensor([byte - 127.5 for byte in (digest * 2)[:48]])


def fake(**changes: Any) -> Scorer:
    return Scorer(
        replace(CARD, **changes),
        fields,
        lambda x: x,
        lambda captions: torch.stack([word(caption) for caption in captions]),
    )


class Painter:
    """Paints noise around the reference's mean colour, and stops the run when it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Row, tuple[int, ...], Condition]] = []

    def generate(self, row: Row, seeds: Sequence[int], condition: Condition) -> Tensor:
        self.calls.append((row, tuple(seeds), condition))
        colour = torch.full((3,), 0.5)
        if row.reference is not None:
            colour = data.to_tensor(data.open_picture(row.reference)).mean(dim=(0, 1, 2))
        noise = [
            torch.rand(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return 0.5 * colour + 0.5 * torch.stack(noise)


def write_data(folder: Path, count: int = 3) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        colour = rng.integers(0, 256, 3)
        pixels = np.clip(rng.normal(colour, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"id": f"p{i}", "image": f"{i}.png", "caption": f"picture {i}"}))
    file = folder / "data.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def make_protocol(card: DataCard, **sampling: Any) -> Protocol:
    files = [ModelCard(name, "1" * 64) for name in ("base", "adapter", "encoder")]
    chosen = Sampling(**{"pictures": 2, "width": SIZE, "height": SIZE, **sampling})
    return Protocol(card, Models(*files), chosen, Scoring(CARD))
