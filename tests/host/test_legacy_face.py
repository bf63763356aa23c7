"""The old face nodes with synthetic face models, on nano models of three families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import MODEL_FILES
from tests.host.conftest import Sampler, draw, project
from tests.host.test_encoding import HIDDEN, SIZE, clip_vision
from tests.synthetic import adapters
from tests.synthetic.catalogue import (
    CONTEXT,
    attention_with_lora,
    face_projection,
    global_projection,
    key_values,
    resampler,
    widths,
)
from tests.synthetic.face_models import Disc, build_pack, picture
from tests.synthetic.models import UNET_KOLORS, UNET_SDXL, build_unets
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

SURE, LARGE = Disc(150.4, 120.7, 26, tilt=15), Disc(420, 300, 38, tilt=-30, strength=0.8)
STATES = {"SD 1.5": 768, "SDXL": 2048, "Kolors": 4096}
POOLED_TEXT = {"SDXL": 1280, "Kolors": 4096}
CROPS = {"SD 1.5": 224, "SDXL": 256, "Kolors": 336}

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def vision(host: Any) -> Any:
    with torch.inference_mode():
        return clip_vision()


@pytest.fixture(scope="module")
def wide(host: Any) -> Any:
    """As wide as ViT-L/14-336, by which Kolors' adapters are known."""
    with torch.inference_mode():
        return clip_vision(hidden_size=1024, num_attention_heads=16, projection_dim=768)


@pytest.fixture(scope="module")
def face_model(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_pack(tmp_path_factory.mktemp("face") / "pack", others=False)
    return host.library("ip_adapter.face_models").load(folder, "my own")


@pytest.fixture(scope="module")
def make(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Small FaceID adapters for the nano models, loaded once."""
    folder = tmp_path_factory.mktemp("adapters")
    loaded: dict[tuple[str, str], Any] = {}

    def load(kind: str, family: str = "SD 1.5") -> Any:
        if (kind, family) in loaded:
            return loaded[kind, family]
        context, sizes = CONTEXT[family], widths(family, nano=True)
        inner = 4096 if family == "Kolors" else context
        if kind == "plus":
            structure = resampler(
                1024 if family == "Kolors" else HIDDEN, inner, inner // 64, inner, depth=1
            )
            del structure["latents"]
            projection = face_projection(inner, 6 if family == "Kolors" else 4) | {
                f"perceiver_resampler.{key}": shape for key, shape in structure.items()
            }
        elif kind == "picture":
            projection = global_projection(32, context)
        else:
            projection = face_projection(context, 16 if kind == "portrait" else 4)
        is_plain = kind in ("portrait", "picture") or family == "Kolors"
        attention = (key_values if is_plain else attention_with_lora)(sizes, context)
        layout = {f"image_proj.{key}": shape for key, shape in projection.items()} | {
            f"ip_adapter.{key}": shape for key, shape in attention.items()
        }
        path = folder / f"{kind} {family}.safetensors"
        adapters.write_safetensors(adapters.fill(layout), path)
        loaded[kind, family] = host.library("ip_adapter.host.adapters").load(path)
        return loaded[kind, family]

    return load


@pytest.fixture(scope="module")
def models(host: Any) -> dict[str, Any]:
    import comfy.sd

    build_unets(MODEL_FILES)
    files = {"SDXL": UNET_SDXL, "Kolors": UNET_KOLORS}
    with torch.inference_mode():
        return {
            family: comfy.sd.load_diffusion_model(str(MODEL_FILES / "models" / file))
            for family, file in files.items()
        }


def run(sample: Sampler, model: Any, family: str, **more: Any) -> Tensor:
    extra = {"pooled_output": draw(1, POOLED_TEXT[family])} if family in POOLED_TEXT else {}
    positive, negative = ([[draw(1, 77, STATES[family], seed=s), extra]] for s in (1, 2))
    return sample(model, positive=positive, negative=negative, **more)


def faces(count: int) -> Tensor:
    """Pictures with one face each, at other places."""
    return torch.cat(
        [
            picture(320, 400, [Disc(120 + 40 * i, 150 + 10 * i, 20 + 4 * i, tilt=9 * i)], seed=i)
            for i in range(count)
        ]
    )


def entry(model: Any) -> Any:
    (found,) = model.model_options["transformer_options"]["image_prompts"]
    return found


def detected(host: Any, face_model: Any, image: Tensor) -> Any:
    """Through our own node."""
    node = host.node("ImagePromptDetectFace")
    return node.execute(face_model, image, "confidence", 0).args[0]


def hidden(vision: Any, image: Tensor) -> Tensor:
    return vision.encode_image(image).penultimate_hidden_states


def combined(rows: Tensor, how: str) -> Tensor:
    if how == "concat" or len(rows) == 1:
        return rows
    if how == "subtract":
        return (rows[0] - rows[1:].mean(dim=0))[None]
    if how == "norm average":
        return (rows / rows.square().sum(dim=0).sqrt()).mean(dim=0)[None]
    return rows.mean(dim=0)[None] if how == "average" else rows.sum(dim=0)[None]


@pytest.mark.parametrize("how", ["concat", "average", "subtract", "norm average", "add"])
@pytest.mark.parametrize("kind", ["faceid", "plus", "portrait"])
def test_faceid_against_the_formulas(
    host: Any, model: Any, vision: Any, face_model: Any, make: Make, kind: str, how: str
) -> None:
    adapter, image, negative = make(kind), faces(3), torch.rand(2, 40, 60, 3)
    patched, shown = (
        host.node("IPAdapterFaceID")
        .execute(
            *(model, adapter, image, 0.8, 0.6, "linear", how, 0.0, 0.9, "K+V"),
            image_negative=negative,
            clip_vision=vision if kind == "plus" else None,
            insightface=face_model,
        )
        .args
    )
    face = detected(host, face_model, image)
    crops = face.crops(224)
    assert torch.equal(shown, crops) and shown.shape == (3, 224, 224, 3)
    vectors = face.embeddings / face.embeddings.square().sum(dim=-1, keepdim=True).sqrt()
    seen: dict[str, Any] = {"face": combined(vectors, how)}
    rows = 3 if how == "concat" else 1
    nobody: dict[str, Any] = {"face": torch.zeros(rows, 512)}
    if kind == "plus":
        against = hidden(vision, negative)
        against = torch.cat((against, against[-1:]))[:rows]
        seen |= {"image": combined(hidden(vision, crops), how), "structure": 0.6}
        nobody |= {"image": against, "structure": 0.6}
    found = entry(patched)
    expected = project(host, adapter, **seen).flatten(0, 1)[None]
    assert_close(found.prompt.conditional, expected, 1e-5)
    expected = project(host, adapter, **nobody).flatten(0, 1)[None]
    assert_close(found.prompt.unconditional, expected, 1e-5)
    assert set(found.weights.values()) == {0.8} and len(found.weights) == 16
    assert (found.timing.end, found.scaling) == (0.9, "K+V")


def test_no_face_is_a_black_picture(
    host: Any, model: Any, vision: Any, face_model: Any, make: Make
) -> None:
    adapter = make("plus")
    given = (model, adapter, faces(1), 1.0, 1.0, "linear", "concat", 0.0, 1.0, "V only")
    patched = host.node("IPAdapterFaceID").execute(
        *given, clip_vision=vision, insightface=face_model
    )
    black = hidden(vision, torch.zeros(1, SIZE, SIZE, 3))
    expected = project(host, adapter, face=torch.zeros(1, 512), image=black, structure=1.0)
    assert_close(entry(patched.args[0]).prompt.unconditional, expected, 1e-5)


def test_the_most_confident_face_is_taken(
    host: Any, model: Any, face_model: Any, make: Make
) -> None:
    node, image = host.node("IPAdapterFaceID"), picture(480, 640, [LARGE, SURE])
    given = (1.0, 1.0, "linear", "concat", 0.0, 1.0, "V only")
    (_, shown) = node.execute(model, make("faceid"), image, *given, insightface=face_model).args
    sure = face_model.read([image[0]], [SURE.landmarks()]).crops(224)
    large = face_model.read([image[0]], [LARGE.landmarks()]).crops(224)
    assert float((shown - sure).abs().mean()) < 0.01 < float((shown - large).abs().mean())


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL", "Kolors"])
def test_crops_and_samples_of_every_family(
    host: Any,
    model: Any,
    models: dict[str, Any],
    vision: Any,
    wide: Any,
    face_model: Any,
    make: Make,
    sample: Sampler,
    family: str,
) -> None:
    """As our own nodes make it, but for the crop, the black picture and the structure."""
    vision = wide if family == "Kolors" else vision
    base, adapter = models.get(family, model), make("plus", family)
    node_id = "IPAdapterFaceIDKolors" if family == "Kolors" else "IPAdapterFaceID"
    kolors = (1.0,) if family == "Kolors" else ()
    patched, shown = (
        host.node(node_id)
        .execute(
            *(base, adapter, faces(1), 0.7, 0.5, *kolors, "ease in", "concat", 0.0, 1.0, "V only"),
            clip_vision=vision,
            insightface=face_model,
        )
        .args
    )
    side = CROPS[family]
    assert shown.shape == (1, side, side, 3)
    face = detected(host, face_model, faces(1))
    prompt = host.library("ip_adapter.host.encoding").encode_faces(
        adapter, face, vision, 0.5, crop=side, unconditional="black picture"
    )
    influence = host.node("ImagePromptInfluence").execute(0.7, "ease in", "V only", 0, 1).args[0]
    own = host.node("ImagePromptApply").execute(
        base, adapter, prompt, 1.0, 0.0, 1.0, influence=influence
    )
    found = run(sample, patched, family)
    assert found.isfinite().all()
    assert torch.equal(found, run(sample, own.args[0], family))
    assert relative_error(found, run(sample, base, family)) > 1e-4


def test_the_weight_of_kolors_is_that_of_keys_and_values(
    host: Any,
    models: dict[str, Any],
    wide: Any,
    face_model: Any,
    make: Make,
    sample: Sampler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model's Linear times the factor, weight and bias, before each key and value."""
    base, adapter = models["Kolors"], make("plus", "Kolors")
    functional = host.library("ip_adapter.host.run").functional

    def patched(weight: float) -> Any:
        given = (base, adapter, faces(1), 0.7, 1.0, weight, "linear", "concat", 0.0, 1.0, "V only")
        node = host.node("IPAdapterFaceIDKolors")
        return node.execute(*given, clip_vision=wide, insightface=face_model).args[0]

    found = run(sample, patched(0.4), "Kolors")
    assert relative_error(found, run(sample, patched(1.0), "Kolors")) > 1e-6
    linear = functional.linear

    class Scaled:
        @staticmethod
        def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear(x, 0.4 * weight, 0.4 * bias)

    monkeypatch.setattr(host.library("ip_adapter.host.run"), "functional", Scaled)
    assert_close(found, run(sample, patched(1.0), "Kolors"), 1e-5)
    monkeypatch.undo()
    assert torch.equal(run(sample, patched(0.0), "Kolors"), run(sample, base, "Kolors"))


def test_faces_by_frame(
    host: Any, model: Any, vision: Any, face_model: Any, make: Make, sample: Sampler
) -> None:
    adapter, image, noise, weights = make("plus"), faces(2), draw(3, 4, 8, 8), [0.9, 0.4]
    given = ("linear", "average", 0.0, 1.0, "V only")
    sockets = {"clip_vision": vision, "insightface": face_model}
    batch = host.node("IPAAdapterFaceIDBatch")
    patched, shown = batch.execute(model, adapter, image, weights, 1.0, *given, **sockets).args
    assert shown.shape == (2, 224, 224, 3) and entry(patched).prompt.frames == 2
    found = sample(patched, noise=noise)
    for i in range(3):
        at = min(i, 1)
        alone = host.node("IPAdapterFaceID").execute(
            model, adapter, image[at : at + 1], weights[at], 1.0, *given, **sockets
        )
        expected = sample(alone.args[0], noise=noise[i : i + 1])[0]
        assert_close(found[i], expected, relative=1e-4)


def test_nodes_for_pictures_read_faces_and_the_other_way_round(
    host: Any, model: Any, vision: Any, face_model: Any, make: Make, sample: Sampler
) -> None:
    """The structure counts twice the weight where a node has no input for it."""
    given = ("linear", "concat", 0.0, 1.0, "V only")
    plus = replace(make("plus"), clip_vision=vision, face_model=face_model)
    face_id, advanced = host.node("IPAdapterFaceID"), host.node("IPAdapterAdvanced")
    own = advanced.execute(model, plus, faces(1), 0.7, *given).args[0]
    same = face_id.execute(model, plus, faces(1), 0.7, 1.4, *given).args[0]
    assert torch.equal(sample(own), sample(same))
    scientist = host.node("IPAdapterMS")
    own = scientist.execute(model, plus, faces(1), 0.7, 1.4, *given, "").args[0]
    assert torch.equal(sample(own), sample(same))

    adapter, image = make("picture"), torch.rand(1, 50, 60, 3)
    patched, shown = face_id.execute(
        model, adapter, image, 0.7, 1.0, *given, clip_vision=vision, insightface=face_model
    ).args
    plain = advanced.execute(model, adapter, image, 0.7, *given, clip_vision=vision).args[0]
    assert torch.equal(sample(patched), sample(plain)) and torch.equal(shown, image)


def test_enhancers_pass_faces_on(
    host: Any,
    model: Any,
    vision: Any,
    face_model: Any,
    make: Make,
    sample: Sampler,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plus = replace(make("plus"), clip_vision=vision, face_model=face_model)
    given = (model, plus, faces(1), 0.7, "linear", "concat", 0.0, 1.0, "V only")
    found = host.node("IPAdapterClipVisionEnhancer").execute(*given, 2, 1.0).args[0]
    assert "reads a face, which has no tiles" in caplog.text
    assert torch.equal(
        sample(found), sample(host.node("IPAdapterAdvanced").execute(*given).args[0])
    )


def test_what_is_missing_is_asked_for(
    host: Any, model: Any, vision: Any, face_model: Any, make: Make
) -> None:
    node = host.node("IPAdapterFaceID")
    given = (faces(1), 1.0, 1.0, "linear", "concat", 0.0, 1.0, "V only")
    with pytest.raises(Exception, match="insightface is not connected") as caught:
        node.execute(model, make("faceid"), *given)
    assert type(caught.value).__name__ == "IncompatibleModelError"
    with pytest.raises(Exception, match="clip_vision is not connected"):
        node.execute(model, make("plus"), *given, insightface=face_model)
    with pytest.raises(Exception, match="another pack made"):
        node.execute(model, make("faceid"), *given, insightface=object())
    with pytest.raises(Exception, match="No face in the image") as caught:
        blank = torch.full((1, 200, 200, 3), 0.5)
        node.execute(model, make("faceid"), blank, *given[1:], insightface=face_model)
    assert type(caught.value).__name__ == "ImageError"
    # An adapter that reads vectors alone does without an image encoder.
    node.execute(model, make("faceid"), *given, insightface=face_model)
