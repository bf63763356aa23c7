"""Features of the frozen encoders, computed once, kept on disk, read as batches.

What never changes in training is not computed twice: latents of the target, states of the text,
features of the reference. Each is kept under the digest of what it was made from, in a folder
named by the digest of how (encoder weights and options). So a changed picture or encoder is
encoded anew, and nothing else is; another run with other rows or another kind of adapter uses
again what fits. One row is encoded at a time, so its numbers do not depend on which others were
missing: an interrupted cache equals an uninterrupted one.

There is no random augmentation: the crop is the centre, as in the paper, and the latents are the
mode of the VAE's distribution, as the host's VAE Encode gives them. `Options.mirror` adds each row
once more, seen in a mirror.

A row takes, in float16: latents of 512 pixels 33 kB, text 118 kB (SD 1.5), pooled features 2 kB,
hidden features of ViT-H 658 kB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..encoders import FeatureKind
from ..errors import IncompatibleModelError
from ..spec import FaceKind
from . import features
from .data import Progress, Row
from .order import START, Position, order
from .parts import NOTHING, Part, complete
from .pieces import DataError, Piece
from .store import Digests, Store

VERSION = 1
"""Of how features are made; raised when the same inputs would give other numbers."""

_KEY = 32
"""Hexadecimal digits of a digest that make a key: 128 bits."""

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What to cache.

    Attributes:
        size: Side of the target in pixels: the short side is resized to it, the centre is kept.
        image: Which features of the reference the adapter reads; None for a face alone.
        face: Whether it reads face vectors, and of which kind.
        fit: How the reference becomes square.
        reference_size: Side of the square that the image encoder sees; its own unless given.
        mirror: Whether each row is there a second time, target and reference mirrored left to
            right. Captions that say "left" are wrong then; face vectors stay as they are.
        dtype: Of the numbers on disk.
    """

    size: int = 512
    image: FeatureKind | None = "pooled"
    face: FaceKind | None = None
    fit: Literal["crop", "pad"] = "crop"
    reference_size: int | None = None
    mirror: bool = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"


@dataclass(frozen=True, eq=False)
class Encoders:
    """The host's encoders of the base model and the adapter.

    Attributes:
        vae: The host's VAE.
        clip: The host's CLIP.
        clip_vision: The host's CLIP_VISION; not needed where no picture's features are.
    """

    vae: Any
    clip: Any
    clip_vision: Any | None = None


@dataclass(frozen=True, eq=False)
class Cache:
    """Features of all rows, read from disk when asked for.

    Row ``i`` of the table is row i here; with `Options.mirror`, row ``i + len(table)`` is its
    mirror image.

    Attributes:
        stores: By part (latents, text, image, face): where it is, and each row's key.
        no_text: States of the empty text ``[1, 77, D]``.
        no_pooled: Its pooled state ``[1, E]``, where the text encoder has one.
        no_image: Features of no picture, ``[1, E]`` zeros or ``[1, P, W]`` of the zero picture.
        no_face: A zero vector ``[1, E]``.
    """

    stores: Mapping[str, tuple[Store, tuple[str, ...]]]
    no_text: Tensor
    no_pooled: Tensor | None = None
    no_image: Tensor | None = None
    no_face: Tensor | None = None

    def __len__(self) -> int:
        """Number of rows, mirrored ones included."""
        return len(self.stores["latents"][1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what all rows were made from and how; equal only for equal data."""
        found = hashlib.sha256()
        for name, (store, keys) in sorted(self.stores.items()):
            found.update("\n".join((name, store.folder.name, *keys, "")).encode())
        return found.hexdigest()

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Read some rows.

        Args:
            rows: Their numbers; a row may come twice.

        Returns:
            ``latents`` ``[B, C, h, w]`` not yet scaled for the UNet (the host's
            ``process_latent_in``), ``size`` ``[B, 6]``, ``text`` ``[B, 77, D]``, where there is one
            ``pooled`` ``[B, E]``, and as the options say ``image`` ``[B, E]`` or ``[B, P, W]`` and
            ``face`` ``[B, E]``. In the dtype of the options, on the CPU. ``size`` is SDXL's size
            conditioning in its order, int32: height and width of the picture, top and left of the
            crop in the resized picture, height and width of the target.

        Raises:
            DataError: See `store.Store.get`.
        """
        names = {"latents": ("latents", "size"), "text": ("text",)}
        if self.no_pooled is not None:
            names["text"] = ("text", "pooled")
        found = {}
        with torch.inference_mode(False):
            for part, (store, keys) in self.stores.items():
                for name in names.get(part, (part,)):
                    found[name] = torch.stack([store.get(keys[row], name) for row in rows])
        return found


class Batches(Iterator[dict[str, Tensor]]):
    """Endless batches of one process; see `batches`.

    Attributes:
        cache: With the features of nothing: `Cache.no_text` and its like.
        position: After the last batch given; where to start to go on.
    """

    def __init__(
        self, cache: Cache, steps: Iterator[tuple[list[int], Position]], start: Position
    ) -> None:
        self.cache = cache
        self.position = start
        self._steps = steps

    def __next__(self) -> dict[str, Tensor]:
        """Read the next batch; see `Cache.read`."""
        rows, position = next(self._steps)
        found = self.cache.read(rows)
        self.position = position
        return found


def batches(
    cache: Cache,
    batch: int,
    seed: int,
    start: Position = START,
    *,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Endless batches in a seeded order that can be resumed; see `order.order`.

    Args:
        cache: What to read.
        batch: Rows per step and process.
        seed: Decides the order.
        start: `Batches.position` of the run to go on with.
        rank: Which process this is.
        world: How many there are.

    Raises:
        DataError: See `order.order`, when the first batch is asked for.
    """
    steps = order(len(cache), batch, seed, start, rank=rank, world=world)
    return Batches(cache, steps, start)


def fill(
    folder: Path,
    rows: Sequence[Row],
    encoders: Encoders,
    options: Options = Options(),
    progress: Progress | None = None,
    workers: int = 2,
) -> Cache:
    """Encode what the cache does not hold yet, and open it.

    Stopped by an error, the stop button or Ctrl-C, it keeps what was done; killed, it loses the
    shard in the making. Of several processes, let one fill and the others call this after it.

    Args:
        folder: The cache; shared by all runs.
        rows: As `data.check` returns them.
        encoders: Of the base model and the adapter.
        options: What to cache.
        progress: Called after each encoding with how many of the missing ones are done.
        workers: Threads that read and decode pictures ahead.

    Raises:
        DataError: There are no rows, a file changed since the check, an encoder gives values that
            are not numbers, or the disk is full.
        IncompatibleModelError: An encoder is missing, or cannot read pictures of that size.
    """
    _check(rows, encoders, options)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, wanted)

    # The host runs nodes in inference mode, whose tensors, weights that are moved included, no
    # gradient could flow through.
    with torch.inference_mode(False), torch.no_grad():
        parts = _Plan(folder, rows, encoders, options).parts()
        wanted = sum(len(part.missing()) for part in parts.values())
        for part in parts.values():
            complete(part, count, workers)
        nothing = {
            name: part.store.get(NOTHING, name)[None].clone()
            for part in parts.values()
            if part.nothing is not None
            for name in part.store.parts(NOTHING)
        }
    return Cache(
        {name: (part.store, part.keys) for name, part in parts.items()},
        nothing["text"],
        nothing.get("pooled"),
        nothing.get("image"),
        nothing.get("face"),
    )


class _Plan:
    """What to make of which rows, in which folders."""

    def __init__(
        self, folder: Path, rows: Sequence[Row], encoders: Encoders, options: Options
    ) -> None:
        self.folder, self.encoders, self.options = folder, encoders, options
        self.digests = Digests(folder / "digests.jsonl")
        # Every row, then every row mirrored.
        self.rows = [*rows, *rows] if options.mirror else list(rows)
        self.mirrored = [row >= len(rows) for row in range(len(self.rows))]
        self.origins = [row.origin for row in self.rows]
        self.dtype = _DTYPES[options.dtype]

    def parts(self) -> dict[str, Part[Any]]:
        """By name; only what the options ask for."""
        found: dict[str, Part[Any]] = {"latents": self._latents(), "text": self._text()}
        if self.options.image is not None:
            found["image"] = self._image(self.options.image)
        if self.options.face is not None:
            found["face"] = self._face(self.options.face)
        return found

    def _latents(self) -> Part[tuple[Tensor, Tensor]]:
        vae, side = self.encoders.vae, self.options.size
        pieces = [row.image for row in self.rows]
        return Part(
            self._store("latents", encoder=features.identify(vae), size=side),
            self._picture_keys(pieces),
            lambda row: features.square(pieces[row], side, "crop", mirror=self.mirrored[row]),
            lambda seen: {"latents": features.latents(vae, seen[0]), "size": seen[1]},
            self.origins,
            self.dtype,
        )

    def _text(self) -> Part[str]:
        clip = self.encoders.clip
        return Part(
            self._store("text", encoder=features.identify(clip), context=features.CONTEXT),
            tuple(hashlib.sha256(row.text.encode()).hexdigest()[:_KEY] for row in self.rows),
            lambda row: self.rows[row].text,
            lambda words: features.text(clip, words),
            self.origins,
            self.dtype,
            lambda: features.text(clip, ""),
        )

    def _image(self, kind: FeatureKind) -> Part[tuple[Tensor, Tensor]]:
        vision, fit = self.encoders.clip_vision, self.options.fit
        side = self.options.reference_size or int(getattr(vision, "image_size", 0))
        pieces = [row.reference or row.image for row in self.rows]
        return Part(
            self._store("image", encoder=features.identify(vision), kind=kind, fit=fit, size=side),
            self._picture_keys(pieces),
            lambda row: features.square(pieces[row], side, fit, mirror=self.mirrored[row]),
            lambda seen: {"image": features.picture(vision, seen[0], kind)},
            self.origins,
            self.dtype,
            lambda: {"image": features.no_picture(vision, side, kind)},
        )

    def _face(self, kind: FaceKind) -> Part[Tensor]:
        pieces = [row.face for row in self.rows if row.face is not None]
        return Part(
            self._store("face", kind=kind),
            tuple(self._digest(piece, row) for row, piece in enumerate(pieces)),
            lambda row: features.face(pieces[row], kind),
            lambda vector: {"face": vector},
            self.origins,
            self.dtype,
            lambda: {"face": torch.zeros_like(features.face(pieces[0], kind))},
        )

    def _store(self, part: str, **recipe: object) -> Store:
        whole = {"part": part, "version": VERSION, "dtype": self.options.dtype, **recipe}
        name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
        return Store(self.folder / f"{part}-{name}", self.digests, whole)

    def _picture_keys(self, pieces: Sequence[Piece]) -> tuple[str, ...]:
        return tuple(
            self._digest(piece, row) + ("mirror" if self.mirrored[row] else "")
            for row, piece in enumerate(pieces)
        )

    def _digest(self, piece: Piece, row: int) -> str:
        try:
            return self.digests.of(piece)[:_KEY]
        except OSError as error:
            raise DataError(
                f"{self.origins[row]}: '{piece}' cannot be read ({error}). Did it change after the "
                "check? Start again."
            ) from error


def _check(rows: Sequence[Row], encoders: Encoders, options: Options) -> None:
    """Refuse before any work what cannot end well."""
    if not rows:
        raise DataError("There are no rows to cache. Needed is at least one.")
    if options.image is None and options.face is None:
        raise DataError(
            "Nothing of the reference is to be cached. Needed is `image`, `face` or both, as the "
            "adapter reads it."
        )
    if options.image is not None and encoders.clip_vision is None:
        raise IncompatibleModelError(
            f"The adapter reads {options.image} features of a picture, and there is no image "
            "encoder. Give a CLIP_VISION."
        )
    if options.face is not None:
        without = [row.origin for row in rows if row.face is None]
        if without:
            raise DataError(
                f"{len(without)} rows have no face vector, which the adapter reads (first: "
                f'{without[0]}). Add "face" to them.'
            )
    step = int(encoders.vae.spacial_compression_encode())
    if options.size < step or options.size % step:
        raise DataError(
            f"The size {options.size} is no multiple of {step}, the pixels per latent of this VAE. "
            f"Choose one such as {max(1, round(options.size / step)) * step}."
        )
