"""Names against the programs that write them: diffusers' UNet and accelerate's training dumps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ip_adapter.errors import CheckpointError
from ip_adapter.names import canonical, dump_files
from tests.synthetic import adapters

pytestmark = pytest.mark.parity

CONTEXT = 64
SD_BLOCKS = (8, 16, 24, 24)
SD_WIDTHS = (8, 8, 16, 16, 24, 24, 24, 24, 24, 16, 16, 16, 8, 8, 8, 24)
SDXL_WIDTHS = (16,) * 4 + (24,) * 50 + (16,) * 6 + (24,) * 10

Tensors = adapters.Tensors


def unet(blocks: tuple[int, ...] = SD_BLOCKS, context: int = CONTEXT) -> Any:
    """Stable Diffusion's topology, or SDXL's for three blocks, in diffusers and very narrow."""
    from diffusers import UNet2DConditionModel

    sdxl: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
    }
    return UNet2DConditionModel(
        block_out_channels=blocks,
        layers_per_block=2,
        cross_attention_dim=context,
        attention_head_dim=2,
        norm_num_groups=4,
        sample_size=8,
        **(sdxl if len(blocks) == 3 else {}),
    )


def network(prefix: str, shapes: dict[str, tuple[int, ...]], seed: int = 7) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {f"{prefix}{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}


def layers(widths: tuple[int, ...], context: int = CONTEXT) -> Tensors:
    shapes = {
        f"{2 * i + 1}.to_{half}_ip.weight": (width, context)
        for i, width in enumerate(widths)
        for half in "kv"
    }
    return network("ip_adapter.", shapes)


def base(widths: tuple[int, ...] = SD_WIDTHS) -> Tensors:
    tensors = adapters.base_sd15(widths, features=32, context=CONTEXT)
    return {key: tensor.float() for key, tensor in tensors.items()}


def plus() -> Tensors:
    tensors = adapters.plus_sd15(SD_WIDTHS, features=40, inner=64, heads=3, context=CONTEXT)
    return {key: tensor.float() for key, tensor in tensors.items()}


def full_face() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "proj.0.weight": (40, 40),
        "proj.0.bias": (40,),
        "proj.2.weight": (CONTEXT, 40),
        "proj.2.bias": (CONTEXT,),
        "proj.3.weight": (CONTEXT,),
        "proj.3.bias": (CONTEXT,),
    }
    return network("image_proj.", shapes) | layers(SD_WIDTHS)


def face() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "proj.0.weight": (48, 24),
        "proj.0.bias": (48,),
        "proj.2.weight": (4 * CONTEXT, 48),
        "proj.2.bias": (4 * CONTEXT,),
        "norm.weight": (CONTEXT,),
        "norm.bias": (CONTEXT,),
    }
    return network("image_proj.", shapes) | layers(SD_WIDTHS)


def face_plus() -> Tensors:
    resampler = {
        f"image_proj.perceiver_resampler.{key.removeprefix('image_proj.')}": tensor
        for key, tensor in plus().items()
        if key.startswith("image_proj.") and "latents" not in key
    }
    return {**resampler, **face()}


def lora(widths: tuple[int, ...] = SD_WIDTHS, rank: int = 4) -> Tensors:
    """FaceID's LoRA, by section 2.7's shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(2 * len(widths)):
        width = widths[n // 2]
        for target in ("q", "k", "v", "out"):
            rows = CONTEXT if n % 2 and target in "kv" else width
            shapes[f"{n}.to_{target}_lora.down.weight"] = (rank, rows)
            shapes[f"{n}.to_{target}_lora.up.weight"] = (width, rank)
    return network("ip_adapter.", shapes)


KINDS: dict[str, Callable[[], Tensors]] = {
    "base": base,
    "plus": plus,
    "full-face": full_face,
    "faceid": face,
    "faceid-plus": face_plus,
}


def assert_same(found: Tensors, published: Tensors) -> None:
    assert found.keys() == published.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in published.items())


def in_diffusers(*published: Tensors, blocks: tuple[int, ...] = SD_BLOCKS) -> Tensors:
    model = unet(blocks)
    model._load_ip_adapter_weights([adapters.nested(tensors) for tensors in published])
    state: Tensors = model.state_dict()
    return state


@pytest.mark.parametrize("prefix", ["", "unet.", "module.unet."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_diffusers_unet_gives_back_the_published_tensors(kind: str, prefix: str) -> None:
    published = KINDS[kind]()
    state = in_diffusers(published)
    assert not any(key in state for key in published)
    assert_same(canonical({prefix + k: t for k, t in state.items()}, "unet"), published)


def test_sdxl_layers_are_numbered_like_diffusers_numbers_them() -> None:
    published = base(SDXL_WIDTHS)
    state = in_diffusers(published, blocks=(8, 16, 24))
    assert sum(".to_k_ip.0." in key for key in state) == 70
    assert_same(canonical(state, "unet"), published)


def test_two_adapters_in_one_unet_are_refused() -> None:
    with pytest.raises(CheckpointError, match="with 2 adapters"):
        canonical(in_diffusers(base(), plus()), "unet")


@pytest.mark.parametrize("kind", KINDS)
def test_published_files_with_diffusers_names_inside(kind: str) -> None:
    published = KINDS[kind]()
    state = in_diffusers(published)
    inside = "encoder_hid_proj.image_projection_layers.0."
    mixed = {
        f"image_proj.{key.removeprefix(inside)}": tensor
        for key, tensor in state.items()
        if key.startswith(inside)
    } | {key: tensor for key, tensor in published.items() if key.startswith("ip_adapter.")}
    assert_same(canonical(mixed, "mixed"), published)


def test_sd35_resampler_names_are_undone() -> None:
    from diffusers.loaders.transformer_sd3 import SD3Transformer2DLoadersMixin

    layer = {
        **{f"0.norm{n}.{leaf}": (128,) for n in (1, 2) for leaf in ("weight", "bias")},
        "0.to_q.weight": (128, 128),
        "0.to_kv.weight": (256, 128),
        "0.to_out.weight": (128, 128),
        "1.0.weight": (128,),
        "1.0.bias": (128,),
        "1.1.weight": (512, 128),
        "1.3.weight": (128, 512),
        "2.1.weight": (512, 128),
        "2.1.bias": (512,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, 3, 128),
        "proj_in.weight": (128, 24),
        "proj_in.bias": (128,),
        "proj_out.weight": (32, 128),
        "proj_out.bias": (32,),
        "norm_out.weight": (32,),
        "norm_out.bias": (32,),
        "time_embedding.linear_1.weight": (128, 320),
        "time_embedding.linear_1.bias": (128,),
        "time_embedding.linear_2.weight": (128, 128),
        "time_embedding.linear_2.bias": (128,),
        **{f"layers.{i}.{key}": shape for i in range(4) for key, shape in layer.items()},
    }
    published = network("image_proj.", shapes)
    module = SD3Transformer2DLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(
        network("", shapes), low_cpu_mem_usage=False
    )
    state = {f"image_proj.{key}": tensor for key, tensor in module.state_dict().items()}
    assert "image_proj.layers.0.adaln_proj.weight" in state
    keys = {"ip_adapter.0.to_k_ip.weight": torch.ones(2, 2)}
    assert_same(canonical(state | keys, "sd3.5"), published | keys)


class Processor(nn.Module):
    """The parameters of the training scripts' attention processors, under their names."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for key, tensor in tensors.items():
            *path, leaf = key.split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(leaf, nn.Parameter(tensor))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class TrainingModule(nn.Module):
    """What the published training scripts wrap and save: one module of three attributes."""

    def __init__(self, published: Tensors) -> None:
        super().__init__()
        self.unet = unet()
        parts = adapters.nested(published)
        self.unet.set_attn_processor(
            {
                name: Processor(
                    {
                        key.partition(".")[2]: tensor
                        for key, tensor in parts["ip_adapter"].items()
                        if key.partition(".")[0] == str(number)
                    }
                )
                for number, name in enumerate(self.unet.attn_processors)
            }
        )
        self.image_proj_model = Processor(parts["image_proj"])
        self.adapter_modules = nn.ModuleList(self.unet.attn_processors.values())


TRAINED: dict[str, Callable[[], Tensors]] = {
    "base": base,
    "plus": plus,
    "faceid-with-lora": lambda: face() | lora(),
    "faceid-plus-with-lora": lambda: face_plus() | lora(),
}


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_whole_training_module_pickled(kind: str, wrapper: str, tmp_path: Path) -> None:
    published = TRAINED[kind]()
    state = TrainingModule(published).state_dict(prefix=wrapper)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (file,) = dump_files(tmp_path)
    loaded = torch.load(file, weights_only=True)
    assert f"{wrapper}unet.conv_in.weight" in loaded
    assert_same(canonical(loaded, file.name), published)


@pytest.mark.parametrize("kind", TRAINED)
def test_safetensors_keep_one_of_both_names(kind: str, tmp_path: Path) -> None:
    published = TRAINED[kind]()
    module = TrainingModule(published)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_model(module, str(file))
    loaded = safetensors.torch.load_file(file)
    layers_kept = [key for key in loaded if key.endswith("to_k_ip.weight")]
    assert len(layers_kept) == 16
    assert_same(canonical(loaded, file.name), published)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["base", "faceid-with-lora"])
def test_an_accelerate_checkpoint_folder(kind: str, safe: bool, tmp_path: Path) -> None:
    from accelerate import Accelerator

    published = TRAINED[kind]()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(TrainingModule(published))
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    accelerator.free_memory()
    (file,) = dump_files(tmp_path)
    assert file.name == ("model.safetensors" if safe else "pytorch_model.bin")
    loaded = safetensors.torch.load_file(file) if safe else torch.load(file, weights_only=True)
    assert any(key.startswith("adapter_modules.") for key in loaded) is not safe
    assert_same(canonical(loaded, file.name), published)


def test_the_accident_of_the_usual_conversion_is_named(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(TrainingModule(base()))
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    dump = safetensors.torch.load_file(tmp_path / "model.safetensors")
    converted = {
        key.replace("image_proj_model.", "image_proj."): tensor
        for key, tensor in dump.items()
        if key.startswith(("image_proj_model.", "adapter_modules."))
    }
    with pytest.raises(CheckpointError, match="safe_serialization=False"):
        canonical(converted, "ip_adapter.bin")
