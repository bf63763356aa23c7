"""Choosing an adapter, its image encoder and its LoRA among what is installed.

One names a purpose; the base model says the family, and the catalogue's order is the preference.
Nothing is loaded here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .. import catalogue, downloads, lora
from ..catalogue import APACHE, CompanionLoRA, Published, Purpose
from ..detection import AUTOMATIC
from ..encoders import Encoder
from ..errors import IncompatibleModelError, MissingFileError
from ..layers import FAMILIES, Family, family_name
from ..spec import GUESSED, AdapterSpec
from . import digests, face_lora, folders, installed, unet
from .installed import InstalledAdapter, InstalledEncoder, InstalledLoRA

log = logging.getLogger(__name__)

INSIDE = face_lora.INSIDE

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
        variant: What to load it as, where its name says more than its content.
    """

    adapter_name: str
    encoder_name: str | None
    spec: AdapterSpec
    lora: str | None
    variant: str = AUTOMATIC

    def describe(self) -> str:
        """The files that were taken, one line each."""
        lines = [f"adapter: {self.adapter_name}, {self.spec.describe()}"]
        if self.encoder_name is not None:
            lines.append(f"image encoder: {self.encoder_name}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Names:
    """What file names say, for those who go by names; they count less than the content.

    Attributes:
        adapter: Whether a name means a published adapter.
        encoder: Whether a name means the image encoder.
        lora: Whether a name means the companion LoRA.
    """

    adapter: Callable[[Published, str], bool] = lambda row, name: False
    encoder: Callable[[str], bool] = lambda name: False
    lora: Callable[[str], bool] = lambda name: False


@dataclass(frozen=True)
class Search:
    """What is looked for.

    Attributes:
        label: In words, to follow "for the".
        rows: Published adapters of one family, the preferred one first; at least one.
        names: What names say.
    """

    label: str
    rows: tuple[Published, ...]
    names: Names = field(default_factory=Names)


def find(model: Any, purpose: Purpose, *, with_lora: bool = True) -> Found:
    """Find the files for a purpose and a MODEL, whatever they are called.

    Args:
        model: The host's MODEL; its layers say the family.
        purpose: One of `catalogue.PURPOSES`.
        with_lora: Whether the LoRA of FaceID adapters will be used.

    Raises:
        IncompatibleModelError: The model is of no family that adapters were made for.
        MissingFileError: See `search`.
    """
    base = family(model)
    rows = tuple(row for row in catalogue.variants(base) if row.purpose == purpose)
    if not rows:
        raise _unpublished(purpose, base, installed.adapters())
    return search(Search(f"purpose '{purpose}'", rows), with_lora=with_lora)


def search(wanted: Search, *, with_lora: bool = True) -> Found:
    """Find the files of one of several published adapters.

    The first of them is taken whose image encoder and LoRA are there too. Files that are known by
    their content, or carry the published name, come first; then those whose name decides between
    adapters with equal tensors; then those of which nothing says which they are; and last those
    that are something else, but called as if they were meant.

    Args:
        wanted: What is looked for.
        with_lora: Whether the LoRA of FaceID adapters will be used.

    Raises:
        MissingFileError: No adapter, or not all that goes with it; says what was looked for and
            where, what is there, and what to download.
    """
    present = installed.adapters()
    candidates = sorted(_candidates(wanted, present), key=lambda one: one[0])
    if not candidates:
        raise _no_adapter(wanted, present)
    failures = []
    for (tier, number, _), adapter, row, variant in candidates:
        try:
            found = _complete(adapter, row, variant, wanted.names, with_lora)
        except MissingFileError as error:
            failures.append(error)
            continue
        if tier == _MISNAMED:
            log.warning(
                "IP-Adapter: '%s' is called like %s, but holds %s",
                *(found.adapter_name, wanted.rows[number].variant, found.spec.describe()),
            )
        return found
    raise failures[0]  # the best adapter's is what the user should mend


_MISNAMED = 3

_Candidate = tuple[tuple[int, int, bool], InstalledAdapter, Published, str]
"""How good it is, the file, which adapter it is taken for, and what to load it as."""


def _candidates(wanted: Search, present: list[InstalledAdapter]) -> Iterator[_Candidate]:
    for one in present:
        spec = one.spec
        for number, row in enumerate(wanted.rows):
            if spec.family != row.family:
                continue
            is_named = wanted.names.adapter(row, one.name)
            if spec.variant == row.variant and spec.evidence not in _VAGUE:
                yield (0, number, not is_named), one, row, AUTOMATIC
            elif (
                is_named
                and spec.evidence in GUESSED
                and row.variant in (spec.variant, *spec.alternatives)
            ):
                told = replace(
                    spec, variant=row.variant, encoder=row.encoder, evidence="name", alternatives=()
                )
                yield (1, number, False), replace(one, spec=told), row, row.variant
            elif spec.variant == row.variant:
                yield (2, number, False), one, row, AUTOMATIC
            elif is_named:
                actual = catalogue.lookup(spec.family, spec.variant)
                yield (_MISNAMED, number, False), one, actual or row, AUTOMATIC


def has_lora(purpose: str) -> bool:
    """Whether a published adapter of this purpose has a LoRA."""
    return any(row.lora for row in catalogue.PUBLISHED if row.purpose == purpose)


def family(model: Any) -> Family:
    """The family of a MODEL, by its layers.

    Raises:
        IncompatibleModelError: It is of none that adapters were made for.
    """
    layers = unet.cross_attention_layers(model)
    found = unet.family_of(model, layers)
    if found is None:
        context = max((layer.context_width for layer in layers), default=0)
        raise IncompatibleModelError(
            f"The model is of {family_name(context, len(layers))}; adapters were published for "
            f"{', '.join(_published_families())}. Load a checkpoint of one of these."
        )
    return found


def _complete(
    adapter: InstalledAdapter, row: Published, variant: str, names: Names, with_lora: bool
) -> Found:
    encoder = _encoder(adapter, names)
    has_lora = with_lora and row.lora is not None
    return Found(
        adapter.name,
        encoder.name if encoder is not None else None,
        adapter.spec,
        _lora(adapter, row, names) if has_lora else None,
        variant,
    )


def _encoder(adapter: InstalledAdapter, names: Names) -> InstalledEncoder | None:
    spec = adapter.spec
    kind = spec.projection.image
    if kind is None:
        return None
    present = installed.encoders()
    fitting = [one for one in present if _fits(one.encoder, spec)]
    exact = [one for one in fitting if one.encoder == spec.encoder]
    called = [
        one
        for one in present
        if names.encoder(one.name) and one.encoder.feature_width(kind) == spec.projection.features
    ]
    for choice in (exact, fitting, called):
        if choice:
            return next((one for one in choice if names.encoder(one.name)), choice[0])
    raise _no_encoder(adapter)


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


def _lora(adapter: InstalledAdapter, row: Published, names: Names) -> str:
    """Where an adapter's LoRA is: inside, else known by digest, by name, or the only one there."""
    companion = row.lora
    if adapter.spec.lora_rank is not None or companion is None:
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
    called = [one.name for one in installed.loras() if names.lora(one.name)]
    if called:
        return next((name for name in unknown if name in called), called[0])
    raise _no_lora(adapter, companion, row.link, unknown)


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


def _no_adapter(wanted: Search, present: list[InstalledAdapter]) -> MissingFileError:
    rows = wanted.rows
    family, purpose = rows[0].family, rows[0].purpose
    contents = {one.name: _brief(one) for one in present} | installed.no_adapters()
    return _missing(
        f"No IP-Adapter for the {wanted.label} and {family.name} is installed. Looked for, "
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
        _or_fetch(downloads.find(rows[0].file).name),
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
        _or_fetch(downloads.tower(adapter.spec.encoder)),
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
    if encoder is None or not encoder.link:
        return f"Put the encoder that it was trained with into {place}."
    return (
        f"Download its model file from {encoder.link} into {place}; any name will do, "
        f"{encoder.file} is usual."
    )


def _or_fetch(name: str | None) -> str:
    return f"Or queue Download IP-Adapter Model with {name}." if name else ""


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
