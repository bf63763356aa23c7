"""Towers told apart by names and shapes, in every naming that files come in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ip_adapter import encoders
from ip_adapter.encoders import Encoder, FeatureKind, Location, encoder_of, locate, recognise
from ip_adapter.openclip import resize_positions

Shapes = dict[str, tuple[int, ...]]

GEOMETRIES = {
    # From the model cards: hidden, pooled, layers, positions, patch.
    "OpenCLIP ViT-H/14": (1280, 1024, 32, 257, 14),
    "OpenCLIP ViT-bigG/14": (1664, 1280, 48, 257, 14),
    "CLIP ViT-L/14": (1024, 768, 24, 257, 14),
    "CLIP ViT-L/14-336": (1024, 768, 24, 577, 14),
    "SigLIP so400m/14-384": (1152, None, 27, 729, 14),
    "SigLIP so400m/16-512": (1152, None, 27, 1024, 16),
}


def hugging_face(
    hidden: int, pooled: int | None, layers: int, positions: int, patch: int = 14
) -> Shapes:
    base = "vision_model.embeddings."
    shapes: Shapes = {
        f"{base}patch_embedding.weight": (hidden, 3, patch, patch),
        f"{base}position_embedding.weight": (positions, hidden),
        "vision_model.post_layernorm.weight": (hidden,),
    }
    if math.isqrt(positions) ** 2 != positions:  # one more than a square: a class token
        shapes[f"{base}class_embedding"] = (hidden,)
    if pooled is not None:
        shapes["visual_projection.weight"] = (pooled, hidden)
    for layer in range(layers):
        shapes[f"vision_model.encoder.layers.{layer}.layer_norm1.weight"] = (hidden,)
        shapes[f"vision_model.encoder.layers.{layer}.layer_norm1.bias"] = (hidden,)
    return shapes


def open_clip(hidden: int, pooled: int, layers: int, positions: int, patch: int = 14) -> Shapes:
    shapes: Shapes = {
        "visual.conv1.weight": (hidden, 3, patch, patch),
        "visual.class_embedding": (hidden,),
        "visual.positional_embedding": (positions, hidden),
        "visual.ln_post.weight": (hidden,),
        "visual.proj": (hidden, pooled),
    }
    for layer in range(layers):
        shapes[f"visual.transformer.resblocks.{layer}.attn.in_proj_weight"] = (3 * hidden, hidden)
        shapes[f"transformer.resblocks.{layer % 12}.attn.in_proj_weight"] = (1, 1)  # text half
    return shapes


@pytest.mark.parametrize("name", GEOMETRIES)
def test_published_towers_are_recognised_in_hugging_face_names(name: str) -> None:
    hidden, pooled, layers, positions, patch = GEOMETRIES[name]
    found = recognise(hugging_face(hidden, pooled, layers, positions, patch))
    assert found in encoders.ENCODERS
    assert (found.name, found.hidden, found.pooled, found.layers) == (name, hidden, pooled, layers)
    assert (found.tokens, found.patch) == (positions, patch)
    assert found.link.startswith("https://huggingface.co/")
    assert found.file


@pytest.mark.parametrize("name", [name for name, row in GEOMETRIES.items() if row[1] is not None])
@pytest.mark.parametrize("prefix", ["", "embedder.model."])
def test_published_towers_are_recognised_in_open_clip_names(name: str, prefix: str) -> None:
    hidden, pooled, layers, positions, patch = GEOMETRIES[name]
    assert pooled is not None
    shapes = open_clip(hidden, pooled, layers, positions, patch)
    found = recognise({prefix + key: shape for key, shape in shapes.items()})
    assert found in encoders.ENCODERS
    assert found.name == name
    assert locate(prefix + key for key in shapes) == Location("open_clip", f"{prefix}visual.")


@pytest.fixture(scope="module")
def miniature() -> Shapes:
    """The whole CLIP of the project's own family as open_clip names it."""
    import open_clip

    with torch.device("meta"):
        model = open_clip.CLIP(
            embed_dim=128,
            vision_cfg={
                "image_size": 64,
                "layers": 4,
                "width": 128,
                "head_width": 32,
                "patch_size": 8,
            },
            text_cfg={
                "context_length": 77,
                "vocab_size": 40,
                "width": 128,
                "heads": 4,
                "layers": 3,
            },
        )
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def test_the_miniature_is_recognised_in_both_namings(miniature: Shapes) -> None:
    assert recognise(miniature) is encoders.MINIATURE
    renamed = hugging_face(128, 128, 4, 65, 8)
    assert recognise(renamed) is encoders.MINIATURE
    found = encoders.MINIATURE
    assert (found.name, found.tokens, found.size, found.patch) == ("Miniature CLIP", 65, 64, 8)
    assert (found.feature_width("pooled"), found.feature_width("hidden")) == (128, 128)


def test_its_text_half_alone_is_no_tower(miniature: Shapes) -> None:
    text = {key: shape for key, shape in miniature.items() if not key.startswith("visual.")}
    assert len(text) > 30 and recognise(text) is None


def test_users_are_told_of_published_towers_only() -> None:
    assert {encoder.name for encoder in encoders.PUBLIC} == GEOMETRIES.keys()
    assert all(encoder.link and encoder.file for encoder in encoders.PUBLIC)
    assert set(encoders.ENCODERS) - set(encoders.PUBLIC) == {encoders.MINIATURE}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("prefix", ["model.", "state_dict.clip."])
def test_wrappers_and_a_text_half_do_not_matter(name: str, prefix: str) -> None:
    shapes = hugging_face(*GEOMETRIES[name])
    shapes |= {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.encoder.layers.0.layer_norm1.weight": (768,),
        "text_projection.weight": (768, 768),
        "logit_scale": (),
    }
    found = recognise({prefix + key: shape for key, shape in shapes.items()})
    assert found is not None
    assert found.name == name


def test_towers_saved_without_their_wrapper_are_recognised() -> None:
    """transformers 5 saves CLIPVisionModel and SiglipVisionModel as ``embeddings.…``."""
    bare = {
        key.removeprefix("vision_model."): shape
        for key, shape in hugging_face(1152, None, 27, 729).items()
    }
    assert recognise(bare) is encoders.SIGLIP_384
    assert locate(bare) == Location("hugging_face", "")


@pytest.mark.parametrize(
    ("geometry", "name", "size"),
    [
        ((1664, 1280, 48, 1025, 14), "OpenCLIP ViT-bigG/14 at 448 pixels", 448),
        ((1280, 1024, 32, 730, 14), "OpenCLIP ViT-H/14 at 378 pixels", 378),
        ((1152, None, 27, 576, 16), "SigLIP so400m/16 at 384 pixels", 384),
    ],
)
def test_fine_tunes_at_another_size_keep_their_tower(
    geometry: tuple[int, int | None, int, int, int], name: str, size: int
) -> None:
    found = recognise(hugging_face(*geometry))
    assert found is not None
    assert (found.name, found.size, found.tokens) == (name, size, geometry[3])
    assert (found.hidden, found.pooled) == geometry[:2]
    if geometry[1] is not None:
        assert recognise(open_clip(*geometry)) == found  # type: ignore[arg-type]


def test_a_linear_patch_embedding_is_measured() -> None:
    shapes = hugging_face(1152, None, 27, 256, 16)
    shapes["vision_model.embeddings.patch_embedding.weight"] = (1152, 3 * 16 * 16)
    found = recognise(shapes)
    assert found is not None
    assert (found.patch, found.size, found.tokens) == (16, 256, 256)


def test_a_missing_projection_is_said() -> None:
    found = recognise(hugging_face(1280, None, 32, 257))
    assert found is not None
    assert found.name == "OpenCLIP ViT-H/14 without its projection"
    assert (found.feature_width("pooled"), found.feature_width("hidden")) == (None, 1280)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ((768, 512, 12, 50, 32), "hidden width 768 and pooled width 512"),
        ((1280, 1280, 32, 257, 14), "hidden width 1280 and pooled width 1280"),
        ((1280, 1024, 31, 257, 14), "hidden width 1280 and pooled width 1024"),  # cut short
        ((768, None, 12, 1024, 16), "hidden width 768 and no projection"),
    ],
)
def test_unknown_towers_are_named_by_their_widths(
    geometry: tuple[int, int | None, int, int, int], words: str
) -> None:
    hidden, pooled, layers, positions, patch = geometry
    found = recognise(hugging_face(*geometry))
    assert found is not None
    assert words in found.name
    assert (found.hidden, found.pooled, found.layers) == (hidden, pooled, layers)
    assert (found.tokens, found.patch, found.link) == (positions, patch, "")


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)},
        {"text_model.embeddings.position_embedding.weight": (77, 768)},
        {"transformer.resblocks.0.attn.in_proj_weight": (3072, 1024), "ln_final.weight": (1024,)},
        # DINOv2 as transformers names it
        {
            "embeddings.patch_embeddings.projection.weight": (1536, 3, 14, 14),
            "embeddings.position_embeddings": (1, 1370, 1536),
            "encoder.layer.39.layer_scale2.lambda1": (1536,),
        },
        # CLIP's ResNet, and BLIP's tower with its fused attention
        {"visual.conv1.weight": (32, 3, 3, 3), "visual.layer1.0.conv1.weight": (64, 64, 1, 1)},
        {
            "vision_model.embeddings.patch_embedding.weight": (1024, 3, 16, 16),
            "vision_model.embeddings.position_embedding": (1, 577, 1024),
        },
    ],
)
def test_other_files_are_no_tower(shapes: Shapes) -> None:
    assert recognise(shapes) is None


@pytest.mark.parametrize(
    ("hidden", "pooled", "encoder"),
    [
        (1280, 1024, encoders.VIT_H),
        (1664, 1280, encoders.VIT_BIGG),
        (1024, 768, encoders.VIT_L),
        (1152, None, encoders.SIGLIP_384),
        (128, 128, encoders.MINIATURE),
    ],
)
def test_widths_alone_name_the_common_tower(
    hidden: int, pooled: int | None, encoder: Encoder
) -> None:
    assert encoder_of(hidden, pooled) is encoder
    if pooled != hidden:
        swapped = encoder_of(pooled or 1, hidden)
        assert swapped not in encoders.ENCODERS


@pytest.mark.parametrize(
    ("encoder", "kind", "width"),
    [
        (encoders.VIT_H, "pooled", 1024),
        (encoders.VIT_H, "hidden", 1280),
        (encoders.VIT_BIGG, "pooled", 1280),
        (encoders.VIT_L_336, "hidden", 1024),
        (encoders.SIGLIP_384, "pooled", None),
        (encoders.SIGLIP_384, "hidden", 1152),
    ],
)
def test_feature_widths(encoder: Encoder, kind: FeatureKind, width: int | None) -> None:
    assert encoder.feature_width(kind) == width


@pytest.mark.parametrize(
    ("encoder", "tokens", "at_448"),
    [
        (encoders.VIT_BIGG, 257, 1025),
        (encoders.VIT_L_336, 577, 1025),
        (encoders.SIGLIP_384, 729, 1024),
        (encoders.SIGLIP_512, 1024, 784),
        (encoders.MINIATURE, 65, 3137),
        (replace(encoders.VIT_H, size=0), 1, 1025),
    ],
)
def test_token_counts(encoder: Encoder, tokens: int, at_448: int) -> None:
    assert (encoder.tokens, encoder.tokens_at(448)) == (tokens, at_448)


def test_positions_that_fit_are_untouched() -> None:
    table = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert resize_positions(table, (3, 3), has_class_token=True) is table
    assert resize_positions(table[1:], (3, 3), has_class_token=False).shape == (9, 4)


@pytest.mark.parametrize("has_class_token", [True, False])
def test_positions_are_stretched_row_by_row(has_class_token: bool) -> None:
    """A ramp down the rows stays a ramp down the rows; bicubic is written out on one column."""
    rows = torch.arange(6.0)
    table = rows[:, None].expand(6, 6).reshape(36, 1)
    if has_class_token:
        table = torch.cat((torch.tensor([[99.0]]), table))
    found = resize_positions(table, (12, 6), has_class_token=has_class_token)
    assert found.shape == (72 + has_class_token, 1)
    if has_class_token:
        assert float(found[0]) == 99.0
    grid = found[int(has_class_token) :].view(12, 6)
    assert torch.equal(grid, grid[:, :1].expand(12, 6))
    # Keys' cubic kernel, a = -0.75; output 5 lies at (5 + 0.5) / 2 - 0.5 = 2.25.
    a, t = -0.75, 0.25

    def near(x: float) -> float:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: float) -> float:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    expected = 1 * far(1 + t) + 2 * near(t) + 3 * near(1 - t) + 4 * far(2 - t)
    assert float(grid[5, 0]) == pytest.approx(expected, abs=1e-6)


def test_half_precision_positions_are_stretched_in_single() -> None:
    table = torch.randn(17, 8, generator=torch.Generator().manual_seed(0)).half()
    found = resize_positions(table, (7, 7), has_class_token=True)
    square = table[1:].float().view(4, 4, 8).permute(2, 0, 1)[None]
    whole = F.interpolate(square, size=(7, 7), mode="bicubic")[0].flatten(1).T.half()
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.cat((table[:1], whole)))
