"""The cross-attention layers that a MODEL really has, found by walking it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import IncompatibleModelError
from ..layers import Address, Block, family_name
from ..spec import AdapterSpec


@dataclass(frozen=True)
class HostLayer:
    """One cross-attention layer of the host's UNet.

    Attributes:
        address: Where the host looks up an attention patch.
        width: Width C of its query.
        context_width: Width of the text tokens it reads.
        heads: Attention heads H.
    """

    address: Address
    width: int
    context_width: int
    heads: int


def cross_attention_layers(model: Any) -> list[HostLayer]:
    """List a MODEL's cross-attention layers.

    Raises:
        IncompatibleModelError: The model is not a UNet.
    """
    unet = model.get_model_object("diffusion_model")
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile's shell
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise IncompatibleModelError(
            f"The model is a {type(unet).__name__}, not a UNet with cross-attention, and "
            "IP-Adapters for it are not supported. Use a checkpoint of the family that the "
            "adapter is made for."
        )
    return list(_walk(unet))


def _walk(unet: Any) -> Iterator[HostLayer]:
    numbered: list[tuple[Block, int, Any]] = [
        *(("input", i, block) for i, block in enumerate(unet.input_blocks)),
        ("middle", 0, unet.middle_block),
        *(("output", i, block) for i, block in enumerate(unet.output_blocks)),
    ]
    for block, number, layers in numbered:
        for layer in layers:
            for depth, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
                attention = transformer.attn2
                if attention is not None:
                    yield HostLayer(
                        (block, number, depth),
                        width=attention.to_q.out_features,
                        context_width=attention.to_k.in_features,
                        heads=attention.heads,
                    )


def match(spec: AdapterSpec, model: Any, label: str) -> dict[Address, HostLayer]:
    """Pair every layer of an adapter with a layer of the model.

    Returns:
        The model's layers by address, exactly those the adapter has weights for.

    Raises:
        IncompatibleModelError: Another family, other layers or other widths; nothing was changed.
    """
    found = {layer.address: layer for layer in cross_attention_layers(model)}
    context = {layer.context_width for layer in found.values()} or {0}
    wanted = {layer.address for layer in spec.family.layers}
    if set(found) != wanted or context != {spec.family.context_width}:
        raise IncompatibleModelError(
            f"{label} does not fit this model: the adapter is for {spec.family.name} "
            f"({len(wanted)} cross-attention layers, context {spec.family.context_width}), the "
            f"model is {family_name(max(context), len(found))} ({len(found)} layers, context "
            f"{max(context)}). Load a {spec.family.name} checkpoint, or an adapter made for this "
            "model."
        )
    for layer, width in zip(spec.family.layers, spec.widths, strict=True):
        if found[layer.address].width != width:
            raise IncompatibleModelError(
                f"{label} does not fit this model: its layer {layer.index} is {width} wide, the "
                f"model's layer {layer.address} is {found[layer.address].width} wide. Both count "
                f"as {spec.family.name}; use an adapter trained for this very model."
            )
    return found
