"""Row 2: our overhead beside that of diffusers' own IP-Adapter, on the same UNet weights.

Each side is compared with itself without an adapter, all four in the same rounds: the two programs
differ in more than the adapter, and what one's UNet takes says nothing of the other's overhead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import clocks, estimates, sampling
from .clocks import Timed
from .counting import count
from .errors import BenchError
from .models import Base, FamilyName, draw
from .results import Figure, Row, figure
from .sampling import Scene
from .steps import MEASURE, Case
from .world import Job, World

TIMESTEP = 500

_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "SD 1.5": {
        "sample_size": 64,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "SDXL": {
        "sample_size": 128,
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""The published unet/config.json, but for the widths."""


@dataclass(frozen=True)
class Place:
    """Where both are compared.

    Attributes:
        family: The base model's.
        published: Side of the picture in pixels.
        on_cpu: On a CPU, where the published one takes too long.
        case: The image prompts.
    """

    family: FamilyName
    published: int
    on_cpu: int | None
    case: Case


PLACES = (
    Place("SD 1.5", 512, 256, Case(("global",))),
    Place("SD 1.5", 512, 256, Case(("plus",))),
    Place("SD 1.5", 512, 256, Case(("plus",) * 3)),
    Place("SDXL", 1024, 256, Case(("plus",))),
)


def jobs(world: World) -> Iterator[Job]:
    """Every place in every precision."""
    for dtype in world.settings.dtypes:
        for place in PLACES:
            side = world.settings.pixels(place.published, place.on_cpu)
            name = f"{place.family} {side} x {side}, {place.case.words}, {dtype}"
            yield Job(name, partial(_measure, world, place, dtype, name))


@torch.inference_mode()
def _measure(world: World, place: Place, dtype: str, name: str) -> list[Row]:
    settings = world.settings
    base = world.base(place.family, dtype)
    side = settings.pixels(place.published, place.on_cpu)
    scene = Scene(base, side, side)
    patched = place.case.apply(base, side, side)
    theirs = [unet(base), unet(base, place.case)]
    given = inputs(base, place.case, scene)

    def body(steps: Sequence[sampling.Step]) -> Any:
        calls: list[Timed] = [*steps]
        calls += [partial(_their_step, one, given) for one in theirs]
        seconds = clocks.interleave(calls, settings.rounds, settings.clock)
        return seconds, [count(partial(call, 0)) for call in calls]

    seconds, work = sampling.open_runs(scene, [base.model.clone(), patched], body)
    added = [work[i + 1] - work[i] for i in (0, 2)]
    ours, rival = ((seconds[:, i], seconds[:, i + 1]) for i in (0, 2))
    note = ""
    if settings.size == "real" and side != place.published:
        note = f"{place.published} x {place.published} as published is left to GPUs"
    row = Row(
        name,
        (
            figure(f"ours: {MEASURE}", estimates.ratio(*ours)),
            figure(f"diffusers: {MEASURE}", estimates.ratio(*rival)),
            figure(
                "our overhead less a third of diffusers'",
                estimates.overhead_beyond(ours, rival),
                goal=0.0,
            ),
            Figure("added arithmetic, ours / diffusers'", added[0].flops / added[1].flops),
            Figure("added operators, ours / diffusers'", added[0].operators / added[1].operators),
        ),
        note=note,
        context={"seconds": seconds.tolist(), "added": [vars(one) for one in added]},
    )
    return [row]


def unet(base: Base, case: Case | None = None) -> Any:
    """The UNet of diffusers on the host's weights, with the adapters of a case.

    Raises:
        BenchError: diffusers is missing.
    """
    made = _empty(base)
    weights = _their_names(base)
    # The host lists some places under two names, of which a UNet has one.
    weights = {key: weights[key] for key in made.state_dict() if key in weights}
    with torch.inference_mode(False), torch.no_grad():
        made.load_state_dict(weights, strict=True, assign=True)
        made.eval().requires_grad_(False)
        made.to(base.model.load_device)
        if case is not None:
            files = [_two_levels(base.adapter(kind, n)) for n, kind in enumerate(case.kinds)]
            made._load_ip_adapter_weights(files, low_cpu_mem_usage=False)
            made.to(base.model.load_device, base.dtype)
            for processor in made.attn_processors.values():
                if hasattr(processor, "scale"):
                    processor.scale = [0.7] * len(files)
    return made


def inputs(base: Base, case: Case, scene: Scene) -> dict[str, Any]:
    """What diffusers' UNet reads in this scene: both sides of guidance, and the references."""
    device, dtype = base.model.load_device, base.dtype

    def ready(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    rows = 2 * scene.batch
    texts = [base.conditioning(seed)[0] for seed in (2, 1)]  # without, with
    added: dict[str, Any] = {"image_embeds": []}
    if base.family == "SDXL":
        pooled = torch.cat([text[1]["pooled_output"] for text in texts])
        sizes = [scene.height, scene.width, 0, 0, scene.height, scene.width]
        added["text_embeds"] = ready(pooled.repeat_interleave(scene.batch, 0))
        added["time_ids"] = ready(torch.tensor([sizes] * rows))
    for number, kind in enumerate(case.kinds):
        read = base.adapter(kind, number).spec.projection
        shape = (1, read.features) if read.image == "pooled" else (1, 257, read.features)
        added["image_embeds"].append(ready(draw(rows, *shape, seed=number)))
    return {
        "latent": ready(scene.noise()),
        "text": ready(torch.cat([text[0] for text in texts]).repeat_interleave(scene.batch, 0)),
        "added": added,
        "guidance": scene.guidance,
    }


def _their_step(made: Any, given: Mapping[str, Any], _: int) -> Tensor:
    """One step as its pipelines take it: both sides in one batch, then guidance."""
    added = given["added"]
    if made.encoder_hid_proj is None:
        added = {name: value for name, value in added.items() if name != "image_embeds"}
    found = made(
        torch.cat([given["latent"]] * 2),
        TIMESTEP,
        encoder_hidden_states=given["text"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    without, with_text = found.chunk(2)
    return without + given["guidance"] * (with_text - without)  # type: ignore[no-any-return]


def _empty(base: Base) -> Any:
    try:
        from diffusers import UNet2DConditionModel
        from diffusers.utils import logging
    except ImportError as error:
        raise BenchError(
            "diffusers is not installed; the groups 'diffusers' and 'training' compare with it. "
            "Run: pip install diffusers"
        ) from error
    logging.set_verbosity_error()
    width = base.model.model.model_config.unet_config["model_channels"]
    multiples = (1, 2, 4, 4) if base.family == "SD 1.5" else (1, 2, 4)
    config = dict(_CONFIGS[base.family])
    config["block_out_channels"] = tuple(width * multiple for multiple in multiples)
    if base.family == "SDXL":  # the number of heads of 64, despite the name
        config["attention_head_dim"] = tuple(max(1, width * m // 64) for m in multiples)
    with torch.device("meta"):
        return UNet2DConditionModel(**config)  # type: ignore[no-untyped-call]


def _their_names(base: Base) -> dict[str, Tensor]:
    """The host's weights, the very tensors, under diffusers' names."""
    import comfy.model_management
    import comfy.utils

    comfy.model_management.load_models_gpu([base.model])
    names = comfy.utils.unet_to_diffusers(base.model.model.model_config.unet_config)
    found = base.model.model.diffusion_model.state_dict()
    return {theirs: found[ours] for theirs, ours in names.items() if ours in found}


def _two_levels(adapter: Any) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter.module.state_dict().items():
        part, _, rest = key.partition(".")
        out[part][rest] = tensor
    return out
