"""One training, put together: what is read of the rows, the frozen base, the adapter, the batches.

The command line and the node both come through here, with models that the host has loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checkpoint, lora
from ..adapter import IPAdapter
from ..errors import IncompatibleModelError
from ..host.standalone import Models
from ..objective import Batch, Nothing
from ..spec import AdapterSpec
from . import cache, loop, state
from .cache import Cache, Options
from .data import Progress, Row
from .order import Position
from .recipe import Recipe, feature_width, projection_of

FACE_WIDTH = 512
"""Width of the face vectors of every published FaceID adapter."""

PIXELS = {"SD 1.5": 512, "SD 2.x": 512, "SDXL": 1024, "Kolors": 1024, "Miniature": 64}
"""Side of the pictures that each family is trained with."""

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Of the frozen base, by the names of `Recipe.mixed_precision`."""


@dataclass(frozen=True, eq=False)
class Session:
    """A training that can begin.

    Attributes:
        recipe: What to do.
        models: Of the host.
        rows: That are trained on.
        held_out: That are not.
        cache: Features of `rows`.
        held_cache: Features of `held_out`, or None where there are none.
        base: `host.training.TrainableModel`.
        adapter: What is trained.
        lora: Of a FaceID adapter to start from; it is on the base.
        size: Side of the pictures in pixels.
    """

    recipe: Recipe
    models: Models
    rows: tuple[Row, ...]
    held_out: tuple[Row, ...]
    cache: Cache
    held_cache: Cache | None
    base: Any
    adapter: IPAdapter
    lora: Mapping[str, Tensor]
    size: int

    @property
    def nothing(self) -> Nothing:
        """What stands for a withheld condition."""
        return Nothing(self.cache.no_text, self.cache.no_pooled, self.cache.no_image)

    def source(self, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """Endless batches; see `loop.Source`."""
        position = Position(*divmod(start, len(self.cache)))
        found = cache.batches(self.cache, batch, self.recipe.seed, position, rank=rank, world=world)
        return (self.ready(rows) for rows in found)

    def ready(self, rows: Mapping[str, Tensor]) -> Batch:
        """Rows of a cache in float32, their latents as the UNet sees them."""
        inner = self.models.model.model
        plain = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in rows.items()
        }
        return plain | {"latents": inner.process_latent_in(plain["latents"])}

    def train(self, out: Path, **how: Any) -> loop.Result:
        """Run it; `how` goes to `loop.train`."""
        from ..host.training import training_mode

        with training_mode():
            return loop.train(
                self.recipe,
                self.base,
                self.adapter,
                self.source,
                self.nothing,
                out,
                lora=self.lora,
                **how,
            )


def starting_spec(recipe: Recipe) -> AdapterSpec | None:
    """The adapter that a recipe starts from, without its weights; None where it starts anew.

    Raises:
        CheckpointError: See `checkpoint.read`.
        IncompatibleModelError: It has another projection than the recipe names.
    """
    if recipe.start_from is None:
        return None
    path = recipe.start_from
    found = _spec(path, path.stat().st_mtime_ns if path.exists() else 0)
    layout = found.projection.layout
    if layout != recipe.projection and layout in ("global", "plus", "full", "faceid"):
        raise IncompatibleModelError(
            f"The recipe asks for a {recipe.projection} projection, but starts from "
            f"{recipe.start_from.name} ({found.summary()}). Give the same projection, or start "
            "from another file."
        )
    return found


@lru_cache(maxsize=1)
def _spec(path: Path, changed: int) -> AdapterSpec:
    """What a file holds; it is asked several times, and old containers are read whole for it."""
    return checkpoint.read(path).spec


def needs_face(recipe: Recipe) -> bool:
    """Whether every row must have a face vector."""
    spec = starting_spec(recipe)
    return recipe.projection == "faceid" if spec is None else spec.projection.face is not None


def needs_encoder(recipe: Recipe) -> bool:
    """Whether an image encoder is needed."""
    spec = starting_spec(recipe)
    return recipe.projection != "faceid" if spec is None else spec.projection.image is not None


def spec_for(recipe: Recipe, models: Models) -> AdapterSpec:
    """Which adapter a recipe makes for these models.

    Raises:
        RecipeError: The recipe names sizes that its projection does not have.
        IncompatibleModelError: The encoder is missing, or not the one of the adapter to start
            from; or no adapters are made for the model.
    """
    from ..host import training, unet, vision

    start = starting_spec(recipe)
    encoder = None
    if needs_encoder(recipe):
        encoder = vision.recognise(models.clip_vision)
        if encoder is None:
            found = "missing" if models.clip_vision is None else vision.describe(models.clip_vision)
            raise IncompatibleModelError(
                f"The image encoder is {found}; a {recipe.projection} projection reads the "
                "features of a CLIP image encoder. Give one, such as OpenCLIP ViT-H/14."
            )
    if start is not None:
        projection, kind = start.projection, start.projection.image
        width = None if encoder is None or kind is None else encoder.feature_width(kind)
        if kind is not None and encoder is not None and width != projection.features:
            raise IncompatibleModelError(
                f"The adapter to start from reads {start.encoder_name}, and the image encoder is "
                f"{encoder.name}. Give the encoder that the adapter was trained with."
            )
        unet.match(start, models.model, "The adapter to start from")
        return start
    layers = unet.cross_attention_layers(models.model)
    context = max((layer.context_width for layer in layers), default=0)
    if encoder is None:
        return training.family_spec(
            models.model, projection_of(recipe, context, features=FACE_WIDTH)
        )
    side = int(models.clip_vision.image_size) // encoder.patch  # type: ignore[union-attr]
    projection = projection_of(
        recipe, context, features=feature_width(recipe, encoder), patches=side * side + 1
    )
    return training.family_spec(models.model, projection, encoder)


def split(rows: Sequence[Row], held: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out some rows; rows that share a target or a reference stay together.

    Args:
        rows: All of them.
        held: At least so many are held out, unless nothing would be left.
        seed: Decides which.

    Returns:
        What is trained on, and what is held out, each in the order given.
    """
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[object, int] = {}
    for i, row in enumerate(rows):
        for piece in (row.image, row.reference or row.image):
            parent[root(i)] = root(first.setdefault(piece, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(root(i), []).append(i)
    unique = list(groups.values())
    random.Random(seed).shuffle(unique)
    chosen: set[int] = set()
    for group in unique:
        if len(chosen) >= held:
            break
        if len(chosen) + len(group) < len(rows):
            chosen.update(group)
    kept = [row for i, row in enumerate(rows) if i not in chosen]
    return kept, [row for i, row in enumerate(rows) if i in chosen]


def prepare(
    recipe: Recipe,
    models: Models,
    rows: Sequence[Row],
    folder: Path,
    *,
    size: int | None = None,
    fit: Literal["crop", "pad"] = "crop",
    mirror: bool = False,
    held: int = 0,
    progress: Progress | None = None,
    before_copy: Callable[[], object] | None = None,
) -> Session:
    """Encode what is not cached yet, copy the base, and make or read the adapter.

    Args:
        recipe: What to do.
        models: Of the host.
        rows: As `data.check` returns them.
        folder: The cache.
        size: Side of the pictures in pixels; the family's own unless given.
        fit: How a reference becomes square.
        mirror: Whether each row is there a second time, mirrored.
        held: How many rows to hold out for validation; fewer than 2 are none.
        progress: Called while features are computed.
        before_copy: Called when the encoders have done their work, and their memory may be freed.

    Raises:
        IPAdapterError: See `spec_for`, `cache.fill` and `host.training.TrainableModel`.
    """
    from ..host import face_lora, training

    spec = spec_for(recipe, models)
    side = size or PIXELS[spec.family.name]
    kept, held_out = split(rows, held, recipe.seed) if held >= 2 else (list(rows), [])
    if len(held_out) < 2:
        kept, held_out = list(rows), []
    encoders = cache.Encoders(models.vae, models.clip, models.clip_vision)
    projection = spec.projection
    options = Options(side, projection.image, projection.face, fit, mirror=mirror)
    trained = cache.fill(folder, kept, encoders, options, progress)
    plain = Options(side, projection.image, projection.face, fit)
    held_cache = cache.fill(folder, held_out, encoders, plain, progress) if held_out else None
    if before_copy is not None:
        before_copy()
    inside: Mapping[str, Tensor] = {}
    model = models.model
    if recipe.start_from is not None:
        begun = state.start_from(recipe.start_from)
        adapter, inside = begun.adapter, begun.lora
        if inside:
            known = lora.to_kohya(inside, spec.family)
            model, _ = face_lora.apply(model, known, 1.0, f"The LoRA in {recipe.start_from.name}")
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            adapter = training.new_adapter(spec, model)
    base = training.TrainableModel(
        model,
        dtype=DTYPES[recipe.mixed_precision],
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    return Session(
        recipe,
        Models(model, models.clip, models.vae, models.clip_vision),
        tuple(kept),
        tuple(held_out),
        trained,
        held_cache,
        base,
        adapter,
        inside,
        side,
    )
