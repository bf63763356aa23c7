"""The node that says which image prompts are active on a MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .. import diagram, drawing
from ..host import inspection
from ..host.features import schema, show_on_node
from .common import CATEGORY


class Inspect(io.ComfyNode):
    """MODEL -> words and a diagram of what acts on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptInspect",
            display_name="Inspect Image Prompts",
            category=CATEGORY,
            description=(
                "Says in words and a diagram which image prompts are active on a MODEL: adapter, "
                "image encoder, layers, weights, steps and masks. It samples nothing and changes "
                "nothing."
            ),
            search_aliases=["ip adapter info", "debug image prompt", "show layers", "weights"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that goes to the sampler, with image prompts on it."
                ),
            ],
            outputs=[
                io.String.Output(
                    "text", display_name="text", tooltip="Every image prompt in words, in order."
                ),
                io.Image.Output(
                    "diagram",
                    display_name="diagram",
                    tooltip="A row for each image prompt: layers by weight, steps, mask.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        """Read what travels on the model."""
        found = inspection.inspect(model)
        text, picture = found.words(), drawing.to_image(diagram.draw(found))
        show_on_node(text)
        return io.NodeOutput(text, picture, ui=ui.PreviewImage(picture))


NODES: list[type[io.ComfyNode]] = [Inspect]
