"""The old pack's rules for file names, one by one, against its own patterns written out here."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def files() -> Iterator[ModuleType]:
    """The module by itself: its package needs the host."""
    path = ROOT / "ip_adapter" / "legacy" / "files.py"
    spec = importlib.util.spec_from_file_location("legacy_files", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["legacy_files"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["legacy_files"]


SD, XL, KOLORS = "SD 1.5", "SDXL", "Kolors"
ADAPTERS = [
    # preset begins with, family, variant, the old pattern before the file's ending
    ("LIGHT", SD, "light-v11", "sd15.light.v11"),
    ("LIGHT", SD, "light", "sd15.light"),
    ("STANDARD", SD, "base", "ip.adapter.sd15"),
    ("STANDARD", XL, "base-vit-h", "ip.adapter.sdxl.vit.h"),
    ("VIT-G", SD, "base-vit-g", "sd15.vit.g"),
    ("VIT-G", XL, "base", "ip.adapter.sdxl"),
    ("PLUS (", SD, "plus", "ip.adapter.plus.sd15"),
    ("PLUS (", XL, "plus", "plus.sdxl.vit.h"),
    ("PLUS FACE", SD, "plus-face", "plus.face.sd15"),
    ("PLUS FACE", XL, "plus-face", "plus.face.sdxl.vit.h"),
    ("FULL FACE", SD, "full-face", "full.face.sd15"),
    ("FACEID", SD, "faceid", "faceid.sd15"),
    ("FACEID", XL, "faceid", "faceid.sdxl"),
    ("FACEID PLUS -", SD, "faceid-plus", "faceid.plus.sd15"),
    ("FACEID PLUS V2", SD, "faceid-plusv2", "faceid.plusv2.sd15"),
    ("FACEID PLUS V2", XL, "faceid-plusv2", "faceid.plusv2.sdxl"),
    ("FACEID PORTRAIT (", SD, "portrait-v11", "portrait.v11.sd15"),
    ("FACEID PORTRAIT (", SD, "portrait", "portrait.sd15"),
    ("FACEID PORTRAIT (", XL, "portrait", "portrait.sdxl"),
    ("FACEID PORTRAIT UNNORM", XL, "portrait-unnorm", "portrait.sdxl.unnorm"),
    ("Composition", SD, "composition", "plus.composition.sd15"),
    ("Composition", XL, "composition", "plus.composition.sdxl"),
    ("Kolors", KOLORS, "plus", "(ip_adapter_plus_general|kolors.ip.adapter.plus)"),
]
ENCODERS = {
    "STANDARD": r"(ViT.H.14.*s32B.b79K|ipadapter.*sd15|sd1.?5.*model)",
    "VIT-G": r"(ViT.bigG.14.*39B.b160k|ipadapter.*sdxl|sdxl.*model)",
    "Kolors": r"clip.vit.large.patch14.336",
}

STEMS = [
    *("ip-adapter_sd15", "ip-adapter_sd15_light", "ip-adapter_sd15_light_v11"),
    *("ip-adapter_sd15_vit-G", "ip-adapter-plus_sd15", "ip-adapter-plus-face_sd15"),
    *("ip-adapter-full-face_sd15", "ip-adapter_sdxl", "ip-adapter_sdxl_vit-h"),
    *("ip-adapter-plus_sdxl_vit-h", "ip-adapter-plus-face_sdxl_vit-h", "ip-adapter-faceid_sd15"),
    *("ip-adapter-faceid-plus_sd15", "ip-adapter-faceid-plusv2_sd15", "ip-adapter-faceid_sdxl"),
    *("ip-adapter-faceid-plusv2_sdxl", "ip-adapter-faceid-portrait_sd15"),
    *("ip-adapter-faceid-portrait-v11_sd15", "ip-adapter-faceid-portrait_sdxl"),
    *("ip-adapter-faceid-portrait_sdxl_unnorm", "ip_plus_composition_sd15"),
    *("ip_plus_composition_sdxl", "ip_adapter_plus_general", "Kolors-IP-Adapter-Plus"),
    *("IP Adapter SD15", "SD1.5/ip_adapter_sd15", "sub\\IP-ADAPTER-PLUS_SD15", "ip-adapter_sd15 2"),
    *("myfaceidXsd15", "ip-adapter-sd15-fp16", "ipadapter_sd15", "model", "portraits_sd15"),
]
NAMES = [
    f"{stem}.{ending}"
    for stem in STEMS
    for ending in ("safetensors", "bin", "BIN", "pth", "bin.part")
]
TOWERS = [
    *("CLIP-ViT-H-14-laion2B-s32B-b79K", "CLIP-ViT-bigG-14-laion2B-39B-b160k", "sd15_model"),
    *("SD1.5/pytorch_model", "sd1.5/model", "sd 15 model", "ipadapter_image_encoder_sd15"),
    *("IPAdapter_image_encoder_sdxl", "sdxl/model", "clip-vit-large-patch14-336", "model"),
    *("clip_vit_large_patch14", "sd1x5 model", "sd1xx5 model", "vit_h_14"),
]


def preset(files: ModuleType, begins: str, family: str) -> object:
    named = {name: rows for name, rows in files.PRESETS.items() if name.startswith(begins)}
    return (named.get(begins) or next(iter(named.values())))[family]


@pytest.mark.parametrize(("begins", "family", "variant", "pattern"), ADAPTERS)
def test_adapter_names_are_the_old_ones(
    files: ModuleType, begins: str, family: str, variant: str, pattern: str
) -> None:
    endings = "safetensors" if begins == "Composition" else "(safetensors|bin)"
    old = re.compile(rf"{pattern}\.{endings}$", re.IGNORECASE)
    found = preset(files, begins, family)
    taken = [name for name in NAMES if found.is_adapter(variant, name)]  # type: ignore[attr-defined]
    assert taken == [name for name in NAMES if old.search(name)]
    assert taken


@pytest.mark.parametrize("begins", ENCODERS)
def test_encoder_names_are_the_old_ones(files: ModuleType, begins: str) -> None:
    old = re.compile(rf"{ENCODERS[begins]}\.(bin|safetensors)", re.IGNORECASE)
    found = preset(files, begins, KOLORS if begins == "Kolors" else XL)
    names = [f"{t}.{e}" for t in TOWERS for e in ("safetensors", "bin", "bin.old", "pt")]
    taken = [name for name in names if found.is_encoder(name)]  # type: ignore[attr-defined]
    assert taken == [name for name in names if old.search(name)]
    assert taken


@pytest.mark.parametrize("row", [row for row in ADAPTERS if re.match(r"FACEID($| PLUS)", row[0])])
def test_lora_names_are_the_old_ones(files: ModuleType, row: tuple[str, str, str, str]) -> None:
    begins, family, _, pattern = row
    old = re.compile(rf"{pattern}.lora\.safetensors$", re.IGNORECASE)
    names = [f"{stem}_lora.{ending}" for stem in STEMS for ending in ("safetensors", "bin")]
    found = preset(files, begins, family)
    taken = [name for name in names if found.is_lora(name)]  # type: ignore[attr-defined]
    assert taken == [name for name in names if old.search(name)]
    assert taken


def test_no_other_preset_has_a_lora_or_a_family(files: ModuleType) -> None:
    pairs = {(name, family) for name, rows in files.PRESETS.items() for family in rows}
    listed = {
        (name, family)
        for begins, family, _, _ in ADAPTERS
        for name in files.PRESETS
        if name == begins or (begins != "FACEID" and name.startswith(begins))
    }
    # The old pack gave an SDXL adapter, which does not fit Kolors.
    assert pairs - listed == {("PLUS (high strength)", KOLORS)} and not listed - pairs
    with_lora = {name for name, rows in files.PRESETS.items() if any(p.lora for p in rows.values())}
    assert with_lora == {"FACEID", "FACEID PLUS - SD1.5 only", "FACEID PLUS V2"}
    faces = {name for name, rows in files.PRESETS.items() if any(p.has_face for p in rows.values())}
    assert faces == set(files.FACES)
