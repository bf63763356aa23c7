"""Training inside the graph: the node on a nano SD 1.5 and a small image encoder."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import MODEL_FILES
from tests.host.conftest import Applier, Sampler
from tests.synthetic.models import ADAPTER_FACE, CHECKPOINT, build_adapters

pytestmark = pytest.mark.host

HIDDEN, POOLED, SIZE = 64, 32, 28
CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "image_size": SIZE,
    "patch_size": 14,
    "num_channels": 3,
    "projection_dim": POOLED,
}


@pytest.fixture(scope="module")
def loaded(host: Any, model_files: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE as the host's loader node gives them, in inference mode."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(model_files / CHECKPOINT))[:3]


@pytest.fixture(scope="module")
def vision(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import comfy.clip_vision

    path = tmp_path_factory.mktemp("vision") / "config.json"
    path.write_text(json.dumps(CONFIG))
    found = comfy.clip_vision.ClipVisionModel(str(path))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture
def folder(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """``models/ipadapter`` and the temporary folder, both of this test alone."""
    import folder_paths

    path = tmp_path / "ipadapter"
    path.mkdir()
    listed = folder_paths.folder_names_and_paths["ipadapter"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ipadapter", ([str(path)], listed))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    yield path


def pictures(count: int = 3, seed: int = 0, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 64, 72, channels, generator=generator)


@pytest.fixture
def execute(host: Any, loaded: Any, vision: Any, folder: Path) -> Any:
    """Run the node; without samples, unless they are asked for."""
    model, clip, vae = loaded

    def run(**changes: Any) -> Any:
        given = {
            "model": model,
            "vae": vae,
            "clip": clip,
            "clip_vision": vision,
            "images": pictures(),
            "captions": "one\ntwo\nthree",
            "projection": "global",
            "steps": 3,
            "learning_rate": 1e-3,
            "seed": 1,
            "filename_prefix": "mine/small",
            "size": 64,
            "sample_every": 0,
            **changes,
        }
        return host.library("ip_adapter.nodes.training").Train.execute(**given)

    return run


@pytest.fixture
def train(execute: Any) -> Any:
    return lambda **changes: execute(**changes).args


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Any]]:
    """What the node's progress bar showed: steps done, of how many, and a picture or None."""
    import comfy.utils

    seen: list[tuple[int, int, Any]] = []

    def hook(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        if total > 1:  # the host's own bar of one caption has one part
            seen.append((value, total, preview))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    return seen


def weights(adapter: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in adapter.module.state_dict().items()}


@pytest.mark.parametrize("projection", ["global", "plus", "full"])
def test_it_trains_writes_and_gives_a_working_adapter(
    train: Any, host: Any, loaded: Any, folder: Path, sample: Sampler, projection: str
) -> None:
    adapter, path, curve = train(projection=projection)
    assert path == str(folder / "mine" / "small_00001.safetensors") and Path(path).is_file()
    assert adapter.spec.projection.layout == projection
    assert adapter.spec.family.name == "SD 1.5"
    assert curve.shape == (1, 320, 640, 3)
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["small_00001.safetensors"]
    patched = Applier(host, adapter)(loaded[0], weight=1.0)
    assert not torch.equal(sample(patched), sample(loaded[0]))


def test_equal_inputs_give_equal_adapters_and_another_seed_another(train: Any) -> None:
    first, again, other = (weights(train(seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image_proj.proj.weight"], other["image_proj.proj.weight"])


def test_what_is_trained_begins_with_the_text_s_keys_and_values(train: Any, loaded: Any) -> None:
    adapter, *_ = train(steps=1, learning_rate=1e-7)
    unet = loaded[0].model.diffusion_model
    text = unet.input_blocks[1][1].transformer_blocks[0].attn2
    ours = adapter.module.ip_adapter["1"]
    for mine, theirs in ((ours.to_k_ip, text.to_k), (ours.to_v_ip, text.to_v)):
        assert torch.allclose(mine.weight.float(), theirs.weight.float(), atol=1e-5)


def test_it_goes_on_with_an_adapter(train: Any) -> None:
    first, *_ = train()
    before = weights(first)
    second, path, _ = train(ip_adapter=first, learning_rate=1e-7, projection="plus", steps=1)
    after = weights(second)
    assert Path(path).name == "small_00002.safetensors"
    assert second.spec.projection.layout == "global"
    assert all(torch.allclose(before[k].float(), after[k].float(), atol=1e-4) for k in before)


def test_references_are_what_is_read(train: Any) -> None:
    own, other, one = (
        weights(train(references=references)[0])
        for references in (pictures(), pictures(seed=5), pictures(1, seed=5))
    )
    without = weights(train()[0])
    assert all(torch.equal(without[key], own[key]) for key in own)
    assert not torch.equal(own["image_proj.proj.weight"], other["image_proj.proj.weight"])
    assert not torch.equal(one["image_proj.proj.weight"], other["image_proj.proj.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"captions": "one\ntwo"}, "3 pictures and 2 lines of captions"),
        ({"references": pictures(2)}, "3 pictures and 2 references"),
        ({"images": torch.zeros(0, 8, 8, 3)}, "is empty"),
        ({"clip_vision": None}, "image encoder is missing"),
        ({"filename_prefix": "../../escape"}, "leads out of"),
        ({"learning_rate": 2.0}, "'learning_rate' is 2.0; needed is"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    train: Any, host: Any, folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(host.library("ip_adapter.errors").IPAdapterError, match=said):
        train(**changes)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_an_adapter_that_reads_faces_is_refused(train: Any, host: Any, model_files: Path) -> None:
    build_adapters(MODEL_FILES)
    face = host.library("ip_adapter.host.adapters").load(model_files / ADAPTER_FACE)
    errors = host.library("ip_adapter.errors")
    with pytest.raises(errors.IncompatibleModelError, match="reads more than a picture"):
        train(ip_adapter=face)


def test_the_stop_button_keeps_what_was_trained(
    train: Any, host: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    import comfy.utils

    seen: list[int] = []

    class Bar:
        def __init__(self, total: int, *_: Any) -> None:
            self.total = total

        def update(self, _: int) -> None:
            pass

        def update_absolute(self, value: int, *_: Any) -> None:
            seen.append(value)
            if value == 2:
                management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    with pytest.raises(management.InterruptProcessingException):
        train(steps=50)
    assert seen == [1, 2]
    (written,) = (path for path in folder.rglob("*") if path.is_file())
    monkeypatch.undo()
    kept = host.library("ip_adapter.checkpoint").read(written)
    assert kept.metadata["steps"] == "2" and kept.spec.projection.layout == "global"


def test_the_stop_button_works_while_pictures_are_encoded(train: Any, folder: Path) -> None:
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        train()
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_the_host_is_as_it_was_and_nothing_is_kept(
    train: Any, host: Any, loaded: Any, sample: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    training = host.library("ip_adapter.host.training")
    kept: list[weakref.ref[Any]] = []
    original = training.TrainableModel.__init__

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        kept.append(weakref.ref(self))

    monkeypatch.setattr(training.TrainableModel, "__init__", spy)
    before = sample(loaded[0])
    state = {key: value.clone() for key, value in loaded[0].model.state_dict().items()}
    options = dict(loaded[0].model_options["transformer_options"])
    threads = threading.active_count()
    train(sample_every=2)
    gc.collect()
    assert len(kept) == 1 and kept[0]() is None
    assert not management.in_training and torch.is_inference_mode_enabled()
    assert threading.active_count() <= threads
    assert loaded[0].model_options["transformer_options"] == options
    after = loaded[0].model.state_dict()
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert not any(parameter.requires_grad for parameter in loaded[0].model.parameters())
    assert torch.equal(sample(loaded[0]), before)


def test_pictures_with_transparency_and_in_grey_are_taken(train: Any) -> None:
    for channels in (1, 4):
        adapter, *_ = train(images=pictures(1, channels=channels), captions="", steps=1)
        assert adapter.spec.projection.tokens == 4


def test_it_is_offered_only_where_torch_has_gradients(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = host.library("ip_adapter.nodes.training")
    assert [nodes.Train] == nodes.NODES and nodes._can_train()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("built without autograd")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    assert not nodes._can_train()


def live(host: Any) -> Any:
    return host.library("ip_adapter.train.live")


def test_it_shows_the_loss_and_samples_while_it_runs(
    execute: Any, host: Any, shown: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    monkeypatch.setattr(live(host), "PERIOD", 0.0)
    monkeypatch.setattr(live(host), "SHARE", 1e9)
    out = execute(steps=5, sample_every=2)
    assert [(value, total) for value, total, _ in shown] == [(step, 5) for step in range(1, 6)]
    kinds, pictures, sides = zip(*(preview for *_, preview in shown), strict=True)
    assert set(kinds) == {"PNG"} and set(sides) == {None}
    curve, *others = (picture.size for picture in pictures)
    assert curve == (640, 320) and set(others) == {(640, others[0][1])} and others[0][1] > 420
    # A new sample is drawn at steps 2, 4 and, for the last step, 5; at 3 the strip is that of 2.
    strips = [picture.crop((0, 320, *others[0])).tobytes() for picture in pictures[1:]]
    assert strips[0] == strips[1] and len(set(strips)) == 3
    (kept,) = out.ui.as_dict()["images"]
    with Image.open(Path(folder_paths.get_temp_directory(), kept["filename"])) as last:
        assert kept["type"] == "temp" and last.tobytes() == pictures[-1].tobytes()


def test_without_samples_there_is_the_curve_alone(execute: Any, shown: list[Any]) -> None:
    execute(steps=3)
    sizes = [preview[1].size for *_, preview in shown if preview is not None]
    assert (shown[0][0], shown[-1][0]) == (1, 3) and set(sizes) == {(640, 320)}


@pytest.mark.parametrize("projection", ["global", "plus"])
def test_what_is_shown_changes_nothing(
    train: Any, host: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch, projection: str
) -> None:
    """Neither the adapter nor torch's random stream, whatever the VAE draws."""
    given = {"projection": projection, "steps": 4}
    without, _, curve = train(**given)
    decode, drawn = loaded[2].decode, list[Tensor]()

    def noisy(latents: Tensor) -> Any:
        drawn.append(torch.randn(3))
        return decode(latents)

    monkeypatch.setattr(loaded[2], "decode", noisy)
    monkeypatch.setattr(live(host), "PERIOD", 0.0)
    monkeypatch.setattr(live(host), "SHARE", 1e9)
    torch.manual_seed(5)
    following = torch.rand(4)
    torch.manual_seed(5)
    with_samples, _, same = train(**given, sample_every=1)
    assert len(drawn) == 4 and torch.equal(torch.rand(4), following)
    before, after = weights(without), weights(with_samples)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(curve, same)


def test_a_sample_is_what_the_host_s_sampler_makes(
    train: Any, host: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Euler's steps over sigmas are DDIM's over time steps; the same noise, text and reference."""
    import comfy.sample
    import comfy.samplers

    held: list[Any] = []
    original = live(host).sampler

    def spy(session: Any) -> Any:
        held.append(session)
        return original(session)

    monkeypatch.setattr(live(host), "sampler", spy)
    train(steps=6, sample_every=1, seed=3)
    (session,) = held
    picture = original(session, steps=5, guidance=3.0)()
    found = torch.from_numpy(np.array(picture)).reshape(-1, 3)

    model, _, vae = loaded
    features = host.library("ip_adapter.projections").Features
    row = session.cache.read([0])
    adapter = host.library("ip_adapter.train.samples").snapshot(session.adapter)
    prompt = host.library("ip_adapter.host.encoding").from_features(
        adapter,
        features(image=row["image"].float()),
        features(image=torch.zeros(1, POOLED)),
    )
    patched, _ = host.library("ip_adapter.host.patching").apply(model, adapter, prompt)
    noise = torch.randn(row["latents"].shape, generator=torch.Generator().manual_seed(3))
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.cat((sampling.sigmas[[999, 799, 599, 399, 199]], torch.zeros(1)))

    def by_host(patched: Any) -> Tensor:
        latents = comfy.sample.sample_custom(
            patched,
            noise,
            3.0,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            [[row["text"].float(), {}]],
            [[session.cache.no_text.float(), {}]],
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        return (vae.decode(latents)[0].clamp(0, 1) * 255).reshape(-1, 3)

    assert float((by_host(patched) - found).abs().max()) < 1  # half a level is rounding
    assert float((by_host(model) - found).abs().max()) > 10  # the adapter is in it


def test_the_stop_button_works_during_a_sample(
    train: Any, host: Any, folder: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    decode = loaded[2].decode

    def stop(latents: Tensor) -> Any:
        management.interrupt_current_processing()
        return decode(latents)

    monkeypatch.setattr(loaded[2], "decode", stop)
    with pytest.raises(management.InterruptProcessingException):
        train(steps=50, sample_every=3)
    (written,) = (path for path in folder.rglob("*") if path.is_file())
    assert host.library("ip_adapter.checkpoint").read(written).metadata["steps"] == "3"


def test_a_sample_that_fails_is_no_reason_to_stop(
    train: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(latents: Tensor) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded[2], "decode", fail)
    adapter, *_ = train(steps=4, sample_every=1)
    assert adapter.spec.projection.tokens == 4
    assert caplog.text.count("no more samples in this training, one failed: out of memory") == 1
