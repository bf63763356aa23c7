"""Every choice of an evaluation, written down before it starts, and what follows from the choices.

Two evaluations can be compared when their protocols are equal; a folder of results belongs to one
protocol. Nothing here generates or scores.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .. import files
from ..images import Fit
from .data import DataCard, Sample
from .errors import DataError, ProtocolError
from .metrics import CLIP_SCORE_WEIGHT
from .scorer import ScorerCard

Condition = Literal["adapter", "no adapter", "shuffled"]
"""``adapter``: the sample's own picture is the image prompt. ``no adapter``: the base model alone.
``shuffled``: the picture of another sample is the image prompt, scored against the sample's own.
All with the same seeds and texts."""

CONDITIONS: tuple[Condition, ...] = get_args(Condition)

SEEDS = "first 48 bits of SHA-256 of 'seed/id/k'"
SHUFFLING = "one cycle through all different pictures, in an order drawn with Random(seed)"
FILE = "protocol.json"


@dataclass(frozen=True)
class ModelCard:
    """Identifies a weights file by its name and the SHA-256 of its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Models:
    """The models that made the pictures."""

    checkpoint: ModelCard
    adapter: ModelCard
    encoder: ModelCard


@dataclass(frozen=True)
class Sampling:
    """How pictures are made; the defaults are the paper's, as far as it says.

    Attributes:
        pictures: Per sample.
        seed: Base of all seeds and of the shuffling.
        width: Of a picture in pixels.
        height: Of a picture in pixels.
        steps: Of denoising.
        sampler: The host's name.
        scheduler: The host's name; ``ddim_uniform`` with 50 steps visits 1, 21, ... 981, as
            diffusers' DDIM does for SD 1.5.
        guidance: Scale of classifier-free guidance.
        weight: The paper's lambda.
        text: The text prompt; ``{caption}`` stands for the sample's caption. Without it the text
            says nothing of the sample: "prompt off".
        negative: The negative text prompt.
        fit: How a reference that is not square is made so for the adapter's encoder.
    """

    pictures: int = 4
    seed: int = 0
    width: int = 512
    height: int = 512
    steps: int = 50
    sampler: str = "ddim"
    scheduler: str = "ddim_uniform"
    guidance: float = 7.5
    weight: float = 1.0
    text: str = ""
    negative: str = ""
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        for name in ("pictures", "width", "height", "steps"):
            if getattr(self, name) < 1:
                raise ProtocolError(f"{name} is {getattr(self, name)}; needed is at least 1.")
        if self.width % 8 or self.height % 8:
            raise ProtocolError(
                f"The size is {self.width} x {self.height}; needed are multiples of 8 pixels."
            )
        if self.fit not in get_args(Fit):
            raise ProtocolError(f"fit is {self.fit!r}; needed is {', '.join(get_args(Fit))}.")

    @property
    def prompt(self) -> str:
        """Whether the generator is told the caption: ``on`` or ``off``."""
        return "on" if "{caption}" in self.text else "off"


@dataclass(frozen=True)
class Scoring:
    """How pictures are scored.

    Attributes:
        clip: What CLIP-I and CLIP-T are measured with.
        dino: What DINO-I is measured with, or None.
        caption_prefix: What stands before a caption for CLIP-T; CLIPScore's authors have
            ``A photo depicts `` there.
        clip_score_weight: CLIPScore's w.
    """

    clip: ScorerCard
    dino: ScorerCard | None = None
    caption_prefix: str = ""
    clip_score_weight: float = CLIP_SCORE_WEIGHT


@dataclass(frozen=True)
class Protocol:
    """All of it.

    Attributes:
        data: Which samples.
        models: Which weights.
        sampling: How pictures are made.
        scoring: How they are scored.
        conditions: Which rows the table has.
        seeds: How a seed follows from sample and number.
        shuffling: How references are shuffled.
    """

    data: DataCard
    models: Models
    sampling: Sampling
    scoring: Scoring
    conditions: tuple[Condition, ...] = CONDITIONS
    seeds: str = SEEDS
    shuffling: str = SHUFFLING

    def __post_init__(self) -> None:
        unknown = set(self.conditions) - set(CONDITIONS)
        if unknown or not self.conditions:
            raise ProtocolError(
                f"The conditions are {', '.join(self.conditions) or 'none'}; needed is one or more "
                f"of {', '.join(CONDITIONS)}."
            )

    def flat(self) -> dict[str, Any]:
        """Every choice under one dotted name, ready to be printed, stored and compared."""
        listed = _flatten(asdict(self))
        listed["conditions"] = ", ".join(self.conditions)
        listed["sampling.prompt"] = self.sampling.prompt
        return listed


@dataclass(frozen=True)
class Row:
    """What one sample asks of the generator under one condition.

    Attributes:
        sample: Whose seeds, caption and picture it is scored with.
        reference: The image prompt, or None.
        text: The text prompt.
    """

    sample: Sample
    reference: Path | None
    text: str


def seed_of(base: int, sample: str, k: int) -> int:
    """Seed of the k-th picture of a sample, the same under every condition; below 2**48."""
    digest = hashlib.sha256(f"{base}/{sample}/{k}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def derangement(count: int, seed: int) -> tuple[int, ...]:
    """A permutation of ``0..count-1`` that moves every element, the same for the same seed.

    Raises:
        ValueError: There are fewer than two elements.
    """
    if count < 2:
        raise ValueError(f"{count} elements cannot all be moved; needed are two.")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    target = dict(zip(order, [*order[1:], order[0]], strict=True))
    return tuple(target[i] for i in range(count))


def rows(protocol: Protocol, samples: Sequence[Sample], condition: Condition) -> list[Row]:
    """What each sample asks of the generator under a condition.

    Raises:
        DataError: References are to be shuffled, and all samples have the same one.
    """
    references: list[Path | None]
    match condition:
        case "adapter":
            references = [sample.image for sample in samples]
        case "no adapter":
            references = [None] * len(samples)
        case "shuffled":
            references = list(_shuffled(samples, protocol.sampling.seed))
    text = protocol.sampling.text
    return [
        Row(sample, reference, text.replace("{caption}", sample.caption))
        for sample, reference in zip(samples, references, strict=True)
    ]


def claim(folder: Path, protocol: Protocol) -> None:
    """Make a folder of results this protocol's own, or find that it is already.

    Raises:
        ProtocolError: It was begun with another protocol; the message names the difference. Or it
            holds scores without a protocol.
    """
    file = folder / FILE
    flat = protocol.flat()
    if not file.is_file():
        if (folder / "scores.jsonl").exists():
            raise ProtocolError(
                f"{folder} holds scores but no {FILE}, which says how they were made. Use a new "
                "folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(flat, indent=2, ensure_ascii=False) + "\n"
        files.write(file, text.encode())
        return
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProtocolError(f"{file} cannot be read ({error}). Use a new folder.") from error
    changes = differences(begun, flat)
    if changes:
        raise ProtocolError(
            f"{folder} was begun with another protocol:\n  "
            + "\n  ".join(changes)
            + "\nUse a new folder, or the choices it was begun with."
        )


def differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name every choice that differs: ``sampling.steps: 50 there, 20 now``."""
    missing = "nothing"
    return [
        f"{name}: {begun.get(name, missing)!r} there, {now.get(name, missing)!r} now"
        for name in sorted(set(begun) | set(now))
        if begun.get(name, missing) != now.get(name, missing)
    ]


def _shuffled(samples: Sequence[Sample], seed: int) -> list[Path]:
    # Over different pictures, not over samples: several captions may share one picture.
    different = list(dict.fromkeys(sample.image for sample in samples))
    if len(different) < 2:
        raise DataError(
            "References cannot be shuffled: all samples have the same picture. Needed are two, or "
            "leave the condition 'shuffled' out."
        )
    target = derangement(len(different), seed)
    other = {image: different[target[i]] for i, image in enumerate(different)}
    return [other[sample.image] for sample in samples]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= _flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
