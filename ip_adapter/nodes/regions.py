"""Nodes for several image prompts on one picture, each in a place of its own."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .. import masks
from ..host import adapters
from ..host.features import schema, show_on_node
from ..host.regions import apply, from_tiles, restrict
from ..influence import Influence
from ..prompt import ImagePrompt
from ..references import UNCONDITIONALS, Unconditional
from ..regions import Region, tile
from ..tiles import OVERLAPS, Overlap
from .common import (
    CATEGORY,
    ImagePromptType,
    InfluenceType,
    IPAdapterType,
    unconditional_input,
    window_inputs,
)
from .prompts import BATCHES

RegionsType = io.Custom("IMAGE_REGIONS")


class AddRegion(io.ComfyNode):
    """An image prompt, texts and a mask -> IMAGE_REGIONS, CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptRegion",
            display_name="Image Prompt Region",
            category=CATEGORY,
            description=(
                "An image prompt for a part of the picture, and the text prompt for the same part. "
                "Chain them by 'regions'; put their texts together with Conditioning (Combine)."
            ),
            search_aliases=[
                "regional prompt",
                "regional conditioning",
                "attention mask",
                "two characters",
                "ip adapter",
            ],
            inputs=[
                ImagePromptType.Input(
                    "image_prompt", tooltip="What this part of the picture is to be like."
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the image counts here; multiplies with the weight of "
                    "Apply Image Prompt Regions.",
                ),
                io.Float.Input(
                    "text_weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly positive and negative count against other texts in the "
                    "same place.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The part of the picture: white fully, black not at all. Any size; one "
                    "mask, or one per picture of the batch. Without it, the whole picture.",
                ),
                InfluenceType.Input(
                    "influence",
                    optional=True,
                    tooltip="From Image Prompt Influence, for this region alone: presets, weights "
                    "per layer, keyframes.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="The text prompt for this part."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative text for this part."
                ),
                RegionsType.Input("regions", optional=True, tooltip="The regions before this one."),
            ],
            outputs=[
                RegionsType.Output(
                    "regions",
                    display_name="regions",
                    tooltip="For Apply Image Prompt Regions, or the next Image Prompt Region.",
                ),
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="The text, kept to this part. For Conditioning (Combine), with those "
                    "of the other regions.",
                ),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="The negative text, kept to this part; likewise.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image_prompt: ImagePrompt,
        weight: float,
        text_weight: float,
        mask: Any = None,
        influence: Influence | None = None,
        positive: Any = None,
        negative: Any = None,
        regions: tuple[Region, ...] = (),
    ) -> io.NodeOutput:
        """Add it to those before it."""
        if mask is not None:
            mask = masks.check(mask)
        added = Region(image_prompt, mask, weight, influence)
        texts = (restrict(text, mask, text_weight) for text in (positive, negative))
        return io.NodeOutput((*(regions or ()), added), *texts)


class Tile(io.ComfyNode):
    """A large picture -> IMAGE_REGIONS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptTiles",
            display_name="Image Prompt Tiles",
            category=CATEGORY,
            description=(
                "Cuts a large, wide or tall reference into up to four squares and encodes each for "
                "its part of the picture, so that details count that one square would lose. The "
                "picture to be made should have the same shape."
            ),
            search_aliases=["tiled", "ip adapter tiled", "wide reference", "large reference"],
            inputs=[
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter that the regions will be applied with."
                ),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder the adapter was trained with."
                ),
                io.Image.Input(
                    "image",
                    tooltip="The reference. Nearly square: cropped to a square, four tiles. Wide "
                    "or tall: tiles along its long side; beyond four of them the ends are cut off.",
                ),
                io.Float.Input(
                    "sharpening",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Brings out details before it is cut; 0 is none.",
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(OVERLAPS),
                    default=OVERLAPS[0],
                    tooltip="Where tiles overlap. share: together they act as strongly as "
                    "elsewhere. add: each with all of its strength, as ComfyUI_IPAdapter_plus did.",
                ),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default=BATCHES[0],
                    optional=True,
                    tooltip="A batch of references. together: for each place, their tiles are one "
                    "prompt. one per frame: the first for the first picture, the second for the "
                    "second; the last one for the rest.",
                ),
                unconditional_input(),
            ],
            outputs=[
                RegionsType.Output(
                    "regions",
                    display_name="regions",
                    tooltip="For Apply Image Prompt Regions.",
                ),
                io.Image.Output(
                    "tiles",
                    display_name="tiles",
                    tooltip="The squares as the encoder gets them, from left to right and from top "
                    "to bottom.",
                ),
                io.Mask.Output("masks", display_name="masks", tooltip="Where each of them acts."),
            ],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: Any,
        clip_vision: Any,
        image: Any,
        sharpening: float,
        overlap: Overlap,
        batch: str = BATCHES[0],
        unconditional: Unconditional = UNCONDITIONALS[0],
    ) -> io.NodeOutput:
        """Cut the picture, and encode the pieces."""
        tiles = tile(image, sharpening, overlap)
        made = from_tiles(
            adapters.require(ip_adapter),
            clip_vision,
            tiles,
            per_frame=batch == BATCHES[1],
            unconditional=unconditional,
        )
        show_on_node(f"{len(made)} tiles of {made[0].prompt.tokens} image tokens")
        return io.NodeOutput(made, tiles.pictures.flatten(0, 1), tiles.masks)


class ApplyRegions(io.ComfyNode):
    """MODEL + IMAGE_REGIONS -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptApplyRegions",
            display_name="Apply Image Prompt Regions",
            category=CATEGORY,
            description=(
                "Lets a MODEL see several image prompts, each in its part of the picture. The same "
                "as a chain of Apply IP-Adapter, one for each region. The incoming MODEL is not "
                "changed."
            ),
            search_aliases=["regional prompt", "ip adapter apply", "ipadapter", "tiled"],
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the image prompts to."),
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter that encoded the image prompts."
                ),
                RegionsType.Input(
                    "regions", tooltip="From Image Prompt Region or Image Prompt Tiles."
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the images count; multiplies with each region's own.",
                ),
                *window_inputs("they begin to count.", "they stop counting."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture any of them counts; multiplies with the masks of "
                    "the regions.",
                ),
                InfluenceType.Input(
                    "influence",
                    optional=True,
                    tooltip="From Image Prompt Influence, for the regions that have none of their "
                    "own.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For a sampler."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ip_adapter: Any,
        regions: tuple[Region, ...],
        weight: float,
        start_at: float,
        end_at: float,
        mask: Any = None,
        influence: Influence | None = None,
    ) -> io.NodeOutput:
        """Patch a clone."""
        patched, report = apply(
            model,
            adapters.require(ip_adapter),
            regions,
            weight=weight,
            start=start_at,
            end=end_at,
            mask=mask,
            influence=influence,
        )
        show_on_node(report)
        return io.NodeOutput(patched)


NODES: list[type[io.ComfyNode]] = [AddRegion, Tile, ApplyRegions]
