"""One denoising prediction with an image prompt: the host with this pack against diffusers.

Both sides hold the same random weights in SD 1.5's real channel plan (860 M parameters) and read
the same adapter. The reference is diffusers' own IP-Adapter (its loader, projections and attention
processors), driven the way its pipeline drives it: negative rows first, guidance applied outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import host_process
from tests.synthetic import adapters
from tests.synthetic.models import Noise
from tests.tolerance import assert_close, relative_error

pytestmark = [pytest.mark.parity, pytest.mark.host]

SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""The published unet/config.json of Stable Diffusion 1.5, where it differs from the defaults."""

FEATURES = {"base": (1024,), "plus": (257, 1280)}
MAKE = {"base": adapters.base_sd15, "plus": adapters.plus_sd15}
TIMESTEP = 500


@pytest.fixture(scope="module")
def diffusers_unet() -> Any:
    import diffusers
    from diffusers import UNet2DConditionModel

    diffusers.logging.set_verbosity_error()  # it warns of every cast of the adapter's float16 file
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)  # type: ignore[arg-type]
    noise = Noise("parity")
    weights = {}
    for key, value in unet.state_dict().items():
        if value.ndim > 1:
            weights[key] = noise.draw(tuple(value.shape), value[0].numel() ** -0.5).float()
        else:
            weights[key] = noise.draw(tuple(value.shape), 0.05).float()
            weights[key] += float(key.endswith(".weight"))
    unet.load_state_dict(weights, assign=True)
    return unet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def host_model(diffusers_unet: Any) -> Any:
    """The same tensors in the host's UNet, renamed by the host's own table."""
    host_process.start()
    import comfy.sd
    import comfy.utils
    from comfy.supported_models import SD15 as HostSD15

    config = {
        **HostSD15.unet_config,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1,
    }
    names = comfy.utils.unet_to_diffusers(config)
    source = diffusers_unet.state_dict()
    renamed = {names[key]: tensor for key, tensor in source.items()}
    return comfy.sd.load_diffusion_model_state_dict(renamed, model_options={"dtype": torch.float32})


@pytest.fixture(scope="module", params=["base", "plus"])
def adapter(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    path = tmp_path_factory.mktemp("adapter") / f"{request.param}.safetensors"
    yield request.param, adapters.write_safetensors(MAKE[request.param](seed=3), path)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict_with_diffusers(
    unet: Any, kind: str, path: Path, x: Tensor, text: Tensor, features: Tensor, weight: float
) -> Tensor:
    """Noise for `[unconditional, conditional]` rows, from diffusers' IP-Adapter."""
    from safetensors.torch import load_file

    unet._load_ip_adapter_weights([adapters.nested(load_file(path))])
    unet.float()
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [weight]
    return unet(
        torch.cat([x, x]),
        TIMESTEP,
        encoder_hidden_states=text,
        added_cond_kwargs={"image_embeds": [features[:, None]]},
    ).sample


def predict_with_host(
    model: Any, path: Path, x: Tensor, text: Tensor, features: Tensor, weight: float, cfg: float
) -> Tensor:
    """The guided noise of one step of the host's sampler, with our patch."""
    host = host_process.start()
    import comfy.samplers

    loaded = host.library("ip_adapter.host.adapters").load(path)
    tokens = loaded.module.image_tokens(features)
    prompt = host.library("ip_adapter.prompt").from_tokens(
        tokens[1:], tokens[:1], loaded.fingerprint, loaded.label
    )
    patched, _ = host.library("ip_adapter.host.patching").apply(
        model, loaded, prompt, weight=weight
    )
    sampling = model.get_model_object("model_sampling")
    sigma = sampling.sigmas[TIMESTEP]
    seen: dict[str, Tensor] = {}

    def one_step(
        denoise: Any, noisy: Tensor, sigmas: Tensor, extra_args: Any = None, **kwargs: Any
    ) -> Tensor:
        denoised = denoise(noisy, sigmas[:1].expand(len(noisy)), **(extra_args or {}))
        seen["noise"] = (noisy - denoised) / sigmas[0]
        return denoised

    scale = (sigma**2 + 1) ** 0.5  # what the host divides its input by
    with torch.inference_mode():
        comfy.samplers.sample(
            patched,
            x * scale / sigma,
            positive=[[text[1:], {}]],
            negative=[[text[:1], {}]],
            cfg=cfg,
            device=torch.device("cpu"),
            sampler=comfy.samplers.KSAMPLER(one_step),
            sigmas=torch.stack([sigma, torch.zeros(())]),
            latent_image=torch.zeros_like(x),
            disable_pbar=True,
        )
    return seen["noise"]


@pytest.mark.parametrize("size", [(16, 16), (24, 16)], ids=["square", "portrait"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_one_prediction_agrees_with_diffusers(
    diffusers_unet: Any,
    host_model: Any,
    adapter: tuple[str, Path],
    weight: float,
    size: tuple[int, int],
) -> None:
    kind, path = adapter
    x, text = draw(1, 4, *size, seed=1), draw(2, 77, 768, seed=2)
    features = draw(2, *FEATURES[kind], seed=3)
    if kind == "base":
        features[0] = 0  # the paper's dropped image condition
    reference = predict_with_diffusers(diffusers_unet, kind, path, x, text, features, weight)
    negative, positive = reference.chunk(2)
    for cfg in (1.0, 7.5):
        guided = negative + cfg * (positive - negative)
        found = predict_with_host(host_model, path, x, text, features, weight, cfg)
        print(f"{kind} weight {weight} {size} cfg {cfg}: {relative_error(found, guided):.2e}")
        assert_close(found, guided, relative=1e-4)


def test_the_image_prompt_changes_the_prediction(
    host_model: Any, adapter: tuple[str, Path]
) -> None:
    """Guards the comparison above: two sides that both ignored the adapter would agree."""
    kind, path = adapter
    x, text = draw(1, 4, 16, 16, seed=1), draw(2, 77, 768, seed=2)
    features = draw(2, *FEATURES[kind], seed=3)
    without, with_it = (
        predict_with_host(host_model, path, x, text, features, weight, 1.0) for weight in (0.0, 1.0)
    )
    assert relative_error(with_it, without) > 1e-2
