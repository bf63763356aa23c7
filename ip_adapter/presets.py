"""Which layers of a UNet an image prompt acts on, and how strongly: named presets and free forms.

Layers are grouped by the spatial transformer they belong to, and transformers are numbered ``t`` in
the order in which the UNet runs them (`layers.transformers`). What a preset does at each ``t`` is a
row of a table; SD 2.x has the plan of SD 1.5, Kolors that of SDXL. Curves and factors for input,
middle or output blocks exist for every plan; where style and layout are is known of these two only.

Source: InstantStyle (arXiv 2404.02733) found in SDXL that ``up_blocks.0.attentions.1`` carries
style and ``down_blocks.2.attentions.1`` spatial layout: t = 6 and t = 3 here. SD 1.5 has no single
such transformer; its groups and all factors are those that published workflows were made with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from .errors import InfluenceError
from .layers import Family, transformers

Preset = Literal[
    "linear",
    "ease in",
    "ease out",
    "ease in-out",
    "reverse in-out",
    "weak input",
    "weak middle",
    "weak output",
    "strong middle",
    "style transfer",
    "composition",
    "strong style transfer",
    "style and composition",
    "strong style and composition",
    "style transfer precise",
    "composition precise",
]
PRESETS: tuple[Preset, ...] = get_args(Preset)
"""Every preset, in the order in which users are shown them."""

EXAMPLE = "0:0.5, 3:1, 4-8:0.2"
"""What `parse` reads."""


@dataclass(frozen=True)
class LayerWeights:
    """How strongly an image prompt acts on each layer.

    Attributes:
        weights: The paper's lambda by layer number (`CrossAttentionLayer.index`). A layer that is
            not named gets none.
        opposed: Layers where the image works against the negative side: the negative pass reads
            the tokens of the image, the positive pass reads no image, and guidance therefore
            pushes away from what the image has there.
    """

    weights: Mapping[int, float]
    opposed: frozenset[int] = frozenset()


_Amount = Literal["weight", "composition", "style boost", "composition boost"]


class _Row(NamedTuple):
    """What some transformers get: a factor of one of the amounts that the user sets."""

    places: Collection[int]
    factor: float = 1.0
    amount: _Amount = "weight"
    opposed: bool = False


_Table = Mapping[str, tuple[_Row, ...]]

_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0,
    "ease in": lambda x: 0.05 + 0.95 * (1 - x),
    "ease out": lambda x: 0.05 + 0.95 * x,
    "ease in-out": lambda x: 0.05 + 0.95 * (1 - abs(2 * x - 1)),
    "reverse in-out": lambda x: 0.05 + 0.95 * abs(2 * x - 1),
}
"""Factor by ``x = t / count``, which starts at 0 and never reaches 1."""


def _general(count: int, middle: int) -> _Table:
    """The rows that every plan has: `_CURVES`, and those by input, middle and output blocks."""
    inputs, outputs = range(middle), range(middle + 1, count)
    curves = {
        name: tuple(_Row((t,), factor(t / count)) for t in range(count))
        for name, factor in _CURVES.items()
    }
    return {
        **curves,
        "weak input": (_Row(inputs, 0.2), _Row(range(middle, count))),
        "weak middle": (_Row((*inputs, *outputs)), _Row((middle,), 0.2)),
        "weak output": (_Row(range(middle + 1)), _Row(outputs, 0.2)),
        "strong middle": (_Row((*inputs, *outputs), 0.2), _Row((middle,))),
    }


_SD_STYLE = (*range(4), *range(9, 16))  # between them: layout 4, 5, and 6 to 8, which carry both

_SD_TABLE: _Table = {
    **_general(16, middle=6),
    "style transfer": (_Row(_SD_STYLE),),
    "composition": (_Row((4,), 0.25), _Row((5,))),
    "strong style transfer": (_Row((*range(4), *range(6, 16))),),
    "style and composition": (
        _Row(_SD_STYLE),
        _Row((4,), 0.25, "composition"),
        _Row((5,), 1.0, "composition"),
    ),
    "strong style and composition": (
        _Row((*range(4), *range(6, 16))),
        _Row((4, 5), 1.0, "composition"),
    ),
    "style transfer precise": (
        _Row(_SD_STYLE),
        _Row((4,), 0.25, "style boost", opposed=True),
        _Row((5,), 1.0, "style boost", opposed=True),
    ),
    "composition precise": (
        _Row((4,), 0.25),
        _Row((5,)),
        _Row(_SD_STYLE, 1.0, "composition boost", opposed=True),
        _Row((6, 7, 8), 0.1, "composition boost", opposed=True),
    ),
}
"""t = 0 to 5 are the input blocks, 6 the middle, 7 to 15 the output blocks."""

_SDXL_TABLE: _Table = {
    **_general(11, middle=4),
    "style transfer": (_Row((6,)),),
    "composition": (_Row((3,)),),
    "strong style transfer": (_Row((*range(3), *range(4, 11))),),
    "style and composition": (_Row((6,)), _Row((3,), 1.0, "composition")),
    "strong style and composition": (
        _Row((*range(3), *range(4, 11))),
        _Row((3,), 1.0, "composition"),
    ),
    "style transfer precise": (_Row((6,)), _Row((3,), 1.0, "style boost", opposed=True)),
    "composition precise": (
        _Row((3,)),
        _Row((6,), 1.0, "composition boost", opposed=True),
        _Row((*range(3), 4, 5, *range(7, 11)), 0.1, "composition boost", opposed=True),
    ),
}
"""t = 0 to 3 are the input blocks, 4 the middle, 5 to 10 the output blocks."""

_TABLES: Mapping[int, _Table] = {16: _SD_TABLE, 11: _SDXL_TABLE, 7: _general(7, middle=2)}
"""By the number of transformers of the plan; 7 is the miniature's."""


def layer_weights(
    preset: Preset,
    family: Family,
    weight: float = 1.0,
    *,
    composition: float | None = None,
    style_boost: float | None = None,
    composition_boost: float | None = None,
) -> LayerWeights:
    """The weights of a preset.

    Args:
        preset: One of `PRESETS`.
        family: Whose layers.
        weight: The paper's lambda, of any sign.
        composition: Weight of the layout layers in "style and composition" and in "strong style and
            composition"; None for `weight`.
        style_boost: In "style transfer precise", how strongly the layout layers push away from
            the image; None for `weight`.
        composition_boost: In "composition precise", how strongly the style layers push away from
            the image (a tenth of it in layers that carry neither); None for `weight`.

    Returns:
        Absolute weights; no entry for layers that the preset leaves out.

    Raises:
        InfluenceError: There is no such preset, or none for this family: where its UNet carries
            style and layout is not known; or a weight is no finite number.
    """
    places = transformers(family)
    table = _TABLES[len(places)]
    if preset not in PRESETS:
        raise InfluenceError(
            f"There is no preset '{preset}'; needed is one of: {', '.join(PRESETS)}."
        )
    if preset not in table:
        raise InfluenceError(
            f"The preset '{preset}' needs to know which layers carry style and layout, which is "
            f"not known for {family.name}. Choose one of: {', '.join(table)}; or give weights of "
            f"its transformers 0 to {len(places) - 1}, such as '0:0.5, 3:1'."
        )
    boosts = (composition, style_boost, composition_boost)
    given = (weight, *(weight if boost is None else boost for boost in boosts))
    amounts: dict[_Amount, float] = {
        name: _finite(value, f"the {name}")
        for name, value in zip(get_args(_Amount), given, strict=True)
    }
    weights: dict[int, float] = {}
    opposed: set[int] = set()
    for row in table[preset]:
        for t in row.places:
            weights.update(dict.fromkeys(places[t], row.factor * amounts[row.amount]))
            if row.opposed:
                opposed.update(places[t])
    return LayerWeights(weights, frozenset(opposed))


def parse(text: str, family: Family, weight: float = 1.0) -> LayerWeights:
    """Read weights by transformer, such as ``"0:0.5, 3:1, 4-8:0.2"``.

    Args:
        text: Pairs ``t:factor`` or ``first-last:factor`` with commas or line ends between them;
            blanks do not matter. Where a transformer is named twice, the later part counts.
        family: Whose transformers.
        weight: Every factor is multiplied by it.

    Returns:
        Absolute weights; no entry for transformers that are not named.

    Raises:
        InfluenceError: A part is no such pair, names a transformer that the family does not have,
            or nothing is named.
    """
    places = transformers(family)
    _finite(weight, "the weight")
    parts = [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]
    needed = (
        f"needed are pairs t:factor with commas between them, such as '{EXAMPLE}', where t numbers "
        f"the transformers of {family.name} from 0 to {len(places) - 1} (or the exact name of a "
        "preset)"
    )
    if not parts:
        raise InfluenceError(f"The layer weights are empty; {needed}.")
    weights: dict[int, float] = {}
    for part in parts:
        found = re.fullmatch(r"([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?:\s*(\S+)", part)
        factor = _number(found[3]) if found else None
        if found is None or factor is None:
            raise InfluenceError(f"'{part}' is no layer weight; {needed}.")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < len(places):
            raise InfluenceError(f"'{part}' names no transformer of {family.name}; {needed}.")
        for t in range(first, last + 1):
            weights.update(dict.fromkeys(places[t], factor * weight))
    return LayerWeights(weights)


def from_scales(scales: Mapping[str, Any] | float, family: Family) -> LayerWeights:
    """Weights from what diffusers' ``set_ip_adapter_scale`` takes.

    InstantStyle gives ``{"up": {"block_0": [0, 1, 0]}}`` for style and ``{"down": {"block_2":
    [0, 1]}, "up": {"block_0": [0, 1, 0]}}`` for style and layout in SDXL.

    Args:
        scales: A number for all layers, or a dictionary with "down", "mid" and "up". "mid" is a
            number. "down" and "up" are dictionaries by block, or one value for all their blocks; a
            block's value is a number, or a list with a number for each of its attention modules.
        family: Whose blocks.

    Returns:
        Absolute weights; no entry for what is missing.

    Raises:
        InfluenceError: A key is unknown, a list has another length, or a value is no number. Lists
            with one number for each masked image are not supported.
    """
    modules = _modules(family)
    halves = scales if isinstance(scales, Mapping) else dict.fromkeys(modules, scales)
    _check_keys(halves, modules, "The scales have", family)
    weights: dict[int, float] = {}
    for half, given in halves.items():
        is_by_block = half != "mid" and isinstance(given, Mapping)
        by_block: Any = given if is_by_block else dict.fromkeys(modules[half], given)
        _check_keys(by_block, modules[half], f"'{half}' of the scales has", family)
        for block, value in by_block.items():
            layers = modules[half][block]
            values = list(value) if isinstance(value, list | tuple) else [value]
            if len(values) == 1:
                values *= len(layers)
            if len(values) != len(layers):
                raise InfluenceError(
                    f"The scales of {half} {block} are {value}; needed is one number, or a list of "
                    f"{len(layers)}, one for each attention module of that block in {family.name}."
                )
            for numbers, one in zip(layers, values, strict=True):
                scale = _finite(one, f"a scale of {half} {block}")
                weights.update(dict.fromkeys(numbers, scale))
    return LayerWeights(weights)


def _modules(family: Family) -> dict[str, dict[str, list[list[int]]]]:
    """The layers of every attention module, by diffusers' half and block."""
    found: dict[str, dict[str, dict[int, list[int]]]] = {}
    for layer in family.layers:
        # down_blocks.1.attentions.0.transformer_blocks.3, or mid_block.attentions.0...
        place, _, rest = layer.diffusers.partition(".attentions.")
        half, _, number = place.replace("_blocks.", "_block.").partition("_block")
        block = "block" + number.replace(".", "_")
        modules = found.setdefault(half, {}).setdefault(block, {})
        modules.setdefault(int(rest.split(".")[0]), []).append(layer.index)
    return {
        half: {block: list(modules.values()) for block, modules in blocks.items()}
        for half, blocks in found.items()
    }


def _check_keys(
    given: Mapping[str, Any], known: Mapping[str, Any], where: str, family: Family
) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InfluenceError(
            f"{where} {unknown}; the cross-attention of {family.name} is in {list(known)}."
        )


def _number(value: Any) -> float | None:
    """The finite number that this is or spells, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _finite(value: Any, name: str) -> float:
    number = None if isinstance(value, str) else _number(value)
    if number is None:
        raise InfluenceError(f"{name.capitalize()} is {value!r}; needed is a finite number.")
    return number
