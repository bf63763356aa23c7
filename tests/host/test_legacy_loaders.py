"""The old loaders: presets find files by content first, and by the old names where it decides."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.host.disk import MODELS, Disk, make
from tests.synthetic import adapters
from tests.synthetic.catalogue import ROWS
from tests.synthetic.face_models import build_pack
from tests.synthetic.models import CLIP_VISION

pytestmark = pytest.mark.host

STANDARD, PLUS, PLUS_FACE = (
    "STANDARD (medium strength)",
    "PLUS (high strength)",
    "PLUS FACE (portraits)",
)
LIGHT, VIT_G = "LIGHT - SD1.5 only (low strength)", "VIT-G (medium strength)"
V1, V2 = "FACEID PLUS - SD1.5 only", "FACEID PLUS V2"
PORTRAIT = "FACEID PORTRAIT (style transfer)"
UNNORM = "FACEID PORTRAIT UNNORM - SDXL only (strong)"


@pytest.fixture
def disk(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    return make(host, monkeypatch, tmp_path)


@pytest.fixture
def loaders(host: Any) -> Any:
    return host.library("ip_adapter.legacy.loaders")


@pytest.fixture
def face_packs(disk: Disk) -> Path:
    """Where the packs of the test's own folders lie."""
    import folder_paths

    root = disk.root / "insightface"
    folder_paths.folder_names_and_paths["insightface"] = ([str(root)], {".onnx"})
    disk.host.library("ip_adapter.host.faces")._kept.clear()
    return root / "models"


def find(loaders: Any, family: str, preset: str, **options: Any) -> Any:
    """What a preset finds; nothing is loaded."""
    model = MODELS[family]
    base = loaders.automatic.family(model)
    meant = loaders.files.PRESETS[preset][base.name]
    return loaders.automatic.search(loaders._search(preset, base, meant), **options)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# Finding


def test_content_is_found_under_any_name(disk: Disk, loaders: Any) -> None:
    for tower in ("ViT-H", "bigG", "ViT-L-336"):
        disk.encoder(tower, f"{tower} of mine.safetensors")
    disk.adapter("sd15", "b.safetensors", variant="base")
    rows = {
        ("SD 1.5", STANDARD): ("sd15", "b.safetensors", "ViT-H"),
        ("SD 1.5", VIT_G): ("sd15_vit-G", "c.safetensors", "bigG"),
        ("SD 1.5", "FACEID"): ("faceid_sd15", "d.bin", None),
        ("SDXL", STANDARD): ("sdxl_vit-h", "e.safetensors", "ViT-H"),
        ("SDXL", V2): ("faceid-plusv2_sdxl", "f.bin", "ViT-H"),
        ("SDXL", PORTRAIT): ("portrait_sdxl", "g.bin", None),
        ("Kolors", "Kolors"): ("kolors_plus", "h.bin", "ViT-L-336"),
        ("Kolors", PLUS): ("kolors_plus", "h.bin", "ViT-L-336"),
    }
    for row, name, _ in rows.values():
        if not (disk.root / "ipadapter" / name).exists():
            disk.adapter(row, name)
    for (family, preset), (_, name, tower) in rows.items():
        found = find(loaders, family, preset)
        encoder = f"{tower} of mine.safetensors" if tower else None
        assert (found.adapter_name, found.encoder_name) == (name, encoder), (family, preset)


@pytest.mark.parametrize(
    ("preset", "name", "variant"),
    [
        (STANDARD, "ip-adapter_sd15.safetensors", "base"),
        (LIGHT, "ip-adapter_sd15_light.bin", "light"),
        (PLUS, "x/IP_Adapter_PLUS_SD15.safetensors", "plus"),
        (PLUS_FACE, "my plus_face sd15.bin", "plus-face"),
        ("Composition", "ip_plus_composition_sd15.safetensors", "composition"),
        (V1, "faceid plus sd15.bin", "faceid-plus"),
        (V2, "faceid plusv2 sd15.bin", "faceid-plusv2"),
        (PORTRAIT, "portrait sd15.bin", "portrait"),
    ],
)
def test_the_name_decides_where_tensors_are_equal(
    disk: Disk, loaders: Any, preset: str, name: str, variant: str
) -> None:
    disk.encoder("ViT-H", "h.safetensors")
    row = {LIGHT: "sd15", STANDARD: "sd15", V1: "faceid-plus_sd15", V2: "faceid-plus_sd15"}.get(
        preset, "portrait_sd15" if preset == PORTRAIT else "plus_sd15"
    )
    (disk.root / "ipadapter" / name).parent.mkdir(exist_ok=True)
    disk.adapter(row, "a.safetensors")  # of which nothing says which it is
    disk.adapter(row, name)
    found = find(loaders, "SD 1.5", preset, with_lora=False)
    assert found.adapter_name == os.path.normpath(name)
    assert found.spec.variant == variant
    assert found.variant in ("automatic", variant)


def test_the_newer_light_comes_first(disk: Disk, loaders: Any) -> None:
    disk.encoder("ViT-H", "h.safetensors")
    disk.adapter("sd15", "ip-adapter_sd15_light.bin")
    assert find(loaders, "SD 1.5", LIGHT).spec.variant == "light"
    disk.adapter("sd15", "ip-adapter_sd15_light_v11.bin")
    assert find(loaders, "SD 1.5", LIGHT).adapter_name == "ip-adapter_sd15_light_v11.bin"


def test_among_equal_files_the_old_name_comes_first(disk: Disk, loaders: Any) -> None:
    disk.encoder("ViT-H", "a tuned one.safetensors")
    disk.encoder("ViT-H", "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    disk.adapter("sdxl_vit-h", "a tuned one.safetensors")
    disk.adapter("sdxl_vit-h", "ip-adapter_sdxl_vit-h.safetensors")
    found = find(loaders, "SDXL", STANDARD)
    assert found.adapter_name == "ip-adapter_sdxl_vit-h.safetensors"
    assert found.encoder_name == "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"


def test_what_is_called_so_but_is_something_else_is_the_last_resort(
    disk: Disk, loaders: Any, caplog: pytest.LogCaptureFixture
) -> None:
    disk.encoder("ViT-H", "h.safetensors")
    disk.adapter("plus_sd15", "ip-adapter_sd15.safetensors")  # somebody renamed it
    found = find(loaders, "SD 1.5", STANDARD)
    assert (found.adapter_name, found.variant) == ("ip-adapter_sd15.safetensors", "automatic")
    (warning,) = warnings(caplog)
    assert "'ip-adapter_sd15.safetensors' is called like base, but holds" in warning
    disk.adapter("sd15", "z.safetensors")
    assert find(loaders, "SD 1.5", STANDARD).adapter_name == "z.safetensors"


def test_a_sure_content_beats_a_name(
    disk: Disk, loaders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.encoder("ViT-H", "h.safetensors")
    disk.adapter("plus_sd15", "ip-adapter-plus-face_sd15.safetensors")  # plus, under a wrong name
    disk.adapter("plus_sd15", "ip-adapter-plus_sd15.safetensors")  # plus-face, likewise
    published = {
        "ip-adapter-plus-face_sd15.safetensors": (
            "a1c250be40455cc61a43da1201ec3f1edaea71214865fb47f57927e06cbe4996"
        ),
        "ip-adapter-plus_sd15.safetensors": (
            "1c9edc21af6f737dc1d6e0e734190e976cfacf802d6b024b77aa3be922f7569b"
        ),
    }
    monkeypatch.setattr(disk.installed.digests, "sha256", lambda path: published[path.name])
    disk.installed._adapter.cache_clear()
    names = [find(loaders, "SD 1.5", preset).adapter_name for preset in (PLUS, PLUS_FACE)]
    assert names == list(published)


def test_a_lora_by_its_old_name(disk: Disk, loaders: Any) -> None:
    disk.adapter("faceid_sd15", "faceid_sd15.safetensors")
    assert find(loaders, "SD 1.5", "FACEID").lora == "inside"
    (disk.root / "ipadapter" / "faceid_sd15.safetensors").unlink()
    disk.converted("faceid_sd15", "faceid_sd15.safetensors")
    with pytest.raises(Exception, match="was trained together with a LoRA"):
        find(loaders, "SD 1.5", "FACEID")
    assert find(loaders, "SD 1.5", "FACEID", with_lora=False).lora is None
    other = disk.lora("faceid-plus_sd15", "b.safetensors")
    other.rename(other.with_name("my-faceid sd15-LORA.safetensors"))
    assert find(loaders, "SD 1.5", "FACEID").lora == "my-faceid sd15-LORA.safetensors"


# What is said


def test_presets_without_an_adapter_for_the_family_say_so(disk: Disk, loaders: Any) -> None:
    errors = disk.host.library("ip_adapter.errors")
    with pytest.raises(errors.IncompatibleModelError) as caught:
        loaders.load(MODELS["SDXL"], LIGHT)
    assert str(caught.value) == (
        f"The preset '{LIGHT}' is for SD 1.5, and the model is SDXL, for which no such adapter "
        f"was published. Choose {STANDARD} or {VIT_G} or {PLUS} or {PLUS_FACE}, or load a "
        "checkpoint of SD 1.5."
    )
    for family, preset, made_for in (
        ("SD 1.5", UNNORM, "SDXL"),
        ("SDXL", V1, "SD 1.5"),
        ("SD 1.5", "Kolors", "Kolors"),
        ("Kolors", "Composition", "SD 1.5 and SDXL"),
    ):
        with pytest.raises(errors.IncompatibleModelError, match=f"is for {made_for}, and the"):
            loaders.load(MODELS[family], preset)
    with pytest.raises(errors.IncompatibleModelError, match=r"a checkpoint of SD 1.5 or SDXL\."):
        loaders.load(MODELS["SD 2.x"], STANDARD)


def test_a_missing_adapter_names_preset_link_and_folder(disk: Disk, loaders: Any) -> None:
    with pytest.raises(disk.host.library("ip_adapter.errors").MissingFileError) as caught:
        loaders.load(MODELS["SDXL"], PLUS_FACE)
    message = str(caught.value)
    assert f"No IP-Adapter for the preset '{PLUS_FACE}' and SDXL is installed" in message
    assert "Download ip-adapter-plus-face_sdxl_vit-h.safetensors from https://" in message
    assert str(disk.root / "ipadapter") in message and str(disk.root / "clip_vision") in message


# Loading


@pytest.fixture
def nano(disk: Disk, model_files: Path) -> Disk:
    """Adapters for the nano UNet, and the random ViT-H of real size."""
    for number, row in enumerate(("sd15", "plus_sd15", "faceid_sd15")):
        path = disk.root / "ipadapter" / f"model ({number}).safetensors"
        adapters.write(ROWS[row], path, nano=True)
    os.symlink(model_files / CLIP_VISION, disk.root / "clip_vision" / "model.safetensors")
    return disk


def test_a_preset_loads_all_that_a_prompt_needs(nano: Disk, host: Any, model: Any) -> None:
    node = host.node("IPAdapterUnifiedLoader")
    out, first = node.execute(model, STANDARD).args
    assert out is model and first.face_model is None
    assert first.path.name == "model (0).safetensors" and first.clip_vision is not None

    # Another preset, after the first: the image encoder is shared; again: the adapter, too.
    _, second = node.execute(model, PLUS, ipadapter=first).args
    assert second.path.name == "model (1).safetensors"
    assert second.clip_vision is first.clip_vision
    _, again = node.execute(model, STANDARD, ipadapter=second).args
    assert again.module is first.module and again.patcher is first.patcher


def test_a_given_adapter_is_used_if_it_is_the_one(nano: Disk, host: Any, model: Any) -> None:
    (given,) = host.node("IPAdapterModelLoader").execute("model (0).safetensors").args
    assert given.clip_vision is None
    node = host.node("IPAdapterUnifiedLoader")
    _, same = node.execute(model, STANDARD, ipadapter=given).args
    _, other = node.execute(model, PLUS, ipadapter=given).args
    assert same.module is given.module and other.module is not given.module
    assert given.clip_vision is None and same.clip_vision is not None
    # Another pack's object only cannot be shared.
    _, alone = node.execute(model, STANDARD, ipadapter={"clipvision": {"file": None}}).args
    assert alone.module is same.module  # still held by this test


def test_nothing_is_kept_that_nobody_holds(nano: Disk, host: Any, loaders: Any, model: Any) -> None:
    out = host.node("IPAdapterUnifiedLoader").execute(model, STANDARD)
    assert len(loaders._adapters) == len(loaders._encoders) == 1
    del out
    gc.collect()
    assert not loaders._adapters and not loaders._encoders


def test_a_changed_file_is_loaded_again(nano: Disk, host: Any, model: Any) -> None:
    node = host.node("IPAdapterUnifiedLoader")
    path = nano.root / "ipadapter" / "model (0).safetensors"
    _, first = node.execute(model, STANDARD).args
    before = node.fingerprint_inputs(None, STANDARD)
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(None, STANDARD) != before
    _, second = node.execute(model, STANDARD).args
    assert second.module is not first.module and second.clip_vision is first.clip_vision


def test_faceid_brings_lora_and_face_model(
    nano: Disk, host: Any, model: Any, face_packs: Path
) -> None:
    build_pack(face_packs / "buffalo_l", others=False)
    node = host.node("IPAdapterUnifiedLoaderFaceID")
    out, adapter = node.execute(model, "FACEID", 0.6, "CPU").args
    assert len(out.patches) == 16 * 2 * 4 and not model.patches
    assert adapter.face_model.label == "buffalo_l" and adapter.face_model.provider == "CPU"
    assert adapter.clip_vision is None  # it reads the face alone
    plain, _ = node.execute(model, "FACEID", 0.0, "CPU").args
    assert plain is model
    before = node.fingerprint_inputs(None, "FACEID", 0.6, "CPU")
    build_pack(face_packs / "antelopev2", others=False)
    assert node.fingerprint_inputs(None, "FACEID", 0.6, "CPU") != before


def test_a_companion_lora_has_the_same_numbers(
    disk: Disk, host: Any, model: Any, face_packs: Path
) -> None:
    build_pack(face_packs / "buffalo_l", others=False)
    tensors = adapters.make(ROWS["faceid_sd15"], nano=True)
    kept = {key: tensor for key, tensor in tensors.items() if "_lora." not in key}
    adapters.write_safetensors(kept, disk.root / "ipadapter" / "a.safetensors")
    adapters.write_lora(ROWS["faceid_sd15"], disk.root / "loras" / "b.safetensors", nano=True)
    out, _ = host.node("IPAdapterUnifiedLoaderFaceID").execute(model, "FACEID", 0.5, "CPU").args
    assert len(out.patches) == 128
    import comfy.lora
    import torch

    up, down = (tensors[f"ip_adapter.1.to_q_lora.{side}.weight"] for side in ("up", "down"))
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    zero = torch.zeros(up.shape[0], down.shape[1])
    after = comfy.lora.calculate_weight(out.patches[key], zero, key)
    torch.testing.assert_close(after, 0.5 * (up.float() @ down.float()), rtol=1e-4, atol=1e-6)


# Face models


def test_old_providers_fall_back_to_the_cpu(
    loaders: Any, face_packs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    build_pack(face_packs / "buffalo_l", others=False)
    absent = {
        "CUDA": "CUDAExecutionProvider",
        "ROCM": "ROCMExecutionProvider",
        "DirectML": "DmlExecutionProvider",
        "OpenVINO": "OpenVINOExecutionProvider",
        "CoreML": "CoreMLExecutionProvider",
    }
    offered = set(onnxruntime.get_available_providers())
    for word in [word for word, full in absent.items() if full not in offered]:
        caplog.clear()
        assert loaders.face_model(word).provider == "CPU"
        (warning,) = warnings(caplog)
        assert "the face model runs on the CPU" in warning
    caplog.clear()
    assert loaders.face_model("CPU").provider == "CPU" and warnings(caplog) == []


def test_another_pack_is_taken_where_the_usual_one_is_missing(
    loaders: Any, host: Any, face_packs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(host.library("ip_adapter.errors").MissingFileError, match="'buffalo_l'"):
        loaders.face_model("CPU")
    build_pack(face_packs / "antelopev2", others=False)
    assert loaders.face_model("CPU").label == "antelopev2"
    (warning,) = warnings(caplog)
    assert "buffalo_l" in warning and "using antelopev2" in warning
    # What was asked for by name is not exchanged.
    node = host.node("IPAdapterInsightFaceLoader")
    with pytest.raises(host.library("ip_adapter.errors").MissingFileError, match="'buffalo_l'"):
        node.execute("CPU", "buffalo_l")
    assert node.execute("CPU", "antelopev2").args[0].label == "antelopev2"
    assert node.fingerprint_inputs("CPU", "buffalo_l") == "missing"
    assert node.fingerprint_inputs("CPU", "antelopev2") != "missing"


# By file


def test_the_loader_by_file(nano: Disk, host: Any) -> None:
    node = host.node("IPAdapterModelLoader")
    (options,) = (one.options for one in node.define_schema().inputs)
    assert options == [f"model ({number}).safetensors" for number in range(3)]
    (adapter,) = node.execute("model (2).safetensors").args
    assert adapter.spec.variant == "faceid" and adapter.face_model is None
    assert node.validate_inputs("model (2).safetensors") is True
    assert "'gone.bin' is not in" in node.validate_inputs("gone.bin")
    before = node.fingerprint_inputs("model (2).safetensors")
    os.utime(nano.root / "ipadapter" / "model (2).safetensors", ns=(1, 1))
    assert node.fingerprint_inputs("model (2).safetensors") != before
