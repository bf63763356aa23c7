"""What the demo shows and how it is asked for; nothing here starts a ComfyUI."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniature import family, reader, world
from scripts import claims, demo

OURS = {"ImagePromptLoadAdapter", "ImagePromptEncode", "ImagePromptApply"}
HOSTS = {
    "CheckpointLoaderSimple",
    "CLIPTextEncode",
    "CLIPVisionLoader",
    "ControlNetApplyAdvanced",
    "ControlNetLoader",
    "EmptyLatentImage",
    "ImageBatch",
    "InvertMask",
    "KSampler",
    "LoadImage",
    "LoadImageMask",
    "SaveImage",
    "UNETLoader",
    "VAEDecode",
}
PROMPTS = {name: claim.prompt for name, claim in claims.single().items()}
PROMPTS["masks"] = claims.double().prompt


def reading(scene: world.Scene, **other: Any) -> reader.Reading:
    """What a perfect picture of a scene reads as."""
    named = {name: getattr(scene, name) for name in (*world.NAMED, "marks")}
    seen = {"outlined": False, "error": 0.0, "mask": world.coverage(scene) > 0.5}
    return reader.Reading(**{**named, **seen, **other})


@pytest.mark.parametrize("found", [claims.REFERENCES, claims.HINTS], ids=["shown", "hinted"])
def test_scenes_are_held_out_and_share_nothing(found: list[world.Scene]) -> None:
    assert len(found) == claims.ROWS
    assert all(world.is_held_out(scene) for scene in found)
    for one, other in itertools.combinations(found, 2):
        assert not any(getattr(one, name) == getattr(other, name) for name in world.NAMED)


def test_a_pair_of_references_shares_its_ground_and_nothing_else() -> None:
    for one, other in claims.PAIRS:
        assert world.is_held_out(other)
        shared = [name for name in world.NAMED if getattr(one, name) == getattr(other, name)]
        assert shared == ["ground"]


def test_text_and_hints_ask_for_what_no_reference_shows() -> None:
    assert claims.SHAPE in world.SHAPES and claims.PLACE in world.PLACES
    for reference, hint in zip(claims.REFERENCES, claims.HINTS, strict=True):
        for shape, place in ((claims.SHAPE, claims.PLACE), (hint.shape, hint.place)):
            assert reference.shape != shape and reference.place != place


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompts_are_of_the_hosts_nodes_and_the_three_of_an_image_prompt(prompt: Any) -> None:
    kinds = {node["class_type"] for node in prompt.values()}
    assert kinds >= OURS and kinds <= OURS | HOSTS
    links = [
        value
        for node in prompt.values()
        for value in node["inputs"].values()
        if isinstance(value, list)
    ]
    assert {name for name, _ in links} == set(prompt) - {"save"}


def test_what_prompts_load_is_drawn(tmp_path: Path) -> None:
    claims.write_inputs(tmp_path)
    named = {
        node["inputs"]["image"]
        for prompt in PROMPTS.values()
        for node in prompt.values()
        if node["class_type"] in ("LoadImage", "LoadImageMask")
    }
    assert named == {path.name for path in tmp_path.iterdir()}

    def pixels(name: str) -> np.ndarray:
        return np.asarray(Image.open(tmp_path / name)).astype(float)

    mask = pixels(claims.MASK)
    assert mask.shape == (64, 128, 3) and (mask[:, :64] == 255).all() and not mask[:, 64:].any()
    for name, scene in zip(claims.names("reference"), claims.REFERENCES, strict=True):
        ground = pixels(name)[32, 60] / 255  # right of the rightmost shape
        assert np.abs(ground - world.GROUNDS[scene.ground]).max() < 1 / 255
    for name, scene in zip(claims.names("hint"), claims.HINTS, strict=True):
        white = pixels(name)[..., 0].nonzero()
        x, y = world.PLACES[scene.place]
        # A triangle's middle lies up to 3 pixels below its place.
        centre = white[1].mean() - 31.5, white[0].mean() - 31.5
        assert np.abs(np.subtract(centre, (x + scene.shift[0], y + scene.shift[1]))).max() < 3.5


def test_figures_count_what_agrees() -> None:
    shown = claims.REFERENCES
    true = [reading(scene) for scene in shown]
    half = [*true[:2], *(reading(scene, colour="pink", texture="none") for scene in shown[2:])]
    turned = [reading(scene, marks=scene.marks[1:] + scene.marks[:1]) for scene in shown]
    kept = sum(
        a == b for s in shown for a, b in zip(s.marks, s.marks[1:] + s.marks[:1], strict=True)
    )
    single = claims.single()
    full = [figure(true) for figure in single["full"].figures]
    assert full == ["look 12 of 12", "marks 16 of 16"]
    assert single["full"].figures[0](half) == "look 8 of 12"
    assert single["plus"].figures[1](turned) == f"marks {kept} of 16"
    halves = [reading(scene) for pair in claims.PAIRS for scene in pair]
    (masked,) = claims.double().figures
    assert masked(halves) == "look 12 of 12"
    assert masked(halves[::-1]) == "look 0 of 12"  # right and left, and both pairs, exchanged

    followed = [reading(replace(scene, shape="ring", place="top")) for scene in shown]
    assert single["text"].figures[1](followed) == "text 8 of 8"
    assert single["text"].figures[1](followed[:3] + true[3:]) == "text 6 of 8"
    hinted = [
        reading(replace(scene, shape=hint.shape, place=hint.place))
        for scene, hint in zip(shown, claims.HINTS, strict=True)
    ]
    assert single["control"].figures[1](hinted) == "hint 8 of 8"
    lined = [reading(scene, outlined=scene != shown[0]) for scene in shown]
    assert single["custom"].figures[1](lined) == "outline 3 of 4"


def test_wide_pictures_are_read_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(reader, "read", lambda pictures: seen.append(pictures) or ["a"])
    wide = Image.new("RGB", (128, 64), "black")
    wide.paste("white", (64, 0, 128, 64))
    assert demo.readings([wide]) == ["a"]
    assert seen[0].shape == (2, 3, 64, 64)
    assert not seen[0][0].any() and (seen[0][1] == 1).all()


def test_missing_models_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "FINE_TUNE", demo.REPOSITORY / "miniature" / "no.safetensors")
    with pytest.raises(SystemExit, match=r"miniature.no\.safetensors.* is missing.*-m miniature"):
        demo.main([str(tmp_path / "sheet.png")])
    assert not list(tmp_path.iterdir())
