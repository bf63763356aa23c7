"""Which image encoder a set of tensors holds, told from their names and shapes alone.

File names say nothing: both encoders of the first release are called ``model.safetensors``. Widths
alone mislead too: 1280 is the hidden width of ViT-H and the projected width of ViT-bigG, 1024 is
the projected width of ViT-H and the hidden width of ViT-L. A tower is therefore known by both, its
depth and its table of positions. No weights are read here; `host.vision` runs the towers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

FeatureKind = Literal["pooled", "hidden"]
"""Which output of the image encoder a projection reads: the projected, pooled embedding ``[N, E]``
or the penultimate layer's token features ``[N, P, W]``."""

Naming = Literal["hugging_face", "open_clip"]
"""Whose names the tensors of a tower carry; OpenAI's own are the same as open_clip's."""

_PATCHES = "embeddings.patch_embedding.weight"
_FIRST_BLOCK = "transformer.resblocks.0.attn.in_proj_weight"


@dataclass(frozen=True)
class Encoder:
    """The geometry of a vision tower.

    Attributes:
        name: What users call it.
        hidden: Width of its transformer, hence of the token features.
        pooled: Width of the projected image embedding; None without a projection (SigLIP).
        layers: Depth of its transformer; 0 where it is not known.
        size: Side of the square it was trained on, in pixels; 0 where it is not known.
        patch: Side of a patch in pixels.
        has_class_token: Whether a class token stands before the patches.
        file: The name under which people usually save it; empty where there is none.
        link: Where it is published; empty where we know no place.
    """

    name: str
    hidden: int
    pooled: int | None
    layers: int = 0
    size: int = 0
    patch: int = 14
    has_class_token: bool = True
    file: str = ""
    link: str = ""

    @property
    def tokens(self) -> int:
        """Length P of the token features at the tower's own size: 257, 577, 729."""
        return self.tokens_at(self.size)

    def tokens_at(self, size: int) -> int:
        """Length P of the token features of pictures `size` pixels wide and high."""
        return int((size // self.patch) ** 2) + self.has_class_token

    def feature_width(self, kind: FeatureKind) -> int | None:
        """Width of the output that a projection of this kind would read, None without it."""
        return self.pooled if kind == "pooled" else self.hidden


VIT_H = Encoder(
    "OpenCLIP ViT-H/14",
    hidden=1280,
    pooled=1024,
    layers=32,
    size=224,
    file="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    link="https://huggingface.co/h94/IP-Adapter/tree/main/models/image_encoder",
)
VIT_BIGG = Encoder(
    "OpenCLIP ViT-bigG/14",
    hidden=1664,
    pooled=1280,
    layers=48,
    size=224,
    file="CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",
    link="https://huggingface.co/h94/IP-Adapter/tree/main/sdxl_models/image_encoder",
)
VIT_L = Encoder(
    "CLIP ViT-L/14",
    hidden=1024,
    pooled=768,
    layers=24,
    size=224,
    file="clip-vit-large-patch14.safetensors",
    link="https://huggingface.co/openai/clip-vit-large-patch14",
)
VIT_L_336 = Encoder(
    "CLIP ViT-L/14-336",
    hidden=1024,
    pooled=768,
    layers=24,
    size=336,
    file="clip-vit-large-patch14-336.bin",
    link="https://huggingface.co/Kwai-Kolors/Kolors-IP-Adapter-Plus/tree/main/image_encoder",
)
SIGLIP_384 = Encoder(
    "SigLIP so400m/14-384",
    hidden=1152,
    pooled=None,
    layers=27,
    size=384,
    has_class_token=False,
    file="sigclip_vision_patch14_384.safetensors",
    link="https://huggingface.co/Comfy-Org/sigclip_vision_384",
)
SIGLIP_512 = Encoder(
    "SigLIP so400m/16-512",
    hidden=1152,
    pooled=None,
    layers=27,
    size=512,
    patch=16,
    has_class_token=False,
    file="siglip2-so400m-patch16-512.safetensors",
    link="https://huggingface.co/google/siglip2-so400m-patch16-512",
)
MINIATURE = Encoder("Miniature CLIP", hidden=128, pooled=128, layers=4, size=64, patch=8)
"""The image half of the CLIP of the project's own family; see `layers.MINIATURE`."""

PUBLIC: tuple[Encoder, ...] = (VIT_H, VIT_BIGG, VIT_L, VIT_L_336, SIGLIP_384, SIGLIP_512)
"""The published towers that adapters read; what messages name."""

ENCODERS: tuple[Encoder, ...] = (*PUBLIC, MINIATURE)
"""Every tower that is known by name."""


@dataclass(frozen=True)
class Location:
    """Where in a file the tower is.

    Attributes:
        naming: Whose names its tensors carry.
        prefix: What stands before them, such as ``vision_model.`` or ``visual.``.
    """

    naming: Naming
    prefix: str

    @property
    def outer(self) -> str:
        """What stands before the model that the tower is a part of."""
        return self.prefix.removesuffix("vision_model.")


def locate(names: Iterable[str]) -> Location | None:
    """Find a vision transformer among tensor names, None if there is none.

    Whole CLIP files, wrapped ones (``model.vision_model.``) and towers saved bare (``embeddings.``,
    as transformers 5 does) are all found.
    """
    present = set(names)
    for name in sorted(present, key=len):
        prefix = name.removesuffix(_PATCHES)
        if prefix != name and f"{prefix}embeddings.position_embedding.weight" in present:
            return Location("hugging_face", prefix)
        prefix = name.removesuffix("conv1.weight")
        if prefix != name and prefix + _FIRST_BLOCK in present:
            return Location("open_clip", prefix)
    return None


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Encoder | None:
    """Tell which vision tower the tensors of a file or a loaded model belong to.

    Args:
        shapes: Name and shape of each tensor, text half and wrappers included.

    Returns:
        A row of `ENCODERS`; such a row at another size, for a fine-tune with more positions; an
        encoder named by its widths where the tower is unknown; or None where there is no tower.
    """
    place = locate(shapes)
    if place is None:
        return None
    if place.naming == "hugging_face":
        patches, positions = _PATCHES, "embeddings.position_embedding.weight"
        norm, blocks = "post_layernorm.weight", "encoder.layers."
        class_token, projection = "embeddings.class_embedding", "visual_projection.weight"
        projected = shapes.get(place.outer + projection, ())[:1]
    else:
        patches, positions = "conv1.weight", "positional_embedding"
        norm, blocks = "ln_post.weight", "transformer.resblocks."
        class_token, projection = "class_embedding", "proj"
        projected = shapes.get(place.prefix + projection, ())[1:]
    kernel = shapes[place.prefix + patches]
    hidden = shapes.get(place.prefix + norm, kernel)[0]
    has_class_token = place.prefix + class_token in shapes
    # A linear patch embedding (SigLIP 2 NaFlex) reads the three colours of a patch flattened.
    patch = kernel[-1] if len(kernel) == 4 else math.isqrt(kernel[-1] // 3)
    table = shapes.get(place.prefix + positions, (0,))[0] - has_class_token
    return _named(
        hidden=hidden,
        pooled=projected[0] if projected else None,
        layers=_depth(shapes, place.prefix + blocks),
        grid=math.isqrt(max(table, 0)),
        patch=patch,
        has_class_token=has_class_token,
    )


def encoder_of(hidden: int, pooled: int | None, layers: int = 0) -> Encoder:
    """Recognise a tower by its widths and, where it is known, its depth.

    An unknown one is named by its widths.
    """
    for encoder in ENCODERS:
        same_widths = (encoder.hidden, encoder.pooled) == (hidden, pooled)
        if same_widths and layers in (0, encoder.layers):
            return encoder
    width = f"pooled width {pooled}" if pooled is not None else "no projection"
    name = f"an image encoder with hidden width {hidden} and {width}"
    return Encoder(name, hidden, pooled, layers)


def _named(
    *,
    hidden: int,
    pooled: int | None,
    layers: int,
    grid: int,
    patch: int,
    has_class_token: bool,
) -> Encoder:
    measured = Encoder(
        encoder_of(hidden, pooled, layers).name,
        hidden,
        pooled,
        layers,
        size=grid * patch,
        patch=patch,
        has_class_token=has_class_token,
    )
    kin = [
        known
        for known in ENCODERS
        if (known.hidden, known.has_class_token) == (hidden, has_class_token)
        and layers in (0, known.layers)
        and pooled in (None, known.pooled)
    ]
    if not kin:
        return measured
    # Compared by grid: SigLIP's 384 pixels are no multiple of its patch.
    same_size = (e for e in kin if (e.size // e.patch, e.patch) == (grid, patch))
    known = next(same_size, None)
    if known and (pooled, layers) == (known.pooled, known.layers):
        return known
    family = kin[0].name.split("/")[0]
    name = known.name if known else f"{family}/{patch} at {grid * patch} pixels"
    if pooled != kin[0].pooled:
        name += " without its projection"
    return replace(measured, name=name, size=known.size if known else measured.size)


def _depth(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> int:
    """Number of transformer layers whose names start with `blocks`."""
    return len({name[len(blocks) :].split(".")[0] for name in shapes if name.startswith(blocks)})
