"""Small random model files that ComfyUI's own loaders accept, under the names that users have.

The shipped workflows therefore run unchanged on a machine without downloads or a GPU. Everything is
"nano": true topology of its family, one tenth of its width. Exceptions are the text encoder
and the image encoder, which the host only knows in full size. Pictures made with these files are
patches of colour: what steers them can be tested, what they show cannot.

The nano UNets need `FIXTURE_PACK` among the host's custom nodes, which registers their width.

Usage:
    python -m tests.synthetic.models DIR
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import adapters, catalogue, layouts, seeing

FIXTURE_PACK = Path(__file__).parent / "fixture_pack"
"""A custom-node folder for the host; it registers the nano UNets and holds no nodes."""

CHANNELS = 32
"""Width of the first level of the nano UNets; 320 in the released ones."""

CHECKPOINT = Path("checkpoints/v1-5-pruned-emaonly-fp16.safetensors")
INPAINTING = Path("checkpoints/sd-v1-5-inpainting.safetensors")
CLIP_VISION = Path("clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
OPENCLIP = Path("clip_vision/open_clip_pytorch_model.safetensors")
POSE_CONTROL = Path("controlnet/control_v11p_sd15_openpose_fp16.safetensors")
DEPTH_CONTROL = Path("controlnet/control_v11f1p_sd15_depth_fp16.safetensors")
DEPTH_T2I = Path("controlnet/t2iadapter_depth_sd15v2.pth")
ADAPTER_BASE = Path("ipadapter/ip-adapter_sd15.safetensors")
ADAPTER_PLUS = Path("ipadapter/ip-adapter-plus_sd15.safetensors")
ADAPTER_FACE = Path("ipadapter/ip-adapter-faceid-plusv2_sd15.bin")
FACE_DETECTOR = Path("insightface/models/buffalo_l/det_10g.onnx")
FACE_RECOGNISER = Path("insightface/models/buffalo_l/w600k_r50.onnx")
UNET_SD2 = Path("diffusion_models/nano_sd2.safetensors")
UNET_SDXL = Path("diffusion_models/nano_sdxl.safetensors")
UNET_KOLORS = Path("diffusion_models/nano_kolors.safetensors")

Weights = dict[str, Tensor]
Progress = Callable[[str], None]
Write = Callable[[Path], object]
"""Writes one file."""


class Noise:
    """One pool of normal numbers, read round and round: far quicker than drawing each number."""

    def __init__(self, name: str, size: int = 4_000_037) -> None:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        self.pool = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        self.position = 0

    def draw(self, shape: layouts.Shape, scale: float) -> Tensor:
        """Returns the next numbers of the pool, times `scale`, as half precision."""
        parts, missing = [], math.prod(shape)
        while missing:
            part = self.pool[self.position : self.position + missing]
            parts.append((part * scale).half())
            missing -= part.numel()
            self.position = (self.position + part.numel()) % self.pool.numel()
        return torch.cat(parts).reshape(shape)


def fill(layout: layouts.Layout, name: str) -> Weights:
    """Random weights for a layout: fan-in scaled matrices, norms near one, biases near zero.

    Args:
        layout: Key -> shape.
        name: Seeds the numbers; equal names give equal weights.
    """
    noise = Noise(name)
    weights: Weights = {}
    for key, shape in layout.items():
        if not shape:  # TAESD's vae_scale = 1 and vae_shift = 0
            weights[key] = torch.tensor(1.0 if key.endswith("scale") else 0.0).half()
        elif len(shape) > 1:
            weights[key] = noise.draw(shape, math.prod(shape[1:]) ** -0.5)
        else:
            weights[key] = noise.draw(shape, 0.02) + (1.0 if key.endswith(".weight") else 0.0)
    return weights


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def _checkpoint(latent_channels: int) -> Weights:
    unet = fill(layouts.unet(CHANNELS, latent_channels), f"unet {latent_channels}")
    seeing.predict_input(unet)
    autoencoder = fill(layouts.tiny_autoencoder(), "autoencoder")
    seeing.see_colours(autoencoder)
    return (
        _prefixed("model.diffusion_model.", unet)
        | _prefixed("first_stage_model.", autoencoder)
        | _prefixed("cond_stage_model.transformer.", fill(layouts.clip_text(), "text"))
    )


def to_openclip(vision: Weights) -> Weights:
    """Renames an image tower from Hugging Face keys to the keys of the original OpenCLIP release.

    Args:
        vision: Weights with the keys of `layouts.clip_vision_h`.

    Returns:
        The same numbers with fused query/key/value and a transposed projection, beside the small
        part of the text tower that tells an OpenCLIP file from others.
    """
    plain = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    }
    in_layer = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    renamed = {f"visual.{new}": vision[f"vision_model.{old}"] for old, new in plain.items()}
    renamed["visual.proj"] = vision["visual_projection.weight"].T.contiguous()
    layers = {key.split(".")[3] for key in vision if key.startswith("vision_model.encoder.layers.")}
    for number in layers:
        old_layer = f"vision_model.encoder.layers.{number}"
        new_layer = f"visual.transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            for old, new in in_layer.items():
                renamed[f"{new_layer}.{new}.{kind}"] = vision[f"{old_layer}.{old}.{kind}"]
            renamed[f"{new_layer}.attn.in_proj_{kind}"] = torch.cat(
                [vision[f"{old_layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            )
    text_tower = {
        "logit_scale": torch.tensor(4.6052),  # ln 100, the value it is trained up to
        "ln_final.weight": torch.ones(1024).half(),
        "ln_final.bias": torch.zeros(1024).half(),
    }
    return renamed | text_tower


def _stamp(relative: Path) -> str:
    """Changes whenever the code that makes a file does."""
    sources = [Path(__file__), Path(layouts.__file__)]
    more: dict[str, tuple[str | Path, ...]] = {
        "ipadapter": (adapters.__file__, catalogue.__file__),
        "checkpoints": (seeing.__file__,),
        "buffalo_l": (Path(__file__).with_name("face_models.py"),),  # importing it needs onnx
    }
    sources += [Path(source) for source in more.get(relative.parent.name, ())]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _build(base: Path, relative: Path, make: Callable[[], Weights], progress: Progress) -> None:
    """Writes one file of weights, in the container that its name ends with."""

    def write(path: Path) -> None:
        weights = make()
        if relative.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in weights.items()}, path)
        else:
            torch.save(weights, path)

    _build_file(base, relative, write, progress)


def _build_file(base: Path, relative: Path, write: Write, progress: Progress) -> None:
    """Writes one model file, unless this very recipe has written it already."""
    path = base / "models" / relative
    stamp = path.with_name(f".{path.name}.recipe")
    wanted = _stamp(relative)
    if path.is_file() and stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
        return
    started = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    write(unfinished)
    os.replace(unfinished, path)
    stamp.write_text(wanted, encoding="ascii")
    size, seconds = path.stat().st_size / 1e6, time.perf_counter() - started
    progress(f"{relative}  {size:.1f} MB  {seconds:.1f} s")


def _silent(_: str) -> None:
    pass


def build_checkpoints(base: Path, progress: Progress = _silent) -> None:
    """The nano SD 1.5 checkpoint and its inpainting sibling, each with text encoder and VAE."""
    _build(base, CHECKPOINT, lambda: _checkpoint(4), progress)
    _build(base, INPAINTING, lambda: _checkpoint(9), progress)


def build_clip_vision(base: Path, progress: Progress = _silent) -> None:
    """The ViT-H/14 image encoder in Hugging Face naming, 1.3 GB."""
    _build(base, CLIP_VISION, lambda: fill(layouts.clip_vision_h(), "vision"), progress)


def build_openclip(base: Path, progress: Progress = _silent) -> None:
    """The same image encoder in original OpenCLIP naming, 1.3 GB; builds the other one first."""
    build_clip_vision(base, progress)
    source = base / "models" / CLIP_VISION
    _build(base, OPENCLIP, lambda: to_openclip(load_file(source)), progress)


def build_controlnets(base: Path, progress: Progress = _silent) -> None:
    """Nano ControlNets for pose and depth, and a nano T2I-Adapter for depth."""
    control, t2i = layouts.controlnet(CHANNELS), layouts.t2i_adapter(CHANNELS)
    _build(base, POSE_CONTROL, lambda: fill(control, "pose"), progress)
    _build(base, DEPTH_CONTROL, lambda: fill(control, "depth"), progress)
    _build(base, DEPTH_T2I, lambda: fill(t2i, "depth t2i"), progress)


def build_adapters(base: Path, progress: Progress = _silent) -> None:
    """IP-Adapter, IP-Adapter Plus and FaceID-PlusV2 with its LoRA, as wide as the nano UNet."""
    widths, face = adapters.NANO_WIDTHS, catalogue.ROWS["faceid-plusv2_sd15"]
    _build(base, ADAPTER_BASE, lambda: adapters.base_sd15(widths=widths), progress)
    _build(base, ADAPTER_PLUS, lambda: adapters.plus_sd15(widths=widths), progress)
    _build_file(base, ADAPTER_FACE, lambda path: adapters.write(face, path, nano=True), progress)


def build_face_models(base: Path, progress: Progress = _silent) -> None:
    """A detector and a recogniser that see a face in a disc, red above blue: see `face_models`."""
    for file, kind in ((FACE_DETECTOR, "detector"), (FACE_RECOGNISER, "recogniser")):
        _build_file(base, file, partial(_write_face_model, kind), progress)


def _write_face_model(kind: str, path: Path) -> None:
    from . import face_models  # with onnx, for which other builders have no need

    model = face_models.detector() if kind == "detector" else face_models.recogniser()
    path.write_bytes(model.SerializeToString())


def build_unets(base: Path, progress: Progress = _silent) -> None:
    """Nano UNets of the other families, alone as the host's loader of diffusion models takes them.

    22, 114 and 131 MB: SDXL and Kolors read text states of full width in 70 layers.
    """
    for path, topology in (
        (UNET_SD2, layouts.SD2),
        (UNET_SDXL, layouts.SDXL),
        (UNET_KOLORS, layouts.KOLORS),
    ):
        layout = layouts.unet(CHANNELS, topology=topology)
        _build(base, path, lambda layout=layout, name=path.stem: fill(layout, name), progress)


def build_models(base: Path, progress: Progress | None = None) -> None:
    """Everything the shipped workflows name; files already built are left alone.

    Left out: the OpenCLIP twin of the image encoder (`build_openclip`) and the UNets of other
    families (`build_unets`).

    Args:
        base: The host's base directory; files go to `base/models/...`.
        progress: Receives one line per file written.
    """
    parts = (
        build_checkpoints,
        build_clip_vision,
        build_controlnets,
        build_adapters,
        build_face_models,
    )
    for build in parts:
        build(base, progress or _silent)


if __name__ == "__main__":
    build_models(Path(sys.argv[1]), print)
    build_openclip(Path(sys.argv[1]), print)
    build_unets(Path(sys.argv[1]), print)
