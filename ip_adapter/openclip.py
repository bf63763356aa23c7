"""The visual tower of an original OpenCLIP checkpoint, run by open_clip itself.

OpenCLIP publishes the encoders of IP-Adapter as one file with a text and a visual half. This
module picks the architecture from the tensors, builds only the visual half and gives its three
outputs the names that the host's CLIP Vision uses. It needs no conversion of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError

ARCHITECTURES = ("ViT-H-14", "ViT-bigG-14")
"""open_clip's names of the towers that published adapters read."""

_PREFIX = "visual."


class OpenCLIPTower(nn.Module):
    """open_clip's ``VisionTransformer`` with the outputs an image prompt needs."""

    def __init__(self, visual: Any, architecture: str, hidden: int, pooled: int) -> None:
        super().__init__()
        self.visual: Any = visual
        self.architecture = architecture
        self.hidden = hidden
        self.pooled = pooled

    @property
    def image_size(self) -> int:
        """Input size in pixels."""
        size = self.visual.image_size
        return int(size[0] if isinstance(size, tuple) else size)

    def forward(
        self, pixel_values: Tensor, intermediate_output: int = -2
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Encode normalised pixels.

        Args:
            pixel_values: ``[N, 3, S, S]``, normalised with CLIP's mean and deviation.
            intermediate_output: Which layer's output to return beside the last; -2 is the
                penultimate.

        Returns:
            Last hidden states ``[N, P, W]``, the intermediate ones ``[N, P, W]`` (both before the
            final LayerNorm), the projected embedding ``[N, E]``, and None where the host's class
            has a multimodal projection.
        """
        depth = len(self.visual.transformer.resblocks)
        out = self.visual.forward_intermediates(
            pixel_values.to(next(self.parameters()).dtype),
            indices=[depth + intermediate_output, depth - 1],
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        intermediate, last = (
            torch.cat((prefix, patches), dim=1).float()
            for prefix, patches in zip(
                out["image_intermediates_prefix"], out["image_intermediates"], strict=True
            )
        )
        return last, intermediate, out["image_features"].float(), None


def load_tower(tensors: Mapping[str, Tensor], name: str) -> OpenCLIPTower:
    """Build the visual tower that an OpenCLIP state dict holds.

    Args:
        tensors: The whole checkpoint, text half included.
        name: What to call the file in messages.

    Returns:
        The tower; its parameters are the given tensors, in their own dtype.

    Raises:
        CheckpointError: No OpenCLIP visual tower, one of an unknown shape, or tensors are missing.
    """
    import open_clip

    visual = {k.removeprefix(_PREFIX): v for k, v in tensors.items() if k.startswith(_PREFIX)}
    if "transformer.resblocks.0.attn.in_proj_weight" not in visual:
        raise CheckpointError(f"'{name}' is not an original OpenCLIP file: {_instead(tensors)}")
    architecture = _architecture(visual, name)
    config = open_clip.get_model_config(architecture)
    with torch.device("meta"):
        tower = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"])
    expected = tower.state_dict()
    missing = [key for key in expected if key not in visual]
    wrong = [k for k in expected if k in visual and visual[k].shape != expected[k].shape]
    if missing or wrong:
        raise CheckpointError(
            f"'{name}' looks like {architecture} but {len(missing)} tensors are missing and "
            f"{len(wrong)} have another shape (first: {(missing + wrong)[0]}). Download it again."
        )
    tower.load_state_dict({key: visual[key] for key in expected}, assign=True)
    return OpenCLIPTower(
        tower.eval().requires_grad_(False),
        architecture,
        hidden=config["vision_cfg"]["width"],
        pooled=config["embed_dim"],
    )


def _architecture(visual: Mapping[str, Tensor], name: str) -> str:
    import open_clip

    width = visual["conv1.weight"].shape[0] if "conv1.weight" in visual else 0
    blocks = {key.split(".")[2] for key in visual if key.startswith("transformer.resblocks.")}
    for architecture in ARCHITECTURES:
        vision = open_clip.get_model_config(architecture)["vision_cfg"]
        if (vision["width"], vision["layers"]) == (width, len(blocks)):
            return architecture
    raise CheckpointError(
        f"'{name}' is an OpenCLIP tower of width {width} with {len(blocks)} layers; IP-Adapters "
        f"need one of {', '.join(ARCHITECTURES)}. Get the encoder that the adapter names."
    )


def _instead(tensors: Mapping[str, Tensor]) -> str:
    if any(key.startswith("vision_model.") for key in tensors):
        return (
            "its tensors have Hugging Face names (vision_model.*). Use the Load CLIP Vision node "
            "for this file."
        )
    return (
        "it has no tensors 'visual.transformer.*'. Get open_clip_pytorch_model.bin or "
        "open_clip_model.safetensors of ViT-H-14 or ViT-bigG-14."
    )
