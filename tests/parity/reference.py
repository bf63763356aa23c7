"""diffusers' side of the comparison."""

from __future__ import annotations

from typing import Any

from tests.synthetic import adapters


def projection(tensors: adapters.Tensors) -> Any:
    """Build diffusers' projection from a published file's tensors, in float32."""
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    module = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(
        adapters.nested(tensors)["image_proj"], low_cpu_mem_usage=False
    )
    return module.float().eval().requires_grad_(False)
