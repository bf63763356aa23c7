"""The cross-attention layers that a MODEL really has, found by walking it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import IncompatibleModelError
from ..layers import KOLORS, SDXL, Address, Block, Family, family_name, find_families
from ..spec import AdapterSpec

KOLORS_VECTOR = 5632
"""Width of the vector condition of Kolors' UNet; SDXL's is 2816."""


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
    unet = _unet(model)
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise IncompatibleModelError(
            f"The model is a {type(unet).__name__}, not a UNet with cross-attention, and "
            "IP-Adapters for it are not supported. Use a checkpoint of the family that the "
            "adapter is made for."
        )
    return list(_walk(unet))


def token_bridge(model: Any) -> Any | None:
    """The Linear ``[4096 -> 2048]`` that Kolors' UNets send text states through, if there is one.

    The host has no class for Kolors; the packs that add one give it under diffusers' name.
    """
    return getattr(_unet(model), "encoder_hid_proj", None)


def family_of(model: Any, layers: list[HostLayer]) -> Family | None:
    """Recognise a MODEL's family by its layers, and Kolors by what it has beside SDXL's."""
    context = max((layer.context_width for layer in layers), default=0)
    families = find_families(context, len(layers))
    if KOLORS not in families:
        return families[0] if families else None
    wide = getattr(model.model, "adm_channels", None) == KOLORS_VECTOR
    return KOLORS if wide or token_bridge(model) is not None else SDXL


def _unet(model: Any) -> Any:
    unet = model.get_model_object("diffusion_model")
    return getattr(unet, "_orig_mod", unet)  # torch.compile's shell


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
    layers = cross_attention_layers(model)
    found = {layer.address: layer for layer in layers}
    context = {layer.context_width for layer in layers} or {0}
    wanted = {layer.address for layer in spec.family.layers}
    family = family_of(model, layers)
    if family != spec.family or set(found) != wanted or context != {spec.family.context_width}:
        name = family.name if family else family_name(max(context), len(found))
        raise IncompatibleModelError(
            f"{label} does not fit this model: the adapter is for {spec.family.name} "
            f"({len(wanted)} cross-attention layers, context {spec.family.context_width}), the "
            f"model is {name} ({len(found)} layers, context {max(context)}). Load a "
            f"{spec.family.name} checkpoint, or an adapter made for this model."
        )
    for layer, width in zip(spec.family.layers, spec.widths, strict=True):
        if found[layer.address].width != width:
            raise IncompatibleModelError(
                f"{label} does not fit this model: its layer {layer.index} is {width} wide, the "
                f"model's layer {layer.address} is {found[layer.address].width} wide. Both count "
                f"as {spec.family.name}; use an adapter trained for this very model."
            )
    if spec.projection.width != spec.family.context_width:
        bridge = token_bridge(model)
        shape = tuple(bridge.weight.shape) if bridge is not None else None
        if shape != (spec.family.context_width, spec.projection.width):
            raise IncompatibleModelError(
                f"{label} makes tokens of width {spec.projection.width}, which the model's "
                f"encoder_hid_proj has to turn into width {spec.family.context_width}; this model "
                f"has {'none' if shape is None else f'one of shape {list(shape)}'}. Load Kolors "
                "with a node pack that keeps this layer."
            )
    return found
