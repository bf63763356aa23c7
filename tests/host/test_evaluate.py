"""The evaluator in the real host: its pictures are those of the host's own nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.evaluate_parts import write_data
from tests.host.test_encoding import POOLED, clip_vision
from tests.synthetic import adapters
from tests.synthetic.models import CHECKPOINT
from tests.test_evaluate_metrics import tiny_clip
from tests.tolerance import assert_close

pytestmark = pytest.mark.host

SEEDS = (11, 2**47 + 5)
TEXT = "a red circle"


@pytest.fixture(scope="module")
def generate(host: Any) -> Any:
    return host.library("ip_adapter.evaluate.generate")


@pytest.fixture(scope="module")
def protocol(host: Any) -> Any:
    return host.library("ip_adapter.evaluate.protocol")


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = adapters.base_sd15(adapters.NANO_WIDTHS, features=POOLED)
    return adapters.write_safetensors(tensors, tmp_path_factory.mktemp("a") / "a.safetensors")


@pytest.fixture(scope="module")
def files(model_files: Path, adapter_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoint, adapter and encoder; the encoder's file is never read."""
    encoder = tmp_path_factory.mktemp("e") / "e.safetensors"
    encoder.write_bytes(b"e")
    return model_files / CHECKPOINT, adapter_file, encoder


@pytest.fixture(scope="module")
def small_encoder(host: Any) -> Any:
    with torch.inference_mode():
        return clip_vision()


@pytest.fixture(scope="module")
def generator(generate: Any, protocol: Any, files: Any, small_encoder: Any, host: Any) -> Any:
    vision = host.library("ip_adapter.host.vision")
    sampling = protocol.Sampling(width=64, height=32, steps=3, negative="bad", weight=0.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "load", lambda _: small_encoder)
        return generate.HostGenerator.load(*files, sampling)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("r") / "r.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def row(host: Any, reference: Path | None, text: str = TEXT) -> Any:
    sample = host.library("ip_adapter.evaluate.data").Sample("a", reference, "caption", "line 1")
    return host.library("ip_adapter.evaluate.protocol").Row(sample, reference, text)


def by_nodes(host: Any, generator: Any, seed: int, model: Any, text: str = TEXT) -> Tensor:
    """One picture, by the host's own nodes."""
    encode, latent = host.node("CLIPTextEncode")(), host.node("EmptyLatentImage")()
    positive, negative = (encode.encode(generator.clip, words)[0] for words in (text, "bad"))
    empty = latent.generate(64, 32, 1)[0]
    sampled = host.node("KSampler")().sample(
        model, seed, 3, 7.5, "ddim", "ddim_uniform", positive, negative, empty
    )[0]
    return host.node("VAEDecode")().decode(generator.vae, sampled)[0]


def test_pictures_are_those_of_the_hosts_nodes(host: Any, generator: Any, reference: Path) -> None:
    found = generator.generate(row(host, reference), SEEDS, "adapter")
    assert found.shape == (2, 32, 64, 3)
    image = torch.tensor(np.array(Image.open(reference))).float().div(255).unsqueeze(0)
    encoded = host.node("ImagePromptEncode").execute(
        generator.adapter, generator.clip_vision, image, "crop"
    )
    patched = host.library("ip_adapter.host.patching").apply(
        generator.model, generator.adapter, encoded.args[0], weight=0.8
    )[0]
    for picture, seed in zip(found, SEEDS, strict=True):
        assert_close(picture[None], by_nodes(host, generator, seed, patched), relative=1e-4)


def test_no_adapter_is_the_base_model_on_the_same_seeds(
    host: Any, generator: Any, reference: Path
) -> None:
    base = generator.generate(row(host, None), SEEDS, "no adapter")
    for picture, seed in zip(base, SEEDS, strict=True):
        expected = by_nodes(host, generator, seed, generator.model)
        assert_close(picture[None], expected, relative=1e-4)
    prompted = generator.generate(row(host, reference), SEEDS, "adapter")
    assert float((prompted - base).abs().mean()) > 1e-3
    assert torch.equal(generator.generate(row(host, None), SEEDS, "no adapter"), base)


def test_the_text_is_the_rows(host: Any, generator: Any) -> None:
    found = generator.generate(row(host, None, "a blue square"), SEEDS[:1], "no adapter")
    expected = by_nodes(host, generator, SEEDS[0], generator.model, "a blue square")
    assert_close(found, expected, relative=1e-4)


@pytest.mark.parametrize("changes", [{"sampler": "dddim"}, {"scheduler": "uniform"}])
def test_unknown_samplers_are_refused(
    changes: dict[str, str], generate: Any, protocol: Any, host: Any
) -> None:
    error = host.library("ip_adapter.evaluate.errors").ProtocolError
    with pytest.raises(error, match="has no sampler or scheduler"):
        generate.HostGenerator(None, None, None, None, None, protocol.Sampling(**changes))


def test_a_checkpoint_without_all_parts_is_refused(
    generate: Any, protocol: Any, files: Any, host: Any, small_encoder: Any, monkeypatch: Any
) -> None:
    import comfy.sd

    errors = host.library("ip_adapter.errors")
    vision = host.library("ip_adapter.host.vision")
    monkeypatch.setattr(vision, "load", lambda _: small_encoder)
    for loaded, said in (
        ((object(), None, None, None), "has no text encoder and no VAE"),
        (RuntimeError("Could not detect model type"), "cannot load .* Could not detect"),
    ):

        def load(_: str, loaded: Any = loaded, **parts: bool) -> Any:
            if isinstance(loaded, Exception):
                raise loaded
            return loaded

        monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", load)
        with pytest.raises(errors.CheckpointError, match=said):
            generate.HostGenerator.load(*files, protocol.Sampling())
    with pytest.raises(errors.MissingFileError, match="There is no file"):
        generate.HostGenerator.load(Path("gone"), *files[1:], protocol.Sampling())


def test_the_command_runs_from_data_to_grid(
    host: Any, files: Any, small_encoder: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    vision = host.library("ip_adapter.host.vision")
    monkeypatch.setattr(vision, "load", lambda _: small_encoder)
    main = host.library("ip_adapter.evaluate.__main__").main
    data = write_data(tmp_path / "data", 2)
    clip = tiny_clip(tmp_path / "tiny")
    names = ("--checkpoint", "--adapter", "--encoder")
    command = [part for pair in zip(names, map(str, files), strict=True) for part in pair]
    command += ["--data", str(data), "--out", str(tmp_path / "out"), "--cpu"]
    command += ["--scorer", f"local-dir:{clip}", "--width", "32", "--height", "32"]
    command += ["--steps", "2", "--pictures", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "sampling.steps = 2" in said and "scoring.clip.sha256 = '" in said
    assert "| **shuffled** |" in said and "12 of 12 pictures" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"]["adapter"]["clip_i"]["pictures"] == 4
    assert results["environment"]["comfyui"] != "unknown"
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 12

    before = (tmp_path / "out" / "scores.jsonl").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main([*command[:-1], "3"]) == 1
    assert "sampling.pictures: 2 there, 3 now" in capsys.readouterr().err
    assert main([*command, "--adapter", "gone.safetensors"]) == 1
    assert "--adapter: there is no file gone.safetensors" in capsys.readouterr().err


def test_importing_the_evaluator_imports_no_host() -> None:
    """The evaluator's own figures and resuming work where there is no ComfyUI."""
    import subprocess

    code = (
        "import sys, ip_adapter.evaluate.__main__ as m\n"
        "assert 'comfy' not in sys.modules and 'open_clip' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
