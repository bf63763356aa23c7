"""Finds faces in pictures and reads them: insightface's model packs, run by onnxruntime alone.

A pack is a folder with an SCRFD detector (faces and five landmarks each) and an ArcFace recogniser
(a vector of a face). onnxruntime is optional and imported when a pack is loaded. Numbers follow
insightface: github.com/deepinsight/insightface, python-package/insightface/model_zoo (MIT).

The code needs no insightface. Its pretrained packs are for non-commercial research only.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CheckpointError, ImageError, IncompatibleModelError, IPAdapterError
from .faces import WIDTH, Faces, Pick, align

log = logging.getLogger(__name__)

SIZES = tuple(range(640, 319, -64))
"""Sides in pixels at which a picture is searched until there is a face; large faces need small
ones, because the detector knows faces up to a certain number of pixels."""

SCORE = 0.5
"""Least confidence of a face."""

OVERLAP = 0.4
"""Two boxes that share more (intersection over union) are one face."""

STRIDES = (8, 16, 32)
ANCHORS = 2
"""Guesses at each position of the detector's grids."""

CROP = 112
"""Side in pixels of the crop that a recogniser reads."""

PROVIDERS = {
    "CUDA": ("CUDAExecutionProvider",),
    "ROCm": ("MIGraphXExecutionProvider", "ROCMExecutionProvider"),
    "CoreML": ("CoreMLExecutionProvider",),
    "DirectML": ("DmlExecutionProvider",),
    "OpenVINO": ("OpenVINOExecutionProvider",),
    "CPU": ("CPUExecutionProvider",),
}
"""Our word for each of onnxruntime's execution providers, in the order ``auto`` prefers them."""

AUTO = "auto"

WHERE = (
    "https://github.com/deepinsight/insightface/releases (buffalo_l.zip for most FaceID adapters, "
    "antelopev2.zip for InstantID and Kolors). These packs are for non-commercial research only."
)
"""Where the packs are, and under which terms."""

# Grids of unknown size stay on the CPU: CoreML may fail to build them.
_OPTIONS = {"CoreMLExecutionProvider": {"RequireStaticInputShapes": "1"}}
_LIKELY = ("det", "scrfd", "w600k", "glint")
_OUTPUT_WIDTHS = (1, 4, 10)


@dataclass(frozen=True, eq=False)
class Detection:
    """The F faces of one picture, the most confident first.

    Attributes:
        boxes: ``[F, 4]``, left, top, right, bottom in pixels.
        scores: ``[F]``, 0..1.
        landmarks: ``[F, 5, 2]``, (x, y) in pixels: eyes, nose, mouth corners.
        size: Side at which the picture was searched, in pixels.
    """

    boxes: Tensor
    scores: Tensor
    landmarks: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class FaceModel:
    """A detector and a recogniser; what travels on an INSIGHTFACE socket.

    Attributes:
        label: Name of the pack.
        detector: An onnxruntime session.
        recogniser: An onnxruntime session.
        files: The two files they were read from.
        provider: Where they run, a key of `PROVIDERS` or onnxruntime's own word.
    """

    label: str
    detector: Any
    recogniser: Any
    files: tuple[Path, Path]
    provider: str

    def sizes(self) -> tuple[int, ...]:
        """Sides at which this detector can search, in the order in which they are tried."""
        fixed = self.detector.get_inputs()[0].shape[2]
        return (fixed,) if isinstance(fixed, int) else SIZES

    def detect(self, image: Tensor) -> Detection:
        """Find the faces of a picture, ``[H, W, 3]`` in 0..1; there may be none."""
        sizes = self.sizes()
        found = detect_at(self.detector, image, sizes[0])
        for size in sizes[1:]:
            if len(found):
                break
            found = detect_at(self.detector, image, size)
        return found

    def embed(self, crops: Tensor) -> Tensor:
        """Read aligned faces: ``[N, 112, 112, 3]`` in 0..1 -> ``[N, 512]``, not normalised.

        Raises:
            ImageError: A vector has values that are not numbers.
        """
        name = self.recogniser.get_inputs()[0].name
        pixels = (crops.movedim(-1, 1) * 255 - 127.5) / 127.5
        # One by one: exported recognisers do not all accept a batch.
        rows = [
            torch.from_numpy(self.recogniser.run(None, {name: row[None].numpy()})[0]).reshape(WIDTH)
            for row in pixels.contiguous()
        ]
        vectors = torch.stack(rows).float()
        if not bool(torch.isfinite(vectors).all()):
            raise ImageError(
                f"The face recogniser {self.files[1].name} returned values that are not numbers, "
                f"on {self.provider}. Choose the provider CPU in Load Face Model."
            )
        return vectors

    def find(self, image: Tensor, pick: Pick, name: str) -> tuple[Tensor, int]:
        """Find one face of a picture.

        Args:
            image: ``[H, W, 3]`` in 0..1.
            pick: Which one.
            name: What to call the picture in messages.

        Returns:
            Its landmarks, ``[5, 2]``, and how many faces there are.

        Raises:
            ImageError: There is no face, or there are fewer than the pick needs.
        """
        height, width = image.shape[:2]
        found = self.detect(image)
        if not len(found):
            tried = ", ".join(str(size) for size in self.sizes())
            raise ImageError(
                f"No face in {name} ({width} x {height} pixels), searched with {self.label} at "
                f"{tried} pixels. Needed is a face whose eyes and mouth are visible: use another "
                "picture, crop nearer to a small face, or leave room around a very large one "
                "(Pad Image for Outpainting)."
            )
        order = pick.order(found.boxes, found.scores, height, width)
        if pick.index >= len(order):
            count = "1 face" if len(order) == 1 else f"{len(order)} faces"
            raise ImageError(
                f"There is no face number {pick.index} in {name}: {count} found, numbered from 0 "
                f"({pick.by}). Choose an index of at most {len(order) - 1}."
            )
        return found.landmarks[order[pick.index]], len(order)

    def read(self, images: Sequence[Tensor], landmarks: Sequence[Tensor]) -> Faces:
        """Read one face of each picture.

        Args:
            images: For each face its picture, ``[H, W, 3]`` in 0..1.
            landmarks: For each face its landmarks, ``[5, 2]``; see `find`.
        """
        pairs = zip(images, landmarks, strict=True)
        crops = torch.stack([align(image, points, CROP) for image, points in pairs])
        return Faces(self.embed(crops), tuple(images), torch.stack(list(landmarks)), self.label)


def load(folder: Path, label: str, provider: str = AUTO) -> FaceModel:
    """Load the detector and the recogniser of a pack, told apart by their inputs and outputs.

    Args:
        folder: Holds the pack's .onnx files.
        label: What to call the pack in messages.
        provider: A key of `PROVIDERS`, or ``auto`` for the first that works.

    Raises:
        IPAdapterError: onnxruntime is not installed.
        CheckpointError: A file cannot be read, or the pack lacks one of the two models.
        IncompatibleModelError: The provider is not there.
    """
    runtime = _runtime()
    chosen = choose(provider, runtime.get_available_providers())
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only; the provider in use is logged below
    found: dict[str, tuple[Path, Any]] = {}
    remarks = []
    # Names only say where to look first: the other models of a pack are large.
    for path in sorted(files_of(folder), key=lambda p: not p.name.lower().startswith(_LIKELY)):
        try:
            session = _session(runtime, path, options, chosen)
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            remarks.append(f"{path.name} ({path.stat().st_size} bytes) cannot be read: {reason}")
            continue
        kind = _kind(session)
        if kind is None:
            remarks.append(f"{path.name} is something else")
        elif kind not in found:
            found[kind] = (path, session)
        if len(found) == len(_KINDS):
            break
    for kind, need in _KINDS.items():
        if kind not in found:
            raise CheckpointError(
                f"There is no face {kind} in {folder} ({'; '.join(remarks) or 'no other files'}). "
                f"Needed is {need}. Unpack all files of a pack there, from {WHERE}"
            )
    actual = _name(found["recogniser"][1].get_providers()[0])
    if provider not in (AUTO, actual):
        raise IncompatibleModelError(
            f"onnxruntime lists {provider} but could not start it, and used {actual} (its own log "
            "says why; often its libraries are of another version). Choose auto or "
            f"{actual} in Load Face Model, or install a matching onnxruntime."
        )
    files = (found["detector"][0], found["recogniser"][0])
    log.info("Face model %s on %s: %s, %s", label, actual, files[0].name, files[1].name)
    return FaceModel(label, found["detector"][1], found["recogniser"][1], files, actual)


def files_of(folder: Path) -> list[Path]:
    """The .onnx files of a folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() == ".onnx" and p.is_file())


def choose(asked: str, available: Sequence[str]) -> list[str]:
    """Providers to hand to onnxruntime, in its words, the preferred one first.

    Args:
        asked: A key of `PROVIDERS`, or ``auto``.
        available: What onnxruntime offers.

    Raises:
        IncompatibleModelError: It does not offer what was asked for.
    """
    cpu = PROVIDERS["CPU"][0]
    words = [asked] if asked != AUTO else list(PROVIDERS)
    for word in words:
        for provider in PROVIDERS.get(word, ()):
            if provider in available:
                return [provider] if provider == cpu else [provider, cpu]
    offered = ", ".join(_name(one) for one in available)
    raise IncompatibleModelError(
        f"This onnxruntime does not offer {asked}; it offers {offered}. Choose one of these or "
        "auto in Load Face Model, or install onnxruntime-gpu (CUDA), onnxruntime-directml or "
        "another build instead of onnxruntime."
    )


def detect_at(detector: Any, image: Tensor, size: int) -> Detection:
    """Search a picture at one size.

    The picture is scaled to fit a black square, at its top left, and every position of three grids
    of anchors says how sure it is of a face and where its box and landmarks are.

    Args:
        detector: An onnxruntime session of an SCRFD model.
        image: ``[H, W, 3]`` in 0..1.
        size: Side of the square in pixels, a multiple of 32.
    """
    square, scale = _letterbox(image, size)
    pixels = (square * 255 - 127.5) / 128
    outputs = detector.run(None, {detector.get_inputs()[0].name: pixels[None].numpy()})
    grids = len(STRIDES)
    scores, boxes, landmarks = [], [], []
    for i, stride in enumerate(STRIDES):
        score, distance, offset = (
            torch.from_numpy(outputs[i + grids * k]).float().reshape(-1, width)
            for k, width in enumerate(_OUTPUT_WIDTHS)
        )
        steps = torch.arange(size // stride, dtype=torch.float32) * stride
        anchors = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
        anchors = anchors.reshape(-1, 1, 2).repeat(1, ANCHORS, 1).reshape(-1, 2)  # [A, (x, y)]
        sure = score[:, 0] >= SCORE
        at = anchors[sure]
        distance, offset = distance[sure] * stride, offset[sure] * stride
        scores.append(score[sure, 0])
        boxes.append(torch.cat((at - distance[:, :2], at + distance[:, 2:]), dim=-1))
        landmarks.append(at[:, None] + offset.reshape(-1, 5, 2))
    found = Detection(
        torch.cat(boxes) / scale, torch.cat(scores), torch.cat(landmarks) / scale, size
    )
    order = found.scores.argsort(descending=True, stable=True)
    keep = order[_distinct(found.boxes[order])]
    return Detection(found.boxes[keep], found.scores[keep], found.landmarks[keep], size)


def _letterbox(image: Tensor, size: int) -> tuple[Tensor, float]:
    """``[H, W, 3]`` -> ``[3, size, size]`` in steps of 1/255, and pixels of it per given pixel."""
    height, width = image.shape[:2]
    if height > width:
        new_height, new_width = size, max(1, int(size / (height / width)))
    else:
        new_height, new_width = max(1, int(size * (height / width))), size
    pixels = F.interpolate(
        image.movedim(-1, 0)[None].float(), size=(new_height, new_width), mode="bilinear"
    )[0]
    square = pixels.new_zeros(3, size, size)
    square[:, :new_height, :new_width] = pixels.clamp(0, 1).mul(255).round().div(255)
    return square, new_height / height


def _distinct(boxes: Tensor) -> Tensor:
    """Keep the first of boxes that overlap: ``[F, 4]``, best first -> the numbers of those kept.

    Areas count both edge pixels, as insightface's do; it matters for small faces.
    """
    left, top, right, bottom = boxes.unbind(-1)
    area = (right - left + 1) * (bottom - top + 1)
    remaining = torch.arange(len(boxes))
    kept: list[int] = []
    while len(remaining):
        first, rest = remaining[0], remaining[1:]
        kept.append(int(first))
        width = torch.minimum(right[first], right[rest]) - torch.maximum(left[first], left[rest])
        height = torch.minimum(bottom[first], bottom[rest]) - torch.maximum(top[first], top[rest])
        shared = (width + 1).clamp(min=0) * (height + 1).clamp(min=0)
        remaining = rest[shared / (area[first] + area[rest] - shared) <= OVERLAP]
    return torch.tensor(kept, dtype=torch.long)


def _is_detector(inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
    """Nine outputs: scores, boxes and landmarks of three grids; a square or free input."""
    expected = [width for width in _OUTPUT_WIDTHS for _ in STRIDES]
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or len(outputs) != len(expected):
        return False
    height, width = (n if isinstance(n, int) else None for n in inputs[0].shape[2:])
    widths = [one.shape[-1] if isinstance(one.shape[-1], int) else None for one in outputs]
    return height == width and all(
        found in (None, needed) for found, needed in zip(widths, expected, strict=True)
    )


def _is_recogniser(inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
    """One face crop in, one vector out."""
    return (
        len(inputs) == 1
        and len(outputs) == 1
        and list(inputs[0].shape[1:]) == [3, CROP, CROP]
        and len(outputs[0].shape) == 2
        and outputs[0].shape[1] == WIDTH
    )


_KINDS = {
    "detector": "an SCRFD model with nine outputs (scores, boxes, landmarks at strides 8, 16, 32)",
    "recogniser": f"an ArcFace model from [*, 3, {CROP}, {CROP}] to [*, {WIDTH}]",
}
_TESTS: dict[str, Callable[[Sequence[Any], Sequence[Any]], bool]] = {
    "detector": _is_detector,
    "recogniser": _is_recogniser,
}


def _kind(session: Any) -> str | None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    return next((kind for kind, matches in _TESTS.items() if matches(inputs, outputs)), None)


def _name(provider: str) -> str:
    """Our word for one of onnxruntime's providers, or its own without the ending."""
    for name, providers in PROVIDERS.items():
        if provider in providers:
            return name
    return provider.removesuffix("ExecutionProvider")


def _runtime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise IPAdapterError(
            f"Face models need onnxruntime, which cannot be imported ({error}). Install it with\n"
            f'    "{sys.executable}" -m pip install onnxruntime\n'
            "(onnxruntime-gpu instead for NVIDIA), and start ComfyUI again. Other adapters work "
            "without it, and Face From Tensor takes a vector from elsewhere."
        ) from error


def _session(runtime: Any, path: Path, options: Any, providers: list[str]) -> Any:
    with_options = [(provider, _OPTIONS.get(provider, {})) for provider in providers]
    return runtime.InferenceSession(str(path), options, providers=with_options)
