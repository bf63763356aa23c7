"""The node ids of ComfyUI_IPAdapter_plus, over our library: what saved workflows and plug-ins name.

Each id has exactly the inputs, options, defaults and outputs that the old pack reported, and is
hidden from the menu as deprecated. The nodes translate words only: what they do is done by the
library and the host room, by the same calls as in `ip_adapter.nodes`.
"""

from __future__ import annotations

from comfy_api.latest import io

from . import aliases, apply, embeds, enhance, face, loaders, params, prep, tiled, weights

NODES: list[type[io.ComfyNode]] = [
    *loaders.NODES,
    *apply.NODES,
    *face.NODES,
    *enhance.NODES,
    *tiled.NODES,
    *embeds.NODES,
    *params.NODES,
    *weights.NODES,
    *prep.NODES,
    *aliases.NODES,
]
"""Every old node."""
