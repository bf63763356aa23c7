"""The nano UNets are what they stand for, as the host sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import MODEL_FILES
from tests.host.conftest import Sampler, draw
from tests.synthetic import adapters, catalogue
from tests.synthetic.models import UNET_KOLORS, UNET_SD2, UNET_SDXL, build_unets

pytestmark = pytest.mark.host


@dataclass(frozen=True)
class Expected:
    """What the published model has, a tenth as wide."""

    file: Path
    model: str
    widths: list[int]  # in the order of execution
    heads: set[tuple[int, int]]  # width, heads
    context: int
    states: int  # width of the text states that a sampler is given
    pooled: int | None


XL_WIDTHS = [64] * 4 + [128] * 20 + [128] * 10 + [128] * 30 + [64] * 6
FAMILIES = {
    "SD 2.x": Expected(
        UNET_SD2,
        "BaseModel",
        [32, 32, 64, 64, 128, 128] + [128] + [128] * 3 + [64] * 3 + [32] * 3,
        {(32, 2), (64, 4), (128, 8)},
        1024,
        1024,
        None,
    ),
    "SDXL": Expected(UNET_SDXL, "SDXL", XL_WIDTHS, {(64, 1), (128, 2)}, 2048, 2048, 1280),
    "Kolors": Expected(UNET_KOLORS, "Kolors", XL_WIDTHS, {(64, 1), (128, 2)}, 2048, 4096, 4096),
}


@pytest.fixture(scope="module")
def files() -> Path:
    build_unets(MODEL_FILES)
    return MODEL_FILES / "models"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Expected:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def unet(host: Any, files: Path, family: Expected) -> Any:
    """The MODEL that the host's own loader of diffusion models makes of the file."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(files / family.file))


def conditioning(family: Expected, seed: int) -> list[Any]:
    extra = {} if family.pooled is None else {"pooled_output": torch.zeros(1, family.pooled)}
    return [[draw(1, 77, family.states, seed=seed), extra]]


def test_the_host_takes_it_for_its_family(unet: Any, family: Expected) -> None:
    assert type(unet.model).__name__ == family.model
    assert unet.model.model_type.name == "EPS"
    label = {None: 0, 1280: 1280 + 6 * 256, 4096: 4096 + 6 * 256}[family.pooled]
    assert unet.model.adm_channels == label
    assert unet.model.model_sampling.num_timesteps == (1100 if family.states == 4096 else 1000)


def test_every_weight_of_the_file_is_used(unet: Any, files: Path, family: Expected) -> None:
    written = load_file(files / family.file)
    loaded = unet.model.diffusion_model.state_dict()
    assert {key: value.shape for key, value in loaded.items()} == {
        key: value.shape for key, value in written.items()
    }
    for key in ("input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight", "out.2.bias"):
        assert torch.equal(loaded[key].float(), written[key].float())


def test_its_cross_attention_layers(host: Any, unet: Any, family: Expected) -> None:
    layers = host.library("ip_adapter.host.unet").cross_attention_layers(unet)
    assert [layer.width for layer in layers] == family.widths
    assert {(layer.width, layer.heads) for layer in layers} == family.heads
    assert {layer.context_width for layer in layers} == {family.context}


def test_it_samples(unet: Any, family: Expected, sample: Sampler) -> None:
    negative = conditioning(family, 2)
    outputs = [
        sample(
            unet,
            steps=1,
            noise=draw(1, 4, 16, 16),
            positive=conditioning(family, seed),
            negative=negative,
        )
        for seed in (1, 1, 3)
    ]
    assert outputs[0].shape == (1, 4, 16, 16) and outputs[0].isfinite().all()
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], rtol=1e-3), "the text has no say"


@pytest.mark.parametrize(
    ("family", "row"),
    [("SDXL", "faceid_sdxl"), ("SD 2.x", "faceid_sd15")],  # SD 2.x has the modules of SD 1.5
    indirect=["family"],
)
def test_the_host_knows_every_module_of_the_companion_loras(
    unet: Any, family: Expected, row: str
) -> None:
    import comfy.lora

    known = comfy.lora.model_lora_keys_unet(unet.model, {})
    state = unet.model.state_dict()
    lora = catalogue.companion(catalogue.ROWS[row], adapters.make(catalogue.ROWS[row], nano=True))
    modules = {key.split(".")[0] for key in lora}
    # Four matrices in self- and in cross-attention of every block.
    assert len(modules) == 8 * len(family.widths)
    for module in modules:
        rows, columns = state[known[module]].shape
        if family.context == 1024 and columns == 1024:
            columns = 768
        assert lora[f"{module}.lora_up.weight"].shape == (rows, 128)
        assert lora[f"{module}.lora_down.weight"].shape == (128, columns)
    targets = {known[module] for module in modules}
    assert targets == {
        key for key in state if ".attn" in key and key.endswith(".weight") and ".to_" in key
    }


@pytest.mark.parametrize("family", ["Kolors"], indirect=True)
def test_kolors_projects_its_text_states(unet: Any, files: Path, family: Expected) -> None:
    """The first key matrix reads text @ W.T + b, not the text itself."""
    seen: list[Tensor] = []
    diffusion = unet.model.diffusion_model
    first = diffusion.input_blocks[4][1].transformer_blocks[0].attn2.to_k
    handle = first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    states = draw(1, 77, 4096, seed=1).to(diffusion.dtype)
    try:
        diffusion(
            draw(1, 4, 16, 16).to(diffusion.dtype),
            timesteps=torch.tensor([500.0]),
            context=states,
            y=torch.zeros(1, 5632, dtype=diffusion.dtype),
        )
    finally:
        handle.remove()
    weights = load_file(files / UNET_KOLORS)
    weight, bias = (weights[f"encoder_hid_proj.{name}"].float() for name in ("weight", "bias"))
    torch.testing.assert_close(
        seen[0].float(), states.float() @ weight.T + bias, rtol=1e-2, atol=1e-2
    )
