"""Which files the presets of the old unified loaders mean: published adapters, and old file names.

The old pack looked for names only; ours looks at the content first. Names of files are compared as
the old pack did: case counts for nothing, any one character may stand between the parts of a name,
and sub-folders may come before it. Nothing here knows the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

ENDINGS = ("safetensors", "bin")


@dataclass(frozen=True)
class Preset:
    """What a preset means for one family.

    Attributes:
        adapters: Variants of the catalogue, the preferred one first, each with the ends of file
            names that meant it, ``?`` for any one character.
        encoder: Parts of the name of the image encoder's file, ``*`` for any characters.
        endings: Of the adapter's file.
        lora: The end of the companion LoRA's name, or an empty text.
        has_face: Whether a face model is loaded, too.
    """

    adapters: Mapping[str, tuple[str, ...]]
    encoder: tuple[str, ...]
    endings: tuple[str, ...] = ENDINGS
    lora: str = ""
    has_face: bool = False

    def is_adapter(self, variant: str, name: str) -> bool:
        """Whether the old pack took a file for this variant."""
        ends = self.adapters.get(variant, ())
        return _fits(name, (f"*{end}.{ending}" for end in ends for ending in self.endings))

    def is_encoder(self, name: str) -> bool:
        """Whether the old pack took a file for the image encoder; more may follow the ending."""
        return _fits(name, (f"*{part}.{ending}*" for part in self.encoder for ending in ENDINGS))

    def is_lora(self, name: str) -> bool:
        """Whether the old pack took a file for the companion LoRA."""
        return bool(self.lora) and _fits(name, (f"*{self.lora}.safetensors",))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


VIT_H = ("vit?h?14*s32b?b79k", "ipadapter*sd15", "sd15*model", "sd1?5*model")
VIT_BIGG = ("vit?bigg?14*39b?b160k", "ipadapter*sdxl", "sdxl*model")
VIT_L_336 = ("clip?vit?large?patch14?336",)

_KOLORS_PLUS = Preset({"plus": ("ip_adapter_plus_general", "kolors?ip?adapter?plus")}, VIT_L_336)


def _face(adapters: Mapping[str, tuple[str, ...]], lora: str = "") -> Preset:
    return Preset(adapters, VIT_H, lora=lora, has_face=True)


PRESETS: Mapping[str, Mapping[str, Preset]] = {
    "LIGHT - SD1.5 only (low strength)": {
        "SD 1.5": Preset({"light-v11": ("sd15?light?v11",), "light": ("sd15?light",)}, VIT_H),
    },
    "STANDARD (medium strength)": {
        "SD 1.5": Preset({"base": ("ip?adapter?sd15",)}, VIT_H),
        "SDXL": Preset({"base-vit-h": ("ip?adapter?sdxl?vit?h",)}, VIT_H),
    },
    "VIT-G (medium strength)": {
        "SD 1.5": Preset({"base-vit-g": ("sd15?vit?g",)}, VIT_BIGG),
        "SDXL": Preset({"base": ("ip?adapter?sdxl",)}, VIT_BIGG),
    },
    "PLUS (high strength)": {
        "SD 1.5": Preset({"plus": ("ip?adapter?plus?sd15",)}, VIT_H),
        "SDXL": Preset({"plus": ("plus?sdxl?vit?h",)}, VIT_H),
        "Kolors": _KOLORS_PLUS,
    },
    "PLUS FACE (portraits)": {
        "SD 1.5": Preset({"plus-face": ("plus?face?sd15",)}, VIT_H),
        "SDXL": Preset({"plus-face": ("plus?face?sdxl?vit?h",)}, VIT_H),
    },
    "FULL FACE - SD1.5 only (portraits stronger)": {
        "SD 1.5": Preset({"full-face": ("full?face?sd15",)}, VIT_H),
    },
    "FACEID": {
        "SD 1.5": _face({"faceid": ("faceid?sd15",)}, "faceid?sd15?lora"),
        "SDXL": _face({"faceid": ("faceid?sdxl",)}, "faceid?sdxl?lora"),
    },
    "FACEID PLUS - SD1.5 only": {
        "SD 1.5": _face({"faceid-plus": ("faceid?plus?sd15",)}, "faceid?plus?sd15?lora"),
    },
    "FACEID PLUS V2": {
        "SD 1.5": _face({"faceid-plusv2": ("faceid?plusv2?sd15",)}, "faceid?plusv2?sd15?lora"),
        "SDXL": _face({"faceid-plusv2": ("faceid?plusv2?sdxl",)}, "faceid?plusv2?sdxl?lora"),
    },
    "FACEID PORTRAIT (style transfer)": {
        "SD 1.5": _face({"portrait-v11": ("portrait?v11?sd15",), "portrait": ("portrait?sd15",)}),
        "SDXL": _face({"portrait": ("portrait?sdxl",)}),
    },
    "FACEID PORTRAIT UNNORM - SDXL only (strong)": {
        "SDXL": _face({"portrait-unnorm": ("portrait?sdxl?unnorm",)}),
    },
    "Composition": {
        "SD 1.5": Preset({"composition": ("plus?composition?sd15",)}, VIT_H, ENDINGS[:1]),
        "SDXL": Preset({"composition": ("plus?composition?sdxl",)}, VIT_H, ENDINGS[:1]),
    },
    "Kolors": {"Kolors": _KOLORS_PLUS},
}
"""Option of an old loader -> name of a family -> what is meant; a family that is not there has no
such adapter. The old pack knew Kolors as SDXL; an adapter of SDXL does not fit it."""

GENERAL = tuple(PRESETS)[:6]
FACES = tuple(PRESETS)[6:11]
COMMUNITY = tuple(PRESETS)[11:]
