"""The evaluator's run, killed at any moment, and its report; without a host."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ip_adapter.errors import ImageError
from ip_adapter.evaluate import evaluation, report
from ip_adapter.evaluate.data import DataCard, Sample, read_samples
from ip_adapter.evaluate.errors import ProtocolError
from ip_adapter.evaluate.evaluation import Score, evaluate, read_scores
from ip_adapter.evaluate.protocol import (
    CONDITIONS,
    Protocol,
    Scoring,
)
from tests.evaluate_parts import CARD, SIZE, Painter, fake, fields, make_protocol, word, write_data


@pytest.fixture
def given(tmp_path: Path) -> tuple[list[Sample], Protocol]:
    samples, card = read_samples(write_data(tmp_path / "data"))
    return samples, make_protocol(card)


# ---- the run ------------------------------------------------------------------------------------


def run(given: tuple[list[Sample], Protocol], folder: Path, painter: Painter) -> list[Score]:
    samples, plan = given
    return evaluate(plan, samples, clip=fake(), generator=painter, folder=folder)


def untimed(scores: Sequence[Score]) -> list[Score]:
    return [replace(score, seconds=None) for score in scores]


def test_figures_are_those_of_the_written_pictures(
    given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    painter = Painter()
    scores = run(given, tmp_path / "out", painter)
    assert len(scores) == 3 * 3 * 2
    samples = {sample.id: sample for sample in given[0]}
    for score in scores:
        made = fields(Image.open(tmp_path / "out" / score.picture)).double().numpy()
        own = fields(Image.open(samples[score.sample].image)).double().numpy()
        said = word(samples[score.sample].caption).double().numpy()
        for found, target in ((score.clip_i, own), (score.clip_t, said)):
            cosine = made @ target / np.linalg.norm(made) / np.linalg.norm(target)
            assert found == pytest.approx(float(cosine), abs=1e-6)
        assert f"{score.sample}_{score.k}_seed{score.seed}.png" in score.picture
        assert score.condition.replace(" ", "-") in score.picture


def test_all_conditions_have_the_same_seeds(
    given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    painter = Painter()
    run(given, tmp_path / "out", painter)
    seeds: dict[str, set[tuple[int, ...]]] = {}
    for row, drawn, _ in painter.calls:
        seeds.setdefault(row.sample.id, set()).add(drawn)
    assert all(len(drawn) == 1 for drawn in seeds.values())
    assert len({drawn for one in seeds.values() for drawn in one}) == 3


def test_a_plain_function_generates_too(
    given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    samples, plan = given
    one = evaluate(
        plan, samples, clip=fake(), generator=Painter().generate, folder=tmp_path / "one"
    )
    assert untimed(one) == untimed(run(given, tmp_path / "two", Painter()))


def test_a_second_run_makes_nothing(given: tuple[list[Sample], Protocol], tmp_path: Path) -> None:
    first = run(given, tmp_path / "out", Painter())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    painter = Painter()
    assert run(given, tmp_path / "out", painter) == first
    assert painter.calls == []
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}


class Killed(BaseException):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """Stop the process, as it were, before the so-many-th time that something reaches the disk."""
    left = [after]
    original = os.fsync

    def sync(descriptor: int) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        original(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    return monkeypatch.undo


def test_killed_at_any_moment_and_resumed_equals_never_killed(
    given: tuple[list[Sample], Protocol], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments: protocol, features, 18 pictures and 9 batches of scores reach the disk."""
    whole = untimed(run(given, tmp_path / "whole", Painter()))
    wanted = {
        p.relative_to(tmp_path / "whole"): p.read_bytes()
        for p in (tmp_path / "whole").rglob("*.png")
    }
    for moment in range(2 + 18 + 9):
        folder = tmp_path / str(moment)
        undo = interrupt(monkeypatch, moment)
        with pytest.raises(Killed):
            run(given, folder, Painter())
        undo()
        found = run(given, folder, Painter())
        assert untimed(found) == whole, moment
        assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")} == wanted
        assert len(read_scores(folder / "scores.jsonl")) == len(whole)
        assert not list(folder.rglob(".*"))


def test_half_a_line_is_cut_off_and_scored_again(
    given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    whole = untimed(run(given, tmp_path / "out", Painter()))
    file = tmp_path / "out" / "scores.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for rest in (b"", lines[7][:-1], lines[7][:20]):
        file.write_bytes(b"".join(lines[:7]) + rest)
        painter = Painter()
        assert untimed(run(given, tmp_path / "out", painter)) == whole
        assert painter.calls == [], "pictures that are there are not made again"
        assert len(read_scores(file)) == len(whole)


def test_a_damaged_line_is_named(given: tuple[list[Sample], Protocol], tmp_path: Path) -> None:
    run(given, tmp_path / "out", Painter())
    file = tmp_path / "out" / "scores.jsonl"
    lines = file.read_text().splitlines()
    lines[3] = '{"sample": "p0"}'
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ProtocolError, match=r"scores\.jsonl line 4 is no score"):
        run(given, tmp_path / "out", Painter())


def test_another_protocol_in_the_same_folder_is_refused(
    given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    samples, plan = given
    run(given, tmp_path / "out", Painter())
    other = replace(plan, sampling=replace(plan.sampling, steps=20, negative="blurry"))
    painter = Painter()
    with pytest.raises(ProtocolError, match="was begun with another protocol") as caught:
        run((samples, other), tmp_path / "out", painter)
    assert "  sampling.negative: '' there, 'blurry' now\n" in str(caught.value)
    assert "  sampling.steps: 50 there, 20 now\n" in str(caught.value)
    assert "sampling.guidance" not in str(caught.value) and painter.calls == []


def test_a_folder_without_its_protocol_is_refused(
    given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    run(given, tmp_path / "out", Painter())
    (tmp_path / "out" / "protocol.json").unlink()
    with pytest.raises(ProtocolError, match=r"holds scores but no protocol\.json"):
        run(given, tmp_path / "out", Painter())


def test_a_scorer_that_the_protocol_does_not_name_is_refused(
    given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    samples, plan = given
    with pytest.raises(ProtocolError, match="not those that the protocol names"):
        evaluate(plan, samples, clip=fake(sha256="f"), generator=Painter(), folder=tmp_path / "out")


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (torch.zeros(1, SIZE, SIZE, 3), r"returned \(1, 16, 16, 3\) for 2 seeds"),
        (torch.zeros(2, 3, SIZE, SIZE), "needed is"),
        (torch.full((2, SIZE, SIZE, 3), float("nan")), r"not numbers for sample p0 \(adapter\)"),
    ],
)
def test_what_is_no_picture_is_refused(
    pictures: Tensor, said: str, given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    samples, plan = given
    with pytest.raises(ImageError, match=said):
        evaluate(plan, samples, clip=fake(), generator=lambda *_: pictures, folder=tmp_path / "out")


def test_a_damaged_picture_of_the_data_is_named_before_anything_is_made(
    tmp_path: Path,
) -> None:
    file = write_data(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "1.jpg"
    )
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:1500])
    file.write_text(file.read_text().replace("1.png", "1.jpg"))
    samples, card = read_samples(file)  # its header is whole
    painter = Painter()
    with pytest.raises(ImageError, match=r"data\.jsonl line 2: .*1\.jpg cannot be read"):
        run((samples, make_protocol(card)), tmp_path / "out", painter)
    assert painter.calls == []


# ---- the report ---------------------------------------------------------------------------------


def test_results_are_means_and_errors_of_the_scores(
    given: tuple[list[Sample], Protocol], tmp_path: Path
) -> None:
    samples, plan = given
    scores = run(given, tmp_path / "out", Painter())
    results = report.summarise(plan, scores, {"torch": "x"})
    files = report.write(tmp_path / "out", results, plan, samples)
    content = json.loads(files[0].read_text())

    def each(condition: str, name: str) -> np.ndarray[Any, Any]:
        values = [getattr(score, name) for score in scores if score.condition == condition]
        return np.array(values).reshape(3, 2)

    for condition in CONDITIONS:
        row = content["rows"][condition]
        image = each(condition, "clip_i").mean(axis=1)
        assert row["clip_i"]["mean"] == pytest.approx(image.mean())
        assert row["clip_i"]["standard_error"] == pytest.approx(image.std(ddof=1) / 3**0.5)
        score = 2.5 * np.maximum(each(condition, "clip_t"), 0)
        assert row["clip_t"]["mean"] == pytest.approx(score.mean())
        assert row["clip_t_cosine"]["mean"] == pytest.approx(each(condition, "clip_t").mean())
        assert row["dino_i"] is None
    gain = each("adapter", "clip_i").mean(axis=1) - each("shuffled", "clip_i").mean(axis=1)
    found = content["gains"]["shuffled"]["clip_i"]
    assert found["mean"] == pytest.approx(gain.mean())
    assert found["standard_error"] == pytest.approx(gain.std(ddof=1) / 3**0.5)
    assert found["mean"] > 0, "the painter follows its reference"
    assert content["protocol"] == plan.flat() and content["environment"] == {"torch": "x"}

    page = files[1].read_text()
    assert f"| **adapter** | {content['rows']['adapter']['clip_t']['mean']:.3f} ± " in page
    assert "| adapter minus shuffled |" in page and "`sampling.steps` | `50`" in page
    assert "| the paper |" not in page
    assert "- data.samples is 3, the paper's 5000" in page
    with Image.open(files[2]) as sheet:
        # reference, two of the adapter, no adapter, another's reference, shuffled
        assert sheet.size == (6 + 6 * 198, 6 + 3 * 198 + 26)


def papers() -> Protocol:
    clip = replace(CARD, name="ViT-L-14", activation="quick gelu")
    plan = make_protocol(DataCard("val2017", 5000, ""), pictures=4, width=512, height=512)
    return replace(plan, scoring=Scoring(clip))


def test_the_papers_row_stands_beside_the_papers_protocol_only() -> None:
    plan = papers()
    assert report.deviations(plan) == []
    scores = [Score("a", "adapter", k, 0, "", 0.5, 0.2) for k in range(4)]
    only = replace(plan, conditions=("adapter",))
    results = report.summarise(only, scores)
    assert results.paper == {"clip_t": 0.588, "clip_i": 0.828}
    assert "| the paper | 0.588 | 0.828 |  |" in report.markdown(results)
    with_text = replace(only, sampling=replace(plan.sampling, text="{caption}"))
    results = report.summarise(with_text, scores)
    assert results.paper is None
    assert results.deviations == ["sampling.prompt is 'on', the paper's 'off'"]
    assert "0.588" not in report.markdown(results)


def test_dino_has_its_column(given: tuple[list[Sample], Protocol], tmp_path: Path) -> None:
    samples, plan = given
    dino = fake(name="dino")
    plan = replace(plan, scoring=Scoring(CARD, dino.card))
    scores = evaluate(
        plan, samples, clip=fake(), dino=dino, generator=Painter(), folder=tmp_path / "out"
    )
    assert [score.dino_i for score in scores] == [score.clip_i for score in scores]
    page = report.markdown(report.summarise(plan, scores))
    assert "| row | CLIP-T | CLIP-I | cosine under CLIP-T | DINO-I |" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("| **")}) == 1


def test_the_name_of_a_picture_says_what_it_is() -> None:
    name = evaluation.picture_name("no adapter", "000139", 2, 77)
    assert name == "pictures/no-adapter/000139_2_seed77.png"
