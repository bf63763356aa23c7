"""The miniature's files as they are shipped: which they are, how large, and how good CLIP is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ip_adapter.evaluate import scorer
from miniature import adapters, family, recipe, words, world

SHIPPED = {
    "models/checkpoints/miniature.safetensors",
    "models/diffusion_models/miniature_outlined.safetensors",
    "models/controlnet/miniature_shape.safetensors",
    "models/clip_vision/miniature/open_clip_config.json",
    "models/clip_vision/miniature/open_clip_model.safetensors",
    "models/clip_vision/miniature/tokenizer.json",
    "models/clip_vision/miniature/tokenizer_config.json",
    "models/ipadapter/miniature_global.safetensors",
    "models/ipadapter/miniature_plus.safetensors",
    "ablation/miniature_global_1.safetensors",
    "ablation/miniature_global_2.safetensors",
    "ablation/miniature_plus_1.safetensors",
    "ablation/miniature_plus_2.safetensors",
    "ablation/miniature_simple.safetensors",
    "ablation/miniature_simple_1.safetensors",
    "ablation/miniature_simple_2.safetensors",
}
HOME = family.MODELS.parent


def test_exactly_these_files_are_shipped_and_they_are_small() -> None:
    folders = (family.MODELS, family.ABLATION)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {path.relative_to(HOME).as_posix() for path in files} == SHIPPED
    assert sum(path.stat().st_size for path in files) < 25e6


def test_every_weight_that_is_shipped_is_named_and_made_by_a_part() -> None:
    named = {family.BASE, family.FINE_TUNE, family.CONTROLNET, family.CLIP_VISION}
    named |= {adapters.path(kind, seed) for kind in adapters.KINDS for seed in adapters.SEEDS}
    listed = {HOME / name for name in SHIPPED if name.endswith(".safetensors")}
    assert named == listed <= {part.made for part in recipe.PARTS.values()}


@pytest.mark.parametrize("name", sorted(n for n in SHIPPED if n.endswith(".safetensors")))
def test_shipped_weights_are_in_half_precision_and_finite(name: str) -> None:
    with safe_open(HOME / name, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is no dict
            tensor = file.get_tensor(key)
            assert tensor.dtype == torch.float16 or tensor.ndim == 0, key
            assert bool(tensor.isfinite().all()), key


def test_the_tokenizer_that_is_shipped_is_the_one_in_the_code(tmp_path: Path) -> None:
    words.save(tmp_path)
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text()) == json.loads((family.CLIP / path.name).read_text())


def test_the_shipped_clip_tells_held_out_pictures_by_their_captions() -> None:
    """One of 32 by chance; the pictures' shapes, colours and textures were never seen together."""
    rng = random.Random(1234)
    scenes = [world.draw(rng, held_out=True) for _ in range(32)]
    found = scorer.load_clip(f"local-dir:{family.CLIP}")
    pictures = (world.render(scenes) * 255).round().to(torch.uint8).movedim(1, -1)
    image = found.images([Image.fromarray(one.numpy()) for one in pictures])
    text = found.texts([world.caption(scene) for scene in scenes])
    best = torch.cosine_similarity(image[:, None], text[None], dim=-1).argmax(-1)
    right = (best == torch.arange(32)).float().mean()
    assert float(right) >= 0.8


def test_the_shipped_clip_describes_what_the_family_says() -> None:
    described = json.loads((family.CLIP / "open_clip_config.json").read_text())
    vision, text = described["model_cfg"]["vision_cfg"], described["model_cfg"]["text_cfg"]
    assert (vision["image_size"], vision["patch_size"], vision["layers"]) == (64, 8, 4)
    assert (text["context_length"], text["vocab_size"]) == (77, len(words.WORDS))
