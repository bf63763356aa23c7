"""Nodes for a grid of pictures: one MODEL for each weight and preset, and the labelled sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from .. import grid as grids
from .. import prompt
from ..errors import IPAdapterError
from ..grid import Grid
from ..host import adapters, patching
from ..host.features import require_own, schema, show_on_node
from ..influence import Influence
from .common import CATEGORY, ImagePromptType, InfluenceType, IPAdapterType, window_inputs

GridType = io.Custom("IMAGE_GRID")

BATCHES = ("one sheet each", "side by side")
"""What becomes of several pictures in a cell."""

_PLAIN = Influence(composition=1.0, style_boost=1.0, composition_boost=0.0)
"""What Image Prompt Influence gives where nothing is changed."""


class PromptGrid(io.ComfyNode):
    """MODEL + IMAGE_PROMPT + weights + presets -> a list of MODELs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptGrid",
            display_name="Image Prompt Grid",
            category=CATEGORY,
            description=(
                "Applies an image prompt with several weights and presets at once, to compare "
                "them. It gives a list of models: the sampler behind it runs once for each, with "
                "the same seed, and Label Grid puts the pictures on one sheet."
            ),
            search_aliases=[
                "xy plot",
                "weight grid",
                "compare weights",
                "sweep",
                "ip adapter grid",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the image prompt to."),
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter that encoded the image prompt."
                ),
                ImagePromptType.Input(
                    "image_prompt", tooltip="From Encode Image Prompt or Load Image Prompt."
                ),
                io.String.Input(
                    "weights",
                    default=grids.WEIGHTS,
                    tooltip="A column for each: numbers from -1 to 3 with commas between them. 0 "
                    "is the model without the image.",
                ),
                io.String.Input(
                    "presets",
                    default="linear",
                    multiline=True,
                    tooltip="A row for each: names of presets of Image Prompt Influence with "
                    "commas between them, such as 'linear, style transfer, composition'. linear "
                    "is all layers alike.",
                ),
                *window_inputs("the image begins to count.", "the image stops counting."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the image counts: white fully, black not at all.",
                ),
                InfluenceType.Input(
                    "influence",
                    optional=True,
                    tooltip="From Image Prompt Influence: all of it but its layers, which the "
                    "presets here replace.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="A list for one sampler, which runs once for each.",
                    is_output_list=True,
                ),
                GridType.Output(
                    "grid", display_name="grid", tooltip="Rows and columns, for Label Grid."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, weights: str | None = None, presets: str | None = None) -> bool | str:
        """Refuse texts that mean nothing before anything is loaded; None comes from a link."""
        try:
            if weights is not None:
                grids.parse_weights(weights)
            if presets is not None:
                grids.parse_presets(presets)
        except IPAdapterError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        ip_adapter: Any,
        image_prompt: prompt.ImagePrompt,
        weights: str,
        presets: str,
        start_at: float,
        end_at: float,
        mask: Any = None,
        influence: Influence | None = None,
    ) -> io.NodeOutput:
        """Patch a clone for each cell; they share the adapter and the prompt."""
        columns, rows = grids.parse_weights(weights), grids.parse_presets(presets)
        adapter = adapters.require(ip_adapter)
        patched = [
            patching.apply(
                model,
                adapter,
                image_prompt,
                weight=weight,
                start=start_at,
                end=end_at,
                mask=mask,
                influence=replace(influence or _PLAIN, layers=preset),
            )[0]
            for preset in rows
            for weight in columns
        ]
        show_on_node(f"{len(rows)} x {len(columns)}: {len(patched)} models")
        return io.NodeOutput(patched, grids.of(columns, rows))


class LabelGrid(io.ComfyNode):
    """The pictures of a grid -> IMAGE, a labelled sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptGridPicture",
            display_name="Label Grid",
            category=CATEGORY,
            description=(
                "Puts the pictures of an Image Prompt Grid on one sheet: presets beside the rows, "
                "weights above the columns. It shows the sheet, and gives it to Save Image."
            ),
            search_aliases=["xy plot", "contact sheet", "label images", "image grid"],
            inputs=[
                io.Image.Input(
                    "images", tooltip="The pictures of all cells, straight from VAE Decode."
                ),
                GridType.Input("grid", tooltip="From the Image Prompt Grid that made the models."),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default=BATCHES[0],
                    optional=True,
                    tooltip="Where the latent batch has several pictures. one sheet each: the "
                    "first of every cell, then the second, and so on. side by side: all in one "
                    "cell.",
                ),
                io.Int.Input(
                    "cell_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    optional=True,
                    tooltip="Longer side of each picture on the sheet, in pixels. 0 leaves them as "
                    "they are; only very small ones are enlarged.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The sheet, or the sheets.")
            ],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: Sequence[Any],
        grid: Sequence[Any],
        batch: Sequence[str] = BATCHES[:1],
        cell_size: Sequence[int] = (0,),
    ) -> io.NodeOutput:
        """Draw the sheet; every input is a list here."""
        known = [require_own(one, Grid, "grid", "Image Prompt Grid") for one in grid]
        grids.check(known, images)
        pictures = [grids.beside(one) for one in images] if batch[0] == BATCHES[1] else images
        sheet = grids.draw(known, pictures, cell_size[0])
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet))


NODES: list[type[io.ComfyNode]] = [PromptGrid, LabelGrid]
