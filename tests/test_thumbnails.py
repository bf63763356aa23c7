"""How the thumbnails of the shipped workflows are made; nothing here starts a ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from miniature import family
from scripts import miniature_templates as templates
from scripts import thumbnails
from scripts.graphs import GRAPHS
from scripts.parts import MODELS
from scripts.prompts import read_prompt
from scripts.shots import SHOTS

GREEN = Image.new("RGB", (64, 64), "#00cc00")


def test_every_workflow_is_either_run_or_drawn() -> None:
    assert SHOTS.keys() | thumbnails.CARDS.keys() == GRAPHS.keys()
    assert not SHOTS.keys() & thumbnails.CARDS.keys()


@pytest.mark.parametrize("name", SHOTS)
def test_prompt_names_only_what_the_miniature_has(name: str, tmp_path: Path) -> None:
    shot = SHOTS[name]
    templates.write_inputs(name, shot, tmp_path)
    for reference in shot.runs:
        prompt = templates.prompt(name, shot, reference)
        shipped = read_prompt(shot.instead or name)
        assert prompt.keys() == shipped.keys()
        values = [value for node in prompt.values() for value in node["inputs"].values()]
        assert not [value for value in values if isinstance(value, str) and value in MODELS]
        assert family.BASE.name in values
        loaded = [n["inputs"]["image"] for n in prompt.values() if n["class_type"] == "LoadImage"]
        assert loaded and all((tmp_path / file).exists() for file in loaded)
        assert f"{name}_{reference}.png" in loaded
        texts = [
            n["inputs"]["text"] for n in prompt.values() if n["class_type"] == "CLIPTextEncode"
        ]
        assert sorted(filter(None, texts)) == sorted(shot.texts.values())


@pytest.mark.parametrize("name", SHOTS)
def test_card_has_the_size_of_a_thumbnail_and_shows_the_results(name: str) -> None:
    card = thumbnails.compose(name, [GREEN] * 8 if SHOTS[name].card == "film" else _results(name))
    assert card.size == (512, 512)
    green = dict((colour, count) for count, colour in card.getcolors(1 << 20))[(0, 204, 0)]
    assert green > 0.15 * 512 * 512


def _results(name: str) -> list[Image.Image]:
    return [GREEN] * {"grid": 6, "rows": 3}.get(SHOTS[name].card, 1)


def test_what_is_transparent_becomes_a_chequerboard() -> None:
    picture = Image.new("RGBA", (64, 64), (0, 204, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
    enlarged = thumbnails.enlarged(picture, 128, 128)
    colours = {colour for _, colour in enlarged.crop((0, 0, 60, 128)).getcolors(1 << 16)}
    assert colours == {(0x8A, 0x8D, 0x94), (0xE6, 0xE6, 0xE8)}
    assert enlarged.crop((68, 0, 128, 128)).getcolors() == [(60 * 128, (0, 204, 0))]
