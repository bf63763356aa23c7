"""A real ComfyUI with the host's default settings, used as its page and scripts use it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.client import Json
from scripts.graphs import GRAPHS
from scripts.graphs_batches import FRAMES, PROGRAM
from scripts.prompts import FOLDER, read_prompt, read_workflow, shrink
from scripts.server import PACK_NAME, Server
from tests.host.server_fixtures import (
    GOOD,
    changed,
    converted,
    executed,
    node,
    picture,
    renamed,
    replaced,
    saved,
)
from tests.host.template_host import serving
from tests.synthetic.models import (
    ADAPTER_BASE,
    ADAPTER_FACE,
    ADAPTER_PLUS,
    CLIP_VISION,
    OPENCLIP,
)

pytestmark = pytest.mark.host

NODES = {
    "ImagePromptLoadAdapter": "Load IP-Adapter",
    "ImagePromptLoadEncoder": "Load Image Encoder",
    "ImagePromptAutoLoader": "Load IP-Adapter (automatic)",
    "ImagePromptConvert": "Convert IP-Adapter",
    "ImagePromptEncode": "Encode Image Prompt",
    "ImagePromptPreview": "Preview Encoder View",
    "ImagePromptInspect": "Inspect Image Prompts",
    "ImagePromptEncodeInstructed": "Encode Instructed Prompt",
    "ImagePromptReference": "Image Reference",
    "ImagePromptEncodeReferences": "Encode References",
    "ImagePromptEmbeds": "Encode to Embeds",
    "ImagePromptFromEmbeds": "Image Prompt From Embeds",
    "ImagePromptPrepare": "Prepare Reference",
    "ImagePromptNoise": "Noise Reference",
    "ImagePromptFade": "Fade Between Prompts",
    "ImagePromptRegion": "Image Prompt Region",
    "ImagePromptTiles": "Image Prompt Tiles",
    "ImagePromptApplyRegions": "Apply Image Prompt Regions",
    "ImagePromptLoadFaceModel": "Load Face Model",
    "ImagePromptDetectFace": "Detect Face",
    "ImagePromptFaceFromTensor": "Face From Tensor",
    "ImagePromptEncodeFace": "Encode Face Prompt",
    "ImagePromptFaceLoRA": "Apply FaceID LoRA",
    "ImagePromptJoin": "Join Image Prompts",
    "ImagePromptApply": "Apply IP-Adapter",
    "ImagePromptInfluence": "Image Prompt Influence",
    "ImagePromptGrid": "Image Prompt Grid",
    "ImagePromptGridPicture": "Label Grid",
    "ImagePromptRecordMaps": "Record Attention Maps",
    "ImagePromptShowMaps": "Show Attention Maps",
    "ImagePromptTrain": "Train IP-Adapter",
    "ImagePromptModels": "List IP-Adapter Models",
    "ImagePromptDownload": "Download IP-Adapter Model",
    "ImagePromptSave": "Save Image Prompt",
    "ImagePromptLoad": "Load Image Prompt",
}

SCALED = 96
"""Side of a picture that the host scaled to 0.01 megapixels and cut to a multiple of 8."""

SIDES = {"08_inpaint": SCALED, "09_animation_batch": SCALED, "14_image_to_image": SCALED}

SAVED = {"09_animation_batch": FRAMES + 1, "18_seed_batch": 4}
"""Pictures that a workflow saves, where it is not one; a film counts as one."""

PATCHES = {"ImagePromptApplyRegions": 2, "ImagePromptGrid": 8}
"""Image prompts that a node of the workflows puts onto a model, where it is not one."""

APPLYING = ("ImagePromptApply", "ImagePromptApplyRegions", "ImagePromptGrid")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), model_files) as started:
        yield started


def ids(prompt: Json, *kinds: str) -> set[str]:
    return {name for name, each in prompt.items() if each["class_type"] in kinds}


# First, while the host has no picture of theirs in its cache. Workflows may share what comes before
# the sampler, which is never the same.
@pytest.mark.parametrize("name", GRAPHS)
def test_shipped_workflow_runs(server: Server, name: str) -> None:
    prompt = shrink(read_prompt(name))
    before = len(server.log_text())
    result = server.run(prompt, timeout=300)

    pictures = saved(result)
    assert len(pictures) == SAVED.get(name, 1)
    side = SIDES.get(name, 64)
    if not ids(prompt, "ImagePromptGridPicture"):  # a sheet, whose size is the labels' matter
        assert {each.shape for each in pictures} == {(side, side, 3)}
    assert all(each.std() > 10 for each in pictures)
    assert len({each.tobytes() for each in pictures}) == len(pictures)

    samplers, applied = ids(prompt, "KSampler"), ids(prompt, *APPLYING)
    assert applied and applied <= executed(result) | result.cached()
    assert samplers <= executed(result)
    progress = {
        event["data"]["node"]: (event["data"]["value"], event["data"]["max"])
        for event in result.events
        if event["type"] == "progress"
    }
    assert {sampler: progress[sampler] for sampler in samplers} == dict.fromkeys(samplers, (2, 2))
    assert all(value == most for value, most in progress.values())

    log = server.log_text()[before:]
    ran = [prompt[one]["class_type"] for one in applied & executed(result)]
    assert log.count("16 of 16 layers") == sum(PATCHES.get(kind, 1) for kind in ran)
    assert "invalid value" not in log  # numpy, where a picture holds NaN


def test_saved_image_prompt_gives_the_same_picture(server: Server) -> None:
    encoded = [node(GOOD, "ImagePromptEncode"), 0]
    inputs = {"image_prompt": encoded, "filename_prefix": "people/anna"}
    save = {"save": {"class_type": "ImagePromptSave", "inputs": inputs}}
    direct = server.run(GOOD | save)
    assert direct.outputs["save"]["text"] == ["anna_00001.safetensors"]
    folder = server.base / "models" / "image_prompts"
    assert [path.name for path in folder.rglob("*.*")] == ["anna_00001.safetensors"]

    options = server.object_info("ImagePromptLoad")["input"]["required"]["prompt_name"][1]
    (name,) = options["options"]
    assert Path(name) == Path("people/anna_00001.safetensors")
    again = server.run(replaced(GOOD, "ImagePromptEncode", "ImagePromptLoad", prompt_name=name))
    assert node(GOOD, "KSampler") in executed(again)
    assert np.array_equal(picture(again), picture(direct))


def test_automatic_knows_files_by_their_content(server: Server) -> None:
    """All adapters and encoders have meaningless names; the picture is that of the chosen ones."""
    meaningless = {
        f"{ADAPTER_BASE}": "ipadapter/1/model.safetensors",
        f"{ADAPTER_PLUS}": "ipadapter/2/model.safetensors",
        f"{ADAPTER_FACE}": "ipadapter/model.bin",
        f"{CLIP_VISION}": "clip_vision/1/model.safetensors",
        f"{OPENCLIP}": "unused/open_clip.safetensors",  # nearly the same, but only nearly
    }
    automatic = shrink(read_prompt("12_automatic"))
    by_name = changed(GOOD, "ImagePromptLoadAdapter", adapter_name=ADAPTER_PLUS.name)
    expected = picture(server.run(by_name, timeout=300))
    with renamed(server, meaningless):
        found = server.run(automatic, timeout=300)
        assert {"ImagePromptAutoLoader", "KSampler"} <= {
            automatic[name]["class_type"] for name in executed(found)
        }
        assert np.array_equal(picture(found), expected)
        general = changed(automatic, "ImagePromptAutoLoader", purpose="general")
        other = picture(server.run(general, timeout=300))
    assert np.array_equal(other, picture(server.run(GOOD, timeout=300)))
    assert np.abs(other - expected).max() > 20


def test_converted_adapter_gives_the_same_picture(server: Server) -> None:
    expected = picture(server.run(GOOD, timeout=300))
    with converted(server, ADAPTER_BASE.name) as name:
        options = server.object_info("ImagePromptLoadAdapter")["input"]["required"]
        assert name in options["adapter_name"][1]["options"]
        again = server.run(changed(GOOD, "ImagePromptLoadAdapter", adapter_name=name))
        assert node(GOOD, "KSampler") in executed(again)
        assert np.array_equal(picture(again), expected)


def test_encoder_of_the_original_release_gives_nearly_the_same_picture(server: Server) -> None:
    name = OPENCLIP.name
    original = replaced(GOOD, "CLIPVisionLoader", "ImagePromptLoadEncoder", encoder_name=name)
    expected = picture(server.run(GOOD, timeout=300))
    # Measured: 1 of 255, where a weight of 0.6 instead of 0.7 makes a difference of 217.
    assert np.abs(picture(server.run(original, timeout=300)) - expected).max() <= 2


def test_the_same_graph_under_other_ids_is_not_encoded_again(server: Server) -> None:
    """The host's cache knows a node by its inputs, as long as it does not ask for its own id."""

    def renamed(value: Any) -> Any:
        return [f"other{value[0]}", value[1]] if isinstance(value, list) else value

    other = {
        f"other{name}": {
            **each,
            "inputs": {key: renamed(value) for key, value in each["inputs"].items()},
        }
        for name, each in GOOD.items()
    }
    server.run(GOOD, timeout=300)
    again = server.run(other)
    ours = {name for name, each in other.items() if each["class_type"].startswith("ImagePrompt")}
    assert len(ours) == 3 and not ours & executed(again)


def test_program_of_the_note_queues_a_run_for_each_picture(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "11_api_batch"
    (note,) = (one for one in read_workflow(name)["nodes"] if one["type"] == "MarkdownNote")
    (program,) = re.findall(r"```python\n(.*?)```", note["widgets_values"][0], re.DOTALL)
    assert program.strip() == PROGRAM.strip()
    path = tmp_path / "workflows" / "api" / f"{name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(shrink(read_prompt(name))), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert program.count("http://127.0.0.1:8188/") == 1
    exec(program.replace("http://127.0.0.1:8188/", server.url()), {})

    deadline = time.monotonic() + 300
    while (queue := server.get("/queue")) and (queue["queue_running"] or queue["queue_pending"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    made = sorted((server.base / "output" / "batch").iterdir())
    assert [each.name.partition(".")[0] for each in made] == [
        "ip_adapter_photo",
        "ip_adapter_reference",
    ]
    assert len({each.read_bytes() for each in made}) == 2


@pytest.mark.parametrize(("kind", "title"), NODES.items())
def test_node_explains_itself(server: Server, kind: str, title: str) -> None:
    info = server.object_info(kind)
    assert (info["display_name"], info["category"]) == (title, "IP-Adapter")
    assert info["description"] and info.get("search_aliases", True)  # unknown to older hosts
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert inputs and all(options["tooltip"] for _, options in inputs.values())
    assert len(info["output_name"]) == len(info["output"]) == len(info["output_tooltips"])
    assert all([*info["output_name"], *info["output_tooltips"]])
    assert not set(info["output_name"]) & set(info["output"])  # names of our own, not the types
    assert info["output"] or info["output_node"]


def test_pack_has_these_nodes_and_no_others(server: Server) -> None:
    module = f"custom_nodes.{PACK_NAME}"
    ours = {k: v for k, v in server.object_info().items() if v["python_module"] == module}
    assert {k for k, info in ours.items() if not info["deprecated"]} == set(NODES)


def test_templates_are_listed(server: Server) -> None:
    assert set(server.get("/workflow_templates")[PACK_NAME]) == set(GRAPHS)


@pytest.mark.parametrize("name", GRAPHS)
def test_template_is_served(server: Server, name: str) -> None:
    served = server.get(f"/api/workflow_templates/{PACK_NAME}/{name}.json")
    assert served == read_workflow(name)
    thumbnail = server.get_bytes(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg")
    assert thumbnail == (FOLDER / f"{name}.jpg").read_bytes()


# Last, when all of the above has been logged. The host's own optional parts may fail to import.
def test_log_holds_no_complaint_about_us(server: Server) -> None:
    lines = server.log_text().replace("\\", "/").splitlines()
    loaded = [line for line in lines if "seconds" in line and f"custom_nodes/{PACK_NAME}" in line]
    assert len(loaded) == 1 and "FAILED" not in loaded[0]
    ours = re.compile(r"ip.adapter|image.?prompt", re.IGNORECASE)
    grave = re.compile(r"WARN|ERROR|CRITICAL|FAILED|Traceback|Error:|^ +File ")
    assert [line for line in lines if ours.search(line) and grave.search(line)] == []
