"""Which tensors the published files of the Stable Diffusion families hold: key -> shape.

Each function walks a network in the order of its paper and writes down the names that the released
checkpoints use. Nothing here holds numbers: `models.py` fills the tables with random ones.

Sources: Stable Diffusion v1 (`v1-inference.yaml`), v2 (`v2-inference.yaml`) and XL
(`sd_xl_base.yaml`), Kolors (`unet/config.json`), ControlNet 1.1 (`cldm_v15.yaml`), T2I-Adapter,
TAESD, CLIP ViT-L/14 text and OpenCLIP ViT-H/14 image towers as Hugging Face names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

Shape = tuple[int, ...]
Layout = dict[str, Shape]


@dataclass(frozen=True)
class Topology:
    """What tells the UNets of the families apart, but for their width.

    Attributes:
        multipliers: Width of each resolution level, as a multiple of the first.
        depths: Transformer blocks in each attention layer of a level.
        middle: Transformer blocks in the middle.
        context: Width of the text states that cross-attention reads.
        is_linear: Whether transformers are entered by a Linear or by a 1 x 1 convolution.
        label: Width of the vector embedded beside the time: pooled text and picture sizes.
        states: Width of text states that a Linear of the UNet first turns into `context`.
    """

    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    context: int
    is_linear: bool = False
    label: int | None = None
    states: int | None = None


SD15 = Topology((1, 2, 4, 4), (1, 1, 1, 0), 1, context=768)
SD2 = Topology((1, 2, 4, 4), (1, 1, 1, 0), 1, context=1024, is_linear=True)
SDXL = Topology((1, 2, 4), (0, 2, 10), 10, context=2048, is_linear=True, label=2816)
KOLORS = Topology((1, 2, 4), (0, 2, 10), 10, context=2048, is_linear=True, label=5632, states=4096)

TEXT_WIDTH = SD15.context
"""Width of CLIP ViT-L/14's text states."""

MULTIPLIERS = SD15.multipliers
"""Width of each SD 1.5 resolution level, as a multiple of the first."""


def _layer(name: str, out: int, *inner: int, bias: bool = True) -> Layout:
    layout: Layout = {f"{name}.weight": (out, *inner)}
    return layout | {f"{name}.bias": (out,)} if bias else layout


def _residual(name: str, width_in: int, width: int, time_width: int) -> Layout:
    layout = (
        _layer(f"{name}.in_layers.0", width_in)
        | _layer(f"{name}.in_layers.2", width, width_in, 3, 3)
        | _layer(f"{name}.emb_layers.1", width, time_width)
        | _layer(f"{name}.out_layers.0", width)
        | _layer(f"{name}.out_layers.3", width, width, 3, 3)
    )
    if width_in != width:
        layout |= _layer(f"{name}.skip_connection", width, width_in, 1, 1)
    return layout


def _attention(name: str, width: int, context: int) -> Layout:
    return (
        _layer(f"{name}.to_q", width, width, bias=False)
        | _layer(f"{name}.to_k", width, context, bias=False)
        | _layer(f"{name}.to_v", width, context, bias=False)
        | _layer(f"{name}.to_out.0", width, width)
    )


def _transformer(name: str, width: int, topology: Topology, depth: int) -> Layout:
    kernel = () if topology.is_linear else (1, 1)
    layout = _layer(f"{name}.norm", width) | _layer(f"{name}.proj_in", width, width, *kernel)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        layout |= (
            _attention(f"{block}.attn1", width, width)
            | _layer(f"{block}.ff.net.0.proj", 8 * width, width)
            | _layer(f"{block}.ff.net.2", width, 4 * width)
            | _attention(f"{block}.attn2", width, topology.context)
            | _layer(f"{block}.norm1", width)
            | _layer(f"{block}.norm2", width)
            | _layer(f"{block}.norm3", width)
        )
    return layout | _layer(f"{name}.proj_out", width, width, *kernel)


def _input_blocks(
    channels: int, latent_channels: int, topology: Topology
) -> Iterator[tuple[Layout, int]]:
    """The blocks of the way down, each with its width."""
    yield _layer("input_blocks.0.0", channels, latent_channels, 3, 3), channels
    width, number = channels, 1
    for level, multiplier in enumerate(topology.multipliers):
        for _ in range(2):
            name = f"input_blocks.{number}"
            layout = _residual(f"{name}.0", width, channels * multiplier, 4 * channels)
            width = channels * multiplier
            if topology.depths[level]:
                layout |= _transformer(f"{name}.1", width, topology, topology.depths[level])
            yield layout, width
            number += 1
        if level < len(topology.multipliers) - 1:
            yield _layer(f"input_blocks.{number}.0.op", width, width, 3, 3), width
            number += 1


def _time_and_middle(channels: int, topology: Topology) -> Layout:
    time_width, width = 4 * channels, channels * topology.multipliers[-1]
    layout = _layer("time_embed.0", time_width, channels)
    layout |= _layer("time_embed.2", time_width, time_width)
    if topology.label is not None:
        layout |= _layer("label_emb.0.0", time_width, topology.label)
        layout |= _layer("label_emb.0.2", time_width, time_width)
    return (
        layout
        | _residual("middle_block.0", width, width, time_width)
        | _transformer("middle_block.1", width, topology, topology.middle)
        | _residual("middle_block.2", width, width, time_width)
    )


def unet(channels: int, latent_channels: int = 4, topology: Topology = SD15) -> Layout:
    """A UNet in the names of the original releases.

    Args:
        channels: Width of the first level (320 in the released files).
        latent_channels: 4, or 9 for the inpainting UNet (latent, mask, masked image).
        topology: Of which family; SD 1.5 has sixteen cross-attention layers, SDXL seventy.
    """
    layout = _time_and_middle(channels, topology)
    skips: list[int] = []
    for block, width in _input_blocks(channels, latent_channels, topology):
        layout |= block
        skips.append(width)
    width = skips[-1]
    last = len(topology.multipliers) - 1
    for number in range(3 * (last + 1)):
        level = last - number // 3
        name, depth = f"output_blocks.{number}", topology.depths[level]
        layout |= _residual(
            f"{name}.0", width + skips.pop(), channels * topology.multipliers[level], 4 * channels
        )
        width = channels * topology.multipliers[level]
        if depth:
            layout |= _transformer(f"{name}.1", width, topology, depth)
        if level > 0 and number % 3 == 2:
            layout |= _layer(f"{name}.{2 if depth else 1}.conv", width, width, 3, 3)
    if topology.states is not None:
        layout |= _layer("encoder_hid_proj", topology.context, topology.states)
    return layout | _layer("out.0", channels) | _layer("out.2", 4, channels, 3, 3)


def controlnet(channels: int) -> Layout:
    """A ControlNet 1.1: the UNet's way down, a hint encoder and the "zero convolutions"."""
    layout = _time_and_middle(channels, SD15)
    for number, (block, width) in enumerate(_input_blocks(channels, 4, SD15)):
        layout |= block | _layer(f"zero_convs.{number}.0", width, width, 1, 1)
    hint = (3, 16, 16, 32, 32, 96, 96, 256, channels)
    for step, (width_in, width) in enumerate(pairwise(hint)):
        layout |= _layer(f"input_hint_block.{2 * step}", width, width_in, 3, 3)
    middle = channels * MULTIPLIERS[-1]
    return layout | _layer("middle_block_out.0", middle, middle, 1, 1)


def t2i_adapter(channels: int) -> Layout:
    """A "full" T2I-Adapter: the 8x unshuffled picture through two residual blocks per level."""
    layout = _layer("conv_in", channels, 3 * 64, 3, 3)
    width_in = channels
    for number in range(8):
        width = channels * MULTIPLIERS[number // 2]
        if width != width_in:
            layout |= _layer(f"body.{number}.in_conv", width, width_in, 1, 1)
        layout |= _layer(f"body.{number}.block1", width, width, 3, 3)
        layout |= _layer(f"body.{number}.block2", width, width, 1, 1)
        width_in = width
    return layout


def tiny_autoencoder() -> Layout:
    """TAESD under the names that single-file checkpoints give it."""

    def block(name: str) -> Layout:
        steps = [_layer(f"{name}.conv.{step}", 64, 64, 3, 3) for step in (0, 2, 4)]
        return steps[0] | steps[1] | steps[2]

    layout: Layout = {"vae_scale": (), "vae_shift": ()}
    layout |= _layer("taesd_encoder.0", 64, 3, 3, 3) | _layer("taesd_encoder.14", 4, 64, 3, 3)
    layout |= _layer("taesd_decoder.1", 64, 4, 3, 3) | _layer("taesd_decoder.19", 3, 64, 3, 3)
    for number in (2, 6, 10):
        layout |= _layer(f"taesd_encoder.{number}", 64, 64, 3, 3, bias=False)
    for number in (7, 12, 17):
        layout |= _layer(f"taesd_decoder.{number}", 64, 64, 3, 3, bias=False)
    for number in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        layout |= block(f"taesd_encoder.{number}")
    for number in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        layout |= block(f"taesd_decoder.{number}")
    return layout


def _clip_layers(prefix: str, depth: int, width: int) -> Layout:
    layout: Layout = {}
    for number in range(depth):
        name = f"{prefix}.encoder.layers.{number}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layout |= _layer(f"{name}.self_attn.{projection}", width, width)
        layout |= _layer(f"{name}.mlp.fc1", 4 * width, width)
        layout |= _layer(f"{name}.mlp.fc2", width, 4 * width)
        layout |= _layer(f"{name}.layer_norm1", width) | _layer(f"{name}.layer_norm2", width)
    return layout


def clip_text() -> Layout:
    """The text tower of CLIP ViT-L/14 in full size; the host reads no other from a checkpoint."""
    return {
        "text_model.embeddings.token_embedding.weight": (49408, TEXT_WIDTH),
        "text_model.embeddings.position_embedding.weight": (77, TEXT_WIDTH),
        **_clip_layers("text_model", 12, TEXT_WIDTH),
        **_layer("text_model.final_layer_norm", TEXT_WIDTH),
    }


def clip_vision_h(depth: int = 32, width: int = 1280, projection: int = 1024) -> Layout:
    """The image tower of OpenCLIP ViT-H/14 in Hugging Face naming."""
    return {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, width),
        **_layer("vision_model.pre_layrnorm", width),
        **_clip_layers("vision_model", depth, width),
        **_layer("vision_model.post_layernorm", width),
        "visual_projection.weight": (projection, width),
    }
