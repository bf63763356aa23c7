"""The command line of the evaluator: the paper's COCO protocol on your weights.

Usage, in the pack's folder:
    python -m ip_adapter.evaluate --data coco --checkpoint sd15.safetensors \
        --adapter ip-adapter_sd15.safetensors --encoder CLIP-ViT-H-14.safetensors --out results
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch

from ..checkpoint import digest
from ..errors import IPAdapterError, MissingFileError
from ..host import standalone
from ..images import Fit
from . import evaluation, generate, report, scorer
from .data import read_samples
from .protocol import CONDITIONS, ModelCard, Models, Protocol, Sampling, Scoring


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an evaluation; the exit status is 0, 1 if something was refused, 130 if stopped."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (IPAdapterError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\nStopped. The same command goes on from here; see {options.out}.\n")
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    _require_files(options)
    chosen = {field.name: getattr(options, field.name) for field in fields(Sampling)}
    sampling = Sampling(**chosen)
    samples, data = read_samples(options.data, options.limit)
    device = standalone.start(cpu=options.cpu)
    clip = scorer.load_clip(options.scorer, options.scorer_weights, device)
    dino = None
    if options.dino:
        dino = scorer.load_dino(options.dino, options.dino_weights, device)
    protocol = Protocol(
        data=data,
        models=Models(
            **{
                name: ModelCard(path.name, digest(path))
                for name, path in (
                    ("checkpoint", options.checkpoint),
                    ("adapter", options.adapter),
                    ("encoder", options.encoder),
                )
            }
        ),
        sampling=sampling,
        scoring=Scoring(clip.card, dino.card if dino else None, options.caption_prefix),
        conditions=tuple(c for c in CONDITIONS if _dashed(c) in options.conditions),
    )
    for name, value in protocol.flat().items():
        _say(f"{name} = {value!r}")
    generator = generate.HostGenerator.load(
        options.checkpoint, options.adapter, options.encoder, sampling
    )
    scores = evaluation.evaluate(
        protocol,
        samples,
        clip=clip,
        dino=dino,
        generator=generator,
        folder=options.out,
        progress=partial(_progress, pictures=sampling.pictures),
    )
    results = report.summarise(protocol, scores, _environment(device))
    files = report.write(options.out, results, protocol, samples)
    _say(report.markdown(results).split("## Protocol")[0])
    _say("\n".join(str(file) for file in files))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ip_adapter.evaluate",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    need = partial(add, type=Path, required=True, default=argparse.SUPPRESS)
    need("--data", help="a COCO folder, or a .jsonl with image and caption in each line")
    need("--checkpoint", help="base model with text encoder and VAE")
    need("--adapter", help="the IP-Adapter")
    need("--encoder", help="the image encoder that it was trained with")
    need("--out", help="folder for results; one protocol each")
    add("--limit", type=int, help="only the first so many samples")
    names = [_dashed(condition) for condition in CONDITIONS]
    add("--conditions", nargs="+", choices=names, default=names, help="rows of the table")
    default = Sampling()
    add("--pictures", type=int, default=default.pictures, help="for each sample")
    add("--seed", type=int, default=default.seed, help="base of all seeds and of the shuffling")
    add("--width", type=int, default=default.width, help="in pixels")
    add("--height", type=int, default=default.height, help="in pixels")
    add("--steps", type=int, default=default.steps, help="of denoising")
    add("--sampler", default=default.sampler, help="the host's name")
    add("--scheduler", default=default.scheduler, help="the host's name")
    add("--guidance", type=float, default=default.guidance, help="classifier-free guidance scale")
    add("--weight", type=float, default=default.weight, help="of the image prompt: lambda")
    add("--text", default=default.text, help="text prompt; '{caption}' stands for the caption")
    add("--negative", default=default.negative, help="negative text prompt")
    add("--fit", choices=get_args(Fit), default=default.fit, help="how references become square")
    add("--scorer", default=scorer.CLIP[0], help="open_clip's name, or local-dir:FOLDER")
    add("--scorer-weights", default=scorer.CLIP[1], help="pretrained tag or file")
    add(
        "--caption-prefix", default="", help="before captions in CLIP-T, such as 'A photo depicts '"
    )
    add("--dino", nargs="?", const=scorer.DINO, help=f"also DINO-I; timm's name ({scorer.DINO})")
    add("--dino-weights", help="a file; downloaded by timm unless given")
    add("--cpu", action="store_true", help="use no accelerator")
    return parser


def _dashed(condition: str) -> str:
    return condition.replace(" ", "-")


def _require_files(options: argparse.Namespace) -> None:
    for name in ("checkpoint", "adapter", "encoder"):
        path: Path = getattr(options, name)
        if not path.is_file():
            raise MissingFileError(f"--{name}: there is no file {path}.")


def _environment(device: str) -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "open_clip_torch", "pillow")}
    try:
        found["comfyui"] = str(import_module("comfyui_version").__version__)
    except ImportError:
        found["comfyui"] = "unknown"
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return found | {"python": platform.python_version(), "device": name}


def _progress(done: int, total: int, seconds: float, *, pictures: int) -> None:
    if done % (10 * pictures) == 0 or done == total:
        left = (total - done) * seconds / 3600
        _say(f"{done} of {total} pictures, the last {seconds:.2f} s each; {left:.1f} h left")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
