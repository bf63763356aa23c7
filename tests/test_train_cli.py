"""The command line of the trainer, on a nano SD 1.5 and faces of random numbers."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests import host_process
from tests.conftest import ROOT
from tests.synthetic.models import CHECKPOINT

pytestmark = pytest.mark.host

STEPS = 4


@pytest.fixture(scope="module")
def host() -> host_process.Host:
    torch.set_num_threads(1)
    return host_process.start()


@pytest.fixture(scope="module")
def train(host: host_process.Host) -> Iterator[Any]:
    """The command line; the checkpoint is read once."""
    module = host.library("ip_adapter.train.__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.standalone, "load", cache(module.standalone.load))
        yield module


def write_rows(folder: Path, count: int = 6) -> Path:
    """Pictures, face vectors and the JSON lines that name them."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    lines = []
    for i in range(count):
        Image.fromarray(draw.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        np.save(folder / f"{i}.npy", draw.standard_normal(512).astype(np.float32))
        lines.append({"image": f"{i}.png", "text": f"face {i}", "face": f"{i}.npy"})
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("training") / "faces")


@pytest.fixture
def command(rows: Path, model_files: Path, tmp_path: Path) -> list[str]:
    checkpoint = str(model_files / CHECKPOINT)
    return [
        *("--checkpoint", checkpoint, "--data", str(rows), "--projection", "faceid"),
        *("--size", "64", "--steps", str(STEPS), "--batch-size", "2", "--save-every", "2"),
        *("--validate-every", "2", "--hold-out", "2", "--samples", "1", "--sample-steps", "1"),
        *("--cache", str(rows.parent / "cache"), "--out", str(tmp_path / "run")),
        *("--cpu", "--quiet"),
    ]


def test_a_run_writes_weights_that_the_loader_reads_and_says_what_it_saw(
    train: Any, host: Any, command: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert train.main(command) == 0
    out = tmp_path / "run"
    said = capsys.readouterr().out
    weights = out / f"ip-adapter-{STEPS:08}.safetensors"
    assert "faceid for SD 1.5, 4 tokens" in said and "4 rows, 2 held out" in said
    assert f"Done: {weights}" in said and "validation loss" in said and "image over text" in said
    found = host.library("ip_adapter.host.adapters").load(weights)
    assert found.spec.projection.layout == "faceid"
    with safe_open(weights, framework="pt") as file:
        assert file.metadata()["base_checkpoint"] == CHECKPOINT.name
        assert file.metadata()["steps"] == str(STEPS)
    lines = [json.loads(line) for line in (out / "watch.jsonl").read_text().splitlines()]
    seen = [line["step"] for line in lines if "validation/margin" in line]
    assert seen == [2, 4]
    sizes = [line for line in lines if "image_over_text/middle 0.0" in line]
    assert len(sizes) == 2
    # 16 layers, and keys and values that begin as the text's: neither nothing nor all.
    assert sum(name.startswith("image_over_text/") for name in sizes[0]) == 16
    assert lines[-1].get("loss") or any("loss" in line for line in lines)
    grids = sorted(path.name for path in (out / "samples").iterdir())
    assert grids == ["samples_0000002.png", "samples_0000004.png"]
    with Image.open(out / "samples" / grids[0]) as grid:
        assert grid.size == (4 * 64, 64)
        pixels = np.asarray(grid).astype(int)
    plain, full = pixels[:, 64:128], pixels[:, 192:]
    assert np.abs(plain - full).max() > 0


def test_interrupted_and_resumed_equals_never_interrupted(
    train: Any, command: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert train.main(command) == 0
    whole = load_file(tmp_path / "run" / f"ip-adapter-{STEPS:08}.safetensors")
    observer = train.Observer
    pressed: list[int] = []

    class Impatient(observer):  # type: ignore[misc, valid-type]
        def __call__(self, step: Any) -> None:
            super().__call__(step)
            if not pressed:
                pressed.append(step.number)
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "Observer", Impatient)
    other = tmp_path / "stopped"
    assert train.main([*command, "--out", str(other)]) == train.STOPPED
    said = capsys.readouterr().out
    assert f"python -m ip_adapter.train --resume --out {other}" in said
    assert pressed == [1] and not (other / f"ip-adapter-{STEPS:08}.safetensors").exists()
    assert train.main(["--resume", "--out", str(other), "--cpu", "--quiet"]) == 0
    resumed = load_file(other / f"ip-adapter-{STEPS:08}.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_wrong_row_is_named_before_anything_is_loaded(
    train: Any, command: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    path = write_rows(tmp_path / "wrong")
    (path.parent / "3.png").write_bytes(b"no picture")
    monkeypatch.setattr(train.standalone, "load", lambda *_: pytest.fail("loaded"))
    assert train.main([*command, "--data", str(path)]) == 1
    said = capsys.readouterr().err
    assert "rows.jsonl line 4" in said and "3.png" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "0"], "'steps' is 0; needed is"),
        (["--learning-rate", "fast"], "'learning_rate' is 'fast'; needed is"),
        (["--projection", "global"], "--encoder is missing"),
        (["--start-from", "nowhere.safetensors"], "nowhere.safetensors' to start from"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors'. Give --checkpoint"),
        (["--config", "nowhere.yaml"], "There is no recipe"),
        (["--data", "nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    train: Any, command: list[str], more: list[str], said: str, capsys: Any
) -> None:
    assert train.main([*command, *more]) == 1
    assert said in capsys.readouterr().err


def test_a_run_is_not_written_over(
    train: Any, command: list[str], tmp_path: Path, capsys: Any
) -> None:
    quick = [*command, "--steps", "1", "--validate-every", "0", "--samples", "0"]
    assert train.main(quick) == 0
    assert train.main(quick) == 1
    assert "already holds a run, saved at step 1. Add --resume" in capsys.readouterr().err
    assert train.main([*quick, "--resume", "--learning-rate", "0.5"]) == 1
    assert "learning_rate was 0.0001 and is 0.5" in capsys.readouterr().err
    assert train.main([*quick, "--resume", "--steps", "2"]) == 0
    assert (tmp_path / "run" / "ip-adapter-00000002.safetensors").is_file()


def test_it_starts_from_an_adapter_and_takes_its_projection(
    train: Any, command: list[str], tmp_path: Path
) -> None:
    quick = ["--validate-every", "0", "--samples", "0"]
    assert train.main([*command, *quick, "--steps", "1"]) == 0
    first = tmp_path / "run" / "ip-adapter-00000001.safetensors"
    again = [one for one in command if one not in ("--projection", "faceid")]
    again += ["--start-from", str(first), "--out", str(tmp_path / "more"), *quick]
    assert train.main([*again, "--steps", "1", "--learning-rate", "1e-9"]) == 0
    before = load_file(first)
    after = load_file(tmp_path / "more" / "ip-adapter-00000001.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.allclose(tensor.float(), after[key].float(), atol=1e-4), key


def test_the_cache_alone_can_be_filled(train: Any, command: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert train.main([*command, "--cache", str(cache), "--cache-only"]) == 0
    parts = {path.name.partition("-")[0] for path in cache.iterdir() if path.is_dir()}
    assert parts == {"latents", "text", "face"}
    assert not (tmp_path / "run" / "run.json").exists()


def documented() -> list[list[str]]:
    """The arguments of every command in the guide that trains."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = (
        "".join(block for language, block in blocks if not language)
        .replace("\\\n", " ")
        .splitlines()
    )
    commands = [shlex.split(line) for line in lines if "ip_adapter.train" in line]
    return [words[words.index("ip_adapter.train") + 1 :] for words in commands]


def test_every_command_of_the_guide_is_understood(train: Any) -> None:
    commands = documented()
    assert len(commands) == 7
    for words in commands:
        train._parser().parse_args(words)


def test_the_guide_s_training_of_faces_runs_and_is_resumed(
    train: Any, command: list[str], rows: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = command[command.index("--checkpoint") + 1]
    (tmp_path / "v1-5-pruned-emaonly.safetensors").symlink_to(checkpoint)
    (tmp_path / "faces").symlink_to(rows.parent)
    (faces,) = (words for words in documented() if "faceid" in words)
    (resume,) = (words for words in documented() if words[0] == "--resume" and "first" in words[-1])
    small = ["--size", "64", "--batch-size", "1", "--samples", "0", "--cpu", "--quiet"]
    assert train.main([*faces, *small, "--steps", "1"]) == 0
    resume[-1] = "runs/faces"
    assert train.main([*resume, "--steps", "2", "--cpu", "--quiet"]) == 0
    (newest,) = (tmp_path / "runs" / "faces").glob("ip-adapter-00000002.safetensors")
    assert newest.is_file()


def test_the_guide_s_recipe_can_be_followed(train: Any, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    path = tmp_path / "recipe.yaml"
    path.write_text(block)
    options = train._parser().parse_args(["--out", "x", "--config", str(path), "--steps", "7"])
    recipe, _ = train._settings(options, tmp_path)
    assert (recipe.projection, recipe.tokens, recipe.steps) == ("plus", 16, 7)
    assert recipe.gradient_accumulation == 8


def test_the_guide_explains_what_is_logged(train: Any, host: Any) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name in ("reference", "gain", "margin"):
        assert f"`validation/{name}`" in text
        assert name in host.library("ip_adapter.train.watch").Validation.__annotations__


def test_help_explains_without_a_host() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "ip_adapter.train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COMFYUI_PATH": "/nowhere"},
    )
    assert ran.returncode == 0 and ran.stderr == ""
    for flag in ("--checkpoint", "--encoder", "--data", "--projection", "--out", "--resume"):
        assert flag in ran.stdout
