"""What an adapter is, as frozen values: its projection, its layers, the encoder it needs.

Nothing here holds weights. A projection is a dataclass of its own, dispatched where its module is
built and run (`projections`); there are no mode flags. Each says what it reads:

- `image`: features of an image encoder, ``"pooled"`` ``[N, E]`` or ``"hidden"`` ``[N, P, E]``;
- `face`: a face recogniser's vector ``[N, 512]``, ``"normed"`` to length 1 or ``"raw"``;
- `text`: whether it reads text states ``[N, 77, 768]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .encoders import ENCODERS, Encoder, FeatureKind
from .layers import Family

FaceKind = Literal["normed", "raw"]

Evidence = Literal["tensors", "sha256", "metadata", "name", "dtype", "assumption", "user"]
"""What a variant was told by, from certain to guessed; ``user`` when somebody chose it."""

GUESSED: frozenset[Evidence] = frozenset({"name", "dtype", "assumption"})

_HOW: dict[Evidence, str] = {
    "name": "by its file's name",
    "dtype": "by its precision",
    "assumption": "assumed",
}


@dataclass(frozen=True)
class LinearProjection:
    """Paper's global image prompt: pooled embedding, one Linear, LayerNorm, a few tokens.

    Published as ``ImageProjModel`` (IP-Adapter, IP-Adapter light, ViT-G).
    """

    features: int
    tokens: int
    width: int

    image: ClassVar[FeatureKind | None] = "pooled"
    face: ClassVar[FaceKind | None] = None
    text: ClassVar[bool] = False
    layout: ClassVar[str] = "global"


@dataclass(frozen=True)
class ResamplerProjection:
    """Fine-grained image prompt: patch features read by learned queries.

    Published as ``Resampler`` (IP-Adapter-Plus, Plus-Face, composition, Kolors-Plus).

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

    image: ClassVar[FeatureKind | None] = "hidden"
    face: ClassVar[FaceKind | None] = None
    text: ClassVar[bool] = False
    layout: ClassVar[str] = "plus"


@dataclass(frozen=True)
class PatchProjection:
    """Full image prompt: every patch feature becomes a token, through two Linears.

    Published as ``MLPProjModel`` (full-face).

    Attributes:
        features: Width of the patch features, and inside.
        width: Width of the image tokens.
        tokens: One per patch and one for the class: 257 for ViT-H.
    """

    features: int
    width: int
    tokens: int = 257

    image: ClassVar[FeatureKind | None] = "hidden"
    face: ClassVar[FaceKind | None] = None
    text: ClassVar[bool] = False
    layout: ClassVar[str] = "full"


@dataclass(frozen=True)
class FaceProjection:
    """A face's identity as tokens, through two Linears and a LayerNorm.

    Published as ``MLPProjModelFaceId`` (FaceID with 4 tokens, portrait with 16).

    Attributes:
        features: Width of the face vector.
        inner: Width between the Linears.
        tokens: Number of tokens per face.
        width: Width of a token.
    """

    features: int
    inner: int
    tokens: int
    width: int

    image: ClassVar[FeatureKind | None] = None
    face: ClassVar[FaceKind | None] = "normed"
    text: ClassVar[bool] = False

    @property
    def layout(self) -> str:
        """FaceID and portrait differ in the number of tokens."""
        return "portrait" if self.tokens > 4 else "faceid"


class _AroundResampler:
    """A projection whose measures are those of the resampler in it."""

    resampler: ResamplerProjection

    @property
    def features(self) -> int:
        """Width of what it reads: patch features, or a face vector."""
        return self.resampler.features

    @property
    def tokens(self) -> int:
        """Number of tokens per image or face."""
        return self.resampler.tokens

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.resampler.width


@dataclass(frozen=True)
class FacePerceiverProjection(_AroundResampler):
    """Identity tokens that read the structure of the face from its patch features.

    Published as ``ProjModelFaceIdPlus`` (FaceID-Plus, FaceID-PlusV2, Kolors-FaceID-Plus).

    Attributes:
        identity: How the face vector becomes tokens, which then are the queries.
        resampler: How the queries read the patch features.
        shortcut: Whether the identity tokens are added to the result (V2), which then has the
            structure at a weight of its own.
        face: Whether it was trained on normed or raw face vectors.
    """

    identity: FaceProjection
    resampler: ResamplerProjection
    shortcut: bool
    face: FaceKind = "normed"

    image: ClassVar[FeatureKind | None] = "hidden"
    text: ClassVar[bool] = False
    layout: ClassVar[str] = "faceid-plus"


@dataclass(frozen=True)
class FaceResamplerProjection(_AroundResampler):
    """A resampler whose only input token is the raw face vector.

    Published in InstantID and in the unnormed portrait.
    """

    resampler: ResamplerProjection

    image: ClassVar[FeatureKind | None] = None
    face: ClassVar[FaceKind | None] = "raw"
    text: ClassVar[bool] = False
    layout: ClassVar[str] = "face resampler"


@dataclass(frozen=True)
class InstructProjection(_AroundResampler):
    """A resampler that also reads a prompt and an instruction ("use the style of this image").

    Published in IP-Adapter-Instruct.

    Attributes:
        resampler: The part that reads patch features.
        text_features: Width of the text states.
        text_hidden: Width inside the feed-forward layers of the two text stacks.
    """

    resampler: ResamplerProjection
    text_features: int
    text_hidden: int

    image: ClassVar[FeatureKind | None] = "hidden"
    face: ClassVar[FaceKind | None] = None
    text: ClassVar[bool] = True
    layout: ClassVar[str] = "instruct"


Projection = (
    LinearProjection
    | ResamplerProjection
    | PatchProjection
    | FaceProjection
    | FacePerceiverProjection
    | FaceResamplerProjection
    | InstructProjection
)


@dataclass(frozen=True)
class AdapterSpec:
    """Everything that a checkpoint says about the adapter it holds.

    Attributes:
        family: The base model family.
        projection: How features become image tokens.
        widths: Output width of each key/value pair, in the order of `Family.layers`.
        variant: Which of the published adapters it is, such as ``plus-face``; some have equal
            tensors, so see `evidence`. A layout's name where nothing was published.
        evidence: What the variant was told by.
        encoder: The image encoder it was trained with; None if it reads none, or one not known.
        alternatives: Variants it could also be, as far as tensors tell; empty when they tell.
        lora_rank: Rank of the LoRA that the file holds beside the adapter, or None.
    """

    family: Family
    projection: Projection
    widths: tuple[int, ...]
    variant: str
    evidence: Evidence = "tensors"
    encoder: Encoder | None = None
    alternatives: tuple[str, ...] = ()
    lora_rank: int | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers of its layers in the checkpoint."""
        return tuple(layer.index for layer in self.family.layers)

    @property
    def needs(self) -> str:
        """What an image prompt is made of, in words: an encoder, a face, text."""
        parts = []
        if self.projection.image is not None:
            parts.append(self.encoder_name)
        if self.projection.face is not None:
            parts.append("a face")
        if self.projection.text:
            parts.append("an instruction")
        return " and ".join(parts)

    @property
    def encoder_name(self) -> str:
        """The encoder in words, known or not."""
        if self.encoder is not None:
            return self.encoder.name
        return f"features of width {self.projection.features}"

    def summary(self) -> str:
        """One short line, such as ``plus for SD 1.5, 16 tokens, needs OpenCLIP ViT-H/14``."""
        return (
            f"{self.variant} for {self.family.name}, {self.projection.tokens} tokens, "
            f"needs {self.needs}"
        )

    def describe(self) -> str:
        """The summary; where the variant was guessed, also how, and what else it could be."""
        if self.evidence not in GUESSED or not self.alternatives:
            return self.summary()
        others = " or ".join(self.alternatives)
        return (
            f"{self.summary()} ({_HOW[self.evidence]}; {others} would have equal tensors: "
            "'variant' in Load IP-Adapter corrects it)"
        )


def encoder_for(projection: Projection) -> Encoder | None:
    """The published encoder whose features have the width that a projection reads, if one does."""
    kind = projection.image
    if kind is None:
        return None
    fitting = (e for e in ENCODERS if e.feature_width(kind) == projection.features)
    return next(fitting, None)
