"""torch.compile for models with image prompts.

The host's compile node drops every guard on the transformer options, in which image prompts travel:
a graph that was compiled without, or with other, image prompts would be used again and silently
ignore these. So a run with image prompts leaves the host's graphs alone and has the UNet compiled
with the guards on attention replacements kept. Keys, values and masks are inputs of that graph, and
weights are part of the values: another reference, weight or moment of a schedule needs no other
graph; another number of image prompts, or of their tokens, does.

It is one graph or none. After a break torch compiles the layers' own code, which all layers share,
and the guards that would tell them apart are on the options that differ at every step.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from comfy.patcher_extension import WrappersMP

log = logging.getLogger(__name__)

KEY = "torch.compile"
"""Under this name the host wraps a MODEL that its compile node made."""

UNET = "diffusion_model"

_compiled: WeakKeyDictionary[Callable[..., Any], Any] = WeakKeyDictionary()
"""By the host's wrapper, which lives as long as the MODELs that were made of it."""

_failed: WeakSet[Any] = WeakSet()
"""Those that could not be compiled as one graph."""


def take(options: dict[str, Any], patcher: Any) -> Any | None:
    """Take the host's compilation out of the options of one run.

    Args:
        options: The run's own transformer options; changed in place.
        patcher: The MODEL that runs; it stays compiled for runs without image prompts.

    Returns:
        The UNet, compiled so that image prompts count; None for a MODEL that is not compiled, or
        that is in a way which cannot be repeated: it runs without.
    """
    wrappers = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).pop(KEY, None)
    if not wrappers:
        return None
    wrapper = wrappers[-1]
    modules = _modules(wrapper)
    how = patcher.model_options.get("torch_compile_kwargs")
    if set(modules) != {UNET} or how is None:
        log.warning(
            "IP-Adapter: this model is compiled in a way that does not notice image prompts; it "
            "runs without torch.compile while one is applied. The host's Torch Compile Model works"
        )
        return None
    if wrapper not in _compiled:
        _compiled[wrapper] = _compile(patcher.get_model_object(UNET), how)
    return None if _compiled[wrapper] in _failed else _compiled[wrapper]


def call(model: Any, compiled: Any | None, forward: Callable[[], Any]) -> tuple[Any, Any | None]:
    """Do a forward pass of a model with its compiled UNet, or, where that cannot be, without.

    Args:
        model: The host's model.
        compiled: See `take`.
        forward: The pass.

    Returns:
        What `forward` returned, and what to use from now on: `compiled` or None.
    """
    if compiled is None:
        return forward(), None
    from torch._dynamo.exc import TorchDynamoException

    before = getattr(model, UNET)
    setattr(model, UNET, compiled)
    try:
        return forward(), compiled
    except TorchDynamoException as error:
        _failed.add(compiled)
        reason = str(error).strip().splitlines()[0]
        log.warning(
            "IP-Adapter: this model cannot be compiled as one graph with image prompts (%s); it "
            "runs without torch.compile while one is applied",
            reason,
        )
    finally:
        setattr(model, UNET, before)
    return forward(), None


def _modules(wrapper: Any) -> dict[str, Any]:
    """What the host's wrapper puts into the model, by name; nothing for a wrapper of others."""
    try:
        found = inspect.getclosurevars(wrapper).nonlocals.get("compiled_module_dict", {})
    except TypeError:
        return {}
    return dict(found)


def _compile(module: Any, how: dict[str, Any]) -> Any:
    options = {**(how.get("options") or {}), "guard_filter_fn": _keep}
    return torch.compile(
        getattr(module, "_orig_mod", module),
        backend=_backend(how.get("backend", "inductor"), how.get("mode")),
        options=options,
        fullgraph=True,
        dynamic=how.get("dynamic"),
    )


def _keep(guards: Sequence[Any]) -> list[bool]:
    """All guards but those on the options that differ at every step, such as the noise level."""
    return [
        "transformer_options" not in guard.name or "patches_replace" in guard.name
        for guard in guards
    ]


def _backend(name: Any, mode: str | None) -> Callable[..., Any]:
    """A back end that torch tells from the host's of the same name.

    Torch uses a graph again wherever the same code meets an equal back end, and the host's graphs
    are of the same code.
    """
    from torch._dynamo.backends.registry import lookup_backend
    from torch._inductor import list_mode_options

    found: Callable[..., Any] = lookup_backend(name)

    def compile_graph(graph: Any, inputs: Any, **more: Any) -> Any:
        if name != "inductor":
            return found(graph, inputs)
        patches = {**(list_mode_options(mode) if mode else {}), **(more.get("options") or {})}
        patches.pop("guard_filter_fn", None)  # an older torch hands it on
        return found(graph, inputs, config_patches=patches or None)

    return partial(compile_graph)
