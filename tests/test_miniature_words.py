"""The miniature's words and its CLIP, as tokens, in open_clip and in transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ip_adapter.evaluate import scorer
from miniature import clip, words, world
from tests.miniature_parts import CAPTIONS, lookup, random_clip, states, weights
from tests.tolerance import assert_close


def tokens(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """As the training of CLIP asks for them, at the full length."""
    found = tokenizer(list(captions), padding="max_length", max_length=77, truncation=True)
    return [list(map(int, row)) for row in found["input_ids"]]


def test_every_word_of_the_world_is_one_token_and_the_end_is_the_highest() -> None:
    spoken = {"thing", "on"}
    for table in (world.TEXTURES, world.COLOURS, world.SHAPES, world.PLACES, world.GROUNDS):
        assert not spoken & set(table), "a word with two meanings"
        spoken |= set(table)
    assert len(words.WORDS) == len(set(words.WORDS)) == len(spoken) + 3
    assert set(words.WORDS) - spoken == {"<start>", "<end>", "<unknown>"}
    # CLIP reads the text's embedding at the highest token.
    assert words.WORDS[-1] == "<end>"


@pytest.mark.parametrize("caption", CAPTIONS)
def test_tokens_are_places_in_the_list(caption: str) -> None:
    assert tokens(words.build(), [caption]) == [lookup(caption)]


def test_every_caption_of_a_scene_is_known_and_fits_the_training() -> None:
    scene = world.Scene("circle", "plain", "red", "centre", "white", (0, 1, 2, 3))
    (found,) = words.build()([world.caption(scene)])["input_ids"]
    assert words.WORDS.index("<unknown>") not in found
    assert len(found) == 6 + 2 <= clip.LONGEST


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Red CIRCLE", "red circle"),
        ("red, circle!", "red circle"),
        ("  red   circle ", "red circle"),
        ("a red circle", "<unknown> red circle"),
        ("redcircle", "<unknown>"),
    ],
)
def test_case_and_punctuation_do_not_matter_and_other_words_are_unknown(
    written: str, read: str
) -> None:
    assert tokens(words.build(), [written]) == [lookup(read)]


def test_a_long_text_is_cut_and_still_ends() -> None:
    (found,) = tokens(words.build(), ["red " * 100])
    end, red = words.WORDS.index("<end>"), words.WORDS.index("red")
    assert found == [words.WORDS.index("<start>"), *[red] * 75, end]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_clip()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    clip.save(weights(model), path)
    return path


def test_open_clip_loads_the_folder_with_its_weights_and_words(model: Any, folder: Path) -> None:
    import open_clip

    name = f"local-dir:{folder}"
    loaded = open_clip.create_model(name, precision="fp32", require_pretrained=True)
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    tokenizer = open_clip.get_tokenizer(name)
    captions = [*CAPTIONS, "Red, circle", "a red heart"]
    expected_tokens = [
        *map(lookup, CAPTIONS),
        lookup("red circle"),
        lookup("<unknown> red <unknown>"),
    ]
    assert tokenizer(captions).tolist() == expected_tokens


def test_the_evaluator_scores_with_the_folder(model: Any, folder: Path) -> None:
    found = scorer.load_clip(f"local-dir:{folder}")
    assert found.card.activation == "gelu"
    drawn = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(one.to(torch.uint8).numpy()) for one in drawn]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = (drawn.movedim(-1, 1) / 255 - mean) / deviation
    assert_close(clip.normalise(drawn.movedim(-1, 1) / 255), pixels)
    with torch.no_grad():
        assert_close(found.images(pictures), model.encode_image(pixels), relative=1e-4)
        expected = model.encode_text(torch.tensor([lookup(caption) for caption in CAPTIONS]))
    assert_close(found.texts(CAPTIONS), expected, relative=1e-4)


def test_the_text_half_gives_in_transformers_what_it_gives_in_open_clip(model: Any) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    end = words.WORDS.index("<end>")
    config = CLIPTextConfig(
        vocab_size=len(words.WORDS),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=128,
        hidden_act="gelu",
        bos_token_id=words.WORDS.index("<start>"),
        eos_token_id=end,
        pad_token_id=end,
    )
    reference = CLIPTextModelWithProjection(config).eval()
    reference.load_state_dict(clip.text_tensors(weights(model)))
    with torch.no_grad():
        found = reference(torch.tensor([lookup(caption) for caption in CAPTIONS]))
        embedded = model.encode_text(torch.tensor([lookup(caption) for caption in CAPTIONS]))
    assert_close(states(model, CAPTIONS), found.last_hidden_state, relative=1e-4)
    assert_close(embedded, found.text_embeds, relative=1e-4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "ALIKE", 3)
    monkeypatch.setattr(clip, "GROUPS", 2)


@pytest.mark.usefixtures("small")
def test_a_trained_clip_is_whole_seeded_and_reads_short_texts_as_it_was_trained_to() -> None:
    import open_clip

    first, again, other = (clip.train(3, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
    whole = open_clip.CLIP(**clip.configuration()).eval()
    whole.load_state_dict(first)
    short = open_clip.CLIP(**clip.configuration(clip.LONGEST)).eval()
    positions = first["positional_embedding"]
    assert not positions[clip.LONGEST :].any()
    short.load_state_dict({**first, "positional_embedding": positions[: clip.LONGEST]})
    with torch.no_grad():
        found = whole.encode_text(torch.tensor([lookup(caption) for caption in CAPTIONS]))
        trained = short.encode_text(torch.tensor([lookup(c, clip.LONGEST) for c in CAPTIONS]))
    assert_close(found, trained, relative=1e-4)


def test_pictures_of_a_group_differ_in_shape_and_half_of_them_in_place() -> None:
    rng = random.Random(5)
    groups = [clip._alike(rng) for _ in range(200)]
    for group in groups:
        assert len(group) == 6 and not any(world.is_held_out(scene) for scene in group)
        assert len({(s.texture, s.colour, s.ground) for s in group}) == 1
    assert any(len({scene.shape for scene in group}) >= 4 for group in groups)
    fixed = sum(len({scene.place for scene in group}) == 1 for group in groups)
    assert 70 < fixed < 130
