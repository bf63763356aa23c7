"""Files of every container, good and bad, whatever they are called."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ip_adapter.checkpoint import fingerprint, load_adapter, read_tensors
from ip_adapter.errors import CheckpointError, IncompatibleModelError, IPAdapterError
from ip_adapter.spec import LinearProjection, ResamplerProjection
from tests.conftest import NARROW
from tests.synthetic import adapters


@pytest.mark.parametrize(
    ("make", "size", "parameters"),
    [
        (adapters.base_sd15, 44_642_768, 22_319_616),
        (lambda: adapters.base_sd15(features=1280), 46_215_640, 23_106_048),
        (adapters.plus_sd15, 98_183_288, 49_087_488),
    ],
    ids=["base", "vit-G", "plus"],
)
def test_synthetic_files_have_the_published_byte_sizes(
    make: Callable[[], adapters.Tensors], size: int, parameters: int, tmp_path: Path
) -> None:
    path = adapters.write_safetensors(make(), tmp_path / "adapter.safetensors")
    assert path.stat().st_size == size
    loaded = load_adapter(path)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == parameters
    assert all(parameter.dtype == torch.float16 for parameter in loaded.parameters())


def test_base_is_recognised(base_file: Path) -> None:
    spec = load_adapter(base_file).spec
    assert spec.projection == LinearProjection(features=1024, tokens=4, width=768)
    assert spec.widths == NARROW and spec.family.name == "SD 1.5"


def test_plus_is_recognised(plus_file: Path) -> None:
    assert load_adapter(plus_file).spec.projection == ResamplerProjection(
        features=1280, tokens=16, inner=64, heads=2, depth=2, hidden=256, width=768
    )


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "model", "weird.ckpt"])
def test_every_container_gives_the_same_adapter(kind: str, name: str, tmp_path: Path) -> None:
    tensors = adapters.base_sd15(NARROW) if kind == "base" else adapters.plus_sd15(NARROW, inner=64)
    path = tmp_path / name
    prints = set()
    for write in (
        adapters.write_safetensors,
        adapters.write_bin,
        lambda t, p: adapters.write_bin(t, p, legacy=True),
    ):
        loaded = load_adapter(write(tensors, path))
        assert all(torch.equal(value, tensors[key]) for key, value in loaded.state_dict().items())
        assert set(loaded.state_dict()) == set(tensors)
        prints.add(fingerprint(loaded))
    assert len(prints) == 1


@pytest.mark.parametrize("wrapper", ["module.", "state_dict.", "state_dict.module."])
def test_wrappers_of_training_scripts_are_taken_off(wrapper: str, tmp_path: Path) -> None:
    tensors = {wrapper + key: value for key, value in adapters.base_sd15(NARROW).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").spec.widths == NARROW


def test_other_weights_have_another_fingerprint(base_file: Path, tmp_path: Path) -> None:
    other = adapters.write_safetensors(adapters.base_sd15(NARROW, seed=1), tmp_path / "b")
    assert fingerprint(load_adapter(base_file)) != fingerprint(load_adapter(other))


def test_unknown_tensors_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = adapters.base_sd15(NARROW) | {"image_proj.extra": torch.zeros(1)}
    load_adapter(adapters.write_safetensors(tensors, tmp_path / "a"))
    assert "1 tensors are not used, such as image_proj.extra" in caplog.text


def test_views_into_a_larger_storage_do_not_keep_it(tmp_path: Path) -> None:
    """Some published .bin files are larger than their tensors."""
    tensors = adapters.base_sd15(NARROW)
    large = torch.zeros(10_000_000, dtype=torch.float16)
    bias = tensors["image_proj.proj.bias"]
    large[: bias.numel()] = bias
    tensors["image_proj.proj.bias"] = large[: bias.numel()]
    loaded = load_adapter(adapters.write_bin(tensors, tmp_path / "a.bin"))
    kept = loaded.image_proj.proj.bias
    assert torch.equal(kept, bias)
    assert kept.untyped_storage().nbytes() == bias.numel() * 2


class Code:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pickle-code-ran",)


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def _cut(write: Callable[[adapters.Tensors, Path], Path]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        write(adapters.base_sd15(NARROW), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def _torchscript(path: Path) -> None:
    """The container of OpenAI's original CLIP files: an archive with code in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/code/__torch__.py", "class Model: pass")
        archive.writestr("model/data.pkl", b"")


def _legacy(tensors: adapters.Tensors, path: Path) -> Path:
    return adapters.write_bin(tensors, path, legacy=True)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_bytes(b"<!DOCTYPE html><html>Sign in</html>"), "a web page"),
        (_bytes(b"\n  <html>"), "a web page"),
        (_bytes(b""), "empty"),
        (_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS pointer"),
        (_bytes(b'{"error": "not found"}'), "JSON text"),
        (_bytes(b"GGUF\x03\x00\x00\x00"), "a GGUF file"),
        (_bytes(b"\x13\x37" * 100), "no known format"),
        (_cut(adapters.write_safetensors), "damaged safetensors"),
        (_cut(adapters.write_bin), "truncated torch file"),
        (_cut(_legacy), "damaged torch file"),
        (lambda path: torch.save({"image_proj": Code()}, path), "could run code"),
        (_torchscript, "a TorchScript program"),
        (
            lambda path: torch.save(Code(), path, _use_new_zipfile_serialization=False),
            "could run code",
        ),
    ],
)
def test_bad_files_are_named_for_what_they_are(
    write: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ip-adapter_sd15.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(tmp_path / "ip-adapter_sd15.bin")
    assert "ip-adapter_sd15.bin" in str(caught.value)
    assert not (tmp_path / "pickle-code-ran").exists()


T = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": T}, "a LoRA"),
        ({"model.diffusion_model.input_blocks.0.0.weight": T}, "a whole checkpoint"),
        ({"input_blocks.0.0.weight": T}, "a diffusion model"),
        ({"control_model.zero_convs.0.0.weight": T}, "a ControlNet"),
        ({"vision_model.embeddings.class_embedding": T}, "a CLIP image encoder"),
        ({"visual.proj": T}, "a CLIP image encoder"),
        ({"text_model.embeddings.x": T}, "a text encoder"),
        ({"encoder.conv_in.weight": T}, "a VAE"),
        ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": T}, "FLUX.1 .XLabs."),
        ({"unheard": T}, "tensors such as unheard"),
        ({"image_proj.proj.weight": T}, "no keys and values"),
        ({"image_proj.body.0.weight": T, "ip_adapter.1.to_k_ip.weight": T}, "PuLID"),
        ({"image_proj.x": T, "ip_adapter.0.to_k_ip.weight": T}, "FLUX.1 .InstantX."),
        ({"image_proj.x": T, "ip_adapter.y": T}, "no keys and values"),
    ],
)
def test_files_from_other_folders_are_named(
    tensors: adapters.Tensors, message: str, tmp_path: Path
) -> None:
    apart = {key: value.clone() for key, value in tensors.items()}
    save_file(apart, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path / "x.safetensors")


def test_adapters_of_unknown_families_are_named(tmp_path: Path) -> None:
    tensors = adapters.base_sd15((8,) * 9)
    with pytest.raises(IncompatibleModelError, match=r"unknown family \(9 .*SD 1.5, SD 2.x, SDXL"):
        load_adapter(adapters.write_safetensors(tensors, tmp_path / "x"))


def test_every_missing_tensor_is_noticed(tmp_path: Path) -> None:
    """Whichever tensor is lost, the file is refused with our error, never with torch's."""
    for tensors in (adapters.base_sd15(NARROW), adapters.plus_sd15(NARROW, inner=64, depth=1)):
        for key in tensors:
            rest = {name: value for name, value in tensors.items() if name != key}
            path = adapters.write_safetensors(rest, tmp_path / "x.safetensors")
            with pytest.raises(IPAdapterError, match=r"x\.safetensors"):
                load_adapter(path)


def test_every_misshapen_tensor_is_noticed(tmp_path: Path) -> None:
    tensors = adapters.base_sd15(NARROW)
    for key, value in tensors.items():
        wrong = tensors | {key: torch.cat([value, value[:1]])}
        path = adapters.write_safetensors(wrong, tmp_path / "x.safetensors")
        with pytest.raises(IPAdapterError, match=r"x\.safetensors"):
            load_adapter(path)


def test_layers_with_wrong_numbers_are_refused(tmp_path: Path) -> None:
    tensors = adapters.base_sd15(NARROW)
    for name in ("to_k_ip", "to_v_ip"):
        tensors[f"ip_adapter.33.{name}.weight"] = tensors.pop(f"ip_adapter.31.{name}.weight")
    with pytest.raises(CheckpointError, match="numbers its layers"):
        load_adapter(adapters.write_safetensors(tensors, tmp_path / "x"))


def test_read_tensors_keeps_nested_names(tmp_path: Path) -> None:
    torch.save({"a": {"b": T, "c": {"d": T}}, "text": "ignored"}, tmp_path / "x")
    assert set(read_tensors(tmp_path / "x")) == {"a.b", "a.c.d"}
