"""The old loaders: adapters and face models by name, and whole sets by preset."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from comfy_api.latest import io

from .. import catalogue
from ..errors import IncompatibleModelError
from ..face_models import FaceModel
from ..host import adapters, automatic, face_lora, faces, folders, installed, vision
from ..host.adapters import LoadedAdapter
from ..host.features import show_on_node
from ..layers import Family
from ..nodes.common import FaceModelType, IPAdapterType, check_name
from . import files
from .common import Choice, adapter_in, model_in, model_out, number_in, old
from .files import Preset

log = logging.getLogger(__name__)

FACE_PACK = "buffalo_l"
"""The face model that the old pack used unless told otherwise."""

PROVIDERS = {
    "CPU": "CPU",
    "CUDA": "CUDA",
    "ROCM": "ROCm",
    "DirectML": "DirectML",
    "OpenVINO": "OpenVINO",
    "CoreML": "CoreML",
}
"""The old words -> ours."""

_adapters: WeakValueDictionary[tuple[str, str, str], LoadedAdapter] = WeakValueDictionary()
_encoders: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()
"""What a unified loader made and somebody still holds, so that the next one shares it."""


class ModelLoader(io.ComfyNode):
    """File -> IPADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterModelLoader",
            "IPAdapter Model Loader",
            "ipadapter/loaders",
            "Load IP-Adapter",
            inputs=[Choice("ipadapter_file", options=folders.names(folders.ADAPTERS))],
            outputs=[IPAdapterType.Output("IPADAPTER", display_name="IPADAPTER")],
        )

    @classmethod
    def validate_inputs(cls, ipadapter_file: str) -> bool | str:
        """Say where the file was looked for when it is not there."""
        return check_name(folders.ADAPTERS, ipadapter_file)

    @classmethod
    def fingerprint_inputs(cls, ipadapter_file: str) -> str:
        """Load again when the file changed."""
        return folders.stamp(folders.ADAPTERS, ipadapter_file)

    @classmethod
    def execute(cls, ipadapter_file: str) -> io.NodeOutput:
        """Load the file."""
        adapter = adapters.load(folders.find(folders.ADAPTERS, ipadapter_file))
        show_on_node(adapter.spec.describe())
        return io.NodeOutput(adapter)


class InsightFaceLoader(io.ComfyNode):
    """Pack of face models -> INSIGHTFACE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterInsightFaceLoader",
            "IPAdapter InsightFace Loader",
            "ipadapter/loaders",
            "Load Face Model",
            inputs=[
                Choice("provider", options=["CPU", "CUDA", "ROCM"]),
                Choice("model_name", options=["buffalo_l", "antelopev2"]),
            ],
            outputs=[FaceModelType.Output("INSIGHTFACE", display_name="INSIGHTFACE")],
        )

    @classmethod
    def fingerprint_inputs(cls, provider: str, model_name: str) -> str:
        """Load again when the files changed."""
        return faces.stamp(model_name)

    @classmethod
    def execute(cls, provider: str, model_name: str) -> io.NodeOutput:
        """Load the pack."""
        return io.NodeOutput(face_model(provider, model_name))


def unified(
    node_id: str, display_name: str, category: str, presets: tuple[str, ...], *more: Any, name: str
) -> io.Schema:
    """The schema of a loader by preset.

    Args:
        node_id: See `common.old`.
        display_name: See `common.old`.
        category: See `common.old`.
        presets: Its options.
        more: Inputs after the preset.
        name: Of the first output.
    """
    return old(
        node_id,
        display_name,
        category,
        "Load IP-Adapter (automatic)",
        inputs=[
            model_in(),
            Choice("preset", options=list(presets)),
            *more,
            adapter_in(optional=True),
        ],
        outputs=[model_out(name), IPAdapterType.Output("ipadapter", display_name="ipadapter")],
    )


class UnifiedLoader(io.ComfyNode):
    """MODEL + preset -> MODEL, IPADAPTER with its image encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return unified(
            "IPAdapterUnifiedLoader",
            "IPAdapter Unified Loader",
            "ipadapter",
            files.GENERAL,
            name="model",
        )

    @classmethod
    def fingerprint_inputs(cls, model: Any, preset: str, ipadapter: Any = None) -> str:
        """Look again when files came, went or changed."""
        return installed.fingerprint(folders.ADAPTERS, folders.ENCODERS)

    @classmethod
    def execute(cls, model: Any, preset: str, ipadapter: Any = None) -> io.NodeOutput:
        """Find and load."""
        return io.NodeOutput(*load(model, preset, given=ipadapter))


class UnifiedLoaderCommunity(io.ComfyNode):
    """The same for adapters of others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return unified(
            "IPAdapterUnifiedLoaderCommunity",
            "IPAdapter Unified Loader Community",
            "ipadapter/loaders",
            files.COMMUNITY,
            name="model",
        )

    @classmethod
    def fingerprint_inputs(cls, model: Any, preset: str, ipadapter: Any = None) -> str:
        """Look again when files came, went or changed."""
        return installed.fingerprint(folders.ADAPTERS, folders.ENCODERS)

    @classmethod
    def execute(cls, model: Any, preset: str, ipadapter: Any = None) -> io.NodeOutput:
        """Find and load."""
        return io.NodeOutput(*load(model, preset, given=ipadapter))


class UnifiedLoaderFaceID(io.ComfyNode):
    """MODEL + preset -> MODEL with the LoRA, IPADAPTER with image encoder and face model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return unified(
            "IPAdapterUnifiedLoaderFaceID",
            "IPAdapter Unified Loader FaceID",
            "ipadapter/faceid",
            files.FACES,
            number_in("lora_strength", 0, 1, 0.6, 0.01),
            Choice("provider", options=list(PROVIDERS)),
            name="MODEL",
        )

    @classmethod
    def fingerprint_inputs(
        cls, model: Any, preset: str, lora_strength: float, provider: str, ipadapter: Any = None
    ) -> str:
        """Look again when files came, went or changed."""
        found = installed.fingerprint(folders.ADAPTERS, folders.ENCODERS, folders.LORAS)
        return f"{found} {stamp_of_faces()}"

    @classmethod
    def execute(
        cls, model: Any, preset: str, lora_strength: float, provider: str, ipadapter: Any = None
    ) -> io.NodeOutput:
        """Find and load."""
        return io.NodeOutput(*load(model, preset, lora_strength, provider, given=ipadapter))


def load(
    model: Any,
    preset: str,
    lora_strength: float = 0.0,
    provider: str = "CPU",
    *,
    given: Any = None,
) -> tuple[Any, LoadedAdapter]:
    """Find what a preset means for a MODEL, and load it.

    Args:
        model: The host's MODEL.
        preset: One of `files.PRESETS`.
        lora_strength: Of FaceID's LoRA; 0 is none.
        provider: Where the face model runs, in the old words.
        given: What another loader made, to be shared.

    Returns:
        The model, as a clone with the LoRA where there is one; the adapter with what goes with it.

    Raises:
        IncompatibleModelError: There is no such adapter for the model's family.
        MissingFileError: See `automatic.find`; also if there is no face model.
    """
    family = automatic.family(model)
    meant = files.PRESETS[preset].get(family.name)
    if meant is None:
        raise _no_such(preset, family)
    found = automatic.search(_search(preset, family, meant), with_lora=lora_strength != 0)
    adapter = _adapter(found, given)
    adapter = replace(
        adapter,
        clip_vision=_encoder(found.encoder_name) if found.encoder_name else None,
        face_model=face_model(provider) if meant.has_face else None,
    )
    path = str(adapter.path)
    _adapters[path, folders.stamp_of(adapter.path.stat()), adapter.spec.variant] = adapter
    report = found.describe()
    if found.lora is not None:
        model, matched = face_lora.add(model, adapter, found.lora, lora_strength)
        report += f"\n{matched}"
    if adapter.face_model is not None:
        report += f"\nface model: {adapter.face_model.label} on {adapter.face_model.provider}"
    show_on_node(report)
    return model, adapter


def face_model(provider: str, pack: str | None = None) -> FaceModel:
    """Load a face model where the old pack would have: on the CPU if not where it was asked for.

    Args:
        provider: One of `PROVIDERS`.
        pack: Which one; the usual one, or whatever is there, unless given.

    Raises:
        MissingFileError: There is none.
        IPAdapterError: See `face_models.load`.
    """
    chosen = FACE_PACK if pack is None else pack
    present = faces.packs()
    if pack is None and present and chosen not in present:
        log.warning(
            "IP-Adapter: the face model %s, with which FaceID was trained, is not there; using %s. "
            "The likeness will be weak.",
            *(chosen, present[0]),
        )
        chosen = present[0]
    word = PROVIDERS[provider]
    try:
        return faces.load(chosen, word)
    except IncompatibleModelError as error:
        if word == "CPU":
            raise
        log.warning("IP-Adapter: the face model runs on the CPU. %s", error)
        return faces.load(chosen, "CPU")


def stamp_of_faces() -> str:
    """Changes with the face models that are there."""
    return " ".join(f"{pack}: {faces.stamp(pack)}" for pack in faces.packs())


def _search(preset: str, family: Family, meant: Preset) -> automatic.Search:
    rows = [catalogue.lookup(family, variant) for variant in meant.adapters]
    return automatic.Search(
        f"preset '{preset}'",
        tuple(row for row in rows if row is not None),
        automatic.Names(
            lambda row, name: meant.is_adapter(row.variant, name), meant.is_encoder, meant.is_lora
        ),
    )


def _adapter(found: automatic.Found, given: Any) -> LoadedAdapter:
    path = folders.find(folders.ADAPTERS, found.adapter_name)
    variant = found.spec.variant
    if isinstance(given, LoadedAdapter) and given.path == path and given.spec.variant == variant:
        return given
    key = str(path), folders.stamp_of(path.stat()), variant
    return _adapters.get(key) or adapters.load(path, found.variant)


def _encoder(name: str) -> Any:
    path = folders.find(folders.ENCODERS, name)
    key = str(path), folders.stamp_of(path.stat())
    found = _encoders.get(key)
    if found is None:
        found = _encoders[key] = vision.load(path)
    return found


def _no_such(preset: str, family: Family) -> IncompatibleModelError:
    made_for = files.PRESETS[preset]
    group = next(g for g in (files.GENERAL, files.FACES, files.COMMUNITY) if preset in g)
    others = [name for name in group if family.name in files.PRESETS[name]]
    choose = f"Choose {' or '.join(others)}, or load" if others else "Load"
    return IncompatibleModelError(
        f"The preset '{preset}' is for {' and '.join(made_for)}, and the model is {family.name}, "
        f"for which no such adapter was published. {choose} a checkpoint of "
        f"{' or '.join(made_for)}."
    )


NODES: list[type[io.ComfyNode]] = [
    ModelLoader,
    InsightFaceLoader,
    UnifiedLoader,
    UnifiedLoaderFaceID,
    UnifiedLoaderCommunity,
]
