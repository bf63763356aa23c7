"""The claims of docs/evidence.md, measured anew on fewer pictures; and the page itself.

What pictures show is told by `miniature.reader`, a formula; scenes are of combinations that nothing
was trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats

from miniature import evidence, evidence_page, measures, world
from miniature.measures import Figure, Lab, Shots
from miniature.studio import Studio
from tests.conftest import ROOT

pytestmark = pytest.mark.host

COUNT = 24


@pytest.fixture(scope="module")
def lab(host: Any) -> Lab:
    with torch.inference_mode():
        return Lab(Studio.open(), COUNT)


def alone(lab: Lab, adapter: str = "global") -> Shots:
    return lab.make(references=lab.references, adapter=adapter)


def both(lab: Lab, adapter: str = "global") -> Shots:
    return lab.make(evidence.layouts(lab), lab.givers, adapter=adapter)


# How it is measured


def test_scenes_are_held_out_and_differ_as_they_should(lab: Lab) -> None:
    for scene in (*lab.references, *lab.others, *lab.targets):
        assert world.is_held_out(scene)
    for one, other in zip(lab.references, lab.others, strict=True):
        assert not any(getattr(one, name) == getattr(other, name) for name in world.NAMED)
    for target, giver in zip(lab.targets, lab.givers, strict=True):
        assert (target.texture, target.colour) == (giver.texture, giver.colour)
        assert (target.ground, target.marks) == (giver.ground, giver.marks)
        assert target.shape != giver.shape and target.place != giver.place


def test_held_out_scenes_have_each_option_equally_often() -> None:
    kept = [
        (shape, colour, texture)
        for shape in world.SHAPES
        for colour in world.COLOURS
        for texture in world.TEXTURES
        if world.is_held_out(world.Scene(shape, texture, colour, "left", "grey", (0, 0, 0, 0)))
    ]
    assert len(kept) == 6 * 8 * 4 / 8
    for column, name in enumerate(("shape", "colour", "texture")):
        counts = Counter(row[column] for row in kept)
        assert set(counts.values()) == {round(len(kept) * measures.chance(name))}


@pytest.mark.parametrize(("true", "n"), [(0, 8), (5, 32), (31, 32), (96, 96)])
def test_intervals_of_shares_are_wilsons(true: int, n: int) -> None:
    found = measures.share([1.0] * true + [0.0] * (n - true))
    expected = stats.binomtest(true, n).proportion_ci(method="wilson")
    assert found.value == true / n and found.n == n
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_intervals_of_means_are_bootstrapped() -> None:
    values = torch.rand(96, generator=torch.Generator().manual_seed(0)).tolist()
    found = measures.mean(values)
    judge = stats.bootstrap((values,), lambda x, axis: x.mean(axis), method="percentile", rng=0)
    interval = judge.confidence_interval
    assert found.value == pytest.approx(sum(values) / 96)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.01)


def test_nobody_gets_their_own_reference_when_shuffled(lab: Lab) -> None:
    pairs = zip(lab.references, measures.shuffled(lab.references), strict=True)
    assert all(one is not other for one, other in pairs)
    assert Counter(lab.references) == Counter(measures.shuffled(lab.references))


# The page


@pytest.fixture(scope="module")
def figures() -> Any:
    return json.loads((ROOT / "docs" / "evidence.json").read_text(encoding="utf-8"))


def test_the_page_has_every_kept_figure(figures: Any) -> None:
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert text == evidence_page.page(figures)
    tables = [table for section in figures["sections"] for table in section["tables"]]
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| |")]
    assert len(blocks) == len(tables)
    for block, table in zip(blocks, tables, strict=True):
        assert block[0].strip("| ").split(" | ") == [*table["columns"], "n"]
        for line, (name, row) in zip(block[2:], table["rows"].items(), strict=True):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[0] == name
            for cell, figure in zip(cells[1:-1], row, strict=True):
                shown = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?(?:e-\d+)?", cell)]
                wanted = [] if figure is None else [figure[x] for x in ("value", "low", "high")]
                assert shown == pytest.approx(wanted[: len(shown)], abs=0.0051)
                assert bool(shown) == bool(wanted)


def test_the_page_was_measured_on_the_weights_that_lie_here(figures: Any) -> None:
    home = ROOT / "miniature"
    lie = {
        path.relative_to(home).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("models", "ablation")
        for path in (home / folder).rglob("*.safetensors")
    }
    assert figures["environment"]["files"] == lie


def test_the_pages_pictures_are_there(figures: Any) -> None:
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^\]]+\]\((images/evidence_\w+\.png)\)", text)
    assert len(named) == len(figures["sections"])
    assert all((ROOT / "docs" / name).is_file() for name in named)


# The claims


def above(figure: Figure, bound: float) -> bool:
    """Whether the whole interval is above."""
    return figure.low > bound


def test_the_base_draws_what_a_caption_says(lab: Lab) -> None:
    made = lab.make([world.caption(scene) for scene in lab.references])
    for name in world.NAMED:
        assert above(made.agreement(lab.references, name), 2 * measures.chance(name)), name


@pytest.mark.parametrize("adapter", evidence.ADAPTERS)
def test_weight_zero_is_the_base(lab: Lab, adapter: str) -> None:
    assert evidence.is_base_at_zero(lab, adapter)


@pytest.mark.parametrize("adapter", evidence.ADAPTERS)
def test_agreement_rises_with_the_weight(lab: Lab, adapter: str) -> None:
    half = lab.make(references=lab.references, adapter=adapter, weight=0.5)
    none, some, full = (
        made.agreement(lab.references, "look") for made in (lab.make(), half, alone(lab, adapter))
    )
    assert none.value < some.value <= full.value + 0.05
    assert above(full, none.high)


@pytest.mark.parametrize("adapter", evidence.ADAPTERS)
def test_an_image_prompt_alone_is_followed(lab: Lab, adapter: str) -> None:
    made = alone(lab, adapter)
    shuffled = measures.shuffled(lab.references)
    for name in (*world.LOOK, "look"):
        found = made.agreement(lab.references, name)
        assert above(found, 2 * measures.chance(name)), name
        assert above(found, made.agreement(shuffled, name).high), name
        assert above(found, lab.make().agreement(lab.references, name).high), name


@pytest.mark.parametrize("adapter", evidence.ADAPTERS)
def test_text_and_reference_are_both_followed(lab: Lab, adapter: str) -> None:
    text_alone = lab.make(evidence.layouts(lab))
    made = both(lab, adapter)
    for name in (*world.NAMED, "look", "layout"):
        assert above(made.agreement(lab.targets, name), measures.chance(name)), name
    look, layout = (made.agreement(lab.targets, name) for name in ("look", "layout"))
    assert above(look, text_alone.agreement(lab.targets, "look").high)
    assert layout.value > text_alone.agreement(lab.targets, "layout").value - 0.15


@pytest.mark.parametrize("adapter", evidence.ADAPTERS[:1])
def test_the_fine_tune_takes_the_same_adapter(lab: Lab, adapter: str) -> None:
    texts = evidence.layouts(lab)
    made = lab.make(texts, lab.givers, adapter=adapter, on="fine_tune")
    assert above(made.agreement(lab.targets, "look"), 2 * measures.chance("look"))
    base, tuned = both(lab, adapter).outlined(), made.outlined()
    assert above(tuned, base.high)


def test_the_controlnet_decides_where_and_the_reference_how(lab: Lab) -> None:
    wanted = [
        world.Scene(hint.shape, scene.texture, scene.colour, hint.place, scene.ground, scene.marks)
        for scene, hint in zip(lab.references, lab.others, strict=True)
    ]
    led = lab.make(references=lab.references, hints=lab.others, adapter="global")
    for name in (*world.NAMED, "look", "layout"):
        assert above(led.agreement(wanted, name), measures.chance(name)), name
    free = alone(lab).agreement(wanted, "layout")
    assert above(led.agreement(wanted, "layout"), free.high)


def test_image_to_image_keeps_the_layout_and_moves_the_look(lab: Lab) -> None:
    how = {"starts": lab.others, "denoise": evidence.DENOISE}
    plain = lab.make(**how)
    led = lab.make(references=lab.references, adapter="global", **how)
    assert above(led.agreement(lab.others, "layout"), measures.chance("layout"))
    look = led.agreement(lab.references, "look")
    assert above(look, plain.agreement(lab.references, "look").high)


@pytest.mark.parametrize("mask", ["half", "shape"])
def test_inpainting_leaves_the_rest_alone(lab: Lab, mask: Any) -> None:
    made = lab.make(starts=lab.others, mask=mask, references=lab.references, adapter="global")
    where = measures.masks(lab.others, mask)[:, ::8, ::8]  # [N, 8, 8]
    assert made.start is not None
    away = (made.latents - made.start).abs()
    assert float((away * (1 - where)[:, None]).max()) < 1e-4
    assert float((away * where[:, None]).mean()) > 0.05
    _, outside, inside = evidence.kept(lab, made, measures.masks(lab.others, mask))
    assert above(inside, 4 * outside.high)


def test_clip_i_is_above_the_shuffled_row(lab: Lab) -> None:
    own = lab.shown(lab.references).embedded
    for adapter in evidence.ADAPTERS:
        found = alone(lab, adapter).clip_i(own)
        swapped = alone(lab, adapter).clip_i(lab.shown(measures.shuffled(lab.references)).embedded)
        assert above(found, swapped.high)
        assert above(found, lab.make().clip_i(own).high)
