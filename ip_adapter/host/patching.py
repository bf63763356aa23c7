"""Patching a MODEL: clones only, immutable entries, slots for the length of a forward pass.

A patched MODEL carries a tuple of `Entry` in its options and two wrappers: one opens and closes a
`Run` around each sampling, the other puts a `Slot` where the host looks for a cross-attention
replacement, in the options of one forward pass. The host keeps one replacement per layer, so on the
MODEL itself ours would hide, or be overwritten by, those of other packs; this way we always stand
outside of theirs, whoever came first. Nothing is ever changed in place, so a MODEL that was cloned
from, or queued before, cannot see what was applied after.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .. import masks
from ..errors import IncompatibleModelError
from ..influence import Influence, Timing, check_window
from ..prompt import ImagePrompt
from . import compiling, face_lora, recording, unet
from .adapters import LoadedAdapter
from .branch import Branch, Chunk
from .run import Entry, LiveLayers, PromptCond, Run

log = logging.getLogger(__name__)

KEY = "image_prompts"
"""Under this name our entries, wrappers and conditions travel through the host."""

RUN = "image_prompts.run"
"""Under this name a forward pass finds the run in the transformer options."""


@dataclass(frozen=True, eq=False)
class Slot:
    """What the host calls instead of a layer's text attention, in one forward pass.

    Attributes:
        branches: The image prompts that are live in this layer.
        wrapped: The replacement that another pack has put there, or None.
        witness: Who records what the image prompts do, or None.
    """

    branches: tuple[Branch, ...]
    wrapped: Any = None
    witness: recording.Witness | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """Text attention, then every image prompt.

        Args:
            q: ``[B, L, C]``.
            k: ``[B, 77, C]`` or longer, the text's keys.
            v: Like `k`.
            extra_options: What the host says of this call.
        """
        if self.wrapped is None:
            out = host_attention.optimized_attention(
                q,
                k,
                v,
                extra_options["n_heads"],
                attn_precision=extra_options.get("attn_precision"),
                transformer_options=extra_options,
            )
        else:
            out = self.wrapped(q, k, v, extra_options)
        if self.witness is not None:
            self.witness(out, q, self.branches, extra_options)
        for branch in self.branches:
            out = branch.add(out, q, extra_options)
        return out  # type: ignore[no-any-return]


def apply(
    model: Any,
    adapter: LoadedAdapter,
    prompt: ImagePrompt,
    *,
    weight: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    mask: Tensor | None = None,
    influence: Influence | None = None,
) -> tuple[Any, str]:
    """Add an image prompt to a clone of a MODEL.

    Args:
        model: The host's MODEL; it is not changed.
        adapter: Whose keys and values to use.
        prompt: Encoded with this adapter.
        weight: The paper's lambda; 0 is the base model, bit for bit.
        start: Fraction of the schedule at which it begins to act, 0..1.
        end: Fraction at which it stops, ``start`` to 1.
        mask: ``[H, W]`` or ``[M, H, W]`` in image space: where it acts.
        influence: More of how strongly, where and when. Weights and masks multiply, and it acts
            in both windows.

    Returns:
        The clone, and a line that says what was patched.

    Raises:
        IncompatibleModelError: Model, adapter and prompt do not belong together.
        ImageError: See `masks.check`.
        InfluenceError: The window is not within 0..1, or ends before it starts; or the influence
            names a layer that the adapter does not have.
    """
    if prompt.adapter != adapter.fingerprint:
        raise IncompatibleModelError(
            f"The image prompt was encoded with {prompt.label}, but is applied with "
            f"{adapter.label}. Connect the same adapter to Encode and Apply, or encode again."
        )
    check_window(start, end)
    more = influence or Influence()
    plan = more.on(adapter.spec.family)
    layers = unet.match(adapter.spec, model, adapter.label)
    entry = Entry(
        adapter,
        prompt,
        {number: weight * factor for number, factor in plan.weights.items()},
        plan.opposed,
        Timing(max(start, more.start), min(end, more.end), more.curve),
        tuple(masks.check(one) for one in (mask, more.mask) if one is not None),
        more.frames,
        more.scaling,
    )

    patched = model.clone()
    options = patched.model_options["transformer_options"]
    entries = (*options.get(KEY, ()), entry)
    patched.model_options["transformer_options"] = {**options, KEY: entries}
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, sampling_run),
        (WrappersMP.APPLY_MODEL, forward_pass),
    ):
        if not patched.get_wrappers(kind, KEY):
            patched.add_wrapper_with_key(kind, KEY, wrapper)
    count, strength = len(layers), weight * more.weight
    report = (
        f"{count} of {count} layers, {prompt.tokens} tokens, weight {strength:g}"
        + (f", steps {start:.0%} to {end:.0%}" if (start, end) != (0, 1) else "")
        + (", masked" if entry.masks else "")
        + (f", one for each of {prompt.frames} pictures" if prompt.frames > 1 else "")
        + (f", {len(entry.active)} of them in use" if len(entry.active) < count else "")
        + (f"; image prompt {len(entries)} on this model" if len(entries) > 1 else "")
    )
    if any(not bool((one > 0).any()) for one in entry.masks):
        report += "; a mask is 0 everywhere, so it has no effect"
        log.warning("IP-Adapter: an image prompt has no effect, its mask is 0 everywhere")
    if face_lora.is_missing(adapter, model):
        report += "; its LoRA is not on this model, so the likeness is weak: Apply FaceID LoRA"
    log.info("IP-Adapter: %s applied to %s", adapter.label, report)
    return patched, report


def sampling_run(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Host wrapper around one sampling: open a run, hang it on every conditioning, close it."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    entries: tuple[Entry, ...] = options.get(KEY, ())
    patcher = guider.model_patcher
    compiled = compiling.take(options, patcher)
    layers = {layer.address: layer for layer in unet.cross_attention_layers(patcher)}
    recorded = recording.start(options, entries, layers, patcher, sigmas, noise.shape)
    if recorded is not None and compiled is not None:
        compiled = None
        log.warning(
            "IP-Adapter: this sampling runs without torch.compile, to record attention maps"
        )
    run = Run(
        entries,
        layers,
        patcher.get_model_object("model_sampling"),
        _inference_dtype(patcher.model),
        (noise.shape[-2], noise.shape[-1]),
        unet.token_bridge(patcher),
        compiled=compiled,
        recorded=recorded,
    )
    run.warn_of_idle_entries(sigmas)
    # The guider's copy for one run, which ends with it.
    guider.model_options["transformer_options"] = {**options, RUN: run}
    frames = torch.arange(noise.shape[0])
    for role, conds in guider.conds.items():
        for cond in conds:
            is_positive = cond.get("prompt_type", role) == "positive"
            # A new dictionary: the host shares the old one between runs.
            cond["model_conds"] = {
                **cond.get("model_conds", {}),
                KEY: PromptCond(run, frames, is_positive),
            }
    try:
        made = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if recorded is not None:
            recorded.finish(made)
        return made
    finally:
        # A guider object may outlive an interrupted run; the run's tensors must not.
        for conds in guider.conds.values():
            for cond in conds:
                cond["model_conds"] = {
                    name: value for name, value in cond["model_conds"].items() if name != KEY
                }


def forward_pass(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Host wrapper around one forward pass: turn its rows into the branches of every layer."""
    options = dict(transformer_options or {})
    run, chunks = kwargs.pop(KEY, (options.pop(RUN, None), None))
    if run is None:
        log.warning("IP-Adapter: a forward pass outside the sampler gets no image prompt")
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if chunks is None:  # a guidance patch brought its own conditioning: it is not the positive one
        chunks = (Chunk(False, None, tuple(range(x.shape[0]))),)
    watching = None if run.recorded is None else run.recorded.begin(chunks, t)
    options = _with_slots(options, run.live(chunks, t, x.device), watching)

    def forward() -> Any:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    found, run.compiled = compiling.call(executor.class_obj, run.compiled, forward)
    return found


def _with_slots(
    options: dict[str, Any], live: LiveLayers, watching: recording.Pass | None
) -> dict[str, Any]:
    """The options with a slot in every live layer, around what another pack may have put there."""
    replace = options.get("patches_replace", {})
    theirs = replace.get("attn2", {})
    ours = {
        address: Slot(
            branches,
            theirs.get(address, theirs.get(address[:2])),
            None if watching is None else watching.at(address),
        )
        for address, branches in live.items()
    }
    return {**options, "patches_replace": {**replace, "attn2": {**theirs, **ours}}}


def _inference_dtype(base: Any) -> torch.dtype:
    dtype = base.manual_cast_dtype if getattr(base, "manual_cast_dtype", None) else base.get_dtype()
    return dtype  # type: ignore[no-any-return]
