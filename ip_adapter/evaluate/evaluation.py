"""The run: generate what is missing, score it, and write down each picture's figures at once.

It may be stopped or killed at any moment and started again: a picture is a file under a name that
says what it is, written whole or not at all; scores are lines, appended and never changed. Scores
are always taken from the file, so a run in pieces gives the same figures as one in one go.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast
from typing import Protocol as Interface

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from .. import drawing, files
from ..errors import ImageError
from . import metrics
from .data import Sample, open_picture
from .errors import ProtocolError
from .protocol import Condition, Protocol, Row, claim, rows, seed_of
from .scorer import BATCH, Scorer

SCORES = "scores.jsonl"
FEATURES = "features.safetensors"

Generate = Callable[[Row, Sequence[int], Condition], Tensor]
"""Makes the pictures of a row, one for each seed: ``[K, H, W, 3]`` in 0..1."""

Progress = Callable[[int, int, float], None]
"""Told how many pictures are scored, of how many, and the seconds each new one took."""


class Generator(Interface):
    """Anything that makes pictures, such as `generate.HostGenerator`."""

    def generate(self, row: Row, seeds: Sequence[int], condition: Condition) -> Tensor:
        """See `Generate`."""


@dataclass(frozen=True)
class Score:
    """The figures of one picture.

    Attributes:
        sample: Id of the sample.
        condition: Of its row.
        k: Number of the picture, from 0.
        seed: It was made with.
        picture: Its file, relative to the folder.
        clip_i: Cosine with the sample's own picture.
        clip_t: Cosine with the caption; not yet CLIPScore.
        dino_i: Cosine in DINO's space, or None.
        seconds: Its share of the time to generate it; None where its file was there already.
    """

    sample: str
    condition: Condition
    k: int
    seed: int
    picture: str
    clip_i: float
    clip_t: float
    dino_i: float | None = None
    seconds: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """Which picture of the evaluation it is."""
        return self.sample, self.condition, self.k


@dataclass(frozen=True)
class Targets:
    """What pictures are compared with, one row per sample.

    Attributes:
        images: ``[S, E]``, of the samples' pictures.
        captions: ``[S, E]``.
        dino: ``[S, E']``, or None.
    """

    images: Tensor
    captions: Tensor
    dino: Tensor | None


def evaluate(
    protocol: Protocol,
    samples: Sequence[Sample],
    *,
    clip: Scorer,
    generator: Generator | Generate,
    folder: Path,
    dino: Scorer | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Generate and score whatever the folder does not have yet.

    Sample after sample, each under every condition, so that a run that was stopped has equally
    much of every row.

    Args:
        protocol: Says everything; the scorers must be those of its cards.
        samples: Those of the protocol's data.
        clip: For CLIP-I and CLIP-T.
        generator: An object with ``generate``, or a function like it.
        folder: For results; it is this protocol's from now on.
        dino: For DINO-I.
        progress: Told of every sample.

    Returns:
        All scores, those of earlier runs included, in the order of conditions and samples.

    Raises:
        DataError: See `protocol.rows`.
        ImageError: A picture of the data is damaged, or the generator made no pictures.
        ProtocolError: The folder is another protocol's, or the scorers are.
    """
    if (clip.card, dino.card if dino else None) != (protocol.scoring.clip, protocol.scoring.dino):
        raise ProtocolError("The scorers are not those that the protocol names.")
    work = {condition: rows(protocol, samples, condition) for condition in protocol.conditions}
    claim(folder, protocol)
    done = {score.key: score for score in read_scores(folder / SCORES)}
    targets = _targets(protocol, samples, clip, dino, folder)
    count = protocol.sampling.pictures
    total = len(samples) * count * len(work)
    for i, sample in enumerate(samples):
        target = Targets(
            targets.images[i : i + 1],
            targets.captions[i : i + 1],
            None if targets.dino is None else targets.dino[i : i + 1],
        )
        for condition, planned in work.items():
            keys = [(sample.id, condition, k) for k in range(count)]
            if all(key in done for key in keys):
                continue
            seeds = [seed_of(protocol.sampling.seed, sample.id, k) for k in range(count)]
            names = [picture_name(condition, sample.id, k, seed) for k, seed in enumerate(seeds)]
            seconds = _make(generator, planned[i], seeds, condition, [folder / f for f in names])
            found = _score([open_picture(folder / f) for f in names], target, clip, dino)
            new = [
                Score(sample.id, condition, k, seeds[k], names[k], *found[k], seconds)
                for k in range(count)
            ]
            append_scores(folder / SCORES, [score for score in new if score.key not in done])
            done |= {score.key: score for score in new if score.key not in done}
            if progress is not None:
                progress(len(done), total, seconds or 0.0)
    return [
        done[sample.id, condition, k]
        for condition in protocol.conditions
        for sample in samples
        for k in range(count)
    ]


def picture_name(condition: str, sample: str, k: int, seed: int) -> str:
    """Where a picture is in the folder: ``pictures/no-adapter/000139_2_seed81985.png``."""
    return f"pictures/{condition.replace(' ', '-')}/{sample}_{k}_seed{seed}.png"


def read_scores(path: Path) -> list[Score]:
    """Read the lines written so far; half a line at the end, of a killed run, is cut off.

    Raises:
        ProtocolError: A whole line cannot be read; the message names it.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    names = {field.name for field in fields(Score)}
    out = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            out.append(Score(**{name: row[name] for name in names}))
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(
                f"{path} line {number} is no score ({type(error).__name__}: {error}). Remove that "
                "line; its picture will be scored again."
            ) from error
    return out


def append_scores(path: Path, scores: Sequence[Score]) -> None:
    """Append lines in one write, and have them on disk before going on."""
    lines = "".join(json.dumps(asdict(score)) + "\n" for score in scores)
    with path.open("ab", buffering=0) as file:
        file.write(lines.encode())
        os.fsync(file.fileno())


def _targets(
    protocol: Protocol,
    samples: Sequence[Sample],
    clip: Scorer,
    dino: Scorer | None,
    folder: Path,
) -> Targets:
    """Embed the data, or read what an earlier run embedded; finds damaged pictures early."""
    path = folder / FEATURES
    if not path.is_file():
        images, others = [], []
        for start in range(0, len(samples), BATCH):
            pictures = [_open(sample) for sample in samples[start : start + BATCH]]
            images.append(clip.images(pictures))
            if dino is not None:
                others.append(dino.images(pictures))
        prefix = protocol.scoring.caption_prefix
        tensors = {
            "images": torch.cat(images),
            "captions": clip.texts([prefix + sample.caption for sample in samples]),
        }
        if others:
            tensors["dino"] = torch.cat(others)
        files.write(path, save({key: value.clone() for key, value in tensors.items()}))
    tensors = load_file(path)
    return Targets(tensors["images"], tensors["captions"], tensors.get("dino"))


def _open(sample: Sample) -> Image.Image:
    try:
        return open_picture(sample.image)
    except ImageError as error:
        raise ImageError(f"{sample.place}: {error}") from error


def _make(
    generator: Generator | Generate,
    row: Row,
    seeds: Sequence[int],
    condition: Condition,
    paths: Sequence[Path],
) -> float | None:
    """Generate and write a row's pictures unless all are there; seconds for each, or None.

    Always the whole row: in a batch of another size the same seed gives slightly other numbers.
    """
    if all(file.is_file() for file in paths):
        return None
    generate = cast(Generate, getattr(generator, "generate", generator))
    started = time.perf_counter()
    pictures = generate(row, seeds, condition)
    seconds = (time.perf_counter() - started) / len(seeds)
    shape = tuple(pictures.shape)
    if len(shape) != 4 or shape[0] != len(seeds) or shape[-1] != 3:
        raise ImageError(
            f"The generator returned {shape} for {len(seeds)} seeds; needed is [K, height, width, "
            "3]."
        )
    if not bool(torch.isfinite(pictures).all()):
        raise ImageError(
            f"The generator made pictures with values that are not numbers for sample "
            f"{row.sample.id} ({condition}). A VAE in float16 may have overflowed: use one that "
            "does not, or float32."
        )
    for file, picture in zip(paths, pictures.float().cpu(), strict=True):
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = io.BytesIO()
            drawing.from_image(picture[None])[0].save(stream, format="PNG")
            files.write(file, stream.getvalue())
    return seconds


def _score(
    pictures: Sequence[Image.Image], target: Targets, clip: Scorer, dino: Scorer | None
) -> list[tuple[float, float, float | None]]:
    """CLIP-I, cosine of CLIP-T and DINO-I of each picture of one sample."""
    embedded = clip.images(pictures).unsqueeze(0)  # [1, K, E]
    image = metrics.clip_i(embedded, target.images)[0].tolist()
    text = metrics.clip_t(embedded, target.captions)[0].tolist()
    other: list[float | None] = [None] * len(pictures)
    if dino is not None and target.dino is not None:
        found = dino.images(pictures).unsqueeze(0)
        other = metrics.dino_i(found, target.dino)[0].tolist()
    return list(zip(image, text, other, strict=True))
