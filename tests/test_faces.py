"""Faces against what was drawn and against the formulas; tests/parity compares with insightface."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from ip_adapter import face_models, faces
from ip_adapter.errors import CheckpointError, ImageError, IncompatibleModelError, IPAdapterError
from ip_adapter.face_models import FaceModel
from ip_adapter.faces import Faces, Pick
from tests.conftest import ROOT
from tests.synthetic.face_models import Disc, build_pack, picture, recogniser
from tests.tolerance import assert_close

TEMPLATE = np.array(  # insightface's arcface_dst: eyes, nose, mouth corners
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
TWO = [Disc(150.4, 120.7, 22, tilt=15, strength=0.9), Disc(420, 300, 34, tilt=-30)]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pack(tmp_path_factory.mktemp("packs") / "synthetic")


@pytest.fixture(scope="module")
def model(pack: Path) -> FaceModel:
    return face_models.load(pack, "synthetic", "CPU")


def vectors(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 512, generator=torch.Generator().manual_seed(seed)) * 3


# vectors


def test_normed_vectors_keep_their_direction_and_lose_their_length() -> None:
    raw = vectors(3)
    expected = raw.numpy() / np.sqrt((raw.numpy().astype(np.float64) ** 2).sum(1, keepdims=True))
    assert_close(faces.from_tensor(raw).normed(), torch.from_numpy(expected).float())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_vector_without_direction_is_refused(value: float) -> None:
    raw = vectors(3)
    raw[1] = value
    with pytest.raises(ImageError, match=r"face 2 of 3 .*has length .* above 0"):
        faces.from_tensor(raw)


@pytest.mark.parametrize("shape", [(512,), (1, 512), (1, 1, 512)])
def test_vectors_are_accepted_in_the_shapes_people_have(shape: tuple[int, ...]) -> None:
    raw = vectors(1)
    given = faces.from_tensor(raw.reshape(shape).half())
    assert given.embeddings.dtype == torch.float32 and len(given) == 1
    assert_close(given.embeddings, raw.half().float(), 0)
    assert given.label == "from a tensor"


@pytest.mark.parametrize("shape", [(768,), (2, 1024), (2, 2, 512), (0, 512), ()])
def test_other_vectors_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(IncompatibleModelError, match=r"shape .*needed is \[512\]"):
        faces.from_tensor(torch.ones(shape))
    with pytest.raises(IncompatibleModelError, match="is a list; needed is a tensor"):
        faces.from_tensor([1.0] * 512)  # type: ignore[arg-type]


def test_as_many_crops_as_vectors() -> None:
    with pytest.raises(ImageError, match="2 face vectors and 3 crops"):
        faces.from_tensor(vectors(2), torch.zeros(3, 64, 64, 3))


def test_a_vector_alone_has_no_crop() -> None:
    with pytest.raises(ImageError, match=r"no picture of the face .* only its vector"):
        faces.from_tensor(vectors(1)).crops(224)


# crops


@pytest.mark.parametrize(("height", "width", "channels"), [(300, 300, 3), (200, 350, 4)])
def test_a_ready_crop_is_made_square_and_resized(height: int, width: int, channels: int) -> None:
    image = torch.ones(1, height, width, channels)
    image[..., 0] = torch.arange(width) / width  # red rises to the right
    crop = faces.from_tensor(vectors(1), image).crops(224)
    assert crop.shape == (1, 224, 224, 3)
    centre = (torch.arange(224) + 0.5) / 224 * min(height, width) + (width - min(height, width)) / 2
    inner = slice(8, -8)  # bicubic rings at the borders
    assert float((crop[0, 50, inner, 0] - (centre - 0.5)[inner] / width).abs().max()) < 1.5 / 255
    assert bool((crop[..., 1:] == 1).all())


def expected_places(landmarks: Tensor, size: int) -> np.ndarray:
    """Where each pixel of a crop comes from: `[size, size, (x, y)]`, by linear least squares."""
    target = TEMPLATE * (size / 112)
    if size % 112:
        target = (TEMPLATE + np.array([8, 0])) * (size / 128)
    rows, right = [], []
    for (x, y), (u, v) in zip(landmarks.double().numpy(), target, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]  # u = a x - b y + s; v = b x + a y + t
        right += [u, v]
    a, b, s, t = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
    inverse = np.linalg.inv([[a, -b, s], [b, a, t], [0, 0, 1]])
    y, x = np.mgrid[:size, :size]
    return np.einsum("ij,hwj->hwi", inverse, np.stack([x, y, np.ones_like(x)], -1))[..., :2]


@pytest.mark.parametrize("size", [112, 128, 224, 256, 336])
@pytest.mark.parametrize("tilt", [0, 25, -100])
def test_a_face_is_turned_onto_the_template(size: int, tilt: float) -> None:
    disc = Disc(310, 260, 60, tilt)
    y, x = torch.meshgrid(torch.arange(520.0), torch.arange(620.0), indexing="ij")
    ramp = torch.stack((x / 620, y / 520, (x + y) / 1140), -1)  # bilinear sampling is exact on it
    place = expected_places(disc.landmarks(), size)
    expected = np.stack((place[..., 0] / 620, place[..., 1] / 520, place.sum(-1) / 1140), axis=-1)
    crop = faces.align(ramp, disc.landmarks(), size)
    assert crop.shape == (size, size, 3)
    assert np.abs(crop.numpy() - expected).max() < 0.51 / 255  # it is rounded to 8 bit


def test_a_crop_is_black_outside_of_the_picture() -> None:
    disc = Disc(5, 5, 40)
    place = expected_places(disc.landmarks(), 112)
    crop = faces.align(torch.ones(200, 200, 3), disc.landmarks(), 112).numpy()
    inside = (place >= 0).all(-1)
    outside = (place <= -1).any(-1)
    assert inside.any() and outside.any()
    assert (crop[inside] == 1).all() and (crop[outside] == 0).all()


@pytest.mark.parametrize("size", [0, -112, 100, 200])
def test_other_crop_sizes_are_refused(size: int) -> None:
    with pytest.raises(ImageError, match=f"crop of {size} pixels .* multiple of 112"):
        faces.align(torch.zeros(8, 8, 3), Disc(4, 4, 2).landmarks(), size)


def test_landmarks_that_coincide_are_refused() -> None:
    with pytest.raises(ImageError, match="which is no face"):
        faces.align(torch.zeros(8, 8, 3), torch.ones(5, 2), 112)


# several faces


def test_joined_faces_keep_order_pictures_and_kind() -> None:
    raw = vectors(3)
    found = Faces(raw[:1], (torch.rand(90, 80, 3),), Disc(40, 40, 30).landmarks()[None], "pack")
    given = faces.from_tensor(raw[1:], torch.rand(2, 64, 64, 3))
    both = faces.join([found, given, found])
    assert_close(both.embeddings, torch.cat((raw, raw[:1])), 0)
    assert both.label == "pack" and len(both) == 4
    expected = torch.cat((found.crops(112), given.crops(112), found.crops(112)))
    assert_close(both.crops(112), expected, 0)
    assert faces.join([given]).landmarks is None


def test_joining_with_a_vector_alone_drops_the_pictures() -> None:
    with_crop = faces.from_tensor(vectors(1), torch.rand(1, 64, 64, 3))
    both = faces.join([with_crop, faces.from_tensor(vectors(1, seed=1))])
    assert len(both) == 2 and both.images == () and both.label == "from a tensor"
    with pytest.raises(ImageError, match="no picture"):
        both.crops(112)


def test_vectors_of_different_models_are_not_joined() -> None:
    one, other = (Faces(vectors(1), (), None, label) for label in ("buffalo_l", "antelopev2"))
    with pytest.raises(IncompatibleModelError, match="antelopev2, buffalo_l"):
        faces.join([one, other])
    with pytest.raises(ImageError, match="no faces to join"):
        faces.join([])


BOXES = torch.tensor([[10.0, 60, 30, 80], [200, 10, 260, 70], [90, 40, 130, 80], [10, 0, 30, 20]])


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("largest", [1, 2, 0, 3]),
        ("left to right", [0, 3, 2, 1]),
        ("right to left", [1, 2, 0, 3]),
        ("top to bottom", [3, 1, 2, 0]),
        ("centre", [2, 1, 0, 3]),  # of 300 x 120: (150, 60)
        ("confidence", [3, 0, 2, 1]),
    ],
)
def test_faces_are_put_in_order(by: faces.By, expected: list[int]) -> None:
    scores = torch.tensor([0.8, 0.6, 0.7, 0.9])
    assert Pick(by).order(BOXES, scores, height=120, width=300) == expected


def test_a_pick_that_means_nothing_is_refused() -> None:
    with pytest.raises(ImageError, match="'smallest'; needed is one of largest"):
        Pick("smallest")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="number -1 does not exist"):
        Pick("largest", -1)


# detection


def test_faces_are_found_where_they_were_drawn(model: FaceModel) -> None:
    found = model.detect(picture(480, 640, TWO)[0])
    assert len(found) == 2 and found.size == 640  # not four: the second anchors were merged
    for row, disc in zip((1, 0), TWO, strict=True):
        assert float((found.boxes[row] - disc.box()).abs().max()) < 0.1
        assert float((found.landmarks[row] - disc.landmarks()).abs().max()) < 0.1
        assert float(found.scores[row]) == pytest.approx(disc.strength, abs=3 / 255)


@pytest.mark.parametrize(("height", "width"), [(1200, 900), (300, 1000), (200, 200)])
def test_pictures_of_any_size_give_their_own_pixels(
    model: FaceModel, height: int, width: int
) -> None:
    scale = 640 / max(height, width)
    disc = Disc(width * 0.4, height * 0.55, 25 / scale, tilt=10)
    found = model.detect(picture(height, width, [disc])[0])
    assert len(found) == 1
    # Scaling maps middles of pixels, the result is divided by the scale alone (as insightface's).
    allowed = 0.5 * abs(1 - 1 / scale) + 0.5
    assert float((found.landmarks[0] - disc.landmarks()).abs().max()) < allowed


def test_a_large_face_is_found_at_a_smaller_size(model: FaceModel) -> None:
    """Radius 60 at 640 pixels; the detector sees up to 41.6: not at 448 (42), but at 384 (36)."""
    disc = Disc(320, 240, 60)
    found = model.detect(picture(480, 640, [disc])[0])
    assert found.size == 384
    assert float((found.boxes[0] - disc.box()).abs().max()) < 1


def test_neighbours_are_two_and_weak_faces_none(model: FaceModel) -> None:
    pair = [Disc(200, 200, 30), Disc(310, 200, 30)]
    assert len(model.detect(picture(480, 640, pair)[0])) == 2
    assert len(model.detect(picture(480, 640, [Disc(200, 200, 30, strength=0.45)])[0])) == 0


def test_boxes_that_overlap_by_more_than_two_fifths_are_one() -> None:
    boxes = torch.tensor([[0.0, 0, 99, 99], [0, 0, 99, 38], [0, 0, 99, 41], [300, 0, 309, 9]])
    # with both edge pixels: 100 x 39 of 100 x 100 is 0.39, 100 x 42 is 0.42
    assert face_models._distinct(boxes).tolist() == [0, 1, 3]


def test_the_picked_face_is_read(model: FaceModel) -> None:
    image = picture(480, 640, TWO)[0]
    left, count = model.find(image, Pick("left to right", 0), "x")
    right, _ = model.find(image, Pick("left to right", 1), "x")
    assert count == 2
    assert float((left - TWO[0].landmarks()).abs().max()) < 0.1
    assert float((right - TWO[1].landmarks()).abs().max()) < 0.1


def test_no_face_says_where_and_what_to_do(model: FaceModel) -> None:
    with pytest.raises(
        ImageError,
        match=r"No face in image 2 of 3 \(320 x 240 pixels\).* at 640, 576, 512, 448, 384, 320 pi",
    ):
        model.find(picture(240, 320, [])[0], Pick(), "image 2 of 3")


def test_a_face_too_many_says_how_many_there_are(model: FaceModel) -> None:
    image = picture(480, 640, TWO)[0]
    with pytest.raises(ImageError, match=r"no face number 2 in x: 2 faces found.* at most 1"):
        model.find(image, Pick("centre", 2), "x")
    with pytest.raises(ImageError, match="1 face found"):
        model.find(picture(480, 640, TWO[:1])[0], Pick("centre", 1), "x")


def test_the_recogniser_reads_the_aligned_crop(model: FaceModel) -> None:
    """The synthetic one is a linear map of an 8 x 8 thumbnail, written out here."""
    (weights,) = (numpy_helper.to_array(one) for one in recogniser().graph.initializer)
    images = [picture(480, 640, TWO[:1])[0], picture(480, 640, TWO[1:])[0]]
    read = model.read(images, [disc.landmarks() for disc in TWO])
    crops = read.crops(112).numpy()
    thumbnails = ((crops * 255 - 127.5) / 127.5).reshape(2, 8, 14, 8, 14, 3).mean((2, 4))
    expected = thumbnails.transpose(0, 3, 1, 2).reshape(2, -1) @ weights
    assert_close(read.embeddings, torch.from_numpy(expected).float(), 1e-4)
    assert read.label == "synthetic" and len(read) == 2


def test_a_vector_that_is_no_number_is_not_passed_on(model: FaceModel) -> None:
    class Overflowing:
        get_inputs = model.recogniser.get_inputs

        def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((1, 512), np.nan, np.float32)]

    broken = dataclasses.replace(model, recogniser=Overflowing())
    with pytest.raises(ImageError, match=r"w600k_r50\.onnx returned .* provider CPU"):
        broken.embed(torch.zeros(1, 112, 112, 3))


# packs


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("size", [None, 320])
def test_other_exports_of_a_detector_work(tmp_path: Path, size: int | None, batched: bool) -> None:
    folder = build_pack(tmp_path / "p", ("b.onnx", "a.ONNX"), size=size, batched=batched)
    other = face_models.load(folder, "p", "CPU")
    assert [path.name for path in other.files] == ["b.onnx", "a.ONNX"]
    assert other.sizes() == ((320,) if size else (640, 576, 512, 448, 384, 320))
    found = other.detect(picture(480, 640, TWO)[0])
    assert found.size == (size or 640)
    assert float((found.landmarks[0] - TWO[1].landmarks()).abs().max()) < 1


def test_an_incomplete_pack_says_what_is_missing(tmp_path: Path) -> None:
    folder = build_pack(tmp_path / "p")
    (folder / "w600k_r50.onnx").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"no face recogniser in .*genderage\.onnx is something else.*\[\*, 512\].*/releases",
    ):
        face_models.load(folder, "p", "CPU")


def test_a_truncated_file_is_named_and_others_do_not_matter(tmp_path: Path) -> None:
    folder = build_pack(tmp_path / "p", others=False)
    (folder / "det_broken.onnx").write_bytes(b"<html>not a model</html>")
    assert face_models.load(folder, "p", "CPU").files[0].name == "det_10g.onnx"
    whole = (folder / "det_10g.onnx").read_bytes()
    (folder / "det_10g.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"no face detector .*det_10g\.onnx .*cannot be read"):
        face_models.load(folder, "p", "CPU")


def test_an_onnx_that_is_no_face_model_is_not_taken_for_one(tmp_path: Path) -> None:
    folder = build_pack(tmp_path / "p", others=False)
    for name, edit in (("det_10g.onnx", "outputs"), ("w600k_r50.onnx", "width")):
        graph = onnx.load(str(folder / name))
        if edit == "outputs":
            del graph.graph.output[6:]  # a detector without landmarks
        else:
            graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 256
        (folder / name).unlink()
        onnx.save(graph, str(folder / name))
    with pytest.raises(CheckpointError, match="no face detector"):
        face_models.load(folder, "p", "CPU")


# providers


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("asked", "available", "expected"),
    [
        ("auto", [CPU], [CPU]),
        ("auto", ["AzureExecutionProvider", CPU], [CPU]),
        ("auto", ["TensorrtExecutionProvider", CUDA, CPU], [CUDA, CPU]),
        ("auto", ["ROCMExecutionProvider", CPU], ["ROCMExecutionProvider", CPU]),
        ("auto", ["MIGraphXExecutionProvider", CPU], ["MIGraphXExecutionProvider", CPU]),
        ("auto", ["CoreMLExecutionProvider", CPU], ["CoreMLExecutionProvider", CPU]),
        ("DirectML", ["DmlExecutionProvider", CPU], ["DmlExecutionProvider", CPU]),
        ("CPU", [CUDA, CPU], [CPU]),
    ],
)
def test_providers_are_chosen(asked: str, available: list[str], expected: list[str]) -> None:
    assert face_models.choose(asked, available) == expected


def test_a_provider_that_is_not_there_is_refused(pack: Path) -> None:
    with pytest.raises(IncompatibleModelError, match=r"does not offer CUDA; it offers .*CPU"):
        face_models.choose("CUDA", ["AzureExecutionProvider", CPU])
    with pytest.raises(IncompatibleModelError, match="does not offer Abacus"):
        face_models.load(pack, "p", "Abacus")


def test_a_provider_that_does_not_start_is_refused(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu without its CUDA libraries lists CUDA and silently computes on the CPU."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    real = face_models._session
    monkeypatch.setattr(face_models, "_session", lambda *given: real(*given[:3], [CPU]))
    with pytest.raises(IncompatibleModelError, match="lists CUDA but could not start it, and used"):
        face_models.load(pack, "p", "CUDA")
    assert face_models.load(pack, "p", "auto").provider == "CPU"


def test_without_onnxruntime_the_command_for_this_python_is_named(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(IPAdapterError) as caught:
        face_models.load(pack, "p")
    assert f'"{sys.executable}" -m pip install onnxruntime' in str(caught.value)


def test_importing_imports_neither_onnxruntime_nor_insightface() -> None:
    code = (
        "import sys; import ip_adapter.face_models; "
        "print([m for m in sys.modules if m.split('.')[0] in ('onnxruntime', 'insightface', "
        "'onnx', 'cv2', 'skimage')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
