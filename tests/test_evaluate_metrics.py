"""The evaluator's figures against formulas written out, its scorer against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ip_adapter.errors import CheckpointError, MissingFileError
from ip_adapter.evaluate import metrics, scorer
from tests.tolerance import assert_close

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = ["a striped red circle", "two dogs on a beach, one of them asleep", "", "word " * 200]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


def tiny_clip(folder: Path, **changes: Any) -> Path:
    """A random CLIP as open_clip publishes its own: configuration and weights in a folder."""
    import open_clip

    config = {**CONFIG, **changes}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(folder: Path) -> scorer.Scorer:
    return scorer.load_clip(f"local-dir:{folder}")


# ---- figures on random features -----------------------------------------------------------------


def by_hand(one: Tensor, other: Tensor) -> float:
    dot = sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))
    lengths = [math.sqrt(sum(a * a for a in v.tolist())) for v in (one, other)]
    return dot / (lengths[0] * lengths[1])


@pytest.mark.parametrize("figure", [metrics.clip_i, metrics.clip_t, metrics.dino_i])
def test_figures_are_cosines_with_the_samples_own_target(figure: Any) -> None:
    made, targets = 3 * draw(5, 4, 12), draw(5, 12, seed=1)
    found = figure(made, targets)
    assert found.shape == (5, 4)
    for s in range(5):
        for k in range(4):
            assert float(found[s, k]) == pytest.approx(by_hand(made[s, k], targets[s]), abs=1e-6)


def test_a_picture_agrees_with_itself_and_not_with_its_opposite() -> None:
    target = draw(1, 12)
    both = torch.stack((7 * target[0], -target[0])).unsqueeze(0)
    assert metrics.clip_i(both, target).tolist() == [[pytest.approx(1), pytest.approx(-1)]]


def test_clip_score_is_two_and_a_half_times_what_is_above_zero() -> None:
    found = metrics.clip_score(torch.tensor([-0.3, 0.0, 0.2352, 0.4]))
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.588, 1.0])
    assert float(metrics.clip_score(torch.tensor(0.3), weight=1.0)) == pytest.approx(0.3)


def test_the_error_is_over_samples_and_not_over_pictures() -> None:
    scores = torch.tensor([[0.1, 0.3], [0.5, 0.7], [0.6, 1.0]])
    found = metrics.summarise(scores)
    means = [0.2, 0.6, 0.8]
    mean = sum(means) / 3
    deviation = math.sqrt(sum((m - mean) ** 2 for m in means) / 2)
    assert found.mean == pytest.approx(mean)
    assert found.standard_error == pytest.approx(deviation / math.sqrt(3))
    assert (found.samples, found.pictures) == (3, 6)


def test_summary_agrees_with_numpy_on_random_scores() -> None:
    scores = torch.rand(40, 4, generator=torch.Generator().manual_seed(3))
    each = scores.double().numpy().mean(axis=1)
    found = metrics.summarise(scores)
    assert found.mean == pytest.approx(each.mean())
    assert found.standard_error == pytest.approx(each.std(ddof=1) / np.sqrt(40))


def test_one_sample_has_no_error() -> None:
    assert metrics.summarise(torch.tensor([[0.5, 0.7]])).standard_error is None


def test_a_difference_is_paired_by_sample() -> None:
    level = torch.tensor([[0.1, 0.1], [0.9, 0.9]])  # samples differ much, conditions little
    found = metrics.difference(level + torch.tensor([[0.02], [0.04]]), level)
    assert found.mean == pytest.approx(0.03)
    assert found.standard_error == pytest.approx(0.01)  # sqrt(2 * 0.01**2) / sqrt(2)


# ---- the scorer ---------------------------------------------------------------------------------


def hugging_face(folder: Path) -> Any:
    """The same weights in transformers' CLIP, by its own names."""
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    half = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    half |= {"num_attention_heads": 2, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        text_config={**half, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**half, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    judge = CLIPModel(config).eval()
    given = load_file(folder / "open_clip_model.safetensors")
    wanted: dict[str, Tensor] = {
        "logit_scale": given["logit_scale"],
        "visual_projection.weight": given["visual.proj"].T,
        "text_projection.weight": given["text_projection"].T,
        "text_model.embeddings.token_embedding.weight": given["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": given["positional_embedding"],
        "vision_model.embeddings.class_embedding": given["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": given["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": given["visual.positional_embedding"],
    }
    norms = {
        "text_model.final_layer_norm": "ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for ours, theirs in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for i in range(2):
            layer, block = f"{ours}.encoder.layers.{i}", f"{theirs}.resblocks.{i}"
            norms |= {f"{layer}.{a}": f"{block}.{b}" for a, b in parts.items()}
            for kind in ("weight", "bias"):
                thirds = given[f"{block}.attn.in_proj_{kind}"].chunk(3)
                for name, third in zip("qkv", thirds, strict=True):
                    wanted[f"{layer}.self_attn.{name}_proj.{kind}"] = third
    for a, b in norms.items():
        wanted |= {f"{a}.{kind}": given[f"{b}.{kind}"] for kind in ("weight", "bias")}
    missing, unexpected = judge.load_state_dict(wanted, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)
    return judge


@pytest.mark.parity
def test_scores_agree_with_transformers_clip(folder: Path, clip: scorer.Scorer) -> None:
    import open_clip

    judge = hugging_face(folder)
    views = pictures((32, 32), (32, 32))
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    pixels = torch.stack([torch.tensor(np.array(p)).movedim(-1, 0) / 255 for p in views])
    tokens = open_clip.tokenize(CAPTIONS)
    with torch.no_grad():
        truth = judge(input_ids=tokens, pixel_values=(pixels - mean) / std)
    unit = torch.nn.functional.normalize
    assert_close(unit(clip.images(views), dim=-1), truth.image_embeds, relative=1e-5)
    assert_close(unit(clip.texts(CAPTIONS), dim=-1), truth.text_embeds, relative=1e-5)
    logits = truth.logits_per_image / judge.logit_scale.exp()
    found = metrics.clip_t(clip.images(views).unsqueeze(0).expand(4, -1, -1), clip.texts(CAPTIONS))
    assert_close(found.float(), logits.T.contiguous(), relative=1e-5)


@pytest.mark.parity
def test_preprocessing_agrees_with_transformers(folder: Path) -> None:
    """To the bit. Where a crop leaves an odd rest, transformers' is one pixel further left."""
    from transformers import CLIPImageProcessorPil

    views = pictures((75, 50), (50, 75), (640, 480), (32, 32), (20, 31))
    judge = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    seen: list[Tensor] = []

    def look(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels.flatten(1)

    whole = scorer.load_clip(f"local-dir:{folder}")
    scorer.Scorer(whole.card, whole._prepare, look).images(views)
    for found, view in zip(seen[0], views, strict=True):
        truth = torch.as_tensor(np.asarray(judge(view)["pixel_values"][0]))
        assert_close(found, truth, relative=1e-5)


def test_the_card_says_which_model_it_is(folder: Path, clip: scorer.Scorer) -> None:
    card = clip.card
    assert card.name == "local-dir:tiny" and card.activation == "quick gelu"
    assert json.loads(card.config) == CONFIG
    said = json.loads(card.preprocessing.removeprefix("open_clip: "))
    assert (said["interpolation"], said["resize_mode"]) == ("bicubic", "shortest")
    assert torch.tensor(said["size"]).unique().tolist() == [32]
    assert str(folder.parent) not in repr(card)


def test_the_digest_is_that_of_the_numbers_in_any_container(
    folder: Path, clip: scorer.Scorer, tmp_path: Path
) -> None:
    import hashlib

    from safetensors.torch import load_file

    tensors = load_file(folder / "open_clip_model.safetensors")
    expected = hashlib.sha256()
    for name in sorted(tensors):
        if name != "attn_mask":  # no parameter
            expected.update(f"{name} {tuple(tensors[name].shape)}".encode())
            expected.update(tensors[name].numpy().astype("<f4").tobytes())
    assert clip.card.sha256 == expected.hexdigest()

    halved = {name: tensor.half() for name, tensor in tensors.items()}
    digests = []
    for name, save in (("a", save_file), ("b", torch.save)):
        other = tmp_path / name
        other.mkdir()
        (other / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
        if save is save_file:
            save_file({k: v.float() for k, v in halved.items()}, other / "model.safetensors")
        else:
            torch.save(halved, other / "model.pth")
        digests.append(scorer.load_clip(f"local-dir:{other}").card.sha256)
    assert digests[0] == digests[1] != clip.card.sha256


def test_embeddings_do_not_depend_on_the_batch(clip: scorer.Scorer) -> None:
    views = pictures(*[(40, 30)] * (scorer.BATCH + 3))
    together = clip.images(views)
    assert together.shape == (scorer.BATCH + 3, 16)
    assert_close(together[-1:], clip.images(views[-1:]), relative=1e-5)


def test_openai_weights_run_with_quick_gelu_under_the_plain_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """open_clip itself only warns, and scores with the wrong activation."""
    import open_clip

    seen: dict[str, Any] = {}

    def create(name: str, **options: Any) -> Any:
        seen.update(options, name=name)
        model = open_clip.model.CLIP(**CONFIG)
        open_clip.model.set_model_preprocess_cfg(model, vars(open_clip.transform.PreprocessCfg()))
        return model

    monkeypatch.setattr(open_clip, "create_model", create)
    card = scorer.load_clip().card
    assert (seen["name"], seen["pretrained"]) == ("ViT-L-14", "openai")
    assert seen["force_quick_gelu"] and seen["precision"] == "fp32" and seen["require_pretrained"]
    assert json.loads(card.config)["quick_gelu"] and card.weights == "openai"


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("ViT-L-41", "openai", "Near it: ViT-L-16, ViT-L-14"),
        ("ViT-L-14", "no-such-tag", "its tags: openai"),
        ("local-dir:/no/such/folder", "", "is not to be had"),
    ],
)
def test_unknown_scorers_are_refused(name: str, weights: str, said: str) -> None:
    with pytest.raises(MissingFileError, match=said):
        scorer.load_clip(name, weights)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    wrong = tiny_clip(tmp_path / "wrong")
    wider = {**CONFIG, "embed_dim": 24}
    (wrong / "open_clip_config.json").write_text(json.dumps({"model_cfg": wider}))
    with pytest.raises(CheckpointError, match="do not fit the scorer"):
        scorer.load_clip(f"local-dir:{wrong}")


def test_dino_scores_with_timms_class_token(tmp_path: Path) -> None:
    import timm

    name = "test_vit"  # timm's own small model for tests
    torch.manual_seed(0)
    judge = timm.create_model(name, num_classes=0).eval()
    file = tmp_path / "dino.safetensors"
    save_file(judge.state_dict(), file)
    dino = scorer.load_dino(name, str(file))
    assert dino.card.weights == "dino.safetensors"
    views = pictures((160, 160), (300, 200))
    data = timm.data.resolve_model_data_config(judge)
    prepare = timm.data.create_transform(**data, is_training=False)
    with torch.no_grad():
        truth = judge.forward_features(torch.stack([prepare(view) for view in views]))
        truth = judge.forward_head(truth)
    assert_close(dino.images(views), truth, relative=1e-5)
    with pytest.raises(TypeError, match="pictures only"):
        dino.texts(["a"])


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [("vit_smal_dino", None, "timm knows no"), ("test_vit", "nowhere.bin", "no file nowhere.bin")],
)
def test_unknown_dinos_are_refused(name: str, weights: str | None, said: str) -> None:
    with pytest.raises(MissingFileError, match=said):
        scorer.load_dino(name, weights)
