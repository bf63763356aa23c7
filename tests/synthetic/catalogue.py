"""Every published IP-Adapter of the UNet families as a table, with the tensors of each file.

Nothing here holds numbers: `layout` gives key -> shape, `hollow` gives tensors without storage, and
`adapters.make` fills them. Nothing is taken from the library either, so that tests may compare.

Sources: file listings of the publishers' repositories (names, bytes); the modules of the reference
implementation (keys, shapes). SD 2.x adapters were never published: their rows say what the
reference training scripts would write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Shape = tuple[int, ...]
Layout = dict[str, Shape]
Container = Literal["safetensors", "bin-zip", "bin-legacy"]

RANK = 128
"""Rank of the LoRA that FaceID adapters were trained with."""

FACE = 512
"""Width of a face recogniser's vector."""

# Path of a transformer in diffusers, its width as a multiple of the first level's, its depth.
Plan = tuple[tuple[str, int, int], ...]

_SD: Plan = (
    *((f"down_blocks.{level}.attentions.{i}", 2**level, 1) for level in range(3) for i in range(2)),
    *((f"up_blocks.{4 - n}.attentions.{i}", 2 ** (n - 1), 1) for n in (3, 2, 1) for i in range(3)),
    ("mid_block.attentions.0", 4, 1),
)
_SDXL: Plan = (
    *((f"down_blocks.1.attentions.{i}", 2, 2) for i in range(2)),
    *((f"down_blocks.2.attentions.{i}", 4, 10) for i in range(2)),
    *((f"up_blocks.0.attentions.{i}", 4, 10) for i in range(3)),
    *((f"up_blocks.1.attentions.{i}", 2, 2) for i in range(3)),
    ("mid_block.attentions.0", 4, 10),
)
PLANS: dict[str, Plan] = {"SD 1.5": _SD, "SD 2.x": _SD, "SDXL": _SDXL, "Kolors": _SDXL}
"""The transformers of each family, in the order in which adapters number their layers."""

CONTEXT = {"SD 1.5": 768, "SD 2.x": 1024, "SDXL": 2048, "Kolors": 2048}
"""Width of the text tokens that cross-attention reads."""

CHANNELS, NANO_CHANNELS = 320, 32
"""Width of a UNet's first level, published and nano."""


def paths(family: str) -> list[str]:
    """The diffusers path of every transformer block; number p holds attention 2p and 2p + 1."""
    return [
        f"{path}.transformer_blocks.{depth}"
        for path, _, count in PLANS[family]
        for depth in range(count)
    ]


def widths(family: str, *, nano: bool = False) -> tuple[int, ...]:
    """Width of every cross-attention layer, in the order of `paths`."""
    channels = NANO_CHANNELS if nano else CHANNELS
    return tuple(multiple * channels for _, multiple, count in PLANS[family] for _ in range(count))


def key_values(layer_widths: tuple[int, ...], context: int) -> Layout:
    """The ``_ip`` keys: odd numbers, no biases."""
    return {
        f"{2 * position + 1}.{name}.weight": (width, context)
        for position, width in enumerate(layer_widths)
        for name in ("to_k_ip", "to_v_ip")
    }


def attention_with_lora(layer_widths: tuple[int, ...], context: int) -> Layout:
    """The ``_ip`` keys of FaceID adapters with the LoRA of self- and cross-attention among them."""
    layout: Layout = {}
    for number in range(2 * len(layer_widths)):
        width = layer_widths[number // 2]
        inner = context if number % 2 else width
        for name, columns in (("q", width), ("k", inner), ("v", inner), ("out", width)):
            layout[f"{number}.to_{name}_lora.down.weight"] = (RANK, columns)
            layout[f"{number}.to_{name}_lora.up.weight"] = (width, RANK)
        if number % 2:
            layout[f"{number}.to_k_ip.weight"] = (width, context)
            layout[f"{number}.to_v_ip.weight"] = (width, context)
    return layout


def _linear(name: str, rows: int, columns: int) -> Layout:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Layout:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def global_projection(features: int, context: int, tokens: int = 4) -> Layout:
    """``ImageProjModel``: a pooled embedding becomes a few tokens."""
    return _linear("proj", tokens * context, features) | _norm("norm", context)


def patch_projection(features: int, context: int) -> Layout:
    """``MLPProjModel``: every patch becomes a token."""
    return (
        _linear("proj.0", features, features)
        | _linear("proj.2", context, features)
        | _norm("proj.3", context)
    )


def face_projection(context: int, tokens: int) -> Layout:
    """``MLPProjModelFaceId``: a face vector becomes tokens."""
    return (
        _linear("proj.0", 2 * FACE, FACE)
        | _linear("proj.2", tokens * context, 2 * FACE)
        | _norm("norm", context)
    )


def _stack(name: str, inner: int, heads: int, depth: int, multiple: int) -> Layout:
    layout: Layout = {}
    for i in range(depth):
        attention, feed_forward = f"{name}.{i}.0", f"{name}.{i}.1"
        layout |= _norm(f"{attention}.norm1", inner) | _norm(f"{attention}.norm2", inner)
        layout[f"{attention}.to_q.weight"] = (64 * heads, inner)
        layout[f"{attention}.to_kv.weight"] = (128 * heads, inner)
        layout[f"{attention}.to_out.weight"] = (inner, 64 * heads)
        layout |= _norm(f"{feed_forward}.0", inner)
        layout[f"{feed_forward}.1.weight"] = (multiple * inner, inner)
        layout[f"{feed_forward}.3.weight"] = (inner, multiple * inner)
    return layout


def resampler(
    features: int, inner: int, heads: int, out: int, *, tokens: int = 16, depth: int = 4
) -> Layout:
    """``Resampler``: learned queries read patch features (plus) or a face vector (InstantID)."""
    return (
        {"latents": (1, tokens, inner)}
        | _linear("proj_in", inner, features)
        | _linear("proj_out", out, inner)
        | _norm("norm_out", out)
        | _stack("layers", inner, heads, depth, 4)
    )


def face_perceiver(features: int, context: int, tokens: int = 4) -> Layout:
    """``ProjModelFaceIdPlus``: a face's tokens read patch features; there are no latents."""
    perceiver = resampler(features, context, context // 64, context)
    del perceiver["latents"]
    return face_projection(context, tokens) | {
        f"perceiver_resampler.{key}": shape for key, shape in perceiver.items()
    }


def instruct_projection(inner: int, heads: int, out: int) -> Layout:
    """A resampler that also reads a prompt and an instruction."""
    return (
        resampler(1280, inner, heads, out)
        | _linear("proj_new_input", inner, 768)
        | _linear("proj_prompt_input", inner, 768)
        | _stack("new_input_layers", inner, heads, 4, 2)
        | _stack("prompt_layers", inner, heads, 4, 2)
    )


@dataclass(frozen=True)
class Row:
    """One published adapter.

    Attributes:
        family: The base model family, a key of `PLANS`.
        file: The name it was published under.
        projection: Key -> shape of its ``image_proj`` part.
        parameters: How many numbers the published file holds; of SD 2.x, what it would hold.
        container: What the file is; a .bin is a pickle of two dictionaries.
        bytes: Its published size where known exactly.
        dtype: Of every tensor.
        metadata_bytes: What its header is longer by than one without metadata.
        is_oversized: Whether the pickled projection lies in storages of twice its size.
        has_lora: Whether the LoRA of FaceID is among the attention weights.
        lora_bytes: Size of the companion LoRA file, if one was published.
        part: Name of the part with the attention weights.
    """

    family: str
    file: str
    projection: Mapping[str, Shape]
    parameters: int
    container: Container = "safetensors"
    bytes: int | None = None
    dtype: torch.dtype = torch.float16
    metadata_bytes: int = 0
    is_oversized: bool = False
    has_lora: bool = False
    lora_bytes: int | None = None
    part: str = "ip_adapter"

    @property
    def lora_file(self) -> str:
        """Name of the companion LoRA, for rows with `lora_bytes`."""
        return self.file.removesuffix(".bin") + "_lora.safetensors"


_F32 = torch.float32
_PLUS_XL = resampler(1280, 1280, 20, 2048)
_FACE_XL = resampler(FACE, 1280, 20, 2048)
_COMPOSITION = "ip_plus_composition"
_KOLORS_PLUS = "ip_adapter_plus_general.bin"


def _sd15(name: str, projection: Layout, size: int | None, parameters: int) -> Row:
    return Row("SD 1.5", f"ip-adapter{name}.safetensors", projection, parameters, bytes=size)


def _sdxl(name: str, projection: Layout, size: int | None, parameters: int) -> Row:
    return Row("SDXL", f"ip-adapter{name}.safetensors", projection, parameters, bytes=size)


def _face(
    family: str, name: str, projection: Layout, size: int | None, parameters: int, lora: int | None
) -> Row:
    """A row of the FaceID repository; portraits come without LoRA."""
    return Row(
        family,
        f"ip-adapter-faceid{name}.bin",
        projection,
        parameters,
        "bin-legacy",
        size,
        has_lora=lora is not None,
        lora_bytes=lora,
    )


def _faces(rows: dict[str, tuple[str, Layout, int | None, int, int | None]]) -> dict[str, Row]:
    family = {"sd15": "SD 1.5", "sdxl": "SDXL"}
    return {name: _face(family[name.rpartition("_")[2]], *row) for name, row in rows.items()}


_LORA, _LORA_XL = 51_059_544, 371_842_896

ROWS: dict[str, Row] = {
    "sd15": _sd15("_sd15", global_projection(1024, 768), 44_642_768, 22_319_616),
    "sd15_light": _sd15("_sd15_light", global_projection(1024, 768), 44_642_768, 22_319_616),
    "sd15_light_v11": Row(
        "SD 1.5",
        "ip-adapter_sd15_light_v11.bin",
        global_projection(1024, 768),
        22_319_616,
        "bin-legacy",
        44_642_977,
    ),
    "sd15_vit-G": _sd15("_sd15_vit-G", global_projection(1280, 768), 46_215_640, 23_106_048),
    "plus_sd15": _sd15("-plus_sd15", resampler(1280, 768, 12, 768), 98_183_288, 49_087_488),
    "plus-face_sd15": _sd15(
        "-plus-face_sd15", resampler(1280, 768, 12, 768), 98_183_288, 49_087_488
    ),
    "full-face_sd15": _sd15("-full-face_sd15", patch_projection(1280, 768), 43_592_352, 21_794_304),
    **_faces(
        {
            "faceid_sd15": ("_sd15", face_projection(768, 4), None, 48_354_816, _LORA),
            "faceid-plus_sd15": (
                "-plus_sd15",
                face_perceiver(1280, 768),
                156_558_503,
                78_260_736,
                _LORA,
            ),
            "faceid-plusv2_sd15": (
                "-plusv2_sd15",
                face_perceiver(1280, 768),
                156_558_509,
                78_260_736,
                _LORA,
            ),
            "portrait_sd15": (
                "-portrait_sd15",
                face_projection(768, 16),
                64_586_623,
                32_291_328,
                None,
            ),
            "portrait-v11_sd15": (
                "-portrait-v11_sd15",
                face_projection(768, 16),
                None,
                32_291_328,
                None,
            ),
        }
    ),
    "composition_sd15": Row(
        "SD 1.5",
        f"{_COMPOSITION}_sd15.safetensors",
        resampler(1280, 768, 12, 768),
        49_087_488,
        bytes=98_183_728,
        metadata_bytes=440,
    ),
    "instruct_sd15": Row(
        "SD 1.5",
        "ip-adapter-instruct-sd15.bin",
        instruct_projection(768, 12, 768),
        88_054_272,
        "bin-zip",
        dtype=_F32,
    ),
    "sd2": Row("SD 2.x", "ip-adapter_sd21.safetensors", global_projection(1024, 1024), 29_759_488),
    "plus_sd2": Row(
        "SD 2.x", "ip-adapter-plus_sd21.safetensors", resampler(1280, 1024, 12, 1024), 74_100_736
    ),
    "sdxl": _sdxl("_sdxl", global_projection(1280, 2048), 702_585_376, 351_285_248),
    "sdxl_vit-h": _sdxl("_sdxl_vit-h", global_projection(1024, 2048), 698_391_064, 349_188_096),
    "plus_sdxl_vit-h": _sdxl("-plus_sdxl_vit-h", _PLUS_XL, 847_517_512, 423_748_864),
    "plus-face_sdxl_vit-h": _sdxl("-plus-face_sdxl_vit-h", _PLUS_XL, 847_517_512, 423_748_864),
    **_faces(
        {
            "faceid_sdxl": (
                "_sdxl",
                face_projection(2048, 4),
                1_071_149_741,
                535_507_968,
                _LORA_XL,
            ),
            "faceid-plusv2_sdxl": (
                "-plusv2_sdxl",
                face_perceiver(1280, 2048),
                1_487_555_181,
                743_707_648,
                _LORA_XL,
            ),
            "portrait_sdxl": (
                "-portrait_sdxl",
                face_projection(2048, 16),
                None,
                374_903_808,
                None,
            ),
        }
    ),
    "portrait-unnorm_sdxl": Row(
        "SDXL",
        "ip-adapter-faceid-portrait_sdxl_unnorm.bin",
        _FACE_XL,
        422_765_824,
        "bin-legacy",
        1_009_523_411,
        is_oversized=True,
    ),
    "composition_sdxl": Row(
        "SDXL",
        f"{_COMPOSITION}_sdxl.safetensors",
        _PLUS_XL,
        423_748_864,
        metadata_bytes=440,
    ),
    "instruct_sdxl": Row(
        "SDXL",
        "ip-adapter-instruct-sdxl.bin",
        instruct_projection(1280, 20, 2048),
        530_636_544,
        "bin-zip",
        dtype=_F32,
    ),
    "noobai": Row(
        "SDXL",
        "noobIPAMARK1_mark1.safetensors",
        global_projection(1280, 2048),
        351_285_248,
        dtype=_F32,
    ),
    "instantid": Row(
        "SDXL", "ip-adapter.bin", _FACE_XL, 422_765_824, "bin-zip", 1_691_134_141, dtype=_F32
    ),
    # Twelve heads of 64 inside a width of 2048, as the published constructor call has it.
    "kolors_plus": Row(
        "Kolors",
        _KOLORS_PLUS,
        resampler(1024, 2048, 12, 2048),
        506_552_320,
        "bin-zip",
        1_013_163_359,
    ),
    "kolors_faceid-plus": Row(
        "Kolors",
        "ipa-faceid-plus.bin",
        face_perceiver(1024, 4096, tokens=6),
        1_192_903_680,
        "bin-zip",
        part="adapter_modules",
    ),
}
"""Every published adapter of Stable Diffusion 1.5, SDXL and Kolors, and two of SD 2.x."""


def layout(row: Row, *, nano: bool = False) -> Layout:
    """The flat keys of a published file, each with its shape.

    Args:
        row: The adapter.
        nano: Attention for UNets of a tenth of the width; the projection keeps its size.
    """
    make = attention_with_lora if row.has_lora else key_values
    attention = make(widths(row.family, nano=nano), CONTEXT[row.family])
    return {f"image_proj.{key}": shape for key, shape in row.projection.items()} | {
        f"{row.part}.{key}": shape for key, shape in attention.items()
    }


def companion(row: Row, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The companion LoRA of a FaceID adapter: the same numbers under kohya's names.

    Args:
        row: An adapter with LoRA.
        tensors: Its tensors, filled or hollow, with the keys of `layout`.
    """
    found = dict(_companion(row, tensors))
    if row.family == "SDXL":  # the SDXL files carry alpha = rank, in eight bytes
        for key in [key for key in found if key.endswith(".lora_down.weight")]:
            found[key.replace(".lora_down.weight", ".alpha")] = torch.tensor(RANK)
    return found


def _companion(row: Row, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    blocks = paths(row.family)
    for key, tensor in tensors.items():
        if "_lora." not in key:
            continue
        _, number, name, direction, _ = key.split(".")
        attention = f"{blocks[int(number) // 2]}.attn{int(number) % 2 + 1}"
        module = name.removesuffix("_lora") + (".0" if name == "to_out_lora" else "")
        path = f"{attention}.{module}".replace(".", "_")
        yield f"lora_unet_{path}.lora_{direction}.weight", tensor


def hollow(shapes: Mapping[str, Shape], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Zeros of these shapes that share one number: right shapes at no cost."""
    zero = torch.zeros((), dtype=dtype)
    return {key: zero.expand(shape) for key, shape in shapes.items()}
