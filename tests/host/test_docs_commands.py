"""The commands and programs of the pages that need a ComfyUI; tests/test_docs_commands.py has the
table of all of them.

Trainer and evaluator run as written, on the miniature under the names on the page, with what makes
them short added at the end.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniature import family, world
from scripts.host import find_host
from scripts.prompts import read_prompt, shrink
from scripts.server import Server
from tests.conftest import ROOT
from tests.host.server_fixtures import running
from tests.test_docs_commands import JUDGE, PICTURES, START, TRAIN, blocks, run, run_by

pytestmark = pytest.mark.host

SHORT = ["--size", "64", "--samples", "0", "--validate-every", "0", "--cpu", "--quiet"]
CAPTIONS = 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the pages name, all of it of the miniature."""
    files = {
        "v1-5-pruned-emaonly.safetensors": family.BASE,
        "v1-5-pruned-emaonly-fp16.safetensors": family.BASE,
        "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": family.CLIP_VISION,
        "ip-adapter_sd15.safetensors": family.ADAPTERS / "miniature_global.safetensors",
        "ip-adapter-plus_sd15.safetensors": family.ADAPTERS / "miniature_plus.safetensors",
        "miniature": ROOT / "miniature",
    }
    for name, path in files.items():
        (tmp_path / name).symlink_to(path)
    pictures, faces, coco = (tmp_path / name for name in ("pictures", "faces", "coco"))
    for place in (pictures, faces, coco / "val2017", coco / "annotations"):
        place.mkdir(parents=True)
    rng, rows, listed, captions = np.random.default_rng(0), [], [], []
    scenes = [world.draw(random.Random(n), held_out=True) for n in range(CAPTIONS)]
    for number, picture in enumerate(world.pil(world.render(scenes))):
        name, words = f"{number:012d}", world.caption(scenes[number])
        picture.save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(words)
        picture.save(faces / f"{name}.png")
        np.save(faces / f"{name}.npy", rng.standard_normal(512).astype(np.float32))
        rows.append(json.dumps({"image": f"{name}.png", "text": words, "face": f"{name}.npy"}))
        picture.save(coco / "val2017" / f"{name}.jpg", quality=95)
        listed.append({"id": number, "file_name": f"{name}.jpg"})
        captions.append({"id": number, "image_id": number, "caption": words})
    (faces / "rows.jsonl").write_text("\n".join(rows) + "\n")
    annotations = {"images": listed, "annotations": captions}
    (coco / "annotations" / "captions_val2017.json").write_text(json.dumps(annotations))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def miniature() -> Callable[[list[str]], int]:
    """`python -m miniature`, in this process."""
    from miniature import __main__ as command

    return command.main


def test_the_trainer_runs_as_on_the_page(
    folder: Path, miniature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miniature import adapters

    paint = adapters.write_pairs
    monkeypatch.setattr(adapters, "write_pairs", lambda rows: paint(rows, count=CAPTIONS))
    ran = []
    for command in run_by(TRAIN):
        words = shlex.split(command)
        if words[0] == "tensorboard":
            seen = run([*words, "--inspect"], folder)
            assert seen.returncode == 0 and "scalars" in seen.stdout, seen.stderr
        elif words[1] == "-c":
            exec(compile(words[2], "page", "exec"), {})
        elif len(words) > 4:
            given = words[3:] if words[2] == "ip_adapter.train" else words[4:]
            steps = "2" if "--resume" in given else "1"
            assert miniature(["train", *given, *SHORT, "--steps", steps]) == 0, command
            ran.append(Path(given[given.index("--out") + 1]))
    written = {str(path.parent): path.name for path in Path("runs").rglob("ip-adapter-*")}
    assert written == {
        "runs/first": "ip-adapter-00000002.safetensors",
        "runs/faces": "ip-adapter-00000001.safetensors",
        "runs/finer": "ip-adapter-00000001.safetensors",
        "runs/miniature": "ip-adapter-00000001.safetensors",
    }
    assert len(ran) == 6 and (folder / "runs/many").is_dir()  # its cache alone


def test_the_evaluator_runs_as_on_the_page(folder: Path, miniature: Any) -> None:
    short = ["--limit", "2", "--pictures", "1", "--steps", "2", "--width", "64", "--height", "64"]
    short += ["--scorer", "local-dir:miniature/models/clip_vision/miniature", "--cpu"]
    (folder / "heldout").symlink_to(folder / "faces")
    rows = (folder / "faces" / "rows.jsonl").read_text().replace('"text"', '"caption"')
    (folder / "faces" / "rows.jsonl").write_text(re.sub(r', "face": "[^"]*"', "", rows))
    for command in run_by(JUDGE):
        words = shlex.split(command)
        if len(words) > 4:
            given = words[3:] if words[2] == "ip_adapter.evaluate" else words[4:]
            assert miniature(["evaluate", *given, *short]) == 0, command
            out = Path(given[given.index("--out") + 1])
            results = json.loads((out / "results.json").read_text())
            assert results["rows"]["adapter"]["clip_i"]["pictures"] == 2
    assert {path.name for path in Path("results").iterdir()} == {"paper", "miniature"}


def test_comfyui_starts_as_on_the_page(tmp_path: Path) -> None:
    """It imports the pack and the miniature, as the demo has linked them, and would now serve."""
    (command,) = run_by(START)
    python, main, *words = shlex.split(command)
    host = find_host()
    assert host is not None and Path(python) == Path(".venv/bin/python")
    assert main == ".host/ComfyUI/main.py"
    base = tmp_path / words[words.index("--base-directory") + 1]
    packs = base / "custom_nodes"
    packs.mkdir(parents=True)
    for name, path in (("ip-adapter", ROOT), ("miniature", ROOT / "miniature")):
        (packs / name).symlink_to(path, target_is_directory=True)
    words[words.index("--base-directory") + 1] = str(base)
    more = ["--quick-test-for-ci", "--database-url", "sqlite:///:memory:"]
    ran = subprocess.run(
        [sys.executable, str(host / "main.py"), *words, *more],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0 and "IMPORT FAILED" not in said, said
    assert "custom_nodes/ip-adapter" in said and "custom_nodes/miniature" in said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("api"), model_files) as started:
        yield started


def test_programs_for_the_api_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each from an empty interpreter, on the shipped graph made small and the server's own port."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    programs = [block for language, block in blocks(text) if language == "python"]
    assert len(programs) == 3
    named = set(re.findall(r"workflows/api/(\w+)\.json", "".join(programs)))
    (tmp_path / "workflows" / "api").mkdir(parents=True)
    for name in named:
        small = json.dumps(shrink(read_prompt(name)))
        (tmp_path / "workflows" / "api" / f"{name}.json").write_text(small)
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "mine.png")
    monkeypatch.chdir(tmp_path)
    for program in programs:
        assert "8188" in program
        exec(compile(program.replace("8188", str(server.port)), "api.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert server.history(said[0])["status"]["completed"]  # others have waited since
    assert [line.split()[0] for line in said[1:]] == ["0.3", "0.6", "0.9"]
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert len(list((server.base / "output" / "weights").glob("0.*.png"))) == 3


HOST_WORDS = [
    "Value not in list",
    "Required input is missing",
    "Prompt outputs failed validation",
    "not found. The custom node may not be installed.",
]


@pytest.mark.parametrize("words", HOST_WORDS)
def test_the_host_says_what_the_page_quotes(words: str) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    host = find_host()
    assert host is not None
    assert f"`{words}`" in page
    assert words in (host / "execution.py").read_text(encoding="utf-8")


def test_a_picture_of_the_recipes_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is made soonest; another processor rounds otherwise."""
    from scripts import doc_pictures

    assert run_by(PICTURES) == ["python -m scripts.doc_pictures"]
    monkeypatch.setattr(doc_pictures, "IMAGES", tmp_path)
    doc_pictures.main(["structure"])
    shown = {path.stem for path in (ROOT / "docs" / "images").glob("recipe_*.png")}
    assert shown == {f"recipe_{name}" for name in doc_pictures.RECIPES}
    made, kept = (
        np.asarray(Image.open(folder / "recipe_structure.png")).astype(float)
        for folder in (tmp_path, ROOT / "docs" / "images")
    )
    assert made.shape == kept.shape and np.abs(made - kept).mean() < 2
