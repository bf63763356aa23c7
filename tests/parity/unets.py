"""One random UNet in two programs, diffusers' and the host's, and one prediction of the latter.

Both sides hold the same tensors; the host's names come from the host's own table. The narrow ones
have the topology of the released UNets at a tenth of the width, as the fixture pack registers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests import host_process
from tests.synthetic.models import Noise

TIMESTEP = 500
SIZES = (512.0, 384.0, 16.0, 32.0, 256.0, 192.0)
"""SDXL's height, width, crop top, crop left, target height and width; all differ on purpose."""

_SD: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # the number of heads, despite the name
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "SD 1.5": _SD,
    "SD 2.x": _SD
    | {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": _SDXL,
    "Kolors": _SDXL
    | {
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": 5632,
    },
}
"""The published unet/config.json of each family, where it differs from the defaults."""

NARROW: dict[str, dict[str, Any]] = {
    "SD 1.5": {"block_out_channels": (32, 64, 128, 128)},
    "SD 2.x": {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": (2, 4, 8, 8)},
    "SDXL": {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)},
    "Kolors": {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)},
}
"""What the fixture pack's UNets have instead."""

TEXT = {"SD 1.5": 768, "SD 2.x": 1024, "SDXL": 2048, "Kolors": 4096}
POOLED = {"SDXL": 1280, "Kolors": 4096}
"""Width of the text states that a prediction reads, and of the pooled one."""

_HOST_PLAN: dict[bool, dict[str, Any]] = {
    False: {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1,
    },
    True: {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    },
}
"""What the host calls the topology, by whether it is SDXL's."""


@dataclass(frozen=True)
class Inputs:
    """What both sides are given; text rows are unconditional, conditional."""

    x: Tensor
    text: Tensor
    pooled: Tensor | None = None


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(family: str, size: tuple[int, int] = (16, 16)) -> Inputs:
    pooled = draw(2, POOLED[family], seed=4) if family in POOLED else None
    return Inputs(draw(1, 4, *size, seed=1), draw(2, 77, TEXT[family], seed=2), pooled)


def _empty(config: Mapping[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def _weights(unet: Any) -> dict[str, Tensor]:
    """Random ones, rounded to half precision but for their type."""
    noise = Noise("parity")
    weights = {}
    for key, value in unet.state_dict().items():
        if value.ndim > 1:
            weights[key] = noise.draw(tuple(value.shape), value[0].numel() ** -0.5)
        else:
            weights[key] = noise.draw(tuple(value.shape), 0.05) + float(key.endswith(".weight"))
    return weights


def _filled(unet: Any, weights: Mapping[str, Tensor]) -> Any:
    unet.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return unet.eval().requires_grad_(False)


def _host_names(family: str, keys: Iterable[str]) -> dict[str, str]:
    """diffusers' key -> the host's, by the host's own table."""
    import comfy.utils

    names = comfy.utils.unet_to_diffusers(_HOST_PLAN[family in POOLED])
    # Of Kolors' own Linear the host knows no name; the packs that know it keep diffusers'.
    return {key: names.get(key, key) for key in keys}


def _on_host(family: str, weights: Mapping[str, Tensor]) -> Any:
    """A MODEL that holds these tensors, given under diffusers' names."""
    import comfy.sd

    names = _host_names(family, weights)
    renamed = {names[key]: tensor for key, tensor in weights.items()}
    model = comfy.sd.load_diffusion_model_state_dict(
        renamed, model_options={"dtype": torch.float32}
    )
    assert model is not None, f"the host does not recognise {family}"
    return model


@dataclass(frozen=True)
class Pair:
    """The two sides. Whoever loads an adapter into `reference` loads it into a copy.

    Attributes:
        family: A key of `CONFIGS`.
        reference: diffusers' UNet.
        model: The host's MODEL.
    """

    family: str
    reference: Any
    model: Any


def _start() -> None:
    import diffusers

    diffusers.logging.set_verbosity_error()  # it warns of every cast of an adapter's float16 file
    host_process.start()


def pair(family: str) -> Pair:
    """The narrow UNets of a family."""
    _start()
    unet = _empty(CONFIGS[family] | NARROW[family])
    weights = _weights(unet)
    return Pair(family, _filled(unet, weights), _on_host(family, weights))


def wide_pair(family: str) -> Pair:
    """The UNets in full width. They share their numbers to save memory: no LoRA here."""
    _start()
    unet = _empty(CONFIGS[family])
    weights = _weights(unet)
    names, model = _host_names(family, weights), _on_host(family, weights)
    del weights
    found = model.model.diffusion_model.state_dict()
    return Pair(family, _filled(unet, {key: found[name] for key, name in names.items()}), model)


def guided(rows: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance over ``[unconditional, conditional]`` predictions."""
    negative, positive = rows.chunk(2)
    return negative + cfg * (positive - negative)


def library(name: str) -> ModuleType:
    """One of our modules, as the host knows it."""
    return host_process.start().library(name)


def load(path: Path) -> Any:
    """Our loader's adapter."""
    return library("ip_adapter.host.adapters").load(path)


def tokens(adapter: Any, **features: Any) -> Tensor:
    """Our image tokens."""
    given = library("ip_adapter.projections").Features(**features)
    with torch.inference_mode():
        return adapter.module.image_tokens(given)  # type: ignore[no-any-return]


def apply(model: Any, adapter: Any, image_tokens: Tensor, **influence: Any) -> Any:
    """Our patch; the first row of tokens is that of no image, the others are the references."""
    prompt = library("ip_adapter.prompt").from_tokens(
        image_tokens[1:], image_tokens[:1], adapter.fingerprint, adapter.label
    )
    if "layers" in influence:
        layers = influence.pop("layers")
        influence["influence"] = library("ip_adapter.influence").Influence(layers=layers)
    return library("ip_adapter.host.patching").apply(model, adapter, prompt, **influence)[0]


def predict(model: Any, given: Inputs, cfg: float = 7.5) -> Tensor:
    """The guided noise of one step of the host's sampler."""
    import comfy.samplers

    sigma = model.get_model_object("model_sampling").sigmas[TIMESTEP]
    seen: dict[str, Tensor] = {}

    def one_step(
        denoise: Any, noisy: Tensor, sigmas: Tensor, extra_args: Any = None, **kwargs: Any
    ) -> Tensor:
        denoised = denoise(noisy, sigmas[:1].expand(len(noisy)), **(extra_args or {}))
        seen["noise"] = (noisy - denoised) / sigmas[0]
        return denoised

    def conditioning(row: int) -> list[Any]:
        extra: dict[str, Any] = {}
        if given.pooled is not None:
            names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
            extra = dict(zip(names, SIZES, strict=True))
            extra["pooled_output"] = given.pooled[row : row + 1]
        return [[given.text[row : row + 1], extra]]

    scale = (sigma**2 + 1) ** 0.5  # what the host divides its input by
    with torch.inference_mode():
        comfy.samplers.sample(
            model,
            given.x * scale / sigma,
            positive=conditioning(1),
            negative=conditioning(0),
            cfg=cfg,
            device=torch.device("cpu"),
            sampler=comfy.samplers.KSAMPLER(one_step),
            sigmas=torch.stack([sigma, torch.zeros(())]),
            latent_image=torch.zeros_like(given.x),
            disable_pbar=True,
        )
    return seen["noise"]
