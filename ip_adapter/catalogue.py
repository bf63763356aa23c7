"""The published adapters: what tells them apart, what they are for, where they are had.

Tensors alone cannot separate all of them: rows of one family, layout and encoder have equal shapes.
Those are told by the SHA-256 of the published file, by metadata, or guessed.

Source: the publishers' repositories; digests as listed by SwarmUI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .encoders import VIT_BIGG, VIT_H, VIT_L_336, Encoder
from .layers import KOLORS, SD15, SDXL, Family

Purpose = Literal[
    "general",
    "strong",
    "light",
    "face",
    "full face",
    "composition",
    "face identity",
    "face portrait",
    "anime",
    "instruct",
]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

_HUB = "https://huggingface.co/"
_H94 = _HUB + "h94/IP-Adapter/tree/main/models"
_H94_XL = _HUB + "h94/IP-Adapter/tree/main/sdxl_models"
_FACE = _HUB + "h94/IP-Adapter-FaceID/tree/main"
_OSTRIS = _HUB + "ostris/ip-composition-adapter/tree/main"
_INSTRUCT = _HUB + "CiaraRowles/IP-Adapter-Instruct/tree/main"

APACHE = "Apache-2.0"
NON_COMMERCIAL = "non-commercial research only (trained on InsightFace's face models)"
UNKNOWN = "see its page"


@dataclass(frozen=True)
class CompanionLoRA:
    """The LoRA file published beside a FaceID adapter; the same numbers are inside the adapter."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Published:
    """One published adapter.

    Attributes:
        variant: Its name within the family.
        family: The base model family.
        layout: The layout of its projection, as `Projection.layout` names it.
        file: The name it was published under.
        link: The page it is had from.
        purpose: What one would use it for.
        encoder: The image encoder it reads, or None.
        sha256: Digests of the published files, each of its containers; may be empty.
        marks: Parts of a file's name that speak for it.
        dtype: The precision it was published in.
        lora: Its companion LoRA, or None.
        licence: Under which terms.
    """

    variant: str
    family: Family
    layout: str
    file: str
    link: str
    purpose: Purpose
    encoder: Encoder | None = None
    sha256: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    dtype: Literal["F16", "F32"] = "F16"
    lora: CompanionLoRA | None = None
    licence: str = APACHE


PUBLISHED: tuple[Published, ...] = (
    Published(
        "base",
        SD15,
        "global",
        "ip-adapter_sd15.safetensors",
        _H94,
        "general",
        VIT_H,
        ("289b45f16d043d0bf542e45831f971dcdaabe18b656f11e86d9dfba7e9ee3369",),
    ),
    Published(
        "light-v11",
        SD15,
        "global",
        "ip-adapter_sd15_light_v11.bin",
        _H94,
        "light",
        VIT_H,
        ("350b63a57847c163e2e984b01090f85ffe60eaae20f32b2b2c9e1ccc7ddd972b",),
        marks=("light", "v11"),
    ),
    Published(
        "light",
        SD15,
        "global",
        "ip-adapter_sd15_light.safetensors",
        _H94,
        "light",
        VIT_H,
        (
            "0747d08db670535bfa286452a77d93cebad5c677b46d038543f9f2de8690bb26",
            "f71bfbdd937f2edad0c894ec72d12db02b3be0316f62988e5fc669ca4da6b7e1",
        ),
        marks=("light",),
    ),
    Published(
        "base-vit-g",
        SD15,
        "global",
        "ip-adapter_sd15_vit-G.safetensors",
        _H94,
        "general",
        VIT_BIGG,
        ("a26f736af07bb341a83dfea23713531d0575760e8ed947c68cb31a4c62d9c90b",),
    ),
    Published(
        "plus",
        SD15,
        "plus",
        "ip-adapter-plus_sd15.safetensors",
        _H94,
        "strong",
        VIT_H,
        ("a1c250be40455cc61a43da1201ec3f1edaea71214865fb47f57927e06cbe4996",),
    ),
    Published(
        "plus-face",
        SD15,
        "plus",
        "ip-adapter-plus-face_sd15.safetensors",
        _H94,
        "face",
        VIT_H,
        ("1c9edc21af6f737dc1d6e0e734190e976cfacf802d6b024b77aa3be922f7569b",),
        marks=("plus-face",),
    ),
    Published(
        "composition",
        SD15,
        "plus",
        "ip_plus_composition_sd15.safetensors",
        _OSTRIS,
        "composition",
        VIT_H,
        ("4a02c9f4d2ade7c0e14db7471377ce5d326a2bfda7777231c79dc861c93f2c12",),
        marks=("composition",),
        licence=UNKNOWN,
    ),
    Published(
        "full-face",
        SD15,
        "full",
        "ip-adapter-full-face_sd15.safetensors",
        _H94,
        "full face",
        VIT_H,
        ("f4a17fb643bf876235a45a0e87a49da2855be6584b28ca04c62a97ab5ff1c6f3",),
    ),
    Published(
        "faceid-plusv2",
        SD15,
        "faceid-plus",
        "ip-adapter-faceid-plusv2_sd15.bin",
        _FACE,
        "face identity",
        VIT_H,
        ("26d0d86a1d60d6cc811d3b8862178b461e1eeb651e6fe2b72ba17aa95411e313",),
        marks=("plusv2",),
        lora=CompanionLoRA(
            "ip-adapter-faceid-plusv2_sd15_lora.safetensors",
            "8abff87a15a049f3e0186c2e82c1c8e77783baf2cfb63f34c412656052eb57b0",
        ),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "faceid-plus",
        SD15,
        "faceid-plus",
        "ip-adapter-faceid-plus_sd15.bin",
        _FACE,
        "face identity",
        VIT_H,
        ("252fb53e0d018489d9e7f9b9e2001a52ff700e491894011ada7cfb471e0fadf2",),
        marks=("faceid-plus-",),
        lora=CompanionLoRA(
            "ip-adapter-faceid-plus_sd15_lora.safetensors",
            "3f00341d11e5e7b5aadf63cbdead09ef82eb28669156161cf1bfc2105d4ff1cd",
        ),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "faceid",
        SD15,
        "faceid",
        "ip-adapter-faceid_sd15.bin",
        _FACE,
        "face identity",
        None,
        ("201344e22e6f55849cf07ca7a6e53d8c3b001327c66cb9710d69fd5da48a8da7",),
        lora=CompanionLoRA(
            "ip-adapter-faceid_sd15_lora.safetensors",
            "70699f0dbfadd47de1f81d263cf4c86bd4b7271d841304af9b340b3a7f38e86a",
        ),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "portrait-v11",
        SD15,
        "portrait",
        "ip-adapter-faceid-portrait-v11_sd15.bin",
        _FACE,
        "face portrait",
        None,
        ("a48cb4f89ed18e02c6000f65aa9efec452e87eaed4a1bc9fcf4a460c8d0e3bc6",),
        marks=("portrait-v11",),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "portrait",
        SD15,
        "portrait",
        "ip-adapter-faceid-portrait_sd15.bin",
        _FACE,
        "face portrait",
        None,
        ("68570f3c14fe125b00d4abf416af33d8b13bb496f4e55af2eb5d0a6017ee99a4",),
        marks=("portrait",),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "instruct",
        SD15,
        "instruct",
        "ip-adapter-instruct-sd15.bin",
        _INSTRUCT,
        "instruct",
        VIT_H,
        dtype="F32",
        licence=UNKNOWN,
    ),
    Published(
        "base-vit-h",
        SDXL,
        "global",
        "ip-adapter_sdxl_vit-h.safetensors",
        _H94_XL,
        "general",
        VIT_H,
        ("ebf05d918348aec7abb02a5e9ecef77e0aaea6914a5c4ea13f50d45eb1681831",),
    ),
    Published(
        "base",
        SDXL,
        "global",
        "ip-adapter_sdxl.safetensors",
        _H94_XL,
        "general",
        VIT_BIGG,
        ("ba1002529e783604c5f326d49f0122025392d1d20ac8d573b3eeb3e6dea4ebb6",),
    ),
    Published(
        "noobai",
        SDXL,
        "global",
        "noobIPAMARK1_mark1.safetensors",
        _HUB + "r3gm/noob-ipa/tree/main/model_G",
        "anime",
        VIT_BIGG,
        ("5cdb6a00be1b12579745b5bed0c7b83f0869073d8a864fa8cd50a9356601919a",),
        marks=("noob",),
        dtype="F32",
        licence=UNKNOWN,
    ),
    Published(
        "plus",
        SDXL,
        "plus",
        "ip-adapter-plus_sdxl_vit-h.safetensors",
        _H94_XL,
        "strong",
        VIT_H,
        ("3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581",),
    ),
    Published(
        "plus-face",
        SDXL,
        "plus",
        "ip-adapter-plus-face_sdxl_vit-h.safetensors",
        _H94_XL,
        "face",
        VIT_H,
        (
            "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1",
            "50e886d82940b3c5873d80c2b06d8a4b0d0fccec70bc44fd53f16ac3cfd7fc36",
        ),
        marks=("plus-face",),
    ),
    Published(
        "composition",
        SDXL,
        "plus",
        "ip_plus_composition_sdxl.safetensors",
        _OSTRIS,
        "composition",
        VIT_H,
        marks=("composition",),
        licence=UNKNOWN,
    ),
    Published(
        "faceid-plusv2",
        SDXL,
        "faceid-plus",
        "ip-adapter-faceid-plusv2_sdxl.bin",
        _FACE,
        "face identity",
        VIT_H,
        ("c6945d82b543700cc3ccbb98d363b837e9c596281607857c74b713a876daf5fb",),
        lora=CompanionLoRA(
            "ip-adapter-faceid-plusv2_sdxl_lora.safetensors",
            "f24b4bb2dad6638a09c00f151cde84991baf374409385bcbab53c1871a30cb7b",
        ),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "faceid",
        SDXL,
        "faceid",
        "ip-adapter-faceid_sdxl.bin",
        _FACE,
        "face identity",
        None,
        ("f455fed24e207c878ec1e0466b34a969d37bab857c5faa4e8d259a0b4ff63d7e",),
        lora=CompanionLoRA(
            "ip-adapter-faceid_sdxl_lora.safetensors",
            "4fcf93d6e8dc8dd18f5f9e51c8306f369486ed0aa0780ade9961308aff7f0d64",
        ),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "portrait",
        SDXL,
        "portrait",
        "ip-adapter-faceid-portrait_sdxl.bin",
        _FACE,
        "face portrait",
        None,
        ("5631ce7824cdafd2db37c5e85b985730a95ff59c5b4fc80c2b79b0bee5711512",),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "portrait-unnorm",
        SDXL,
        "face resampler",
        "ip-adapter-faceid-portrait_sdxl_unnorm.bin",
        _FACE,
        "face portrait",
        None,
        ("220bb86e205393a3d0411631cb473caddbf35fd371be2905ca9008818170db55",),
        marks=("unnorm",),
        licence=NON_COMMERCIAL,
    ),
    Published(
        "instantid",
        SDXL,
        "face resampler",
        "ip-adapter.bin",
        _HUB + "InstantX/InstantID/tree/main",
        "face identity",
        None,
        ("02b3618e36d803784166660520098089a81388e61a93ef8002aa79a5b1c546e1",),
        marks=("instant",),
        dtype="F32",
        licence=NON_COMMERCIAL,
    ),
    Published(
        "instruct",
        SDXL,
        "instruct",
        "ip-adapter-instruct-sdxl.bin",
        _INSTRUCT,
        "instruct",
        VIT_H,
        dtype="F32",
        licence=UNKNOWN,
    ),
    Published(
        "plus",
        KOLORS,
        "plus",
        "ip_adapter_plus_general.bin",
        _HUB + "Kwai-Kolors/Kolors-IP-Adapter-Plus/tree/main",
        "strong",
        VIT_L_336,
        ("1983c3f927acb2a2f4285e1e134f302fab8e6d744a3b058e46848aba9957a60f",),
        licence=UNKNOWN,
    ),
    Published(
        "faceid-plus",
        KOLORS,
        "faceid-plus",
        "ipa-faceid-plus.bin",
        _HUB + "Kwai-Kolors/Kolors-IP-Adapter-FaceID-Plus/tree/main",
        "face identity",
        VIT_L_336,
        licence=NON_COMMERCIAL,
    ),
)
"""In order of preference: the first of a purpose is what an automatic loader takes."""


def recogniser(family: Family, variant: str) -> str:
    """The face recogniser whose vectors an adapter was trained with, by its pack's name."""
    return "antelopev2" if family == KOLORS or variant == "instantid" else "buffalo_l"


def variants(family: Family) -> tuple[Published, ...]:
    """The published adapters of a family."""
    return tuple(row for row in PUBLISHED if row.family == family)


def lookup(family: Family, variant: str) -> Published | None:
    """The row of an adapter, or None if nothing was published under that name."""
    return next((row for row in variants(family) if row.variant == variant), None)
