"""What the nodes share: socket types, the menu's place, the check of a chosen file."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io

from .. import images
from ..errors import IPAdapterError
from ..host import folders
from ..references import UNCONDITIONALS

CATEGORY = "IP-Adapter"

IPAdapterType = io.Custom("IPADAPTER")
ImagePromptType = io.Custom("IMAGE_PROMPT")
ReferencesType = io.Custom("IMAGE_REFERENCES")
InfluenceType = io.Custom("INFLUENCE")
FaceModelType = io.Custom("INSIGHTFACE")
FaceType = io.Custom("FACE")
EmbedsType = io.Custom("EMBEDS")


def check_name(folder: str, name: str) -> bool | str:
    """Validate a chosen file in our words; the host's own message only lists what exists."""
    try:
        folders.find(folder, name)
    except IPAdapterError as error:
        return str(error)
    return True


def fit_input(tooltip: str) -> io.Combo.Input:
    """How a picture that is not square is made so."""
    return io.Combo.Input(
        "fit", options=list(get_args(images.Fit)), default="crop", tooltip=tooltip
    )


def image_size_input(tooltip: str) -> io.Int.Input:
    """Side of the square that the encoder sees; 0 is its own."""
    return io.Int.Input(
        "image_size", default=0, min=0, max=2048, step=14, optional=True, tooltip=tooltip
    )


def window_inputs(begins: str, stops: str) -> list[io.Float.Input]:
    """``start_at`` and ``end_at``: the part of the schedule in which something acts.

    Args:
        begins: What begins at the first fraction, for the tooltip.
        stops: What stops at the last.
    """
    return [
        io.Float.Input(
            name,
            default=default,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip=f"Fraction of the schedule at which {what}",
        )
        for name, default, what in (("start_at", 0.0, begins), ("end_at", 1.0, stops))
    ]


def unconditional_input() -> io.Combo.Input:
    """What stands for "no image"."""
    return io.Combo.Input(
        "unconditional",
        options=list(UNCONDITIONALS),
        default=UNCONDITIONALS[0],
        optional=True,
        tooltip="What guidance leads away from, for adapters that read details (plus, full-face). "
        "as trained: an empty picture as training had it. black picture: as "
        "ComfyUI_IPAdapter_plus did, for the same numbers as there. Others have no choice.",
    )


def image_prompt_output(tooltip: str) -> io.Custom.Output:
    """The image prompt that a node makes."""
    return ImagePromptType.Output("image_prompt", display_name="image_prompt", tooltip=tooltip)
