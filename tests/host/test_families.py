"""Every published adapter, from its file to a sampled latent, on a real UNet of its family.

The UNets are a tenth as wide, and so are the adapters' keys and values; projections have their
published sizes. Image encoders have the published widths and two layers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import MODEL_FILES
from tests.host.conftest import Sampler, draw
from tests.synthetic import adapters
from tests.synthetic.catalogue import ROWS
from tests.synthetic.models import CHECKPOINT, UNET_KOLORS, UNET_SD2, UNET_SDXL, build_unets
from tests.tolerance import relative_error

pytestmark = pytest.mark.host

STATES = {"SD 1.5": 768, "SD 2.x": 1024, "SDXL": 2048, "Kolors": 4096}
POOLED = {"SDXL": 1280, "Kolors": 4096}
LAYERS = {"SD 1.5": 16, "SD 2.x": 16, "SDXL": 70, "Kolors": 70}
TOWERS = {
    # hidden, pooled, heads, MLP, picture, activation
    "OpenCLIP ViT-H/14": (1280, 1024, 16, 5120, 224, "gelu"),
    "OpenCLIP ViT-bigG/14": (1664, 1280, 16, 8192, 224, "gelu"),
    "CLIP ViT-L/14-336": (1024, 768, 16, 4096, 336, "quick_gelu"),
}


@dataclass(frozen=True)
class World:
    """The host with a MODEL of every family, and shallow image encoders; made when first used."""

    host: Any
    files: Path
    made: dict[str, Any]

    def model(self, family: str) -> Any:
        import comfy.sd

        if family not in self.made:
            if family == "SD 1.5":
                path = str(self.files / CHECKPOINT)
                loaded = comfy.sd.load_checkpoint_guess_config(path, output_vae=False)
                self.made[family], self.made["clip"] = loaded[0], loaded[1]
            else:
                file = {"SD 2.x": UNET_SD2, "SDXL": UNET_SDXL, "Kolors": UNET_KOLORS}[family]
                self.made[family] = comfy.sd.load_diffusion_model(str(self.files / file))
        return self.made[family]

    def clip(self) -> Any:
        self.model("SD 1.5")
        return self.made["clip"]

    def encoder(self, name: str) -> Any:
        import comfy.clip_vision

        if name not in self.made:
            hidden, pooled, heads, mlp, size, activation = TOWERS[name]
            config = {
                "model_type": "clip_vision_model",
                "hidden_size": hidden,
                "num_hidden_layers": 2,
                "num_attention_heads": heads,
                "intermediate_size": mlp,
                "hidden_act": activation,
                "image_size": size,
                "patch_size": 14,
                "num_channels": 3,
                "projection_dim": pooled,
            }
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump(config, file)
                file.flush()
                tower = comfy.clip_vision.ClipVisionModel(file.name)
            generator = torch.Generator().manual_seed(0)
            for parameter in tower.model.parameters():
                parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))
            self.made[name] = tower
        return self.made[name]

    def load(self, row: str, folder: Path, variant: str = "automatic") -> Any:
        path = adapters.write(ROWS[row], folder, nano=True)
        return self.host.library("ip_adapter.host.adapters").load(path, variant)

    def encode(self, adapter: Any, seed: int = 1, **extra: Any) -> Any:
        """An image prompt of whatever the adapter reads."""
        encoding = self.host.library("ip_adapter.host.encoding")
        projection = adapter.spec.projection
        vision = self.encoder(adapter.spec.encoder_name) if projection.image else None
        picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))
        if projection.face:
            faces = self.host.library("ip_adapter.faces")
            face = faces.from_tensor(20 * draw(1, 512, seed=seed), picture)
            structure = extra.get("structure", 1.0)
            return encoding.encode_faces(adapter, face, vision, structure)
        if projection.text:
            texts = extra.get("texts", ("use the style", "a cat"))
            return encoding.encode_instructed(adapter, vision, self.clip(), picture, "crop", *texts)
        return encoding.encode(adapter, vision, picture, "crop")

    def sample(self, model: Any, family: str, sample: Sampler) -> Tensor:
        extra = {"pooled_output": draw(1, POOLED[family])} if family in POOLED else {}
        positive, negative = ([[draw(1, 77, STATES[family], seed=s), extra]] for s in (1, 2))
        return sample(model, steps=2, positive=positive, negative=negative)


@pytest.fixture(scope="module")
def world(host: Any, model_files: Path) -> World:
    build_unets(MODEL_FILES)
    return World(host, model_files, {})


@pytest.fixture
def folder() -> Iterator[Path]:
    """Emptied after each test; the largest of these files has 1.8 GB."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("row", ROWS)
def test_every_published_adapter_runs(
    world: World, row: str, folder: Path, sample: Sampler
) -> None:
    family = ROWS[row].family
    adapter, model = world.load(row, folder), world.model(family)
    assert adapter.spec.family.name == family
    prompt = world.encode(adapter)
    tokens = adapter.spec.projection.tokens
    assert prompt.conditional.shape == prompt.unconditional.shape
    assert prompt.conditional.shape == (1, tokens, adapter.spec.projection.width)
    apply = world.host.library("ip_adapter.host.patching").apply
    patched, report = apply(model, adapter, prompt, weight=1.0)
    assert report.startswith(f"{LAYERS[family]} of {LAYERS[family]} layers, {tokens} tokens")
    with_image = world.sample(patched, family, sample)
    without = world.sample(model, family, sample)
    off = world.sample(apply(model, adapter, prompt, weight=0.0)[0], family, sample)
    assert with_image.isfinite().all()
    assert relative_error(with_image, without) > 1e-3
    assert torch.equal(off, without)


FACE_LORA = [row for row in ROWS if ROWS[row].has_lora]


@pytest.mark.parametrize("row", FACE_LORA)
def test_the_lora_inside_a_faceid_file_and_its_companion(
    world: World, row: str, folder: Path, sample: Sampler
) -> None:
    family = ROWS[row].family
    model, adapter = world.model(family), world.load(row, folder)
    face_lora = world.host.library("ip_adapter.host.face_lora")
    inside = face_lora.inside(adapter)
    modules = 8 * LAYERS[family]  # q, k, v and out of self- and cross-attention
    patched, report = face_lora.apply(model, inside, 0.6, "it")
    assert report == f"{modules} of {modules} modules, strength 0.6"
    found = world.sample(patched, family, sample)
    assert relative_error(found, world.sample(model, family, sample)) > 1e-3

    companion = face_lora.companion(adapters.write_lora(ROWS[row], folder, nano=True))
    other, _ = face_lora.apply(model, companion, 0.6, "it")
    assert torch.equal(world.sample(other, family, sample), found)
    none, _ = face_lora.apply(model, inside, 0.0, "it")
    assert torch.equal(world.sample(none, family, sample), world.sample(model, family, sample))


def test_a_missing_lora_is_mentioned(world: World, folder: Path) -> None:
    apply = world.host.library("ip_adapter.host.patching").apply
    face_lora = world.host.library("ip_adapter.host.face_lora")
    model, adapter = world.model("SD 1.5"), world.load("faceid_sd15", folder)
    prompt = world.encode(adapter)
    assert "Apply FaceID LoRA" in apply(model, adapter, prompt)[1]
    with_lora, _ = face_lora.apply(model, face_lora.inside(adapter), 0.6, "it")
    assert "LoRA" not in apply(with_lora, adapter, prompt)[1]
    portrait = world.load("portrait_sd15", folder)
    assert "LoRA" not in apply(model, portrait, world.encode(portrait))[1]


def test_a_lora_for_another_model_is_refused_and_a_part_is_reported(
    world: World, folder: Path
) -> None:
    face_lora = world.host.library("ip_adapter.host.face_lora")
    lora = face_lora.inside(world.load("faceid_sd15", folder))
    foreign = {f"lora_unet_other_{key}": value for key, value in lora.items()}
    with pytest.raises(Exception, match="none of its 128 modules is there"):
        face_lora.apply(world.model("SD 1.5"), foreign, 1.0, "The LoRA")
    extra = {"lora_unet_nowhere.lora_down.weight": torch.zeros(1, 1)}
    _, report = face_lora.apply(world.model("SD 1.5"), lora | extra, 1.0, "The LoRA")
    assert "128 of 129 modules" in report and "not matched: lora_unet_nowhere" in report


def test_files_without_a_lora_say_where_it_is_had(world: World, folder: Path) -> None:
    face_lora = world.host.library("ip_adapter.host.face_lora")
    with pytest.raises(Exception, match=r"holds no LoRA.*models/loras"):
        face_lora.inside(world.load("portrait_sd15", folder))
    with pytest.raises(Exception, match="is no LoRA: its tensors are image_proj"):
        face_lora.companion(folder / ROWS["portrait_sd15"].file)


@pytest.mark.parametrize("adapter", ["sd15", "sd2", "sdxl_vit-h", "kolors_plus"])
@pytest.mark.parametrize("family", STATES)
def test_another_familys_model_is_refused(
    world: World, adapter: str, family: str, folder: Path
) -> None:
    """SDXL and Kolors have equal layers, and are told apart all the same."""
    made_for = ROWS[adapter].family
    loaded = world.load(adapter, folder)
    apply = world.host.library("ip_adapter.host.patching").apply
    prompt = world.encode(loaded)
    if family == made_for:
        apply(world.model(family), loaded, prompt)
        return
    with pytest.raises(Exception, match=f"for {made_for} .* model is {family} ") as caught:
        apply(world.model(family), loaded, prompt)
    assert type(caught.value).__name__ == "IncompatibleModelError"


def test_the_structure_weight_counts_for_v2_only(world: World, folder: Path) -> None:
    second = world.load("faceid-plusv2_sd15", folder)
    full, half, none = (world.encode(second, structure=s).conditional for s in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half - none, (full - none) / 2, rtol=1e-3, atol=1e-4)
    assert relative_error(full, none) > 1e-2
    first = world.load("faceid-plusv2_sd15", folder, "faceid-plus")
    assert first.spec.evidence == "user"
    plain = world.encode(first, structure=0.5).conditional
    assert torch.equal(plain, world.encode(first, structure=1.0).conditional)
    torch.testing.assert_close(plain, full - none, rtol=1e-3, atol=1e-3)


def test_several_faces_make_one_prompt(world: World, folder: Path) -> None:
    adapter = world.load("portrait_sd15", folder)
    faces = world.host.library("ip_adapter.faces")
    encode = world.host.library("ip_adapter.host.encoding").encode_faces
    vectors = draw(3, 512)
    together = encode(adapter, faces.from_tensor(vectors), None, 1.0)
    assert together.tokens == 3 * 16
    alone = [encode(adapter, faces.from_tensor(v), None, 1.0).conditional for v in vectors]
    torch.testing.assert_close(together.conditional, torch.cat(alone, dim=1))


def test_the_length_of_a_face_vector_counts_only_where_it_was_trained(
    world: World, folder: Path
) -> None:
    faces = world.host.library("ip_adapter.faces")
    encode = world.host.library("ip_adapter.host.encoding").encode_faces
    vector = 20 * draw(512)
    for row, same in (("portrait_sd15", True), ("instantid", False)):
        adapter = world.load(row, folder)
        a, b = (
            encode(adapter, faces.from_tensor(v), None, 1.0).conditional
            for v in (vector, vector / 2)
        )
        assert torch.allclose(a, b, atol=1e-5) == same


def test_a_normed_vector_for_a_raw_adapter_is_noticed(
    world: World, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faces = world.host.library("ip_adapter.faces")
    encode = world.host.library("ip_adapter.host.encoding").encode_faces
    adapter = world.load("instantid", folder)
    encode(adapter, faces.from_tensor(20 * draw(512)), None, 1.0)
    assert "length 1" not in caplog.text
    vector = draw(512)
    encode(adapter, faces.from_tensor(vector / vector.norm()), None, 1.0)
    assert "length 1" in caplog.text


@pytest.mark.parametrize(
    ("row", "pack"), [("instantid", "antelopev2"), ("portrait_sd15", "buffalo_l")]
)
def test_a_face_read_with_another_model_is_noticed(
    world: World, folder: Path, caplog: pytest.LogCaptureFixture, row: str, pack: str
) -> None:
    faces = world.host.library("ip_adapter.faces")
    encode = world.host.library("ip_adapter.host.encoding").encode_faces
    adapter = world.load(row, folder)
    for label in ("antelopev2", "buffalo_l", "from a tensor", "my own model"):
        caplog.clear()
        encode(adapter, faces.Faces(20 * draw(1, 512), (), None, label), None, 1.0)
        expected = label in ("antelopev2", "buffalo_l") and label != pack
        assert (f"trained with the face model {pack}" in caplog.text) == expected


def test_what_is_missing_is_asked_for(world: World, folder: Path) -> None:
    encoding = world.host.library("ip_adapter.host.encoding")
    faces = world.host.library("ip_adapter.faces")
    face, picture = faces.from_tensor(draw(512)), torch.rand(1, 32, 32, 3)
    vision = world.encoder("OpenCLIP ViT-H/14")
    v2 = world.load("faceid-plusv2_sd15", folder)
    with pytest.raises(Exception, match=r"clip_vision is not connected. Connect OpenCLIP ViT-H/14"):
        encoding.encode_faces(v2, face, None, 1.0)
    with pytest.raises(Exception, match=r"picture|crop"):
        encoding.encode_faces(v2, face, vision, 1.0)
    with pytest.raises(Exception, match=r"reads faces. Use Encode Face Prompt"):
        encoding.encode(v2, vision, picture, "crop")
    base = world.load("sd15", folder)
    with pytest.raises(Exception, match="reads pictures, not face vectors"):
        encoding.encode_faces(base, face, vision, 1.0)
    with pytest.raises(Exception, match="reads no instruction"):
        encoding.encode_instructed(base, vision, world.clip(), picture, "crop", "a", "b")
    instruct = world.load("instruct_sd15", folder)
    with pytest.raises(Exception, match="Use Encode Instructed Prompt"):
        encoding.encode(instruct, vision, picture, "crop")
    with pytest.raises(Exception, match="without CLIP-L"):
        encoding.encode_instructed(instruct, vision, object(), picture, "crop", "a", "b")


def test_kolors_wants_its_own_encoder(world: World, folder: Path) -> None:
    """ViT-L/14 has the widths of ViT-L/14-336; only the size of its pictures tells."""
    adapter = world.load("kolors_plus", folder)
    import comfy.clip_vision

    config = Path(comfy.clip_vision.__file__).with_name("clip_vision_config_vitl.json")
    with torch.device("meta"):
        tower = comfy.clip_vision.ClipVisionModel(str(config))
    encoding = world.host.library("ip_adapter.host.encoding")
    with pytest.raises(Exception, match=r"needed is CLIP ViT-L/14-336 .* is CLIP ViT-L/14 "):
        encoding.encode(adapter, tower, torch.rand(1, 32, 32, 3), "crop")


def test_the_instruction_reads_clip_ls_last_layer(world: World) -> None:
    """As transformers gives it; the user's CLIP object and its chosen layer stay as they are."""
    clip = world.clip()
    text = world.host.library("ip_adapter.host.text")
    found = text.last_hidden_states(clip, "use the style of the image")
    plain = clip.encode_from_tokens(clip.tokenize("use the style of the image"))
    assert found.shape == (1, 77, 768) and torch.equal(found, plain.float())
    skipped = clip.clone()
    skipped.clip_layer(-2)
    assert not torch.equal(skipped.encode_from_tokens(skipped.tokenize("x")), plain)
    again = text.last_hidden_states(skipped, "use the style of the image")
    assert torch.equal(again, found)
    instructed = world.host.library("ip_adapter.host.text").last_hidden_states(clip, "another")
    assert not torch.equal(instructed, found)


def test_both_texts_of_an_instruction_count(world: World, folder: Path) -> None:
    adapter = world.load("instruct_sd15", folder)
    texts = [("use the style", "a cat"), ("use the face", "a cat"), ("use the style", "a dog")]
    prompts = [world.encode(adapter, texts=pair) for pair in texts]
    for other in prompts[1:]:
        assert relative_error(other.conditional, prompts[0].conditional) > 1e-4
        assert torch.equal(other.unconditional, prompts[0].unconditional)


def test_an_encoder_may_see_larger_pictures(world: World, folder: Path) -> None:
    """For fine-tunes such as NoobAI's at 448 pixels; positions are interpolated."""
    adapter = world.load("plus_sd15", folder)
    encoding = world.host.library("ip_adapter.host.encoding")
    vision = world.encoder("OpenCLIP ViT-H/14")
    picture = torch.rand(1, 448, 448, 3, generator=torch.Generator().manual_seed(0))
    own = encoding.encode(adapter, vision, picture, "crop")
    explicit = encoding.encode(adapter, vision, picture, "crop", 224)
    large = encoding.encode(adapter, vision, picture, "crop", 448)
    assert torch.equal(own.conditional, explicit.conditional)
    assert relative_error(large.conditional, own.conditional) > 1e-3
    assert relative_error(large.unconditional, own.unconditional) > 1e-5
    with pytest.raises(Exception, match="450"):
        encoding.encode(adapter, vision, picture, "crop", 450)
