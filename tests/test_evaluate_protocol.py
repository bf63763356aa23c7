"""The evaluator's data, seeds, shuffling and choices, without a host."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ip_adapter.errors import ImageError, MissingFileError
from ip_adapter.evaluate import data
from ip_adapter.evaluate.data import DataCard, Sample, read_samples
from ip_adapter.evaluate.errors import DataError, ProtocolError
from ip_adapter.evaluate.protocol import (
    CONDITIONS,
    Protocol,
    Sampling,
    derangement,
    rows,
    seed_of,
)
from ip_adapter.evaluate.scorer import ScorerCard
from tests.evaluate_parts import make_protocol, write_data


@pytest.fixture
def given(tmp_path: Path) -> tuple[list[Sample], Protocol]:
    samples, card = read_samples(write_data(tmp_path / "data"))
    return samples, make_protocol(card)


# ---- data ---------------------------------------------------------------------------------------


def test_json_lines_are_read_in_order(tmp_path: Path) -> None:
    samples, card = read_samples(write_data(tmp_path))
    assert [(s.id, s.image.name, s.caption) for s in samples] == [
        ("p0", "0.png", "picture 0"),
        ("p1", "1.png", "picture 1"),
        ("p2", "2.png", "picture 2"),
    ]
    assert (card.name, card.samples) == ("data.jsonl", 3)
    assert read_samples(tmp_path / "data.jsonl", limit=2)[1].samples == 2


def test_the_digest_sees_pictures_and_captions(tmp_path: Path) -> None:
    file = write_data(tmp_path)
    before = read_samples(file)[1].sha256
    assert read_samples(file)[1].sha256 == before
    text = file.read_text()
    file.write_text(text.replace("picture 1", "another"))
    other = read_samples(file)[1].sha256
    file.write_text(text)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "1.png")
    assert len({before, other, read_samples(file)[1].sha256}) == 3


def test_bad_rows_are_named_all_at_once(tmp_path: Path) -> None:
    file = write_data(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    bad = [
        "{broken",
        "[1]",
        '{"caption": "a"}',
        '{"image": "0.png", "caption": " "}',
        '{"image": "gone.png", "caption": "a"}',
        '{"image": "text.png", "text": "a"}',
        '{"image": "0.png", "caption": "a", "id": "../up"}',
        '{"image": "0.png", "caption": "a", "id": "P0"}',
    ]
    file.write_text(file.read_text() + "\n".join(bad) + "\n")
    with pytest.raises(DataError, match=r"8 rows of data\.jsonl") as caught:
        read_samples(file)
    message = str(caught.value)
    for number, said in (
        (4, "no JSON"),
        (5, "list instead of an object"),
        (6, "no file name under 'image'"),
        (7, "no words under 'caption'"),
        (8, "there is no file"),
        (9, "is no picture"),
        (10, "cannot be a file name"),
        (11, "is also that of data.jsonl line 1"),
    ):
        assert any(f"line {number}:" in line and said in line for line in message.splitlines())
    assert "Mend or remove them" in message


def test_a_long_list_of_bad_rows_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"image": "gone.png", "caption": "a"}\n' * 13)
    with pytest.raises(DataError, match=r"13 rows .*\n(.*\n){10}  and 3 more"):
        read_samples(file)


def test_empty_and_missing_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no samples"):
        read_samples(tmp_path / "data.jsonl")
    with pytest.raises(MissingFileError, match="There is no data at"):
        read_samples(tmp_path / "gone.jsonl")
    with pytest.raises(MissingFileError, match=r"these annotations/captions_.*: none"):
        read_samples(tmp_path)


def write_coco(folder: Path, **changes: Any) -> Path:
    content = {
        "images": [{"id": 42, "file_name": "0042.png"}, {"id": 7, "file_name": "0007.png"}],
        "annotations": [
            {"id": 5, "image_id": 42, "caption": "later"},
            {"id": 3, "image_id": 42, "caption": " first of 42\n"},
            {"id": 4, "image_id": 7, "caption": "first of 7"},
        ],
        **changes,
    }
    for name in ("annotations", "val2017"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, colour in (("0042.png", "red"), ("0007.png", "blue")):
        Image.new("RGB", (8, 6), colour).save(folder / "val2017" / name)
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    return folder


def test_coco_is_one_caption_for_each_picture(tmp_path: Path) -> None:
    samples, card = read_samples(write_coco(tmp_path))
    assert [(s.id, s.caption) for s in samples] == [("0007", "first of 7"), ("0042", "first of 42")]
    assert (card.name, card.samples) == ("val2017", 2)
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    assert read_samples(tmp_path)[1] == card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": []}, "captions_val2017.json image 7: no words"),
        ({"images": [{"id": 1}]}, "not in COCO's format .KeyError"),
        ({"images": [{"id": 1, "file_name": "1.png"}]}, "image 1: no words"),
    ],
)
def test_bad_coco_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_samples(write_coco(tmp_path, **changes))


def test_pictures_are_opened_upright_and_damage_is_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (8, 4)).save(tmp_path / "side.jpg", exif=exif)
    assert data.open_picture(tmp_path / "side.jpg").size == (4, 8)
    whole = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        whole
    )
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ImageError, match=r"noise\.png cannot be read"):
        data.open_picture(whole)


# ---- protocol -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 5, 17, 5000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_derangement_moves_everything_and_loses_nothing(count: int, seed: int) -> None:
    found = derangement(count, seed)
    assert sorted(found) == list(range(count))
    assert all(i != target for i, target in enumerate(found))
    assert found == derangement(count, seed)


def test_a_derangement_is_fixed_and_depends_on_its_seed() -> None:
    assert derangement(50, 0) != derangement(50, 1)
    with pytest.raises(ValueError, match="needed are two"):
        derangement(1, 0)


def test_seeds_are_a_function_of_sample_and_number() -> None:
    found = {seed_of(base, name, k) for base in (0, 1) for name in ("a", "b") for k in range(4)}
    assert len(found) == 16 and all(0 <= seed < 2**48 for seed in found)
    expected = int(hashlib.sha256(b"7/p1/3").hexdigest()[:12], 16)
    assert seed_of(7, "p1", 3) == expected


def test_rows_differ_in_the_reference_only(given: tuple[list[Sample], Protocol]) -> None:
    samples, plan = given
    own, none, other = (rows(plan, samples, condition) for condition in CONDITIONS)
    assert [row.reference for row in own] == [sample.image for sample in samples]
    assert [row.reference for row in none] == [None] * 3
    for row, sample in zip(other, samples, strict=True):
        assert row.sample == sample and row.reference != sample.image
    assert {row.reference for row in other} == {sample.image for sample in samples}
    assert all(row.text == "" for row in (*own, *none, *other))


def test_samples_that_share_a_picture_are_not_given_their_own(tmp_path: Path) -> None:
    file = write_data(tmp_path, 2)
    more = {"image": "0.png", "caption": "said otherwise"}
    file.write_text(file.read_text() + json.dumps(more) + "\n")
    samples, card = read_samples(file)
    found = rows(make_protocol(card), samples, "shuffled")
    names = [row.reference.name for row in found if row.reference is not None]
    assert names == ["1.png", "0.png", "1.png"]
    with pytest.raises(DataError, match="all samples have the same picture"):
        rows(make_protocol(card), [samples[0], samples[2]], "shuffled")


def test_the_caption_stands_in_the_text_when_asked_for() -> None:
    sample = Sample("a", Path("a.png"), "a {caption} dog", "x line 1")
    plan = make_protocol(DataCard("x", 1, ""), text="{caption}, best quality")
    assert rows(plan, [sample], "no adapter")[0].text == "a {caption} dog, best quality"
    assert plan.flat()["sampling.prompt"] == "on"
    assert make_protocol(DataCard("x", 1, ""), text="best").flat()["sampling.prompt"] == "off"


@pytest.mark.parametrize(
    "changes", [{"pictures": 0}, {"steps": 0}, {"width": 500}, {"height": 0}, {"fit": "squash"}]
)
def test_choices_that_mean_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="needed"):
        Sampling(**changes)


def test_unknown_conditions_are_refused() -> None:
    plan = make_protocol(DataCard("x", 1, ""))
    for conditions in ((), ("no text",)):
        with pytest.raises(ProtocolError, match="one or more of adapter, no adapter, shuffled"):
            replace(plan, conditions=conditions)  # type: ignore[arg-type]


def test_every_choice_is_printed_under_its_name() -> None:
    flat = make_protocol(DataCard("x", 1, "abc")).flat()
    for name in (
        *(f"sampling.{name}" for name in Sampling.__dataclass_fields__),
        *(f"scoring.clip.{name}" for name in ScorerCard.__dataclass_fields__),
        *(f"models.{name}.sha256" for name in ("checkpoint", "adapter", "encoder")),
        *("data.sha256", "seeds", "shuffling", "conditions", "scoring.caption_prefix"),
    ):
        assert name in flat
    assert json.loads(json.dumps(flat)) == flat
