"""The nodes that list what was published, and fetch it when a person queues them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .. import downloads
from ..catalogue import PURPOSES
from ..downloads import ALL
from ..host import downloading
from ..host.features import schema, show_on_node
from .common import CATEGORY

FAMILIES = [ALL, *(family.name for family in downloads.FAMILIES)]


class Models(io.ComfyNode):
    """Family + purpose -> a list in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptModels",
            display_name="List IP-Adapter Models",
            category=CATEGORY,
            description=(
                "Lists every published adapter with its size, licence and what it needs, and says "
                "which are installed, under whatever name. Opens no connection."
            ),
            search_aliases=["ip adapter models", "installed", "where to download", "licence"],
            inputs=[
                io.Combo.Input(
                    "family",
                    options=FAMILIES,
                    default=ALL,
                    tooltip="The base model it is for; all lists every family.",
                ),
                io.Combo.Input(
                    "purpose",
                    options=[ALL, *PURPOSES],
                    default=ALL,
                    tooltip="What the reference is for, as in Load IP-Adapter (automatic).",
                ),
            ],
            outputs=[
                io.String.Output(
                    "text",
                    display_name="text",
                    tooltip="The list, a line for each model; it is shown on the node, too. Make "
                    "the node larger to see all of it, or connect Preview as Text.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """List again when files came, went or changed."""
        return downloading.fingerprint()

    @classmethod
    def execute(cls, family: str, purpose: str) -> io.NodeOutput:
        """Look into the folders and write the list."""
        text = downloads.listing(downloads.select(family, purpose), downloading.present())
        show_on_node(text)
        return io.NodeOutput(text)


class Download(io.ComfyNode):
    """Name -> file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptDownload",
            display_name="Download IP-Adapter Model",
            category=CATEGORY,
            description=(
                "Downloads a published adapter, and the image encoder it reads, from the Hugging "
                "Face hub into the model folders. Only when you queue it; what is installed is not "
                "fetched again. A download that was stopped goes on where it was. Each file is "
                "checked by its SHA-256."
            ),
            search_aliases=["download ip adapter", "get models", "huggingface", "missing model"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(downloads.NAMES),
                    default=downloads.NAMES[0],
                    tooltip="Base model and variant. List IP-Adapter Models says what each is, how "
                    "large it is, and under which licence.",
                ),
                io.Boolean.Input(
                    "accept_licence",
                    default=False,
                    tooltip="Only for FaceID, portrait and InstantID adapters: that you have read "
                    "their licence, non-commercial research only, and accept it.",
                ),
                io.Boolean.Input(
                    "with_encoder",
                    default=True,
                    optional=True,
                    tooltip="Also download the image encoder that the adapter reads (2.5 or 3.7 "
                    "GB), unless one is installed.",
                ),
            ],
            outputs=[
                io.String.Output("path", display_name="path", tooltip="Where the file is."),
                io.String.Output(
                    "name", display_name="name", tooltip="The file's name, as the loaders list it."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Look again when files came, went or changed."""
        return downloading.fingerprint()

    @classmethod
    def execute(cls, model: str, accept_licence: bool, with_encoder: bool = True) -> io.NodeOutput:
        """Fetch what is missing."""
        done = downloading.download(model, accept_licence=accept_licence, with_encoder=with_encoder)
        text = done.text
        if done.added:
            text += "\nRefresh the node list (R) to find it in the loaders."
        show_on_node(text)
        return io.NodeOutput(str(done.path), done.name)


NODES: list[type[io.ComfyNode]] = [Models, Download]
