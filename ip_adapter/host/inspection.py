"""Inspection: which image prompts act on a MODEL, and what else on it has to do with them.

Nothing is computed by the model and nothing is changed: everything is read off what travels on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..errors import IncompatibleModelError
from ..layers import Family
from ..prompt import ImagePrompt
from ..regions import intersect
from ..summary import Applied, Summary
from . import compiling, face_lora, patching, unet
from .run import Entry

_ATTENTION = ("attn2_patch", "attn2_output_patch")
"""Where the host keeps patches of text attention that do not take its place."""


def inspect(model: Any) -> Summary:
    """Describe the image prompts on a MODEL.

    Args:
        model: The host's MODEL of any kind.
    """
    options = model.model_options.get("transformer_options", {})
    family, base = _base(model)
    entries: tuple[Entry, ...] = options.get(patching.KEY, ())
    notes = list(_others(options))
    if entries and model.get_wrappers(WrappersMP.APPLY_MODEL, compiling.KEY):
        notes.append(
            "torch.compile is set: image prompts have the UNet compiled once more, which takes a "
            "while in the first run. Where that cannot be, they run without, and the console says "
            "so."
        )
    applied = tuple(_applied(entry, model) for entry in entries)
    return Summary(base, family, applied, tuple(notes))


def _base(model: Any) -> tuple[Family | None, str]:
    """A MODEL's family, and what to call it."""
    try:
        layers = unet.cross_attention_layers(model)
    except IncompatibleModelError:
        return None, type(model.model).__name__
    family = unet.family_of(model, layers)
    return family, family.name if family else f"unknown {type(model.model).__name__}"


def _applied(entry: Entry, model: Any) -> Applied:
    adapter = entry.adapter
    references = _references(entry.prompt, adapter.spec.projection.tokens)
    notes = []
    if face_lora.is_missing(adapter, model):
        notes.append(
            "Its LoRA is not on this model, so the likeness is weak: put Apply FaceID LoRA before "
            "the node that applies it."
        )
    return Applied(
        file=adapter.path.name,
        spec=adapter.spec,
        tokens=references * adapter.spec.projection.tokens if references else entry.prompt.tokens,
        references=references,
        weights=entry.weights,
        frames=entry.prompt.frames,
        opposed=entry.opposed,
        timing=entry.timing,
        mask=_together(entry.masks),
        factors=entry.frames,
        scaling=entry.scaling,
        notes=tuple(notes),
    )


def _together(masks: tuple[Tensor, ...]) -> Tensor | None:
    """Where all of them let it act."""
    found: Tensor | None = None
    for mask in masks:
        found = intersect(found, mask)
    return found


def _references(prompt: ImagePrompt, tokens: int) -> int | None:
    """How many different references a prompt has for each picture; None where nobody can tell.

    Where the negative side has more of them, the positive one is repeated to match, which changes
    nothing and is not counted.
    """
    if prompt.tokens % tokens:
        return None
    count = prompt.tokens // tokens
    rows = prompt.conditional.reshape(prompt.frames, count, tokens, -1)  # [F, N, T, D]
    for period in range(1, count):
        if count % period == 0 and bool((rows[:, period:] == rows[:, :-period]).all()):
            return period
    return count


def _others(options: dict[str, Any]) -> Iterator[str]:
    """What other packs do in the layers in which image prompts act."""
    found: dict[str, list[Any]] = {}
    for patch in options.get("patches_replace", {}).get("attn2", {}).values():
        found.setdefault(_pack(patch), []).append(patch)
    for pack, patches in found.items():
        count = f"{len(patches)} layer{'' if len(patches) == 1 else 's'}"
        if _is_image_prompt(patches[0]):
            yield (
                f"{pack} has applied an image prompt, too, in {count}. It acts beside those of "
                "this pack and is not shown here."
            )
        else:
            yield f"{pack} replaces the text's attention in {count}; image prompts are added to it."
    patches = [patch for kind in _ATTENTION for patch in options.get("patches", {}).get(kind, ())]
    for pack in dict.fromkeys(_pack(patch) for patch in patches):
        yield f"{pack} changes the text's attention in every layer."


def _pack(patch: Any) -> str:
    """Whose patch it is, by where it was written."""
    module = _module(patch)
    inside = re.search(r"custom_nodes[\\/.]([^\\/.]+)", module)
    if inside is not None:
        return inside[1].replace("_x_", ".")  # the host's writing of a folder's name
    return "ComfyUI" if module.startswith("comfy") else module.split(".")[0] or "Another pack"


def _is_image_prompt(patch: Any) -> bool:
    calls = getattr(patch, "callback", None)
    parts = [patch, *(calls if isinstance(calls, list | tuple) else [])]
    names = (f"{_module(one)} {getattr(one, '__name__', type(one).__name__)}" for one in parts)
    return any("ipadapter" in re.sub(r"[^a-z]", "", name.lower()) for name in names)


def _module(patch: Any) -> str:
    while isinstance(patch, partial):
        patch = patch.func
    return str(getattr(patch, "__module__", ""))
