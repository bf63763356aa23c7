"""The same ONNX files and pictures through insightface 2.1 (with OpenCV) and through our code.

The files are synthetic; what is compared is everything around them: letterboxing, anchors,
merging, alignment, colour order, normalisation. OpenCV computes with fixed-point weights in 8 bit,
we in float32 and round at the end: values differ by a level or two of 255.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ip_adapter import face_models, faces
from ip_adapter.face_models import FaceModel
from tests.synthetic.face_models import Disc, build_pack, picture

pytestmark = [
    pytest.mark.parity,
    # scikit-image renamed what insightface calls
    pytest.mark.filterwarnings("ignore:.*estimate.*:FutureWarning"),
]

PICTURES = {
    "as it is": (640, 640, [Disc(200, 150, 25, 20, 0.9), Disc(450.5, 400.2, 36, -40, 1.0)]),
    "wide": (480, 900, [Disc(150, 200, 30, 5, 0.8), Disc(700, 250, 45, 170, 0.95)]),
    "tall": (1500, 1000, [Disc(400, 900, 80, -15), Disc(800, 300, 50, 30, 0.85)]),
    "small": (160, 200, [Disc(90, 80, 9, 12)]),
    "odd": (333, 517, [Disc(300, 170, 20, -8, 0.9)]),
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pack(tmp_path_factory.mktemp("packs") / "synthetic")


@pytest.fixture(scope="module")
def ours(pack: Path) -> FaceModel:
    return face_models.load(pack, "synthetic", "CPU")


@pytest.fixture(scope="module")
def theirs(pack: Path) -> Iterator[Any]:
    from insightface.app import FaceAnalysis

    analysis = FaceAnalysis(
        str(pack),
        allowed_modules=["detection", "recognition"],
        providers=["CPUExecutionProvider"],
    )
    analysis.prepare(ctx_id=-1, det_size=(640, 640))
    yield analysis


def bgr(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray((image.numpy() * 255).round().astype(np.uint8)[..., ::-1])


@pytest.mark.parametrize("name", PICTURES)
def test_detection_and_vectors_agree(ours: FaceModel, theirs: Any, name: str) -> None:
    height, width, discs = PICTURES[name]
    image = picture(height, width, discs)[0]
    expected = theirs.get(bgr(image))
    found = ours.detect(image)
    assert len(expected) == len(found) == len(discs)
    for i, face in enumerate(expected):
        pixel = max(height, width) / 640
        assert float((found.boxes[i] - torch.from_numpy(face.bbox)).abs().max()) < 0.01 * pixel
        assert float((found.landmarks[i] - torch.from_numpy(face.kps)).abs().max()) < 0.01 * pixel
        assert float(found.scores[i]) == pytest.approx(float(face.det_score), abs=2 / 255)
        read = ours.read([image], [found.landmarks[i]])
        cosine = float((read.normed()[0].numpy() * face.normed_embedding).sum())
        assert cosine > 0.99999
        length = float(read.embeddings[0].norm())
        assert length == pytest.approx(float(np.linalg.norm(face.embedding)), rel=5e-4)


@pytest.mark.parametrize("size", [112, 128, 224, 256, 336])
@pytest.mark.parametrize("tilt", [0, 33, -75, 180])
def test_crops_agree(size: int, tilt: float) -> None:
    from insightface.utils import face_align

    disc = Disc(190.3, 170.8, 90, tilt)
    smooth = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(smooth, size=(320, 400), mode="bicubic").clamp(0, 1)
    image = (image[0].movedim(0, -1) * 255).round() / 255
    expected = face_align.norm_crop(bgr(image), disc.landmarks().numpy(), size)[..., ::-1]
    crop = faces.align(image, disc.landmarks(), size).numpy() * 255
    difference = np.abs(crop - expected.astype(np.float32))
    assert difference.max() <= 2 and difference.mean() < 0.05  # levels of 255


@pytest.mark.parametrize("shape", [(480, 640), (1500, 1000), (100, 90), (333, 517)])
@pytest.mark.parametrize("size", [640, 320])
def test_letterbox_agrees(shape: tuple[int, int], size: int) -> None:
    """The resize of OpenCV's INTER_LINEAR, which does not smooth when it makes smaller."""
    import cv2

    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    square, scale = face_models._letterbox(torch.from_numpy(image).float() / 255, size)
    ratio = shape[0] / shape[1]
    new = (int(size / ratio), size) if ratio > 1 else (size, int(size * ratio))
    resized = cv2.resize(image, new).astype(np.float32)
    difference = np.abs(square.movedim(0, -1).numpy()[: new[1], : new[0]] * 255 - resized)
    assert difference.max() < 1.01 and difference.mean() < 0.15  # of noise, the worst case
    assert float(square[:, new[1] :].sum()) == float(square[:, :, new[0] :].sum()) == 0
    assert scale == new[1] / shape[0]


def test_similarity_is_umeyamas() -> None:
    from skimage.transform import SimilarityTransform

    points = torch.rand(5, 2, generator=torch.Generator().manual_seed(1)) * 500
    target = torch.rand(5, 2, generator=torch.Generator().manual_seed(2)) * 100
    expected = SimilarityTransform.from_estimate(
        points.double().numpy(), target.double().numpy()
    ).params
    turn, shift = faces.similarity(points, target)
    found = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
    assert np.abs(found - expected[:2]).max() < 1e-9 * np.abs(expected).max()
