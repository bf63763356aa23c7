"""The UNet and ControlNet: the host's own classes with few channels, weights set to begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ops
import torch
from comfy.cldm.cldm import ControlNet
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from . import family

_OUTPUT = [1] * 4
"""Transformers in each block of the second half."""

_ZERO = ("out.2", "proj_out", "out_layers.3", "zero_convs", "middle_block_out")
"""Ends of branches: at zero each block begins as the identity, as the published ones began."""

OPTIONS: dict[str, Any] = {
    # The host's fastest back end may be without a backward pass.
    "optimized_attention_override": lambda _, *args, **more: attention_pytorch(*args, **more)
}
"""Transformer options for a forward pass that gradients flow through."""


def unet(tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Make a UNet in float32, new or from tensors under the host's names."""
    made = UNetModel(
        out_channels=4,
        transformer_depth_output=list(_OUTPUT),
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
        **family.UNET,
    )
    return _ready(made, tensors)


def controlnet(base: Mapping[str, Tensor]) -> nn.Module:
    """Make a ControlNet in float32 whose first half is a copy of a UNet's, as the paper has it.

    Source: arXiv 2302.05543.
    """
    made = _ready(
        ControlNet(
            hint_channels=3,
            dtype=torch.float32,
            operations=comfy.ops.disable_weight_init,
            **family.UNET,
        ),
        None,
    )
    own = made.state_dict()
    made.load_state_dict(own | {name: base[name] for name in own if name in base})
    return made


def _ready(made: nn.Module, tensors: Mapping[str, Tensor] | None) -> nn.Module:
    if tensors is not None:
        made.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return made
    for name, module in made.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # The host's layers leave their weights as the memory was; torch's own set them.
            (nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d).reset_parameters(module)
            if any(part in name for part in _ZERO):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    return made
