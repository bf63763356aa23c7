"""Train the miniature's CLIP with open_clip, on pictures of the world and their captions.

Its image half is the image encoder of the adapters, its text half the text encoder of the base,
as CLIP ViT-L is Stable Diffusion's; whole, it scores pictures in the evaluation.

    python -m miniature clip
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import family, progress, words, world

STEPS = 3000
ALIKE, GROUPS = 6, 16
"""A batch is 16 groups of 6 pictures that share texture, colour and ground, half of them the place.

Without them texture, colour and ground alone tell the pictures of a batch apart, and shapes are
never learned.
"""

LONGEST = 9
"""Tokens of the longest caption, both ends included; later positions are never read in training."""


def configuration(context: int = family.CONTEXT) -> dict[str, Any]:
    """open_clip's description of the model."""
    width = family.WIDTH
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": family.VISION_SIZE,
            "layers": family.VISION_LAYERS,
            "width": width,
            "head_width": width // family.HEADS,
            "patch_size": family.PATCH,
        },
        "text_cfg": {
            "context_length": context,
            # Has open_clip read the tokenizer in its folder, instead of taking its own.
            "hf_tokenizer_name": "miniature",
            "vocab_size": len(words.WORDS),
            "width": width,
            "heads": family.HEADS,
            "layers": family.TEXT_LAYERS,
        },
    }


def normalise(pictures: Tensor) -> Tensor:
    """``[N, 3, H, W]`` in 0..1 as CLIP reads it."""
    import open_clip

    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (pictures - mean) / deviation


def train(steps: int = STEPS, seed: int = 0) -> dict[str, Tensor]:
    """Make a CLIP.

    Args:
        steps: Of AdamW, with 96 pictures and captions each; see `ALIKE`.
        seed: Decides weights, pictures and captions.

    Returns:
        Tensors under open_clip's names, with room for 77 tokens.
    """
    import open_clip

    torch.manual_seed(seed)
    rng = random.Random(seed)
    device = family.device()
    model = open_clip.CLIP(**configuration(LONGEST)).to(device)
    tokenizer = words.build()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    settings = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(settings, lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    contrast = open_clip.ClipLoss()
    for step in progress.steps("CLIP", range(steps)):
        scenes = [scene for _ in range(GROUPS) for scene in _alike(rng)]
        captions = [world.caption(scene, world.some_names(rng, 0.9)) for scene in scenes]
        tokens = tokenizer(
            captions, padding="max_length", max_length=LONGEST, truncation=True, return_tensors="pt"
        )["input_ids"]
        pictures = normalise(world.render(scenes))
        with family.autocast():
            image = model.encode_image(pictures.to(device), normalize=True)
            text = model.encode_text(tokens.to(device), normalize=True)
        scale = model.logit_scale.exp()
        loss = contrast(image.float(), text.float(), scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
            found = (image @ text.T).argmax(-1).cpu() == torch.arange(len(scenes))
        progress.show(step=step, loss=loss, found=found.float().mean())
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    positions = tensors["positional_embedding"]
    # Attention is causal: what no caption reaches changes nothing that a caption gives.
    room = positions.new_zeros(family.CONTEXT - len(positions), positions.shape[1])
    tensors["positional_embedding"] = torch.cat((positions, room))
    return {name: tensor for name, tensor in tensors.items() if name != "attn_mask"}


def _alike(rng: random.Random) -> list[world.Scene]:
    first = world.draw(rng)
    shared = {name: getattr(first, name) for name in ("texture", "colour", "ground")}
    if rng.random() < 0.5:
        shared["place"] = first.place
    found = [first]
    while len(found) < ALIKE:
        other = replace(world.draw(rng), **shared)
        if not world.is_held_out(other) and (other.shape, other.place) != (
            first.shape,
            first.place,
        ):
            found.append(other)
    return found


def save(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write what open_clip loads from a folder: weights, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words.save(folder)
    described = {"model_cfg": configuration(), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    small = {name: tensor.contiguous().half() for name, tensor in tensors.items()}
    save_file(small, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def text_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text half under the names of transformers' ``CLIPTextModelWithProjection``."""
    found = {
        "text_model.embeddings.token_embedding.weight": tensors["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": tensors["positional_embedding"],
        "text_model.final_layer_norm.weight": tensors["ln_final.weight"],
        "text_model.final_layer_norm.bias": tensors["ln_final.bias"],
        "text_projection.weight": tensors["text_projection"].T,
    }
    for layer in range(family.TEXT_LAYERS):
        old, new = f"transformer.resblocks.{layer}.", f"text_model.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            three = tensors[f"{old}attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), three, strict=True):
                found[f"{new}self_attn.{name}.{kind}"] = part
            for name, source in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                found[f"{new}{name}.{kind}"] = tensors[f"{old}{source}.{kind}"]
    return found
