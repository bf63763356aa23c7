"""Conversion loses nothing, says what it wrote, and never leaves half a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ip_adapter import __main__ as command
from ip_adapter import checkpoint
from ip_adapter.convert import convert
from ip_adapter.errors import CheckpointError
from tests.conftest import NARROW
from tests.synthetic import adapters
from tests.synthetic.catalogue import ROWS, Row

SMALL = [name for name, row in ROWS.items() if row.parameters < 100e6]
"""SD 1.5's rows. SDXL's and Kolors' differ in size only."""


def _is_light(row: Row) -> bool:
    return sum(math.prod(shape) for shape in row.projection.values()) < 50e6


LIGHT = [name for name, row in ROWS.items() if _is_light(row)]
"""Rows whose projection is small enough to be written many times."""


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def published(name: str) -> dict[str, torch.Tensor]:
    return adapters.make(ROWS[name], nano=True)


@pytest.mark.parametrize("name", SMALL)
def test_every_adapter_survives_bit_for_bit(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    source = adapters.write(row, tmp_path / row.file, nano=True)
    done = convert(source, tmp_path / "out.safetensors")
    expected = {
        key.replace("adapter_modules.", "ip_adapter."): tensor
        for key, tensor in published(name).items()
    }
    found = load_file(done.path)
    assert set(found) == set(expected) and done.tensors == len(found)
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key])

    again = convert(done.path, tmp_path / "again.safetensors")
    second = load_file(again.path)
    assert set(second) == set(found)
    assert all(torch.equal(second[key], found[key]) for key in found)
    assert metadata(again.path) == metadata(done.path)
    assert again.spec.projection == checkpoint.read(source).spec.projection


@pytest.mark.parametrize("name", LIGHT)
def test_the_file_says_what_it_is(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    source = tmp_path / "model.safetensors"  # a name that says nothing
    adapters.write_hollow(row, source, nano=True)
    variant = checkpoint.read(tmp_path / "model.safetensors").spec.variant
    done = convert(source, tmp_path / "out.safetensors", variant=variant)
    said = metadata(done.path)
    assert said["format"] == "ip_adapter" and said["base_model"] == row.family
    assert said["variant"] == variant and said["source"] == "model.safetensors"
    assert said["source_sha256"] == checkpoint.digest(source)
    assert int(said["tokens"]) == done.spec.projection.tokens
    assert said.get("encoder") == (done.spec.encoder.name if done.spec.encoder else None)
    assert said["licence"]
    loaded = checkpoint.read(done.path).spec
    assert (loaded.variant, loaded.projection) == (variant, done.spec.projection)


def test_a_guess_is_not_written_down_as_a_fact(tmp_path: Path) -> None:
    source = adapters.write_safetensors(adapters.plus_sd15(NARROW, inner=64), tmp_path / "a")
    guessed = convert(source, tmp_path / "guessed.safetensors")
    assert guessed.spec.evidence == "assumption" and "variant" not in metadata(guessed.path)
    told = convert(source, tmp_path / "told.safetensors", variant="plus-face")
    assert metadata(told.path)["variant"] == "plus-face"
    spec = checkpoint.read(told.path).spec
    assert (spec.variant, spec.evidence) == ("plus-face", "metadata")


def test_the_sources_digest_tells_the_variant_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published file that was renamed, then converted, is still the published one."""
    source = adapters.write_safetensors(adapters.plus_sd15(NARROW, inner=64), tmp_path / "a")
    face = "1c9edc21af6f737dc1d6e0e734190e976cfacf802d6b024b77aa3be922f7569b"
    monkeypatch.setattr(checkpoint, "digest", lambda path: face)
    done = convert(source, tmp_path / "b.safetensors")
    assert (done.spec.variant, done.spec.evidence) == ("plus-face", "sha256")
    monkeypatch.undo()
    assert metadata(done.path)["source_sha256"] == face
    assert checkpoint.read(done.path).spec.variant == "plus-face"


def test_own_metadata_and_licence_are_kept(tmp_path: Path) -> None:
    own = {"trained_on": "my drawings", "licence": "CC0"}
    save_file(adapters.base_sd15(NARROW), tmp_path / "a.safetensors", metadata=own)
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert metadata(done.path)["trained_on"] == "my drawings"
    assert metadata(done.path)["licence"] == "CC0"
    other = convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", licence="MIT")
    assert metadata(other.path)["licence"] == "MIT"


def test_a_training_dumps_folder_is_converted(tmp_path: Path) -> None:
    """What accelerate leaves of the paper's training script: the module's three parts."""
    tensors = adapters.base_sd15(NARROW)
    dump = {"unet.conv_in.weight": torch.zeros(4, 4)}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        dump[f"{'image_proj_model' if part == 'image_proj' else 'adapter_modules'}.{rest}"] = tensor
    folder = tmp_path / "checkpoint-1000"
    folder.mkdir()
    torch.save(dump, folder / "pytorch_model.bin")
    torch.save({"step": 1000}, folder / "optimizer.bin")
    done = convert(folder, tmp_path / "mine.safetensors")
    found = load_file(done.path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert metadata(done.path)["source"] == "checkpoint-1000"


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    source = adapters.write_safetensors(adapters.base_sd15(NARROW), tmp_path / "a.safetensors")
    before = source.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, source)
    assert source.read_bytes() == before
    convert(source, source, overwrite=True)
    assert metadata(source)["format"] == "ip_adapter"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_bad_source_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = adapters.base_sd15(NARROW)
    del tensors["image_proj.norm.bias"]
    source = adapters.write_safetensors(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 of 36"):
        convert(source, tmp_path / "out" / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    good = adapters.write_safetensors(adapters.base_sd15(NARROW), tmp_path / "a.safetensors")
    monkeypatch.setattr("ip_adapter.convert.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert(good, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_command_converts_and_describes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ROWS["faceid-plusv2_sd15"]
    source = adapters.write(row, tmp_path / row.file, nano=True)
    assert command.main(["convert", str(source)]) == 0
    target = source.with_suffix(".safetensors")
    assert f"{target}: faceid-plusv2 for SD 1.5" in capsys.readouterr().out
    assert command.main(["describe", str(target), str(source)]) == 0
    assert capsys.readouterr().out.count("faceid-plusv2 for SD 1.5, 4 tokens") == 2
    assert command.main(["convert", str(source)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert command.main(["convert", str(source), "--overwrite", "--variant", "faceid-plus"]) == 0
    assert metadata(target)["variant"] == "faceid-plus"
    (tmp_path / "page.bin").write_bytes(b"<html>")
    assert command.main(["describe", str(tmp_path / "page.bin"), str(target)]) == 1
    streams = capsys.readouterr()
    assert "a web page" in streams.err and "faceid-plus for SD 1.5" in streams.out
    assert command.main(["convert", str(tmp_path / "absent.bin")]) == 1
    assert "absent.bin" in capsys.readouterr().err


def test_half_precision_kinds_are_kept(tmp_path: Path) -> None:
    tensors = {k: t.to(torch.bfloat16) for k, t in adapters.base_sd15(NARROW).items()}
    done = convert(adapters.write_bin(tensors, tmp_path / "a.bin"), tmp_path / "b.safetensors")
    assert {tensor.dtype for tensor in load_file(done.path).values()} == {torch.bfloat16}
