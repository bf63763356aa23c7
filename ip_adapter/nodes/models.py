"""Nodes that patch a MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .. import prompt
from ..host import adapters, face_lora, folders, patching
from ..host.features import schema, show_on_node
from ..influence import Influence
from .common import CATEGORY, ImagePromptType, InfluenceType, IPAdapterType, window_inputs


class Apply(io.ComfyNode):
    """MODEL + IMAGE_PROMPT -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptApply",
            display_name="Apply IP-Adapter",
            category=CATEGORY,
            description=(
                "Lets a MODEL see an image prompt beside its text prompt. Chain several for "
                "several references; ControlNet nodes work as ever. The incoming MODEL is not "
                "changed."
            ),
            search_aliases=["ip adapter apply", "ipadapter", "image prompt", "style reference"],
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the image prompt to."),
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter that encoded the image prompt."
                ),
                ImagePromptType.Input(
                    "image_prompt", tooltip="From Encode Image Prompt or Load Image Prompt."
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the image counts. 1 is how the adapter was trained, for "
                    "an image alone; about 0.5 leaves room for a text prompt; 0 is the base model.",
                ),
                *window_inputs(
                    "the image begins to count. Later leaves the composition to the text.",
                    "the image stops counting. Earlier leaves details to the text.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the image counts: white fully, black not at all. "
                    "Any size; one mask, or one per picture of the batch.",
                ),
                InfluenceType.Input(
                    "influence",
                    optional=True,
                    tooltip="From Image Prompt Influence: presets such as style transfer, weights "
                    "per layer, keyframes. It multiplies with what is set here.",
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
        image_prompt: prompt.ImagePrompt,
        weight: float,
        start_at: float,
        end_at: float,
        mask: Any = None,
        influence: Influence | None = None,
    ) -> io.NodeOutput:
        """Patch a clone."""
        patched, report = patching.apply(
            model,
            adapters.require(ip_adapter),
            image_prompt,
            weight=weight,
            start=start_at,
            end=end_at,
            mask=mask,
            influence=influence,
        )
        show_on_node(report)
        return io.NodeOutput(patched)


INSIDE = "(inside the adapter)"
"""The choice of LoRA that names no file."""


class FaceLoRA(io.ComfyNode):
    """MODEL + the LoRA of a FaceID adapter -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptFaceLoRA",
            display_name="Apply FaceID LoRA",
            category=CATEGORY,
            description=(
                "Applies the LoRA that a FaceID adapter was trained together with; without it the "
                "likeness is poor. The published files hold it, so no other file is needed."
            ),
            search_aliases=["faceid lora", "face identity", "companion lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model that Apply IP-Adapter gets."),
                IPAdapterType.Input("ip_adapter", tooltip="The FaceID adapter."),
                io.Float.Input(
                    "strength",
                    default=0.6,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 is how it was trained; 0.5 to 0.8 leaves more to the checkpoint.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[INSIDE, *folders.names(folders.LORAS)],
                    default=INSIDE,
                    optional=True,
                    tooltip="The companion file in models/loras, for an adapter that was converted "
                    "without its LoRA.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For Apply IP-Adapter."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, ip_adapter: Any, strength: float, lora_name: str = INSIDE
    ) -> io.NodeOutput:
        """Patch a clone."""
        adapter = adapters.require(ip_adapter)
        if lora_name == INSIDE:
            lora, label = face_lora.inside(adapter), f"The LoRA of {adapter.label}"
        else:
            lora = face_lora.companion(folders.find(folders.LORAS, lora_name))
            label = f"The LoRA {lora_name}"
        patched, report = face_lora.apply(model, lora, strength, label)
        show_on_node(report)
        return io.NodeOutput(patched)


NODES: list[type[io.ComfyNode]] = [Apply, FaceLoRA]
