"""The synthetic files are what was published: names, shapes, counts, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from tests.synthetic import adapters, catalogue, layouts, near_misses
from tests.synthetic.catalogue import ROWS

# The publishers' files: parameters, tensors.
PUBLISHED = {
    "sd15": (22_319_616, 36),
    "sd15_light": (22_319_616, 36),
    "sd15_light_v11": (22_319_616, 36),
    "sd15_vit-G": (23_106_048, 36),
    "plus_sd15": (49_087_488, 83),
    "plus-face_sd15": (49_087_488, 83),
    "full-face_sd15": (21_794_304, 38),
    "faceid_sd15": (48_354_816, 294),
    "faceid-plus_sd15": (78_260_736, 344),
    "faceid-plusv2_sd15": (78_260_736, 344),
    "portrait_sd15": (32_291_328, 38),
    "portrait-v11_sd15": (32_291_328, 38),
    "composition_sd15": (49_087_488, 83),
    "instruct_sd15": (88_054_272, 175),
    "sdxl": (351_285_248, 144),
    "sdxl_vit-h": (349_188_096, 144),
    "plus_sdxl_vit-h": (423_748_864, 191),
    "plus-face_sdxl_vit-h": (423_748_864, 191),
    "faceid_sdxl": (535_507_968, 1266),
    "faceid-plusv2_sdxl": (743_707_648, 1316),
    "portrait_sdxl": (374_903_808, 146),
    "portrait-unnorm_sdxl": (422_765_824, 191),
    "composition_sdxl": (423_748_864, 191),
    "instruct_sdxl": (530_636_544, 283),
    "noobai": (351_285_248, 144),
    "instantid": (422_765_824, 191),
    "kolors_plus": (506_552_320, 191),
    "kolors_faceid-plus": (1_192_903_680, 196),
}

# SD 2.x was never published: SD 1.5's counts with text tokens of 1024, written out. 12480 is the
# sum of the sixteen widths; the resampler is 1024 wide inside and has twelve heads of 64.
KEY_VALUES = 2 * 12_480 * 1024
LAYER = 6 * 1024 + (4 * 768 + 8 * 1024) * 1024
OURS = {
    "sd2": (4096 * 1024 + 4096 + 2 * 1024 + KEY_VALUES, 36),
    "plus_sd2": (
        16 * 1024 + 1281 * 1024 + 1025 * 1024 + 2 * 1024 + 4 * LAYER + KEY_VALUES,
        83,
    ),
}

BYTES = {
    "sd15": 44_642_768,
    "sd15_light": 44_642_768,
    "sd15_vit-G": 46_215_640,
    "plus_sd15": 98_183_288,
    "plus-face_sd15": 98_183_288,
    "full-face_sd15": 43_592_352,
    "composition_sd15": 98_183_728,
    "sdxl": 702_585_376,
    "sdxl_vit-h": 698_391_064,
    "plus_sdxl_vit-h": 847_517_512,
    "plus-face_sdxl_vit-h": 847_517_512,
}

PICKLES = {
    "sd15_light_v11": 44_642_977,
    "faceid-plus_sd15": 156_558_503,
    "faceid-plusv2_sd15": 156_558_509,
    "portrait_sd15": 64_586_623,
    "faceid_sdxl": 1_071_149_741,
    "faceid-plusv2_sdxl": 1_487_555_181,
    "portrait-unnorm_sdxl": 1_009_523_411,
    "instantid": 1_691_134_141,
    "kolors_plus": 1_013_163_359,
}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_the_table_has_every_published_adapter() -> None:
    assert set(ROWS) == set(PUBLISHED) | set(OURS)
    assert {name for name, row in ROWS.items() if row.bytes and row.container == "safetensors"} == (
        set(BYTES)
    )
    assert {name for name, row in ROWS.items() if row.bytes and row.container != "safetensors"} == (
        set(PICKLES)
    )
    assert len({row.file for row in ROWS.values()}) == len(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_tensors(name: str) -> None:
    row, shapes = ROWS[name], catalogue.layout(ROWS[name])
    assert (count(shapes), len(shapes)) == (PUBLISHED | OURS)[name]
    assert row.parameters == count(shapes)


@pytest.mark.parametrize("name", ROWS)
def test_nano_is_a_tenth_of_the_width_and_nothing_else(name: str) -> None:
    full, nano = (catalogue.layout(ROWS[name], nano=nano) for nano in (False, True))
    assert list(nano) == list(full)
    context = {"SD 1.5": 768, "SD 2.x": 1024, "SDXL": 2048, "Kolors": 2048}[ROWS[name].family]
    for key, shape in nano.items():
        if key.startswith("image_proj."):
            assert shape == full[key]
        else:
            kept = (context, 128)  # the text tokens and the LoRA's rank
            assert shape == tuple(n if n in kept else n // 10 for n in full[key])


def test_widths_in_checkpoint_order() -> None:
    assert catalogue.widths("SD 1.5") == (
        *(320, 320, 640, 640, 1280, 1280),
        *(1280, 1280, 1280, 640, 640, 640, 320, 320, 320),
        1280,
    )
    assert catalogue.widths("SDXL") == (640,) * 4 + (1280,) * 50 + (640,) * 6 + (1280,) * 10
    assert set(catalogue.widths("SDXL", nano=True)) == {64, 128}


@pytest.mark.parametrize("name", BYTES)
def test_hollow_files_have_the_published_bytes(name: str, tmp_path: Path) -> None:
    path = adapters.write_hollow(ROWS[name], tmp_path)
    assert path.name == ROWS[name].file
    assert path.stat().st_size == BYTES[name] == ROWS[name].bytes
    with safe_open(path, "pt") as file:
        assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == (  # noqa: SIM118
            catalogue.layout(ROWS[name])
        )


def test_hollow_files_take_no_room(tmp_path: Path) -> None:
    path = adapters.write_hollow(ROWS["plus_sdxl_vit-h"], tmp_path)
    blocks = getattr(path.stat(), "st_blocks", None)
    if blocks is None or blocks * 512 > 1_000_000:
        pytest.skip("this file system has no holes")
    assert path.stat().st_size > 800_000_000


@pytest.mark.parametrize("name", ["sd15", "sd15_vit-G", "full-face_sd15", "composition_sd15"])
def test_filled_files_have_the_published_bytes(name: str, tmp_path: Path) -> None:
    path = adapters.write(ROWS[name], tmp_path)
    assert path.stat().st_size == BYTES[name]
    tensors = load_file(path)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == (
        catalogue.layout(ROWS[name])
    )
    assert all(
        value.dtype == torch.float16 and value.isfinite().all() for value in tensors.values()
    )


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_hold_little_beside_their_numbers(name: str) -> None:
    row, shapes = ROWS[name], catalogue.layout(ROWS[name])
    size = count(shapes) * row.dtype.itemsize
    if name == "portrait-unnorm_sdxl":  # its projection takes four bytes per number
        size += 2 * count({k: v for k, v in shapes.items() if k.startswith("image_proj.")})
    # Zip archives align each tensor to 64 bytes; the older pickles only name it.
    per_tensor = (PICKLES[name] - size) / len(shapes)
    assert row.bytes == PICKLES[name]
    low, high = (250, 450) if row.container == "bin-zip" else (100, 200)
    assert low < per_tensor < high


@pytest.mark.parametrize("container", ["bin-legacy", "bin-zip"])
def test_our_pickles_differ_from_the_published_only_by_overhead(
    container: catalogue.Container, tmp_path: Path
) -> None:
    row = ROWS["sd15_light_v11"]
    path = adapters.write(row, tmp_path / "a.bin", container=container)
    assert row.bytes is not None and 0 < path.stat().st_size - row.bytes < 36 * 300
    assert (path.read_bytes()[:2] == b"PK") == (container == "bin-zip")
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == ["image_proj", "ip_adapter"]
    for key, value in adapters.make(row).items():
        part, _, rest = key.partition(".")
        assert torch.equal(loaded[part][rest], value)


def test_an_oversized_pickle_has_views_into_larger_storages(tmp_path: Path) -> None:
    tensors = {"image_proj.a": torch.randn(3, 4).half(), "ip_adapter.b": torch.randn(5).half()}
    adapters.write_bin(adapters.oversize(tensors), tmp_path / "a.bin", legacy=True)
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)
    assert torch.equal(loaded["image_proj"]["a"], tensors["image_proj.a"])
    assert loaded["image_proj"]["a"].untyped_storage().nbytes() == 2 * 12 * 2
    assert loaded["ip_adapter"]["b"].untyped_storage().nbytes() == 5 * 2


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.container != "safetensors"])
def test_hollow_pickles_are_small_and_have_the_right_shapes(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    path = adapters.write_hollow(row, tmp_path)
    assert path.stat().st_size < 600 * len(catalogue.layout(row))
    parts = torch.load(path, weights_only=True)
    assert list(parts) == ["image_proj", row.part]
    found = {
        f"{part}.{key}": tuple(value.shape)
        for part, tensors in parts.items()
        for key, value in tensors.items()
    }
    assert found == catalogue.layout(row)
    assert {value.dtype for part in parts.values() for value in part.values()} == {row.dtype}


@pytest.mark.parametrize(
    ("name", "size", "tensors"),
    [("faceid_sd15", 51_059_544, 256), ("faceid-plusv2_sdxl", 371_842_896, 1680)],
)
def test_companion_loras_have_the_published_bytes(
    name: str, size: int, tensors: int, tmp_path: Path
) -> None:
    row = ROWS[name]
    lora = catalogue.companion(row, catalogue.hollow(catalogue.layout(row)))
    path = adapters.write_sparse(lora, tmp_path / row.lora_file)
    assert path.stat().st_size == size == row.lora_bytes
    assert path.name == f"{Path(row.file).stem}_lora.safetensors"
    assert len(lora) == tensors
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(lora)


def test_a_companion_lora_holds_the_adapters_own_numbers(tmp_path: Path) -> None:
    row = ROWS["faceid_sdxl"]
    lora = load_file(adapters.write_lora(row, tmp_path, nano=True, seed=3))
    inside = adapters.make(row, nano=True, seed=3)
    for number, path in [  # 48 and 49 are the first block of the way up, 120 of the middle
        (0, "down_blocks_1_attentions_0_transformer_blocks_0_attn1"),
        (27, "down_blocks_2_attentions_0_transformer_blocks_9_attn2"),
        (49, "up_blocks_0_attentions_0_transformer_blocks_0_attn2"),
        (139, "mid_block_attentions_0_transformer_blocks_9_attn2"),
    ]:
        for module, inner in (("to_q", "to_q"), ("to_k", "to_k"), ("to_out_0", "to_out")):
            for side in ("down", "up"):
                published = lora[f"lora_unet_{path}_{module}.lora_{side}.weight"]
                own = inside[f"ip_adapter.{number}.{inner}_lora.{side}.weight"]
                assert torch.equal(published, own) and published.any()
            alpha = lora[f"lora_unet_{path}_{module}.alpha"]
            assert alpha.shape == () and alpha.itemsize == 8 and alpha == 128
    widest = inside["ip_adapter.47.to_k_lora.down.weight"]
    assert widest.shape == (128, 2048) and widest.float().std() == pytest.approx(0.01, rel=0.02)


def test_headers_are_those_of_the_safetensors_library() -> None:
    tensors = {
        "b.10": torch.zeros(2, 3).half(),
        "b.2": torch.zeros(1).half(),
        "a": torch.tensor(128),
        "c": torch.zeros(7),
    }
    for metadata in (None, {"format": "pt"}):
        header, size = adapters.safetensors_header(tensors, metadata)
        theirs = save(tensors, metadata)
        assert theirs[: len(header)] == header and len(theirs) == len(header) + size


def test_fill_gives_equal_numbers_for_equal_seeds_only() -> None:
    shapes = {"a.weight": (64, 32), "norm.weight": (512,), "norm.bias": (512,)}
    first, again, other = (adapters.fill(shapes, seed) for seed in (0, 0, 1))
    for key in shapes:
        assert torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key])
    assert first["a.weight"].float().std() == pytest.approx(32**-0.5, rel=0.1)
    assert first["norm.weight"].float().mean() == pytest.approx(1, abs=0.02)
    assert first["norm.bias"].float().mean() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("topology", "parameters"),
    [
        (layouts.SD15, 859_520_964),
        (layouts.SD2, 865_910_724),
        (layouts.SDXL, 2_567_463_684),
        # SDXL with a label of 5632 instead of 2816, and a Linear from 4096 to 2048
        (layouts.KOLORS, 2_567_463_684 + 2816 * 1280 + 4097 * 2048),
    ],
    ids=["SD 1.5", "SD 2.x", "SDXL", "Kolors"],
)
def test_unets_have_the_published_parameters(topology: layouts.Topology, parameters: int) -> None:
    assert count(layouts.unet(320, topology=topology)) == parameters


# Parameters of whole published files.
NEAR_MISS_PARAMETERS = {
    "flux_xlabs_v1": 490_874_880,
    "flux_xlabs_v2": 528_672_768,
    "flux_instantx": 2_645_600_512,
    "sd35_instantx": 797_925_888,
    "sd3_instruct": 390_657_792,
}


@pytest.mark.parametrize("kind", NEAR_MISS_PARAMETERS)
def test_other_families_have_the_published_counts(kind: str) -> None:
    tensors = near_misses.NEAR_MISSES[kind]()
    assert sum(value.numel() for value in tensors.values()) == NEAR_MISS_PARAMETERS[kind]


@pytest.mark.parametrize("kind", near_misses.NEAR_MISSES)
def test_near_misses_can_be_written_and_are_no_published_adapter(kind: str, tmp_path: Path) -> None:
    make: Callable[[], dict[str, Tensor]] = near_misses.NEAR_MISSES[kind]
    tensors = make()
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    assert all(shapes != catalogue.layout(row) for row in ROWS.values())
    path = adapters.write_sparse(tensors, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        read = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert read == shapes
    adapters.write_bin(tensors, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").stat().st_size < 2_000_000


def test_layer_counts_of_near_misses() -> None:
    expected = {"layers_15": 15, "layers_69": 69, "layers_ssd1b": 34, "truncated": 14}
    for kind, layers in expected.items():
        tensors = near_misses.NEAR_MISSES[kind]()
        assert sum(key.endswith("to_k_ip.weight") for key in tensors) == layers
