"""The training loop's promises, on a base so small that processes can be killed by the dozen."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ip_adapter import checkpoint
from ip_adapter.adapter import IPAdapter
from ip_adapter.layers import SD15
from ip_adapter.objective import Batch, KeysValues, Nothing, Schedule
from ip_adapter.spec import AdapterSpec, LinearProjection
from ip_adapter.train import loop, recipe, state

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.host.test_train_loop"
WIDTH, ROWS, FEATURES = 8, 12, 6


class ToyBase:
    """A frozen denoiser of one matrix per layer."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(5)
        with torch.inference_mode(False):
            self.schedule = Schedule(torch.linspace(0.99, 0.01, 10))
            self.mix = torch.randn(16, WIDTH, 4 * 2 * 2, generator=drawn)
            self.text = torch.randn(768, 4 * 2 * 2, generator=drawn) * 0.05

    @property
    def device(self) -> torch.device:
        return self.mix.device

    def to(self, device: torch.device) -> ToyBase:
        return self

    def predict(
        self,
        noised: Tensor,
        timesteps: Tensor,
        text: Tensor,
        keys_values: KeysValues,
        *,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
    ) -> Tensor:
        out = noised.flatten(1) * (1 + timesteps[:, None] / 10) + text.mean(1) @ self.text
        for matrix, (key, value) in zip(self.mix, keys_values.values(), strict=False):
            out = out + (key.softmax(1) * value).sum(1) @ matrix
        return out.view_as(noised)


def toy_adapter() -> IPAdapter:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        projection = LinearProjection(FEATURES, 4, 768)
        return IPAdapter(AdapterSpec(SD15, projection, (WIDTH,) * 16, "global"))


def rows(count: int = ROWS) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(7)
    return {
        "latents": torch.randn(count, 4, 2, 2, generator=drawn),
        "text": torch.randn(count, 7, 768, generator=drawn),
        "image": torch.randn(count, FEATURES, generator=drawn),
    }


def source(start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
    """The rows in turn, for ever; each process its consecutive part of a step."""
    data = rows()
    while True:
        mine = torch.arange(start + rank * batch, start + (rank + 1) * batch) % ROWS
        yield {name: tensor[mine] for name, tensor in data.items()}
        start += batch * world


NOTHING = Nothing(text=torch.zeros(1, 7, 768))


def make(**values: Any) -> recipe.Recipe:
    plain = {
        "steps": 6,
        "batch_size": 2,
        "drop_text": 0.2,
        "drop_image": 0.2,
        "learning_rate": 1e-3,
        "save_every": 100,
        "weights": "fp32",
    }
    return recipe.make(plain | values)


def run(out: Path, losses: list[float] | None = None, **options: Any) -> loop.Result:
    values = options.pop("values", {})
    kept: list[float] = [] if losses is None else losses
    options.setdefault("on_step", lambda step: kept.append(step.loss))
    adapter = options.pop("adapter", None) or toy_adapter()
    return loop.train(
        make(**values), ToyBase(), adapter, source, NOTHING, out, is_quiet=True, cpu=True, **options
    )


def optimizer_state(out: Path) -> dict[str, Any]:
    found = state.latest(out)
    assert found is not None
    return torch.load(found[0] / "optimizer.bin", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, moments and counters are equal bit for bit."""
    states = [state.latest(out) for out in (one, other)]
    assert states[0] is not None and states[1] is not None
    assert states[0][1] == states[1][1]
    weights = [load_file(loop.weights_path(out, states[0][1].step)) for out in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    moments = [optimizer_state(out)["state"] for out in (one, other)]
    assert moments[0]
    for number, kept in moments[0].items():
        assert all(torch.equal(kept[name], moments[1][number][name]) for name in kept)


def test_the_weights_written_are_what_was_trained(tmp_path: Path) -> None:
    adapter = toy_adapter()
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    result = run(tmp_path, adapter=adapter, notes={"base_checkpoint": "toy.safetensors"})
    assert result == loop.Result(6, loop.weights_path(tmp_path, 6), True)
    found = checkpoint.read(result.weights)
    assert found.spec.family == SD15 and found.spec.projection == adapter.spec.projection
    built = found.build().state_dict()
    assert built.keys() == adapter.state_dict().keys()
    for key, value in adapter.state_dict().items():
        assert torch.equal(built[key], value) and not torch.equal(before[key], value)
    assert found.metadata["steps"] == "6"
    assert found.metadata["base_model"] == "SD 1.5"
    assert found.metadata["base_checkpoint"] == "toy.safetensors"
    assert json.loads(found.metadata["recipe"])["learning_rate"] == 1e-3
    assert len(found.metadata["recipe_sha256"]) == 64


def test_half_precision_weights_are_the_trained_ones_rounded(tmp_path: Path) -> None:
    adapter = toy_adapter()
    result = run(tmp_path, adapter=adapter, values={"weights": "fp16"})
    for key, value in load_file(result.weights).items():
        assert torch.equal(value, adapter.state_dict()[key].half())


def test_the_loss_falls_on_a_fixed_batch(tmp_path: Path) -> None:
    # The same rows every step; noise and time steps differ, so means are compared.
    losses: list[float] = []
    run(tmp_path, losses, values={"steps": 200, "batch_size": ROWS, "learning_rate": 1e-2})
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    whole: list[float] = []
    parts: list[float] = []
    run(tmp_path / "whole", whole, values={"steps": 9})
    stopped = run(
        tmp_path / "parts",
        parts,
        values={"steps": 9},
        should_stop=lambda: len(parts) == 3,  # asked before the fourth step is reported
    )
    assert stopped == loop.Result(4, loop.weights_path(tmp_path / "parts", 4), False)
    torch.manual_seed(99)  # other weights at first, which the state replaces
    finished = run(tmp_path / "parts", parts, values={"steps": 9}, resume=True)
    assert finished.is_finished
    assert parts == whole
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_with_more_steps_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "one", values={"steps": 3})
    assert run(tmp_path / "one", values={"steps": 3}, resume=True).step == 3
    run(tmp_path / "one", values={"steps": 5, "save_every": 2}, resume=True)
    run(tmp_path / "other", values={"steps": 5})
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_accumulation_sees_the_samples_of_a_large_batch(tmp_path: Path) -> None:
    large: list[float] = []
    small: list[float] = []
    run(tmp_path / "large", large, values={"batch_size": 4})
    run(tmp_path / "small", small, values={"batch_size": 2, "gradient_accumulation": 2})
    np.testing.assert_allclose(small, large, rtol=1e-5)


def test_mixed_precision_keeps_the_adapter_in_float32(tmp_path: Path) -> None:
    rough: list[float] = []
    plain: list[float] = []
    adapter = toy_adapter()
    run(tmp_path / "rough", rough, adapter=adapter, values={"mixed_precision": "bf16"})
    run(tmp_path / "plain", plain)
    assert {weight.dtype for weight in adapter.parameters()} == {torch.float32}
    assert rough != plain
    np.testing.assert_allclose(rough, plain, rtol=0.05)


def test_half_precision_on_the_cpu_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(recipe.RecipeError, match="fp16, which cannot be had here"):
        run(tmp_path, values={"mixed_precision": "fp16"})
    assert run(tmp_path).is_finished


def test_a_run_is_not_overwritten_nor_resumed_with_another_recipe(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(loop.TrainingError, match="already holds a run, saved at step 6"):
        run(tmp_path)
    with pytest.raises(recipe.RecipeError, match=r"learning_rate was 0\.001 and is 0\.002"):
        run(tmp_path, resume=True, values={"learning_rate": 2e-3})


def test_what_on_step_raises_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(step: loop.Step) -> None:
        if step.number == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path / "parts", on_step=interrupt)
    run(tmp_path / "parts", resume=True)
    run(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(tmp_path: Path) -> None:
    def poisoned(start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        for number, good in enumerate(source(start, batch, rank, world)):
            yield dict(good) | ({"image": good["image"] * torch.nan} if number == 3 else {})

    with pytest.raises(loop.TrainingError, match=r"nan at step 4.*state of step 2 is kept"):
        loop.train(
            make(save_every=2, drop_image=0.0, drop_both=0.0),
            ToyBase(),
            toy_adapter(),
            poisoned,
            NOTHING,
            tmp_path,
            is_quiet=True,
            cpu=True,
        )
    found = state.latest(tmp_path)
    assert found is not None and found[1].step == 2


def test_the_simple_design_trains_and_writes_its_projection_alone(tmp_path: Path) -> None:
    adapter = toy_adapter()
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    result = run(tmp_path, adapter=adapter, values={"design": "simple"})
    written = load_file(result.weights)
    assert set(written) == {key for key in before if key.startswith("image_proj.")}
    for key, value in adapter.state_dict().items():
        assert torch.equal(before[key], value) == key.startswith("ip_adapter.")
    fresh = toy_adapter()
    state.read_into(fresh, result.weights)
    assert torch.equal(fresh.image_proj.proj.weight, adapter.image_proj.proj.weight)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files cannot grow beyond `limit` bytes: the write itself fails, wherever it happens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# TensorBoard's own thread dies of a full disk, too; the run must not.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("limit", [0, 100, 500_000, 1_000_000])
def test_a_full_disk_loses_nothing(tmp_path: Path, limit: int) -> None:
    run(tmp_path / "parts", values={"steps": 3})
    kept = {p: p.read_bytes() for p in (tmp_path / "parts").rglob("*") if p.is_file()}
    kept = {path: content for path, content in kept.items() if "log" not in path.parts}

    with full_disk(limit), pytest.raises(state.SaveError, match=r"could not be written.*untouched"):
        run(tmp_path / "parts", resume=True, values={"steps": 6})
    for path, content in kept.items():
        assert path.read_bytes() == content
    assert not list((tmp_path / "parts").rglob(".*"))  # nothing half written is left
    run(tmp_path / "parts", resume=True)
    run(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_save_in_between_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = state.save_file
    calls: list[int] = []

    def sometimes(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(state, "save_file", sometimes)
    assert run(tmp_path / "one", values={"save_every": 2}).is_finished
    assert "No space left on device" in caplog.text
    assert not loop.weights_path(tmp_path / "one", 4).exists()
    monkeypatch.undo()
    run(tmp_path / "other")
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_a_state_without_its_last_file_is_passed_over(tmp_path: Path) -> None:
    run(tmp_path, values={"steps": 3})
    newer = tmp_path / state.STATES / "step-00000005"
    newer.mkdir()
    (newer / "model.safetensors").write_bytes(b"half")
    found = state.latest(tmp_path)
    assert found is not None and found[1].step == 3


def start(out: Path, script: str, processes: int = 1, **values: Any) -> list[subprocess.Popen[str]]:
    """Start this very file as training processes that talk by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    plain = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST")}
    plain |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    many = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", MODULE, script, str(out), json.dumps(values)],
            cwd=ROOT,
            env=plain
            | (many | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]


def test_two_processes_equal_one_at_the_same_global_batch(tmp_path: Path) -> None:
    losses: list[float] = []
    finish(start(tmp_path / "two", "train", processes=2, batch_size=2))
    run(tmp_path / "one", losses, values={"batch_size": 4})
    theirs = json.loads((tmp_path / "two" / "losses.json").read_text())
    np.testing.assert_allclose(theirs, losses, rtol=1e-5)
    ours, other = (load_file(loop.weights_path(tmp_path / name, 6)) for name in ("one", "two"))
    for key, value in ours.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-5)


def test_killed_and_resumed_equals_never_killed(tmp_path: Path) -> None:
    (running,) = start(tmp_path / "parts", "slowly", steps=400, save_every=3)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "parts" / state.STATES).glob("step-*")):
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    found = state.latest(tmp_path / "parts")
    assert found is not None
    steps = found[1].step + 5
    run(tmp_path / "parts", values={"steps": steps}, resume=True)
    run(tmp_path / "whole", values={"steps": steps})
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def _process(script: str, out: Path, values: dict[str, Any]) -> None:
    """What a process of `start` does."""
    torch.set_num_threads(1)
    losses: list[float] = []
    report: Callable[[loop.Step], None] = lambda step: losses.append(step.loss)  # noqa: E731
    if script == "slowly":
        report = lambda step: time.sleep(0.02)  # noqa: E731
    run(out, values=values, resume=script == "resume", on_step=report)
    if losses:
        (out / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    _process(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
