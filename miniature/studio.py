"""Pictures by the miniature in this process, through the host's own loaders and sampler.

What the evidence and its tests measure is made here: many pictures at once, each with its own
text, reference, hint and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ip_adapter.host.standalone import Models

from . import family, process

STEPS, GUIDANCE = 20, 4.0
SAMPLER, SCHEDULER = "euler", "normal"
CHUNK = 32
"""Pictures in one run of the sampler."""

Base = Literal["base", "fine_tune"]


@dataclass(frozen=True, eq=False)
class Studio:
    """The miniature's models as the host holds them.

    Attributes:
        models: Base UNet, text encoder, VAE and image encoder.
        fine_tune: MODEL of the fine-tuned UNet.
        control: CONTROL_NET.
        adapters: `ip_adapter.host.adapters.LoadedAdapter` by name.
    """

    models: Models
    fine_tune: Any
    control: Any
    adapters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls) -> Studio:
        """Load every file; the host is started first if it is not running."""
        process.start(cpu=True)  # so that figures compare
        import comfy.controlnet
        import comfy.sd

        with torch.inference_mode():
            studio = cls(
                process.load(),
                comfy.sd.load_diffusion_model(str(family.FINE_TUNE)),
                comfy.controlnet.load_controlnet(str(family.CONTROLNET)),
            )
        for folder in (family.ADAPTERS, family.ABLATION):
            for path in sorted(folder.glob("*.safetensors")):
                studio.load_adapter(path.stem.removeprefix("miniature_"), path)
        return studio

    def load_adapter(self, name: str, path: Path) -> None:
        """Load a further adapter under a name."""
        from ip_adapter.host import adapters
        from ip_adapter.train import state

        with torch.inference_mode():
            if name.startswith("simple"):
                # Its file holds a projection alone; keys and values of another are never read.
                loaded = adapters.load(family.ADAPTERS / "miniature_global.safetensors")
                state.read_into(loaded.module, path)
            else:
                loaded = adapters.load(path)
        self.adapters[name] = loaded

    @torch.inference_mode()
    def make(
        self,
        texts: Sequence[str],
        *,
        references: Tensor | None = None,
        adapter: str = "global",
        weight: float = 1.0,
        on: Base = "base",
        hints: Tensor | None = None,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        denoise: float = 1.0,
        seed: int = 0,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
    ) -> Tensor:
        """Make one picture for each text.

        Args:
            texts: N prompts, which may be empty.
            references: ``[N, 3, 64, 64]`` in 0..1, each picture's own; None for no image prompt.
            adapter: A key of `adapters`; ``simple...`` are coupled ones, which have no weight.
            weight: The paper's lambda.
            on: Which UNet.
            hints: ``[N, 3, 64, 64]`` for the ControlNet.
            start: ``[N, 3, 64, 64]`` in 0..1, pictures to start from.
            mask: ``[N, 64, 64]`` in 0..1, where the pictures to start from may change.
            denoise: How much of the schedule runs on the pictures to start from.
            seed: Of the first picture's noise; the next have the next.
            steps: Of the sampler.
            guidance: Scale of classifier-free guidance.

        Returns:
            ``[N, 3, 64, 64]`` in 0..1.
        """
        made = []
        for first in range(0, len(texts), CHUNK):
            part = slice(first, first + CHUNK)
            made.append(
                self._make(
                    texts[part],
                    *(None if t is None else t[part] for t in (references, hints, start, mask)),
                    adapter=adapter,
                    weight=weight,
                    model=self.models.model if on == "base" else self.fine_tune,
                    denoise=denoise,
                    seed=seed + first,
                    steps=steps,
                    guidance=guidance,
                )
            )
        return torch.cat(made)

    def _make(
        self,
        texts: Sequence[str],
        references: Tensor | None,
        hints: Tensor | None,
        start: Tensor | None,
        mask: Tensor | None,
        *,
        adapter: str,
        weight: float,
        model: Any,
        denoise: float,
        seed: int,
        steps: int,
        guidance: float,
    ) -> Tensor:
        import comfy.sample

        from ip_adapter.host import encoding, patching

        positive, negative = self._text(texts), self._text([""] * len(texts))
        if references is not None:
            chosen = self.adapters[adapter]
            pictures = references.movedim(1, -1)
            prompt = encoding.encode(
                chosen, self.models.clip_vision, pictures, "crop", per_frame=True
            )
            if adapter.startswith("simple"):
                positive = torch.cat((positive, prompt.conditional), dim=1)
                nothing = prompt.unconditional.expand(len(texts), -1, -1)
                negative = torch.cat((negative, nothing), dim=1)
            else:
                model = patching.apply(model, chosen, prompt, weight=weight)[0]
        extra = {}
        if hints is not None:
            extra = {"control": self._hinted(hints), "control_apply_to_uncond": False}
        seeds = range(seed, seed + len(texts))
        noise = torch.cat(
            [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )
        latents = torch.zeros_like(noise)
        if start is not None:
            latents = self.models.vae.encode(start.movedim(1, -1))
        found = comfy.sample.sample(
            model,
            noise,
            steps,
            guidance,
            SAMPLER,
            SCHEDULER,
            [[positive, dict(extra)]],
            [[negative, dict(extra)]],
            latents,
            denoise=denoise,
            noise_mask=None if mask is None else mask.unsqueeze(1),
            disable_pbar=True,
            seed=seed,
        )
        pictures = self.models.vae.decode(found).movedim(-1, 1)
        return pictures.float().clamp(0, 1).cpu()

    def _text(self, texts: Sequence[str]) -> Tensor:
        states = [self.models.clip.encode_from_tokens(self.models.clip.tokenize(t)) for t in texts]
        return torch.cat(states)

    def _hinted(self, hints: Tensor) -> Any:
        return self.control.copy().set_cond_hint(hints, 1.0, (0.0, 1.0))
