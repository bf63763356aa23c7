"""The objective, the recipe and the files of training, without a base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ip_adapter import checkpoint, objective
from ip_adapter.adapter import IPAdapter
from ip_adapter.encoders import VIT_H, Encoder
from ip_adapter.errors import CheckpointError, IncompatibleModelError, MissingFileError
from ip_adapter.layers import SD15
from ip_adapter.objective import Draws, Drops, Nothing, Schedule
from ip_adapter.projections import build_projection
from ip_adapter.spec import AdapterSpec, LinearProjection
from ip_adapter.train import recipe, state
from tests.conftest import NARROW
from tests.synthetic import adapters, catalogue
from tests.tolerance import assert_close


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ddpm() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parity
def test_forward_diffusion_and_targets_equal_diffusers() -> None:
    scheduler = ddpm()
    latents, noise = draw(5, 4, 3, 2), draw(5, 4, 3, 2, seed=1)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    schedule = Schedule(scheduler.alphas_cumprod)
    assert schedule.steps == 1000
    assert_close(
        schedule.noised(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    assert torch.equal(schedule.wanted(latents, noise, timesteps), noise)
    velocity = Schedule(scheduler.alphas_cumprod, "v").wanted(latents, noise, timesteps)
    assert_close(velocity, scheduler.get_velocity(latents, noise, timesteps))


def test_chance_is_a_function_of_seed_and_sample_alone() -> None:
    together = objective.draw(7, range(4), (4, 3, 2), 1000)
    for number in range(4):
        key = np.array([7, number], dtype=np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key))
        assert int(together.timesteps[number]) == int(stream.random() * 1000)
        assert float(together.chance[number]) == pytest.approx(stream.random(), rel=1e-6)
        noise = torch.from_numpy(stream.standard_normal((4, 3, 2), dtype=np.float32))
        assert torch.equal(together.noise[number], noise)
    alone = objective.draw(7, [2], (4, 3, 2), 1000)
    assert torch.equal(alone.noise[0], together.noise[2])
    assert not torch.equal(objective.draw(8, [2], (4, 3, 2), 1000).noise, alone.noise)


def test_time_steps_and_noise_are_spread_as_they_should() -> None:
    draws = objective.draw(0, range(4000), (4, 1, 1), 1000)
    assert int(draws.timesteps.min()) < 5 and int(draws.timesteps.max()) > 994
    assert abs(float(draws.timesteps.float().mean()) - 499.5) < 3 * 1000 / (12 * 4000) ** 0.5
    assert abs(float(draws.noise.std()) - 1) < 0.02 and abs(float(draws.noise.mean())) < 0.03


def test_conditions_are_dropped_as_often_as_asked() -> None:
    chance = (torch.arange(1000) + 0.5) / 1000
    text, image = Drops(text=0.05, image=0.1, both=0.2).decide(chance)
    assert int((text & ~image).sum()) == 50
    assert int((image & ~text).sum()) == 100
    assert int((text & image).sum()) == 200
    never = Drops(0, 0, 0).decide(torch.tensor([0.0, 0.5, 0.9999]))
    assert not never[0].any() and not never[1].any()


def test_what_is_dropped_becomes_the_empty_prompt_and_the_zero_feature() -> None:
    batch = {
        "latents": draw(4, 4, 2, 2),
        "text": draw(4, 7, 8),
        "pooled": draw(4, 5),
        "image": draw(4, 6),
        "face": draw(4, 3),
    }
    nothing = Nothing(text=draw(1, 7, 8, seed=9), pooled=draw(1, 5, seed=9))
    draws = Draws(torch.zeros(4), torch.tensor([0.1, 0.3, 0.5, 0.7]), draw(4))
    out = objective.withhold(batch, draws, Drops(0.2, 0.2, 0.2), nothing)
    assert nothing.pooled is not None
    for row, (text, image) in enumerate([(False, True), (True, False), (True, True), (0, 0)]):
        for name, empty, dropped in (
            ("text", nothing.text[0], text),
            ("pooled", nothing.pooled[0], text),
            ("image", torch.zeros(6), image),
            ("face", torch.zeros(3), image),
        ):
            assert torch.equal(out[name][row], empty if dropped else batch[name][row])
    assert out["latents"] is batch["latents"]


def test_patch_features_are_dropped_for_those_of_the_black_picture() -> None:
    batch = {"text": draw(1, 7, 8), "image": draw(1, 5, 6)}
    black = draw(1, 5, 6, seed=3)
    draws = Draws(torch.zeros(1), torch.zeros(1), draw(1))
    out = objective.withhold(batch, draws, Drops(0, 1, 0), Nothing(batch["text"], image=black))
    assert torch.equal(out["image"], black)


class Reads:
    """A base that predicts what it was given, so that the loss can be computed by hand."""

    schedule = Schedule(torch.tensor([0.9, 0.4]))
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def to(self, device: torch.device) -> Reads:
        return self

    def predict(
        self, noised: Tensor, timesteps: Tensor, text: Tensor, keys_values: Any, **more: Any
    ) -> Tensor:
        self.seen = {"noised": noised, "text": text, "pairs": keys_values, **more}
        return noised


def adapter() -> IPAdapter:
    torch.manual_seed(0)
    return IPAdapter(AdapterSpec(SD15, LinearProjection(6, 4, 768), NARROW, "global"))


def test_the_loss_is_the_mean_square_of_what_is_left() -> None:
    base, made = Reads(), adapter()
    batch = {"latents": draw(2, 4, 2, 2), "text": draw(2, 7, 768), "image": draw(2, 6)}
    draws = Draws(torch.tensor([0, 1]), torch.ones(2), draw(2, 4, 2, 2, seed=1))
    found = objective.loss(objective.Decoupled(made), base, batch, draws)
    alpha = torch.tensor([0.9, 0.4]).view(2, 1, 1, 1)
    noised = alpha.sqrt() * batch["latents"] + (1 - alpha).sqrt() * draws.noise
    assert_close(found, ((noised - draws.noise) ** 2).mean())
    tokens = nn.functional.layer_norm(
        (batch["image"] @ made.image_proj.proj.weight.T + made.image_proj.proj.bias).view(
            2, 4, 768
        ),
        (768,),
    )
    weights = made.state_dict()
    for index in range(1, 32, 2):
        key, value = base.seen["pairs"][index]
        assert_close(key, tokens @ weights[f"ip_adapter.{index}.to_k_ip.weight"].T)
        assert_close(value, tokens @ weights[f"ip_adapter.{index}.to_v_ip.weight"].T)


def test_the_simple_design_puts_image_tokens_behind_the_text() -> None:
    base, made = Reads(), adapter()
    batch = {"latents": draw(2, 4, 2, 2), "text": draw(2, 7, 768), "image": draw(2, 6)}
    draws = Draws(torch.tensor([0, 1]), torch.ones(2), draw(2, 4, 2, 2, seed=1))
    simple = objective.Simple(made)
    objective.loss(simple, base, batch, draws)
    assert base.seen["pairs"] == {}
    assert base.seen["text"].shape == (2, 7 + 4, 768)
    assert torch.equal(base.seen["text"][:, :7], batch["text"])
    trained = {name for name, weight in simple.named_parameters() if weight.requires_grad}
    assert trained and all(name.startswith("adapter.image_proj.") for name in trained)


def test_a_batch_without_features_is_refused() -> None:
    draws = Draws(torch.tensor([0]), torch.ones(1), draw(1, 4, 2, 2))
    batch = {"latents": draw(1, 4, 2, 2), "text": draw(1, 7, 768)}
    with pytest.raises(IncompatibleModelError, match="neither 'image' nor 'face'"):
        objective.loss(objective.Decoupled(adapter()), Reads(), batch, draws)


def test_the_defaults_are_the_papers() -> None:
    made = recipe.Recipe()
    assert (made.learning_rate, made.weight_decay, made.batch_size) == (1e-4, 0.01, 8)
    assert made.drops == Drops(0.05, 0.05, 0.05)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", "projection: plus\nsteps: 12\nlearning_rate: 0.0002\n"),
        ("recipe.json", '{"projection": "plus", "steps": 12, "learning_rate": 2e-4}'),
    ],
)
def test_recipes_are_read_from_yaml_and_json(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    made = recipe.read(path)
    assert (made.projection, made.steps, made.learning_rate) == ("plus", 12, 2e-4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, ["'steps' is 0", "a whole number of 1 or more"]),
        ({"steps": 2.5}, ["'steps' is 2.5"]),
        ({"batch_size": -1}, ["'batch_size' is -1"]),
        ({"learning_rate": float("nan")}, ["'learning_rate' is nan", "above 0"]),
        ({"learning_rate": "fast"}, ["'learning_rate' is 'fast'"]),
        ({"weight_decay": 1}, ["'weight_decay' is 1"]),
        ({"drop_text": 1.5}, ["'drop_text' is 1.5", "a fraction from 0 to 1"]),
        ({"drop_text": 0.5, "drop_both": 0.6}, ["together 1.15", "a sum of 1 or less"]),
        ({"mixed_precision": "fp8"}, ["'fp8'", "no, fp16 or bf16"]),
        ({"projection": "pluss"}, ["'pluss'", "global, plus, full or faceid"]),
        ({"seed": -1}, ["'seed' is -1"]),
        ({"stepz": 5}, ["no field 'stepz'", "is 'steps' meant?"]),
        ({"steps": 0, "seed": -1}, ["'steps' is 0", "'seed' is -1"]),
    ],
)
def test_impossible_values_are_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.make(values, "'mine.yaml'")
    for word in ["'mine.yaml' cannot be followed", *words]:
        assert word in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: [1", "neither YAML nor JSON"),
        (b"\xff\xfe\x00", "neither YAML nor JSON"),
        (b"- steps", "holds a list"),
    ],
)
def test_files_that_are_no_recipe_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(recipe.RecipeError, match=message):
        recipe.read(path)
    with pytest.raises(MissingFileError, match="no recipe"):
        recipe.read(tmp_path / "other.yaml")


def test_only_what_changes_the_result_changes_the_digest() -> None:
    made = recipe.make({"seed": 3})
    assert made.digest() == recipe.make({"seed": 3, "steps": 9, "save_every": 5}).digest()
    other = recipe.make({"seed": 4})
    assert made.digest() != other.digest()
    assert recipe.differences(other, made.lasting()) == ["seed was 3 and is 4"]


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "context", "features", "published"),
    [
        ("global", 768, 1024, catalogue.global_projection(1024, 768)),
        ("plus", 768, 1280, catalogue.resampler(1280, 768, 12, 768)),
        ("plus", 2048, 1280, catalogue.resampler(1280, 1280, 20, 2048)),
        ("full", 768, 1280, catalogue.patch_projection(1280, 768)),
        ("faceid", 768, 512, catalogue.face_projection(768, 4)),
    ],
)
def test_projections_have_the_published_shapes(
    kind: str, context: int, features: int, published: dict[str, tuple[int, ...]]
) -> None:
    spec = recipe.projection_of(recipe.make({"projection": kind}), context, features=features)
    assert shapes(build_projection(spec, nn, "meta")) == published


def test_sizes_that_a_projection_lacks_are_refused() -> None:
    with pytest.raises(recipe.RecipeError, match="depth, which a global projection"):
        recipe.projection_of(recipe.make({"depth": 2}), 768, features=1024)
    assert recipe.feature_width(recipe.make({}), VIT_H) == 1024
    assert recipe.feature_width(recipe.make({"projection": "full"}), VIT_H) == 1280
    with pytest.raises(recipe.RecipeError, match="does not have"):
        recipe.feature_width(recipe.make({}), Encoder("SigLIP", hidden=1152, pooled=None))


def test_training_starts_from_any_published_file(tmp_path: Path) -> None:
    row = catalogue.ROWS["faceid_sd15"]
    path = tmp_path / "faceid.bin"
    adapters.write(row, path, nano=True)
    begun = state.start_from(path)
    tensors = adapters.make(row, nano=True)
    for key, weight in begun.adapter.named_parameters():
        assert weight.requires_grad and weight.dtype == torch.float32
        assert torch.equal(weight.detach(), tensors[key].float())
    lora = {key for key in tensors if "lora" in key}
    assert set(begun.lora) == lora and lora
    notes = state.metadata(begun.adapter.spec, recipe.make({"projection": "faceid"}), 5)
    written = state.write_weights(
        begun.adapter, tmp_path / "more.safetensors", notes, lora=begun.lora
    )
    again = checkpoint.read(written)
    assert again.spec.lora_rank == 128 and set(again.tensors) == set(tensors)
    with pytest.raises(IncompatibleModelError, match="instruction"):
        instruct = tmp_path / "instruct.bin"
        adapters.write(catalogue.ROWS["instruct_sd15"], instruct, nano=True)
        state.start_from(instruct)


@pytest.mark.parametrize("kind", ["global", "plus", "full", "faceid"])
def test_metadata_tells_the_loader_which_adapter_it_is(tmp_path: Path, kind: str) -> None:
    made = recipe.make({"projection": kind})
    features = {"global": 1024, "faceid": 512}.get(kind, 1280)
    projection = recipe.projection_of(made, 768, features=features)
    built = IPAdapter(AdapterSpec(SD15, projection, NARROW, projection.layout))
    notes = state.metadata(built.spec, made, 1234, {"base_checkpoint": "mine.safetensors"})
    path = state.write_weights(built, tmp_path / "ip-adapter.safetensors", notes)
    found = checkpoint.read(path)
    assert found.spec.projection == projection
    assert found.spec.evidence in ("metadata", "tensors")
    assert found.metadata["steps"] == "1234" and found.metadata["base_model"] == "SD 1.5"
    assert json.loads(found.metadata["recipe"])["projection"] == kind


def test_an_interrupted_write_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = state.metadata(adapter().spec, recipe.make({}), 1)
    path = state.write_weights(adapter(), tmp_path / "one.safetensors", notes)
    before = path.read_bytes()

    def half(tensors: Any, name: str, **_: Any) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        state.write_weights(adapter(), path, notes)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def test_weights_of_another_adapter_are_not_read_into_one(tmp_path: Path) -> None:
    notes = state.metadata(adapter().spec, recipe.make({}), 1)
    path = state.write_weights(adapter(), tmp_path / "one.safetensors", notes)
    fresh = adapter()
    nn.init.zeros_(fresh.image_proj.proj.weight)
    state.read_into(fresh, path)
    assert torch.equal(
        fresh.image_proj.proj.weight.half(), load_file(path)["image_proj.proj.weight"]
    )
    spec = recipe.projection_of(recipe.make({"projection": "full"}), 768, features=6)
    other = IPAdapter(AdapterSpec(SD15, spec, NARROW, "full"))
    with pytest.raises(CheckpointError, match="not of this adapter"):
        state.read_into(other, path)
