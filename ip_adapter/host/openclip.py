"""An OpenCLIP tower as the host's CLIP_VISION: our nodes and the host's own can both use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from .. import images
from ..checkpoint import read_tensors
from ..openclip import OpenCLIPTower, load_tower


class OpenCLIPVision:
    """Stands where the host expects its ``ClipVisionModel``.

    The tower is made of open_clip's own layers, which do not cast, so it is kept in one dtype:
    float16 where the host computes in it, else float32. The plain `ModelPatcher` manages it; the
    dynamic one only pages the host's own layers.
    """

    def __init__(self, tower: OpenCLIPTower) -> None:
        self.load_device = comfy.model_management.text_encoder_device()
        offload_device = comfy.model_management.text_encoder_offload_device()
        computes_half = comfy.model_management.should_use_fp16(
            self.load_device, prioritize_performance=False
        )
        self.dtype = torch.float16 if computes_half else torch.float32
        self.model = tower.to(self.dtype)
        self.image_size = tower.image_size
        self.image_mean = list(images.CLIP_MEAN)
        self.image_std = list(images.CLIP_STD)
        self.model_type = "clip_vision_model"
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.model, load_device=self.load_device, offload_device=offload_device
        )

    def get_sd(self) -> dict[str, Tensor]:
        """The weights, as the host's class gives them."""
        return self.model.state_dict()

    def encode_image(self, image: Tensor, crop: bool = True) -> Any:
        """Encode pictures as the host's class does, for the host's own nodes.

        Args:
            image: ``[B, H, W, C]`` in 0..1.
            crop: Keep the centre square; otherwise squash the whole picture into a square.

        Returns:
            The host's ``Output`` with ``last_hidden_state`` and ``penultimate_hidden_states``
            ``[B, P, W]`` and ``image_embeds`` ``[B, E]``.
        """
        comfy.model_management.load_model_gpu(self.patcher)
        pixel_values = comfy.clip_vision.clip_preprocess(
            image.to(self.load_device),
            size=self.image_size,
            mean=self.image_mean,
            std=self.image_std,
            crop=crop,
        ).float()
        last, penultimate, embeds, projected = self.model(pixel_values, intermediate_output=-2)
        device = comfy.model_management.intermediate_device()
        out = comfy.clip_vision.Output()
        out["last_hidden_state"] = last.to(device)
        out["penultimate_hidden_states"] = penultimate.to(device)
        out["image_embeds"] = embeds.to(device)
        out["image_sizes"] = [pixel_values.shape[1:]] * pixel_values.shape[0]
        out["mm_projected"] = projected
        return out


def load(path: Path) -> OpenCLIPVision:
    """Read the visual half of an original OpenCLIP file.

    Raises:
        CheckpointError: See `checkpoint.read_tensors` and `openclip.load_tower`.
    """
    return OpenCLIPVision(load_tower(read_tensors(path), path.name))
