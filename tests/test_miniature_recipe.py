"""How the miniature is made: training loop, pairs for the adapters, order of the parts, files."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ip_adapter.objective import Schedule
from ip_adapter.train import data
from miniature import __main__ as command
from miniature import adapters, denoise, family, process, recipe, world
from tests.tolerance import assert_close

ALPHAS = torch.tensor([0.999, 0.95, 0.8, 0.5, 0.1])
SIGNAL_TO_NOISE = [0.999 / 0.001, 0.95 / 0.05, 0.8 / 0.2, 0.5 / 0.5, 0.1 / 0.9]
"""The first two are beyond 5, so they count less."""


class Toy(nn.Module):
    """Predicts the noise as a multiple of what it is given, for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1))
        self.shift = nn.Parameter(torch.zeros(4, 1, 1))


@dataclass
class Watch:
    """What a training of a toy did, step by step."""

    toy: Toy = field(default_factory=Toy)
    before: list[dict[str, Tensor]] = field(default_factory=list)
    noised: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    numbers: list[list[int]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    shown: list[dict[str, float]] = field(default_factory=list)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.toy.state_dict().items()}

    def show(self, *, step: int, **figures: Tensor) -> None:
        self.shown.append({name: float(value.detach()) for name, value in figures.items()})

    def predict(
        self, noised: Tensor, timesteps: Tensor, text: Tensor, numbers: list[int]
    ) -> Tensor:
        assert text.shape == (len(noised), 77, 2)
        self.before.append(self.weights())
        self.noised.append(noised)
        self.timesteps.append(timesteps)
        self.numbers.append(numbers)
        return noised * self.toy.factor + self.toy.shift

    def texts(self, captions: Sequence[str]) -> Tensor:
        self.captions += captions
        return torch.zeros(len(captions), 77, 2)


SCENES = [world.draw(random.Random(number)) for number in range(12)]
ROWS = denoise.Rows(SCENES, torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Tensor], Watch]]:
    monkeypatch.setattr(family, "device", lambda: torch.device("cpu"))

    def run(**how: Any) -> tuple[dict[str, Tensor], Watch]:
        watch = Watch()
        monkeypatch.setattr(denoise.progress, "show", watch.show)
        made = denoise.train(
            "Toy",
            watch.toy,
            watch.predict,
            ROWS,
            watch.texts,  # type: ignore[arg-type]
            Schedule(ALPHAS),
            **how,
        )
        return made, watch

    return run


def test_a_step_s_loss_is_the_weighted_error_of_the_noise(train: Any) -> None:
    _, watch = train(steps=3, batch=10)
    for step in range(3):
        rows = []
        for place, number in enumerate(watch.numbers[step]):
            moment = int(watch.timesteps[step][place])
            alpha, noised = float(ALPHAS[moment]), watch.noised[step][place]
            noise = (noised - alpha**0.5 * ROWS.latents[number]) / (1 - alpha) ** 0.5
            assert float(noise.std()) == pytest.approx(1.0, abs=0.2)
            before = watch.before[step]
            error = (noised * before["factor"] + before["shift"] - noise).square().mean()
            rows.append((float(error), min(1.0, 5.0 / SIGNAL_TO_NOISE[moment])))
        plain = sum(error for error, _ in rows) / 10
        weighted = sum(error * share for error, share in rows) / 10
        assert watch.shown[step]["error"] == pytest.approx(plain, rel=1e-4)
        assert watch.shown[step]["loss"] == pytest.approx(weighted, rel=1e-4)
        assert weighted < 0.8 * plain


def test_time_steps_are_spread_over_the_whole_schedule(train: Any) -> None:
    _, watch = train(steps=2, batch=10)
    # 10 rows on 5 time steps: two in each fifth.
    assert all(row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] for row in watch.timesteps)


def test_what_is_kept_is_the_average_of_the_weights(train: Any) -> None:
    made, watch = train(steps=12, batch=4)
    after = [*watch.before[1:], watch.weights()]
    average = watch.before[0]
    for step, now in enumerate(after):
        kept = min(0.999, (1 + step) / (10 + step))
        average = {name: kept * average[name] + (1 - kept) * now[name] for name in now}
    for name, tensor in made.items():
        assert_close(tensor, average[name])
        assert not torch.equal(tensor, after[-1][name])


def test_the_learning_rate_rises_for_a_twentieth_and_falls_to_nothing(train: Any) -> None:
    """AdamW's steps on one weight are no larger than the rate, but for the decay."""
    _, watch = train(steps=40, batch=4, rate=1e-2)
    factors = torch.stack([*(w["factor"] for w in watch.before), watch.weights()["factor"]])
    moved = (factors[1:] - factors[:-1]).abs().amax((1, 2, 3))
    assert float(moved[0]) == pytest.approx(1e-2 / 25, rel=0.05)
    assert float(moved.max()) <= 1.05e-2 and int(moved.argmax()) < 10
    assert float(moved[-1]) < 1e-5


def test_seeds_decide_a_training(train: Any) -> None:
    (first, one), (again, two), (other, three) = (
        train(steps=4, batch=4, seed=s) for s in (5, 5, 6)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert one.captions == two.captions and one.numbers == two.numbers
    assert not torch.equal(first["factor"], other["factor"]) and one.numbers != three.numbers


def test_texts_name_what_is_there_and_some_rows_see_none(train: Any) -> None:
    _, watch = train(steps=40, batch=50)
    rows = list(itertools.chain.from_iterable(watch.numbers))
    assert len(watch.captions) == len(rows) == 2000
    for number, text in zip(rows, watch.captions, strict=True):
        scene = SCENES[number]
        true = {scene.shape, scene.texture, scene.colour, scene.place, scene.ground, "thing", "on"}
        assert set(text.split()) <= true
    # 0.12 by drop, 0.3 ** 5 of the others by chance; four standard deviations either way.
    empty = sum(not text for text in watch.captions) / 2000
    assert empty == pytest.approx(0.12 + 0.88 * 0.3**5, abs=0.03)


def test_rows_are_encoded_as_the_unet_sees_them() -> None:
    class Encoder(nn.Module):
        def encode(self, pictures: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(pictures, 8)

    vae = SimpleNamespace(first_stage_model=Encoder())
    plain, outlined = (denoise.paint(35, vae, 3, outlined=line) for line in (False, True))
    assert plain.scenes == outlined.scenes and len(set(plain.scenes)) == 35
    assert not any(world.is_held_out(scene) for scene in plain.scenes)
    for rows, line in ((plain, False), (outlined, True)):
        pictures = world.render(rows.scenes, outlined=line)
        blocks = pictures.unflatten(2, (8, 8)).unflatten(4, (8, 8)).mean((3, 5))
        assert_close(rows.latents, 0.18215 * (2 * blocks - 1), relative=1e-4)
    assert denoise.paint(4, vae, 4).scenes != plain.scenes[:4]


def test_states_of_a_caption_are_computed_once() -> None:
    class Clip:
        asked: list[str] = []  # noqa: RUF012 - one for the test

        def tokenize(self, text: str) -> str:
            self.asked.append(text)
            return text

        def encode_from_tokens(self, text: str, return_pooled: bool) -> tuple[Tensor, None]:
            return torch.full((1, 77, 2), float(len(text))), None

    texts = denoise.Texts(Clip())
    assert texts(["red", "", "red"])[:, 0, 0].tolist() == [3.0, 0.0, 3.0]
    assert texts(["red"]).dtype == torch.float32 and Clip.asked == ["red", ""]


# The pairs of the adapters


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> dict[str, world.Scene]:
    """Scenes by the file they are painted into."""
    seen: dict[str, world.Scene] = {}
    save = adapters.save

    def spy(file: Path, scene: world.Scene) -> None:
        seen[file.name] = scene
        save(file, scene)

    monkeypatch.setattr(adapters, "save", spy)
    return seen


def test_pairs_are_rows_for_the_trainer(tmp_path: Path, painted: dict[str, world.Scene]) -> None:
    path = adapters.write_pairs(tmp_path / "pairs" / "rows.jsonl", 60, seed=3)
    rows = data.check(data.read(path))
    assert len(rows) == 60 and len(painted) == len(list(path.parent.glob("*.png")))
    alone = 0
    for row in rows:
        target = painted[row.image.path.name]
        assert not world.is_held_out(target)
        true = {getattr(target, name) for name in world.NAMED} | {"thing", "on"}
        assert set(row.text.split()) <= true
        if row.reference is None:
            alone += 1
            continue
        reference = painted[row.reference.path.name]
        assert not world.is_held_out(reference) and reference != target
        assert all(getattr(reference, name) == getattr(target, name) for name in world.LOOK)
        assert reference.marks == target.marks
    assert 18 <= alone <= 42  # of 60, by a coin
    assert len({row.text for row in rows}) > 30 and any(not row.text for row in rows)


def test_pairs_show_their_scenes(tmp_path: Path, painted: dict[str, world.Scene]) -> None:
    adapters.write_pairs(tmp_path / "rows.jsonl", 3)
    for name, scene in painted.items():
        with Image.open(tmp_path / name) as picture:
            found = torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255
        assert found.shape == (3, 64, 64)
        assert float((found - world.render([scene])[0]).abs().max()) <= 0.5 / 255 + 1e-6


def test_equal_seeds_paint_equal_pairs(tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        rows = adapters.write_pairs(tmp_path / name / "rows.jsonl", 4, seed)
        return {path.name: path.read_bytes() for path in sorted(rows.parent.iterdir())}

    assert files("one", 0) == files("two", 0) != files("three", 1)


# The parts and their order


@dataclass
class Studio:
    """Stands for the trainings: each is a process that leaves an empty file."""

    parts: dict[str, recipe.Part]
    scripts: dict[str, str] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        part = self.parts[name]
        for need in part.needs:
            assert self.parts[need].made.exists(), f"{name} began before {need} was done"
        self.started.append(name)
        self.running.append(1 + sum(one.poll() is None for one in self.processes.values()))
        part.made.parent.mkdir(parents=True, exist_ok=True)
        script = self.scripts.get(name, 'echo >"$0"')
        self.processes[name] = subprocess.Popen(["sh", "-c", script, str(part.made)])
        return self.processes[name]


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    parts = {
        name: replace(part, made=tmp_path / ("models" if part.is_shipped else "build") / name)
        for name, part in recipe.PARTS.items()
    }
    monkeypatch.setattr(family, "BUILD", tmp_path / "build")
    made = Studio(parts)
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr(command, "_start", made.start)
    hurried = SimpleNamespace(sleep=lambda _: time.sleep(0.005), monotonic=time.monotonic)
    monkeypatch.setattr(command, "time", hurried)
    return made


def test_everything_is_trained_once_after_what_it_needs(studio: Studio) -> None:
    assert command.main([]) == 0
    assert sorted(studio.started) == sorted(recipe.PARTS)
    assert max(studio.running) == 2
    for name, part in recipe.PARTS.items():
        places = [studio.started.index(need) for need in part.needs]
        assert all(place < studio.started.index(name) for place in places)


def test_what_is_there_is_not_trained_again_unless_asked_for(studio: Studio) -> None:
    assert command.main([]) == 0
    studio.started.clear()
    assert command.main([]) == 0 and studio.started == []
    assert command.main(["clip"]) == 0 and studio.started == []
    assert command.main(["clip", "--again"]) == 0 and studio.started == ["clip"]
    studio.parts["control"].made.unlink()
    assert command.main([]) == 0 and studio.started == ["clip", "control"]


def test_a_clone_has_all_that_is_needed(studio: Studio) -> None:
    assert command.main([]) == 0
    studio.started.clear()
    shutil.rmtree(studio.parts["vae"].made.parent)  # nothing in it is shipped
    assert command.main([]) == 0 and studio.started == []
    studio.parts["plus_1"].made.unlink()
    assert command.main([]) == 0
    assert studio.started == ["vae", "decoder", "pairs", "plus_1"]


def test_a_failed_training_ends_the_others(
    studio: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    studio.scripts |= {"vae": "exit 3", "clip": "exec sleep 60"}
    assert command.main([]) == 1
    assert "miniature: vae failed" in capsys.readouterr().err
    assert studio.started == ["vae", "clip"]
    assert studio.processes["clip"].wait(10) < 0, "it was left to run"


def test_an_unknown_part_is_refused(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["clip", "hat"])
    message = capsys.readouterr().err
    assert "there is no part 'hat'" in message and ", ".join(recipe.PARTS) in message
    assert studio.started == []


def test_a_part_is_trained_in_the_process_that_is_started_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    part = recipe.Part(Path("nowhere"), (), lambda: ran.append("it"))
    monkeypatch.setattr(command, "PARTS", {"one": part})
    assert command.main(["one", "--here"]) == 0 and ran == ["it"]


def test_a_training_is_a_process_with_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}
    popen = SimpleNamespace(Popen=lambda given, env: seen.update(given=given, env=env))
    monkeypatch.setattr(command, "subprocess", popen)
    command._start("base")
    assert seen["given"] == [sys.executable, "-m", "miniature", "base", "--here"]
    assert seen["env"]["OMP_NUM_THREADS"] == "1"


def test_the_trainer_s_file_becomes_the_shipped_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    made = tmp_path / "new" / "adapters"  # never among the real ones

    def fake(kind: str, models: object, rows: Path, out: Path, *, seed: int) -> Path:
        asked.append((kind, rows, seed))
        out.mkdir(parents=True)
        (out / "weights").write_text("new")
        return out / "weights"

    monkeypatch.setattr(recipe, "PAIRS", tmp_path / "pairs" / "rows.jsonl")
    monkeypatch.setattr(adapters, "path", lambda kind, seed: made / f"{kind}_{seed}")
    monkeypatch.setattr(adapters, "train", fake)
    monkeypatch.setattr(process, "start", lambda: None)
    monkeypatch.setattr(process, "load", lambda: None)
    for _ in range(2):  # the second time over what the first has left
        recipe.PARTS["plus_1"].train()
    assert (made / "plus_1").read_text() == "new"
    assert asked == [("plus", tmp_path / "pairs" / "rows.jsonl", 1)] * 2
