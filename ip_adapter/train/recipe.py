"""The recipe of a training run: what is trained, how, and for how long.

Its defaults are the paper's, but for what a single GPU cannot do: a million steps on eight of them.
Source: arXiv 2308.06721, section 4.1.2.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..encoders import Encoder
from ..errors import IPAdapterError, MissingFileError
from ..objective import Drops
from ..spec import (
    FaceProjection,
    LinearProjection,
    PatchProjection,
    Projection,
    ResamplerProjection,
)

ProjectionKind = Literal["global", "plus", "full", "faceid"]

_ANY_TIME = {"steps", "save_every", "validate_every", "workers", "weights"}
"""Fields that do not change what the steps so far have done, and may differ when resuming."""

_WHOLE, _SOME = "a whole number of 0 or more", "a whole number of 1 or more"
_FRACTION = "a fraction from 0 to 1"

HEAD_WIDTH = 64
"""Width of one attention head in a resampler."""


class RecipeError(IPAdapterError):
    """A recipe that cannot be followed."""


class Recipe(BaseModel):
    """What a training run does; the description of a field says what values it may have.

    Raises:
        pydantic.ValidationError: When built directly with impossible values. `make` and `read`
            say the same as a `RecipeError`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    projection: ProjectionKind = Field("global", description="global, plus, full or faceid")
    design: Literal["decoupled", "simple"] = Field(
        "decoupled", description="decoupled, or simple for the paper's ablation"
    )
    start_from: Path | None = Field(
        None, description="an adapter's file, or nothing to begin with the text's keys and values"
    )
    tokens: int | None = Field(None, ge=1, description=_SOME)
    inner: int | None = Field(None, ge=1, description=_SOME)
    heads: int | None = Field(None, ge=1, description=_SOME)
    depth: int | None = Field(None, ge=1, description=_SOME)

    steps: int = Field(20_000, ge=1, description=_SOME)
    batch_size: int = Field(8, ge=1, description=_SOME)
    gradient_accumulation: int = Field(1, ge=1, description=_SOME)
    learning_rate: float = Field(1e-4, gt=0, lt=1, description="a number above 0 and below 1")
    weight_decay: float = Field(0.01, ge=0, lt=1, description="a number from 0 to below 1")
    drop_text: float = Field(0.05, ge=0, le=1, description=_FRACTION)
    drop_image: float = Field(0.05, ge=0, le=1, description=_FRACTION)
    drop_both: float = Field(0.05, ge=0, le=1, description=_FRACTION)
    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="no, fp16 or bf16")
    gradient_checkpointing: bool = Field(False, description="true or false")
    seed: int = Field(0, ge=0, lt=2**63, description=f"{_WHOLE} below 2^63")

    save_every: int = Field(1000, ge=1, description=_SOME)
    validate_every: int = Field(1000, ge=0, description=f"{_WHOLE}, 0 for never")
    workers: int = Field(0, ge=0, description=_WHOLE)
    weights: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="fp16, bf16 or fp32")

    @model_validator(mode="after")
    def _drops_fit(self) -> Recipe:
        total = self.drop_text + self.drop_image + self.drop_both
        if total > 1:
            raise ValueError(
                f"drop_text, drop_image and drop_both are together {total:g}, but each sample has "
                "one of these fates at most; needed is a sum of 1 or less"
            )
        return self

    @property
    def drops(self) -> Drops:
        """How often conditions are withheld."""
        return Drops(self.drop_text, self.drop_image, self.drop_both)

    def digest(self) -> str:
        """SHA-256 over all that decides what the weights become, but for the number of steps."""
        return hashlib.sha256(json.dumps(self.lasting(), sort_keys=True).encode()).hexdigest()

    def lasting(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the one before."""
        return self.model_dump(mode="json", exclude=_ANY_TIME)


def make(values: Mapping[str, Any], origin: str = "The recipe") -> Recipe:
    """Check values and make a recipe of them.

    Args:
        values: By field.
        origin: Where they come from, for messages.

    Raises:
        RecipeError: A field is unknown or has an impossible value; all of them are named.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        found = "; ".join(_say(dict(one)) for one in error.errors())
        raise RecipeError(f"{origin} cannot be followed: {found}.") from error


def read(path: Path) -> Recipe:
    """Read a recipe from YAML or JSON.

    Raises:
        MissingFileError: There is no such file.
        RecipeError: It is neither, is no table of fields, or see `make`.
    """
    if not path.is_file():
        raise MissingFileError(f"There is no recipe '{path}'. Give a YAML or JSON file of fields.")
    import yaml  # JSON is YAML, too

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"'{path.name}' is neither YAML nor JSON: {reason}. Correct it."
        ) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(
            f"'{path.name}' holds a {type(values).__name__}; needed are fields with values, such "
            "as 'steps: 20000'."
        )
    return make({str(key): value for key, value in values.items()}, f"'{path.name}'")


def differences(recipe: Recipe, before: Mapping[str, Any]) -> list[str]:
    """What keeps a run from being resumed with a recipe: each differing field, in words.

    Args:
        recipe: The one to go on with.
        before: `Recipe.lasting` of the run so far.
    """
    now = recipe.lasting()
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*now, *before})
        if now.get(name) != before.get(name)
    ]


def projection_of(
    recipe: Recipe, context_width: int, *, features: int, patches: int = 257
) -> Projection:
    """The projection that a recipe asks for, with the published sizes unless it names others.

    Args:
        recipe: Which kind, and its sizes.
        context_width: Width D of the base's text tokens.
        features: Width of the features that are read: pooled, of patches, or of a face.
        patches: Number P of patch features, for the full projection.

    Raises:
        RecipeError: A size is named that the projection does not have, or widths do not fit.
    """
    sizes = {name for name in ("tokens", "inner", "heads", "depth") if getattr(recipe, name)}
    allowed = {
        "global": {"tokens"},
        "plus": {"tokens", "inner", "heads", "depth"},
        "full": set(),
        "faceid": {"tokens", "inner"},
    }[recipe.projection]
    if sizes - allowed:
        raise RecipeError(
            f"The recipe gives {', '.join(sorted(sizes - allowed))}, which a {recipe.projection} "
            f"projection does not have; it has {', '.join(sorted(allowed)) or 'no sizes to choose'}"
            ". Leave the others out."
        )
    match recipe.projection:
        case "global":
            return LinearProjection(features, recipe.tokens or 4, context_width)
        case "plus":
            # 768 with 12 heads for SD 1.5, 1280 with 20 for SDXL; 64 each.
            inner = recipe.inner or min(context_width, 1280)
            heads = recipe.heads or max(1, inner // HEAD_WIDTH)
            return ResamplerProjection(
                features,
                recipe.tokens or 16,
                inner,
                heads,
                recipe.depth or 4,
                4 * inner,
                context_width,
            )
        case "full":
            return PatchProjection(features, context_width, patches)
        case "faceid":
            inner = recipe.inner or 2 * features
            return FaceProjection(features, inner, recipe.tokens or 4, context_width)
    raise TypeError(f"unsupported projection {recipe.projection!r}")


def feature_width(recipe: Recipe, encoder: Encoder) -> int:
    """Width of the features that a recipe's projection reads from an image encoder.

    Raises:
        RecipeError: The encoder has no such output.
    """
    width = encoder.feature_width("pooled" if recipe.projection == "global" else "hidden")
    if width is None:
        raise RecipeError(
            f"A global projection reads a projected embedding, which {encoder.name} does not have. "
            "Choose plus or full, or another encoder."
        )
    return width


def _say(error: dict[str, Any]) -> str:
    place = [str(part) for part in error["loc"]]
    if not place:
        return str(error["msg"]).removeprefix("Value error, ")
    name = place[0]
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Recipe.model_fields, 1)
        return f"it has no field '{name}'" + (f"; is '{near[0]}' meant?" if near else "")
    return f"'{name}' is {error['input']!r}; needed is {Recipe.model_fields[name].description}"
