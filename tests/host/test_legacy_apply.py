"""The old apply nodes of pictures: tokens against formulas, weights against tables, then samples.

Features come from the host's own CLIP Vision, weights by transformer are written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import MODEL_FILES
from tests.host.conftest import Sampler, draw, project
from tests.host.test_encoding import HIDDEN, POOLED, SIZE, clip_vision, pictures
from tests.synthetic import adapters
from tests.synthetic.catalogue import widths
from tests.synthetic.models import UNET_SDXL, build_unets
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

SD_STYLE = (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15)
ENDS = {"start_at": 0.0, "end_at": 1.0, "embeds_scaling": "V only"}


@pytest.fixture(scope="module")
def vision(host: Any) -> Any:
    with torch.inference_mode():
        return clip_vision()


Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A small adapter for a nano model, loaded once."""
    folder = tmp_path_factory.mktemp("adapters")
    loaded: dict[tuple[str, str], Any] = {}

    def load(kind: str, family: str = "SD 1.5") -> Any:
        if (kind, family) not in loaded:
            sizes = widths(family, nano=True)
            context = {"SD 1.5": 768, "SDXL": 2048}[family]
            if kind == "base":
                tensors = adapters.base_sd15(sizes, features=POOLED, context=context)
            else:
                tensors = adapters.plus_sd15(
                    sizes, features=HIDDEN, inner=64, heads=1, depth=1, context=context
                )
            path = adapters.write_safetensors(tensors, folder / f"{kind} {family}.safetensors")
            loaded[kind, family] = host.library("ip_adapter.host.adapters").load(path)
        return loaded[kind, family]

    with torch.inference_mode():
        return load


@pytest.fixture(params=["base", "plus"])
def adapter(request: pytest.FixtureRequest, make: Make) -> Any:
    return make(request.param)


@pytest.fixture(scope="module")
def xl(host: Any) -> Any:
    import comfy.sd

    build_unets(MODEL_FILES)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(MODEL_FILES / "models" / UNET_SDXL))


def sample_xl(sample: Sampler, model: Any, **kwargs: Any) -> Tensor:
    extra = {"pooled_output": draw(1, 1280)}
    positive, negative = ([[draw(1, 77, 2048, seed=seed), extra]] for seed in (1, 2))
    return sample(model, positive=positive, negative=negative, **kwargs)


def entries(model: Any) -> tuple[Any, ...]:
    return tuple(model.model_options["transformer_options"].get("image_prompts", ()))


# The formulas


def read(vision: Any, adapter: Any, image: Tensor) -> Tensor:
    """The host's own features, which crop the centre."""
    out = vision.encode_image(image)
    if adapter.spec.projection.image == "pooled":
        return out.image_embeds
    return out.penultimate_hidden_states


def sized(rows: Tensor, count: int) -> Tensor:
    """The last row again, or the first rows."""
    return torch.stack([rows[min(i, len(rows) - 1)] for i in range(count)])


def combined(rows: Tensor, how: str) -> Tensor:
    if how == "add":
        return rows.sum(dim=0, keepdim=True)
    if how == "subtract":
        return (rows[0] - rows[1:].sum(dim=0) / (len(rows) - 1))[None]
    if how == "average":
        return rows.sum(dim=0, keepdim=True) / len(rows)
    if how == "norm average":
        norm = rows.square().sum(dim=0, keepdim=True).sqrt()
        return (rows / norm).sum(dim=0, keepdim=True) / len(rows)
    return rows


def expected_tokens(
    host: Any,
    vision: Any,
    adapter: Any,
    image: Tensor,
    negative: Tensor | None,
    how: str = "concat",
    *,
    by_frame: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both sides, ``[F, T, D]``, as the old pack makes them."""
    seen = read(vision, adapter, image)
    if negative is not None:
        against = read(vision, adapter, negative)
    elif adapter.spec.projection.image == "pooled":
        against = torch.zeros_like(seen[:1])
    else:
        against = read(vision, adapter, torch.zeros(1, SIZE, SIZE, 3))
    against = sized(against, len(seen))
    if how != "concat" and len(seen) > 1 and not by_frame:
        seen, against = combined(seen, how), against[:1]
    both = (project(host, adapter, image=rows) for rows in (seen, against))
    first, second = both if by_frame else (tokens.flatten(0, 1)[None] for tokens in both)
    return first, second


def numbers(t: int, family: str = "SD 1.5") -> list[int]:
    """The keys of a file that belong to a transformer: inputs, outputs, then the middle."""
    if family == "SD 1.5":
        position = t if t < 6 else 15 if t == 6 else t - 1
        return [2 * position + 1]
    depths = (2, 2, 10, 10, 10, 10, 10, 10, 2, 2, 2)
    order = (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 4)
    first = sum(depths[earlier] for earlier in order[: order.index(t)])
    return [2 * (first + i) + 1 for i in range(depths[t])]


def by_number(weights: dict[int, float], family: str = "SD 1.5") -> dict[int, float]:
    return {n: weight for t, weight in weights.items() for n in numbers(t, family)}


def close_weights(found: Any, expected: dict[int, float]) -> None:
    given = {number: weight for number, weight in found.items() if weight != 0}
    assert given == pytest.approx({n: w for n, w in expected.items() if w != 0})


def assert_prompt(entry: Any, expected: tuple[Tensor, Tensor]) -> None:
    assert_close(entry.prompt.conditional, expected[0], 1e-5)
    unconditional = entry.prompt.unconditional
    if unconditional.shape != expected[1].shape:  # one row may stand for all frames
        unconditional = unconditional.expand(len(expected[1]), -1, -1)
    assert_close(unconditional, expected[1], 1e-5)


# IPAdapterAdvanced


@pytest.mark.parametrize("negatives", [0, 1, 2, 5])
@pytest.mark.parametrize("how", ["concat", "add", "subtract", "average", "norm average"])
def test_advanced_against_the_formulas(
    host: Any, model: Any, vision: Any, adapter: Any, how: str, negatives: int
) -> None:
    image = pictures(3, 30, 70)
    negative = 1 - pictures(negatives, 44, 31) if negatives else None
    patched = (
        host.node("IPAdapterAdvanced")
        .execute(
            *(model, adapter, image, 0.7, "linear", how, 0.2, 0.9, "K+V"),
            image_negative=negative,
            clip_vision=vision,
        )
        .args[0]
    )
    (entry,) = entries(patched)
    assert_prompt(entry, expected_tokens(host, vision, adapter, image, negative, how))
    close_weights(entry.weights, {2 * i + 1: 0.7 for i in range(16)})
    assert (entry.timing.start, entry.timing.end, entry.scaling) == (0.2, 0.9, "K+V")
    assert entries(model) == ()  # the MODEL that came in is as it was


def test_advanced_is_encode_and_apply(
    host: Any, model: Any, vision: Any, adapter: Any, sample: Sampler
) -> None:
    image, mask = pictures(2), draw(1, 37, 53).sigmoid()
    prompt = (
        host.node("ImagePromptEncode")
        .execute(adapter, vision, image, "crop", 0, "together", "black picture")
        .args[0]
    )
    influence = (
        host.node("ImagePromptInfluence").execute(0.8, "ease out", "K+mean(V) w/ C penalty", 0, 1)
    ).args[0]
    own = host.node("ImagePromptApply").execute(
        model, adapter, prompt, 1.0, 0.0, 1.0, mask, influence
    )
    old = host.node("IPAdapterAdvanced").execute(
        *(model, adapter, image, 0.8, "ease out", "concat", 0.0, 1.0, "K+mean(V) w/ C penalty"),
        attn_mask=mask,
        clip_vision=vision,
    )
    found = sample(old.args[0])
    assert torch.equal(found, sample(own.args[0]))
    assert relative_error(found, sample(model)) > 1e-3


def test_opaque_transparency_does_not_count_and_grey_is_a_colour(
    host: Any, model: Any, vision: Any, adapter: Any
) -> None:
    image = pictures(1, 33, 61)
    node = host.node("IPAdapterAdvanced")

    def tokens(picture: Tensor) -> Tensor:
        given = (model, adapter, picture, 1.0, "linear", "concat")
        return entries(node.execute(*given, **ENDS, clip_vision=vision).args[0])[0].prompt

    opaque = torch.cat((image, torch.ones_like(image[..., :1])), dim=-1)
    assert torch.equal(tokens(opaque).conditional, tokens(image).conditional)
    grey = image[..., :1]
    same = tokens(grey.expand(-1, -1, -1, 3)).conditional
    assert torch.equal(tokens(grey).conditional, same)


def test_zero_and_an_empty_window_are_the_base_model(
    host: Any,
    model: Any,
    vision: Any,
    adapter: Any,
    sample: Sampler,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node, image = host.node("IPAdapterAdvanced"), pictures(1)
    given = {"combine_embeds": "concat", "embeds_scaling": "V only", "clip_vision": vision}
    none = node.execute(model, adapter, image, 0.0, "linear", start_at=0, end_at=1, **given)
    assert torch.equal(sample(none.args[0]), sample(model))
    assert "start_at" not in caplog.text
    never = node.execute(model, adapter, image, 1.0, "linear", start_at=0.7, end_at=0.2, **given)
    assert torch.equal(sample(never.args[0]), sample(model))
    assert "start_at 0.7 is after end_at 0.2" in caplog.text
    assert never.args[0] is not model
    # Numbers by link are not held to the widget's range.
    always = node.execute(model, adapter, image, 1.0, "linear", start_at=-1, end_at=2, **given)
    plain = node.execute(model, adapter, image, 1.0, "linear", start_at=0, end_at=1, **given)
    assert torch.equal(sample(always.args[0]), sample(plain.args[0]))


@pytest.mark.parametrize("shape", [(1, 7, 5), (2, 64, 64), (300, 17), (3, 1, 1)])
def test_masks_of_any_size(
    host: Any, model: Any, vision: Any, make: Make, sample: Sampler, shape: tuple[int, ...]
) -> None:
    node, given = host.node("IPAdapterAdvanced"), (pictures(1), 1.0, "linear", "concat")
    noise = draw(2, 4, 8, 8)

    def run(mask: Tensor | None) -> Tensor:
        patched = node.execute(
            *(model, make("base"), *given), **ENDS, attn_mask=mask, clip_vision=vision
        )
        return sample(patched.args[0], noise=noise)

    assert torch.equal(run(torch.ones(shape)), run(None))
    assert torch.equal(run(torch.zeros(shape)), sample(model, noise=noise))


def test_a_list_of_weights_counts_by_its_first(
    host: Any, model: Any, vision: Any, make: Make
) -> None:
    for name, extra in (("IPAdapterAdvanced", {"combine_embeds": "concat"}), ("IPAdapterMS", {})):
        given = {"weight_type": "linear", **ENDS, **extra, "clip_vision": vision}
        if name == "IPAdapterMS":
            given |= {"weight_faceidv2": 1.0, "combine_embeds": "concat", "layer_weights": ""}
        patched = host.node(name).execute(
            model=model, ipadapter=make("base"), image=pictures(1), weight=[0.25, 4, 5], **given
        )
        (entry,) = entries(patched.args[0])
        close_weights(entry.weights, {2 * i + 1: 0.25 for i in range(16)})
        assert entry.frames == ()


# Where the encoder comes from


def test_the_loaders_encoder_serves_and_a_connected_one_comes_first(
    host: Any, model: Any, vision: Any, adapter: Any
) -> None:
    node, image = host.node("IPAdapterAdvanced"), pictures(1)
    given = (1.0, "linear", "concat", 0.0, 1.0, "V only")
    with pytest.raises(
        Exception, match=r"clip_vision is not connected\. Connect Load CLIP"
    ) as caught:
        node.execute(model, adapter, image, *given)
    assert type(caught.value).__name__ == "IncompatibleModelError"
    pipeline = replace(adapter, clip_vision=vision)
    (own,) = entries(node.execute(model, pipeline, image, *given).args[0])
    assert_prompt(own, expected_tokens(host, vision, adapter, image, None))
    other = clip_vision(hidden_act="quick_gelu")
    connected = node.execute(model, pipeline, image, *given, clip_vision=other)
    expected = expected_tokens(host, other, adapter, image, None)
    assert_prompt(entries(connected.args[0])[0], expected)
    assert relative_error(expected[0], own.prompt.conditional) > 1e-4


def test_another_packs_adapter_is_refused(host: Any, model: Any, vision: Any) -> None:
    with pytest.raises(Exception, match="another pack made"):
        host.node("IPAdapter").execute(
            model, {"ipadapter": {}}, pictures(1), 1.0, 0.0, 1.0, "standard"
        )


@pytest.mark.parametrize(
    ("word", "factor"),
    [
        ("standard", lambda t: 1.0),
        ("prompt is more important", lambda t: 0.05 + 0.95 * t / 16),
        ("style transfer", lambda t: float(t in SD_STYLE)),
    ],
)
def test_simple(
    host: Any,
    model: Any,
    vision: Any,
    adapter: Any,
    sample: Sampler,
    word: str,
    factor: Callable[[int], float],
) -> None:
    image = pictures(2)
    node = host.node("IPAdapter")
    pipeline = replace(adapter, clip_vision=vision)
    patched = node.execute(model, pipeline, image, 0.6, 0.0, 0.8, word).args[0]
    (entry,) = entries(patched)
    assert_prompt(entry, expected_tokens(host, vision, adapter, image, None))
    close_weights(entry.weights, by_number({t: 0.6 * factor(t) for t in range(16)}))
    assert (entry.timing.start, entry.timing.end, entry.scaling) == (0.0, 0.8, "V only")
    assert relative_error(sample(patched), sample(model)) > 1e-4
    with pytest.raises(Exception, match="IPAdapter Advanced has"):
        node.execute(model, adapter, image, 0.6, 0.0, 0.8, word)


# Batch


@pytest.mark.parametrize("negatives", [0, 2])
def test_a_batch_has_a_reference_and_a_weight_for_each_picture(
    host: Any, model: Any, vision: Any, adapter: Any, sample: Sampler, negatives: int
) -> None:
    """Each picture as alone with its own; the last ones serve those that come after."""
    image, noise, weights = pictures(3), draw(4, 4, 8, 8), [0.5, 1.0, 0.0]
    negative = 1 - pictures(negatives) if negatives else None
    patched = (
        host.node("IPAdapterBatch")
        .execute(
            *(model, adapter, image, weights, "ease in", 0.0, 1.0, "V only", 1),
            image_negative=negative,
            clip_vision=vision,
        )
        .args[0]
    )
    (entry,) = entries(patched)
    assert_prompt(entry, expected_tokens(host, vision, adapter, image, negative, by_frame=True))
    found = sample(patched, noise=noise)
    for i in range(4):
        at = min(i, 2)
        alone = host.node("IPAdapterAdvanced").execute(
            *(model, adapter, image[at : at + 1], weights[at], "ease in", "concat"),
            **ENDS,
            image_negative=None if negative is None else negative[min(at, 1)][None],
            clip_vision=vision,
        )
        expected = sample(alone.args[0], noise=noise[i : i + 1])[0]
        assert_close(found[i], expected, relative=1e-4)
    assert relative_error(found[0], sample(model, noise=noise)[0]) > 1e-4


def test_the_size_of_an_encoding_batch_changes_nothing(
    host: Any, model: Any, vision: Any, make: Make
) -> None:
    def tokens(size: int) -> Tensor:
        given = (model, make("plus"), pictures(5), 1.0, "linear", 0.0, 1.0, "V only", size)
        patched = host.node("IPAdapterBatch").execute(*given, clip_vision=vision)
        return entries(patched.args[0])[0].prompt.conditional

    assert torch.equal(tokens(0), tokens(2))


# Mad Scientist


def mad(host: Any, vision: Any, model: Any, adapter: Any, weight: Any, kind: str, text: str) -> Any:
    given = (model, adapter, pictures(1), weight, 1.0, kind, "concat", 0.0, 1.0, "V only", text)
    return host.node("IPAdapterMS").execute(*given, clip_vision=vision).args[0]


def test_layer_weights_by_transformer(
    host: Any,
    model: Any,
    vision: Any,
    make: Make,
    sample: Sampler,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = mad(host, vision, model, make("base"), 0.5, "ease in", "")
    expected = {t: 0.5 * (0.05 + 0.95 * (1 - t / 16)) for t in range(16)}
    close_weights(entries(plain)[0].weights, by_number(expected))
    # The weight types but the precise ones do not count beside it.
    given = "0:1.0,\n 6 : 0.5, 15:-2, 11:0"
    patched = mad(host, vision, model, make("base"), 0.5, "ease in", given)
    close_weights(entries(patched)[0].weights, by_number({0: 0.5, 6: 0.25, 15: -1.0}))
    assert entries(patched)[0].opposed == frozenset() and not caplog.text.count("layer_weights")
    assert relative_error(sample(patched), sample(plain)) > 1e-4
    # What is not there had no effect in the old pack either.
    patched = mad(host, vision, model, make("base"), 1.0, "linear", "3:1, 40:1, -1:2")
    close_weights(entries(patched)[0].weights, by_number({3: 1.0}))
    assert "names 40:1, -1:2, but SD 1.5 has the transformers 0 to 15" in caplog.text
    nothing = mad(host, vision, model, make("base"), 1.0, "linear", "99:1")
    assert torch.equal(sample(nothing), sample(model))
    with pytest.raises(Exception, match="'3=1' is no layer weight"):
        mad(host, vision, model, make("base"), 1.0, "linear", "3=1")


def test_layer_weights_keep_what_a_precise_type_turns_round(
    host: Any, model: Any, vision: Any, make: Make
) -> None:
    patched = mad(host, vision, model, make("base"), 2.0, "style transfer precise", "4:1, 9:0.5")
    (entry,) = entries(patched)
    close_weights(entry.weights, by_number({4: 2.0, 9: 1.0}))
    assert entry.opposed == frozenset(numbers(4))
    patched = mad(host, vision, model, make("base"), 2.0, "composition precise", "4:1, 9:0.5")
    assert entries(patched)[0].opposed == frozenset(numbers(9))


# Precise


def precise(w: float, boost: float, node: str, family: str) -> tuple[dict[int, float], set[int]]:
    """Weights by transformer, and those that are turned round."""
    if node == "Style":
        if family == "SDXL":
            return {3: boost, 6: w}, {3}
        return dict.fromkeys(SD_STYLE, w) | {4: 0.25 * boost, 5: boost}, {4, 5}
    if family == "SDXL":
        rest = {t: 0.1 * boost for t in range(11)}
        return rest | {3: w, 6: boost}, set(range(11)) - {3}
    style = dict.fromkeys(SD_STYLE, boost) | dict.fromkeys((6, 7, 8), 0.1 * boost)
    return style | {4: 0.25 * w, 5: w}, set(range(16)) - {4, 5}


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL"])
@pytest.mark.parametrize("which", ["Style", "Composition"])
def test_precise_nodes(
    host: Any,
    model: Any,
    xl: Any,
    vision: Any,
    make: Make,
    sample: Sampler,
    which: str,
    family: str,
) -> None:
    node_id = {"Style": "PreciseStyleTransfer", "Composition": "PreciseComposition"}[which]
    base, adapter = (model if family == "SD 1.5" else xl), make("plus", family)
    run = sample if family == "SD 1.5" else lambda m, **more: sample_xl(sample, m, **more)
    image = pictures(2)
    given = (0.8, 0.5, "average", 0.0, 1.0, "V only")
    node = host.node(f"IPAdapter{node_id}")
    patched = node.execute(base, adapter, image, *given, clip_vision=vision).args[0]
    (entry,) = entries(patched)
    assert_prompt(entry, expected_tokens(host, vision, adapter, image, None, "average"))
    weights, turned = precise(0.8, 0.5, which, family)
    close_weights(entry.weights, by_number(weights, family))
    assert entry.opposed == {n for t in turned for n in numbers(t, family)}
    found = run(patched)
    assert found.isfinite().all() and relative_error(found, run(base)) > 1e-5

    # By frame: each picture as with its own reference, weight and boost.
    batch = host.node(f"IPAdapter{node_id}Batch")
    more = ([0.8, 0.4], [0.5, 0.0], "average", 0.0, 1.0, "V only")
    noise = draw(2, 4, 8, 8)
    found = run(batch.execute(base, adapter, image, *more, clip_vision=vision).args[0], noise=noise)
    for i in range(2):
        alone = (more[0][i], more[1][i], *given[2:])
        patched = node.execute(base, adapter, image[i : i + 1], *alone, clip_vision=vision)
        expected = run(patched.args[0], noise=noise[i : i + 1])[0]
        assert_close(found[i], expected, relative=1e-4)


# Style and composition


def two(host: Any, vision: Any, model: Any, adapter: Any, weights: Any, *more: Any) -> Any:
    node = host.node("IPAdapterStyleComposition")
    given = (model, adapter, pictures(2), 1 - pictures(2), *weights, *more, 0.0, 1.0, "V only")
    return node.execute(*given, clip_vision=vision).args[0]


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL"])
@pytest.mark.parametrize("expand", [False, True])
def test_style_of_one_picture_and_composition_of_another(
    host: Any,
    model: Any,
    xl: Any,
    vision: Any,
    make: Make,
    sample: Sampler,
    family: str,
    expand: bool,
) -> None:
    base, adapter = (model if family == "SD 1.5" else xl), make("plus", family)
    run = sample if family == "SD 1.5" else lambda m, **more: sample_xl(sample, m, **more)
    patched = two(host, vision, base, adapter, (0.8, 0.6), expand, "average")
    style, layout = entries(patched)
    expected = expected_tokens(host, vision, adapter, pictures(2), None, "average")
    assert_prompt(style, expected)
    other = expected_tokens(host, vision, adapter, 1 - pictures(2), None, "average")
    assert_prompt(layout, other)
    assert torch.equal(style.prompt.unconditional, layout.prompt.unconditional)
    if family == "SDXL":
        of_layout = {3: 0.6}
        of_style = dict.fromkeys(set(range(11)) - {3}, 0.8) if expand else {6: 0.8}
    else:
        of_layout = {4: 0.6 if expand else 0.15, 5: 0.6}
        more = (6, 7, 8) if expand else ()
        of_style = dict.fromkeys((*SD_STYLE, *more), 0.8)
    close_weights(style.weights, by_number(of_style, family))
    close_weights(layout.weights, by_number(of_layout, family))
    assert style.opposed == layout.opposed == frozenset()
    found = run(patched)
    for weights in ((0.8, 0.0), (0.0, 0.6)):
        part = run(two(host, vision, base, adapter, weights, expand, "average"))
        assert relative_error(found, part) > 1e-6


def test_style_and_composition_by_frame(
    host: Any, model: Any, vision: Any, adapter: Any, sample: Sampler
) -> None:
    style, layout, negative = pictures(2), 1 - pictures(2), pictures(1, 64, 20)
    given = {**ENDS, "image_negative": negative, "clip_vision": vision}
    batch = host.node("IPAdapterStyleCompositionBatch")
    weights = ([0.9, 0.3], [0.0, 1.2])
    patched = batch.execute(model, adapter, style, layout, *weights, False, **given)
    noise = draw(2, 4, 8, 8)
    found = sample(patched.args[0], noise=noise)
    for i in range(2):
        alone = host.node("IPAdapterStyleComposition").execute(
            *(model, adapter, style[i : i + 1], layout[i : i + 1]),
            *(weights[0][i], weights[1][i], False, "concat"),
            **given,
        )
        expected = sample(alone.args[0], noise=noise[i : i + 1])[0]
        assert_close(found[i], expected, relative=1e-4)
    # One weight for all pictures beside a list for the other.
    mixed = batch.execute(model, adapter, style, layout, [0.9, 0.3], 0.5, False, **given)
    first, second = entries(mixed.args[0])
    assert first.frames == (0.9, 0.3) and second.frames == ()
