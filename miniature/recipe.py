"""The parts of the miniature in the order in which they are trained, and from what.

vae -> base -> checkpoint -> control, fine_tune, adapters
vae -> decoder -> checkpoint, pairs -> adapters
clip -> base, pairs
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from ip_adapter.host.standalone import Models

from . import adapters, assemble, clip, family, process

VAE = family.BUILD / "vae.safetensors"
DECODER = family.BUILD / "decoder.safetensors"
UNET = family.BUILD / "unet.safetensors"
PAIRS = family.BUILD / "adapters" / "pairs" / "rows.jsonl"


@dataclass(frozen=True)
class Part:
    """One training.

    Attributes:
        made: The file that it leaves.
        needs: Parts that come before.
        train: What to do.
    """

    made: Path
    needs: tuple[str, ...]
    train: Callable[[], None]

    @property
    def is_shipped(self) -> bool:
        """Whether the file goes into the repository."""
        return family.BUILD not in self.made.parents


def _vae() -> None:
    from . import vae

    process.start()
    assemble.write(vae.train(), VAE)


def _clip() -> None:
    clip.save(clip.train(), family.CLIP)


def _base() -> None:
    process.start()
    from . import base

    assemble.write(base.train(_without_base(VAE)), UNET)


def _decoder() -> None:
    from . import vae

    process.start()
    assemble.write(vae.refine(load_file(VAE)), DECODER)


def _checkpoint() -> None:
    assemble.checkpoint(load_file(UNET), load_file(family.CLIP_VISION), load_file(DECODER))


def _fine_tune() -> None:
    process.start()
    from . import base

    assemble.write(base.fine_tune(process.load(), assemble.unet()), family.FINE_TUNE)


def _control() -> None:
    process.start()
    from . import control

    assemble.write(control.train(process.load(), assemble.unet()), family.CONTROLNET)


def _pairs() -> None:
    process.start()
    adapters.cache(_without_base(DECODER), adapters.write_pairs(PAIRS))


def _without_base(vae: Path) -> Models:
    """Text encoder, VAE and image encoder, with an untrained UNet."""
    from . import networks

    draft = vae.with_name(f"{vae.stem}_draft.safetensors")
    unet = networks.unet().state_dict()
    assemble.checkpoint(unet, load_file(family.CLIP_VISION), load_file(vae), draft)
    return process.load(draft)


def _adapter(kind: adapters.Kind, seed: int) -> Callable[[], None]:
    def train() -> None:
        process.start()
        run = PAIRS.parent / f"{kind}_{seed}"
        shutil.rmtree(run, ignore_errors=True)
        made = adapters.train(kind, process.load(), PAIRS, run, seed=seed)
        target = adapters.path(kind, seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, target)

    return train


PARTS: dict[str, Part] = {
    "vae": Part(VAE, (), _vae),
    "clip": Part(family.CLIP_VISION, (), _clip),
    "base": Part(UNET, ("vae", "clip"), _base),
    "decoder": Part(DECODER, ("vae",), _decoder),
    "checkpoint": Part(family.BASE, ("base", "decoder"), _checkpoint),
    "pairs": Part(PAIRS.parent / "cached", ("decoder", "clip"), _pairs),
    "control": Part(family.CONTROLNET, ("checkpoint",), _control),
    "fine_tune": Part(family.FINE_TUNE, ("checkpoint",), _fine_tune),
    **{
        f"{kind}_{seed}": Part(
            adapters.path(kind, seed), ("checkpoint", "pairs"), _adapter(kind, seed)
        )
        for seed in adapters.SEEDS
        for kind in adapters.KINDS
    },
}
"""Every training by name, in order of importance."""
