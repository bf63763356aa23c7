"""What ComfyUI_IPAdapter_plus computes, as plain formulas: one attn2 layer and its tokens.

The weights by transformer, the four scalings, the window, the masks, the references of a batch,
several adapters on one model. Written from what the pack does, not from its text; nothing here
comes from the library. Two of its mistakes can be switched on: the middle block under a key that
the host never calls, and a mask on a grid that is guessed from the latent's proportions.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import plain
from tests.synthetic import adapters

Weight = float | Sequence[float]
MaskRule = Literal["cells", "guessed"]

HIDDEN, POOLED, SIDE = 64, 36, 28
"""The image tower of these tests: widths of its features, and its picture in pixels."""

KINDS = (
    *("linear", "ease in", "ease out", "ease in-out", "reverse in-out"),
    *("weak input", "weak output", "weak middle", "strong middle"),
    *("style transfer", "composition", "strong style transfer", "style and composition"),
    *("style transfer precise", "composition precise"),
)
SCALINGS = ("V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty")


# Which layers, how strongly


@dataclass(frozen=True)
class Strength:
    """The inputs of an apply node that say how strongly, where and when."""

    weight: Weight = 1.0
    kind: str = "linear"
    scaling: str = "V only"
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None
    composition: Weight | None = None
    style_boost: Weight | None = None
    composition_boost: Weight | None = None
    layer_weights: str = ""


def _times(weight: Weight, factor: float) -> Weight:
    return weight * factor if isinstance(weight, float | int) else [factor * w for w in weight]


def weight_at(strength: Strength, t: int, block: str, is_xl: bool) -> Weight | None:
    """The weight in transformer `t`, which lies among the `block` blocks; None for no image."""
    count = 11 if is_xl else 16
    w, x, half = strength.weight, t / count, count / 2
    kind = strength.kind
    curves = {
        "linear": 1.0,
        "ease in": 0.05 + 0.95 * (1 - x),
        "ease out": 0.05 + 0.95 * x,
        "ease in-out": 0.05 + 0.95 * (1 - abs(t - half) / half),
        "reverse in-out": 0.05 + 0.95 * abs(t - half) / half,
        "weak input": 0.2 if block == "input" else 1.0,
        "weak middle": 0.2 if block == "middle" else 1.0,
        "weak output": 0.2 if block == "output" else 1.0,
        "strong middle": 1.0 if block == "middle" else 0.2,
    }
    if strength.layer_weights:
        pairs = (part.split(":") for part in strength.layer_weights.split(","))
        chosen = {int(place): float(factor) for place, factor in pairs}
        return _times(w, chosen[t]) if t in chosen else None
    if kind in curves:
        return _times(w, curves[kind])
    other = strength.composition if "style and composition" in kind else None
    if kind == "style transfer precise":
        other = strength.style_boost
    other = w if other is None else other
    if kind == "composition precise":
        w, other = w if strength.composition_boost is None else strength.composition_boost, w
    tenth = _times(w, 0.1) if kind == "composition precise" else None
    if is_xl:
        layout: dict[int, Weight] = {3: other}
        style: dict[int, Weight] = {6: w}
        rest: dict[int, Weight] = {i: w for i in range(11) if i != 3}
        faint = {i: tenth for i in range(11) if i not in (3, 6)}
    else:
        layout = {4: _times(other, 0.25), 5: other}
        style = {i: w for i in (*range(4), *range(9, 16))}
        rest = {i: w for i in range(16) if i not in (4, 5)}
        faint = {i: tenth for i in (6, 7, 8)}
    tables: dict[str, dict[int, Any]] = {
        "style transfer": style,
        "composition": layout,
        "strong style transfer": rest,
        "style and composition": style | layout,
        "strong style and composition": rest | (layout if is_xl else {4: other, 5: other}),
        "style transfer precise": style | layout,
        "composition precise": style | layout | faint,
    }
    return tables[kind].get(t)


def is_swapped(kind: str, t: int, is_xl: bool) -> bool:
    """Whether the image goes to the negative side in transformer `t`."""
    is_layout = t in ((3,) if is_xl else (4, 5))
    return (kind == "style transfer precise" and is_layout) or (
        kind == "composition precise" and not is_layout
    )


# Masks


def _cells(source: int, target: int) -> Tensor:
    """``[target, source]``, rows that average what each of `target` equal cells covers."""
    matrix = torch.zeros(target, source)
    for i in range(target):
        first, last = i * source // target, -(-(i + 1) * source // target)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def shrink(mask: Tensor, height: int, width: int) -> Tensor:
    """``[M, H, W]`` -> ``[M, height, width]`` by the mean over cells."""
    return _cells(mask.shape[1], height) @ mask.float() @ _cells(mask.shape[2], width).T


def true_grid(latent: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The token grid of a layer: each level of the UNet halves the one before, rounding up."""
    height, width = latent
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == tokens
    return height, width


def guessed_grid(latent: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The grid that the old pack takes it for."""
    height = int(latent[0] / math.sqrt(latent[0] * latent[1] / tokens))
    height += tokens % height != 0
    return height, tokens // height


def on_tokens(mask: Tensor, latent: tuple[int, int], tokens: int, rule: MaskRule) -> Tensor:
    """``[M, H, W]`` -> factors ``[M, tokens]``."""
    if rule == "cells":
        return shrink(shrink(mask, *latent), *true_grid(latent, tokens)).flatten(1)
    grid = guessed_grid(latent, tokens)
    flat = F.interpolate(mask[:, None].float(), size=grid, mode="bilinear").flatten(1)
    missing = tokens - flat.shape[1]
    if missing >= 0:
        return F.pad(flat, (missing // 2, missing - missing // 2))
    return flat[:, -missing // 2 :][:, :tokens]


# The layer


@dataclass(frozen=True)
class Applied:
    """One adapter on a model.

    Attributes:
        weights: The ``ip_adapter`` part of its file.
        image: Tokens ``[N, T, D]``.
        nothing: Tokens ``[N, T, D]`` of the negative side.
        strength: See `Strength`.
        by_frame: Whether row i of the tokens is for picture i of the batch.
        layout: Tokens in place of `image` in transformer 3.
        mask_rule: How a mask comes onto the tokens.
        window: The noise levels between which it acts; `install` fills it in.
    """

    weights: plain.Weights
    image: Tensor
    nothing: Tensor
    strength: Strength
    by_frame: bool = False
    layout: Tensor | None = None
    mask_rule: MaskRule = "cells"
    window: tuple[float, float] = (0.0, math.inf)

    def add(self, q: Tensor, number: int, options: dict[str, Any]) -> Tensor | float:
        """What it adds to the text attention of layer `number`, ``[B, L, C]``, or nothing."""
        if not self.window[0] <= float(options["sigmas"][0]) <= self.window[1]:
            return 0.0
        t, sides = options["transformer_index"], options["cond_or_uncond"]
        is_xl, rows = self.image.shape[-1] == 2048, len(q) // len(sides)
        given = weight_at(self.strength, t, options["block"][0], is_xl)
        if given is None:
            return 0.0
        many = [given] if isinstance(given, float | int) else list(given)
        weights = [many[min(row, len(many) - 1) if self.by_frame else 0] for row in range(rows)]
        image, nothing = self.image, self.nothing
        if t == 3 and self.layout is not None:
            image = self.layout
        if is_swapped(self.strength.kind, t, is_xl):
            image, nothing = torch.zeros_like(image), image
        found = torch.zeros_like(q)
        for i, side in enumerate(sides):
            groups: dict[tuple[int, float], list[int]] = {}
            for row in range(rows):
                groups.setdefault((row if self.by_frame else 0, weights[row]), []).append(row)
            for (first, w), members in groups.items():
                tokens = (image, nothing)[side]
                if self.by_frame:
                    tokens = tokens[min(first, len(tokens) - 1)][None]
                places = [i * rows + row for row in members]
                found[places] = self._attend(q[places], tokens, w, number, options["n_heads"])
        if self.strength.mask is not None:
            latent = tuple(options["original_shape"][-2:])
            factors = on_tokens(self.strength.mask, latent, q.shape[1], self.mask_rule)
            which = [min(row, len(factors) - 1) for row in range(rows)] * len(sides)
            found = found * factors[which][..., None]
        return found

    def _attend(self, q: Tensor, tokens: Tensor, w: float, number: int, heads: int) -> Tensor:
        """Rows ``[R, L, C]`` alike: a softmax over the tokens of all their images."""
        if w == 0:
            return torch.zeros_like(q)
        k = plain.linear(self.weights, f"{number}.to_k_ip", tokens)
        v = plain.linear(self.weights, f"{number}.to_v_ip", tokens)
        penalised = w * k.shape[-1] / 1280
        factor = 1.0
        match self.strength.scaling:
            case "V only":
                factor = w
            case "K+V":
                k, v = w * k, w * v
            case "K+V w/ C penalty":
                k, v = penalised * k, penalised * v
            case _:
                mean = v.mean(1, keepdim=True)  # of each image
                k, v = penalised * k, v - mean + penalised * mean
        return factor * plain.attend(q, k.flatten(0, 1)[None], v.flatten(0, 1)[None], heads)


class Attention2:
    """What stands in the host's attn2 slot: text attention, and every adapter's image attention."""

    def __init__(self, number: int, applied: Sequence[Applied]) -> None:
        self.number = number
        self.applied = list(applied)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        out = plain.attend(q, k, v, options["n_heads"])
        for one in self.applied:
            out = out + one.add(q, self.number, options)
        return out


def addresses(family: str, *, middle: int = 0) -> list[tuple[str, int, int]]:
    """The host's name of each cross-attention, in the numbering of the files."""
    if family in ("SDXL", "Kolors"):
        depths = {"input": {4: 2, 5: 2, 7: 10, 8: 10}, "output": {0: 10, 1: 10, 2: 10, 3: 2}}
        depths["output"] |= {4: 2, 5: 2}
        depths["middle"] = {middle: 10}
    else:
        depths = {"input": dict.fromkeys((1, 2, 4, 5, 7, 8), 1)}
        depths["output"] = dict.fromkeys(range(3, 12), 1)
        depths["middle"] = {middle: 1}
    return [
        (block, number, depth)
        for block, numbers in depths.items()
        for number, count in numbers.items()
        for depth in range(count)
    ]


def install(model: Any, applied: Sequence[Applied], family: str, *, middle: bool = True) -> Any:
    """A clone of a MODEL with the old pack's attention.

    Args:
        model: The host's.
        applied: In order.
        family: Whose layers.
        middle: Whether the middle block gets the image, which it does not in the old pack.
    """
    sigma = model.get_model_object("model_sampling").percent_to_sigma
    timed = [
        replace(one, window=(float(sigma(one.strength.end)), float(sigma(one.strength.start))))
        for one in applied
    ]
    clone = model.clone()
    for position, address in enumerate(addresses(family, middle=0 if middle else 1)):
        clone.set_model_attn2_replace(Attention2(2 * position + 1, timed), *address)
    return clone


# Tokens


def tower(seed: int = 0) -> Any:
    """A CLIP_VISION of the host that is small enough to be quick."""
    import comfy.clip_vision

    config = {
        "model_type": "clip_vision_model",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "hidden_act": "gelu",
        "image_size": SIDE,
        "patch_size": 14,
        "num_channels": 3,
        "projection_dim": POOLED,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        vision = comfy.clip_vision.ClipVisionModel(file.name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vision.model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return vision


def combine(features: Tensor, how: str) -> Tensor:
    """Several references -> one, before the projection."""
    if how == "concat" or len(features) == 1:
        return features
    if how == "subtract":
        return (features[0] - features[1:].mean(0))[None]
    if how == "norm average":
        return (features / features.square().sum(0).sqrt()).mean(0)[None]
    ways = {"add": features.sum(0), "average": features.mean(0)}
    ways |= {"max": features.max(0).values, "min": features.min(0).values}
    return ways[how][None]


def to_size(rows: Tensor, count: int) -> Tensor:
    """The last row again and again, or the surplus cut."""
    return rows[[min(i, len(rows) - 1) for i in range(count)]]


@dataclass(frozen=True)
class File:
    """An adapter's file, and the image tower it reads.

    Attributes:
        parts: The two dictionaries of the file, in float32.
        vision: The host's CLIP_VISION.
    """

    parts: dict[str, adapters.Tensors]
    vision: Any

    @classmethod
    def of(cls, tensors: adapters.Tensors, vision: Any) -> File:
        """From the flat tensors of a file."""
        return cls(adapters.nested({key: x.float() for key, x in tensors.items()}), vision)

    @property
    def is_plus(self) -> bool:
        """Whether it reads hidden states."""
        return "latents" in self.parts["image_proj"]

    def see(self, image: Tensor) -> Tensor:
        """Features of ``[N, H, W, C]``: ``[N, E]`` or ``[N, P, W]``."""
        out = self.vision.encode_image(image)
        found = out.penultimate_hidden_states if self.is_plus else out.image_embeds
        return found.float()  # type: ignore[no-any-return]

    def no_image(self, like: Tensor) -> Tensor:
        """A black picture's hidden states, or a zero embedding."""
        black = torch.zeros(1, SIDE, SIDE, 3)
        return self.see(black) if self.is_plus else torch.zeros_like(like[:1])

    def tokens(self, features: Tensor) -> Tensor:
        """The projection: ``[N, T, D]``."""
        weights = self.parts["image_proj"]
        if self.is_plus:
            return plain.resampler(weights, features)
        flat = plain.linear(weights, "proj", features)
        return plain.norm(weights, "norm", flat.unflatten(1, (-1, len(weights["norm.weight"]))))

    def apply(
        self,
        features: Tensor,
        strength: Strength,
        *,
        negative: Tensor | None = None,
        how: str = "concat",
        by_frame: bool = False,
        layout: Tensor | None = None,
    ) -> Applied:
        """What an apply node makes of features.

        Args:
            features: Of the references.
            strength: See `Strength`.
            negative: Features of what to lead away from, or None for no image.
            how: How several references become one.
            by_frame: Whether reference i is for picture i.
            layout: Features of the picture for the layout, or None.
        """
        nothing = self.no_image(features) if negative is None else negative
        nothing = to_size(nothing, len(features))
        if not by_frame and how != "concat" and len(features) > 1:
            features, nothing = combine(features, how), nothing[:1]
            layout = None if layout is None else combine(layout, how)
        return Applied(
            self.parts["ip_adapter"],
            self.tokens(features),
            self.tokens(nothing),
            strength,
            by_frame,
            None if layout is None else self.tokens(layout),
        )
