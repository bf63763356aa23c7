"""IP-Adapter for ComfyUI: image prompts beside text prompts.

ComfyUI calls `comfy_entrypoint`; until then nothing heavy is imported, so that tests and tools can
import the library below without a host.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"
"""The host's page finds the nodes' help in `web/docs`."""


async def comfy_entrypoint() -> Any:
    """Return the pack's extension to the host."""
    from .nodes import ImagePromptExtension

    return ImagePromptExtension()
