"""docs/miniature.md against the code and the files: words, sizes, parts, commands."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from ip_adapter.evaluate.data import read_samples
from miniature import adapters, family, recipe, world
from tests.conftest import ROOT
from tests.test_docs import plain, rows


@pytest.fixture(scope="module")
def miniature() -> str:
    return (ROOT / "docs" / "miniature.md").read_text(encoding="utf-8")


def test_it_has_the_words_of_the_world(miniature: str) -> None:
    listed = {cells[0]: cells[1].partition(";")[0] for cells in rows(miniature, "attribute")}
    tables = (world.TEXTURES, world.COLOURS, world.SHAPES, world.PLACES, world.GROUNDS)
    names = ("texture", "colour", "shape", "place", "ground")
    assert listed == {n: ", ".join(table) for n, table in zip(names, tables, strict=True)}


def test_its_sizes_are_those_of_the_files(miniature: str) -> None:
    listed = rows(miniature, "file")
    named = [family.BASE, family.FINE_TUNE, family.CONTROLNET, family.CLIP_VISION]
    named += [adapters.path(kind) for kind in adapters.KINDS]
    assert [family.MODELS.parent / cells[0].strip("`") for cells in listed] == named
    for path, (_, _, parameters, megabytes) in zip(named, listed, strict=True):
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_tensor(key).numel() for key in file.keys()]  # noqa: SIM118
        assert parameters == f"{sum(shapes) / 1e6:.2f}", path.name
        assert megabytes == f"{path.stat().st_size / 1e6:.1f}", path.name


def test_it_lists_every_part_with_what_it_needs_and_how_long_it_trains(miniature: str) -> None:
    found: dict[str, tuple[str, str, str, str]] = {}
    for part, needs, steps, batch, source, _ in rows(miniature, "part"):
        first, _, last = part.replace("`", "").partition(" to ")
        names = [first]
        if last:
            names = [f"{first[:-1]}{number}" for number in range(int(last[-1]) + 1)]
        found |= {name: (needs, steps, batch, source) for name in names}
    assert list(found) == sorted(recipe.PARTS, key=list(found).index)
    for name, part in recipe.PARTS.items():
        needs = [word for word in re.findall(r"`(\w+)`", found[name][0])]
        assert tuple(needs) == part.needs, name
    base, control = constants("base"), constants("control")
    clip, own = constants("clip"), constants("adapters")
    expected = {
        "vae": (constants("vae")["STEPS"], None, None),
        "decoder": (constants("vae")["REFINING"], None, None),
        "clip": (clip["STEPS"], clip["ALIKE"] * clip["GROUPS"], None),
        "base": (base["STEPS"], base["BATCH"], base["PICTURES"]),
        "fine_tune": (base["FINE_STEPS"], base["BATCH"], base["FINE_PICTURES"]),
        "control": (control["STEPS"], control["BATCH"], control["PICTURES"]),
    }
    expected |= {
        f"{kind}_{seed}": (own["STEPS"], adapters.FIELDS["batch_size"], own["PAIRS"])
        for kind in adapters.KINDS
        for seed in adapters.SEEDS
    }
    assert expected.keys() == found.keys() - {"checkpoint", "pairs"}
    for name, (steps, batch, pictures) in expected.items():
        _, listed, in_each, source = found[name]
        assert listed.removesuffix(" each") == f"{steps:,}", name
        assert batch is None or in_each == str(batch), name
        assert pictures is None or f"{pictures:,} p" in source, name
    assert f"{own['PAIRS']:,} pairs" in found["pairs"][3]
    assert f"; {constants('denoise')['DROPPED']:.0%}".replace("%", " %") in plain(miniature)
    assert f"--steps {own['STEPS']} " in miniature
    assert float(adapters.FIELDS["learning_rate"]) == 5e-4 and "(5e-4 instead" in miniature


def constants(module: str) -> dict[str, object]:
    """Numbers at the top of a file of the miniature, which may need the host to be imported."""
    found: dict[str, object] = {}
    for node in ast.parse((ROOT / "miniature" / f"{module}.py").read_text()).body:
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        values = node.value.elts if isinstance(target, ast.Tuple) else [node.value]  # type: ignore[attr-defined]
        for name, value in zip(names, values, strict=False):
            if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                found[name.id] = value.value
    return found


def test_its_code_paints_samples_for_the_evaluator(
    miniature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", miniature, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "miniature.md", "exec"), {})
    lines = (tmp_path / "heldout" / "rows.jsonl").read_text().splitlines()
    samples, _ = read_samples(tmp_path / "heldout" / "rows.jsonl", None)
    assert len(samples) == len(lines) == 50
    for line in lines:
        texture, colour, shape, *_ = json.loads(line)["caption"].split()
        scene = world.Scene(shape, texture, colour, "centre", "white", (0, 0, 0, 0))
        assert world.is_held_out(scene)


def test_its_commands_have_options_that_exist(
    miniature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ip_adapter.evaluate import __main__ as evaluate
    from ip_adapter.train import __main__ as train

    for name, tool in (("train", train), ("evaluate", evaluate)):
        (command,) = re.findall(rf"    python -m miniature {name} ((?:.*\\\n)*.*)", miniature)
        given = set(re.findall(r"--[a-z-]+", command))
        with pytest.raises(SystemExit, match="0"):
            tool.main(["--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert given and given <= known
        for file in re.findall(r"miniature/models/\S+", command):
            assert (ROOT / file).exists()
