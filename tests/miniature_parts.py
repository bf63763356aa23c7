"""For tests of the miniature: a random CLIP, words by a plain lookup, held-out pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miniature import clip, words, world

CAPTIONS = [
    "striped red circle left on sand",
    "plain cyan diamond bottom on navy",
    "dotted thing",
    "thing on mint",
    "",
]


def lookup(text: str, length: int = 77) -> list[int]:
    """Tokens by a plain dictionary: start, the words' places in the list, ends to the length."""
    numbers = {word: number for number, word in enumerate(words.WORDS)}
    found = [numbers.get(word, numbers["<unknown>"]) for word in text.split()]
    found = [numbers["<start>"], *found, numbers["<end>"]]
    return found + [numbers["<end>"]] * (length - len(found))


def random_clip(seed: int = 0) -> Any:
    """A whole CLIP in open_clip's own class, with random weights that half precision holds."""
    import open_clip

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**clip.configuration())
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape) * (0.1 if parameter.ndim < 2 else 0.05)
            parameter.copy_((parameter + drawn).half().float())
    return model.eval()


def weights(model: Any) -> dict[str, Tensor]:
    """As `clip.train` returns them."""
    return {name: t for name, t in model.state_dict().items() if name != "attn_mask"}


def states(model: Any, captions: Sequence[str]) -> Tensor:
    """open_clip's own states of all tokens, behind the last norm, ``[N, 77, 128]``."""
    seen: list[Tensor] = []
    hook = model.ln_final.register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.no_grad():
        model.encode_text(torch.tensor([lookup(caption) for caption in captions]))
    hook.remove()
    return seen[0]


def held_out(count: int = 16) -> Tensor:
    """Pictures ``[N, 3, 64, 64]`` of combinations that nothing was trained on."""
    rng = random.Random(77)
    return world.render([world.draw(rng, held_out=True) for _ in range(count)])


def unet_latents(vae: Any, pictures: Tensor) -> Tensor:
    """Latents as the host's VAE Encode gives them, times SD 1.5's scale."""
    return torch.as_tensor(vae.encode(pictures.movedim(1, -1))) * 0.18215
