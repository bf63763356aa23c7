"""The workflows of the old pack in a real ComfyUI over HTTP, and what plug-ins ask of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.client import Json
from scripts.server import Server
from tests.host.legacy_server import legacy_server
from tests.host.server_fixtures import executed, node, saved
from tests.legacy_graphs import COMPOSITION, EMBEDS, GRAPHS, SIZE, WRITTEN
from tests.legacy_workflows import RECORD, prompt
from tests.synthetic.models import ADAPTER_BASE, ADAPTER_FACE, ADAPTER_PLUS, CHECKPOINT, CLIP_VISION

pytestmark = pytest.mark.host

PICTURES = {"batches": 2, "weights": 4, "tiles": 2, "embeds": 2}
"""Of each workflow that makes more than one."""


SHOWN = {"tiles": {"tiles": 4, "regions": 4}, "faces": {"seen": 1}}
"""What previews show of second and third outputs: tiles, their masks, the face that was cut out."""


OURS = re.compile(r"ip.adapter|image.?prompt", re.IGNORECASE)
GRAVE = re.compile(r"WARN|ERROR|CRITICAL|Error:|^ +File ")
"""Of the log; the host's own parts may complain."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    with legacy_server(tmp_path_factory.mktemp("legacy"), model_files) as started:
        yield started


def without_adapters(graph: Json) -> Json:
    """A copy that samples with the checkpoint's own model."""
    plain = copy.deepcopy(graph)
    plain[node(plain, "KSampler")]["inputs"]["model"] = [node(plain, "CheckpointLoaderSimple"), 0]
    return plain


def test_every_old_node_is_in_a_workflow() -> None:
    assert set.union(*(graph.kinds() for graph in GRAPHS.values())) == set(RECORD)


@pytest.mark.parametrize("name", GRAPHS)
def test_old_workflow_runs(server: Server, name: str) -> None:
    graph = prompt(GRAPHS[name])
    before = len(server.log_text())
    result = server.run(graph, timeout=300)
    ran = executed(result) | result.cached()
    assert GRAPHS[name].kinds() == {graph[each]["class_type"] for each in ran} & RECORD.keys()
    pictures = saved(result)
    assert [each.shape for each in pictures] == [(SIZE, SIZE, 3)] * PICTURES.get(name, 1)
    assert all(each.std() > 10 for each in pictures)
    plain = saved(server.run(without_adapters(graph)))
    assert all(np.abs(a - b).max() > 20 for a, b in zip(pictures, plain, strict=True))
    for shown, count in SHOWN.get(name, {}).items():
        assert len(result.outputs[str(GRAPHS[name].number(shown))]["images"]) == count
    log = server.log_text()[before:]
    assert [line for line in log.splitlines() if OURS.search(line) and GRAVE.search(line)] == []
    assert "invalid value" not in log  # numpy, where a picture holds NaN


def test_embeds_are_written_as_before(server: Server) -> None:
    """One tensor that torch reads: what Load Embeds, and other packs, take."""
    if not (server.base / "output" / WRITTEN).parent.is_dir():  # this test alone
        server.run(prompt(GRAPHS["embeds"]), timeout=300)
    found = sorted((server.base / "output" / WRITTEN).parent.glob("*.ipadpt"))
    assert found and found[0].name.startswith(Path(WRITTEN).name)
    written = torch.load(found[0], weights_only=True)
    assert isinstance(written, torch.Tensor) and written.shape == (2, 1024)


def test_lists_of_files_are_where_plugins_look(server: Server) -> None:
    """As Krita's and SwarmUI's read them, without knowing our nodes."""
    info = server.object_info()

    def listed(kind: str, key: str) -> list[str]:
        return list(info[kind]["input"]["required"][key][0])

    files = listed("IPAdapterModelLoader", "ipadapter_file")
    assert files == sorted(p.name for p in (ADAPTER_BASE, ADAPTER_FACE, ADAPTER_PLUS, COMPOSITION))
    assert [Path(each) for each in listed("IPAdapterLoadEmbeds", "embeds")] == [Path(EMBEDS)]
    assert "linear" in listed("IPAdapterAdvanced", "weight_type")
    assert "PLUS (high strength)" in listed("IPAdapterUnifiedLoader", "preset")
    assert all(info[kind]["deprecated"] for kind in RECORD)


def test_calls_of_the_krita_plugin(server: Server) -> None:
    """Two references and a region, and a face, with the inputs that it sends and no others."""
    info = server.object_info("IPAdapterModelLoader")
    files = info["input"]["required"]["ipadapter_file"][0]
    base, face = (next(n for n in files if p in n) for p in ("adapter_sd15", "faceid-plusv2_sd15"))
    graph = krita(base, face)
    result = server.run(graph, timeout=300)
    (found,) = saved(result)
    assert found.shape == (SIZE, SIZE, 3)
    pictures = [found]
    for left_out in ("region", "face"):  # each acts
        (other,) = saved(server.run(without(graph, left_out), timeout=300))
        pictures.append(other)
    assert len({each.tobytes() for each in pictures}) == len(pictures)


def without(graph: Json, name: str) -> Json:
    """A copy in which nobody takes the model of a node, but the one from before it."""
    model = graph[name]["inputs"]["model"]
    return {
        number: {
            **each,
            "inputs": {k: model if v == [name, 0] else v for k, v in each["inputs"].items()},
        }
        for number, each in graph.items()
    }


def krita(base: str, face: str) -> Json:
    """What the plug-in (krita-ai-diffusion, comfy_workflow.py) sends for SD 1.5."""

    def call(kind: str, **inputs: Any) -> Json:
        return {"class_type": kind, "inputs": inputs}

    def encoded(image: str, weight: float) -> Json:
        loaded = {"ipadapter": ["adapter", 0], "clip_vision": ["encoder", 0]}
        return call("IPAdapterEncoder", image=[image, 0], weight=weight, **loaded)

    def text(words: str) -> Json:
        return call("CLIPTextEncode", clip=["checkpoint", 1], text=words)

    half = {"value": 1.0, "width": SIZE // 2, "height": SIZE}
    return {
        "checkpoint": call("CheckpointLoaderSimple", ckpt_name=CHECKPOINT.name),
        "encoder": call("CLIPVisionLoader", clip_name=CLIP_VISION.name),
        "adapter": call("IPAdapterModelLoader", ipadapter_file=base),
        "style": call("LoadImage", image="ip_adapter_reference.png"),
        "other": call("LoadImage", image="ip_adapter_reference_2.png"),
        "person": call("LoadImage", image="ip_adapter_face.png"),
        "one": encoded("style", 0.7),
        "two": encoded("other", 0.4),
        "both": call(
            "IPAdapterCombineEmbeds", method="concat", embed1=["one", 0], embed2=["two", 0]
        ),
        "mask": call("SolidMask", **half),
        "region": call(
            "IPAdapterEmbeds",
            model=["checkpoint", 0],
            ipadapter=["adapter", 0],
            pos_embed=["both", 0],
            clip_vision=["encoder", 0],
            weight=1.0,
            weight_type="style transfer",
            embeds_scaling="V only",
            start_at=0.0,
            end_at=0.8,
            attn_mask=["mask", 0],
        ),
        "insight": call("IPAdapterInsightFaceLoader", provider="CPU", model_name="buffalo_l"),
        "faceid": call("IPAdapterModelLoader", ipadapter_file=face),
        "face": call(
            "IPAdapterFaceID",
            model=["region", 0],
            ipadapter=["faceid", 0],
            image=["person", 0],
            clip_vision=["encoder", 0],
            insightface=["insight", 0],
            weight=0.9,
            weight_faceidv2=1.8,
            weight_type="linear",
            combine_embeds="concat",
            start_at=0.0,
            end_at=1.0,
            embeds_scaling="V only",
        ),
        "positive": text("a portrait"),
        "negative": text("blurry"),
        "latent": call("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "sampler": call(
            "KSampler",
            model=["face", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=3,
            steps=2,
            cfg=6.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decoded": call("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "saved": call("SaveImage", images=["decoded", 0], filename_prefix="krita"),
    }
