"""The pack's nodes, as the host asks for them; they are written in `ip_adapter.nodes`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .ip_adapter.host import folders
from .ip_adapter.nodes import automatic, faces, influence, loaders, models, prompts, references

NODES: list[type[io.ComfyNode]] = [
    *automatic.NODES,
    *loaders.NODES,
    *prompts.NODES,
    *references.NODES,
    *faces.NODES,
    *influence.NODES,
    *models.NODES,
]


class ImagePromptExtension(ComfyExtension):
    """What the host asks for our nodes."""

    async def on_load(self) -> None:
        """Register our model folders."""
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the nodes."""
        return NODES
