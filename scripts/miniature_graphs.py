"""What the demo asks of ComfyUI: prompts for the API over the miniature's files.

Every node but the three of an image prompt is the host's own. One prompt makes a batch: a picture
for each reference, in one run of the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniature import family, world
from miniature.studio import GUIDANCE, SAMPLER, SCHEDULER, STEPS
from scripts.client import Json

GLOBAL, PLUS = "miniature_global.safetensors", "miniature_plus.safetensors"
WIDE = (2 * world.SIZE, world.SIZE)
"""Width and height of a picture with room for two."""


def without_images(count: int) -> Json:
    """The base model alone, and none of our nodes."""
    return _sampled({**_base(""), "latent": _latent(count)}, "checkpoint")


def with_images(
    references: Sequence[str],
    *,
    text: str = "",
    weight: float = 1.0,
    adapter: str = GLOBAL,
    fine_tuned: bool = False,
    hints: Sequence[str] = (),
) -> Json:
    """A picture for each reference.

    Args:
        references: Files of the input folder.
        text: Of all pictures.
        weight: The paper's lambda.
        adapter: File of the IP-Adapter.
        fine_tuned: On the custom model instead of the base.
        hints: Files with the silhouettes that the ControlNet reads, one for each reference.
    """
    nodes = {
        **_base(text),
        **_adapter(adapter),
        **_encode("reference", references),
        "latent": _latent(len(references)),
    }
    model = "checkpoint"
    if fine_tuned:
        model = "custom"
        name = family.FINE_TUNE.name
        nodes[model] = _node("UNETLoader", unet_name=name, weight_dtype="default")
    nodes["apply"] = _apply(model, "encode_reference", weight)
    return _sampled({**nodes, **_control(hints)}, "apply", hints)


def in_masks(first: Sequence[str], second: Sequence[str], mask: str, hints: Sequence[str]) -> Json:
    """A wide picture for each pair of references, one inside of a mask, the other outside.

    Args:
        first: Files of the input folder.
        second: As many.
        mask: File; where it is white is the first's.
        hints: Files with the silhouettes that the ControlNet reads, one for each pair.
    """
    nodes = {
        **_base(""),
        **_adapter(GLOBAL),
        **_encode("first", first),
        **_encode("second", second),
        **_control(hints),
        "inside": _node("LoadImageMask", image=mask, channel="red"),
        "outside": _node("InvertMask", mask=["inside", 0]),
        "apply_first": _apply("checkpoint", "encode_first", 1.0, mask=["inside", 0]),
        "apply": _apply("apply_first", "encode_second", 1.0, mask=["outside", 0]),
        "latent": _latent(len(first), WIDE),
    }
    return _sampled(nodes, "apply", hints)


def _node(kind: str, **inputs: Any) -> Json:
    return {"class_type": kind, "inputs": inputs}


def _base(text: str) -> Json:
    return {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name=family.BASE.name),
        "positive": _node("CLIPTextEncode", text=text, clip=["checkpoint", 1]),
        "negative": _node("CLIPTextEncode", text="", clip=["checkpoint", 1]),
    }


def _adapter(name: str) -> Json:
    encoder = Path(family.CLIP.name, family.CLIP_VISION.name)  # written as this system writes paths
    return {
        "adapter": _node("ImagePromptLoadAdapter", adapter_name=name, variant="automatic"),
        "encoder": _node("CLIPVisionLoader", clip_name=str(encoder)),
    }


def _load(name: str, files: Sequence[str]) -> Json:
    """Load files as one batch, which the node ``name`` gives."""
    nodes = {f"{name}_{n}": _node("LoadImage", image=file) for n, file in enumerate(files, 1)}
    joined, *others = nodes
    for other in others:
        nodes[f"{joined}+"] = _node("ImageBatch", image1=[joined, 0], image2=[other, 0])
        joined = f"{joined}+"
    nodes[name] = nodes.pop(joined)
    return nodes


def _encode(name: str, files: Sequence[str]) -> Json:
    nodes = _load(name, files)
    nodes[f"encode_{name}"] = _node(
        "ImagePromptEncode",
        ip_adapter=["adapter", 0],
        clip_vision=["encoder", 0],
        image=[name, 0],
        fit="crop",
        image_size=0,
        batch="one per frame",
    )
    return nodes


def _apply(model: str, prompt: str, weight: float, **more: Any) -> Json:
    return _node(
        "ImagePromptApply",
        model=[model, 0],
        ip_adapter=["adapter", 0],
        image_prompt=[prompt, 0],
        weight=weight,
        start_at=0.0,
        end_at=1.0,
        **more,
    )


def _control(hints: Sequence[str]) -> Json:
    """The ControlNet between the texts and the sampler; nothing without hints."""
    if not hints:
        return {}
    return {
        **_load("hint", hints),
        "net": _node("ControlNetLoader", control_net_name=family.CONTROLNET.name),
        "control": _node(
            "ControlNetApplyAdvanced",
            positive=["positive", 0],
            negative=["negative", 0],
            control_net=["net", 0],
            image=["hint", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        ),
    }


def _latent(count: int, size: tuple[int, int] = (world.SIZE, world.SIZE)) -> Json:
    return _node("EmptyLatentImage", width=size[0], height=size[1], batch_size=count)


def _sampled(nodes: Json, model: str, hints: Sequence[str] = ()) -> Json:
    sampler = _node(
        "KSampler",
        model=[model, 0],
        positive=["control", 0] if hints else ["positive", 0],
        negative=["control", 1] if hints else ["negative", 0],
        latent_image=["latent", 0],
        seed=0,
        steps=STEPS,
        cfg=GUIDANCE,
        sampler_name=SAMPLER,
        scheduler=SCHEDULER,
        denoise=1.0,
    )
    return {
        **nodes,
        "sampler": sampler,
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="miniature"),
    }
