"""The project's own family as the library meets it on the host: layers, image encoder, prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ip_adapter import images
from tests.host.conftest import draw, project
from tests.synthetic import adapters, catalogue
from tests.tolerance import assert_close

pytestmark = pytest.mark.host

ADDRESSES = [
    ("input", 1, 0),
    ("input", 3, 0),
    ("output", 0, 0),
    ("output", 1, 0),
    ("output", 2, 0),
    ("output", 3, 0),
    ("middle", 0, 0),
]
VISION = {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 40, "width": 128, "heads": 4, "layers": 3}


@pytest.fixture(scope="module")
def unet(host: Any) -> Any:
    """The host's UNet of the family's sizes, without numbers."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        return UNetModel(
            image_size=8,
            in_channels=4,
            out_channels=4,
            model_channels=64,
            num_res_blocks=[1, 1],
            channel_mult=(1, 1),
            num_heads=4,
            use_spatial_transformer=True,
            transformer_depth=[1, 1],
            transformer_depth_output=[1, 1, 1, 1],
            transformer_depth_middle=1,
            context_dim=128,
            legacy=False,
            use_checkpoint=False,
            operations=comfy.ops.disable_weight_init,
        )


class Model:
    """As much of a MODEL as the walk over its layers reads."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.model = object()

    def get_model_object(self, name: str) -> Any:
        assert name == "diffusion_model"
        return self.unet


def test_the_hosts_unet_has_these_layers(host: Any, unet: Any) -> None:
    family = host.library("ip_adapter.layers").MINIATURE
    walk = host.library("ip_adapter.host.unet")
    found = walk.cross_attention_layers(Model(unet))
    assert {layer.address for layer in found} == set(ADDRESSES) and len(found) == 7
    assert {(layer.width, layer.context_width, layer.heads) for layer in found} == {(64, 128, 4)}
    assert walk.family_of(Model(unet), found) is family
    assert [layer.address for layer in family.layers] == ADDRESSES


def test_its_layers_are_numbered_as_diffusers_numbers_them(host: Any, unet: Any) -> None:
    """The host's own table from diffusers' names to its own gives the same pairs."""
    import comfy.utils

    config = {"num_res_blocks": [1, 1], "channel_mult": (1, 1), "transformer_depth": [1, 1]}
    config |= {"transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1}
    names = comfy.utils.unet_to_diffusers(config)
    for layer in host.library("ip_adapter.layers").MINIATURE.layers:
        half, number, depth = layer.address
        where = "middle_block" if half == "middle" else f"{half}_blocks.{number}"
        expected = f"{where}.1.transformer_blocks.{depth}.attn2.to_k.weight"
        assert names[f"{layer.diffusers}.attn2.to_k.weight"] == expected
        assert expected in unet.state_dict()


@pytest.fixture(scope="module")
def clip() -> Any:
    """A whole CLIP of the family with random weights, which the host's float16 holds exactly."""
    import open_clip

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=128, vision_cfg=VISION, text_cfg=TEXT)
        for name, parameter in model.visual.named_parameters():
            if "ln_" not in name:
                drawn = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
                parameter.copy_(drawn.half())
    return model.eval()


def on_host(clip: Any) -> Any:
    """The tower in the host's class."""
    import comfy.clip_vision

    vision = comfy.clip_vision.ClipVisionModel(
        {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "hidden_act": "gelu",
            "image_size": 64,
            "patch_size": 8,
            "num_channels": 3,
            "projection_dim": 128,
        }
    )
    tensors = {key: value.clone() for key, value in clip.state_dict().items()}
    missing, _ = vision.load_sd(comfy.clip_vision.convert_to_transformers(tensors, "visual."))
    assert not [key for key in missing if "position_ids" not in key]
    return vision


@pytest.fixture(params=["host", "open_clip"])
def vision(request: pytest.FixtureRequest, host: Any, clip: Any, tmp_path: Path) -> Any:
    if request.param == "host":
        return on_host(clip)
    path = tmp_path / "open_clip_model.safetensors"
    save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, path)
    return host.library("ip_adapter.host.vision").load(path)


def judged(clip: Any, image: Tensor) -> dict[str, Tensor]:
    """open_clip's features of the middle squares of pictures at 64 pixels."""
    layers: list[Tensor] = []
    block = clip.visual.transformer.resblocks[2]
    hook = block.register_forward_hook(lambda module, given, output: layers.append(output))
    pixels = images.normalise(images.squares(image, 64, "crop"))
    pooled = clip.encode_image(pixels)
    hook.remove()
    return {"pooled": pooled, "hidden": layers[0]}


def test_the_encoder_is_known_and_reads_as_open_clip_does(
    host: Any, vision: Any, clip: Any
) -> None:
    library = host.library("ip_adapter.host.vision")
    assert library.recognise(vision) is host.library("ip_adapter.encoders").MINIATURE
    assert library.describe(vision) == "Miniature CLIP"
    image = draw(3, 64, 64, 3).sigmoid()
    expected = judged(clip, image)
    assert expected["hidden"].shape == (3, 65, 128)
    pixels = images.squares(image, 64, "crop")
    for kind in ("pooled", "hidden"):
        assert_close(library.features(vision, pixels, kind), expected[kind], relative=1e-4)


@pytest.mark.parametrize("layout", ["global", "plus", "full"])
def test_an_adapter_for_it_encodes(
    host: Any, vision: Any, clip: Any, layout: str, tmp_path: Path
) -> None:
    projection = {
        "global": catalogue.global_projection(128, 128),
        "plus": catalogue.resampler(128, 128, 2, 128, tokens=16, depth=2),
        "full": catalogue.patch_projection(128, 128),
    }[layout]
    shapes = {f"image_proj.{key}": shape for key, shape in projection.items()}
    key_values = catalogue.key_values((64,) * 7, 128)
    shapes |= {f"ip_adapter.{key}": shape for key, shape in key_values.items()}
    path = adapters.write_safetensors(adapters.fill(shapes), tmp_path / "adapter.safetensors")
    adapter = host.library("ip_adapter.host.adapters").load(path)
    image = draw(2, 80, 100, 3).sigmoid()
    found = host.library("ip_adapter.host.encoding").encode(adapter, vision, image, "crop")
    seen = judged(clip, image)["pooled" if layout == "global" else "hidden"]
    expected = project(host, adapter, image=seen)
    assert expected.shape == (2, {"global": 4, "plus": 16, "full": 65}[layout], 128)
    assert_close(found.conditional.reshape(expected.shape), expected, relative=1e-4)


def test_another_encoder_is_refused_by_name(host: Any, vision: Any, base_adapter: Any) -> None:
    reading = host.library("ip_adapter.host.reading")
    error = host.library("ip_adapter.errors").IncompatibleModelError
    with pytest.raises(error, match=r"needed is OpenCLIP ViT-H/14 .*is Miniature CLIP"):
        reading.check_encoder(base_adapter.spec, vision, "base")


def test_no_download_is_named_for_what_is_not_published(host: Any) -> None:
    automatic = host.library("ip_adapter.host.automatic")
    advice = automatic._download_encoder(host.library("ip_adapter.encoders").MINIATURE)
    assert advice.startswith("Put the encoder that it was trained with into ")
