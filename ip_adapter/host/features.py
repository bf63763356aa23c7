"""What the host offers, found out in one place; ComfyUI 0.3.64 (October 2025) and later."""

from __future__ import annotations

from typing import Any, TypeVar

import comfy.model_patcher
from comfy_api.latest import io

from ..errors import IncompatibleModelError
from . import rivals

T = TypeVar("T")

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


def require_own(value: object, kind: type[T], socket: str, node: str) -> T:
    """Return the value of a socket, or say what is connected instead.

    Args:
        value: What came in.
        kind: What this pack puts on sockets of that type.
        socket: The input's name.
        node: The display name of the node to connect.

    Raises:
        IncompatibleModelError: Another pack's object came in on a socket of the same type.
    """
    if isinstance(value, kind):
        return value
    raise IncompatibleModelError(
        f"The {socket} input got a {type(value).__module__}.{type(value).__qualname__}, which "
        f"another pack made. Connect the output of {node}. {rivals.explanation()}".rstrip()
    )


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
