"""The old ids for regions: what one Apply needs, in lists, and one node that applies them all.

An IPADAPTER_PARAMS is a dictionary of lists as long as there are regions, because other packs take
it apart and put it together by these keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..attention import Scaling
from ..errors import IncompatibleModelError
from ..host.regions import restrict
from ..references import Combine
from .calls import Strength, Weight, run
from .common import (
    ParamsType,
    adapter_in,
    combine_in,
    encoder_in,
    image_in,
    mask_in,
    model_in,
    model_out,
    negative_in,
    number_in,
    old,
    scaling_in,
    weight_type_in,
    window_in,
)

Params = Mapping[str, Any]

KEYS = ("image", "attn_mask", "weight", "weight_type", "start_at", "end_at")

SUCCESSOR = "Image Prompt Region and Apply Image Prompt Regions"


def _regions(params: Params) -> Iterator[tuple[Any, ...]]:
    """The values of each region, in the order of `KEYS`.

    Raises:
        IncompatibleModelError: It is no such dictionary, or its lists differ in length.
    """
    lists = [params.get(key) for key in KEYS] if isinstance(params, Mapping) else [None]
    lengths = {len(one) if isinstance(one, list) else None for one in lists}
    if len(lengths) != 1 or None in lengths:
        raise IncompatibleModelError(
            f"The IPADAPTER_PARAMS input got a {type(params).__name__} that is no dictionary of "
            f"equally long lists {', '.join(KEYS)}. Connect IPAdapter Regional Conditioning or "
            "IPAdapter Combine Params."
        )
    return zip(*(params[key] for key in KEYS), strict=True)


class IPAdapterRegionalConditioning(io.ComfyNode):
    """A reference, texts and a mask -> IPADAPTER_PARAMS, CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterRegionalConditioning",
            "IPAdapter Regional Conditioning",
            "ipadapter/params",
            SUCCESSOR,
            inputs=[
                image_in(),
                number_in("image_weight", -1.0, 3.0),
                number_in("prompt_weight", 0.0, 10.0),
                weight_type_in(),
                *window_in(),
                mask_in("mask"),
                io.Conditioning.Input("positive", optional=True),
                io.Conditioning.Input("negative", optional=True),
            ],
            outputs=[
                ParamsType.Output("params", display_name="IPADAPTER_PARAMS"),
                io.Conditioning.Output("positive", display_name="POSITIVE"),
                io.Conditioning.Output("negative", display_name="NEGATIVE"),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        image_weight: Weight,
        prompt_weight: float,
        weight_type: str,
        start_at: float,
        end_at: float,
        mask: Tensor | None = None,
        positive: Any = None,
        negative: Any = None,
    ) -> io.NodeOutput:
        """Keep the texts to the mask, and what is for the model for IPAdapter from Params."""
        values = (image, mask, image_weight, weight_type, start_at, end_at)
        params = {key: [value] for key, value in zip(KEYS, values, strict=True)}
        if mask is not None:
            positive, negative = (
                restrict(one, mask, prompt_weight) for one in (positive, negative)
            )
        return io.NodeOutput(params, positive, negative)


class IPAdapterCombineParams(io.ComfyNode):
    """Several IPADAPTER_PARAMS -> one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterCombineParams",
            "IPAdapter Combine Params",
            "ipadapter/params",
            SUCCESSOR,
            inputs=[ParamsType.Input(f"params_{i}", optional=i > 2) for i in range(1, 6)],
            outputs=[ParamsType.Output("params", display_name="IPADAPTER_PARAMS")],
        )

    @classmethod
    def execute(
        cls,
        params_1: Params,
        params_2: Params,
        params_3: Params | None = None,
        params_4: Params | None = None,
        params_5: Params | None = None,
    ) -> io.NodeOutput:
        """Put the lists one after another."""
        given = [params_1, params_2, params_3, params_4, params_5]
        regions = [region for one in given if one is not None for region in _regions(one)]
        columns = zip(KEYS, zip(*regions, strict=True), strict=True)
        return io.NodeOutput({key: list(values) for key, values in columns})


class IPAdapterFromParams(io.ComfyNode):
    """MODEL + IPADAPTER_PARAMS -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterFromParams",
            "IPAdapter from Params",
            "ipadapter/params",
            SUCCESSOR,
            inputs=[
                model_in(),
                adapter_in(),
                ParamsType.Input("ipadapter_params"),
                combine_in(),
                scaling_in(),
                negative_in(),
                encoder_in(),
            ],
            outputs=[model_out("MODEL")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ipadapter: Any,
        ipadapter_params: Params,
        combine_embeds: Combine,
        embeds_scaling: Scaling,
        image_negative: Tensor | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Apply every region that has a picture, in order."""
        patched = model
        for image, mask, weight, kind, start_at, end_at in _regions(ipadapter_params):
            if image is None:
                continue
            strength = Strength(weight, kind, start_at, end_at, mask, embeds_scaling)
            patched, _ = run(
                patched,
                ipadapter,
                image,
                strength,
                clip_vision=clip_vision,
                negative=image_negative,
                how=combine_embeds,
            )
        return io.NodeOutput(patched.clone() if patched is model else patched)


NODES: list[type[io.ComfyNode]] = [
    IPAdapterRegionalConditioning,
    IPAdapterCombineParams,
    IPAdapterFromParams,
]
