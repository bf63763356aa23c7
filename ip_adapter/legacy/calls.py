"""The calls into the library that the old nodes share, in the words of their inputs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import presets
from ..attention import Scaling
from ..errors import IncompatibleModelError
from ..face_models import FaceModel
from ..faces import Pick
from ..host import adapters, encoding, faces, patching, reading
from ..host.adapters import LoadedAdapter
from ..influence import Influence
from ..layers import Family, transformers
from ..presets import LayerWeights
from ..projections import Features
from ..prompt import ImagePrompt
from ..references import Combine, Unconditional, combine

log = logging.getLogger(__name__)

BLACK: Unconditional = "black picture"
"""The old pack's "no image"; its plus adapters give other pictures with the one of training."""

_CROPS = {"SDXL": 256, "Kolors": 336}
"""Side of the aligned crop of a face, in pixels, where it is not 224."""

Weight = float | Sequence[float]
"""One for all pictures of a batch, or a list with one for each."""


@dataclass(frozen=True)
class Strength:
    """How strongly, where and when: the inputs that nearly all old apply nodes have.

    Attributes:
        weight: The paper's lambda.
        kind: A preset of `presets.PRESETS`.
        start_at: Fraction of the schedule.
        end_at: Fraction of the schedule.
        mask: ``[M, H, W]``, or None.
        scaling: See `attention.scale`.
        composition: See `presets.layer_weights`; None for 1, as the old nodes without an input for
            it had it.
        style_boost: See `presets.layer_weights`; None for `weight`.
        composition_boost: See `presets.layer_weights`; None for `weight`.
        layer_weights: ``"t:factor, t:factor"`` instead of the preset.
        by_frame: Whether a list of weights goes to the pictures of a batch; the first one counts
            otherwise.
    """

    weight: Weight = 1.0
    kind: str = "linear"
    start_at: float = 0.0
    end_at: float = 1.0
    mask: Tensor | None = None
    scaling: Scaling = "V only"
    composition: Weight | None = None
    style_boost: Weight | None = None
    composition_boost: Weight | None = None
    layer_weights: str = ""
    by_frame: bool = False

    def influences(self, family: Family) -> list[Influence]:
        """The same in our terms: one influence, or one for each amount that is a list of its own.

        Raises:
            InfluenceError: See `influence.Influence` and `presets.parse`.
        """
        composition = self.composition
        if composition is None and self.kind == "style and composition":
            composition = 1.0
        amounts = {
            "weight": self.weight,
            "composition": composition,
            "style_boost": self.style_boost,
            "composition_boost": self.composition_boost,
        }
        given: dict[str, Any] = {k: self._by_frame(v) for k, v in amounts.items() if v is not None}
        shared = Influence(
            layers=self._layers(family),
            start=_fraction(self.start_at),
            end=_fraction(self.end_at),
            mask=self.mask,
            scaling=self.scaling,
        )
        if not any(isinstance(value, tuple) for value in given.values()):
            return [replace(shared, **given)]
        none: dict[str, Any] = dict.fromkeys(given, 0.0)
        return [
            replace(shared, **{**none, name: 1.0}, frames=value)
            if isinstance(value, tuple)
            else replace(shared, **{**none, name: value})
            for name, value in given.items()
            if value != 0
        ]

    def _by_frame(self, weight: Weight) -> float | tuple[float, ...]:
        if not isinstance(weight, Sequence):
            return float(weight)
        return tuple(map(float, weight)) if self.by_frame else float(weight[0])

    def _layers(self, family: Family) -> str | LayerWeights:
        if not self.layer_weights.strip():
            return self.kind
        existing = _existing(self.layer_weights, family)
        plan = presets.parse(existing, family) if existing else LayerWeights({})
        opposed = presets.layer_weights(self.kind, family).opposed  # type: ignore[arg-type]
        return LayerWeights(plan.weights, opposed & plan.weights.keys())


def encoder_for(adapter: LoadedAdapter, clip_vision: Any) -> Any:
    """The image encoder that is connected, else the one that was loaded with the adapter.

    Raises:
        IncompatibleModelError: Neither is there, and the adapter needs one.
    """
    found = adapter.clip_vision if clip_vision is None else clip_vision
    if found is None and adapter.spec.projection.image is not None:
        raise IncompatibleModelError(
            f"{adapter.label} needs an image encoder, and clip_vision is not connected. Connect "
            f"Load CLIP Vision with {adapter.spec.encoder_name}, or use IPAdapter Unified Loader, "
            "which finds it; the node IPAdapter has no such socket, IPAdapter Advanced has."
        )
    return found


def face_model_for(adapter: LoadedAdapter, insightface: Any) -> FaceModel:
    """The face model that is connected, else the one that was loaded with the adapter.

    Raises:
        IncompatibleModelError: Neither is there, or it is another pack's.
    """
    found = adapter.face_model if insightface is None else insightface
    if found is None:
        raise IncompatibleModelError(
            f"{adapter.label} reads faces, and insightface is not connected. Connect IPAdapter "
            "InsightFace Loader, or use IPAdapter Unified Loader FaceID, which loads it."
        )
    return faces.require(found)


def encode(
    adapter: LoadedAdapter,
    clip_vision: Any,
    features: Tensor,
    *,
    negative: Tensor | None = None,
    how: Combine = "concat",
    by_frame: bool = False,
) -> ImagePrompt:
    """Features of N references -> an image prompt, with the old pack's "no image".

    Args:
        adapter: Whose projection.
        clip_vision: For "no image" of adapters that read hidden states.
        features: ``[N, E]`` or ``[N, P, W]``.
        negative: Features of what to lead away from; the first of them where several become one.
        how: How several references become one.
        by_frame: Whether the reference i is for the picture i of the batch.
    """
    if negative is None:
        negative = reading.no_image(adapter, clip_vision, features, BLACK)
    else:
        negative = to_count(negative, len(features))
    if not by_frame and len(features) > 1 and how != "concat":
        features, negative = combine(features, how), negative[:1]
    frames = len(features) if by_frame else 1
    return encoding.from_features(
        adapter, Features(image=features), Features(image=negative), frames
    )


def read(
    adapter: LoadedAdapter,
    image: Tensor,
    *,
    clip_vision: Any = None,
    insightface: Any = None,
    negative: Tensor | None = None,
    how: Combine = "concat",
    by_frame: bool = False,
    structure: float = 1.0,
) -> tuple[ImagePrompt, Tensor]:
    """References -> an image prompt, of what the adapter reads: the picture, or the face in it.

    Args:
        adapter: Any; old nodes for pictures work with a FaceID adapter, and the other way round.
        image: ``[N, H, W, C]`` in 0..1.
        clip_vision: What is connected, or None for the one that came with the adapter.
        insightface: Like `clip_vision`.
        negative: ``[M, H, W, C]``, what to lead away from. Faces have none but their structure.
        how: How several references become one.
        by_frame: Whether the reference i is for the picture i of the batch.
        structure: Weight of the structure of a face against its identity.

    Returns:
        The prompt and what was read: aligned crops of the faces, or the picture itself.

    Raises:
        IncompatibleModelError: An encoder or face model is missing, or not the right one.
        ImageError: See `reading.read` and `faces.detect`.
    """
    if by_frame:
        how = "concat"  # each of them stays by itself
    if adapter.spec.projection.face is None:
        vision = encoder_for(adapter, clip_vision)
        against = None if negative is None else reading.read(adapter, vision, negative, "crop")
        features = reading.read(adapter, vision, image, "crop")
        prompt = encode(adapter, vision, features, negative=against, how=how, by_frame=by_frame)
        return prompt, image
    model = face_model_for(adapter, insightface)
    vision = encoder_for(adapter, clip_vision)
    found = faces.detect(model, image, Pick("confidence"))
    if negative is not None and len(negative) > 1:
        negative = to_count(negative, len(image) if how == "concat" else 1)
    side = _CROPS.get(adapter.spec.family.name, 224)
    prompt = encoding.encode_faces(
        adapter,
        found,
        vision,
        structure,
        how=how,
        crop=side,
        negative=negative,
        frames=len(image) if by_frame else 1,
        unconditional=BLACK,
    )
    return prompt, found.crops(side)


def run(
    model: Any,
    ipadapter: Any,
    image: Tensor,
    strength: Strength,
    *,
    clip_vision: Any = None,
    insightface: Any = None,
    negative: Tensor | None = None,
    how: Combine = "concat",
    structure: float | None = None,
) -> tuple[Any, Tensor]:
    """Read references and patch a clone of a MODEL with them: what most old apply nodes do.

    Args:
        model: The MODEL.
        ipadapter: What came in on that socket.
        image: See `read`.
        strength: How strongly, where and when; also whether the references go by frame.
        clip_vision: See `read`.
        insightface: See `read`.
        negative: See `read`.
        how: See `read`.
        structure: See `read`; twice the weight where an old node had no input for it.

    Returns:
        The clone, and what was read.

    Raises:
        IPAdapterError: See `read` and `apply`.
    """
    adapter = adapters.require(ipadapter)
    if structure is None:
        weight = strength.weight
        structure = 2 * float(weight[0] if isinstance(weight, Sequence) else weight)
    prompt, seen = read(
        adapter,
        image,
        clip_vision=clip_vision,
        insightface=insightface,
        negative=negative,
        how=how,
        by_frame=strength.by_frame,
        structure=structure,
    )
    return apply(model, adapter, prompt, strength), seen


def apply(model: Any, ipadapter: Any, prompt: ImagePrompt, strength: Strength) -> Any:
    """Patch a clone of a MODEL as an old apply node says.

    Raises:
        IncompatibleModelError: See `patching.apply`.
        InfluenceError: See `patching.apply`.
    """
    adapter = adapters.require(ipadapter)
    if strength.start_at > strength.end_at:
        log.warning(
            "IP-Adapter: start_at %g is after end_at %g, so the image prompt never acts",
            *(strength.start_at, strength.end_at),
        )
        return model.clone()
    for influence in strength.influences(adapter.spec.family):
        model, _ = patching.apply(model, adapter, prompt, influence=influence)
    return model


def to_count(rows: Tensor, count: int) -> Tensor:
    """``[N, ...]`` -> ``[count, ...]``: the last row repeated, or the surplus cut."""
    if len(rows) >= count:
        return rows[:count]
    return torch.cat((rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])))


def _fraction(value: float) -> float:
    """A linked number may lie outside of the widget's range, where the schedule has no more."""
    return min(max(float(value), 0.0), 1.0)


def _existing(text: str, family: Family) -> str:
    """Leave out transformers that the family has not, as the old pack did without a word."""
    count = len(transformers(family))
    parts = [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]
    left_out = [part for part in parts if _is_elsewhere(part, count)]
    if left_out:
        log.warning(
            "IP-Adapter: layer_weights names %s, but %s has the transformers 0 to %d",
            *(", ".join(left_out), family.name, count - 1),
        )
    return ", ".join(part for part in parts if part not in left_out)


def _is_elsewhere(part: str, count: int) -> bool:
    number = part.split(":")[0].strip()
    return number.removeprefix("-").isdigit() and not 0 <= int(number) < count
