"""Pictures of a training: samples by the host's own sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..adapter import IPAdapter
from ..projections import Ops


def snapshot(adapter: IPAdapter, label: str = "the adapter in training") -> Any:
    """A copy of an adapter as the host's nodes use it: `host.adapters.LoadedAdapter`.

    Args:
        adapter: On any device; it is not changed.
        label: What messages call it.
    """
    import comfy.model_management
    import comfy.ops

    from .. import checkpoint
    from ..host import adapters, features

    with torch.no_grad():
        module = IPAdapter(adapter.spec, cast(Ops, comfy.ops.manual_cast), "meta")
        copied = {key: value.detach().cpu().clone() for key, value in adapter.state_dict().items()}
        module.load_state_dict(copied, strict=True, assign=True)
    module.eval().requires_grad_(False)
    patcher = features.ManagedPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return adapters.LoadedAdapter(
        module, patcher, checkpoint.fingerprint(module), label, Path("training")
    )


@dataclass(frozen=True, eq=False)
class Shown:
    """One row of a sample grid.

    Attributes:
        reference: ``[H, W, 3]`` in 0..1, to look at.
        prompt: What `host.encoding.from_features` made of it.
        positive: The host's CONDITIONING of the caption.
    """

    reference: Tensor
    prompt: Any
    positive: Any


def sample_grid(
    model: Any,
    vae: Any,
    adapter: Any,
    shown: Sequence[Shown],
    negative: Any,
    noise: Tensor,
    *,
    weights: Sequence[float] = (0.0, 0.5, 1.0),
    steps: int = 20,
    guidance: float = 5.0,
) -> Tensor:
    """Pictures as a user would make them: reference | weight 0 | 0.5 | 1, one row per reference.

    Args:
        model: The host's MODEL; it is not changed.
        vae: The host's VAE.
        adapter: `host.adapters.LoadedAdapter` with the weights of now.
        shown: References, image prompts and captions.
        negative: The host's CONDITIONING of the empty text.
        noise: ``[1, C, h, w]``, the same for every picture.
        weights: The paper's lambda in each column.
        steps: Of the sampler.
        guidance: Of classifier-free guidance.

    Returns:
        ``[rows * H, columns * W, 3]`` in 0..1, on the CPU.
    """
    import comfy.sample
    import comfy.utils

    from ..host import patching

    rows = []
    for one in shown:
        made = []
        for weight in weights:
            patched, _ = patching.apply(model, adapter, one.prompt, weight=weight)
            latent = comfy.sample.sample(
                patched,
                noise,
                steps,
                guidance,
                "euler",
                "normal",
                one.positive,
                negative,
                torch.zeros_like(noise),
                disable_pbar=True,
                seed=0,
            )
            made.append(vae.decode(latent)[0].float().cpu().clamp(0, 1))
        height, width = made[0].shape[:2]
        seen = one.reference.float().cpu()[None].movedim(-1, 1)
        fitted = comfy.utils.common_upscale(seen, width, height, "area", "center")
        rows.append(torch.cat([fitted.movedim(1, -1)[0], *made], dim=1))
    return torch.cat(rows)
