"""The interface that saved workflows rely on."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.host

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
INTERFACE = {
    "ImagePromptLoadAdapter": (["adapter_name", "variant"], ["ip_adapter"]),
    "ImagePromptLoadEncoder": (["encoder_name"], ["clip_vision"]),
    "ImagePromptAutoLoader": (
        ["model", "purpose", "lora_strength"],
        ["model", "ip_adapter", "clip_vision"],
    ),
    "ImagePromptEncode": (
        ["ip_adapter", "clip_vision", "image", "fit", "image_size", "batch", "unconditional"],
        ["image_prompt"],
    ),
    "ImagePromptPreview": (
        ["clip_vision", "image", "fit", "image_size", "mask", "ip_adapter"],
        ["image"],
    ),
    "ImagePromptInspect": (["model"], ["text", "diagram"]),
    "ImagePromptEncodeInstructed": (
        ["ip_adapter", "clip_vision", "clip", "image", "fit", "instruction", "description"],
        ["image_prompt"],
    ),
    "ImagePromptReference": (
        ["image", "weight", "fit", "role", "mask", "references"],
        ["references"],
    ),
    "ImagePromptEncodeReferences": (
        ["ip_adapter", "clip_vision", "references", "combine", "image_size", "unconditional"],
        ["image_prompt"],
    ),
    "ImagePromptEmbeds": (
        ["ip_adapter", "clip_vision", "image", "fit"],
        ["embeds", "negative"],
    ),
    "ImagePromptFromEmbeds": (
        ["ip_adapter", "embeds", "combine", "batch", "negative", "clip_vision"],
        ["image_prompt"],
    ),
    "ImagePromptPrepare": (["image", "position", "size", "sharpening"], ["image"]),
    "ImagePromptNoise": (["kind", "strength", "blur", "image"], ["image"]),
    "ImagePromptFade": (["first", "second", "frames", "timing"], ["image_prompt"]),
    "ImagePromptRegion": (
        [
            *("image_prompt", "weight", "text_weight"),
            *("mask", "influence", "positive", "negative", "regions"),
        ],
        ["regions", "positive", "negative"],
    ),
    "ImagePromptTiles": (
        [
            *("ip_adapter", "clip_vision", "image", "sharpening"),
            *("overlap", "batch", "unconditional"),
        ],
        ["regions", "tiles", "masks"],
    ),
    "ImagePromptApplyRegions": (
        [
            *("model", "ip_adapter", "regions", "weight", "start_at", "end_at"),
            *("mask", "influence"),
        ],
        ["model"],
    ),
    "ImagePromptLoadFaceModel": (["pack_name", "provider"], ["face_model"]),
    "ImagePromptDetectFace": (["face_model", "image", "pick", "index"], ["face", "crop"]),
    "ImagePromptFaceFromTensor": (["embedding", "crop"], ["face"]),
    "ImagePromptEncodeFace": (
        ["ip_adapter", "face", "clip_vision", "structure_weight", "unconditional"],
        ["image_prompt"],
    ),
    "ImagePromptFaceLoRA": (["model", "ip_adapter", "strength", "lora_name"], ["model"]),
    "ImagePromptConvert": (["adapter_name", "variant", "filename_prefix"], []),
    "ImagePromptJoin": (["first", "second"], ["image_prompt"]),
    "ImagePromptApply": (
        [
            *("model", "ip_adapter", "image_prompt", "weight", "start_at", "end_at"),
            *("mask", "influence"),
        ],
        ["model"],
    ),
    "ImagePromptInfluence": (
        [
            *("weight", "layers", "scaling", "start_at", "end_at"),
            *("composition", "style_boost", "composition_boost"),
            *("layer_weights", "keyframes", "frame_weights", "mask"),
        ],
        ["influence"],
    ),
    "ImagePromptGrid": (
        [
            *("model", "ip_adapter", "image_prompt", "weights", "presets", "start_at", "end_at"),
            *("mask", "influence"),
        ],
        ["model", "grid"],
    ),
    "ImagePromptGridPicture": (["images", "grid", "batch", "cell_size"], ["image"]),
    "ImagePromptRecordMaps": (["model", "picture"], ["model", "maps"]),
    "ImagePromptShowMaps": (
        ["maps", "latent", "view", "scale", "reference", "image"],
        ["image", "masks"],
    ),
    "ImagePromptTrain": (
        [
            *("model", "vae", "clip", "clip_vision", "images", "captions", "projection"),
            *("steps", "learning_rate", "seed", "filename_prefix"),
            *("references", "ip_adapter", "batch_size", "size", "sample_every"),
        ],
        ["ip_adapter", "path", "loss_curve"],
    ),
    "ImagePromptModels": (["family", "purpose"], ["text"]),
    "ImagePromptDownload": (["model", "accept_licence", "with_encoder"], ["path", "name"]),
    "ImagePromptSave": (["image_prompt", "filename_prefix"], []),
    "ImagePromptLoad": (["prompt_name"], ["image_prompt"]),
}
"""Ids, inputs and outputs are permanent; a change here breaks saved workflows."""


@pytest.fixture(params=INTERFACE)
def node(request: pytest.FixtureRequest, host: Any) -> Any:
    return host.node(request.param)


def test_the_pack_offers_these_nodes(host: Any) -> None:
    ours = {cls.define_schema().node_id for cls in host.library("nodes").NODES}
    assert ours == set(INTERFACE)
    assert ours <= set(host.nodes.NODE_CLASS_MAPPINGS)


def test_interface_is_as_published(node: Any) -> None:
    schema = node.define_schema()
    inputs, outputs = INTERFACE[schema.node_id]
    assert [one.id for one in schema.inputs] == inputs
    assert [one.display_name for one in schema.outputs] == outputs


def test_inputs_are_the_parameters_of_execute(node: Any) -> None:
    schema = node.define_schema()
    parameters = inspect.signature(node.execute).parameters
    assert [one.id for one in schema.inputs] == list(parameters)
    for one in schema.inputs:
        has_default = parameters[one.id].default is not inspect.Parameter.empty
        assert has_default == bool(one.optional)


def test_everything_is_explained(node: Any) -> None:
    schema = node.define_schema()
    assert schema.display_name and schema.description and schema.category == "IP-Adapter"
    for one in (*schema.inputs, *schema.outputs):
        assert one.tooltip, one.id
    assert getattr(schema, "search_aliases", ["old host"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_existing_nodes_inputs_and_options(host: Any, path: Path) -> None:
    api = json.loads((path.parent / "api" / path.name).read_text())
    used = {node["class_type"] for node in api.values()} & set(INTERFACE)
    assert used & {"ImagePromptApply", "ImagePromptApplyRegions", "ImagePromptGrid"}
    for node in api.values():
        if node["class_type"] not in INTERFACE:
            continue
        schema = host.node(node["class_type"]).define_schema()
        known = {one.id: one for one in schema.inputs}
        assert set(node["inputs"]) <= set(known)
        for one in schema.inputs:
            assert one.optional or one.id in node["inputs"]
        if "fit" in node["inputs"]:
            assert node["inputs"]["fit"] in known["fit"].options


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_model_file_of_a_workflow_has_a_download(path: Path) -> None:
    """The front end offers missing models by name, address and folder."""
    folder_of = {
        "CheckpointLoaderSimple": "checkpoints",
        "CLIPVisionLoader": "clip_vision",
        "ControlNetLoader": "controlnet",
        "ImagePromptLoadAdapter": "ipadapter",
    }
    loaders = [n for n in json.loads(path.read_text())["nodes"] if n["type"] in folder_of]
    assert loaders
    for loader in loaders:
        (model,) = loader["properties"]["models"]
        assert model["name"] == loader["widgets_values"][0]
        assert model["directory"] == folder_of[loader["type"]]
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].split("?")[0].endswith((".safetensors", ".pth", ".bin"))
