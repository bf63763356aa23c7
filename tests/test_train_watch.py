"""What is watched in a training: each number against its formula written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from ip_adapter.errors import IPAdapterError
from ip_adapter.layers import SD15, SDXL
from ip_adapter.objective import Nothing, Schedule
from ip_adapter.train import board, journal, watch

ALPHAS = torch.linspace(0.999, 0.01, 50)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Trainee(nn.Module):
    """One layer whose key is the features and whose value is their double."""

    def forward(self, image: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        return {1: (image[:, None], 2 * image[:, None])}


class Base:
    """Predicts the noised latent plus the means of text, key and value; asks for its schedule."""

    schedule = Schedule(ALPHAS)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rows: list[int] = []

    def predict(
        self,
        noised: Tensor,
        timesteps: Tensor,
        text: Tensor,
        keys_values: Any,
        *,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
        record: Any = None,
    ) -> Tensor:
        self.rows.append(len(noised))
        key, value = keys_values[1]
        if record is not None:
            record(1, text, key)
        added = text.mean(dim=(1, 2)) + key.mean(dim=(1, 2)) + value.mean(dim=(1, 2))
        return noised + added[:, None, None, None]


def rows(count: int) -> dict[str, Tensor]:
    return {
        "latents": noise(count, 4, 2, 2, seed=1),
        "text": noise(count, 3, 5, seed=2),
        "image": noise(count, 6, seed=3),
    }


def plain(held: watch.HeldOut, image: Tensor) -> Tensor:
    """The loss of each row, one row and draw at a time."""
    out = []
    for i in range(len(image)):
        losses = []
        for eps, t in zip(held.noise[:, i], held.timesteps[:, i], strict=True):
            a = ALPHAS[t]
            x = a.sqrt() * held.rows["latents"][i] + (1 - a).sqrt() * eps
            found = x + held.rows["text"][i].mean() + 3 * image[i].mean()
            losses.append(((found - eps) ** 2).mean())
        out.append(torch.stack(losses).mean())
    return torch.stack(out)


@pytest.mark.parametrize("empty", [None, torch.full((1, 6), 0.3)])
def test_validation_is_the_plain_loss_with_three_references(empty: Tensor | None) -> None:
    held = watch.hold_out(rows(5), schedule=50, draws=3, seed=4)
    base, nothing = Base(), Nothing(text=torch.zeros(1, 3, 5), image=empty)
    found = watch.validate(Trainee(), base, held, nothing, batch_size=2)
    image = held.rows["image"]
    right, other = plain(held, image), plain(held, image[list(held.others)])
    none = plain(held, torch.zeros(5, 6) if empty is None else empty.expand(5, 6))
    assert found.reference == pytest.approx(float(right.mean()), rel=1e-5)
    assert found.none == pytest.approx(float(none.mean()), rel=1e-5)
    assert found.shuffled == pytest.approx(float(other.mean()), rel=1e-5)
    for value, error, difference in (
        (found.gain, found.gain_error, none - right),
        (found.margin, found.margin_error, other - right),
    ):
        spread = ((difference - difference.mean()) ** 2).sum() / 4
        assert value == pytest.approx(float(difference.mean()), rel=1e-4)
        assert error == pytest.approx(math.sqrt(float(spread) / 5), rel=1e-4)
    assert base.rows == [2, 2, 1] * 3 * 3


def test_validation_leaves_the_rows_alone_and_repeats_itself() -> None:
    given_rows = rows(4)
    before = {name: tensor.clone() for name, tensor in given_rows.items()}
    nothing = Nothing(text=torch.zeros(1, 3, 5))
    first, second = (
        watch.validate(Trainee(), Base(), watch.hold_out(given_rows, schedule=50), nothing)
        for _ in range(2)
    )
    assert first == second
    assert all(torch.equal(before[name], given_rows[name]) for name in before)


def test_timesteps_come_one_from_each_part_of_the_schedule() -> None:
    held = watch.hold_out(rows(5), schedule=1000, draws=4, seed=1)
    parts = sorted((held.timesteps.flatten() // 50).tolist())
    assert parts == list(range(20))
    again = watch.hold_out(rows(5), schedule=1000, draws=4, seed=1)
    assert torch.equal(held.noise, again.noise) and torch.equal(held.timesteps, again.timesteps)
    assert not torch.equal(held.noise, watch.hold_out(rows(5), seed=2).noise)


@given(count=st.integers(2, 40), seed=st.integers(0, 1000))
def test_a_derangement_moves_everything_and_loses_nothing(count: int, seed: int) -> None:
    order = watch.derangement(count, seed)
    assert sorted(order) == list(range(count))
    assert all(i != other for i, other in enumerate(order))
    assert order == watch.derangement(count, seed)


def test_one_row_cannot_be_shuffled() -> None:
    with pytest.raises(IPAdapterError, match="1 row; needed are 2 or more"):
        watch.hold_out(rows(1))


def test_branch_sizes_are_ratios_of_norms_over_all_passes() -> None:
    sizes = watch.BranchSizes()
    text, image = noise(2, 7, 4, seed=5), 0.2 * noise(2, 7, 4, seed=6)
    for part in (slice(0, 3), slice(3, 7)):
        sizes(9, text[:, part], image[:, part])
    sizes(1, text.half(), torch.zeros_like(text).half())
    wanted = torch.linalg.vector_norm(image) / torch.linalg.vector_norm(text)
    assert sizes.ratios()[9] == pytest.approx(float(wanted), rel=1e-5)
    assert sizes.ratios()[1] == 0


def test_sizes_are_measured_with_the_right_reference_only() -> None:
    held = watch.hold_out(rows(4), schedule=50)
    sizes = watch.BranchSizes()
    nothing = Nothing(text=torch.zeros(1, 3, 5))
    watch.validate(Trainee(), Base(), held, nothing, sizes=sizes)
    image, text = (torch.linalg.vector_norm(held.rows[name]) for name in ("image", "text"))
    assert sizes.ratios() == {1: pytest.approx(float(image / text), rel=1e-5)}


def test_layers_are_named_by_their_place() -> None:
    found = watch.named({1: 0.5, 31: 0.25}, SD15)
    assert found == {
        "image_over_text/input 1.0": 0.5,
        "image_over_text/middle 0.0": 0.25,
    }
    assert len(watch.named(dict.fromkeys(range(1, 140), 0.1), SDXL)) == 70


@pytest.mark.parametrize(
    ("gain", "margin", "said"),
    [
        (0.02, 0.01, "the right reference helps"),
        (0.02, 0.001, "a reference helps, but any other does as well"),
        (-0.02, 0.001, "the reference is not used yet"),
    ],
)
def test_what_validation_means_is_said(gain: float, margin: float, said: str) -> None:
    found = watch.Validation(0.1, 0.1 + gain, 0.1 + margin, gain, 0.001, margin, 0.001)
    assert found.in_words().startswith(said + ": ")
    assert f"{gain:+.5f}" in found.in_words() and f"{margin:+.5f}" in found.in_words()


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([0.01, 0.02, 0.3], "still small"),
        ([0.01, 0.2, 0.3], "of healthy size"),
        ([0.2, 0.8, 0.9], "is large"),
        ([], "no image branch was seen"),
    ],
)
def test_what_sizes_mean_is_said(ratios: list[float], said: str) -> None:
    assert said in watch.in_words(dict(enumerate(ratios)))


def test_the_log_keeps_numbers_and_forgets_steps_that_come_again(tmp_path: Path) -> None:
    log = journal.Log(tmp_path)
    for step in (1, 2, 3):
        log.numbers(step, {"loss": step / 4, "bad": float("nan")})
    with log.file.open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed here
    log.close()
    log = journal.Log(tmp_path, step=2)
    log.numbers(3, {"loss": 9.0})
    log.close()
    lines = [json.loads(line) for line in log.file.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.25, "bad": None},
        {"step": 2, "loss": 0.5, "bad": None},
        {"step": 3, "loss": 9.0},
    ]
    assert journal.read_log(log.file) == lines
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pictures_are_written_in_eight_bit(tmp_path: Path) -> None:
    log = journal.Log(tmp_path)
    pixels = torch.tensor([[[0.0, 0.5, 1.0], [2.0, -1.0, 0.2]]])
    path = log.picture(12, "samples", pixels)
    log.close()
    assert path.name == "samples_0000012.png"
    with Image.open(path) as picture:
        assert np.asarray(picture).tolist() == [[[0, 128, 255], [255, 0, 51]]]


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = journal.Log(tmp_path)
    log.numbers(5, {"loss": 0.75})
    log.picture(5, "samples", torch.zeros(4, 4, 3))
    log.close()
    events = EventAccumulator(str(tmp_path / "log" / "watch"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(5, 0.75)]
    assert [one.step for one in events.Images("samples")] == [5]


def test_without_tensorboard_there_is_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board.importlib.util, "find_spec", lambda name: None)
    log = journal.Log(tmp_path)
    log.numbers(1, {"loss": 0.5})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["watch.jsonl"]
