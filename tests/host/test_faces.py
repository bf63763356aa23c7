"""The face nodes in the real host, with synthetic packs in its model folders."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from tests.host_process import Host
from tests.synthetic.face_models import Disc, build_pack, picture
from tests.tolerance import assert_close

pytestmark = pytest.mark.host

LEFT, RIGHT = Disc(150.4, 120.7, 36, tilt=15, strength=0.9), Disc(420, 300, 24, tilt=-30)


@pytest.fixture
def library(host: Host) -> Any:
    return host.library("ip_adapter.host.faces")


@pytest.fixture
def models(host: Host, library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty models directory, and nothing kept from other tests."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    host.library("ip_adapter.host.folders").register()  # as when the host loads the pack
    library._kept.clear()
    return tmp_path / "models" / "insightface" / "models"


@pytest.fixture
def node(host: Host) -> Callable[[str], Any]:
    nodes = host.library("ip_adapter.nodes.faces").NODES
    return {cls.define_schema().node_id: cls for cls in nodes}.__getitem__


@pytest.fixture
def face_model(models: Path, node: Callable[[str], Any]) -> Any:
    build_pack(models / "buffalo_l", others=False)
    return node("ImagePromptLoadFaceModel").execute("buffalo_l", "auto").result[0]


# folders


def test_packs_are_found_where_people_put_them(models: Path, library: Any) -> None:
    import folder_paths

    assert library.packs() == []
    build_pack(models / "buffalo_l")
    build_pack(models / "antelopev2" / "antelopev2")  # as its zip file unpacks
    build_pack(models.parent / "no_models_folder")
    (models / "empty").mkdir()
    (models.parent / "inswapper_128.onnx").touch()  # another pack's file
    assert library.packs() == ["antelopev2", "buffalo_l", "no_models_folder"]
    assert library.find("antelopev2") == models / "antelopev2" / "antelopev2"
    assert library.choices() == library.packs()
    assert ".onnx" in folder_paths.folder_names_and_paths["insightface"][1]


def test_configured_folders_come_first(
    host: Host, models: Path, library: Any, tmp_path: Path
) -> None:
    import folder_paths

    elsewhere = tmp_path / "elsewhere"
    build_pack(elsewhere / "models" / "buffalo_l")
    build_pack(models / "buffalo_l")
    folder_paths.folder_names_and_paths["insightface"] = ([str(elsewhere)], set())
    host.library("ip_adapter.host.folders").register()  # the host reads its yaml before the packs
    assert library.find("buffalo_l") == elsewhere / "models" / "buffalo_l"
    paths, _ = folder_paths.folder_names_and_paths["insightface"]
    assert paths == [str(elsewhere), str(models.parent)]


def test_a_missing_pack_names_folder_link_and_licence(models: Path, library: Any) -> None:
    (option,) = library.choices()
    expected = rf"to {models}/buffalo_l, .*insightface/releases .*non-commercial research only"
    with pytest.raises(Exception, match=expected):
        library.find(option)
    build_pack(models / "buffalo_l", others=False)
    with pytest.raises(Exception, match=r"no face model 'antelopev2' \(there are buffalo_l\)"):
        library.load("antelopev2", "auto")


# loading


def test_one_pack_is_kept_until_another_is_loaded(models: Path, library: Any) -> None:
    build_pack(models / "buffalo_l", others=False)
    build_pack(models / "antelopev2", others=False)
    first = library.load("buffalo_l", "auto")
    assert library.load("buffalo_l", "auto") is first
    library.load("antelopev2", "auto")
    assert [model.label for model in library._kept.values()] == ["antelopev2"]
    assert library.load("buffalo_l", "CPU") is not first


def test_changed_files_are_loaded_again(
    models: Path, library: Any, node: Callable[[str], Any]
) -> None:
    loader = node("ImagePromptLoadFaceModel")
    assert loader.fingerprint_inputs("buffalo_l", "auto") == "missing"
    build_pack(models / "buffalo_l", others=False)
    first, before = library.load("buffalo_l"), loader.fingerprint_inputs("buffalo_l", "auto")
    build_pack(models / "buffalo_l", others=False, size=320)
    assert loader.fingerprint_inputs("buffalo_l", "auto") != before
    assert first.sizes() != (320,) and library.load("buffalo_l").sizes() == (320,)


# nodes


def test_the_picked_face_comes_out(face_model: Any, node: Callable[[str], Any]) -> None:
    image = picture(480, 640, [LEFT, RIGHT])
    detect = node("ImagePromptDetectFace")
    face, crop = detect.execute(face_model, image, "largest", 0).result
    assert float((face.landmarks[0] - LEFT.landmarks()).abs().max()) < 0.1
    assert face.embeddings.shape == (1, 512) and face.label == "buffalo_l"
    assert crop.shape == (1, 224, 224, 3)
    # Upright in the crop: red above blue, whatever the tilt in the picture.
    assert float(crop[0, 60, 112, 0] - crop[0, 60, 112, 2]) > 0.8
    assert float(crop[0, 160, 112, 2] - crop[0, 160, 112, 0]) > 0.8
    (other, _) = detect.execute(face_model, image, "largest", 1).result
    assert float((other.landmarks[0] - RIGHT.landmarks()).abs().max()) < 0.1


def test_a_batch_gives_one_face_per_picture(face_model: Any, node: Callable[[str], Any]) -> None:
    batch = torch.cat([picture(480, 640, [one]) for one in (LEFT, RIGHT)])
    detect = node("ImagePromptDetectFace")
    face, crop = detect.execute(face_model, batch, "confidence", 0).result
    assert len(face) == 2 and crop.shape == (2, 224, 224, 3)
    for row in range(2):
        (alone, _) = detect.execute(face_model, batch[row : row + 1], "confidence", 0).result
        assert_close(alone.embeddings[0], face.embeddings[row], 1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(face_model: Any, node: Callable[[str], Any], channels: int) -> None:
    image = picture(480, 640, [LEFT])
    detect = node("ImagePromptDetectFace")
    if channels == 4:
        opaque = torch.cat((image, torch.ones_like(image[..., :1])), -1)
        assert len(detect.execute(face_model, opaque, "largest", 0).result[0]) == 1
    else:  # without colour there is no synthetic face; a grey picture is still one
        with pytest.raises(Exception, match="No face in the image"):
            detect.execute(face_model, image[..., :1], "largest", 0)


def test_the_picture_without_a_face_is_named(face_model: Any, node: Callable[[str], Any]) -> None:
    batch = torch.cat([picture(480, 640, faces) for faces in ([LEFT], [], [RIGHT])])
    with pytest.raises(Exception, match=r"No face in image 2 of 3 \(640 x 480 pixels\)"):
        node("ImagePromptDetectFace").execute(face_model, batch, "largest", 0)


def test_detection_can_be_cancelled(
    face_model: Any, node: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    seen: list[Tensor] = []
    monkeypatch.setattr(type(face_model), "detect", lambda self, image: seen.append(image))
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        node("ImagePromptDetectFace").execute(face_model, picture(480, 640, [LEFT]), "largest", 0)
    assert not seen


def test_vectors_from_elsewhere(face_model: Any, node: Callable[[str], Any]) -> None:
    found, crop = (
        node("ImagePromptDetectFace")
        .execute(face_model, picture(480, 640, [LEFT]), "largest", 0)
        .result
    )
    (given,) = node("ImagePromptFaceFromTensor").execute(found.embeddings[0], crop).result
    assert_close(given.normed(), found.normed(), 0)
    assert_close(given.crops(224), found.crops(224), 0)
    (alone,) = node("ImagePromptFaceFromTensor").execute(found.embeddings).result
    with pytest.raises(Exception, match="no picture of the face"):
        alone.crops(224)


def test_another_packs_object_is_refused(node: Callable[[str], Any]) -> None:
    with pytest.raises(Exception, match=r"got a builtins\.dict, which another pack made"):
        node("ImagePromptDetectFace").execute({}, picture(480, 640, [LEFT]), "largest", 0)


# interface


def test_the_loader_says_what_is_missing_before_it_runs(
    models: Path, node: Callable[[str], Any]
) -> None:
    loader = node("ImagePromptLoadFaceModel")
    assert "insightface/releases" in loader.validate_inputs("buffalo_l")
    build_pack(models / "buffalo_l", others=False)
    assert loader.validate_inputs("buffalo_l") is True
    assert "non-commercial" in loader.define_schema().description


INTERFACE = {
    "ImagePromptLoadFaceModel": (["pack_name", "provider"], ["face_model"]),
    "ImagePromptDetectFace": (["face_model", "image", "pick", "index"], ["face", "crop"]),
    "ImagePromptFaceFromTensor": (["embedding", "crop"], ["face"]),
}


@pytest.mark.parametrize("node_id", INTERFACE)
def test_interface(node: Callable[[str], Any], node_id: str) -> None:
    schema = node(node_id).define_schema()
    inputs, outputs = INTERFACE[node_id]
    assert [one.id for one in schema.inputs] == inputs
    assert [one.display_name for one in schema.outputs] == outputs
    assert list(inspect.signature(node(node_id).execute).parameters) == inputs
    assert all(one.tooltip for one in (*schema.inputs, *schema.outputs))


def test_the_pack_imports_neither_onnxruntime_nor_insightface() -> None:
    """In a process of its own: here other tests have loaded face models."""
    code = (
        "import sys\n"
        "from tests import host_process\n"
        "host = host_process.start()\n"
        "host.library('ip_adapter.nodes.faces').LoadFaceModel.define_schema()\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'onnxruntime', 'onnx', 'insightface'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
