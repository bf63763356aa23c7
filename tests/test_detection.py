"""Every published adapter is told by its tensors, and what is none is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ip_adapter import catalogue as published
from ip_adapter import detection, names
from ip_adapter.adapter import IPAdapter
from ip_adapter.detection import Clues
from ip_adapter.encoders import MINIATURE as MINIATURE_CLIP
from ip_adapter.errors import CheckpointError, IncompatibleModelError, IPAdapterError
from ip_adapter.layers import KOLORS, MINIATURE, SD15, SDXL
from ip_adapter.spec import AdapterSpec, FacePerceiverProjection
from tests.synthetic import catalogue
from tests.synthetic.catalogue import ROWS
from tests.synthetic.near_misses import NEAR_MISSES

EXPECTED = {
    # row: variant, tokens, what it reads, encoder, rank of the LoRA inside
    "sd15": ("base", 4, ("pooled", None, False), "ViT-H/14", None),
    "sd15_light": ("light", 4, ("pooled", None, False), "ViT-H/14", None),
    "sd15_light_v11": ("light-v11", 4, ("pooled", None, False), "ViT-H/14", None),
    "sd15_vit-G": ("base-vit-g", 4, ("pooled", None, False), "ViT-bigG/14", None),
    "plus_sd15": ("plus", 16, ("hidden", None, False), "ViT-H/14", None),
    "plus-face_sd15": ("plus-face", 16, ("hidden", None, False), "ViT-H/14", None),
    "full-face_sd15": ("full-face", 257, ("hidden", None, False), "ViT-H/14", None),
    "faceid_sd15": ("faceid", 4, (None, "normed", False), None, 128),
    "faceid-plus_sd15": ("faceid-plus", 4, ("hidden", "normed", False), "ViT-H/14", 128),
    "faceid-plusv2_sd15": ("faceid-plusv2", 4, ("hidden", "normed", False), "ViT-H/14", 128),
    "portrait_sd15": ("portrait", 16, (None, "normed", False), None, None),
    "portrait-v11_sd15": ("portrait-v11", 16, (None, "normed", False), None, None),
    "composition_sd15": ("composition", 16, ("hidden", None, False), "ViT-H/14", None),
    "instruct_sd15": ("instruct", 16, ("hidden", None, True), "ViT-H/14", None),
    "sd2": ("global", 4, ("pooled", None, False), "ViT-H/14", None),
    "plus_sd2": ("plus", 16, ("hidden", None, False), "ViT-H/14", None),
    "sdxl": ("base", 4, ("pooled", None, False), "ViT-bigG/14", None),
    "sdxl_vit-h": ("base-vit-h", 4, ("pooled", None, False), "ViT-H/14", None),
    "plus_sdxl_vit-h": ("plus", 16, ("hidden", None, False), "ViT-H/14", None),
    "plus-face_sdxl_vit-h": ("plus-face", 16, ("hidden", None, False), "ViT-H/14", None),
    "faceid_sdxl": ("faceid", 4, (None, "normed", False), None, 128),
    "faceid-plusv2_sdxl": ("faceid-plusv2", 4, ("hidden", "normed", False), "ViT-H/14", 128),
    "portrait_sdxl": ("portrait", 16, (None, "normed", False), None, None),
    "portrait-unnorm_sdxl": ("portrait-unnorm", 16, (None, "raw", False), None, None),
    "composition_sdxl": ("composition", 16, ("hidden", None, False), "ViT-H/14", None),
    "instruct_sdxl": ("instruct", 16, ("hidden", None, True), "ViT-H/14", None),
    "noobai": ("noobai", 4, ("pooled", None, False), "ViT-bigG/14", None),
    "instantid": ("instantid", 16, (None, "raw", False), None, None),
    "kolors_plus": ("plus", 16, ("hidden", None, False), "ViT-L/14-336", None),
    "kolors_faceid-plus": ("faceid-plus", 6, ("hidden", "raw", False), "ViT-L/14-336", None),
}
"""By the fact tables of the publishers; the row's own file name is given to the detection."""


def tensors_of(row: str) -> dict[str, torch.Tensor]:
    entry = ROWS[row]
    hollow = catalogue.hollow(catalogue.layout(entry), entry.dtype)
    return names.canonical(hollow, entry.file)


def shapes_of(row: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors_of(row).items()}


def identify(row: str, name: str | None = None, **clues: object) -> AdapterSpec:
    entry = ROWS[row]
    dtype = "F32" if entry.dtype == torch.float32 else "F16"
    told = Clues(**{"dtype": dtype, **clues})  # type: ignore[arg-type]
    return detection.identify(shapes_of(row), name or entry.file, told)


def test_every_row_is_expected() -> None:
    assert set(EXPECTED) == set(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_published_files_are_told_and_complete(row: str) -> None:
    spec = identify(row)
    variant, tokens, reads, encoder, rank = EXPECTED[row]
    projection = spec.projection
    assert (spec.variant, projection.tokens) == (variant, tokens)
    assert (projection.image, projection.face, projection.text) == reads
    assert spec.encoder is None if encoder is None else spec.encoder_name.endswith(encoder)
    assert spec.lora_rank == rank and spec.family.name == ROWS[row].family
    assert spec.widths == catalogue.widths(ROWS[row].family)

    module = IPAdapter(spec, nn, device="meta")
    needed = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = shapes_of(row)
    detection.check_tensors(found, needed, row)
    unused = set(found) - set(needed)
    assert all("_lora." in key for key in unused) and bool(unused) == (rank is not None)


@pytest.mark.parametrize("row", ROWS)
def test_a_file_of_any_name_is_told_as_far_as_tensors_tell(row: str) -> None:
    """Under a name that says nothing: the right family, projection and encoder all the same."""
    spec, known = identify(row, "model (1).bin"), identify(row)
    assert (spec.family, spec.widths, spec.encoder) == (known.family, known.widths, known.encoder)
    assert spec.projection.layout == known.projection.layout
    assert known.variant in (spec.variant, *spec.alternatives)
    if spec.alternatives:
        assert spec.evidence in ("assumption", "dtype")
        assert "equal tensors" in spec.describe()


def test_only_the_known_groups_have_equal_tensors() -> None:
    groups = {frozenset((identify(r).variant, *identify(r).alternatives)) for r in ROWS}
    assert {group for group in groups if len(group) > 1} == {
        frozenset({"base", "light", "light-v11"}),
        frozenset({"plus", "plus-face", "composition"}),
        frozenset({"faceid-plus", "faceid-plusv2"}),
        frozenset({"portrait", "portrait-v11"}),
        frozenset({"base", "noobai"}),
        frozenset({"portrait-unnorm", "instantid"}),
    }


AMBIGUOUS = [r for r in ROWS if identify(r).alternatives]


@pytest.mark.parametrize("row", AMBIGUOUS)
def test_clues_decide_in_their_order(row: str) -> None:
    variant, family = EXPECTED[row][0], identify(row).family
    entry = published.lookup(family, variant)
    assert entry is not None
    nameless = "x.bin"
    other = identify(row).alternatives[0]
    by_choice = identify(row, nameless, variant=other, metadata={"variant": variant})
    assert (by_choice.variant, by_choice.evidence) == (other, "user")
    by_metadata = identify(row, nameless, metadata={"variant": variant}, sha256=lambda: "0")
    assert (by_metadata.variant, by_metadata.evidence) == (variant, "metadata")
    for digest in entry.sha256:
        by_digest = identify(row, nameless, sha256=lambda found=digest: found)
        assert (by_digest.variant, by_digest.evidence) == (variant, "sha256")
    by_name = identify(row, entry.file.upper(), sha256=lambda: "0")
    assert (by_name.variant, by_name.evidence) == (variant, "name")


def test_a_converted_files_source_name_counts_after_its_own() -> None:
    source = {"source": "ip-adapter-faceid-plus_sd15.bin"}
    told = identify("faceid-plus_sd15", "x.safetensors", metadata=source)
    assert (told.variant, told.evidence) == ("faceid-plus", "name")
    renamed = identify("faceid-plus_sd15", "my plusv2.safetensors", metadata=source)
    assert renamed.variant == "faceid-plusv2"


def test_no_digest_is_computed_where_tensors_tell() -> None:
    def never() -> str:
        raise AssertionError("computed")

    assert identify("full-face_sd15", "x", sha256=never).evidence == "tensors"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("IP Adapter FaceID PlusV2 (SD1.5).bin", "faceid-plusv2"),
        ("ip-adapter-faceid-plus_sd15 (2).bin", "faceid-plus"),
        ("my_adapter.bin", "faceid-plusv2"),
    ],
)
def test_the_shortcut_follows_the_variant(name: str, variant: str) -> None:
    spec = identify("faceid-plus_sd15", name)
    assert isinstance(spec.projection, FacePerceiverProjection)
    assert spec.variant == variant
    assert spec.projection.shortcut == (variant == "faceid-plusv2")


def test_kolors_has_the_shortcut_and_sdxl_v2_too() -> None:
    for row in ("kolors_faceid-plus", "faceid-plusv2_sdxl"):
        projection = identify(row).projection
        assert isinstance(projection, FacePerceiverProjection) and projection.shortcut


def test_a_choice_that_the_tensors_exclude_is_refused() -> None:
    with pytest.raises(IncompatibleModelError, match=r"cannot be 'light'.*plus or plus-face"):
        identify("plus_sd15", variant="light")
    with pytest.raises(IncompatibleModelError, match=r"cannot be 'base'.*full-face"):
        identify("full-face_sd15", variant="base")


def test_digests_and_files_are_published_once() -> None:
    digests = [digest for row in published.PUBLISHED for digest in row.sha256]
    assert len(digests) == len(set(digests)) and all(len(digest) == 64 for digest in digests)
    for row in published.PUBLISHED:
        assert published.lookup(row.family, row.variant) is row
        assert row.link.startswith("https://huggingface.co/")
    assert {row.family for row in published.PUBLISHED} == {SD15, SDXL, KOLORS}


NAMED = {
    "pulid_sdxl": "PuLID",
    "pulid_original": "PuLID",
    "csgo": "CSGO",
    "storymaker": "StoryMaker",
    "flux_xlabs_v1": r"FLUX.1 \(XLabs\)",
    "flux_xlabs_v2": r"FLUX.1 \(XLabs\)",
    "flux_instantx": r"FLUX.1 \(InstantX\)",
    "sd35_instantx": r"SD 3.5 \(InstantX\)",
    "sd3_instruct": r"SD 3 \(Instruct\)",
    "instantcharacter": "InstantCharacter",
    "controlnet": "a ControlNet; .*models/controlnet",
    "controlnet_diffusers": "a ControlNet",
    "lora_kohya": "a LoRA; .*models/loras",
    "lora_peft": "a LoRA",
    "faceid_lora": "a LoRA",
    "clip_vision": "a CLIP image encoder; .*models/clip_vision",
    "clip_text": "a text encoder",
    "autoencoder": "a VAE",
    "checkpoint": "a whole checkpoint",
    "diffusion_model": "a diffusion model",
    "truncated": r"14 cross-attention layers.*SD 1.5 has 16 layers: the file is incomplete",
    "missing_value": "lacks 1 of 36 tensors: ip_adapter.13.to_v_ip.weight",
    "missing_projection_tensor": "lacks 1 of 83 tensors: image_proj.layers.2.0.to_kv.weight",
    "projection_only": "no keys and values",
    "attention_only": "tensors such as ip_adapter",
    "transposed_layer": r"ip_adapter.1.to_[kv]_ip.weight is \[\d+, \d+\], needed",
    "transposed_projection": "not a whole number of tokens",
    "layers_15": "15 cross-attention layers.*SD 1.5 has 16",
    "layers_69": "69 cross-attention layers.*SDXL has 70 and Kolors has 70",
    "layers_ssd1b": "pruned model",
    "context_1280": "unknown family",
    "unknown_projection": "not known here",
    "nothing": "without tensors",
}


@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_near_misses_are_refused_and_named(kind: str) -> None:
    make: Callable[[], dict[str, torch.Tensor]] = NEAR_MISSES[kind]
    with pytest.raises(IPAdapterError, match=NAMED[kind]) as caught:
        tensors = make()
        detection.refuse_other_adapters(tensors, "file.bin")
        tensors = names.canonical(tensors, "file.bin")
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        spec = detection.identify(shapes, "file.bin")
        module = IPAdapter(spec, nn, device="meta")
        needed = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        detection.check_tensors(shapes, needed, "file.bin")
    assert isinstance(caught.value, (CheckpointError, IncompatibleModelError))
    assert "'file.bin'" in str(caught.value)


@pytest.mark.parametrize("part", ["0.to_q_lora.down", "31.to_v_lora.up", "30.to_out_lora.down"])
def test_half_a_lora_is_refused(part: str) -> None:
    shapes = shapes_of("faceid_sd15")
    del shapes[f"ip_adapter.{part}.weight"]
    with pytest.raises(CheckpointError, match=f"lacks 1 of 256 tensors: ip_adapter.{part}.weight"):
        detection.identify(shapes, "faceid.bin")


def test_a_face_vector_of_another_width_is_refused() -> None:
    shapes = shapes_of("faceid_sd15")
    shapes["image_proj.proj.0.weight"] = (1024, 768)
    with pytest.raises(CheckpointError, match=r"vectors of width 768.*512"):
        detection.identify(shapes, "faceid.bin")


MINIATURE_PROJECTIONS = {
    # layout: tokens, the projection
    "global": (4, catalogue.global_projection(128, 128)),
    "plus": (16, catalogue.resampler(128, 128, 2, 128, tokens=16, depth=2)),
    "full": (65, catalogue.patch_projection(128, 128)),
}


def miniature(layout: str) -> dict[str, tuple[int, ...]]:
    """An adapter for the project's own family: seven layers of width 64, context 128."""
    key_values = catalogue.key_values((64,) * 7, 128)
    shapes = {f"image_proj.{key}": shape for key, shape in MINIATURE_PROJECTIONS[layout][1].items()}
    return shapes | {f"ip_adapter.{key}": shape for key, shape in key_values.items()}


@pytest.mark.parametrize("layout", MINIATURE_PROJECTIONS)
def test_an_adapter_for_the_miniature_is_told_by_its_tensors(layout: str) -> None:
    spec = detection.identify(miniature(layout), "adapter.safetensors")
    assert (spec.family, spec.widths) == (MINIATURE, (64,) * 7)
    assert (spec.variant, spec.evidence, spec.alternatives) == (layout, "tensors", ())
    assert spec.encoder is MINIATURE_CLIP and spec.encoder_name == "Miniature CLIP"
    tokens = MINIATURE_PROJECTIONS[layout][0]
    assert spec.projection.tokens == tokens
    assert spec.summary() == f"{layout} for Miniature, {tokens} tokens, needs Miniature CLIP"
    module = IPAdapter(spec, nn, device="meta")
    needed = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert needed == miniature(layout)


def test_the_miniature_is_not_offered_to_users() -> None:
    shapes = {k: s for k, s in miniature("global").items() if not k.startswith("ip_adapter.13")}
    with pytest.raises(IncompatibleModelError, match=r"6 cross-attention layers") as caught:
        detection.identify(shapes, "adapter.safetensors")
    assert "IP-Adapters for SD 1.5, SD 2.x, SDXL, Kolors." in str(caught.value)
