"""CLIP-I, CLIP-T and DINO-I: the figures of the paper's table, on embeddings alone.

S samples with K pictures each. All arithmetic is in float64. Sources: arXiv 2308.06721, section
4.2; CLIPScore, arXiv 2104.08718, equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

CLIP_SCORE_WEIGHT = 2.5
"""CLIPScore's w. The paper's CLIP-T of 0.588 is 2.5 times a cosine of 0.235; docs/evaluation.md."""


def clip_i(pictures: Tensor, references: Tensor) -> Tensor:
    """CLIP-I: how like its reference each generated picture is.

    Args:
        pictures: ``[S, K, E]``, image embeddings of generated pictures, of any length.
        references: ``[S, E]``, image embeddings of the samples' own pictures.

    Returns:
        Cosines ``[S, K]`` in -1..1.
    """
    return _cosine(pictures, references)


def clip_t(pictures: Tensor, captions: Tensor) -> Tensor:
    """The plain cosine under CLIP-T: how well a caption describes each generated picture.

    Args:
        pictures: ``[S, K, E]``, image embeddings of generated pictures, of any length.
        captions: ``[S, E]``, text embeddings of the samples' captions.

    Returns:
        Cosines ``[S, K]`` in -1..1; `clip_score` makes the paper's figure of them.
    """
    return _cosine(pictures, captions)


def dino_i(pictures: Tensor, references: Tensor) -> Tensor:
    """DINO-I: as `clip_i`, on the embeddings of a DINO tower, which tells individuals apart."""
    return _cosine(pictures, references)


def clip_score(cosine: Tensor, weight: float = CLIP_SCORE_WEIGHT) -> Tensor:
    """CLIPScore, ``weight * max(cosine, 0)``, of cosines of any shape."""
    return weight * cosine.clamp_min(0)


@dataclass(frozen=True)
class Summary:
    """A figure with its uncertainty.

    Attributes:
        mean: Over all pictures.
        standard_error: Of the mean over samples; None for a single sample.
        samples: How many.
        pictures: How many in all.
    """

    mean: float
    standard_error: float | None
    samples: int
    pictures: int


def summarise(scores: Tensor) -> Summary:
    """Mean and standard error of ``[S, K]`` scores.

    The K pictures of one sample share their reference, so they are averaged first and the error is
    that of S independent values: their deviation (n - 1) over the root of S.
    """
    samples, pictures = len(scores), scores.numel()
    each = scores.double().mean(dim=1)
    error = float(each.std(correction=1)) / samples**0.5 if samples > 1 else None
    return Summary(float(each.mean()), error, samples, pictures)


def difference(scores: Tensor, others: Tensor) -> Summary:
    """How much higher ``[S, K]`` scores are than others of the same samples and seeds.

    Paired, so that what samples have in common leaves the standard error.
    """
    return summarise(scores.double() - others.double())


def _cosine(pictures: Tensor, targets: Tensor) -> Tensor:
    """``[S, K, E]``, ``[S, E]`` -> ``[S, K]``."""
    one = F.normalize(pictures.double(), dim=-1)
    other = F.normalize(targets.double(), dim=-1)
    return (one * other.unsqueeze(1)).sum(dim=-1).clamp(-1, 1)
