"""Gradients through the host's UNet by way of our patch, against the formula in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import host_process
from tests.conftest import MODEL_FILES
from tests.host.conftest import draw
from tests.synthetic.models import UNET_SDXL, build_unets
from tests.tolerance import assert_close

pytestmark = pytest.mark.host

FEATURES = 24
LIBRARY = ("train.loop", "objective", "train.recipe", "spec", "host.training")


class Library:
    """The pack's modules as the host loaded them, and a small task."""

    def __init__(self, host: host_process.Host, model: Any) -> None:
        loop, objective, recipe, spec, training = (
            host.library(f"ip_adapter.{name}") for name in LIBRARY
        )
        self.loop, self.objective, self.recipe = loop, objective, recipe
        self.spec, self.training, self.model = spec, training, model
        self.refusal = host.library("ip_adapter.errors").IncompatibleModelError

    def adapter(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        projection = self.spec.LinearProjection(FEATURES, 4, 768)
        return self.training.new_adapter(
            self.training.family_spec(self.model, projection), self.model
        )


@pytest.fixture(scope="module")
def library(host: host_process.Host, model: Any) -> Library:
    return Library(host, model)


def rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {
        "latents": draw(count, 4, 8, 8, seed=seed),
        "text": draw(count, 77, 768, seed=seed + 1),
        "image": draw(count, FEATURES, seed=seed + 2),
    }


def scaled_linear_alphas() -> Tensor:
    """Stable Diffusion's schedule as diffusers makes it."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return scheduler.alphas_cumprod


class PlainDecoupled(nn.Module):
    """A cross-attention with eq. 5 of the paper written out, standing in for the host's."""

    def __init__(self, text: Any, live: list[Tensor], key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.text, self.live, self.key, self.value = text, live, key, value

    def forward(self, x: Tensor, context: Tensor, **_: Any) -> Tensor:
        def attend(key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (
                y.unflatten(2, (self.text.heads, -1)).transpose(1, 2) for y in (query, key, value)
            )
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

        query = x @ self.text.to_q.weight.T
        out = attend(context @ self.text.to_k.weight.T, context @ self.text.to_v.weight.T)
        for tokens in self.live:
            out = out + attend(tokens @ self.key.T, tokens @ self.value.T)
        return F.linear(out, self.text.to_out[0].weight, self.text.to_out[0].bias)


class PlainTrainer:
    """The paper's training in plain torch: the host's UNet with its cross-attention replaced."""

    def __init__(self, model: Any) -> None:
        with torch.inference_mode(False):
            unet = copy.deepcopy(model.model.diffusion_model).float().requires_grad_(False)
            for module in unet.modules():
                for name, weight in list(module._parameters.items()):
                    if weight is not None:
                        module._parameters[name] = nn.Parameter(weight.clone(), False)
            self.unet, self.live = unet, []
            blocks = [b for part in (unet.input_blocks, unet.output_blocks) for b in part]
            attentions = [
                transformer
                for block in [*blocks, unet.middle_block]
                for layer in block
                for transformer in getattr(layer, "transformer_blocks", ())
            ]
            self.pairs = []  # in diffusers' order: down, up, middle
            for transformer in attentions:
                text = transformer.attn2
                key, value = (
                    nn.Parameter(w.weight.detach().clone()) for w in (text.to_k, text.to_v)
                )
                self.pairs.append((key, value))
                transformer.attn2 = PlainDecoupled(text, self.live, key, value)
            torch.manual_seed(0)
            self.linear = nn.Linear(FEATURES, 4 * 768)
            self.norm = nn.LayerNorm(768)
            self.alphas = scaled_linear_alphas()

    @property
    def parameters(self) -> list[nn.Parameter]:
        pairs = [weight for pair in self.pairs for weight in pair]
        return [*self.linear.parameters(), *self.norm.parameters(), *pairs]

    def loss(self, batch: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
        tokens = self.norm(self.linear(batch["image"]).unflatten(1, (4, 768)))
        self.live[:] = [tokens]
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * batch["latents"] + (1 - alpha).sqrt() * noise
        found = self.unet(noised, t.float(), context=batch["text"], transformer_options={})
        return ((found - noise) ** 2).mean()


def philox(seed: int, number: int, shape: tuple[int, ...]) -> tuple[int, float, Tensor]:
    stream = np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))
    timestep, chance = int(stream.random() * 1000), stream.random()
    return timestep, chance, torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))


def test_the_first_twenty_steps_equal_a_plain_reference_loop(
    library: Library, tmp_path: Path
) -> None:
    seed, size, steps = 3, 2, 20
    with torch.inference_mode(False):
        data, empty = rows(6), draw(1, 77, 768, seed=9)

        def source(start: int, batch: int, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
            while True:
                chosen = torch.arange(start, start + batch) % 6
                yield {name: tensor[chosen] for name, tensor in data.items()}
                start += batch

        plain, expected = PlainTrainer(library.model), []
        optimizer = torch.optim.AdamW(plain.parameters, lr=1e-4, weight_decay=0.01)
        for step in range(steps):
            numbers = range(step * size, (step + 1) * size)
            drawn = [philox(seed, number, (4, 8, 8)) for number in numbers]
            batch = {name: tensor[torch.tensor(numbers) % 6] for name, tensor in data.items()}
            for i, (_, chance, _) in enumerate(drawn):
                if chance < 0.2:  # image only
                    batch["image"][i] = 0
                elif chance < 0.4:  # text only
                    batch["text"][i] = empty[0]
                elif chance < 0.6:  # both
                    batch["image"][i], batch["text"][i] = 0, empty[0]
            loss = plain.loss(
                batch, torch.tensor([t for t, _, _ in drawn]), torch.stack([n for *_, n in drawn])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))

    found: list[float] = []
    adapter = library.adapter()
    with library.training.training_mode():
        library.loop.train(
            library.recipe.make(
                {
                    "steps": steps,
                    "batch_size": size,
                    "seed": seed,
                    **dict.fromkeys(("drop_text", "drop_image", "drop_both"), 0.2),
                }
            ),
            library.training.TrainableModel(library.model),
            adapter,
            source,
            library.objective.Nothing(text=empty),
            tmp_path,
            on_step=lambda done: found.append(done.loss),
            is_quiet=True,
            cpu=True,
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert_close(adapter.image_proj.proj.weight, plain.linear.weight, 1e-4)


def test_keys_and_values_begin_as_those_of_the_text(library: Library) -> None:
    adapter = library.adapter()
    weights = library.model.model.diffusion_model.state_dict()
    for index, path in (
        (1, "input_blocks.1.1"),
        (11, "input_blocks.8.1"),
        (13, "output_blocks.3.1"),
        (31, "middle_block.1"),
    ):
        for name in ("to_k", "to_v"):
            text = weights[f"{path}.transformer_blocks.0.attn2.{name}.weight"]
            ours = adapter.state_dict()[f"ip_adapter.{index}.{name}_ip.weight"]
            assert ours.dtype == torch.float32 and torch.equal(ours, text.float())


def test_every_weight_of_the_adapter_gets_a_gradient_and_none_of_the_base(
    library: Library,
) -> None:
    adapter = library.adapter()
    theirs = list(library.model.model.diffusion_model.parameters())
    before = [weight.requires_grad for weight in theirs]  # hosts of 2025 leave it on
    with library.training.training_mode():
        base = library.training.TrainableModel(library.model)
        value = library.objective.loss(
            library.objective.Decoupled(adapter),
            base,
            {name: tensor.clone() for name, tensor in rows(2).items()},
            library.objective.draw(0, range(2), (4, 8, 8), 1000),
        )
        value.backward()
    assert all(weight.grad.norm() > 0 for weight in adapter.parameters())
    assert all(weight.grad is None for weight in base._unet.parameters())
    assert all(weight.grad is None for weight in theirs)
    assert [weight.requires_grad for weight in theirs] == before


def gradients(
    library: Library, options: dict[str, Any], adapter: Any
) -> tuple[float, list[Tensor]]:
    adapter.zero_grad()
    with library.training.training_mode():
        base = library.training.TrainableModel(library.model, **options)
        value = library.objective.loss(
            library.objective.Decoupled(adapter),
            base,
            {name: tensor.clone() for name, tensor in rows(2).items()},
            library.objective.draw(0, range(2), (4, 8, 8), 1000),
        )
        value.backward()
    return float(value.detach()), [weight.grad.clone() for weight in adapter.parameters()]


def test_gradient_checkpointing_changes_nothing(library: Library) -> None:
    adapter = library.adapter()
    plain, wanted = gradients(library, {}, adapter)
    again, found = gradients(library, {"gradient_checkpointing": True}, adapter)
    assert again == plain
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_base_in_bfloat16_trains_an_adapter_in_float32(library: Library) -> None:
    adapter = library.adapter()
    plain, wanted = gradients(library, {}, adapter)
    rough, found = gradients(library, {"dtype": torch.bfloat16}, adapter)
    assert abs(rough - plain) < 0.05 * plain
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.95


def test_training_sees_what_inference_shows(
    library: Library, apply: Any, base_adapter: Any
) -> None:
    # One Euler step of the host's sampler down to zero noise returns what the UNet made of it.
    import comfy.sample
    import comfy.samplers

    prompt = apply.prompt(seed=4)
    latents, text = draw(1, 4, 8, 8, seed=5), draw(1, 77, 768, seed=6)
    timestep = torch.tensor([321])
    sigma = library.model.get_model_object("model_sampling").sigmas[321]
    noisy = latents * (sigma**2 + 1) ** 0.5  # the host scales its input down again
    denoised = comfy.sample.sample_custom(
        apply(library.model, seed=4),
        noisy / sigma,
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.stack((sigma, torch.zeros(()))),
        [[text, {}]],
        [[text, {}]],
        torch.zeros(1, 4, 8, 8),
        disable_pbar=True,
    )
    wanted = (noisy - denoised * 0.18215) / sigma  # SD 1.5's scale of latents

    with library.training.training_mode():
        base = library.training.TrainableModel(library.model)
        pairs = {
            layer.index: (key.clone().float(), value.clone().float())
            for layer, key, value in base_adapter.module.keys_values(prompt.conditional)
        }
        found = base.predict(latents.clone(), timestep.clone(), text.clone(), pairs)
    assert_close(found, wanted, 1e-4)


def test_the_branches_report_what_they_add(library: Library) -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    adapter = library.adapter()
    with library.training.training_mode():
        pairs = library.objective.Decoupled(adapter)(image=rows(2)["image"].clone())
        base = library.training.TrainableModel(library.model)
        base.predict(
            rows(2)["latents"].clone(),
            torch.tensor([5, 900]),
            rows(2)["text"].clone(),
            pairs,
            record=lambda index, text, image: seen.update({index: (text, image)}),
        )
    assert sorted(seen) == list(range(1, 32, 2))
    assert all(text.shape == image.shape and image.norm() > 0 for text, image in seen.values())


def test_the_model_is_left_alone(library: Library) -> None:
    import comfy.model_management

    before = {k: v.clone() for k, v in library.model.model.diffusion_model.state_dict().items()}
    with library.training.training_mode():
        assert comfy.model_management.in_training
        base = library.training.TrainableModel(
            library.model, dtype=torch.bfloat16, gradient_checkpointing=True
        )
        assert base._unet is not library.model.model.diffusion_model
    assert not comfy.model_management.in_training
    assert not library.model.model_options["transformer_options"].get("patches_replace")
    for key, value in library.model.model.diffusion_model.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])


def test_the_schedule_is_read_off_the_model(library: Library) -> None:
    schedule = library.training.schedule_of(library.model)
    assert schedule.target == "epsilon"
    assert_close(schedule.alphas_cumprod, scaled_linear_alphas())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.add_object_patch("model_sampling", object()), "discrete one of Stable"),
        (lambda m: setattr(m.model, "concat_keys", ("mask",)), "is for inpainting"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    library: Library, change: Callable[[Any], None], message: str
) -> None:
    model = library.model.clone()
    kept = model.model.concat_keys
    change(model)
    try:
        with pytest.raises(library.refusal, match=message):
            library.training.TrainableModel(model)
    finally:
        model.model.concat_keys = kept


def test_v_prediction_is_recognised(library: Library) -> None:
    import comfy.model_sampling as host_sampling

    class Sampling(host_sampling.ModelSamplingDiscrete, host_sampling.V_PREDICTION):
        pass

    model = library.model.clone()
    model.add_object_patch("model_sampling", Sampling())
    assert library.training.schedule_of(model).target == "v"


@pytest.fixture(scope="module")
def sdxl(host: host_process.Host, model_files: Path) -> Any:
    import comfy.sd

    build_unets(MODEL_FILES)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(model_files / UNET_SDXL))


def test_sdxl_gets_pooled_text_and_sizes_and_trains(library: Library, sdxl: Any) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    sizes = torch.tensor([[768, 1024, 0, 128, 64, 64], [100, 80, 3, 7, 64, 64]])
    pooled = draw(2, 1280, seed=3)
    with library.training.training_mode():
        base = library.training.TrainableModel(sdxl)
        seen: list[Tensor] = []
        base._unet.label_emb.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        projection = library.spec.LinearProjection(FEATURES, 4, 2048)
        adapter = library.training.new_adapter(library.training.family_spec(sdxl, projection), sdxl)
        batch = {
            "latents": draw(2, 4, 8, 8),
            "text": draw(2, 77, 2048, seed=1),
            "image": draw(2, FEATURES, seed=2),
            "pooled": pooled,
            "size": sizes,
        }
        batch = {name: tensor.clone() for name, tensor in batch.items()}
        draws = library.objective.draw(0, range(2), (4, 8, 8), 1000)
        value = library.objective.loss(library.objective.Decoupled(adapter), base, batch, draws)
        value.backward()
        assert len(adapter.ip_adapter) == 70
        assert all(weight.grad.norm() > 0 for weight in adapter.parameters())
        base.predict(batch["latents"], draws.timesteps, batch["text"], {}, pooled=batch["pooled"])
        with pytest.raises(library.refusal, match="pooled text"):
            base.predict(batch["latents"], draws.timesteps, batch["text"], {})
    plain = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)  # 8 pixels per latent pixel, no crop
    for given, wanted in zip(seen, (sizes, plain), strict=True):
        waves = get_timestep_embedding(
            wanted.flatten().float(), 256, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        assert_close(given, torch.cat((pooled, waves.view(2, -1)), dim=1))


def test_the_simple_design_learns_through_the_frozen_text_keys(library: Library) -> None:
    adapter = library.adapter()
    with library.training.training_mode():
        simple = library.objective.Simple(adapter)
        base = library.training.TrainableModel(library.model)
        batch = {name: tensor.clone() for name, tensor in rows(2).items()}
        draws = library.objective.draw(0, range(2), (4, 8, 8), 1000)
        value = library.objective.loss(simple, base, batch, draws)
        value.backward()
        assert all(weight.grad.norm() > 0 for weight in adapter.image_proj.parameters())

        # The same by hand: the untouched UNet, with a longer context.
        tokens = F.layer_norm(
            adapter.image_proj.proj(batch["image"]).unflatten(1, (4, 768)), (768,)
        )
        alpha = scaled_linear_alphas()[draws.timesteps].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * batch["latents"] + (1 - alpha).sqrt() * draws.noise
        plain = PlainTrainer(library.model)
        plain.live.clear()
        found = plain.unet(
            noised,
            draws.timesteps.float(),
            context=torch.cat((batch["text"], tokens), 1),
            transformer_options={},
        )
        wanted = ((found - draws.noise) ** 2).mean()
    assert_close(value, wanted)
