"""What an adapter is, as frozen values: its projection, its layers, the encoder it needs.

Nothing here holds weights. A variant is a dataclass of its own, dispatched once where the modules
are built (`projections.build_projection`); there are no mode flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .layers import Family

FeatureKind = Literal["pooled", "hidden"]
"""Which output of the image encoder a projection reads: the projected, pooled embedding ``[N, E]``
or the penultimate layer's patch features ``[N, P, W]``."""


@dataclass(frozen=True)
class Encoder:
    """The geometry of a CLIP vision tower.

    Attributes:
        name: What users call it.
        hidden: Width of its transformer, hence of the patch features.
        pooled: Width of the projected image embedding.
    """

    name: str
    hidden: int
    pooled: int

    def feature_width(self, kind: FeatureKind) -> int:
        """Width of the output that a projection of this kind would read."""
        return self.pooled if kind == "pooled" else self.hidden


VIT_H = Encoder("OpenCLIP ViT-H/14", hidden=1280, pooled=1024)
VIT_BIGG = Encoder("OpenCLIP ViT-bigG/14", hidden=1664, pooled=1280)
VIT_L = Encoder("CLIP ViT-L/14", hidden=1024, pooled=768)
ENCODERS: tuple[Encoder, ...] = (VIT_H, VIT_BIGG, VIT_L)


def encoder_of(hidden: int, pooled: int) -> Encoder:
    """Recognise a tower by its two widths; an unknown one is named by them."""
    for encoder in ENCODERS:
        if (encoder.hidden, encoder.pooled) == (hidden, pooled):
            return encoder
    name = f"an image encoder with hidden width {hidden} and pooled width {pooled}"
    return Encoder(name, hidden, pooled)


@dataclass(frozen=True)
class LinearProjection:
    """Paper's global image prompt: pooled embedding, one Linear, LayerNorm, a few tokens.

    Published as ``ImageProjModel`` (IP-Adapter, IP-Adapter light, ViT-G).
    """

    features: int
    tokens: int
    width: int

    kind: FeatureKind = "pooled"
    label: str = "global"


@dataclass(frozen=True)
class ResamplerProjection:
    """Fine-grained image prompt: patch features read by learned queries.

    Published as ``Resampler`` (IP-Adapter-Plus, Plus-Face, composition).

    Attributes:
        features: Width of the patch features.
        tokens: Number of learned queries, hence of image tokens.
        inner: Width inside the resampler.
        heads: Attention heads, each 64 wide.
        depth: Number of attention + feed-forward layers.
        hidden: Width inside a feed-forward layer.
        width: Width of the image tokens.
    """

    features: int
    tokens: int
    inner: int
    heads: int
    depth: int
    hidden: int
    width: int

    kind: FeatureKind = "hidden"
    label: str = "plus"


Projection = LinearProjection | ResamplerProjection


@dataclass(frozen=True)
class AdapterSpec:
    """Everything that a checkpoint's tensors say about the adapter they hold.

    Attributes:
        family: The base model family.
        projection: How image features become image tokens.
        widths: Output width of each key/value pair, in the order of `Family.layers`.
    """

    family: Family
    projection: Projection
    widths: tuple[int, ...]

    @property
    def encoder(self) -> Encoder | None:
        """The known image encoder whose features fit, or None if no known one does."""
        for encoder in ENCODERS:
            if encoder.feature_width(self.projection.kind) == self.projection.features:
                return encoder
        return None

    def describe(self) -> str:
        """One short line, such as ``plus for SD 1.5, 16 tokens, needs OpenCLIP ViT-H/14``."""
        return (
            f"{self.projection.label} for {self.family.name}, {self.projection.tokens} tokens, "
            f"needs {self.encoder_name}"
        )

    @property
    def encoder_name(self) -> str:
        """The encoder in words, known or not."""
        known = self.encoder
        return known.name if known else f"features of width {self.projection.features}"
