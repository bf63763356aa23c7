"""The node that loads an adapter and what goes with it by purpose instead of by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..catalogue import PURPOSES, Purpose
from ..host import adapters, automatic, face_lora, folders, installed, vision
from ..host.features import schema, show_on_node
from .common import CATEGORY, IPAdapterType

MEANING: dict[Purpose, str] = {
    "general": "content and style, loosely",
    "strong": "close to the reference",
    "light": "weaker, leaves more to the text (SD 1.5)",
    "face": "a portrait, no face detector needed",
    "full face": "the same, stronger (SD 1.5)",
    "composition": "the layout without the content",
    "face identity": "FaceID, the person's likeness",
    "face portrait": "FaceID without LoRA, made for portraits",
    "anime": "for NoobAI models (SDXL)",
    "instruct": "what to take is said in words",
}
"""What the tooltip says of each purpose."""


class AutoLoader(io.ComfyNode):
    """MODEL + purpose -> MODEL, IPADAPTER, CLIP_VISION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptAutoLoader",
            display_name="Load IP-Adapter (automatic)",
            category=CATEGORY,
            description=(
                "Finds the adapter for a purpose and for the family of the model, its image "
                "encoder and, for FaceID, its LoRA, among the installed files. They are known by "
                "their content; they may have any name. Says what to download where one is missing."
            ),
            search_aliases=["unified loader", "ipadapter", "preset", "clip vision", "faceid"],
            inputs=[
                io.Model.Input("model", tooltip="Its family decides which adapter fits."),
                io.Combo.Input(
                    "purpose",
                    options=list(PURPOSES),
                    default=PURPOSES[0],
                    tooltip="; ".join(f"{name}: {text}" for name, text in MEANING.items()) + ".",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=0.6,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Only for FaceID adapters: strength of the LoRA they were trained "
                    "with. 1 is how it was trained; 0 is none.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="For Apply IP-Adapter: the model, with the LoRA if there is one.",
                ),
                IPAdapterType.Output(
                    "ip_adapter",
                    display_name="ip_adapter",
                    tooltip="For the encode and apply nodes.",
                ),
                io.ClipVision.Output(
                    "clip_vision",
                    display_name="clip_vision",
                    tooltip="For the encode nodes; nothing for adapters that read only a face.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: Any, purpose: str, lora_strength: float) -> str:
        """Look again when files came, went or changed; a linked value is not known here."""
        kinds = [folders.ADAPTERS, folders.ENCODERS]
        if lora_strength != 0 and (purpose is None or automatic.has_lora(purpose)):
            kinds.append(folders.LORAS)
        return installed.fingerprint(*kinds)

    @classmethod
    def execute(cls, model: Any, purpose: Purpose, lora_strength: float) -> io.NodeOutput:
        """Find, load, and apply the LoRA to a clone."""
        found = automatic.find(model, purpose, with_lora=lora_strength != 0)
        report = found.describe()
        adapter = adapters.load(folders.find(folders.ADAPTERS, found.adapter_name))
        encoder = None
        if found.encoder_name is not None:
            encoder = vision.load(folders.find(folders.ENCODERS, found.encoder_name))
        if found.lora is not None:
            model, matched = face_lora.add(model, adapter, found.lora, lora_strength)
            report += f"\n{matched}"
        show_on_node(report)
        return io.NodeOutput(model, replace(adapter, clip_vision=encoder), encoder)


NODES: list[type[io.ComfyNode]] = [AutoLoader]
