"""Faces: what a face recogniser says of a person, and the aligned crop an image encoder sees.

Not for finding faces (`face_models` does). Alignment follows insightface's ``norm_crop``: a
similarity transform takes five landmarks to the template that ArcFace was trained with, so that
every face looks straight ahead at the same place of the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import images
from .errors import ImageError, IncompatibleModelError

WIDTH = 512
"""Numbers in a face vector of every recogniser that published FaceID adapters were trained with."""

FROM_TENSOR = "from a tensor"
"""Label of vectors that we did not compute."""

TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
"""Eyes, nose and mouth corners (x, y) in ArcFace's 112-pixel crop; left is the picture's left."""

By = Literal["largest", "left to right", "right to left", "top to bottom", "centre", "confidence"]
"""Orders of the faces in a picture. ``centre``: nearest to the picture's centre first."""


@dataclass(frozen=True)
class Pick:
    """Which face of a picture is meant.

    Attributes:
        by: How its faces are put in order.
        index: Place in that order, from 0.
    """

    by: By = "largest"
    index: int = 0

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ImageError(
                f"Unknown order of faces {self.by!r}; needed is one of {', '.join(get_args(By))}."
            )
        if self.index < 0:
            raise ImageError(f"Face number {self.index} does not exist; the first one is 0.")

    def order(self, boxes: Tensor, scores: Tensor, height: int, width: int) -> list[int]:
        """Put faces in order; equal ones keep the order they came in.

        Args:
            boxes: ``[F, 4]``, left, top, right, bottom in pixels.
            scores: ``[F]``, the detector's confidence, 0..1.
            height: Of the picture, in pixels.
            width: Of the picture, in pixels.

        Returns:
            The numbers of all F faces, the first one first.
        """
        left, top, right, bottom = boxes.unbind(-1)
        x, y = (left + right) / 2, (top + bottom) / 2
        match self.by:
            case "largest":
                key = -(right - left) * (bottom - top)
            case "left to right":
                key = x
            case "right to left":
                key = -x
            case "top to bottom":
                key = y
            case "centre":
                key = (x - width / 2) ** 2 + (y - height / 2) ** 2
            case "confidence":
                key = -scores
        return [int(i) for i in key.argsort(stable=True)]


@dataclass(frozen=True, eq=False)
class Faces:
    """N faces, one per reference; what travels on a FACE socket.

    Attributes:
        embeddings: ``[N, 512]``, float32, as the recogniser gave them (not normalised).
        images: For each face the picture it was found in, ``[H, W, 3]`` in 0..1, or a ready crop.
            Empty where only vectors were given.
        landmarks: ``[N, 5, 2]``, (x, y) in pixels of the picture; None where all `images` are
            ready crops. A row of NaN says so of one face.
        label: Which recogniser made the vectors, for messages.
    """

    embeddings: Tensor
    images: tuple[Tensor, ...]
    landmarks: Tensor | None
    label: str

    def __len__(self) -> int:
        return len(self.embeddings)

    def normed(self) -> Tensor:
        """The vectors at length 1: ``[N, 512]``, float32.

        Raises:
            ImageError: A vector is zero or not finite, hence has no direction.
        """
        lengths: Tensor = torch.linalg.vector_norm(self.embeddings, dim=-1, keepdim=True)
        bad = (~torch.isfinite(lengths) | (lengths == 0)).flatten().nonzero().flatten()
        if len(bad):
            raise ImageError(
                f"The vector of face {int(bad[0]) + 1} of {len(self)} ({self.label}) has length "
                f"{float(lengths[bad[0]])}; needed is a finite length above 0. Use another picture "
                "of the face, or check where the vector comes from."
            )
        return self.embeddings / lengths

    def crops(self, size: int) -> Tensor:
        """Aligned crops for an image encoder; ready crops are only made square and resized.

        Args:
            size: Of the crop in pixels, a multiple of 112, or of 128 for a slightly wider view.

        Returns:
            ``[N, size, size, 3]`` in 0..1, in steps of 1/255.

        Raises:
            ImageError: There is no picture of some face, or the size is not possible.
        """
        if not self.images:
            raise ImageError(
                f"There is no picture of the face ({self.label}), only its vector; this adapter "
                "also looks at the face. Connect a crop to Face From Tensor, for every face that "
                "is joined, or use Detect Face."
            )
        _template(size)
        crops = []
        for i, image in enumerate(self.images):
            if self.landmarks is not None and bool(torch.isfinite(self.landmarks[i]).all()):
                crops.append(align(image, self.landmarks[i], size))
            else:
                crops.append(images.squares(image[None], size, "crop")[0].movedim(0, -1))
        return torch.stack(crops)


def from_tensor(embedding: Tensor, images: Tensor | None = None) -> Faces:
    """Faces of vectors that another program computed; any detector and recogniser serves.

    Args:
        embedding: ``[512]``, ``[N, 512]`` or ``[N, 1, 512]``, of the recogniser that the adapter
            was trained with, not normalised where the adapter wants raw vectors.
        images: ``[N, H, W, C]`` in 0..1, a crop of each face, or None.

    Raises:
        IncompatibleModelError: The vectors have another width or rank.
        ImageError: The vectors or crops are not finite, or there are not as many crops as vectors.
    """
    if not isinstance(embedding, Tensor):
        raise IncompatibleModelError(
            f"The face vector is a {type(embedding).__name__}; needed is a tensor of shape "
            f"[{WIDTH}] or [faces, {WIDTH}]."
        )
    vectors = embedding.detach().float().cpu()
    if vectors.ndim == 3 and vectors.shape[1] == 1:
        vectors = vectors[:, 0]
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or vectors.shape[-1] != WIDTH or not len(vectors):
        raise IncompatibleModelError(
            f"The face vector has shape {tuple(embedding.shape)}; needed is [{WIDTH}] or [faces, "
            f"{WIDTH}], the output of an ArcFace recogniser. Features of an image encoder "
            "(CLIP Vision) are something else."
        )
    pictures: tuple[Tensor, ...] = ()
    if images is not None:
        pictures = rgb(images)
        if len(pictures) != len(vectors):
            raise ImageError(
                f"There are {len(vectors)} face vectors and {len(pictures)} crops; needed is one "
                "crop for each vector."
            )
    faces = Faces(vectors, pictures, None, FROM_TENSOR)
    faces.normed()
    return faces


def join(many: Sequence[Faces]) -> Faces:
    """Put several faces together; where one of them has no picture, the pictures are left out.

    Raises:
        ImageError: The sequence is empty.
        IncompatibleModelError: The vectors are of different recognisers.
    """
    if not many:
        raise ImageError("There are no faces to join; connect at least one FACE.")
    labels = sorted({one.label for one in many} - {FROM_TENSOR})
    if len(labels) > 1:
        raise IncompatibleModelError(
            f"These faces were read with different models ({', '.join(labels)}), whose vectors "
            "mean different things. Detect all of them with the one that the adapter needs."
        )
    has_pictures = all(one.images for one in many)
    landmarks = None
    if has_pictures and any(one.landmarks is not None for one in many):
        nowhere = torch.full((5, 2), torch.nan)
        landmarks = torch.cat(
            [nowhere.expand(len(f), -1, -1) if f.landmarks is None else f.landmarks for f in many]
        )
    return Faces(
        torch.cat([one.embeddings for one in many]),
        tuple(image for one in many for image in one.images) if has_pictures else (),
        landmarks,
        labels[0] if labels else FROM_TENSOR,
    )


def rgb(image: Tensor) -> tuple[Tensor, ...]:
    """``[B, H, W, 1|3|4]`` -> B pictures ``[H, W, 3]`` in 0..1, float32, on the CPU.

    Raises:
        ImageError: See `images.check`.
    """
    images.check(image)
    return tuple(images.flatten(image).clamp(0, 1).movedim(1, -1).cpu().unbind(0))


def align(image: Tensor, landmarks: Tensor, size: int) -> Tensor:
    """Cut out a face so that its landmarks lie on the template.

    Args:
        image: ``[H, W, 3]`` in 0..1.
        landmarks: ``[5, 2]``, (x, y) in pixels, in the order of `TEMPLATE`.
        size: Of the crop in pixels, a multiple of 112 or of 128.

    Returns:
        ``[size, size, 3]`` in 0..1, in steps of 1/255; black outside of the picture.

    Raises:
        ImageError: The size is not possible, or the landmarks coincide.
    """
    turn, shift = similarity(landmarks, _template(size))
    steps = torch.arange(size, dtype=torch.float64)
    place = (torch.complex(*torch.meshgrid(steps, steps, indexing="xy")) - shift) / turn
    height, width = image.shape[:2]
    # Relative to the outer edges of the picture, -1..1; a whole number is the middle of a pixel.
    grid = torch.stack(
        ((2 * place.real + 1) / width - 1, (2 * place.imag + 1) / height - 1), dim=-1
    )
    pixels = image.movedim(-1, 0)[None].float()  # [1, 3, H, W]
    crop = F.grid_sample(
        pixels, grid[None].to(pixels), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return crop[0].movedim(0, -1).clamp(0, 1).mul(255).round().div(255)


def similarity(source: Tensor, target: Tensor) -> tuple[complex, complex]:
    """The rotation, scale and shift that take points nearest to others, in least squares.

    As complex numbers (x + iy), it is the line ``target = turn * source + shift``. Its solution is
    Umeyama's (1991) for two dimensions without mirroring.

    Args:
        source: ``[K, 2]``, (x, y).
        target: ``[K, 2]``, (x, y).

    Returns:
        ``turn``, whose length is the scale and whose angle is the rotation, and ``shift``.

    Raises:
        ImageError: The points of one side coincide, or no rotation fits them.
    """
    a = torch.view_as_complex(source.double().cpu().contiguous())
    b = torch.view_as_complex(target.double().cpu().contiguous())
    a_mean, b_mean = a.mean(), b.mean()
    spread = ((a - a_mean).abs() ** 2).sum()
    turn = ((a - a_mean).conj() * (b - b_mean)).sum() / spread
    if not bool(turn.abs() > 1e-9):  # also when it is not a number
        raise ImageError(
            f"The landmarks of the face are {source.tolist()}, which is no face. Use another "
            "picture, or give a ready crop to Face From Tensor."
        )
    return complex(turn), complex(b_mean - turn * a_mean)


def _template(size: int) -> Tensor:
    """The template for a crop of this size, ``[5, 2]``; the 128-rule has room at both sides."""
    if size > 0 and size % 112 == 0:
        return torch.tensor(TEMPLATE, dtype=torch.float64) * (size / 112)
    if size > 0 and size % 128 == 0:
        side = torch.tensor((8.0, 0.0), dtype=torch.float64)
        return (torch.tensor(TEMPLATE, dtype=torch.float64) + side) * (size / 128)
    raise ImageError(
        f"A face crop of {size} pixels is not possible; needed is a multiple of 112 (112, 224, "
        "336) or of 128 (128, 256)."
    )
