"""The automatic loader's node, and what is remembered of the files it looks into."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host.disk import Disk, make
from tests.synthetic import adapters
from tests.synthetic.catalogue import ROWS
from tests.synthetic.models import CLIP_VISION

pytestmark = pytest.mark.host


@pytest.fixture
def disk(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    return make(host, monkeypatch, tmp_path)


# Memory


def test_files_are_read_once_until_they_change(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = disk.installed.checkpoint.read

    def spy(path: Path, **options: Any) -> Any:
        read.append(path.name)
        return original(path, **options)

    monkeypatch.setattr(disk.installed.checkpoint, "read", spy)
    disk.encoder("ViT-H", "encoder.safetensors")
    path = disk.adapter("sd15", "a.safetensors")
    for _ in range(3):
        assert disk.find("SD 1.5", "general").adapter_name == "a.safetensors"
    assert read == ["a.safetensors"]
    adapters.write_hollow(ROWS["plus_sd15"], path)
    assert disk.find("SD 1.5", "strong").adapter_name == "a.safetensors"
    assert read == ["a.safetensors"] * 2


def test_files_without_header_are_outlined_once(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = adapters.write(ROWS["faceid_sd15"], disk.root / "ipadapter" / "face (1).bin", nano=True)
    spec = disk.installed.adapters()[0].spec
    (outline,) = (tmp_path / "user" / "ip_adapter" / "outlines").rglob("*.bin")
    assert outline.name == path.name
    assert outline.stat().st_size < 0.05 * path.stat().st_size
    disk.installed._adapter.cache_clear()  # as after a restart
    read: list[Path] = []
    original = disk.installed.checkpoint.read

    def spy(found: Path, **options: Any) -> Any:
        read.append(found)
        return original(found, **options)

    monkeypatch.setattr(disk.installed.checkpoint, "read", spy)
    assert disk.installed.adapters()[0].spec == spec
    assert read == [outline] and spec.lora_rank == 128


def test_a_changed_file_loses_its_old_outline(disk: Disk, tmp_path: Path) -> None:
    disk.adapter("faceid_sd15", "a.bin")
    assert disk.installed.adapters()[0].spec.family.name == "SD 1.5"
    disk.adapter("faceid_sdxl", "a.bin")
    assert disk.installed.adapters()[0].spec.family.name == "SDXL"
    assert len(list((tmp_path / "user" / "ip_adapter" / "outlines").rglob("*.bin"))) == 1


def test_without_a_place_for_outlines_files_are_still_found(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "user").write_text("a file where the folder should be")
    disk.adapter("faceid_sd15", "a.bin")
    assert disk.find("SD 1.5", "face identity").adapter_name == "a.bin"


# Node


@pytest.fixture
def node(host: Any) -> Any:
    return host.library("ip_adapter.nodes.automatic").AutoLoader


@pytest.fixture
def shown(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(host.library("ip_adapter.nodes.automatic"), "show_on_node", texts.append)
    return texts


@pytest.fixture
def nano(disk: Disk, model_files: Path) -> Disk:
    """Adapters for the nano UNet and the random ViT-H of real size, all under wrong names."""
    for number, row in enumerate(("sd15", "plus_sd15", "faceid_sd15")):
        path = disk.root / "ipadapter" / f"model ({number}).safetensors"
        adapters.write(ROWS[row], path, nano=True)
    os.symlink(model_files / CLIP_VISION, disk.root / "clip_vision" / "model.safetensors")
    return disk


@pytest.mark.parametrize(
    ("purpose", "file", "tokens"),
    [("general", "model (0).safetensors", 4), ("strong", "model (1).safetensors", 16)],
)
def test_the_node_loads_what_a_prompt_needs(
    node: Any,
    nano: Disk,
    model: Any,
    sample: Any,
    shown: list[str],
    purpose: str,
    file: str,
    tokens: int,
) -> None:
    out, adapter, clip_vision = node.execute(model, purpose, 0.6).args
    assert out is model
    assert adapter.path.name == file and adapter.spec.projection.tokens == tokens
    assert f"adapter: {file}" in shown[0] and "image encoder: model.safetensors" in shown[0]
    image = torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    encode = nano.host.library("ip_adapter.host.encoding").encode
    prompt = encode(adapter, clip_vision, image, "crop", None)
    assert prompt.tokens == tokens
    patched, _ = nano.host.library("ip_adapter.host.patching").apply(out, adapter, prompt)
    picture = sample(patched)
    assert torch.isfinite(picture).all() and not torch.equal(picture, sample(model))


def test_the_node_applies_the_lora_of_faceid(
    node: Any, nano: Disk, model: Any, shown: list[str]
) -> None:
    out, adapter, clip_vision = node.execute(model, "face identity", 0.5).args
    assert clip_vision is None  # an optional input that gets None is one without a link
    assert adapter.spec.variant == "faceid"
    assert len(out.patches) == 16 * 2 * 4 and not model.patches  # q, k, v, out of both attentions
    assert "LoRA: inside the adapter, 128 of 128 modules, strength 0.5" in shown[0]
    # The change of one weight is strength * up @ down, with the numbers of the adapter's file.
    tensors = adapters.make(ROWS["faceid_sd15"], nano=True)
    up, down = (tensors[f"ip_adapter.1.to_q_lora.{side}.weight"] for side in ("up", "down"))
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    import comfy.lora

    before = torch.zeros(up.shape[0], down.shape[1])
    after = comfy.lora.calculate_weight(out.patches[key], before.clone(), key)
    torch.testing.assert_close(after, 0.5 * (up.float() @ down.float()), rtol=1e-4, atol=1e-6)
    untouched, _, _ = node.execute(model, "face identity", 0.0).args
    assert untouched is model


def test_the_node_applies_a_companion_file(node: Any, disk: Disk, model: Any) -> None:
    row = ROWS["faceid_sd15"]
    tensors = adapters.make(row, nano=True)
    kept = {key: tensor for key, tensor in tensors.items() if "_lora." not in key}
    adapters.write_safetensors(kept, disk.root / "ipadapter" / "a.safetensors")
    adapters.write_lora(row, disk.root / "loras" / "b.safetensors", nano=True)
    out, _, _ = node.execute(model, "face identity", 1.0).args
    assert len(out.patches) == 128


def test_purposes_are_explained(node: Any, host: Any) -> None:
    (purpose,) = (one for one in node.define_schema().inputs if one.id == "purpose")
    assert tuple(purpose.options) == host.library("ip_adapter.catalogue").PURPOSES
    assert all(f"{name}: " in purpose.tooltip for name in purpose.options)


def test_the_fingerprint_follows_the_files_without_opening_them(
    node: Any, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(purpose: str = "general", strength: float = 0.6) -> str:
        return str(node.fingerprint_inputs(None, purpose, strength))

    def changes(act: Callable[[], Any], *arguments: Any) -> bool:
        before = fingerprint(*arguments)
        act()
        return before != fingerprint(*arguments)

    adapter = disk.adapter("sd15", "a.safetensors")
    encoder = disk.encoder("ViT-H", "b.safetensors")
    monkeypatch.setattr(disk.installed.checkpoint, "read", None)
    monkeypatch.setattr(disk.installed.checkpoint, "read_shapes", None)
    assert not changes(lambda: None)
    assert changes(lambda: os.utime(adapter, ns=(1, 1)))
    assert changes(lambda: shutil.move(encoder, encoder.with_name("c.safetensors")))
    assert changes(lambda: adapter.write_bytes(b"short"))
    lora = disk.root / "loras" / "x.safetensors"
    assert not changes(lambda: lora.write_bytes(b"1"))
    assert changes(lambda: lora.write_bytes(b"22"), "face identity")
    assert not changes(lambda: lora.write_bytes(b"333"), "face identity", 0.0)
