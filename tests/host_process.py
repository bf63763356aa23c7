"""The real ComfyUI inside the test process, on the CPU, with this pack loaded as the host loads it.

Imported by the host and parity tests only: ComfyUI's modules stay for the life of the process.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts.host import find_host
from tests.synthetic.models import FIXTURE_PACK

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Host:
    """A running host.

    Attributes:
        nodes: The host's own top-level module of nodes.
        base: Its base directory.
        pack: Name under which the host imported this pack.
    """

    nodes: ModuleType
    base: Path
    pack: str

    def library(self, name: str) -> ModuleType:
        """Import one of the pack's modules, as the host knows it."""
        return importlib.import_module(f"{self.pack}.{name}")

    def node(self, node_id: str) -> Any:
        """Return a node class by its id."""
        return self.nodes.NODE_CLASS_MAPPINGS[node_id]


@cache
def start() -> Host:
    """Import ComfyUI and load the pack; once per process."""
    path = find_host()
    if path is None:
        raise RuntimeError("No ComfyUI found; run `make setup`.")
    base = Path(tempfile.mkdtemp(prefix="image-prompt-host-"))
    sys.path.insert(0, str(path))
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        comfy.cli_args.args.base_directory = str(base)
        import comfy.utils

        import nodes
    finally:
        sys.argv = arguments
    comfy.utils.PROGRESS_BAR_ENABLED = False
    if not hasattr(nodes, "load_custom_node"):
        raise RuntimeError(f"`nodes` came from {nodes.__file__}, not from {path}")
    for pack in (ROOT, FIXTURE_PACK):
        if not asyncio.run(nodes.load_custom_node(str(pack))):
            raise RuntimeError(f"The host did not accept {pack}; see its log above.")
    name = next(name for name in sys.modules if name.endswith("ip_adapter.host.patching"))
    return Host(nodes, base, name.removesuffix(".ip_adapter.host.patching"))
