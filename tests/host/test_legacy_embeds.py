"""The old nodes for EMBEDS, as workflows and the Krita plug-in chain them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from tests.host.conftest import Sampler, draw, project
from tests.host.test_encoding import SIZE, clip_vision, pictures
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

NODES = (
    *("IPAdapterEncoder", "IPAdapterCombineEmbeds", "IPAdapterSaveEmbeds"),
    *("IPAdapterLoadEmbeds", "IPAdapterEmbeds", "IPAdapterEmbedsBatch"),
)
PLAIN = {"weight_type": "linear", "start_at": 0.0, "end_at": 1.0, "embeds_scaling": "V only"}


@pytest.fixture(scope="module")
def visions(host: Any) -> dict[str, Any]:
    """Towers of the published widths, tiny otherwise."""
    with torch.inference_mode():
        return {
            "base": clip_vision(projection_dim=1024),
            "plus": clip_vision(hidden_size=1280, num_attention_heads=4, num_hidden_layers=2),
        }


@pytest.fixture(params=["base", "plus"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapter(kind: str, base_adapter: Any, plus_adapter: Any) -> Any:
    return base_adapter if kind == "base" else plus_adapter


@pytest.fixture
def vision(kind: str, visions: dict[str, Any]) -> Any:
    return visions[kind]


@pytest.fixture
def folders(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    import folder_paths

    found = {}
    for name in ("input", "output"):
        found[name] = tmp_path / name
        found[name].mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(found[name]))
    return found


def seen(kind: str, vision: Any, image: Tensor) -> Tensor:
    """The host's own encoding."""
    out = vision.encode_image(image)
    return out.image_embeds if kind == "base" else out.penultimate_hidden_states


def put(host: Any, model: Any, adapter: Any, features: tuple[Tensor, Tensor], **how: Any) -> Any:
    """A model with the tokens of these features, without any of the nodes."""
    positive, negative = (project(host, adapter, image=one) for one in features)
    frames = how.pop("frames", 1)
    prompt = host.library("ip_adapter.prompt").from_tokens(
        positive, negative, adapter.fingerprint, adapter.label, frames
    )
    influence = host.library("ip_adapter.influence").Influence(**how)
    return host.library("ip_adapter.host.patching").apply(
        model, adapter, prompt, influence=influence
    )[0]


# encoder


def test_encoder_gives_the_picture_and_the_old_negative(
    host: Any, kind: str, adapter: Any, vision: Any
) -> None:
    """Zeros for pooled features, one for each picture; one black picture for hidden ones."""
    image = pictures(2)
    positive, negative = (
        host.node("IPAdapterEncoder").execute(adapter, image, 0.7, clip_vision=vision).args
    )
    assert_close(positive, 0.7 * seen(kind, vision, image))
    if kind == "base":
        assert torch.equal(negative, torch.zeros(2, 1024))
    else:
        assert_close(negative, seen(kind, vision, torch.zeros(1, SIZE, SIZE, 3)))
        assert len(negative) == 1


def test_encoder_multiplies_normalised_pixels_by_the_mask(
    host: Any, kind: str, adapter: Any, vision: Any
) -> None:
    import comfy.clip_model

    image, mask = pictures(1, 40, 50), torch.zeros(1, SIZE, SIZE)
    mask[:, 5:20, 3:17] = 0.6
    found = (
        host.node("IPAdapterEncoder")
        .execute(adapter, image, 1.0, mask=mask, clip_vision=vision)
        .args[0]
    )
    pixels = comfy.clip_model.clip_preprocess(image, size=SIZE) * mask
    _, hidden, pooled, *_ = vision.model(pixel_values=pixels, intermediate_output=-2)
    assert_close(found, pooled if kind == "base" else hidden)


@pytest.mark.parametrize(("masks", "message"), [(1, "0 everywhere"), (3, "3 masks for 1 picture")])
def test_a_mask_of_no_use_is_a_warning(
    host: Any,
    kind: str,
    adapter: Any,
    vision: Any,
    caplog: pytest.LogCaptureFixture,
    masks: int,
    message: str,
) -> None:
    """Load Image gives an empty one for an opaque picture: the old pack saw the mean colour."""
    mask = torch.zeros(masks, 64, 64)
    mask[1:] = 1
    found = (
        host.node("IPAdapterEncoder")
        .execute(adapter, pictures(1), 1.0, mask=mask, clip_vision=vision)
        .args[0]
    )
    assert message in caplog.text
    zeros = torch.zeros(1, 3, SIZE, SIZE)
    _, hidden, pooled, *_ = vision.model(pixel_values=zeros, intermediate_output=-2)
    assert_close(found, pooled if kind == "base" else hidden)


def test_encoder_comes_with_the_adapter(host: Any, adapter: Any, vision: Any) -> None:
    node = host.node("IPAdapterEncoder")
    with pytest.raises(Exception, match="clip_vision is not connected"):
        node.execute(adapter, pictures(1), 1.0)
    loaded = dataclasses.replace(adapter, clip_vision=vision)
    found = node.execute(loaded, pictures(1), 1.0).args
    wanted = node.execute(adapter, pictures(1), 1.0, clip_vision=vision).args
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# combine


@pytest.mark.parametrize("shape", [(2, 1024), (2, 5, 1280)])
def test_combine_modes(host: Any, shape: tuple[int, ...]) -> None:
    first, second, third = (draw(*shape, seed=seed) for seed in range(3))
    rows = [*first, *second, *third]
    others = sum(rows[1:]) / 5
    length = sum(row**2 for row in rows) ** 0.5
    expected = {
        "concat": torch.stack(rows),
        "add": sum(rows)[None],
        "subtract": (rows[0] - others)[None],
        "average": (sum(rows) / 6)[None],
        "norm average": (sum(row / length for row in rows) / 6)[None],
        "max": torch.stack(rows).sort(dim=0).values[-1:],
        "min": torch.stack(rows).sort(dim=0).values[:1],
    }
    node = host.node("IPAdapterCombineEmbeds")
    for how, wanted in expected.items():
        found = node.execute(first, how, embed3=second, embed5=third).args[0]
        assert_close(found, wanted)
    assert torch.equal(node.execute(first, "concat").args[0], first)
    assert_close(node.execute(first, "add").args[0], (first[0] + first[1])[None])
    assert torch.equal(node.execute(first[:1], "subtract").args[0], first[:1])  # was not a number


def test_embeds_of_two_encoders_are_not_combined(host: Any) -> None:
    with pytest.raises(Exception, match=r"\[1, 1024\], pooled features of OpenCLIP ViT-H"):
        host.node("IPAdapterCombineEmbeds").execute(draw(1, 1024), "add", draw(1, 1280))


# files


def test_files_go_round(host: Any, folders: dict[str, Path]) -> None:
    save, load = (host.node(f"IPAdapter{name}Embeds") for name in ("Save", "Load"))
    given = draw(3, 257, 64)
    first = save.execute(given, "IP_embeds")
    save.execute(given[:1], "IP_embeds")
    names = ["IP_embeds_00001.ipadpt", "IP_embeds_00002.ipadpt"]
    assert sorted(path.name for path in folders["output"].iterdir()) == names
    assert first.ui == {"text": names[:1]}
    assert torch.equal(torch.load(folders["output"] / names[0], weights_only=True), given)
    for name in names:
        os.replace(folders["output"] / name, folders["input"] / name)
    described = load.define_schema().get_v1_info(load).input
    assert described["required"]["embeds"][0] == names
    assert load.validate_inputs(names[0]) is True
    assert torch.equal(load.execute(names[0]).args[0], given)
    assert torch.equal(load.execute(names[1]).args[0], given[:1])
    assert "no.ipadpt" in str(load.validate_inputs("no.ipadpt"))


def test_a_file_that_changed_is_read_again(host: Any, folders: dict[str, Path]) -> None:
    load = host.node("IPAdapterLoadEmbeds")
    path = folders["input"] / "a.ipadpt"
    torch.save(draw(1, 1024), path)
    before = load.fingerprint_inputs("a.ipadpt")
    assert load.fingerprint_inputs("a.ipadpt") == before
    torch.save(draw(2, 1024), path)
    assert load.fingerprint_inputs("a.ipadpt") != before


def test_code_in_a_file_is_not_run(host: Any, folders: dict[str, Path]) -> None:
    """Written by another process, so that nothing here knows the class."""
    path, marker = folders["input"] / "evil.ipadpt", folders["output"] / "was run"
    script = (
        "import os, sys, torch\n"
        "class Evil:\n"
        "    def __reduce__(self): return os.system, ('touch ' + repr(sys.argv[2]),)\n"
        "torch.save(Evil(), sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path), str(marker)], check=True)
    with pytest.raises(Exception, match="could run code") as caught:
        host.node("IPAdapterLoadEmbeds").execute("evil.ipadpt")
    assert type(caught.value).__name__ == "CheckpointError"
    assert not marker.exists()


# apply


def test_encoder_and_embeds_are_the_direct_call(
    host: Any, kind: str, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    """What the old nodes for pictures call, bit for bit."""
    calls = host.library("ip_adapter.legacy.calls")
    reading = host.library("ip_adapter.host.reading")
    image = pictures(2)
    positive, negative = (
        host.node("IPAdapterEncoder").execute(adapter, image, 1.0, clip_vision=vision).args
    )
    prompt = calls.encode(adapter, vision, reading.read(adapter, vision, image, "crop"))
    direct = calls.apply(model, adapter, prompt, calls.Strength(weight=0.8))
    node = host.node("IPAdapterEmbeds")
    wanted = sample(direct)
    for extra in ({"neg_embed": negative}, {"clip_vision": vision}):
        made = node.execute(model, adapter, positive, 0.8, *PLAIN.values(), **extra).args[0]
        assert torch.equal(sample(made), wanted)
    assert relative_error(sample(model), wanted) > 1e-3


def test_plug_ins_chain(
    host: Any, kind: str, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    """Two encoders, both sides combined, applied; against features of the host's own tower."""
    encoder, combine, apply = (
        host.node(f"IPAdapter{name}") for name in ("Encoder", "CombineEmbeds", "Embeds")
    )
    shown = [pictures(1, 40, 50), 1 - pictures(1, 28, 31)]
    sides = [
        encoder.execute(adapter, image, weight, clip_vision=vision).args
        for image, weight in zip(shown, (0.8, 0.5), strict=True)
    ]
    positive, negative = (
        combine.execute(first, "concat", embed2=second).args[0]
        for first, second in zip(*sides, strict=True)
    )
    kinds = {"weight_type": "ease out", "start_at": 0.1, "end_at": 0.9, "embeds_scaling": "K+V"}
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    made = apply.execute(
        model, adapter, positive, 0.9, **kinds, neg_embed=negative, attn_mask=mask
    ).args[0]
    features = torch.cat([0.8 * seen(kind, vision, shown[0]), 0.5 * seen(kind, vision, shown[1])])
    if kind == "base":
        nothing = torch.zeros(1, 1024)
    else:
        nothing = seen(kind, vision, torch.zeros(1, SIZE, SIZE, 3))
    expected = put(
        host,
        model,
        adapter,
        (features, nothing),
        weight=0.9,
        layers="ease out",
        start=0.1,
        end=0.9,
        scaling="K+V",
        mask=mask,
    )
    wanted = sample(expected, steps=4)
    assert_close(sample(made, steps=4), wanted, relative=1e-6)
    assert relative_error(sample(model, steps=4), wanted) > 1e-3


def test_a_row_for_each_frame(host: Any, model: Any, base_adapter: Any, sample: Sampler) -> None:
    given = draw(2, 1024)
    noise = draw(2, 4, 8, 8)
    node, single = host.node("IPAdapterEmbedsBatch"), host.node("IPAdapterEmbeds")
    framed = node.execute(model, base_adapter, given, [0.9, 0.4], *PLAIN.values()).args[0]
    whole = sample(framed, noise=noise)
    for i, weight in enumerate((0.9, 0.4)):
        alone = put(
            host, model, base_adapter, (given[i : i + 1], torch.zeros(1, 1024)), weight=weight
        )
        assert_close(whole[i : i + 1], sample(alone, noise=noise[i : i + 1]), relative=1e-4)
    together = single.execute(model, base_adapter, given, [0.9, 0.4], *PLAIN.values()).args[0]
    both = put(host, model, base_adapter, (given, torch.zeros(1, 1024)), weight=0.9)
    assert_close(sample(together, noise=noise), sample(both, noise=noise), relative=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_negatives_are_cut_or_repeated_to_the_number_of_pictures(
    host: Any, model: Any, base_adapter: Any, sample: Sampler, count: int
) -> None:
    given, negative = draw(2, 1024), draw(count, 1024, seed=1)
    made = (
        host.node("IPAdapterEmbeds")
        .execute(model, base_adapter, given, 1.0, *PLAIN.values(), neg_embed=negative)
        .args[0]
    )
    rows = torch.stack([negative[0], negative[min(1, count - 1)]])
    expected = put(host, model, base_adapter, (given, rows))
    assert_close(sample(made), sample(expected), relative=1e-5)


def test_what_is_missing_or_wrong_is_named(
    host: Any, kind: str, model: Any, adapter: Any, vision: Any
) -> None:
    node = host.node("IPAdapterEmbeds")
    wrong = draw(1, 257, 1280) if kind == "base" else draw(1, 1024)
    with pytest.raises(Exception, match="features of OpenCLIP ViT-H/14") as caught:
        node.execute(model, adapter, wrong, 1.0, *PLAIN.values(), clip_vision=vision)
    assert type(caught.value).__name__ == "IncompatibleModelError"
    assert str(list(wrong.shape)) in str(caught.value)
    if kind == "plus":
        right = draw(1, 257, 1280)
        with pytest.raises(Exception, match="neither negative embeds nor clip_vision"):
            node.execute(model, adapter, right, 1.0, *PLAIN.values())
        with pytest.raises(Exception, match="The negative embeds have shape"):
            node.execute(model, adapter, right, 1.0, *PLAIN.values(), neg_embed=wrong)


def test_embeds_of_old_and_new_nodes_are_the_same(
    host: Any, kind: str, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    """The type passes both ways; the negative of the new node is the one of training."""
    old = host.node("IPAdapterEncoder").execute(adapter, pictures(1), 1.0, clip_vision=vision).args
    new = host.node("ImagePromptEmbeds").execute(adapter, vision, pictures(1), "crop").args
    assert torch.equal(old[0], new[0])
    prompt = (
        host.node("ImagePromptFromEmbeds")
        .execute(adapter, old[0], "concat", "together", negative=old[1])
        .args[0]
    )
    patched = host.library("ip_adapter.host.patching").apply(model, adapter, prompt)[0]
    made = (
        host.node("IPAdapterEmbeds")
        .execute(model, adapter, new[0], 1.0, *PLAIN.values(), neg_embed=old[1])
        .args[0]
    )
    assert torch.equal(sample(made), sample(patched))


@pytest.mark.parametrize("name", NODES)
def test_interface_is_the_old_one(host: Any, folders: dict[str, Path], name: str) -> None:
    record = json.loads((ROOT / "tests/host/legacy_nodes.json").read_text())[name]
    info = json.loads(json.dumps(host.node(name).GET_NODE_INFO_V1()))
    for inputs in info["input"].values():
        for described in inputs.values():
            if described[1:] == [{}]:
                del described[1]
    for kind in ("required", "optional"):
        assert info["input"].get(kind) == record["input"].get(kind)
        assert info["input_order"].get(kind) == record["input_order"].get(kind)
    for key in ("output", "output_name", "output_is_list", "output_node"):
        assert info[key] == record[key], key
    assert (info["display_name"], info["category"]) == (record["display_name"], record["category"])
