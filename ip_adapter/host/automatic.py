"""Choosing an adapter, its image encoder and its LoRA among what is installed.

One names a purpose; the base model says the family, and the catalogue's order is the preference.
Nothing is loaded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .. import catalogue, lora
from ..catalogue import APACHE, CompanionLoRA, Published, Purpose
from ..encoders import Encoder
from ..errors import IncompatibleModelError, MissingFileError
from ..layers import FAMILIES, Family, family_name
from ..spec import GUESSED, AdapterSpec
from . import digests, folders, installed, unet
from .installed import InstalledAdapter, InstalledEncoder, InstalledLoRA

INSIDE = "inside"
"""Where the LoRA of most FaceID files is: in the adapter's own file."""

RANK = 128
"""Rank of the LoRA of every published FaceID adapter."""

_VAGUE = GUESSED - {"name"}
"""A file that is called as it was published is believed here."""

_HEADER = 1 << 20  # bytes that a LoRA's header and metadata may take
_LISTED = 20  # files that a message lists


@dataclass(frozen=True)
class Found:
    """What was chosen.

    Attributes:
        adapter_name: A file of the adapter folders.
        encoder_name: A file of the image encoder folders, None for adapters that read no image.
        spec: What the adapter is.
        lora: `INSIDE`, a file of the LoRA folders, or None for adapters without LoRA.
    """

    adapter_name: str
    encoder_name: str | None
    spec: AdapterSpec
    lora: str | None

    def describe(self) -> str:
        """The files that were taken, one line each."""
        lines = [f"adapter: {self.adapter_name}, {self.spec.describe()}"]
        if self.encoder_name is not None:
            lines.append(f"image encoder: {self.encoder_name}")
        return "\n".join(lines)


def find(model: Any, purpose: Purpose, *, with_lora: bool = True) -> Found:
    """Find the files for a purpose and a MODEL, whatever they are called.

    The first published adapter of the purpose is taken whose image encoder and LoRA are there too.
    Adapters that are known, or named, come before those of which nothing says which they are.

    Args:
        model: The host's MODEL; its layers say the family.
        purpose: One of `catalogue.PURPOSES`.
        with_lora: Whether the LoRA of FaceID adapters will be used.

    Raises:
        IncompatibleModelError: The model is of no family that adapters were made for.
        MissingFileError: No adapter, or not all that goes with it; says what was looked for and
            where, what is there, and what to download.
    """
    family = _family(model)
    rows = [row for row in catalogue.variants(family) if row.purpose == purpose]
    present = installed.adapters()
    if not rows:
        raise _unpublished(purpose, family, present)
    order = {row.variant: number for number, row in enumerate(rows)}
    candidates = sorted(
        (one for one in present if one.spec.family == family and one.spec.variant in order),
        key=lambda one: (one.spec.evidence in _VAGUE, order[one.spec.variant]),
    )
    if not candidates:
        raise _no_adapter(purpose, rows, present)
    failures = []
    for one in candidates:
        try:
            return _complete(one, rows[order[one.spec.variant]], with_lora)
        except MissingFileError as error:
            failures.append(error)
    raise failures[0]  # the best adapter's is what the user should mend


def has_lora(purpose: str) -> bool:
    """Whether a published adapter of this purpose has a LoRA."""
    return any(row.lora for row in catalogue.PUBLISHED if row.purpose == purpose)


def _family(model: Any) -> Family:
    layers = unet.cross_attention_layers(model)
    family = unet.family_of(model, layers)
    if family is None:
        context = max((layer.context_width for layer in layers), default=0)
        raise IncompatibleModelError(
            f"The model is of {family_name(context, len(layers))}; adapters were published for "
            f"{', '.join(_published_families())}. Load a checkpoint of one of these."
        )
    return family


def _complete(adapter: InstalledAdapter, row: Published, with_lora: bool) -> Found:
    encoder = _encoder(adapter)
    return Found(
        adapter.name,
        encoder.name if encoder is not None else None,
        adapter.spec,
        _lora(adapter, row.lora, row.link) if with_lora and row.lora is not None else None,
    )


def _encoder(adapter: InstalledAdapter) -> InstalledEncoder | None:
    spec = adapter.spec
    if spec.projection.image is None:
        return None
    fitting = [one for one in installed.encoders() if _fits(one.encoder, spec)]
    exact = [one for one in fitting if one.encoder == spec.encoder]
    if not fitting:
        raise _no_encoder(adapter)
    return (exact or fitting)[0]


def _fits(encoder: Encoder, spec: AdapterSpec) -> bool:
    """Whether a tower is the one an adapter was trained with, as far as the adapter reads it."""
    kind, wanted = spec.projection.image, spec.encoder
    if kind is None or encoder.feature_width(kind) != spec.projection.features:
        return False
    return wanted is None or (encoder.hidden, encoder.layers, encoder.size) == (
        wanted.hidden,
        wanted.layers,
        wanted.size,
    )


# The LoRA of FaceID


def _lora(adapter: InstalledAdapter, companion: CompanionLoRA, link: str) -> str:
    """Where an adapter's LoRA is: inside, else known by digest, by name, or the only one there."""
    if adapter.spec.lora_rank is not None:
        return INSIDE
    likely = _companions(adapter.spec, companion)
    digest = {one.name: digests.sha256(one.path) for one in likely}
    known = [one.name for one in likely if digest[one.name] == companion.sha256]
    named = [one.name for one in likely if _plain(companion.file) in _plain(one.name)]
    others = [row.lora for row in catalogue.PUBLISHED if row.lora and row.lora != companion]
    unknown = [
        one.name
        for one in likely
        if not any(
            digest[one.name] == other.sha256 or _plain(other.file) in _plain(one.name)
            for other in others
        )
    ]
    if known or named:
        return (known or named)[0]
    if len(unknown) == 1:
        return unknown[0]
    raise _no_lora(adapter, companion, link, unknown)


def _companions(spec: AdapterSpec, companion: CompanionLoRA) -> list[InstalledLoRA]:
    """The LoRAs that could be an adapter's, by name or size, and that have all its modules.

    Of thousands of files only a few have the size, so hardly any is opened.
    """
    expected = lora.to_kohya(lora.expected(spec.family, spec.widths, RANK), spec.family)
    count = sum(rows * columns for rows, columns in expected.values())
    sizes = [range(count * width, count * width + _HEADER) for width in (2, 4)]  # 16 and 32 bits
    return [
        one
        for one in installed.loras()
        if (any(one.size in size for size in sizes) or _plain(companion.file) in _plain(one.name))
        and expected.keys() <= installed.lora_keys(one)
    ]


def _plain(name: str) -> str:
    """A file's name without its ending, with letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower().removesuffix(".safetensors"))


# What is said where nothing was found


def _unpublished(purpose: str, family: Family, present: list[InstalledAdapter]) -> MissingFileError:
    offered = [row.purpose for row in catalogue.variants(family)]
    if offered:
        advice = f"For {family.name} there are: {', '.join(dict.fromkeys(offered))}. Choose one."
    else:
        advice = (
            f"Nothing was published for {family.name} at all. Use a checkpoint of "
            f"{', '.join(_published_families())}, or load an adapter of your own with Load "
            "IP-Adapter."
        )
    theirs = [one for one in present if one.spec.family == family]
    return _missing(
        f"No adapter for the purpose '{purpose}' was published for {family.name}.",
        _list(f"Installed for {family.name}", {one.name: _brief(one) for one in theirs}),
        advice,
    )


def _no_adapter(
    purpose: str, rows: list[Published], present: list[InstalledAdapter]
) -> MissingFileError:
    family = rows[0].family
    contents = {one.name: _brief(one) for one in present} | installed.no_adapters()
    return _missing(
        f"No IP-Adapter for the purpose '{purpose}' and {family.name} is installed. Looked for, "
        f"by content under any name: {' or '.join(row.variant for row in rows)}.",
        _list(f"In {_where(folders.ADAPTERS)}", contents, empty="no files"),
        _list(
            f"These could be it: their tensors are those of '{purpose}' adapters too, and they are "
            "not the published files. If you know, choose the variant in Load IP-Adapter",
            {
                one.name: f"taken for {one.spec.variant}, could be "
                + " or ".join(one.spec.alternatives)
                for one in present
                if one.spec.family == family
                and one.spec.evidence in GUESSED
                and {row.variant for row in rows} & set(one.spec.alternatives)
            },
        ),
        _list(
            "For the same purpose, but another base model",
            {
                one.name: one.spec.family.name
                for one in present
                if one.spec.family != family and _purpose(one) == purpose
            },
        ),
        _list(
            f"For {family.name}, but another purpose",
            {one.name: _purpose(one) or "" for one in present if one.spec.family == family},
        ),
        _download(rows[0]),
    )


def _no_encoder(adapter: InstalledAdapter) -> MissingFileError:
    present = {one.name: one.encoder.name for one in installed.encoders()}
    return _missing(
        f"'{adapter.name}' ({_brief(adapter)}) needs the image encoder "
        f"{adapter.spec.encoder_name}, which is not installed under any name.",
        _list(
            f"In {_where(folders.ENCODERS)}", present | installed.no_encoders(), empty="no files"
        ),
        _download_encoder(adapter.spec.encoder),
    )


def _no_lora(
    adapter: InstalledAdapter, companion: CompanionLoRA, link: str, unknown: list[str]
) -> MissingFileError:
    count = len(installed.loras())
    return _missing(
        f"'{adapter.name}' ({_brief(adapter)}) was trained together with a LoRA, which is neither "
        f"inside the file, nor one of the {count} files in {_where(folders.LORAS)}. Looked for, by "
        f"content and by name: {companion.file}.",
        _list(
            "Each of these could be it; give the right one that name",
            {name: "the same modules, unknown content" for name in unknown},
        ),
        f"Download {companion.file} from {link} into {installed.places(folders.LORAS)[0]}, or the "
        "adapter's .bin file, which holds it; or set lora_strength to 0 to do without, at the cost "
        "of likeness.",
    )


def _download(row: Published) -> str:
    text = f"Download {row.file} from {row.link} into {installed.places(folders.ADAPTERS)[0]}"
    if row.licence != APACHE:
        text += f" (licence: {row.licence})"
    wanted = row.encoder
    if wanted is None or any(one.encoder == wanted for one in installed.encoders()):
        return f"{text}."
    return f"{text}. Its image encoder {wanted.name} is missing, too. {_download_encoder(wanted)}"


def _download_encoder(encoder: Encoder | None) -> str:
    place = installed.places(folders.ENCODERS)[0]
    if encoder is None:
        return f"Put the encoder that it was trained with into {place}."
    return (
        f"Download its model file from {encoder.link} into {place}; any name will do, "
        f"{encoder.file} is usual."
    )


def _brief(adapter: InstalledAdapter) -> str:
    guess = ", by a guess" if adapter.spec.evidence in GUESSED else ""
    return f"{adapter.spec.variant} for {adapter.spec.family.name}{guess}"


def _purpose(adapter: InstalledAdapter) -> str | None:
    row = catalogue.lookup(adapter.spec.family, adapter.spec.variant)
    return row.purpose if row else None


def _where(folder: str) -> str:
    return " and ".join(installed.places(folder))


def _list(title: str, items: dict[str, str], empty: str = "") -> str:
    """A title with one line per file; nothing, or `empty`, where there are no files."""
    if not items:
        return f"{title}: {empty}." if empty else ""
    lines = [f"- {name}: {what}" if what else f"- {name}" for name, what in items.items()]
    more = len(lines) - _LISTED
    return "\n".join([f"{title}:", *lines[:_LISTED], *([f"- and {more} more"] * (more > 0))])


def _missing(*parts: str) -> MissingFileError:
    return MissingFileError("\n".join(part for part in parts if part))


def _published_families() -> Iterable[str]:
    return [family.name for family in FAMILIES if catalogue.variants(family)]
