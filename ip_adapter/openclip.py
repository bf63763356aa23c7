"""The visual tower of an original OpenCLIP checkpoint, run by open_clip itself.

OpenCLIP publishes the encoders of IP-Adapter as one file with a text and a visual half. This
module picks the architecture from the tensors, builds only the visual half and gives its three
outputs the names that the host's CLIP Vision uses. It needs no conversion of keys.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoders import MINIATURE, locate, recognise
from .errors import CheckpointError

log = logging.getLogger(__name__)

ARCHITECTURES = ("ViT-H-14", "ViT-bigG-14", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu")
"""open_clip's names of the towers that published adapters read.

Tensors do not tell the activation. The published adapters for ViT-L were trained on OpenAI's
weights, which use quick GELU; those for the larger towers on LAION's, which use the exact one.
"""


def resize_positions(table: Tensor, grid: tuple[int, int], *, has_class_token: bool) -> Tensor:
    """Fit a table of learned positions to a picture of another size.

    The class token's position is kept; the others are interpolated (bicubic), as transformers does
    in ``interpolate_pos_encoding``.

    Args:
        table: ``[P, W]``, a square grid of positions, row by row.
        grid: Patches down and across that are wanted.
        has_class_token: Whether the first row belongs to a class token.

    Returns:
        ``[grid[0] * grid[1] + has_class_token, W]`` in the table's dtype; the table itself where
        it already fits.
    """
    first, patches = table[: int(has_class_token)], table[int(has_class_token) :]
    side = int(len(patches) ** 0.5)
    if grid == (side, side):
        return table
    square = patches.float().T.reshape(1, -1, side, side)  # [1, W, side, side]
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat((first, resized[0].flatten(1).T.to(table.dtype)))


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
            pixel_values: ``[N, 3, H, W]``, normalised with CLIP's mean and deviation. Another size
                than the tower's own stretches its table of positions; see `resize_positions`.
            intermediate_output: Which layer's output to return beside the last; -2 is the
                penultimate.

        Returns:
            Last hidden states ``[N, P, W]``, the intermediate ones ``[N, P, W]`` (both before the
            final LayerNorm), the projected embedding ``[N, E]``, and None where the host's class
            has a multimodal projection.
        """
        visual = self.visual
        patches = visual.conv1(pixel_values.to(visual.conv1.weight.dtype))  # [N, W, h, w]
        positions = resize_positions(
            visual.positional_embedding,
            (patches.shape[-2], patches.shape[-1]),
            has_class_token=True,
        )
        class_token = visual.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat((class_token, patches.flatten(2).transpose(1, 2)), dim=1)  # [N, P, W]
        x = visual.ln_pre(x + positions)
        depth = len(visual.transformer.resblocks)
        last, (intermediate,) = visual.transformer.forward_intermediates(
            x, indices=[depth + intermediate_output]
        )
        embedding = visual.ln_post(last[:, 0]) @ visual.proj
        return last.float(), intermediate.float(), embedding.float(), None


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

    place = locate(tensors)
    if place is None or place.naming != "open_clip":
        raise CheckpointError(f"'{name}' is not an original OpenCLIP file: {_instead(tensors)}")
    start = len(place.prefix)
    visual = {key[start:]: t for key, t in tensors.items() if key.startswith(place.prefix)}
    architecture, config = _architecture(tensors, name)
    with torch.device("meta"):
        tower = open_clip.model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )
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


def _architecture(tensors: Mapping[str, Tensor], name: str) -> tuple[str, dict[str, Any]]:
    """The name of a tower and open_clip's configuration, at the size of the tower's positions."""
    given = recognise({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    width, layers, size = (given.hidden, given.layers, given.size) if given else (0, 0, 0)
    found: list[tuple[str, dict[str, Any]]] = []
    for architecture, config in _known():
        vision = config["vision_cfg"]
        if (vision["width"], vision["layers"]) == (width, layers):
            found.append((architecture, config))
    if not found:
        raise CheckpointError(
            f"'{name}' is an OpenCLIP tower of width {width} with {layers} layers; IP-Adapters "
            f"need one of {', '.join(ARCHITECTURES)}. Get the encoder that the adapter names."
        )
    for architecture, config in found:
        if config["vision_cfg"]["image_size"] == size:
            return architecture, config
    architecture, config = found[0]
    if size:
        log.info("'%s' is a %s made for %d pixels", name, architecture, size)
        config["vision_cfg"]["image_size"] = size
    return architecture, config


def _known() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every tower that can be built, with a configuration that the caller may change."""
    import open_clip

    for architecture in ARCHITECTURES:
        yield architecture, open_clip.get_model_config(architecture)
    vision = {
        "image_size": MINIATURE.size,
        "layers": MINIATURE.layers,
        "width": MINIATURE.hidden,
        "head_width": 32,
        "patch_size": MINIATURE.patch,
    }
    yield MINIATURE.name, {"embed_dim": MINIATURE.pooled, "vision_cfg": vision}


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
