"""Makes the host know the miniature, through its own detection of models.

The host tells models by their tensors. What it lacks for these are a row in its table of supported
models (UNet, ControlNet, text encoder) and the configuration of the image encoder; with both, its
usual loaders and samplers run the miniature's files. `register` is called where the demo or a test
wants that, or when the host loads this folder as a pack; it changes nothing for other models.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
from transformers import PreTrainedTokenizerFast

from . import family, words

_TEXT = {
    "hidden_act": "gelu",
    "hidden_size": family.WIDTH,
    "intermediate_size": 4 * family.WIDTH,
    "num_attention_heads": family.HEADS,
    "num_hidden_layers": family.TEXT_LAYERS,
    "max_position_embeddings": family.CONTEXT,
    "eos_token_id": words.WORDS.index(words.END),
}

_VISION = {
    "hidden_act": "gelu",
    "hidden_size": family.WIDTH,
    "image_size": family.VISION_SIZE,
    "intermediate_size": 4 * family.WIDTH,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
    "num_attention_heads": family.HEADS,
    "num_channels": 3,
    "num_hidden_layers": family.VISION_LAYERS,
    "patch_size": family.PATCH,
    "projection_dim": family.WIDTH,
}
_LAST_LAYER = f"vision_model.encoder.layers.{family.VISION_LAYERS - 1}.layer_norm1.weight"
_NEXT_LAYER = f"vision_model.encoder.layers.{family.VISION_LAYERS}.layer_norm1.weight"


class _TextModel(comfy.clip_model.CLIPTextModel):  # type: ignore[misc]
    """The host's, with as many words as the world has; the host's own has CLIP's 49408."""

    def __init__(self, config: Any, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        self.set_input_embeddings(
            operations.Embedding(len(words.WORDS), family.WIDTH, dtype=dtype, device=device)
        )


class _ClipModel(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None
    ) -> None:
        end = words.WORDS.index(words.END)
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(_TEXT),
            model_class=_TextModel,
            special_tokens={"start": words.WORDS.index(words.START), "end": end, "pad": end},
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class _Tokenizer(comfy.sd1_clip.SDTokenizer):  # type: ignore[misc]
    def __init__(
        self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the host reads tokenizers from folders
            words.save(Path(folder))
            super().__init__(
                folder,
                embedding_directory=embedding_directory,
                embedding_size=family.WIDTH,
                tokenizer_class=PreTrainedTokenizerFast,
                tokenizer_data=tokenizer_data or {},
            )


class Tokenizer(comfy.sd1_clip.SD1Tokenizer):  # type: ignore[misc]
    """The host's SD 1.5 tokenizer around the world's words."""

    def __init__(
        self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None
    ) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=_Tokenizer)


class Clip(comfy.sd1_clip.SD1ClipModel):  # type: ignore[misc]
    """The host's SD 1.5 text encoder around the miniature's."""

    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(device, dtype, model_options or {}, clip_model=_ClipModel)


class Miniature(comfy.supported_models.SD15):  # type: ignore[misc]
    """Stable Diffusion 1.5's family at pocket size."""

    unet_config = {  # noqa: RUF012 - the host's form
        **comfy.supported_models.SD15.unet_config,
        "context_dim": family.WIDTH,
        "model_channels": family.UNET["model_channels"],
    }
    unet_extra_config = {"num_heads": family.UNET["num_heads"], "num_head_channels": -1}  # noqa: RUF012

    def clip_target(self, state_dict: Any = None) -> Any:
        """What the host builds for the text encoder."""
        return comfy.supported_models_base.ClipTarget(Tokenizer, Clip)


def register() -> None:
    """Let the host recognise the miniature's files; harmless when it is done again."""
    models = comfy.supported_models.models
    if not any(known.__name__ == Miniature.__name__ for known in models):
        models.append(Miniature)
    load = comfy.clip_vision.load_clipvision_from_sd
    if not hasattr(load, "miniature"):
        comfy.clip_vision.load_clipvision_from_sd = _with_miniature(load)


def _with_miniature(load: Any) -> Any:
    """The host's loader of image encoders, which has no table to add to."""

    @functools.wraps(load)
    def loader(sd: Any, prefix: str = "", convert_keys: bool = False) -> Any:
        if convert_keys:
            sd, convert_keys = comfy.clip_vision.convert_to_transformers(sd, prefix), False
        if not _is_ours(sd):
            return load(sd, prefix, convert_keys)
        with tempfile.TemporaryDirectory() as folder:  # older hosts read a file only
            path = Path(folder) / "clip_vision_config.json"
            path.write_text(json.dumps(_VISION))
            vision = comfy.clip_vision.ClipVisionModel(str(path))
        vision.load_sd(sd)
        return vision

    loader.miniature = True  # type: ignore[attr-defined]
    return loader


def _is_ours(sd: Any) -> bool:
    return _LAST_LAYER in sd and _NEXT_LAYER not in sd and sd[_LAST_LAYER].shape[0] == family.WIDTH
