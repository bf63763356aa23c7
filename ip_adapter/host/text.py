"""The host's text encoder, for adapters that read an instruction."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..errors import IncompatibleModelError

WIDTH = 768
"""Width of CLIP-L's text states."""


def last_hidden_states(clip: Any, words: str) -> Tensor:
    """CLIP-L's states of a text after the last layer and its LayerNorm, as transformers gives them.

    The host's own encoding of a text stops a layer earlier for SDXL, and wherever the user set
    another last layer; the CLIP object is left as it was.

    Args:
        clip: The host's CLIP object, of SD 1.5, of SDXL, or of CLIP-L alone.
        words: The text.

    Returns:
        ``[1, 77, 768]``, or a multiple of 77 for a long text.

    Raises:
        IncompatibleModelError: There is no CLIP-L in it.
    """
    encoder = getattr(getattr(clip, "cond_stage_model", None), "clip_l", None)
    tokens = clip.tokenize(words) if encoder is not None else {}
    if encoder is None or "l" not in tokens:
        found = type(getattr(clip, "cond_stage_model", clip)).__name__
        raise IncompatibleModelError(
            f"clip is a {found} without CLIP-L; an adapter with an instruction reads CLIP-L text. "
            "Connect the CLIP of an SD 1.5 or SDXL checkpoint."
        )
    comfy.model_management.load_models_gpu([clip.patcher])
    beyond_last = encoder.num_layers + 1
    encoder.reset_clip_options()
    encoder.set_clip_options({"layer": beyond_last, "execution_device": clip.patcher.load_device})
    try:
        states = encoder.encode_token_weights(tokens["l"])[0]
    finally:
        encoder.reset_clip_options()
    if states.shape[-1] != WIDTH:
        raise IncompatibleModelError(
            f"clip gives text states of width {states.shape[-1]}; needed are CLIP-L's of {WIDTH}."
        )
    return torch.as_tensor(states).float().to(comfy.model_management.intermediate_device())
