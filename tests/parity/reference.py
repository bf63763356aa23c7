"""diffusers' side of the comparison: its loaders, projections and attention processors.

They are driven as its pipelines drive them: negative rows first, guidance applied outside.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.parity.unets import SIZES, TIMESTEP, Inputs
from tests.synthetic import adapters

Scale = float | Mapping[str, Any]
"""A weight for all layers, or a weight per block as `set_ip_adapter_scale` takes it."""


def projection(tensors: adapters.Tensors) -> Any:
    """Build diffusers' projection from a published file's tensors, in float32."""
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    module = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(
        adapters.nested(tensors)["image_proj"], low_cpu_mem_usage=False
    )
    return module.float().eval().requires_grad_(False)


def load(
    unet: Any,
    files: Sequence[adapters.Tensors],
    scales: Sequence[Scale] = (1.0,),
    *,
    lora: float | None = None,
    in_place: bool = False,
) -> Any:
    """Load adapters into a copy of a UNet, as `pipeline.load_ip_adapter` does.

    Args:
        unet: The UNet, without adapters.
        files: Tensors of each adapter, flat keys.
        scales: One for each adapter.
        lora: Strength of the LoRA inside the files, or None to leave it out.
        in_place: Change the UNet itself.
    """
    from diffusers.loaders import IPAdapterMixin, StableDiffusionLoraLoaderMixin

    unet = unet if in_place else copy.deepcopy(unet)
    nested = [adapters.nested(tensors) for tensors in files]
    unet._load_ip_adapter_weights(nested)
    unet.float()
    if lora is not None:
        loras = unet._load_ip_adapter_loras(nested)
        assert loras, "the file holds no LoRA"
        for number, tensors in loras.items():
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(
                tensors, network_alphas=None, unet=unet, adapter_name=f"faceid_{number}"
            )
        names = [f"faceid_{number}" for number in loras]
        unet.set_adapters(names, [lora] * len(names))
    pipeline = SimpleNamespace(unet=unet, unet_name="unet")
    IPAdapterMixin.set_ip_adapter_scale(pipeline, [_plain(scale) for scale in scales])
    return unet.eval().requires_grad_(False)


def _plain(scale: Scale) -> Any:
    return copy.deepcopy(dict(scale)) if isinstance(scale, Mapping) else scale


def predict(
    unet: Any, given: Inputs, embeds: Sequence[Tensor] = (), masks: Sequence[Tensor] = ()
) -> Tensor:
    """Noise for the rows ``[unconditional, conditional]``.

    Args:
        unet: With or without adapters.
        given: What it reads.
        embeds: For each adapter ``[2, images, ...]``.
        masks: For each adapter ``[1, images, H, W]``, or none at all.
    """
    added: dict[str, Any] = {"image_embeds": list(embeds)} if embeds else {}
    if given.pooled is not None:
        added["text_embeds"] = given.pooled
        added["time_ids"] = torch.tensor([SIZES, SIZES])
    with torch.inference_mode():
        return unet(  # type: ignore[no-any-return]
            torch.cat([given.x, given.x]),
            TIMESTEP,
            encoder_hidden_states=given.text,
            added_cond_kwargs=added,
            cross_attention_kwargs={"ip_adapter_masks": list(masks)} if masks else None,
        ).sample
