"""The automatic choice: files of every kind under wrong names, found by content."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.host.disk import TOWERS, Disk, fake_model, make
from tests.synthetic import adapters, near_misses
from tests.synthetic.catalogue import ROWS

pytestmark = pytest.mark.host


@pytest.fixture
def disk(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    return make(host, monkeypatch, tmp_path)


# Finding


def test_every_file_is_found_under_a_wrong_name(disk: Disk) -> None:
    rows = {
        ("SD 1.5", "general"): ("sd15", "ViT-H"),
        ("SD 1.5", "strong"): ("plus_sd15", "ViT-H"),
        ("SD 1.5", "full face"): ("full-face_sd15", "ViT-H"),
        ("SD 1.5", "face identity"): ("faceid_sd15", None),
        ("SD 1.5", "face portrait"): ("portrait_sd15", None),
        ("SD 1.5", "instruct"): ("instruct_sd15", "ViT-H"),
        ("SDXL", "general"): ("sdxl_vit-h", "ViT-H"),
        ("SDXL", "strong"): ("plus_sdxl_vit-h", "ViT-H"),
        ("SDXL", "face identity"): ("faceid-plusv2_sdxl", "ViT-H"),
        ("SDXL", "face portrait"): ("portrait_sdxl", None),
        ("SDXL", "instruct"): ("instruct_sdxl", "ViT-H"),
        ("Kolors", "strong"): ("kolors_plus", "ViT-L-336"),
        ("Kolors", "face identity"): ("kolors_faceid-plus", "ViT-L-336"),
    }
    towers = {tower: f"model ({i}).safetensors" for i, tower in enumerate(TOWERS)}
    for tower, name in towers.items():
        disk.encoder(tower, name)
    files = {}
    for number, (row, _) in enumerate(rows.values()):
        # Wrong endings, too: a container is told by its first bytes.
        files[row] = f"model ({number}).{'bin' if number % 2 else 'safetensors'}"
        disk.adapter(row, files[row])
    for (family, purpose), (row, tower) in rows.items():
        found = disk.find(family, purpose)
        assert (found.adapter_name, found.encoder_name) == (files[row], towers.get(tower or "")), (
            family,
            purpose,
        )
        assert found.spec.family.name == family
        assert found.lora == ("inside" if ROWS[row].has_lora else None)


def test_sub_folders_count(disk: Disk) -> None:
    (disk.root / "ipadapter" / "old").mkdir()
    (disk.root / "clip_vision" / "h").mkdir()
    disk.adapter("plus_sd15", "old/x.safetensors")
    disk.encoder("ViT-H", "h/model.safetensors")
    found = disk.find("SD 1.5", "strong")
    assert found.adapter_name == os.path.join("old", "x.safetensors")
    assert found.encoder_name == os.path.join("h", "model.safetensors")


def test_preference_follows_the_encoders_that_are_there(disk: Disk) -> None:
    disk.adapter("sdxl", "a.safetensors")
    disk.adapter("sdxl_vit-h", "b.safetensors")
    disk.encoder("bigG", "1.safetensors")
    found = disk.find("SDXL", "general")
    assert (found.adapter_name, found.encoder_name) == ("a.safetensors", "1.safetensors")
    disk.encoder("ViT-H", "2.safetensors")
    found = disk.find("SDXL", "general")
    assert (found.adapter_name, found.encoder_name) == ("b.safetensors", "2.safetensors")


def test_a_known_file_precedes_a_guessed_one(disk: Disk) -> None:
    disk.encoder("ViT-H", "encoder.safetensors")
    disk.adapter("sd15", "a.safetensors")
    assert disk.find("SD 1.5", "general").spec.evidence == "assumption"
    disk.adapter("sd15", "b.safetensors", variant="base")
    found = disk.find("SD 1.5", "general")
    assert (found.adapter_name, found.spec.evidence) == ("b.safetensors", "metadata")


def test_purposes_with_equal_tensors_are_told_by_digest_or_name(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.encoder("ViT-H", "encoder.safetensors")
    disk.adapter("plus-face_sd15", "a.safetensors")
    disk.adapter("composition_sd15", "my composition.safetensors")
    published = "1c9edc21af6f737dc1d6e0e734190e976cfacf802d6b024b77aa3be922f7569b"  # plus-face
    monkeypatch.setattr(
        disk.installed.digests, "sha256", lambda p: published if p.name[0] == "a" else ""
    )
    assert disk.find("SD 1.5", "face").adapter_name == "a.safetensors"
    assert disk.find("SD 1.5", "composition").adapter_name == "my composition.safetensors"
    assert "No IP-Adapter for the purpose 'strong'" in disk.failure("SD 1.5", "strong")


def test_an_encoder_of_another_size_or_depth_is_not_taken(disk: Disk) -> None:
    disk.adapter("kolors_plus", "kolors.bin")
    disk.encoder("ViT-L", "vit-l 336.safetensors")
    message = disk.failure("Kolors", "strong")
    assert "needs the image encoder CLIP ViT-L/14-336" in message
    assert "- vit-l 336.safetensors: CLIP ViT-L/14\n" in message


# Damage


def test_damaged_and_foreign_files_do_not_hide_the_good_ones(disk: Disk) -> None:
    folder = disk.root / "ipadapter"
    good = disk.adapter("plus_sd15", "z.safetensors")
    disk.encoder("ViT-H", "z.safetensors")
    (disk.root / "clip_vision" / "a.safetensors").write_bytes(b"")
    (disk.root / "clip_vision" / "b.bin").write_bytes(b"\x80\x02\x8a\x0a not a pickle")
    (folder / "a.safetensors").write_bytes(good.read_bytes()[:5000])
    (folder / "b.bin").write_bytes(b"\x80\x02\x8a\x0a not a pickle")
    (folder / "c.bin").write_bytes(b"PK\x03\x04 not an archive")
    (folder / "d.safetensors").write_bytes(b"<!DOCTYPE html>")
    (folder / "e.safetensors").write_bytes(b"\xff" * 100)
    (folder / "f.safetensors").symlink_to(folder / "gone.safetensors")
    for name in ("missing_projection_tensor", "missing_value", "flux_xlabs_v2", "lora_kohya"):
        adapters.write_sparse(near_misses.NEAR_MISSES[name](), folder / f"{name}.safetensors")
    found = disk.find("SD 1.5", "strong")
    assert (found.adapter_name, found.encoder_name) == ("z.safetensors", "z.safetensors")
    message = disk.failure("SD 1.5", "general")
    assert "- z.safetensors: plus for SD 1.5, by a guess\n" in message
    assert "- a.safetensors: is a damaged safetensors file" in message
    assert "- b.bin: is a" in message
    assert "- c.bin: is a truncated torch file" in message
    assert "- d.safetensors: is not a weights file: it is a web page\n" in message
    assert "- missing_value.safetensors: lacks 1 of" in message
    assert "- missing_projection_tensor.safetensors: lacks 1 of" in message
    assert "- flux_xlabs_v2.safetensors: is an IP-Adapter for FLUX.1 (XLabs)" in message
    assert (
        "- lora_kohya.safetensors: is not an IP-Adapter: it is a LoRA; it belongs into models/loras"
        in message
    )


# Messages


def test_a_missing_adapter_is_described_with_its_neighbours(disk: Disk) -> None:
    disk.adapter("plus_sd15", "a.safetensors", variant="plus")
    disk.adapter("plus_sdxl_vit-h", "b.safetensors", variant="plus-face")
    disk.adapter("plus_sdxl_vit-h", "c.safetensors", variant="composition")
    message = disk.failure("SDXL", "strong")
    ipadapter, clip_vision = disk.root / "ipadapter", disk.root / "clip_vision"
    assert message.splitlines() == [
        "No IP-Adapter for the purpose 'strong' and SDXL is installed. Looked for, by content "
        "under any name: plus.",
        f"In {ipadapter}:",
        "- a.safetensors: plus for SD 1.5",
        "- b.safetensors: plus-face for SDXL",
        "- c.safetensors: composition for SDXL",
        "For the same purpose, but another base model:",
        "- a.safetensors: SD 1.5",
        "For SDXL, but another purpose:",
        "- b.safetensors: face",
        "- c.safetensors: composition",
        "Download ip-adapter-plus_sdxl_vit-h.safetensors from "
        f"https://huggingface.co/h94/IP-Adapter/tree/main/sdxl_models into {ipadapter}. Its image "
        "encoder OpenCLIP ViT-H/14 is missing, too. Download its model file from "
        "https://huggingface.co/h94/IP-Adapter/tree/main/models/image_encoder into "
        f"{clip_vision}; any name will do, CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors is usual.",
        "Or queue Download IP-Adapter Model with sdxl/plus.",
    ]


def test_empty_folders_are_said_and_only_the_adapter_is_asked_for(disk: Disk) -> None:
    disk.encoder("ViT-H", "encoder.safetensors")
    message = disk.failure("SD 1.5", "general")
    assert f"In {disk.root / 'ipadapter'}: no files.\n" in message
    assert "ip-adapter_sd15.safetensors from https://huggingface.co/h94/IP-Adapter/" in message
    assert "image encoder" not in message


def test_a_guess_that_could_be_it_is_offered(disk: Disk) -> None:
    disk.adapter("plus-face_sd15", "mine.safetensors")
    message = disk.failure("SD 1.5", "face")
    assert "choose the variant in Load IP-Adapter:\n- mine.safetensors: taken for plus" in message
    assert "could be plus-face or composition" in message


def test_research_licences_are_named(disk: Disk) -> None:
    message = disk.failure("SDXL", "face identity")
    assert "Looked for, by content under any name: faceid-plusv2 or faceid or instantid" in message
    assert "(licence: non-commercial research only" in message


def test_a_missing_encoder_is_described(disk: Disk) -> None:
    disk.adapter("plus_sd15", "a.safetensors", variant="plus")
    disk.encoder("bigG", "CLIP-ViT-H-14.safetensors")  # misnamed, as users have it
    (disk.root / "clip_vision" / "dino.safetensors").write_bytes(b"<html>")
    message = disk.failure("SD 1.5", "strong")
    assert message.splitlines() == [
        "'a.safetensors' (plus for SD 1.5) needs the image encoder OpenCLIP ViT-H/14, which is not "
        "installed under any name.",
        f"In {disk.root / 'clip_vision'}:",
        "- CLIP-ViT-H-14.safetensors: OpenCLIP ViT-bigG/14",
        "- dino.safetensors: is not a weights file: it is a web page",
        "Download its model file from "
        "https://huggingface.co/h94/IP-Adapter/tree/main/models/image_encoder into "
        f"{disk.root / 'clip_vision'}; any name will do, "
        "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors is usual.",
        "Or queue Download IP-Adapter Model with encoder/vit-h.",
    ]


def test_unpublished_purposes_and_families_are_said(disk: Disk) -> None:
    disk.adapter("sd2", "own.safetensors")
    message = disk.failure("SDXL", "light")
    assert message.startswith("No adapter for the purpose 'light' was published for SDXL.\n")
    assert "For SDXL there are: general, anime, strong, face, composition, face identity" in message
    message = disk.failure("SD 2.x", "general")
    assert "- own.safetensors: global for SD 2.x" in message
    assert "Nothing was published for SD 2.x at all" in message
    assert "SD 1.5, SDXL, Kolors, or load an adapter of your own with Load IP-Adapter" in message


def test_other_models_are_refused(disk: Disk) -> None:
    error = disk.host.library("ip_adapter.errors").IncompatibleModelError
    flux = SimpleNamespace(get_model_object=lambda name: torch.nn.Identity())
    with pytest.raises(error, match="is a Identity, not a UNet"):
        disk.automatic.find(flux, "general")
    with pytest.raises(error, match=r"34 cross-attention layers.*published for SD 1\.5, SDXL, Kol"):
        disk.automatic.find(fake_model(34, 2048), "general")


def test_long_folders_are_cut(disk: Disk) -> None:
    for number in range(30):
        (disk.root / "ipadapter" / f"{number:02}.bin").write_bytes(b"<html>")
    lines = disk.failure("SD 1.5", "general").splitlines()
    assert lines[2].startswith("- 00.bin") and lines[21].startswith("- 19.bin")
    assert lines[22] == "- and 10 more"


# LoRA

SHA = "8abff87a15a049f3e0186c2e82c1c8e77783baf2cfb63f34c412656052eb57b0"  # plusv2's, SD 1.5
SHA_V1 = "3f00341d11e5e7b5aadf63cbdead09ef82eb28669156161cf1bfc2105d4ff1cd"


@pytest.fixture
def plusv2(disk: Disk) -> Disk:
    """FaceID-PlusV2 for SD 1.5 without LoRA, its encoder, and LoRAs that are not its own."""
    disk.converted("faceid-plusv2_sd15", "ip-adapter-faceid-plusv2_sd15.safetensors")
    disk.encoder("ViT-H", "encoder.safetensors")
    adapters.write_sparse(near_misses.lora_kohya(), disk.root / "loras" / "style.safetensors")
    (disk.root / "loras" / "broken.safetensors").write_bytes(b"\xff" * 51_059_544)
    disk.lora("faceid-plusv2_sdxl", "xl.safetensors")
    return disk


def test_a_missing_lora_is_described(plusv2: Disk) -> None:
    message = plusv2.failure("SD 1.5", "face identity")
    assert (
        "'ip-adapter-faceid-plusv2_sd15.safetensors' (faceid-plusv2 for SD 1.5, by a guess) was "
        "trained together with a LoRA, which is neither inside the file, nor one of the 3 files in "
        f"{plusv2.root / 'loras'}." in message
    )
    assert (
        "Download ip-adapter-faceid-plusv2_sd15_lora.safetensors from "
        "https://huggingface.co/h94/IP-Adapter-FaceID/tree/main into " in message
    )
    assert "set lora_strength to 0" in message
    assert plusv2.find("SD 1.5", "face identity", with_lora=False).lora is None


def test_the_companion_is_known_by_its_digest(
    plusv2: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a name that says otherwise."""
    digests = {"right.safetensors": SHA, "other.safetensors": SHA_V1}
    read: list[str] = []

    def sha256(path: Path) -> str:
        read.append(path.name)
        return digests.get(path.name, "")

    monkeypatch.setattr(plusv2.installed.digests, "sha256", sha256)
    plusv2.lora("faceid-plus_sd15", "ip-adapter-faceid-plusv2_sd15_lora.safetensors")
    plusv2.lora("faceid-plus_sd15", "other.safetensors")
    assert plusv2.lora("faceid-plus_sd15", "right.safetensors").stat().st_size == 51_059_544
    assert plusv2.find("SD 1.5", "face identity").lora == "right.safetensors"
    # Only files of the right size with the right modules are read whole.
    assert not {"style.safetensors", "broken.safetensors", "xl.safetensors"} & set(read)


def test_the_companion_is_known_by_its_name(plusv2: Disk) -> None:
    name = "IP-Adapter FaceID-PlusV2 sd15 lora (1).safetensors"
    plusv2.lora("faceid-plusv2_sd15", "a.safetensors")
    plusv2.lora("faceid-plusv2_sd15", name)
    assert plusv2.find("SD 1.5", "face identity").lora == name


def test_a_file_of_that_name_and_other_content_is_passed_over(plusv2: Disk) -> None:
    path = plusv2.root / "loras" / "ip-adapter-faceid-plusv2_sd15_lora.safetensors"
    adapters.write_sparse(near_misses.lora_kohya(), path)
    assert "neither inside" in plusv2.failure("SD 1.5", "face identity")


def test_the_only_one_that_fits_is_taken_and_of_several_none(plusv2: Disk) -> None:
    plusv2.lora("faceid_sd15", "ip-adapter-faceid_sd15_lora.safetensors")  # another adapter's
    plusv2.lora("faceid-plusv2_sd15", "a.safetensors")
    assert plusv2.find("SD 1.5", "face identity").lora == "a.safetensors"
    plusv2.lora("faceid-plusv2_sd15", "b.safetensors")
    message = plusv2.failure("SD 1.5", "face identity")
    assert "give the right one that name:\n- a.safetensors: the same modules" in message
    assert "- b.safetensors" in message


def test_the_sdxl_companion_has_the_published_size(disk: Disk) -> None:
    disk.converted("faceid_sdxl", "a.safetensors")
    assert disk.lora("faceid_sdxl", "b.safetensors").stat().st_size == 371_842_896
    assert disk.find("SDXL", "face identity").lora == "b.safetensors"


def test_an_adapter_that_lacks_nothing_precedes_one_that_does(plusv2: Disk) -> None:
    plusv2.adapter("faceid_sd15", "complete.bin")
    found = plusv2.find("SD 1.5", "face identity")
    assert (found.adapter_name, found.lora, found.encoder_name) == ("complete.bin", "inside", None)
