"""Nodes that show where references act."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io, ui

from .. import heatmap
from ..host import recording
from ..host.features import require_own, schema, show_on_node
from .common import CATEGORY

MapsType = io.Custom("ATTENTION_MAPS")

_PIXELS = 8
"""Side of what one pixel of the latent stands for, in all families of UNets."""


class RecordMaps(io.ComfyNode):
    """MODEL -> MODEL, ATTENTION_MAPS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptRecordMaps",
            display_name="Record Attention Maps",
            category=CATEGORY,
            description=(
                "Has a MODEL record where its image prompts act while it samples. The pictures "
                "stay the same, bit for bit; each step takes a little longer. Show Attention Maps "
                "draws what was recorded."
            ),
            search_aliases=["attention map", "heat map", "where the reference acts", "debug"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model; before or after its Apply IP-Adapter nodes."
                ),
                io.Int.Input(
                    "picture",
                    default=0,
                    min=0,
                    max=4095,
                    tooltip="Which picture of a batch, counted from 0; the last one if there are "
                    "fewer.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="For the sampler, or for Apply."
                ),
                MapsType.Output(
                    "maps",
                    display_name="maps",
                    tooltip="For Show Attention Maps; they are there when the sampler is done.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, picture: int) -> io.NodeOutput:
        """Put a recorder on a clone."""
        return io.NodeOutput(*recording.record(model, picture))


class ShowMaps(io.ComfyNode):
    """ATTENTION_MAPS -> IMAGE, MASK."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptShowMaps",
            display_name="Show Attention Maps",
            category=CATEGORY,
            description=(
                "Draws where each reference acts, as heat maps: by reference, by layer group or "
                "over the steps. The brighter a place, the more a reference adds there to what "
                "the text says."
            ),
            search_aliases=["attention map", "heat map", "where the reference acts", "debug"],
            inputs=[
                MapsType.Input("maps", tooltip="From Record Attention Maps."),
                io.Latent.Input(
                    "latent",
                    tooltip="What the sampler made. It makes this node wait for the sampler, and "
                    "tells which sampling to show if the model was used for several.",
                ),
                io.Combo.Input(
                    "view",
                    options=list(get_args(heatmap.View)),
                    default="by reference",
                    tooltip="by reference: one map for each. by layer group: what it does in each "
                    "part of the network. over steps: how that changes while the picture is made.",
                ),
                io.Combo.Input(
                    "scale",
                    options=list(get_args(heatmap.Scale)),
                    default="same for all",
                    tooltip="What the brightest colour stands for. same for all: maps compare in "
                    "strength. each its own: also weak ones show where they act.",
                ),
                io.Int.Input(
                    "reference",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip="The number of the map to show in the view by reference, counted from "
                    "1; 0 is all of them.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The decoded picture, to lay the colours over.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", display_name="image", tooltip="The maps with their labels."
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="The map of each reference, 0 to 1, in the size of the picture.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        maps: Any,
        latent: dict[str, Any],
        view: heatmap.View,
        scale: heatmap.Scale,
        reference: int = 0,
        image: Any = None,
    ) -> io.NodeOutput:
        """Draw what was recorded."""
        recorder = require_own(maps, recording.Recorder, "maps", "Record Attention Maps")
        shown = recorder.find(latent["samples"])
        picture = None if image is None else image[min(shown.picture, len(image) - 1)]
        drawn = heatmap.draw(shown, view, scale=scale, reference=reference, picture=picture)
        height, width = (
            (_PIXELS * side for side in shown.latent) if picture is None else picture.shape[:2]
        )
        masks = heatmap.as_masks(shown, (height, width), scale=scale, reference=reference)
        show_on_node(f"{len(shown.references)} references, {shown.steps[-1][1]} steps")
        return io.NodeOutput(drawn, masks, ui=ui.PreviewImage(drawn))


NODES: list[type[io.ComfyNode]] = [RecordMaps, ShowMaps]
