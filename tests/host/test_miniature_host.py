"""The miniature on the host: its standard loaders, against open_clip, diffusers and formulas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from miniature import assemble, clip, words
from tests.host.conftest import draw
from tests.miniature_parts import (
    CAPTIONS,
    held_out,
    lookup,
    random_clip,
    states,
    unet_latents,
    weights,
)
from tests.synthetic import layouts, models
from tests.tolerance import assert_close

pytestmark = pytest.mark.host


@dataclass(frozen=True)
class Files:
    """Files of the family with random weights, and what is in them."""

    checkpoint: Path
    fine_tune: Path
    controlnet: Path
    clip: Path
    model: Any
    unet: dict[str, Tensor]
    control: dict[str, Tensor]


def randomised(module: Any, name: str) -> dict[str, Tensor]:
    """Random tensors for a module, which half precision holds, in float32."""
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    return {key: tensor.float() for key, tensor in models.fill(shapes, name).items()}


@pytest.fixture(scope="module")
def files(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Files:
    from comfy.taesd.taesd import TAESD

    from miniature import networks

    folder = tmp_path_factory.mktemp("miniature")
    new = networks.unet()
    unet, other = (randomised(new, name) for name in ("miniature", "miniature outlined"))
    control = randomised(networks.controlnet(new.state_dict()), "miniature control")
    model = random_clip()
    checkpoint = folder / "miniature.safetensors"
    assemble.checkpoint(unet, weights(model), randomised(TAESD(), "tiny"), checkpoint)
    fine_tune, controlnet = folder / "outlined.safetensors", folder / "shape.safetensors"
    assemble.write(other, fine_tune)
    assemble.write(control, controlnet)
    clip.save(weights(model), folder / "clip")
    encoder = folder / "clip" / "open_clip_model.safetensors"
    return Files(checkpoint, fine_tune, controlnet, encoder, model, unet, control)


@pytest.fixture(scope="module")
def loaded(registered: Any, files: Files) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE by the loader behind Load Checkpoint."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(files.checkpoint))[:3]


# Words and texts


@pytest.mark.parametrize("caption", CAPTIONS)
def test_the_host_reads_the_same_tokens(registered: Any, caption: str) -> None:
    ((row,),) = [registered.Tokenizer().tokenize_with_weights(caption)["l"]]
    assert [token for token, _ in row] == lookup(caption)
    assert {weight for _, weight in row} == {1.0}


def test_the_host_s_brackets_weigh_words(registered: Any) -> None:
    tokenizer = registered.Tokenizer()
    (row,) = tokenizer.tokenize_with_weights("striped (red:1.3) ((circle)) on sand")["l"]
    assert [token for token, _ in row] == lookup("striped red circle on sand")
    found = [weight for _, weight in row]
    assert found[1:6] == pytest.approx([1.0, 1.3, 1.1 * 1.1, 1.0, 1.0])
    assert {found[0], *found[6:]} == {1.0}


def test_text_states_are_open_clip_s(loaded: Any, files: Files) -> None:
    expected = states(files.model, CAPTIONS)
    for caption, wanted in zip(CAPTIONS, expected, strict=True):
        found, pooled = loaded[1].encode_from_tokens(
            loaded[1].tokenize(caption), return_pooled=True
        )
        assert_close(found[0], wanted, relative=1e-4)
        assert_close(pooled[0], wanted[lookup(caption).index(words.WORDS.index("<end>"))], 1e-4)


def test_weights_of_words_move_states_away_from_the_empty_text(loaded: Any, files: Files) -> None:
    plain, empty = states(files.model, ["striped red circle", ""])
    found = loaded[1].encode_from_tokens(loaded[1].tokenize("striped (red:1.3) circle"))[0]
    wanted = plain.clone()
    wanted[2] = empty[2] + 1.3 * (plain[2] - empty[2])
    assert_close(found, wanted, relative=1e-4)


# The image encoder


def test_image_embeddings_are_open_clip_s(registered: Any, files: Files) -> None:
    import comfy.clip_vision

    vision = comfy.clip_vision.load(str(files.clip))
    pictures = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(2))
    pictures = pictures / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = files.model.encode_image((pictures - mean) / deviation)
    found = vision.encode_image(pictures.movedim(1, -1))
    assert_close(found["image_embeds"], expected, relative=1e-4)
    assert found["penultimate_hidden_states"].shape == (3, 1 + 8 * 8, 128)


def test_other_image_encoders_are_loaded_as_before(
    registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.clip_vision

    original = comfy.clip_vision.load_clipvision_from_sd.__wrapped__
    asked: list[Any] = []

    def spy(sd: Any, prefix: str = "", convert_keys: bool = False) -> Any:
        asked.append(({key: tuple(tensor.shape) for key, tensor in sd.items()}, convert_keys))
        return "theirs"

    monkeypatch.setattr(comfy.clip_vision, "load_clipvision_from_sd", spy)
    registered.register()
    load = comfy.clip_vision.load_clipvision_from_sd
    registered.register()
    assert comfy.clip_vision.load_clipvision_from_sd is load is not spy
    layout = layouts.clip_vision_h()
    for depth, width in ((32, 1280), (4, 256), (5, 128)):
        layout = layouts.clip_vision_h(depth=depth, width=width)
        sd = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
        assert load(dict(sd)) == "theirs"
        assert asked.pop() == (layout, False)
    assert original({"weight": torch.zeros(1)}) is None
    monkeypatch.setattr(comfy.clip_vision, "load_clipvision_from_sd", original)
    registered.register()
    assert comfy.clip_vision.load_clipvision_from_sd({"weight": torch.zeros(1)}) is None


def test_an_encoder_inside_a_checkpoint_s_names_is_converted_by_the_host(
    registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What OpenCLIP names reach the host's loader as the host's own conversion gives them."""
    import comfy.clip_vision

    asked: list[Any] = []
    monkeypatch.setattr(
        comfy.clip_vision,
        "load_clipvision_from_sd",
        lambda sd, prefix="", convert_keys=False: asked.append((sd, convert_keys)),
    )
    registered.register()
    tensors = {f"visual.{key}": draw(*tensor.shape) for key, tensor in _small_tower().items()}
    comfy.clip_vision.load_clipvision_from_sd(dict(tensors), "visual.", True)
    ((found, converting),) = asked
    expected = comfy.clip_vision.convert_to_transformers(dict(tensors), "visual.")
    assert not converting and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def _small_tower() -> dict[str, Tensor]:
    import open_clip

    config = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = clip.configuration()["text_cfg"]
    return dict(open_clip.CLIP(embed_dim=64, vision_cfg=config, text_cfg=text).visual.state_dict())


# The VAE


def test_a_trained_vae_gives_the_unet_latents_of_deviation_one(host: Any) -> None:
    """By its scale alone, which is measured at the end: these three steps train next to nothing."""
    import comfy.sd

    from miniature import vae

    with torch.inference_mode(False):
        tensors = vae.train(3)
    assert "vae_scale" in tensors and tensors["vae_scale"].ndim == 0
    assert 0.9 < float(unet_latents(comfy.sd.VAE(sd=tensors), held_out()).std()) < 1.1


def test_a_refined_vae_keeps_its_latents_and_paints_otherwise(host: Any) -> None:
    from comfy.taesd.taesd import TAESD

    from miniature import vae

    before = randomised(TAESD(), "tiny") | {"vae_scale": torch.tensor(0.37)}
    with torch.inference_mode(False):
        after = vae.refine({name: tensor.clone() for name, tensor in before.items()}, 2)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("taesd_decoder.") for name in changed)


# The networks


def test_a_new_unet_predicts_nothing(registered: Any) -> None:
    from miniature import networks

    made = networks.unet()(draw(2, 4, 8, 8), torch.tensor([10.0, 900.0]), context=draw(2, 77, 128))
    assert made.shape == (2, 4, 8, 8) and not made.any()


def test_a_new_unet_is_whole_and_seeded(registered: Any) -> None:
    from miniature import networks

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one = networks.unet().state_dict()
        torch.manual_seed(0)
        two = networks.unet().state_dict()
    assert all(torch.equal(one[name], two[name]) and one[name].isfinite().all() for name in one)
    weight = one["input_blocks.1.0.in_layers.2.weight"]
    # torch's own: uniform in +- fan_in ** -0.5, whose deviation is that over the root of 3.
    assert float(weight.std()) == pytest.approx((64 * 9) ** -0.5 / 3**0.5, rel=0.03)


def test_a_controlnet_begins_as_a_copy_that_changes_nothing(registered: Any, files: Files) -> None:
    from miniature import networks

    control = networks.controlnet(files.unet)
    own = control.state_dict()
    half = [name for name in files.unet if name.split(".")[0] in COPIED]
    assert len(half) > 100 and all(torch.equal(own[name], files.unet[name]) for name in half)
    unet = networks.unet(files.unet)
    noised, moments, text = draw(2, 4, 8, 8), torch.tensor([10.0, 900.0]), draw(2, 77, 128)
    found = control(noised, draw(2, 3, 64, 64), moments, text)
    plain = unet(noised, moments, context=text)
    assert plain.std() > 0.01
    assert torch.equal(unet(noised, moments, context=text, control=found), plain)


COPIED = ("input_blocks", "middle_block", "time_embed")
"""Of a UNet, what stands before its second half."""


def test_the_loaded_unet_is_what_diffusers_makes_of_the_same_tensors(
    loaded: Any, files: Files
) -> None:
    import comfy.utils
    from diffusers import UNet2DConditionModel

    reference = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,  # of old this means the number of heads
    ).eval()
    config = {"num_res_blocks": [1, 1], "channel_mult": (1, 1), "transformer_depth": [1, 1]}
    config |= {"transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1}
    names = comfy.utils.unet_to_diffusers(config)
    tensors = {theirs: files.unet[ours] for theirs, ours in names.items() if ours in files.unet}
    assert len(set(tensors)) == len(files.unet)
    reference.load_state_dict(tensors)
    noised, moments, text = draw(2, 4, 8, 8), torch.tensor([10.0, 900.0]), draw(2, 77, 128)
    expected = reference(noised, moments, text).sample
    unet = loaded[0].model.diffusion_model.float()
    assert_close(unet(noised, moments, context=text), expected, relative=1e-4)


# What the host takes the files for


def test_the_standard_loaders_know_every_file(registered: Any, loaded: Any, files: Files) -> None:
    import comfy.controlnet
    import comfy.sd

    model, text, vae = loaded
    assert type(model.model.model_config).__name__ == "Miniature"
    assert model.model.model_type.name == "EPS"
    assert type(text.cond_stage_model).__name__ == "Clip"
    assert type(vae.first_stage_model).__name__ == "TAESD"
    other = comfy.sd.load_diffusion_model(str(files.fine_tune))
    assert type(other.model.model_config).__name__ == "Miniature"
    written = load_file(files.fine_tune)
    read = other.model.diffusion_model.state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key].half(), written[key].half()) for key in written)


def test_the_loaded_controlnet_computes_as_the_trained_one(registered: Any, files: Files) -> None:
    import comfy.controlnet

    from miniature import networks

    loaded = comfy.controlnet.load_controlnet(str(files.controlnet))
    assert type(loaded) is comfy.controlnet.ControlNet
    trained = networks.controlnet(files.unet)
    trained.load_state_dict(files.control)
    given = (draw(1, 4, 8, 8), draw(1, 3, 64, 64), torch.tensor([500.0]), draw(1, 77, 128))
    found, expected = loaded.control_model.float()(*given), trained(*given)
    assert found.keys() == expected.keys() and len(expected["output"]) == 4
    for place in expected:
        for one, other in zip(found[place], expected[place], strict=True):
            assert_close(one, other, relative=1e-4)


def test_a_checkpoint_has_the_names_of_stable_diffusion_and_half_its_bytes(
    tmp_path: Path, files: Files
) -> None:
    text = weights(files.model)
    unet, scale = {"out.2.weight": torch.rand(4, 2, 3, 3)}, torch.tensor(0.1234567)
    vae = {"taesd_decoder.1.weight": torch.rand(64, 4, 3, 3).half().float(), "vae_scale": scale}
    path = tmp_path / "new" / "model.safetensors"
    assemble.checkpoint(unet, text, vae, path)
    found = load_file(path)
    assert found["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert found["first_stage_model.vae_scale"].dtype == torch.float32
    positions = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    assert torch.equal(found[positions].float(), text["positional_embedding"])
    assert torch.equal(assemble.unet(path)["out.2.weight"], unet["out.2.weight"].half().float())
    read = assemble.vae(path)
    assert read.keys() == vae.keys() and all(torch.equal(read[name], vae[name]) for name in vae)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_models_are_detected_as_before(
    registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_detection as detection
    import comfy.supported_models as supported

    others = [known for known in supported.models if known.__name__ != "Miniature"]
    monkeypatch.setattr(supported, "models", list(others))
    files = [meta(width) for width in (320, 32)]

    def detected() -> list[str]:
        """The first that matches, of the host's own settings for each and of two whole files."""
        tables = [
            next(known.__name__ for known in supported.models if known.matches(other.unet_config))
            for other in others
        ]
        return tables + [
            type(detection.model_config_from_unet(file, "")).__name__ for file in files
        ]

    before = detected()
    assert before[-2:] == ["SD15", "NanoSD15"]
    ours = dict(registered.Miniature.unet_config)
    assert detection.model_config_from_unet_config(ours) is None
    for _ in range(2):  # the second time changes nothing
        registered.register()
        assert [known.__name__ for known in supported.models].count("Miniature") == 1
    assert detected() == before
    found = detection.model_config_from_unet_config(ours)
    assert type(found).__name__ == "Miniature"


def meta(width: int) -> dict[str, Tensor]:
    """An SD 1.5 UNet of a width, without numbers."""
    layout = layouts.unet(width)
    return {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
