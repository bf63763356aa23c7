"""Pieces of training data: where bytes lie on disk, and the pictures and face vectors in them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import IPAdapterError

VECTORS = (".npy", ".safetensors", ".pt", ".ipadpt")
"""Endings of the files that hold a face vector."""


class DataError(IPAdapterError):
    """Training data that cannot be used as given."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes on disk: a file, or one member of a tar shard.

    Attributes:
        path: The file.
        member: Name within the shard; empty for a whole file.
        offset: Where it begins, in bytes.
        length: How many bytes; None for all.
    """

    path: Path
    member: str = ""
    offset: int = 0
    length: int | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    @property
    def suffix(self) -> str:
        """Ending of its name, in lower case."""
        return Path(self.member or self.path).suffix.lower()

    def read(self) -> bytes:
        """Read it.

        Raises:
            OSError: It is not there, is a folder, or is shorter than the shard says.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            found = file.read() if self.length is None else file.read(self.length)
        if self.length is not None and len(found) < self.length:
            raise OSError(f"the shard ends after {len(found)} of its {self.length} bytes")
        return found


def load_picture(piece: Piece) -> Tensor:
    """Decode a picture: upright, its first frame, in eight bit.

    Returns:
        ``[1, H, W, C]`` in 0..1, C 3 or, with transparency, 4.

    Raises:
        DataError: It cannot be read or decoded; the message does not name the row.
    """
    content = _content(piece)
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bit grey, which Pillow's conversion would clip
                deep = np.asarray(picture).astype(np.float64) / 257
                picture = Image.fromarray(deep.clip(0, 255).round().astype(np.uint8))
            transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
            pixels = np.array(picture.convert("RGBA" if transparent else "RGB"))
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise DataError(
            f"'{piece}' cannot be decoded as a picture ({type(error).__name__}: {error})"
        ) from error
    return torch.from_numpy(pixels)[None].float() / 255


def load_vector(piece: Piece) -> Tensor:
    """Read a face vector: .npy, .safetensors with one tensor, or a tensor that torch.save wrote.

    Returns:
        ``[E]``, float32, as it was saved.

    Raises:
        DataError: It cannot be read, is no single vector, is all zero or not finite; the message
            does not name the row.
    """
    content = _content(piece)
    try:
        if piece.suffix == ".npy":
            found = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
        elif piece.suffix == ".safetensors":
            (found,) = safetensors.torch.load(content).values()
        else:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        vector = found.detach().float().flatten()
    except Exception as error:  # three readers, each with its own errors
        raise DataError(
            f"'{piece}' cannot be read as a face vector ({type(error).__name__}: {error}); needed "
            f"is one tensor in {', '.join(VECTORS)}"
        ) from error
    if found.shape[-1:] != vector.shape or not bool(vector.isfinite().all() & vector.any()):
        raise DataError(
            f"'{piece}' holds numbers of shape {list(found.shape)}; needed is one face vector such "
            "as [512], finite and not all zero"
        )
    return vector


def _content(piece: Piece) -> bytes:
    """A piece's bytes, or what is wrong with them."""
    try:
        if piece.path.is_dir():
            raise DataError(f"'{piece}' is a folder; needed is a file")
        content = piece.read()
    except FileNotFoundError as error:
        raise DataError(f"'{piece}' does not exist") from error
    except OSError as error:
        raise DataError(f"'{piece}' cannot be read ({error})") from error
    if not content:
        raise DataError(f"'{piece}' is empty (0 bytes)")
    return content
