"""Faces and automatic loading in a real ComfyUI over HTTP: pictures, and every refusal in words."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.client import Json
from scripts.prompts import read_prompt, shrink
from scripts.server import PromptFailed, PromptRejected, Server
from tests.host.server_fixtures import (
    GOOD,
    changed,
    converted,
    decode,
    executed,
    node,
    picture,
    renamed,
    running,
)
from tests.synthetic import face_models
from tests.synthetic.models import ADAPTER_FACE, ADAPTER_PLUS, CLIP_VISION, OPENCLIP

pytestmark = pytest.mark.host

AUTOMATIC, DETECT, LOAD = "ImagePromptAutoLoader", "ImagePromptDetectFace", "ImagePromptLoadAdapter"

FACE: Json = shrink(read_prompt("05_face_identity"))
"""One face, one text, one picture of 64 x 64 in two steps; and a preview of the face."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("faces"), model_files, "--cache-classic") as started:
        yield started


@pytest.fixture(scope="module")
def good(server: Server) -> np.ndarray:
    """The picture of the shipped face, before anything else has run."""
    return picture(server.run(FACE, timeout=300))


def portrait(server: Server, name: str, *discs: face_models.Disc) -> str:
    """Put a picture of synthetic faces into the host's input folder."""
    pixels = (face_models.picture(384, 512, discs)[0] * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    server.upload_image(name, file.getvalue())
    return name


def sampled(server: Server, prompt: Json) -> np.ndarray:
    """A run's picture, which must not come from the host's cache."""
    result = server.run(prompt, timeout=300)
    assert node(prompt, "KSampler") in executed(result)
    return picture(result)


def fail(server: Server, prompt: Json, kind: str, error: str, *words: str) -> None:
    """Run a prompt that must fail in a node, with our exception and our words."""
    with pytest.raises(PromptFailed) as caught:
        server.run(prompt, timeout=300)
    found = caught.value
    assert found.node_type == kind
    assert found.exception_type.endswith(f"ip_adapter.{error}"), found
    assert [word for word in words if word not in found.exception_message] == [], found
    assert "Traceback" not in found.exception_message


LEFT, RIGHT = face_models.Disc(130, 200, 32, tilt=20), face_models.Disc(380, 150, 24, strength=0.8)


# Faces


def test_face_of_the_workflow_is_the_one_in_the_picture(server: Server, good: np.ndarray) -> None:
    assert good.shape == (64, 64, 3) and good.std() > 10
    log = server.log_text()
    assert "Face model buffalo_l: 1 in the image" in log
    assert "128 of 128 modules, strength 0.6" in log and "16 of 16 layers" in log
    result = server.run(changed(FACE, "KSampler", seed=1), timeout=300)
    (crop,) = (decode(image) for image in result.images if image.kind == "temp")
    # The cap is red and the veil blue, upright and in the middle.
    assert crop.shape == (224, 224, 3)
    assert (crop[50, 112, 0] - crop[50, 112, 2]) > 120 and (
        crop[180, 112, 2] - crop[180, 112, 0]
    ) > 120


def test_the_face_decides_and_nothing_else(server: Server, good: np.ndarray) -> None:
    def of(name: str) -> np.ndarray:
        return sampled(server, changed(FACE, "LoadImage", image=name))

    left = of(portrait(server, "left.png", LEFT))
    right = of(portrait(server, "right.png", RIGHT))
    assert min(np.abs(a - b).max() for a, b in ((left, right), (left, good), (right, good))) > 20
    copied = Path(server.base / "input" / "ip_adapter_face.png").read_bytes()
    server.upload_image("copy.png", copied)
    assert np.array_equal(of("copy.png"), good)


def test_the_index_picks_the_face(server: Server, good: np.ndarray) -> None:
    both = portrait(server, "both.png", LEFT, RIGHT)
    first, second = (
        sampled(server, changed(changed(FACE, "LoadImage", image=both), DETECT, index=number))
        for number in (0, 1)
    )
    assert np.abs(first - second).max() > 20
    beyond = changed(changed(FACE, "LoadImage", image=both), DETECT, index=2)
    words = ("no face number 2 in the image", "2 faces found", "index of at most 1")
    fail(server, beyond, DETECT, "ImageError", *words)
    assert np.array_equal(sampled(server, FACE), good)


def test_picture_without_a_face_is_refused(server: Server, good: np.ndarray) -> None:
    nobody = changed(FACE, "LoadImage", image="ip_adapter_reference.png")
    words = ("No face in the image (512 x 512 pixels)", "buffalo_l", "use another picture")
    fail(server, nobody, DETECT, "ImageError", *words)
    assert np.array_equal(sampled(server, FACE), good)


def test_structure_and_lora_count(server: Server, good: np.ndarray) -> None:
    for kind, inputs in (
        ("ImagePromptEncodeFace", {"structure_weight": 0.0}),
        ("ImagePromptFaceLoRA", {"strength": 0.0}),
    ):
        other = sampled(server, changed(FACE, kind, **inputs))
        assert np.abs(other - good).max() > 20, kind


def test_converted_adapter_keeps_its_lora_and_its_picture(server: Server, good: np.ndarray) -> None:
    with converted(server, ADAPTER_FACE.name) as name:
        assert name.endswith(".safetensors")
        again = sampled(server, changed(FACE, LOAD, adapter_name=name))
    assert np.array_equal(again, good)


def test_face_adapter_cannot_read_plain_pictures(server: Server) -> None:
    prompt = changed(GOOD, LOAD, adapter_name=ADAPTER_FACE.name)
    words = (ADAPTER_FACE.name, "reads faces", "Use Encode Face Prompt")
    fail(server, prompt, "ImagePromptEncode", "IncompatibleModelError", *words)


def test_plain_adapter_cannot_read_faces(server: Server) -> None:
    prompt = changed(FACE, LOAD, adapter_name=ADAPTER_PLUS.name)
    del prompt[node(prompt, "ImagePromptFaceLoRA")]
    checkpoint = [node(prompt, "CheckpointLoaderSimple"), 0]
    prompt = changed(prompt, "ImagePromptApply", model=checkpoint)
    words = (ADAPTER_PLUS.name, "reads pictures, not face vectors", "Use Encode Image Prompt")
    fail(server, prompt, "ImagePromptEncodeFace", "IncompatibleModelError", *words)


def test_missing_image_encoder_is_named(server: Server) -> None:
    prompt = changed(FACE, "ImagePromptEncodeFace", clip_vision=None)
    words = ("clip_vision is not connected", "Connect OpenCLIP ViT-H/14")
    fail(server, prompt, "ImagePromptEncodeFace", "IncompatibleModelError", *words)


def test_missing_face_model_is_refused_before_anything_runs(server: Server) -> None:
    with pytest.raises(PromptRejected) as caught:
        server.run(changed(FACE, "ImagePromptLoadFaceModel", pack_name="antelopev2"))
    (found,) = caught.value.details["node_errors"].values()
    (error,) = found["errors"]
    assert error["type"] == "custom_validation_failed"
    for word in (
        "no face model 'antelopev2' (there are buffalo_l)",
        str(Path("models/insightface/models/antelopev2")),
        "https://github.com/deepinsight/insightface/releases",
        "non-commercial research only",
    ):
        assert word in error["details"], error


# Automatic


def automatic(prompt: Json, **inputs: Any) -> Json:
    """The automatic loader in place of adapter loader, image encoder and LoRA."""
    new = copy.deepcopy(prompt)
    model, adapter, encoder, lora = (
        next((name for name, each in new.items() if each["class_type"] == kind), None)
        for kind in ("CheckpointLoaderSimple", LOAD, "CLIPVisionLoader", "ImagePromptFaceLoRA")
    )
    outputs = {adapter: ["auto", 1], encoder: ["auto", 2], lora: ["auto", 0]}
    for name in (adapter, encoder, lora):
        new.pop(name, None)
    for each in new.values():
        for key, value in each["inputs"].items():
            if isinstance(value, list) and value[0] in outputs:
                each["inputs"][key] = outputs[value[0]]
    given = {"model": [model, 0], "purpose": "strong", "lora_strength": 0.6, **inputs}
    return {**new, "auto": {"class_type": AUTOMATIC, "inputs": given}}


def test_automatic_finds_face_adapter_encoder_and_lora(server: Server, good: np.ndarray) -> None:
    """Faces encoded with the original OpenCLIP file would be nearly the same, but only nearly."""
    with renamed(server, {f"{OPENCLIP}": "unused/open_clip.safetensors"}):
        found = sampled(server, automatic(FACE, purpose="face identity"))
    assert np.array_equal(found, good)


def test_automatic_says_which_adapter_to_download(server: Server) -> None:
    missing = automatic(GOOD, purpose="face portrait")
    words = (
        "No IP-Adapter for the purpose 'face portrait' and SD 1.5 is installed",
        f"- {ADAPTER_FACE.name}: ",
        str(Path("models/ipadapter")),
        "Download ip-adapter-faceid-portrait",
        "https://huggingface.co/h94/IP-Adapter-FaceID",
    )
    fail(server, missing, AUTOMATIC, "MissingFileError", *words)


def test_automatic_says_which_encoder_to_download(server: Server) -> None:
    away = {f"{path}": f"unused/{path.name}" for path in (CLIP_VISION, OPENCLIP)}
    words = (
        f"'{ADAPTER_PLUS.name}' (plus for SD 1.5",
        "needs the image encoder OpenCLIP ViT-H/14, which is not installed under any name",
        str(Path("models/clip_vision")),
        "https://huggingface.co/",
    )
    with renamed(server, away):
        fail(server, automatic(GOOD), AUTOMATIC, "MissingFileError", *words)
    assert picture(server.run(automatic(GOOD), timeout=300)).std() > 10
