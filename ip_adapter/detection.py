"""From tensor names and shapes to an adapter's spec.

Tensors decide first. Where several published adapters have equal tensors, the file's metadata
decides (`convert` writes it), then its SHA-256; then its name is believed, then its precision, and
the spec says that it was a guess. A user's choice overrides all of them, within what the tensors
allow.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import catalogue, lora
from .catalogue import Published
from .errors import CheckpointError, IncompatibleModelError
from .layers import FAMILIES, KOLORS, PUBLIC, Family, family_name, find_families
from .projections import HEAD_WIDTH
from .refusals import Shapes, other_adapter, other_file, some
from .spec import (
    AdapterSpec,
    Evidence,
    FacePerceiverProjection,
    FaceProjection,
    FaceResamplerProjection,
    InstructProjection,
    LinearProjection,
    PatchProjection,
    Projection,
    ResamplerProjection,
    encoder_for,
)

AUTOMATIC = "automatic"
"""A user's choice of variant that leaves it to us."""

FACE_WIDTH = 512
"""Width of the vector of every face recogniser that adapters were trained with."""

_KEY_VALUE = re.compile(r"ip_adapter\.(\d+)\.to_[kv]_ip\.weight")
_PROJ = "image_proj."

_SUPPORTED = "IP-Adapters for " + ", ".join(family.name for family in PUBLIC)
_WHERE = (
    "Published files are at https://huggingface.co/h94/IP-Adapter; for SD 1.5 "
    "ip-adapter_sd15.safetensors and ip-adapter-plus_sd15.safetensors, for SDXL those named "
    "sdxl_vit-h"
)


@dataclass(frozen=True)
class Clues:
    """What beside tensors and the file's name tells variants apart.

    Attributes:
        dtype: Precision of the weights as safetensors spells it: ``F16``, ``F32``.
        metadata: Of a safetensors file.
        sha256: Computes the file's digest; called only when it can decide something.
        variant: A user's choice, or `AUTOMATIC`.
    """

    dtype: str = "F16"
    metadata: Mapping[str, str] = field(default_factory=dict)
    sha256: Callable[[], str] | None = None
    variant: str = AUTOMATIC


def identify(shapes: Shapes, name: str, clues: Clues | None = None) -> AdapterSpec:
    """Say which adapter a set of tensors is.

    Args:
        shapes: Shape of every tensor under its flat key, ``image_proj.*`` and ``ip_adapter.*``.
        name: The file's name; for messages, and the last thing to go by.
        clues: What else is known of the file.

    Raises:
        CheckpointError: It is no adapter, an unsupported one, or tensors are missing or misshapen.
        IncompatibleModelError: It is an adapter for a base model family that is not supported, or
            cannot be the variant that the user chose.
    """
    if not all(any(k.startswith(p) for k in shapes) for p in (_PROJ, "ip_adapter.")):
        raise CheckpointError(
            f"'{name}' is not an IP-Adapter: it is {other_file(shapes)}. Needed are tensors "
            f"'image_proj.*' and 'ip_adapter.*'. {_WHERE}"
        )
    indices = sorted({int(m[1]) for key in shapes if (m := _KEY_VALUE.fullmatch(key))})
    if not indices:
        raise CheckpointError(
            f"'{name}' has an image projection but no keys and values (ip_adapter.1.to_k_ip.weight "
            "and so on). Training scripts of old lose them; convert the dump again."
        )
    layer_shapes = [_shape(shapes, f"ip_adapter.{i}.to_k_ip.weight", 2, name) for i in indices]
    ((context, _),) = Counter(columns for _, columns in layer_shapes).most_common(1)
    projection = _projection(shapes, context, name)
    family = _family(context, indices, projection, name)
    if projection.width != context and family != KOLORS:
        raise CheckpointError(
            f"'{name}' projects to tokens of width {projection.width}, but its keys and values "
            f"read width {context}. The file mixes parts of two adapters; download it again."
        )
    widths = tuple(rows for rows, _ in layer_shapes)
    rank = lora.rank(shapes)
    if rank is not None:
        check_tensors(shapes, lora.expected(family, widths, rank), name)
    spec = AdapterSpec(
        family,
        projection,
        widths,
        variant=projection.layout,
        encoder=encoder_for(projection),
        lora_rank=rank,
    )
    return _with_variant(spec, name, clues or Clues())


def refuse_other_adapters(keys: Iterable[str], name: str) -> None:
    """Refuse adapters for transformer models and other methods, by the names they came with.

    Raises:
        CheckpointError: It is one of them; says which.
    """
    foreign = other_adapter(keys)
    if foreign is not None:
        raise CheckpointError(
            f"'{name}' is {foreign}; supported are {_SUPPORTED}. Use a node made for it, or an "
            f"adapter that is supported. {_WHERE}"
        )


def _family(context: int, indices: list[int], projection: Projection, name: str) -> Family:
    found = find_families(context, len(indices))
    if not found:
        near = [f"{f.name} has {len(f.layers)}" for f in FAMILIES if f.context_width == context]
        raise IncompatibleModelError(
            f"'{name}' is an IP-Adapter for {family_name(context, len(indices))}; supported are "
            f"{_SUPPORTED}. "
            + (
                f"Of this context, {' and '.join(near)} layers: the file is incomplete, or made "
                f"for a pruned model (SSD-1B, Vega). {_WHERE}"
                if near
                else _WHERE
            )
        )
    family = found[0]
    if KOLORS in found and _made_for_kolors(projection):
        family = KOLORS
    expected = [layer.index for layer in family.layers]
    if indices != expected:
        raise CheckpointError(
            f"'{name}' numbers its layers {some([str(i) for i in indices], 8)}; {family.name} "
            f"adapters have {some([str(i) for i in expected], 8)}. Convert the file again."
        )
    return family


def _made_for_kolors(projection: Projection) -> bool:
    """Kolors' adapters share SDXL's layers, but read ViT-L/14 at 336 pixels."""
    match projection:
        case ResamplerProjection() | FacePerceiverProjection():
            return projection.features == 1024
    return False


# Projections


def _projection(shapes: Shapes, context: int, name: str) -> Projection:
    """Read the projection's measures; the order of the tests matters."""
    if _PROJ + "proj_new_input.weight" in shapes:
        return InstructProjection(
            _resampler(shapes, _PROJ, name),
            text_features=_shape(shapes, _PROJ + "proj_new_input.weight", 2, name)[1],
            text_hidden=_shape(shapes, _PROJ + "new_input_layers.0.1.1.weight", 2, name)[0],
        )
    if _PROJ + "proj.3.weight" in shapes:
        features = _shape(shapes, _PROJ + "proj.0.weight", 2, name)[1]
        patches = PatchProjection(features, _shape(shapes, _PROJ + "proj.2.weight", 2, name)[0])
        encoder = encoder_for(patches)  # no tensor says the number of patches
        return replace(patches, tokens=encoder.tokens) if encoder is not None else patches
    if _PROJ + "perceiver_resampler.proj_in.weight" in shapes:
        identity = _identity(shapes, name)
        resampler = _resampler(shapes, _PROJ + "perceiver_resampler.", name, identity.tokens)
        return FacePerceiverProjection(identity, resampler, shortcut=True)
    if _PROJ + "proj.0.weight" in shapes:
        return _identity(shapes, name)
    if _PROJ + "latents" in shapes:
        resampler = _resampler(shapes, _PROJ, name)
        if resampler.features == FACE_WIDTH:
            return FaceResamplerProjection(resampler)
        return resampler
    if _PROJ + "proj.weight" in shapes:
        rows, features = _shape(shapes, _PROJ + "proj.weight", 2, name)
        return LinearProjection(features, _tokens(rows, context, "proj.weight", name), context)
    found = sorted(key for key in shapes if key.startswith(_PROJ))
    raise CheckpointError(
        f"'{name}' has an image projection that is not known here (tensors {some(found, 6)}); "
        f"supported are {_SUPPORTED}. {_WHERE}"
    )


def _resampler(
    shapes: Shapes, prefix: str, name: str, tokens: int | None = None
) -> ResamplerProjection:
    inner, features = _shape(shapes, prefix + "proj_in.weight", 2, name)
    stem = re.escape(prefix) + r"layers\.(\d+)\."
    depth = {m[1] for key in shapes if (m := re.match(stem, key))}
    return ResamplerProjection(
        features=features,
        tokens=tokens or _shape(shapes, prefix + "latents", 3, name)[1],
        inner=inner,
        heads=_shape(shapes, prefix + "layers.0.0.to_q.weight", 2, name)[0] // HEAD_WIDTH,
        depth=len(depth),
        hidden=_shape(shapes, prefix + "layers.0.1.1.weight", 2, name)[0],
        width=_shape(shapes, prefix + "proj_out.weight", 2, name)[0],
    )


def _identity(shapes: Shapes, name: str) -> FaceProjection:
    inner, features = _shape(shapes, _PROJ + "proj.0.weight", 2, name)
    rows, _ = _shape(shapes, _PROJ + "proj.2.weight", 2, name)
    (width,) = _shape(shapes, _PROJ + "norm.weight", 1, name)
    if features != FACE_WIDTH:
        raise CheckpointError(
            f"'{name}' has a face projection that reads vectors of width {features}; every known "
            f"face recogniser gives {FACE_WIDTH}. It is an adapter of another kind, or damaged."
        )
    return FaceProjection(features, inner, _tokens(rows, width, "proj.2.weight", name), width)


def _tokens(rows: int, width: int, key: str, name: str) -> int:
    if not width or rows % width:
        raise CheckpointError(
            f"'{name}': {_PROJ}{key} has {rows} rows, which is not a whole number of tokens of "
            f"width {width}. The file mixes parts of two adapters; download it again."
        )
    return rows // width


# Variants


def _with_variant(spec: AdapterSpec, name: str, clues: Clues) -> AdapterSpec:
    rows = _candidates(spec)
    allowed = [row.variant for row in rows] or [spec.variant]
    if clues.variant not in (AUTOMATIC, *allowed):
        raise IncompatibleModelError(
            f"'{name}' cannot be '{clues.variant}': its tensors are those of "
            f"{' or '.join(allowed)} for {spec.family.name}. Set variant to {AUTOMATIC} or to one "
            "of these."
        )
    if not rows:
        return spec
    row, evidence = _choose(rows, name, clues)
    others = tuple(other.variant for other in rows if other is not row)
    return replace(
        spec,
        variant=row.variant,
        evidence=evidence,
        encoder=row.encoder,
        alternatives=others,
        projection=_as_trained(spec.projection, row),
    )


def _candidates(spec: AdapterSpec) -> list[Published]:
    """The published adapters whose tensors have these very shapes."""
    kind = spec.projection.image
    return [
        row
        for row in catalogue.variants(spec.family)
        if row.layout == spec.projection.layout
        and (
            kind is None
            or row.encoder is None
            or row.encoder.feature_width(kind) == spec.projection.features
        )
    ]


def _choose(rows: list[Published], name: str, clues: Clues) -> tuple[Published, Evidence]:
    if clues.variant != AUTOMATIC:
        return next(row for row in rows if row.variant == clues.variant), "user"
    if len(rows) == 1:
        return rows[0], "tensors"
    noted = clues.metadata.get("variant")
    by_metadata = next((row for row in rows if row.variant == noted), None)
    if by_metadata is not None:
        return by_metadata, "metadata"
    digest = clues.metadata.get("source_sha256")  # of what `convert` made the file of
    if digest is None and clues.sha256 is not None:
        digest = clues.sha256()
    if digest is not None:
        by_digest = next((row for row in rows if digest in row.sha256), None)
        if by_digest is not None:
            return by_digest, "sha256"
    for called in (name, clues.metadata.get("source", "")):  # what `convert` made it of, too
        named = _by_name(rows, called)
        if named is not None:
            return named, "name"
    precise = [row for row in rows if row.dtype == clues.dtype]
    if len(precise) == 1:
        return precise[0], "dtype"
    return (precise or rows)[0], "assumption"


def _by_name(rows: list[Published], name: str) -> Published | None:
    plain = _plain(name)
    same = [row for row in rows if _plain(Path(row.file).stem) == _plain(Path(name).stem)]
    marked = [row for row in rows if row.marks and all(mark in plain for mark in row.marks)]
    return max(same or marked, key=lambda row: len(row.marks), default=None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _as_trained(projection: Projection, row: Published) -> Projection:
    """Set what a variant does differently with equal tensors."""
    match projection:
        case FacePerceiverProjection() if row.family == KOLORS:
            return replace(projection, face="raw")
        case FacePerceiverProjection():
            return replace(projection, shortcut=row.variant == "faceid-plusv2")
    return projection


# Tensors


def check_tensors(found: Shapes, needed: Shapes, name: str) -> None:
    """Compare a file's tensors with those its spec calls for.

    Raises:
        CheckpointError: Tensors are missing or have another shape; names the first few.
    """
    missing = [key for key in needed if key not in found]
    if missing:
        raise CheckpointError(
            f"'{name}' lacks {len(missing)} of {len(needed)} tensors: {some(missing)}. The file "
            "is incomplete; download or convert it again."
        )
    wrong = [
        f"{key} is {list(found[key])}, needed {list(needed[key])}"
        for key in needed
        if found[key] != needed[key]
    ]
    if wrong:
        raise CheckpointError(
            f"'{name}' has {len(wrong)} tensors of the wrong shape: {some(wrong)}. The file mixes "
            "parts of two adapters; download or convert it again."
        )


def _shape(shapes: Shapes, key: str, rank: int, name: str) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None or len(shape) != rank:
        found = "no such tensor" if shape is None else f"shape {list(shape)}"
        raise CheckpointError(
            f"'{name}': tensor {key} with {rank} dimensions is needed, found {found}. The file is "
            "incomplete; download or convert it again."
        )
    return shape
