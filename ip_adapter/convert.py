"""Any adapter's file or training dump -> one flat .safetensors that says what it is.

Nothing of the adapter is lost: the tensors keep their numbers and dtypes, the LoRA inside FaceID
files stays. What is frozen in a dump (the UNet, the encoders, optimizer states) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from . import catalogue, checkpoint
from .checkpoint import Checkpoint
from .detection import AUTOMATIC
from .errors import CheckpointError
from .files import replacing
from .spec import GUESSED, AdapterSpec

FORMAT = "ip_adapter"
VERSION = "1"


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        path: The new file.
        spec: What it holds.
        tensors: The number of tensors.
        metadata: What it says of itself.
    """

    path: Path
    spec: AdapterSpec
    tensors: int
    metadata: dict[str, str]


def convert(
    source: Path,
    target: Path,
    *,
    variant: str = AUTOMATIC,
    licence: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write an adapter as a flat .safetensors with metadata.

    Args:
        source: A file in any published container, a training dump, or the dump's folder.
        target: The file to write; it appears whole, or not at all.
        variant: Which of the published adapters it is, where tensors leave a choice.
        licence: Under which terms; the published adapter's unless given.
        overwrite: Whether an existing target may be replaced.

    Raises:
        CheckpointError: The source cannot be read or is incomplete, or the target exists.
        IncompatibleModelError: See `checkpoint.read`.
    """
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"'{target}' exists already and was left as it is. Choose another name, or ask for it "
            "to be overwritten."
        )
    found = checkpoint.read(source, variant)
    found.build()  # complete, or refused before anything is written
    metadata = _metadata(found, licence)
    # Tensors of a pickle may share storage, which the format cannot express.
    whole = {key: tensor.contiguous().clone() for key, tensor in found.tensors.items()}
    with replacing(target) as partial:
        save_file(whole, partial, metadata=metadata)
    return Converted(target, found.spec, len(whole), metadata)


def _metadata(found: Checkpoint, licence: str | None) -> dict[str, str]:
    spec = found.spec
    row = catalogue.lookup(spec.family, spec.variant)
    first = found.metadata  # a file converted before knows more of its origin than its copy
    metadata = dict(found.metadata) | {
        "format": FORMAT,
        "version": VERSION,
        "base_model": spec.family.name,
        "projection": spec.projection.layout,
        "tokens": str(spec.projection.tokens),
        "needs": spec.needs,
        "source": first.get("source", found.path.name),
        "licence": licence or first.get("licence") or (row.licence if row else catalogue.UNKNOWN),
    }
    if found.path.is_file():
        metadata["source_sha256"] = first.get("source_sha256") or checkpoint.digest(found.path)
    if spec.encoder is not None:
        metadata["encoder"] = spec.encoder.name
    if spec.evidence not in GUESSED:  # a guess must not become a fact by being written down
        metadata["variant"] = spec.variant
    return metadata
