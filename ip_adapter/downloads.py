"""What can be downloaded: every published adapter and the encoders they read, in words and by name.

Nothing here opens a connection; `obtain` does, when a person asks for a file by its name.

Source: `catalogue` for adapters; sizes as the hub shows them; the digests and sizes of the encoders
as several independent projects pin them (SwarmUI among them).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import hub
from .catalogue import APACHE, NON_COMMERCIAL, PUBLISHED, UNKNOWN, Published, recogniser
from .encoders import VIT_BIGG, VIT_H, VIT_L_336, Encoder
from .errors import DownloadError
from .hub import Remote
from .layers import Family
from .spec import GUESSED, AdapterSpec

ADAPTERS = "ipadapter"
ENCODERS = "clip_vision"

ALL = "all"
"""The filter that lets everything through."""

FACE_PACKS = "https://github.com/deepinsight/insightface/releases"
UNPACK = (
    f"Face models are not on the hub: unpack them from {FACE_PACKS} into models/insightface/models."
)

_SIZES = {
    "ip-adapter_sd15.safetensors": 44_642_768,
    "ip-adapter_sd15_light.safetensors": 44_642_768,
    "ip-adapter_sd15_light_v11.bin": 44_642_977,
    "ip-adapter_sd15_vit-G.safetensors": 46_215_640,
    "ip-adapter-plus_sd15.safetensors": 98_183_288,
    "ip-adapter-plus-face_sd15.safetensors": 98_183_288,
    "ip-adapter-full-face_sd15.safetensors": 43_592_352,
    "ip_plus_composition_sd15.safetensors": 98_183_728,
    "ip-adapter-faceid_sd15.bin": 96_700_000,
    "ip-adapter-faceid-plus_sd15.bin": 156_558_503,
    "ip-adapter-faceid-plusv2_sd15.bin": 156_558_509,
    "ip-adapter-faceid-portrait_sd15.bin": 64_586_623,
    "ip-adapter-faceid-portrait-v11_sd15.bin": 64_600_000,
    "ip-adapter-instruct-sd15.bin": 352_000_000,
    "ip-adapter_sdxl.safetensors": 702_585_376,
    "ip-adapter_sdxl_vit-h.safetensors": 698_391_064,
    "ip-adapter-plus_sdxl_vit-h.safetensors": 847_517_512,
    "ip-adapter-plus-face_sdxl_vit-h.safetensors": 847_517_512,
    "ip_plus_composition_sdxl.safetensors": 848_000_000,
    "noobIPAMARK1_mark1.safetensors": 1_410_000_000,
    "ip-adapter-faceid_sdxl.bin": 1_071_149_741,
    "ip-adapter-faceid-plusv2_sdxl.bin": 1_487_555_181,
    "ip-adapter-faceid-portrait_sdxl.bin": 749_800_000,
    "ip-adapter-faceid-portrait_sdxl_unnorm.bin": 1_009_523_411,
    "ip-adapter.bin": 1_691_134_141,
    "ip-adapter-instruct-sdxl.bin": 2_120_000_000,
    "ip_adapter_plus_general.bin": 1_013_163_359,
    "ipa-faceid-plus.bin": 2_390_000_000,
}
"""Bytes, for the list only; the rounded ones are known no better."""


@dataclass(frozen=True)
class Download:
    """A file that can be fetched by name.

    Attributes:
        name: What a person asks for: ``sd15/plus-face``, ``encoder/vit-h``.
        file: The name it is saved under.
        folder: `ADAPTERS` or `ENCODERS`.
        remote: Where it is.
        page: Where its publisher describes it.
        licence: Under which terms.
        size: In bytes, roughly, None where it is not known.
        family: The base models it is for; None for encoders.
        purpose: What one would use it for; empty for encoders.
        encoder: The name of the encoder it reads; empty without one.
        more: What else it needs, which is not fetched; empty where nothing.
    """

    name: str
    file: str
    folder: str
    remote: Remote
    page: str
    licence: str
    size: int | None = None
    family: Family | None = None
    purpose: str = ""
    encoder: str = ""
    more: str = ""

    @property
    def is_restricted(self) -> bool:
        """Whether its licence must be accepted first."""
        return self.licence == NON_COMMERCIAL

    @property
    def needs(self) -> str:
        """What it needs beside a checkpoint, in words; empty where nothing."""
        return " and ".join(part for part in (self.encoder, self.more) if part)


@dataclass(frozen=True)
class Present:
    """A file that holds something of the list.

    Attributes:
        file: Its name in the folder.
        is_certain: Whether its content says so; else it may be another one with equal tensors.
    """

    file: str
    is_certain: bool = True


Installed = Mapping[str, Present]
"""What is installed: the name of a `Download` -> a file, whatever it is called."""


def _hub_address(link: str) -> tuple[str, str]:
    """Repository and folder of a link to a page of the hub."""
    match = re.fullmatch(re.escape(hub.HUB) + r"([^/]+/[^/]+)/tree/main(?:/(.+))?", link)
    if match is None:
        raise ValueError(f"{link} is no folder of the hub")
    return match[1], f"{match[2]}/" if match[2] else ""


def _encoder(
    encoder: Encoder,
    name: str,
    file: str,
    licence: str,
    size: int | None = None,
    sha256: tuple[str, ...] = (),
) -> Download:
    repository, folder = _hub_address(encoder.link)
    return Download(
        name=f"encoder/{name}",
        file=encoder.file,
        folder=ENCODERS,
        remote=Remote(repository, folder + file, sha256),
        page=encoder.link,
        licence=licence,
        size=size,
    )


_TOWERS: dict[Encoder, Download] = {
    VIT_H: _encoder(
        VIT_H,
        "vit-h",
        "model.safetensors",
        APACHE,
        2_528_373_448,
        ("6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",),
    ),
    VIT_BIGG: _encoder(
        VIT_BIGG,
        "vit-bigg",
        "model.safetensors",
        APACHE,
        3_689_912_664,
        ("657723e09f46a7c3957df651601029f66b1748afb12b419816330f16ed45d64d",),
    ),
    VIT_L_336: _encoder(VIT_L_336, "vit-l-336", "pytorch_model.bin", UNKNOWN),
}


def _adapter(row: Published) -> Download:
    repository, folder = _hub_address(row.link)
    is_face = row.licence == NON_COMMERCIAL
    return Download(
        name=f"{_slug(row.family)}/{row.variant}",
        file=row.file,
        folder=ADAPTERS,
        remote=Remote(repository, folder + row.file, row.sha256),
        page=row.link,
        licence=row.licence,
        size=_SIZES.get(row.file),
        family=row.family,
        purpose=row.purpose,
        encoder=_TOWERS[row.encoder].name if row.encoder else "",
        more=f"the face models {recogniser(row.family, row.variant)}" if is_face else "",
    )


def _slug(family: Family) -> str:
    return _plain(family.name)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


DOWNLOADS: tuple[Download, ...] = (*(_adapter(row) for row in PUBLISHED), *_TOWERS.values())
"""Everything, adapters in the catalogue's order."""

NAMES: tuple[str, ...] = tuple(one.name for one in DOWNLOADS)

FAMILIES: tuple[Family, ...] = tuple(dict.fromkeys(row.family for row in PUBLISHED))
"""Those that something was published for."""


def find(name: str) -> Download:
    """The download of a name, or of a file's name, in any spelling.

    Raises:
        DownloadError: There is none; lists those that are spelled alike.
    """
    wanted = _plain(name)
    for one in DOWNLOADS:
        if wanted in (_plain(one.name), _plain(one.file), _plain(Path(one.file).stem)):
            return one
    near = difflib.get_close_matches(name.lower(), NAMES, n=4, cutoff=0.4) or NAMES[:4]
    raise DownloadError(
        f"There is no model called '{name}' here. Names are like {', '.join(near)}; "
        "List IP-Adapter Models, or `python -m ip_adapter models`, shows all of them."
    )


def select(family: str = ALL, purpose: str = ALL) -> tuple[Download, ...]:
    """The adapters of a family and a purpose, with the encoders they read.

    Args:
        family: A family's name in any spelling (``SD 1.5``, ``sd15``), or `ALL`.
        purpose: One of `catalogue.PURPOSES`, or `ALL`.
    """
    adapters = [
        one
        for one in DOWNLOADS
        if one.family is not None
        and (family == ALL or _plain(family) == _slug(one.family))
        and purpose in (ALL, one.purpose)
    ]
    read = {one.encoder for one in adapters}
    return (*adapters, *(one for one in _TOWERS.values() if one.name in read))


# What is installed


def held_by(spec: AdapterSpec) -> tuple[str, bool] | None:
    """The name of the adapter that a file holds, and whether that is certain."""
    for one in DOWNLOADS:
        if one.family == spec.family and one.name.partition("/")[2] == spec.variant:
            # A file that is called as it was published is believed.
            return one.name, spec.evidence not in GUESSED - {"name"}
    return None


def tower(encoder: Encoder | None) -> str | None:
    """The name of the download that holds a tower, if one does."""
    found = _TOWERS.get(encoder) if encoder else None
    return found.name if found else None


def collect(found: Iterable[tuple[str, Present]]) -> dict[str, Present]:
    """Put findings together; of several files of one adapter, a certain one counts."""
    out: dict[str, Present] = {}
    for name, present in found:
        if name not in out or present.is_certain > out[name].is_certain:
            out[name] = present
    return out


# In words


def listing(rows: Sequence[Download], installed: Installed) -> str:
    """The whole list in words: how much of it is installed, a line for each, remarks."""
    if not rows:
        return "Nothing was published for this purpose and family."
    count = sum(one.name in installed for one in rows)
    lines = [f"{count} of {len(rows)} installed.", *(describe(one, installed) for one in rows)]
    remarks = notes(rows)
    return "\n".join([*lines, *(["", remarks] if remarks else [])])


def describe(one: Download, installed: Installed | None) -> str:
    """A line on a download: what it is, its size, terms and needs, whether it is installed.

    Args:
        one: The download.
        installed: What is; None where that is not known.
    """
    title = f"{one.name} ({one.purpose})" if one.purpose else one.name
    text = f"{title}: {hub.words(one.size)}, {short_licence(one)}."
    if one.needs:
        text += f" Needs {one.needs}."
    return f"{text} {state(one, installed)}"


def state(one: Download, installed: Installed | None) -> str:
    """Whether it is installed, and as what; else where it is."""
    present = (installed or {}).get(one.name)
    if present is None:
        return one.page if installed is None else f"Not installed: {one.page}"
    if not present.is_certain:
        return f"Perhaps installed, as {present.file}: its content leaves a choice."
    return f"Installed as {present.file}."


def short_licence(one: Download) -> str:
    """Its terms in a word or two."""
    return "non-commercial" if one.is_restricted else one.licence


def notes(rows: Iterable[Download]) -> str:
    """What a list does not say in its lines; empty where all is said."""
    rows = list(rows)
    lines = []
    if any(one.is_restricted for one in rows):
        lines.append(
            f"non-commercial: {NON_COMMERCIAL}; you must accept that before a download. {UNPACK}"
        )
    if any(one.name == "sdxl/instantid" for one in rows):
        lines.append(
            "sdxl/instantid is the adapter half only: its ControlNet, IdentityNet, is a separate "
            "model."
        )
    if any(one.licence == UNKNOWN for one in rows):
        lines.append(f"{UNKNOWN}: the terms are not known here; read them there.")
    return "\n".join(lines)
