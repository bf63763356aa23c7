"""The ids of before March 2024: what reaches the model, against the formulas of that time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.host.conftest import draw, project
from tests.host.test_encoding import HIDDEN, POOLED, SIZE, clip_vision
from tests.synthetic import adapters, catalogue
from tests.synthetic.face_models import Disc, build_pack, picture
from tests.tolerance import assert_close

pytestmark = pytest.mark.host

WIDE = 1280
"""Width of the features of FaceID Plus: narrower files cannot be one of two versions."""

WINDOW = {"start_at": 0.2, "end_at": 0.8}
SCALINGS = {
    "original": "V only",
    "linear": "K+V",
    "channel penalty": "K+mean(V) w/ C penalty",
}


@pytest.fixture(scope="module")
def vision(host: Any) -> Any:
    with torch.inference_mode():
        return clip_vision()


@pytest.fixture(scope="module")
def wide(host: Any) -> Any:
    with torch.inference_mode():
        return clip_vision(hidden_size=WIDE, num_attention_heads=20)


@pytest.fixture(scope="module")
def load(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("adapters")
    sizes = adapters.NANO_WIDTHS

    def structure() -> dict[str, tuple[int, ...]]:
        layout = catalogue.resampler(WIDE, 768, 12, 768, depth=1)
        del layout["latents"]
        projection = catalogue.face_projection(768, 4) | {
            f"perceiver_resampler.{key}": shape for key, shape in layout.items()
        }
        attention = catalogue.attention_with_lora(sizes, 768)
        return {f"image_proj.{key}": shape for key, shape in projection.items()} | {
            f"ip_adapter.{key}": shape for key, shape in attention.items()
        }

    def load_one(kind: str, name: str = "") -> Any:
        path = folder / f"{name or kind}.safetensors"
        if kind == "base":
            tensors = adapters.base_sd15(sizes, features=POOLED)
        elif kind == "plus":
            tensors = adapters.plus_sd15(sizes, features=HIDDEN, inner=64, heads=1, depth=1)
        else:
            tensors = adapters.fill(structure())
        if not path.exists():
            adapters.write_safetensors(tensors, path)
        return host.library("ip_adapter.host.adapters").load(path)

    return load_one


def entries(model: Any) -> Any:
    return model.model_options["transformer_options"]["image_prompts"]


def pictures(count: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(3))


def seen(vision: Any, adapter: Any, image: Tensor) -> Tensor:
    """Features by the host's own node."""
    out = vision.encode_image(image)
    pooled = adapter.spec.projection.image == "pooled"
    return out.image_embeds if pooled else out.penultimate_hidden_states


# Pictures


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("is_unfolded", [False, True])
def test_apply(
    host: Any, model: Any, vision: Any, load: Callable[[str], Any], kind: str, is_unfolded: bool
) -> None:
    adapter, image, mask = load(kind), pictures(3), torch.rand(2, 9, 7)
    for word, scaling in SCALINGS.items():
        (patched,) = (
            host.node("IPAdapterApply")
            .execute(
                ipadapter=adapter,
                clip_vision=vision,
                image=image,
                model=model,
                weight=0.7,
                noise=0.0,
                weight_type=word,
                unfold_batch=is_unfolded,
                attn_mask=mask,
                **WINDOW,
            )
            .args
        )
        (entry,) = entries(patched)
        assert entry.scaling == scaling
        assert set(entry.weights.values()) == {0.7} and len(entry.weights) == 16
        assert (entry.timing.start, entry.timing.end, entry.timing.curve) == (0.2, 0.8, None)
        assert torch.equal(entry.masks[0], mask)
    tokens = project(host, adapter, image=seen(vision, adapter, image))
    # "No image": zeros as an embedding, the host's view of a black picture as hidden states.
    black = seen(vision, adapter, torch.zeros(1, SIZE, SIZE, 3))
    nothing = project(host, adapter, image=black if kind == "plus" else torch.zeros_like(black))
    got = entry.prompt.conditional
    assert got.shape[0] == (3 if is_unfolded else 1)
    assert_close(got.reshape(tokens.shape), tokens)
    flat = entry.prompt.unconditional.reshape(-1, *tokens.shape[1:])
    assert_close(flat, nothing.expand(flat.shape))


def test_noise_leads_away_from_a_shuffled_picture(
    host: Any, model: Any, vision: Any, load: Callable[[str], Any]
) -> None:
    adapter, image = load("plus"), pictures(2)
    apply = host.node("IPAdapterApply")

    def negative(noise: float) -> Tensor:
        given = (adapter, vision, image, model, 1.0, noise, "original", 0.0, 1.0, False)
        tokens = entries(apply.execute(*given).args[0])[0].prompt.unconditional
        return tokens.reshape(-1, 16, tokens.shape[-1])

    # Each picture has a negative of its own, of the node that makes noise today.
    for noise in (0.3, 1.0):
        (shuffled,) = host.node("IPAdapterNoise").execute("shuffle", 1 - noise, 0, image).args
        expected = project(host, adapter, image=seen(vision, adapter, shuffled))
        assert_close(negative(noise), expected)
    assert not torch.allclose(negative(0.3), negative(1.0))


def test_weight_types_give_pictures_of_their_own(
    host: Any, model: Any, sample: Any, vision: Any, load: Callable[[str], Any]
) -> None:
    def run(word: str, weight: float = 0.5) -> Tensor:
        given = (load("base"), vision, pictures(1), model, weight, 0.0, word, 0.0, 1.0, False)
        return sample(host.node("IPAdapterApply").execute(*given).args[0])

    found = [run(word) for word in SCALINGS]
    assert all(torch.isfinite(one).all() for one in found)
    assert all(not torch.equal(a, b) for a, b in pairwise(found))
    # At weight 1 the first two are the same.
    assert_close(run("original", 1.0), run("linear", 1.0))


# Tiles


def tiles(host: Any, image: Tensor, count: int, weight: float) -> tuple[Tensor, Tensor]:
    return host.library("ip_adapter.legacy.masked_tiles").masked_tiles(image, count, weight)


def test_tiles_of_one_row_need_no_weight(host: Any) -> None:
    image = pictures(2, 224, 700)  # three tiles and 28 pixels: half of these at each end
    cut, masks = tiles(host, image, 1, 0.6)
    assert cut.shape == (3, 224, 224, 3) and masks.shape == (3, 224, 700)
    for i, left in enumerate((14, 238, 462)):
        assert_close(cut[i], image[0, :, left : left + 224])
        expected = torch.zeros(224, 700)
        expected[:, left : left + 224] = 1.0
        assert torch.equal(masks[i], expected)


def test_tiles_of_a_grid_follow_those_of_the_whole(host: Any) -> None:
    image = pictures(1, 448, 510)  # 62 pixels left: one more column, at the end
    cut, masks = tiles(host, image, 2, 0.6)
    corners = [(top, left) for top in (0, 224) for left in (0, 224, 286)]
    whole = len(cut) - len(corners)
    assert whole == 1 and masks.shape == (whole + len(corners), 448, 510)
    for i, (top, left) in enumerate(corners, start=whole):
        assert_close(cut[i], image[0, top : top + 224, left : left + 224])
        expected = torch.zeros(448, 510)
        expected[top : top + 224, left : left + 224] = 0.6
        assert torch.equal(masks[i], expected)
    # Half as large it is 224 x 255, of which 15 pixels at each end are left out.
    assert set(masks[0].unique().tolist()) == {0.0, 1.0}
    columns = masks[0].any(dim=0).nonzero().flatten()
    assert abs(int(columns[0]) - 30) <= 1 and abs(int(columns[-1]) - 477) <= 1
    assert masks[0].any(dim=1).all()


def test_a_tall_picture_is_scaled_by_its_width(host: Any) -> None:
    cut, masks = tiles(host, pictures(1, 300, 100), 1, 0.5)
    assert cut.shape == (3, 224, 224, 3) and masks.shape == (3, 672, 224)
    assert cut.amin() >= 0 and cut.amax() <= 1  # the bicubic overshoots


def test_each_tile_is_applied_where_it_is(
    host: Any, model: Any, vision: Any, load: Callable[[str], Any]
) -> None:
    adapter, image, node = load("base"), pictures(1, 448, 448), host.node("IPAdapterTilesMasked")
    (patched,) = node.execute(
        adapter, vision, image, model, 0.7, 0.0, "linear", 0.0, 1.0, 2, 0.6
    ).args
    cut, masks = tiles(host, image, 2, 0.6)
    assert len(entries(patched)) == len(cut) == 5
    tokens = project(host, adapter, image=seen(vision, adapter, cut))
    for entry, expected, mask in zip(entries(patched), tokens, masks, strict=True):
        assert_close(entry.prompt.conditional[0], expected)
        assert torch.equal(entry.masks[0], mask[None]) and entry.scaling == "K+V"
    (whole,) = node.execute(
        adapter, vision, image, model, 0.7, 0.5, "linear", 0.0, 1.0, 0, 0.6
    ).args
    assert len(entries(whole)) == 1 and not entries(whole)[0].masks


# Embeds


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_apply_encoded(
    host: Any, model: Any, vision: Any, load: Callable[[str], Any], kind: str
) -> None:
    adapter, node = load(kind), host.node("IPAdapterApplyEncoded")
    given = seen(vision, adapter, pictures(3))
    positive, negative = given[:2], given[1:]
    stack = torch.stack((positive, negative))  # as the encoder of that time made it
    for is_unfolded in (False, True):
        (patched,) = node.execute(
            adapter, stack, model, 0.7, "channel penalty", 0.0, 1.0, is_unfolded
        ).args
        (entry,) = entries(patched)
        for got, features in (
            (entry.prompt.conditional, positive),
            (entry.prompt.unconditional, negative),
        ):
            assert len(got) == (2 if is_unfolded else 1)
            tokens = project(host, adapter, image=features)
            assert_close(got.reshape(tokens.shape), tokens)
        assert entry.scaling == "K+mean(V) w/ C penalty"


def test_embeds_of_today_are_taken_too(
    host: Any, model: Any, vision: Any, load: Callable[[str], Any]
) -> None:
    adapter = load("base")
    given = seen(vision, adapter, pictures(2))
    node = host.node("IPAdapterApplyEncoded")
    (patched,) = node.execute(adapter, given, model, 0.7, "linear", 0.0, 1.0, False).args
    tokens = project(host, adapter, image=torch.zeros(1, POOLED))
    got = entries(patched)[0].prompt.unconditional.reshape(-1, *tokens.shape[1:])
    assert_close(got, tokens.expand(got.shape))


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        ((2, 3, 1024), (2, 1, 1024), (2, 4, 1024)),  # stacks of pooled features
        ((2, 1, 257, 1280), (2, 2, 257, 1280), (2, 3, 257, 1280)),  # stacks of hidden ones
        ((3, 1024), (1, 1024), (4, 1024)),  # those of today
        ((2, 257, 1280), (1, 257, 1280), (3, 257, 1280)),
        ((2, 577, 1024), (2, 577, 1024), (4, 577, 1024)),
    ],
)
def test_batch_embeds(
    host: Any, first: tuple[int, ...], second: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    one, two = draw(*first, seed=1), draw(*second, seed=2)
    (both,) = host.node("IPAdapterBatchEmbeds").execute(one, two).args
    assert both.shape == shape
    axis = 1 if shape[0] == 2 else 0
    assert torch.equal(both.narrow(axis, 0, first[axis]), one)
    assert torch.equal(both.narrow(axis, first[axis], second[axis]), two)


def test_embeds_of_two_kinds_are_refused(host: Any) -> None:
    node = host.node("IPAdapterBatchEmbeds")
    for other in (draw(1, 1280), draw(2, 1, 1024), draw(2, 1, 257, 1280)):
        with pytest.raises(Exception, match="do not belong together"):
            node.execute(draw(1, 1024), other)


# Faces


@pytest.fixture(scope="module")
def face_model(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_pack(tmp_path_factory.mktemp("face") / "pack", others=False)
    return host.library("ip_adapter.face_models").load(folder, "my own")


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    return picture(320, 400, [Disc(150, 160, 24, tilt=10)])


def apply_face(
    host: Any,
    adapter: Any,
    vision: Any,
    face_model: Any,
    image: Tensor,
    model: Any,
    *,
    is_v2: bool = True,
    structure: float = 1.0,
    noise: float = 0.0,
    is_unfolded: bool = False,
) -> Any:
    (patched,) = (
        host.node("IPAdapterApplyFaceID")
        .execute(
            ipadapter=adapter,
            clip_vision=vision,
            insightface=face_model,
            image=image,
            model=model,
            weight=0.7,
            noise=noise,
            weight_type="original",
            faceid_v2=is_v2,
            weight_v2=structure,
            unfold_batch=is_unfolded,
            **WINDOW,
        )
        .args
    )
    (entry,) = entries(patched)
    return entry


@pytest.mark.parametrize("is_v2", [False, True])
def test_apply_face(
    host: Any,
    model: Any,
    wide: Any,
    face_model: Any,
    load: Callable[..., Any],
    portrait: Tensor,
    is_v2: bool,
) -> None:
    adapter = load("face", "somebody's copy")  # of which nothing says which version it is
    assert {adapter.spec.variant, *adapter.spec.alternatives} >= {"faceid-plus", "faceid-plusv2"}
    entry = apply_face(host, adapter, wide, face_model, portrait, model, is_v2=is_v2, structure=0.4)
    assert entry.adapter.spec.variant == ("faceid-plusv2" if is_v2 else "faceid-plus")

    node = host.node("ImagePromptDetectFace")
    (face, _) = node.execute(face_model, portrait, "confidence", 0).args
    vector = face.embeddings / face.embeddings.norm(dim=-1, keepdim=True)
    crop = face.crops(256)

    # The formula of that time: the resampler's answer, in V2 times a weight on top of the identity.
    projection = entry.adapter.module.image_proj
    identity = projection.norm(projection.proj(vector).reshape(-1, 4, 768))
    hidden = wide.encode_image(crop).penultimate_hidden_states
    read = projection.perceiver_resampler.read(hidden, identity)
    assert_close(entry.prompt.conditional, identity + 0.4 * read if is_v2 else read)
    nobody = projection.norm(projection.proj(torch.zeros(1, 512)).reshape(-1, 4, 768))
    black = wide.encode_image(torch.zeros(1, SIZE, SIZE, 3)).penultimate_hidden_states
    empty = projection.perceiver_resampler.read(black, nobody)
    assert_close(entry.prompt.unconditional, nobody + 0.4 * empty if is_v2 else empty)


def test_noise_and_frames_of_faces(
    host: Any,
    model: Any,
    wide: Any,
    face_model: Any,
    load: Callable[..., Any],
    portrait: Tensor,
) -> None:
    adapter = load("face", "ip-adapter-faceid-plusv2_sd15")
    given = (host, adapter, wide, face_model, torch.cat((portrait, portrait.flip(2))), model)
    plain = apply_face(*given)
    assert plain.prompt.conditional.shape[:2] == (1, 8)
    frames = apply_face(*given, is_unfolded=True)
    assert frames.prompt.conditional.shape[:2] == (2, 4)
    assert_close(frames.prompt.conditional.reshape(1, 8, 768), plain.prompt.conditional)
    noised = apply_face(*given, noise=0.5)
    assert_close(noised.prompt.conditional, plain.prompt.conditional)
    assert not torch.allclose(noised.prompt.unconditional, plain.prompt.unconditional)


def test_what_the_content_says_beats_faceid_v2(
    host: Any,
    model: Any,
    wide: Any,
    face_model: Any,
    load: Callable[..., Any],
    portrait: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = load("face", "ip-adapter-faceid-plusv2_sd15")
    known = host.library("ip_adapter.host.adapters").load(adapter.path, "faceid-plusv2")
    entry = apply_face(host, known, wide, face_model, portrait, model, is_v2=False)
    assert entry.adapter.spec.variant == "faceid-plusv2"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "faceid_v2 says that" in warning and "used is what its content says" in warning


def test_the_face_node_takes_adapters_of_pictures(
    host: Any, model: Any, vision: Any, face_model: Any, load: Callable[[str], Any]
) -> None:
    adapter, image = load("base"), pictures(1)
    entry = apply_face(host, adapter, vision, face_model, image, model)
    assert_close(
        entry.prompt.conditional, project(host, adapter, image=seen(vision, adapter, image))
    )


def test_face_loader(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import folder_paths

    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "insightface", ([str(tmp_path)], {".onnx"})
    )
    host.library("ip_adapter.host.faces")._kept.clear()
    node = host.node("InsightFaceLoader")
    before = node.fingerprint_inputs("CPU")
    build_pack(tmp_path / "models" / "buffalo_l", others=False)
    assert node.fingerprint_inputs("CPU") != before
    assert node.execute("CPU").args[0].label == "buffalo_l"


@pytest.mark.parametrize("is_padded", [False, True])
def test_prepared_for_faces(host: Any, is_padded: bool) -> None:
    levels = torch.randint(0, 256, (300, 200, 3), generator=torch.Generator().manual_seed(1))
    image = (levels / 255)[None]
    node = host.node("PrepImageForInsightFace")
    (out,) = node.execute(image, "bottom", 0.0, is_padded).args
    assert out.shape == (1, 640, 640, 3)
    side = 580 if is_padded else 640
    square = Image.fromarray(levels[100:].byte().numpy())
    expected = np.asarray(square.resize((side, side), Image.Resampling.LANCZOS)) / 255
    border = (640 - side) // 2
    inner = out[0, border : 640 - border, border : 640 - border]
    assert np.abs(inner.numpy() - expected).max() <= 1 / 255 + 1e-6
    if is_padded:
        assert (out[0, :30] == 1).all() and (out[0, :, -30:] == 1).all()


# Interfaces


APPLY = [
    ("weight", "FLOAT", {"default": 1.0, "min": -1, "max": 3, "step": 0.05}),
    ("noise", "FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01}),
    ("weight_type", ["original", "linear", "channel penalty"], {}),
    ("start_at", "FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001}),
    ("end_at", "FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.001}),
]
UNFOLD = ("unfold_batch", "BOOLEAN", {"default": False})
PICTURES = [
    ("ipadapter", "IPADAPTER", {}),
    ("clip_vision", "CLIP_VISION", {}),
    ("image", "IMAGE", {}),
    ("model", "MODEL", {}),
]
INTERFACE: dict[str, tuple[list[tuple[str, Any, dict[str, Any]]], bool, str]] = {
    "IPAdapterApply": ([*PICTURES, *APPLY, UNFOLD], True, "MODEL"),
    "IPAdapterApplyFaceID": (
        [
            *PICTURES[:2],
            ("insightface", "INSIGHTFACE", {}),
            *PICTURES[2:],
            *APPLY,
            ("faceid_v2", "BOOLEAN", {"default": False}),
            ("weight_v2", "FLOAT", {"default": 1.0, "min": -1, "max": 3, "step": 0.05}),
            UNFOLD,
        ],
        True,
        "MODEL",
    ),
    "IPAdapterApplyEncoded": (
        [
            PICTURES[0],
            ("embeds", "EMBEDS", {}),
            PICTURES[3],
            APPLY[0],
            *APPLY[2:],
            UNFOLD,
        ],
        True,
        "MODEL",
    ),
    "IPAdapterTilesMasked": (
        [
            *PICTURES,
            ("weight", "FLOAT", {"default": 0.7, "min": -1, "max": 3, "step": 0.05}),
            *APPLY[1:],
            ("short_side_tiles", "INT", {"default": 1, "min": 0, "max": 12, "step": 1}),
            ("tile_weight", "FLOAT", {"default": 0.6, "min": 0.0, "max": 1.0, "step": 0.05}),
        ],
        False,
        "MODEL",
    ),
    "IPAdapterBatchEmbeds": (
        [("embed1", "EMBEDS", {}), ("embed2", "EMBEDS", {})],
        False,
        "EMBEDS",
    ),
    "InsightFaceLoader": ([("provider", ["CPU", "CUDA", "ROCM"], {})], False, "INSIGHTFACE"),
    "PrepImageForInsightFace": (
        [
            ("image", "IMAGE", {}),
            ("crop_position", ["center", "top", "bottom", "left", "right"], {}),
            ("sharpening", "FLOAT", {"default": 0.0, "min": 0, "max": 1, "step": 0.05}),
            ("pad_around", "BOOLEAN", {"default": True}),
        ],
        False,
        "IMAGE",
    ),
}
"""Inputs in the order of that time's widgets, whether a mask may follow, and the output."""


@pytest.mark.parametrize("node_id", INTERFACE)
def test_interface_is_that_of_the_time(host: Any, node_id: str) -> None:
    inputs, has_mask, output = INTERFACE[node_id]
    reported = host.node(node_id).GET_NODE_INFO_V1()
    required = [
        (name, kind, *more) for name, (kind, *more) in reported["input"]["required"].items()
    ]
    assert required == [tuple(row) for row in inputs]
    assert list(reported["input"].get("optional", {})) == (["attn_mask"] if has_mask else [])
    assert reported["output"] == [output] and reported["output_name"] == [output]
    assert reported["deprecated"] and reported["name"] == node_id
