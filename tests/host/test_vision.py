"""The host's CLIP_VISION objects: recognised by weights, run in chunks, loaded from any naming."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.host.conftest import draw
from tests.synthetic.layouts import clip_vision_h
from tests.synthetic.models import to_openclip
from tests.tolerance import assert_close

pytestmark = pytest.mark.host

CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "projection_dim": 32,
}
SIGLIP = {"model_type": "siglip_vision_model", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
Tensors = dict[str, Tensor]


def empty(config: dict[str, Any]) -> Any:
    """The host's class without numbers."""
    import comfy.clip_vision

    with tempfile.TemporaryDirectory() as folder:  # older hosts want a path
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        return comfy.clip_vision.ClipVisionModel(str(path))


def clip_vision(*drop: str, **changes: Any) -> Any:
    vision = empty({key: v for key, v in {**CONFIG, **changes}.items() if key not in drop})
    generator = torch.Generator().manual_seed(0)
    for parameter in vision.model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return vision


def siglip() -> Any:
    return clip_vision("projection_dim", **SIGLIP)


@pytest.fixture
def library(host: Any) -> Any:
    return host.library("ip_adapter.host.vision")


@pytest.fixture
def seen(library: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each run of an encoder got."""
    counts: list[int] = []
    original = library._run

    def run(model: Any, pixel_values: Tensor) -> Any:
        counts.append(len(pixel_values))
        return original(model, pixel_values)

    monkeypatch.setattr(library, "_run", run)
    return counts


def pixels(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def tower(depth: int, width: int, projection: int, positions: int = 257) -> Tensors:
    """A file's tensors at the real size that take no memory: every value is the same one."""
    layout = clip_vision_h(depth, width, projection)
    layout["vision_model.embeddings.position_embedding.weight"] = (positions, width)
    return {key: torch.tensor(0.01).half().expand(shape) for key, shape in layout.items()}


def saved(library: Any, monkeypatch: pytest.MonkeyPatch, tensors: Tensors) -> Path:
    monkeypatch.setattr(library, "read_tensors", lambda path: dict(tensors))
    return Path("model.safetensors")


def test_a_loaded_tower_is_known_by_its_weights(library: Any) -> None:
    found = library.recognise(clip_vision())
    assert (found.hidden, found.pooled, found.layers, found.size) == (64, 32, 3, 28)
    assert (found.tokens, found.has_class_token) == (5, True)
    found = library.recognise(siglip())
    assert (found.hidden, found.pooled, found.tokens) == (64, None, 4)
    assert not found.has_class_token


def test_what_is_no_tower_is_named(library: Any) -> None:
    class Other:
        model = nn.Linear(1, 1)

    assert library.recognise(Other()) is None
    assert library.describe(Other()) == "a Linear, not a CLIP image encoder"
    assert library.recognise(None) is None
    assert library.describe(None) == "a NoneType, not a CLIP image encoder"
    with pytest.raises(Exception, match=r"is a Linear.*Load CLIP Vision") as caught:
        library.features(Other(), pixels(1, 28), "pooled")
    assert type(caught.value).__name__ == "IncompatibleModelError"


def test_dino_is_no_tower(library: Any) -> None:
    import comfy.clip_vision

    config = {
        "model_type": "dinov2",
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
        "image_size": 518,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        dino = comfy.clip_vision.ClipVisionModel(str(path))
    assert library.recognise(dino) is None
    assert "Dinov2Model" in library.describe(dino)


@pytest.mark.parametrize("make", [clip_vision, siglip])
def test_features_are_the_hosts_own_encoding(library: Any, make: Any) -> None:
    """Pixels in 0..1, a multiple of 1/255, as the host rounds them."""
    vision = make()
    values = pixels(3, 28).mul(255).round() / 255
    out = vision.encode_image(values.movedim(1, -1))
    assert_close(library.features(vision, values, "hidden"), out.penultimate_hidden_states)
    if make is clip_vision:
        assert_close(library.features(vision, values, "pooled"), out.image_embeds)


def test_pooled_features_need_a_projection(library: Any) -> None:
    for vision in (siglip(), clip_vision("projection_dim")):
        with pytest.raises(Exception, match="no projected image embedding") as caught:
            library.features(vision, pixels(1, 28), "pooled")
        assert type(caught.value).__name__ == "IncompatibleModelError"
        assert library.features(vision, pixels(1, 28), "hidden").shape[-1] == 64


@pytest.mark.parametrize("make", [clip_vision, siglip])
def test_another_size_leaves_the_model_alone(library: Any, make: Any) -> None:
    vision = make()
    before = {key: value.clone() for key, value in vision.model.state_dict().items()}
    own = library.features(vision, pixels(1, 28), "hidden")
    assert library.features(vision, pixels(1, 56), "hidden").shape == (1, 17 - (make is siglip), 64)
    after = vision.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(library.features(vision, pixels(1, 28), "hidden"), own)


def test_a_size_between_patches_is_refused(library: Any) -> None:
    with pytest.raises(Exception, match=r"50 x 50 pixels.*patches of 14.*such as 56"):
        library.features(clip_vision(), pixels(1, 50), "pooled")
    odd = clip_vision(image_size=30)  # its own size may be: SigLIP's 384 is
    assert library.features(odd, pixels(1, 30), "hidden").shape == (1, 5, 64)


def test_a_tower_that_stretches_its_own_table_is_left_to(library: Any) -> None:
    """SigLIP 2 NaFlex: linear patches, positions made to fit by the host."""
    import comfy.clip_vision

    if "siglip2_vision_model" not in comfy.clip_vision.IMAGE_ENCODERS:
        pytest.skip("this host has no SigLIP 2 NaFlex")
    naflex = {**SIGLIP, "model_type": "siglip2_vision_model", "image_size": -1, "num_patches": 16}
    vision = clip_vision("projection_dim", **naflex)
    assert library.recognise(vision).tokens == 16
    values = pixels(1, 42)
    _, truth, _, _ = vision.model(pixel_values=(values - 0.5) / 0.5, intermediate_output=-2)
    assert_close(library.features(vision, values, "hidden"), truth)


def test_zero_features_are_those_of_zero_pixel_values(library: Any) -> None:
    vision = clip_vision()
    out = vision.model(pixel_values=torch.zeros(1, 3, 28, 28), intermediate_output=-2)
    assert_close(library.zero_features(vision, 28, "hidden"), out[1])
    assert_close(library.zero_features(vision, 28, "pooled"), out[2])
    assert library.zero_features(vision, 42, "hidden").shape == (1, 10, 64)


def test_many_pictures_run_in_chunks(
    library: Any, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = clip_vision()
    whole = library.features(vision, pixels(7, 28), "hidden")
    monkeypatch.setattr(library, "CHUNK", 3)
    assert_close(library.features(vision, pixels(7, 28), "hidden"), whole)
    assert seen == [7, 3, 3, 1]


def test_larger_pictures_run_in_smaller_chunks(library: Any, seen: list[int]) -> None:
    library.features(clip_vision(num_hidden_layers=2), pixels(9, 448), "pooled")
    assert seen == [4, 4, 1]


def test_as_many_pictures_run_as_there_is_memory_for(
    library: Any, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    # 5 tokens of 64 numbers, 16 of which are alive; 25 scores of one head, twice: 20,680 bytes.
    monkeypatch.setattr(management, "get_free_memory", lambda device: 2 * 3 * 20_680)
    library.features(clip_vision(), pixels(7, 28), "hidden")
    assert seen == [3, 3, 1]
    seen.clear()
    monkeypatch.setattr(management, "get_free_memory", lambda device: 0)
    library.features(clip_vision(), pixels(2, 28), "hidden")
    assert seen == [1, 1]


def test_a_device_that_is_fuller_than_it_said_gets_fewer_pictures(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = clip_vision()
    whole = library.features(vision, pixels(7, 28), "hidden")
    forward, sizes = vision.model.forward, []

    def limited(pixel_values: Any, **more: Any) -> Any:
        sizes.append(len(pixel_values))
        if len(pixel_values) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(pixel_values=pixel_values, **more)

    monkeypatch.setattr(vision.model, "forward", limited)
    room = 2
    assert_close(library.features(vision, pixels(7, 28), "hidden"), whole)
    assert sizes == [7, 4, 2, 2, 2, 1]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        library.features(vision, pixels(7, 28), "hidden")


def test_the_stop_button_works_between_chunks(
    library: Any, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    monkeypatch.setattr(library, "CHUNK", 1)
    vision = clip_vision()
    forward = vision.model.forward

    def pressed(**arguments: Any) -> Any:
        if len(seen) == 2:
            management.interrupt_current_processing()
        return forward(**arguments)

    monkeypatch.setattr(vision.model, "forward", pressed)
    with pytest.raises(management.InterruptProcessingException):
        library.features(vision, pixels(5, 28), "pooled")
    assert seen == [1, 1]


def test_weights_may_be_casted_by_the_host(library: Any) -> None:
    """The host stores half precision and computes in the pixels' float32."""
    vision = clip_vision()
    vision.model.half()
    exact = clip_vision()
    exact.model.half().float()
    for size in (28, 56):
        found = library.features(vision, pixels(2, size), "hidden")
        assert found.dtype == torch.float32
        assert_close(found, library.features(exact, pixels(2, size), "hidden"))


def test_towers_run_under_dynamic_vram(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the host's layers are built without memory and get it from the state dict."""
    import comfy.memory_management as memory

    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this host has no Dynamic VRAM")
    plain = clip_vision()
    tensors = {key: value.clone() for key, value in plain.model.state_dict().items()}
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    dynamic = empty(CONFIG)
    dynamic.model.load_state_dict(tensors, assign=True)
    assert library.recognise(dynamic) == library.recognise(plain)
    for size in (28, 56):
        found = library.features(dynamic, pixels(2, size), "pooled")
        assert_close(found, library.features(plain, pixels(2, size), "pooled"))


def small_configs(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make our three-layer tower one that the host has a description of."""
    import comfy.clip_vision

    folder = Path(tempfile.mkdtemp())
    (folder / "small.json").write_text(json.dumps({**CONFIG, "image_size": 224}))
    monkeypatch.setattr(comfy.clip_vision, "__file__", str(folder / "clip_vision.py"))
    monkeypatch.setattr(library, "_CONFIGS", {(64, 3): "small.json"})


@pytest.mark.parametrize("prefix", ["", "model.", "vision_model only"])
def test_hugging_face_files_load_at_their_own_size(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """A fine-tune with more positions than the published tower, whole, wrapped or bare."""
    vision = clip_vision(image_size=56)
    tensors = {key: value.clone() for key, value in vision.model.state_dict().items()}
    tensors |= {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 4)}
    if prefix == "vision_model only":
        tensors = {
            key.removeprefix("vision_model."): value
            for key, value in tensors.items()
            if not key.startswith("text")
        }
    else:
        tensors = {prefix + key: value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    small_configs(library, monkeypatch)
    loaded = library.load(tmp_path / "model.safetensors")
    assert loaded.image_size == 56
    assert library.recognise(loaded).size == 56
    assert_close(
        library.features(loaded, pixels(1, 56), "pooled"),
        library.features(vision, pixels(1, 56), "pooled"),
    )


def test_a_tower_without_projection_loads_without_one(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host would fill the missing projection with whatever is in memory."""
    tensors = {key: value.clone() for key, value in clip_vision().model.state_dict().items()}
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    small_configs(library, monkeypatch)
    loaded = library.load(tmp_path / "model.safetensors")
    assert library.recognise(loaded).pooled is None
    assert library.features(loaded, pixels(1, 28), "hidden").shape == (1, 5, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("vision_model.pre_layrnorm.bias"), "1 tensors are missing .*pre_layrnorm"),
        (
            lambda t: t.update({"vision_model.encoder.layers.1.mlp.fc1.bias": torch.zeros(3)}),
            "other shapes: .*fc1.bias",
        ),
    ],
)
def test_damaged_hugging_face_files_are_refused(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    tensors = {key: value.clone() for key, value in clip_vision().model.state_dict().items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    small_configs(library, monkeypatch)
    with pytest.raises(Exception, match=message) as caught:
        library.load(tmp_path / "model.safetensors")
    assert type(caught.value).__name__ == "CheckpointError"


@pytest.mark.parametrize(
    ("positions", "size", "name"),
    [
        (257, 224, "CLIP ViT-L/14"),
        (577, 336, "CLIP ViT-L/14-336"),
        (1025, 448, "CLIP ViT-L/14 at 448 pixels"),
    ],
)
def test_real_towers_load_in_both_namings(
    library: Any, monkeypatch: pytest.MonkeyPatch, positions: int, size: int, name: str
) -> None:
    """ViT-L at its true size: only the table of positions tells these three apart."""
    tensors = tower(24, 1024, 768, positions)
    hugging = library.load(saved(library, monkeypatch, tensors))
    original = library.load(saved(library, monkeypatch, to_openclip(tensors)))
    for vision, kind in ((hugging, "ClipVisionModel"), (original, "OpenCLIPVision")):
        assert type(vision).__name__ == kind
        assert library.describe(vision) == name
        assert vision.image_size == size
    architecture = "ViT-L-14-336-quickgelu" if size == 336 else "ViT-L-14-quickgelu"
    assert original.model.architecture == architecture
    activation = hugging.model.vision_model.encoder.layers[0].mlp.activation
    given = draw(5)
    assert_close(activation(given), given * torch.sigmoid(1.702 * given))
    assert_close(original.model.visual.transformer.resblocks[0].mlp.gelu(given), activation(given))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"image_proj.norm.weight": torch.zeros(1)}, "it is an IP-Adapter"),
        ({"encoder.layer.39.layer_scale2.lambda1": torch.zeros(1)}, "DINO"),
        (
            {"text_model.embeddings.token_embedding.weight": torch.zeros(1)},
            "it is a text encoder without its image half",
        ),
        ({"b": torch.zeros(1), "a": torch.zeros(1)}, "it has 2 tensors, such as a"),
        ({}, "it has 0 tensors"),
        (tower(12, 768, 512), "hidden width 768 and pooled width 512 and 12 layers"),
        (tower(31, 1280, 1024), "hidden width 1280 and pooled width 1024 and 31 layers"),
        (to_openclip(tower(12, 768, 512)), "width 768 with 12 layers"),
    ],
)
def test_other_files_are_refused(
    library: Any, monkeypatch: pytest.MonkeyPatch, tensors: Tensors, message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        library.load(saved(library, monkeypatch, tensors))
    assert type(caught.value).__name__ == "CheckpointError"
    assert "model.safetensors" in str(caught.value)
