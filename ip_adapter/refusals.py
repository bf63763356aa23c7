"""What a file is that is *not* an adapter for a UNet.

The wrong file in the adapter folder is the most frequent mistake, so it is named.

Source: the published files' tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]

_ADAPTERS: tuple[tuple[str, str], ...] = (
    (r"^(double_blocks\.\d+\.processor\.)?ip_adapter_(proj_model|double)", "FLUX.1 (XLabs)"),
    (r"^double_blocks\.\d+\.processor\.ip_adapter", "FLUX.1 (XLabs)"),
    (r"^ip_adapter\.0\.norm_ip\.linear\.", "SD 3.5 (InstantX)"),
    (r"^ip_adapter\.0\.norm_ip_q\.", "FLUX.1 (InstantCharacter)"),
    (r"^ip_adapter\.0\.add_k_proj_ip\.|^image_proj\.proj_out_big\.", "SD 3 (Instruct)"),
    (r"^ip_adapter\.0\.to_k_ip\.", "FLUX.1 (InstantX)"),
)
"""Adapters of the same idea for transformer models."""

_METHODS: tuple[tuple[str, str], ...] = (
    (r"^(style|content)_image_proj\.", "a CSGO file"),
    (r"^image_proj\.(body|mapping)", "a PuLID file"),
    (r"^(pulid_(encoder|ca)|id_adapter(_attn_layers)?)\.", "a PuLID file"),
)
"""Other methods that use some of the same names."""

_FILES: tuple[tuple[str, str], ...] = (
    (r"lora_(unet|te|down|up|A|B)|\.lora\.", "a LoRA; it belongs into models/loras"),
    (
        r"^(control_model\.|controlnet_|zero_convs\.|input_hint_block\.)",
        "a ControlNet; it belongs into models/controlnet",
    ),
    (
        r"^(model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.)",
        "a whole checkpoint; it belongs into models/checkpoints",
    ),
    (
        r"^(input_blocks\.|down_blocks\.|double_blocks\.|transformer_blocks\.)",
        "a diffusion model; it belongs into models/diffusion_models",
    ),
    (
        r"^(vision_model\.|visual\.)",
        "a CLIP image encoder; it belongs into models/clip_vision",
    ),
    (
        r"^(text_model\.|transformer\.text_model\.)",
        "a text encoder; it belongs into models/text_encoders",
    ),
    (r"^(encoder|decoder)\.(conv_in|down|mid|up|\d+\.)", "a VAE; it belongs into models/vae"),
)


def other_adapter(keys: Iterable[str]) -> str | None:
    """Name the adapter or method, if the keys are of one that a UNet loader cannot run."""
    keys = list(keys)
    if _some_match(r"^image_proj_model\.", keys) and _some_match(r"^ip_adapter\.", keys):
        return "a StoryMaker file, which is another method"
    for pattern, model in _ADAPTERS:
        if _some_match(pattern, keys):
            return f"an IP-Adapter for {model}, which this version does not support"
    for pattern, method in _METHODS:
        if _some_match(pattern, keys):
            return f"{method}, which is another method"
    return None


def other_file(keys: Iterable[str]) -> str:
    """Say what a file without an adapter is, and where it belongs."""
    keys = list(keys)
    for pattern, what in _FILES:
        if _some_match(pattern, keys):
            return what
    if not keys:
        return "a file without tensors"
    return f"something with tensors such as {some(sorted(keys))}"


def some(items: list[str], count: int = 3) -> str:
    """The first few items, and how many there are beside them; ``nothing`` for none."""
    if not items:
        return "nothing"
    more = "" if len(items) <= count else f" and {len(items) - count} more"
    return ", ".join(items[:count]) + more


def _some_match(pattern: str, keys: list[str]) -> bool:
    return any(re.search(pattern, key) for key in keys)
