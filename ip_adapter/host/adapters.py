"""Adapters in the host's memory: loaded once, counted, offloaded and freed like its own models."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import comfy.model_management
import comfy.ops
import torch

from .. import checkpoint
from ..adapter import IPAdapter
from ..detection import AUTOMATIC
from ..projections import Ops
from ..spec import AdapterSpec
from . import digests
from .features import ManagedPatcher, require_own

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """What travels on an IPADAPTER socket.

    Attributes:
        module: The weights, built of the host's casting layers.
        patcher: The host's manager of these weights. The host finds it under this name.
        fingerprint: Identifies the projection, hence the prompts it can be used with.
        label: The file and the kind in words.
        path: The file, for the LoRA that may be inside; it is read when it is asked for.
        clip_vision: The image encoder that was loaded with it, or None.
        face_model: The face model that was loaded with it, or None.
    """

    module: IPAdapter
    patcher: Any
    fingerprint: str
    label: str
    path: Path
    clip_vision: Any = None
    face_model: Any = None

    @property
    def spec(self) -> AdapterSpec:
        """What the checkpoint holds."""
        return self.module.spec

    def __deepcopy__(self, memo: object) -> LoadedAdapter:
        return self

    @property
    def device(self) -> torch.device:
        """Where the host computes; layers bring their weights there by themselves."""
        return cast(torch.device, self.patcher.load_device)

    def load(self, memory: int = 0) -> torch.device:
        """Have the host put the weights where it computes, and say where that is.

        Args:
            memory: Bytes needed for the computation that follows.
        """
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)
        return self.device


def load(path: Path, variant: str = AUTOMATIC) -> LoadedAdapter:
    """Read an adapter file into the host's memory management.

    Args:
        path: The file.
        variant: Which of the published adapters it is, where tensors leave a choice.

    Raises:
        CheckpointError: See `checkpoint.read`.
        IncompatibleModelError: See `checkpoint.read`.
    """
    found = checkpoint.read(path, variant, partial(digests.sha256, path))
    module = found.build(cast(Ops, comfy.ops.manual_cast)).eval()
    patcher = ManagedPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    label = found.describe()
    log.info("IP-Adapter: loaded %s", label)
    return LoadedAdapter(module, patcher, checkpoint.fingerprint(module), label, path)


def require(value: object) -> LoadedAdapter:
    """Return the value of an IPADAPTER socket, or say what is connected instead.

    Raises:
        IncompatibleModelError: Another pack's object came in on a socket of the same name.
    """
    return require_own(value, LoadedAdapter, "ip_adapter", "Load IP-Adapter")
