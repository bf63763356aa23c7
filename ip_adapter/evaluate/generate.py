"""Pictures by the real ComfyUI in this process: its loaders, text encoder, sampler and decoder.

The image prompt is made and applied by the same code as in the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingFileError
from ..host import standalone
from .data import open_picture, to_tensor
from .errors import ProtocolError
from .protocol import Condition, Row, Sampling

_TEXTS = 16
"""Encoded texts that are kept; without captions there are two."""


class HostGenerator:
    """Makes the pictures of rows with models that the host has loaded.

    Args:
        model: The host's MODEL.
        clip: The host's CLIP.
        vae: The host's VAE.
        adapter: A `host.adapters.LoadedAdapter` that reads pictures.
        clip_vision: Its image encoder; see `host.vision.load`.
        sampling: Size, steps and the rest.
    """

    def __init__(
        self, model: Any, clip: Any, vae: Any, adapter: Any, clip_vision: Any, sampling: Sampling
    ) -> None:
        import comfy.samplers

        for name, known in (
            (sampling.sampler, comfy.samplers.SAMPLER_NAMES),
            (sampling.scheduler, comfy.samplers.SCHEDULER_NAMES),
        ):
            if name not in known:
                raise ProtocolError(
                    f"This ComfyUI has no sampler or scheduler {name!r}; it has {', '.join(known)}."
                )
        self.model, self.clip, self.vae = model, clip, vae
        self.adapter, self.clip_vision, self.sampling = adapter, clip_vision, sampling
        self._texts: dict[str, Any] = {}

    @classmethod
    @torch.inference_mode()
    def load(
        cls, checkpoint: Path, adapter: Path, encoder: Path, sampling: Sampling
    ) -> HostGenerator:
        """Load the models; `host.standalone.start` comes first.

        Args:
            checkpoint: With UNet, text encoder and VAE.
            adapter: Of any published format.
            encoder: The image encoder that the adapter was trained with.
            sampling: See the class.

        Raises:
            CheckpointError: See `host.standalone.load` and `host.adapters.load`.
            IncompatibleModelError: See `host.adapters.load`.
            MissingFileError: A file is not there.
            ProtocolError: The host has no such sampler or scheduler.
        """
        if not adapter.is_file():
            raise MissingFileError(
                f"There is no file '{adapter}'. Give --adapter the path of an adapter."
            )
        models = standalone.load(checkpoint, encoder)
        from ..host import adapters

        loaded = adapters.load(adapter)
        return cls(models.model, models.clip, models.vae, loaded, models.clip_vision, sampling)

    @torch.inference_mode()
    def generate(self, row: Row, seeds: Sequence[int], condition: Condition) -> Tensor:
        """Make the pictures of a row.

        Each picture's first noise is drawn from its own seed. Samplers that add noise on the way
        draw that for the whole batch from the first seed.

        Args:
            row: Reference and text.
            seeds: One for each picture.
            condition: Not needed: the row says it all.

        Returns:
            ``[K, height, width, 3]`` in 0..1.

        Raises:
            ImageError: The reference cannot be read.
            IncompatibleModelError: Models do not belong together.
        """
        import comfy.sample

        chosen = self.sampling
        model = self.model if row.reference is None else self._prompted(row.reference)
        latent_format = self.model.get_model_object("latent_format")
        channels = int(latent_format.latent_channels)
        factor = int(getattr(latent_format, "spacial_downscale_ratio", 8))
        shape = (1, channels, chosen.height // factor, chosen.width // factor)
        noise = torch.cat(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        latents = comfy.sample.sample(
            model,
            noise,
            chosen.steps,
            chosen.guidance,
            chosen.sampler,
            chosen.scheduler,
            self._text(row.text),
            self._text(chosen.negative),
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=seeds[0],
        )
        pictures: Tensor = self.vae.decode(latents)
        return pictures.reshape(-1, *pictures.shape[-3:]).float().cpu()

    def _prompted(self, reference: Path) -> Any:
        from ..host import encoding, patching

        image = to_tensor(open_picture(reference))
        prompt = encoding.encode(self.adapter, self.clip_vision, image, self.sampling.fit)
        return patching.apply(self.model, self.adapter, prompt, weight=self.sampling.weight)[0]

    def _text(self, words: str) -> Any:
        if words not in self._texts:
            if len(self._texts) >= _TEXTS:
                self._texts.clear()
            tokens = self.clip.tokenize(words)
            self._texts[words] = self.clip.encode_from_tokens_scheduled(tokens)
        return self._texts[words]
