"""The pack's nodes, as the host asks for them; they are written in `ip_adapter.nodes`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .ip_adapter.host import folders, rivals
from .ip_adapter.legacy import NODES as LEGACY
from .ip_adapter.nodes import (
    automatic,
    downloads,
    embeds,
    faces,
    frames,
    grid,
    influence,
    inspect,
    loaders,
    maps,
    models,
    preview,
    prompts,
    references,
    regions,
    training,
)

NODES: list[type[io.ComfyNode]] = [
    *automatic.NODES,
    *loaders.NODES,
    *prompts.NODES,
    *embeds.NODES,
    *references.NODES,
    *regions.NODES,
    *frames.NODES,
    *faces.NODES,
    *influence.NODES,
    *grid.NODES,
    *maps.NODES,
    *models.NODES,
    *preview.NODES,
    *inspect.NODES,
    *downloads.NODES,
    *training.NODES,
]
"""Our own nodes."""


class ImagePromptExtension(ComfyExtension):
    """What the host asks for our nodes."""

    async def on_load(self) -> None:
        """Register our model folders."""
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the nodes, with those under the ids of ComfyUI_IPAdapter_plus that are free."""
        old = {node.define_schema().node_id: node for node in LEGACY}
        rivals.watch(old)
        return [*NODES, *rivals.free(old)]
