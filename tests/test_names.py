"""Training dumps and foreign names, each written out by hand from the formats' descriptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ip_adapter.errors import CheckpointError, IncompatibleModelError, MissingFileError
from ip_adapter.names import canonical, dump_files
from tests.conftest import NARROW
from tests.synthetic import adapters

Tensors = adapters.Tensors

# Positions of diffusers' attention processors: down, up, middle; one block for two of them.
SD_BLOCKS = [
    *(f"down_blocks.{b}.attentions.{a}.transformer_blocks.0" for b in (0, 1, 2) for a in (0, 1)),
    *(f"up_blocks.{b}.attentions.{a}.transformer_blocks.0" for b in (1, 2, 3) for a in (0, 1, 2)),
    "mid_block.attentions.0.transformer_blocks.0",
]
SDXL_BLOCKS = [
    f"{path}.transformer_blocks.{depth}"
    for path, depths in [
        *((f"down_blocks.1.attentions.{a}", 2) for a in (0, 1)),
        *((f"down_blocks.2.attentions.{a}", 10) for a in (0, 1)),
        *((f"up_blocks.0.attentions.{a}", 10) for a in (0, 1, 2)),
        *((f"up_blocks.1.attentions.{a}", 2) for a in (0, 1, 2)),
        ("mid_block.attentions.0", 10),
    ]
    for depth in range(depths)
]


def placed(
    published: Tensors, pattern: str = "unet.{block}.attn{which}.processor.{rest}"
) -> Tensors:
    """Rename ``ip_adapter.{n}.*`` to the layer's place in SD 1.5's UNet."""
    out: Tensors = {}
    for key, tensor in published.items():
        if key.startswith("ip_adapter."):
            _, number, rest = key.split(".", 2)
            block, which = SD_BLOCKS[int(number) // 2], int(number) % 2 + 1
            out[pattern.format(block=block, which=which, rest=rest)] = tensor
        else:
            out["image_proj_model." + key.removeprefix("image_proj.")] = tensor
    return out


def lora(rank: int = 2, width: int = 8) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {
        f"ip_adapter.{n}.to_{target}_lora.{half}.weight": torch.randn(
            (rank, width) if half == "down" else (width, rank), generator=generator
        )
        for n in range(32)
        for target in ("q", "k", "v", "out")
        for half in ("down", "up")
    }


def frozen() -> Tensors:
    """Weights of other models and states that a training dump carries along."""
    keys = (
        "unet.conv_in.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.encoder_hid_proj.weight",  # Kolors' text projection
        "text_encoder.text_model.embeddings.position_embedding.weight",
        "optimizer.state.0.exp_avg",
        "global_step",
    )
    return {key: torch.zeros(2, 2) for key in keys}


def assert_same(found: Tensors, published: Tensors) -> None:
    assert found.keys() == published.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in published.items())


BASE = adapters.base_sd15(NARROW, features=16, context=12)
PLUS = adapters.plus_sd15(NARROW, features=16, inner=64, heads=2, depth=2, context=12)


@pytest.mark.parametrize("published", [BASE, PLUS, BASE | lora()], ids=["base", "plus", "lora"])
@pytest.mark.parametrize(
    "wrapper", ["", "module.", "model.", "state_dict.", "_orig_mod.", "state_dict.model."]
)
def test_published_names_pass_as_the_same_tensors(published: Tensors, wrapper: str) -> None:
    found = canonical({wrapper + key: tensor for key, tensor in published.items()}, "file")
    assert found.keys() == published.keys()
    assert all(found[key] is published[key] for key in published)


def test_unknown_tensors_of_the_adapter_are_kept() -> None:
    extra = {
        "image_proj.gate": torch.ones(1),
        "ip_adapter.1.norm_ip.weight": torch.ones(2),
    }
    assert_same(canonical(BASE | extra | frozen(), "file"), BASE | extra)
    dump = placed(BASE | extra)
    assert "unet." + SD_BLOCKS[0] + ".attn2.processor.norm_ip.weight" in dump
    assert_same(canonical(dump | frozen(), "file"), BASE | extra)


@pytest.mark.parametrize("projection", ["image_proj.", "image_proj_model.", "module.image_proj."])
def test_kolors_and_training_module_names(projection: str) -> None:
    published = BASE | lora()
    named = {
        key.replace("image_proj.", projection).replace("ip_adapter.", "adapter_modules."): tensor
        for key, tensor in published.items()
    }
    assert_same(canonical(named | frozen(), "dump"), published)


@pytest.mark.parametrize(
    "pattern",
    [
        "unet.{block}.attn{which}.processor.{rest}",
        "{block}.attn{which}.processor.{rest}",
        "module.unet.{block}.attn{which}.processor.{rest}",
        "unet.module.{block}.attn{which}.processor.{rest}",
        "unet._orig_mod.{block}.attn{which}.processor.{rest}",
    ],
)
def test_layers_by_their_place_in_the_unet(pattern: str) -> None:
    published = BASE | lora()
    assert_same(canonical(placed(published, pattern) | frozen(), "dump"), published)


def test_both_names_of_shared_layers() -> None:
    named = {key.replace("ip_adapter.", "adapter_modules."): BASE[key] for key in BASE}
    assert_same(canonical(placed(BASE) | named, "dump"), BASE)


def test_one_adapter_whatever_its_number_in_diffusers() -> None:
    dump = {
        key.replace("_ip.weight", "_ip.1.weight").replace(
            "image_proj_model.", "unet.encoder_hid_proj.image_projection_layers.1."
        ): tensor
        for key, tensor in placed(BASE).items()
    }
    assert sum("_ip.1.weight" in key for key in dump) == 32
    assert_same(canonical(dump, "unet"), BASE)


def test_peft_names_of_a_faceid_lora() -> None:
    # Seen in diffusers 0.42 with PEFT 0.21: to_q.lora_A.faceid_0.weight, to_out.0.lora_B ...
    published = BASE | lora()
    dump: Tensors = {}
    for key, tensor in placed(published).items():
        key = key.replace("processor.to_out_lora", "processor.to_out.0_lora")
        if "_lora." in key:
            key = key.replace("processor.", "").replace("_lora.down.", ".lora_A.faceid_0.")
            key = key.replace("_lora.up.", ".lora_B.faceid_0.")
        dump[key] = tensor
    assert f"unet.{SD_BLOCKS[0]}.attn1.to_out.0.lora_B.faceid_0.weight" in dump
    users = {f"unet.{SD_BLOCKS[0]}.attn1.to_q.lora_A.default.weight": torch.ones(1)}
    assert_same(canonical(dump | users, "unet"), published)


@pytest.mark.parametrize(
    ("block", "number"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0", 1),
        ("down_blocks.2.attentions.1.transformer_blocks.9", 47),
        ("up_blocks.0.attentions.1.transformer_blocks.0", 69),
        ("up_blocks.1.attentions.2.transformer_blocks.1", 119),
        ("mid_block.attentions.0.transformer_blocks.9", 139),
    ],
)
def test_sdxl_numbers(block: str, number: int) -> None:
    dump = {
        f"unet.{place}.attn2.processor.to_{half}_ip.weight": torch.full((1, 1), float(i))
        for i, place in enumerate(SDXL_BLOCKS)
        for half in "kv"
    }
    found = canonical({**dump, "image_proj_model.proj.weight": torch.ones(1)}, "dump")
    assert found[f"ip_adapter.{number}.to_k_ip.weight"].item() == SDXL_BLOCKS.index(block)
    assert len(found) == 141


def test_resampler_names_of_diffusers_before_blocks_had_names() -> None:
    # diffusers 0.22 to 0.26: ModuleList([LayerNorm, LayerNorm, Attention, Sequential]) per layer,
    # directly under encoder_hid_proj until 0.25.
    old: Tensors = {}
    for key, tensor in placed(PLUS).items():
        key = key.replace("image_proj_model.", "encoder_hid_proj.")
        for published, name in (
            (".0.norm1.", ".0."),
            (".0.norm2.", ".1."),
            (".0.to_q.", ".2.to_q."),
            (".0.to_out.", ".2.to_out.0."),
            (".1.0.", ".3.0."),
            (".1.1.", ".3.1.net.0.proj."),
            (".1.3.", ".3.1.net.2."),
        ):
            for layer in ("layers.0", "layers.1"):
                if key.startswith(f"encoder_hid_proj.{layer}{published}"):
                    key = key.replace(layer + published, layer + name)
                    break
            else:
                continue
            break
        if ".to_kv." in key:
            half = len(tensor) // 2
            old[key.replace(".0.to_kv.", ".2.to_k.")] = tensor[:half]
            old[key.replace(".0.to_kv.", ".2.to_v.")] = tensor[half:]
        else:
            old[key] = tensor
    assert "encoder_hid_proj.layers.1.3.1.net.0.proj.weight" in old
    assert "encoder_hid_proj.layers.1.0.weight" in old
    assert_same(canonical(old, "unet"), PLUS)


def test_half_of_a_split_matrix_is_refused() -> None:
    dump = {key: BASE[key] for key in BASE if key.startswith("ip_adapter.")}
    dump["image_proj.layers.0.attn.to_k.weight"] = torch.ones(2, 2)
    with pytest.raises(CheckpointError, match=r"lacks a half of image_proj\.layers\.0"):
        canonical(dump, "file")


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.faceid_0.weight",
        "encoder_hid_proj.image_embeds.weight",  # a Kandinsky UNet
        "style_image_proj.proj.weight",
        "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
    ],
)
def test_files_of_other_kinds_pass_unchanged(key: str) -> None:
    tensor = torch.ones(1)
    assert canonical({key: tensor}, "file") == {key: tensor}


def test_another_adapter_with_numbered_layers_passes_whole() -> None:
    keys = ("style_image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")
    tensors = {key: torch.ones(1) for key in keys}
    assert canonical(tensors, "csgo").keys() == set(keys)


def test_lost_keys_and_values_are_explained() -> None:
    projection = {key: tensor for key, tensor in BASE.items() if key.startswith("image_proj.")}
    with pytest.raises(CheckpointError, match=r"'mine' has an image .*\(4 tensors\).*accelerate"):
        canonical(projection | frozen(), "mine")
    unknown = {"transformer_blocks.0.attn.processor.to_k_ip.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"unknown names, such as transformer_blocks\.0"):
        canonical(projection | unknown, "mine")


def test_lost_projection_is_explained() -> None:
    dump = {key: tensor for key, tensor in placed(BASE).items() if "image_proj" not in key}
    with pytest.raises(CheckpointError, match=r"\(32 tensors\) but no image projection"):
        canonical(dump | frozen(), "mine")


def test_layers_of_an_unknown_unet_are_refused() -> None:
    dump = {key: t for key, t in placed(BASE).items() if "mid_block" not in key}
    with pytest.raises(IncompatibleModelError, match=r"in 15 transformer blocks.*SD 1.5 16"):
        canonical(dump, "mine")

    with pytest.raises(IncompatibleModelError) as caught:
        canonical(dump, "mine")
    assert "Miniature" not in str(caught.value)


def test_a_dump_of_the_miniature_is_numbered() -> None:
    """Seven layers of one UNet with two levels: down, up, middle."""
    blocks = [
        "down_blocks.0.attentions.0",
        "down_blocks.1.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "mid_block.attentions.0",
    ]
    published = adapters.base_sd15((64,) * 7, features=128, context=128)
    dump: Tensors = {}
    for key, tensor in published.items():
        if key.startswith("ip_adapter."):
            _, number, rest = key.split(".", 2)
            place = f"{blocks[int(number) // 2]}.transformer_blocks.0.attn2.processor"
            dump[f"unet.{place}.{rest}"] = tensor
        else:
            dump["image_proj_model." + key.removeprefix("image_proj.")] = tensor
    assert_same(canonical(dump, "mine"), published)


def test_two_adapters_are_refused() -> None:
    dump = placed(BASE)
    both = {k.replace("_ip.", f"_ip.{i}."): t for i in (0, 1) for k, t in dump.items()}
    with pytest.raises(CheckpointError, match="2 adapters in it"):
        canonical(both, "unet")


def test_two_tensors_for_one_name_are_refused() -> None:
    other = {f"module.{key}": tensor + 1 for key, tensor in BASE.items()}
    with pytest.raises(CheckpointError, match=r"two different tensors for image_proj\.proj"):
        canonical(BASE | other, "mixed")
    assert_same(canonical(BASE | {f"module.{k}": t.clone() for k, t in BASE.items()}, "x"), BASE)


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "optimizer.bin", "ip_adapter.bin"], "model.safetensors"),
        (["pytorch_model.bin", "random_states_0.pkl", "ip-adapter.bin"], "pytorch_model.bin"),
        (["ip_adapter.bin", "log.txt"], "ip_adapter.bin"),
        (["ip-adapter.bin"], "ip-adapter.bin"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (
            ["latest", "pytorch_model/mp_rank_00_model_states.pt", "zero_to_fp32.py"],
            "pytorch_model/mp_rank_00_model_states.pt",
        ),
    ],
)
def test_the_dump_in_a_folder(names: list[str], expected: str, tmp_path: Path) -> None:
    write(tmp_path, *names)
    assert dump_files(tmp_path) == [tmp_path / expected]


def index(folder: Path, shards: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": shards})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_are_found_in_order_and_only_in_the_folder(tmp_path: Path) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write(tmp_path, one, two)
    index(tmp_path, {"b": two, "a": one, "c": "../elsewhere/" + two})
    assert set(dump_files(tmp_path)) == {tmp_path / one, tmp_path / two}
    index(tmp_path, {"b": two, "a": one})
    assert dump_files(tmp_path) == [tmp_path / one, tmp_path / two]
    (tmp_path / one).unlink()
    with pytest.raises(CheckpointError, match=f"names 2 shards, of which 1 .*{one}"):
        dump_files(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not an index of shards"):
        dump_files(tmp_path)


def test_folder_without_weights_lists_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it has nothing"):
        dump_files(tmp_path)
    write(tmp_path, "checkpoint-10/model.safetensors", "log.txt")
    with pytest.raises(CheckpointError, match=r"it has checkpoint-10/, log\.txt"):
        dump_files(tmp_path)
    with pytest.raises(MissingFileError, match="no folder 'absent'"):
        dump_files(tmp_path / "absent")


def test_joined_matrix_is_the_only_new_tensor() -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    dump: dict[str, Tensor] = {
        "image_proj.layers.0.attn.to_k.weight": weight[:2],
        "image_proj.layers.0.attn.to_v.weight": weight[2:],
        "image_proj.layers.0.ln0.weight": torch.ones(3),
        "ip_adapter.1.to_k_ip.weight": torch.ones(1, 3),
    }
    found = canonical(dump, "file")
    assert torch.equal(found["image_proj.layers.0.0.to_kv.weight"], weight)
    norm = found["image_proj.layers.0.0.norm1.weight"]
    assert norm is dump["image_proj.layers.0.ln0.weight"]


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        (
            {"image_embeds.weight": (48, 16), "norm.weight": (12,)},
            {"image_embeds.weight": "proj.weight", "norm.weight": "norm.weight"},
        ),
        (  # full-face: as wide inside as its features, one token per patch
            {
                "ff.net.0.proj.weight": (16, 16),
                "ff.net.2.weight": (12, 16),
                "norm.weight": (12,),
            },
            {
                "ff.net.0.proj.weight": "proj.0.weight",
                "ff.net.2.weight": "proj.2.weight",
                "norm.weight": "proj.3.weight",
            },
        ),
        (  # FaceID: twice as wide inside, four tokens
            {
                "ff.net.0.proj.weight": (32, 16),
                "ff.net.2.weight": (48, 32),
                "norm.weight": (12,),
            },
            {
                "ff.net.0.proj.weight": "proj.0.weight",
                "ff.net.2.weight": "proj.2.weight",
                "norm.weight": "norm.weight",
            },
        ),
        (
            {
                "proj.net.0.proj.bias": (32,),
                "proj.net.0.proj.weight": (32, 16),
                "proj.net.2.weight": (48, 32),
                "norm.weight": (12,),
                "proj_in.weight": (12, 20),
                "layers.0.ff.1.net.2.weight": (12, 48),
            },
            {
                "proj.net.0.proj.bias": "proj.0.bias",
                "proj.net.0.proj.weight": "proj.0.weight",
                "proj.net.2.weight": "proj.2.weight",
                "norm.weight": "norm.weight",
                "proj_in.weight": "perceiver_resampler.proj_in.weight",
                "layers.0.ff.1.net.2.weight": "perceiver_resampler.layers.0.1.3.weight",
            },
        ),
    ],
    ids=["base", "full-face", "faceid", "faceid-plus"],
)
def test_projections_of_diffusers(
    shapes: dict[str, tuple[int, ...]], names: dict[str, str]
) -> None:
    place = "encoder_hid_proj.image_projection_layers.0."
    dump = {place + key: torch.rand(shape) for key, shape in shapes.items()}
    layers = {"ip_adapter.1.to_k_ip.weight": torch.ones(1, 12)}
    found = canonical(dump | layers, "unet")
    assert found.keys() == {f"image_proj.{name}" for name in names.values()} | layers.keys()
    assert all(found[f"image_proj.{new}"] is dump[place + old] for old, new in names.items())
