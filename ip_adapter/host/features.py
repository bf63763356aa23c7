"""What the host offers, found out in one place; ComfyUI 0.3.64 (October 2025) and later."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
from comfy_api.latest import io

ManagedPatcher: type[Any] = getattr(
    comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher
)
"""The host's memory manager for modules built with its own layers; dynamic where that is on."""


def schema(**fields: Any) -> io.Schema:
    """Build a node schema of the fields that this host knows.

    ``search_aliases`` and some others appeared in 2026; an unknown one would lose the whole pack.
    """
    known = io.Schema.__dataclass_fields__
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def show_on_node(text: str) -> None:
    """Show a short text on the node that is being executed, where there is a front end.

    The node's id comes from the host's execution context; declared as a hidden input, it would
    become part of the cache key, and the same graph with other ids would encode again.
    """
    try:
        from comfy_execution.utils import get_executing_context
        from server import PromptServer

        context, server = get_executing_context(), PromptServer.instance
    except (ImportError, AttributeError):
        return  # an embedded run without a server
    if context is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, context.node_id)
