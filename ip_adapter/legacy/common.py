"""What the old ids share: sockets, widgets and their ranges, as the old pack reported them."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..attention import Scaling
from ..host.features import schema
from ..nodes.common import EmbedsType as EmbedsType
from ..nodes.common import FaceModelType, IPAdapterType
from ..references import COMBINATIONS

ParamsType = io.Custom("IPADAPTER_PARAMS")
StrategyType = io.Custom("WEIGHTS_STRATEGY")

WEIGHT_TYPES = (
    *("linear", "ease in", "ease out", "ease in-out", "reverse in-out"),
    *("weak input", "weak output", "weak middle", "strong middle"),
    *("style transfer", "composition", "strong style transfer", "style and composition"),
    *("style transfer precise", "composition precise"),
)
"""In the order of the old pack; each is a preset of ours by the same name."""

COMBINE = ("concat", "add", "subtract", "average", "norm average")
COMBINE_ALL = (*COMBINE, "max", "min")
assert set(COMBINE_ALL) == set(COMBINATIONS)


class Options(list[str]):
    """The options of a choice, in the place where an old node reports its type.

    Plug-ins read the lists of files there. The host looks types up in a dictionary, so this list
    has a hash.
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))


class Choice(io.Combo.Input):
    """A combo that reports itself as nodes did before 2025."""

    def get_io_type(self) -> Options:
        """Report the options where others report the word COMBO."""
        return Options(self.options)

    def as_dict(self) -> dict[str, Any]:
        """Leave out what the type says already."""
        described: dict[str, Any] = super().as_dict()
        return {k: v for k, v in described.items() if k not in ("options", "multiselect")}


def old(node_id: str, display_name: str, category: str, successor: str, **fields: Any) -> io.Schema:
    """A schema under an old id, hidden from the menu.

    Args:
        node_id: The old id.
        display_name: Its old name.
        category: Its old place in the menu.
        successor: What to use in new workflows.
        fields: Inputs and outputs.
    """
    return schema(
        node_id=node_id,
        display_name=display_name,
        category=category,
        description=f"Kept for saved workflows. In new ones use {successor}.",
        is_deprecated=True,
        **fields,
    )


def model_in() -> io.Model.Input:
    """The MODEL to patch."""
    return io.Model.Input("model")


def adapter_in(*, optional: bool = False) -> io.Custom.Input:
    """The adapter, alone or from a unified loader with what goes with it."""
    return IPAdapterType.Input("ipadapter", optional=optional)


def image_in(name: str = "image") -> io.Image.Input:
    """A batch of references."""
    return io.Image.Input(name)


def number_in(
    name: str, low: float, high: float, default: float = 1.0, step: float = 0.05
) -> io.Float.Input:
    """A number with a range."""
    return io.Float.Input(name, default=default, min=low, max=high, step=step)


def weight_in(high: float, name: str = "weight") -> io.Float.Input:
    """A weight from -1; a list of them, by link, weighs each picture of a batch."""
    return number_in(name, -1, high)


def weight_type_in() -> Choice:
    """The preset."""
    return Choice("weight_type", options=list(WEIGHT_TYPES))


def combine_in(default: str | None = None) -> Choice:
    """How several references become one."""
    return Choice("combine_embeds", options=list(COMBINE), default=default)


def window_in() -> tuple[io.Float.Input, io.Float.Input]:
    """The part of the schedule."""
    return (
        number_in("start_at", 0.0, 1.0, 0.0, 0.001),
        number_in("end_at", 0.0, 1.0, 1.0, 0.001),
    )


def scaling_in() -> Choice:
    """What a weight multiplies."""
    return Choice("embeds_scaling", options=list(get_args(Scaling)))


def batch_size_in() -> io.Int.Input:
    """How many pictures the old pack encoded at once; ours bounds it by memory."""
    return io.Int.Input("encode_batch_size", default=0, min=0, max=4096)


def mask_in(name: str = "attn_mask") -> io.Mask.Input:
    """Where in the picture."""
    return io.Mask.Input(name, optional=True)


def negative_in() -> io.Image.Input:
    """What to lead away from."""
    return io.Image.Input("image_negative", optional=True)


def encoder_in() -> io.ClipVision.Input:
    """The image encoder; a unified loader's comes with the adapter."""
    return io.ClipVision.Input("clip_vision", optional=True)


def face_model_in() -> io.Custom.Input:
    """The face model; a unified loader's comes with the adapter."""
    return FaceModelType.Input("insightface", optional=True)


def extras_in() -> tuple[Any, ...]:
    """The optional sockets that nearly all apply nodes end with."""
    return negative_in(), mask_in(), encoder_in()


def apply_schema(
    node_id: str, display_name: str, category: str, successor: str, *middle: Any
) -> io.Schema:
    """A node with a MODEL, an adapter, references, and the usual optional sockets.

    Args:
        node_id: See `old`.
        display_name: See `old`.
        category: See `old`.
        successor: See `old`.
        middle: The inputs between the references and the optional sockets.
    """
    return old(
        node_id,
        display_name,
        category,
        successor,
        inputs=[model_in(), adapter_in(), image_in(), *middle, *extras_in()],
        outputs=[model_out("MODEL")],
    )


def model_out(name: str | None = None) -> io.Model.Output:
    """The patched MODEL."""
    return io.Model.Output("model", display_name=name)
