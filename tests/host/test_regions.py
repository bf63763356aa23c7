"""Regions and tiles on the host, through the nodes, against chains of plain image prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.conftest import Applier, Sampler, draw, project, text
from tests.host.test_encoding import HIDDEN, POOLED, clip_vision, pictures
from tests.synthetic import adapters
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

SIZE = (8, 12)


@pytest.fixture
def vision(host: Any) -> Any:
    return clip_vision()


@pytest.fixture(params=["base", "plus"])
def adapter(request: pytest.FixtureRequest, host: Any, tmp_path: Path) -> Any:
    """As wide as the nano model, for the small image encoder."""
    widths = adapters.NANO_WIDTHS
    if request.param == "base":
        tensors = adapters.base_sd15(widths, features=POOLED)
    else:
        tensors = adapters.plus_sd15(widths, features=HIDDEN, inner=64, heads=1, depth=1)
    path = adapters.write_safetensors(tensors, tmp_path / request.param)
    return host.library("ip_adapter.host.adapters").load(path)


def prompt_of(host: Any, adapter: Any, vision: Any, image: Tensor) -> Any:
    """An image prompt from the host's own encoding of each picture, side by side."""
    out = vision.encode_image(image)
    if adapter.spec.projection.image == "pooled":
        seen, nothing = out.image_embeds, torch.zeros(1, POOLED)
    else:
        size = vision.image_size
        empty = torch.zeros(1, 3, size, size)
        seen = out.penultimate_hidden_states
        nothing = vision.model(pixel_values=empty, intermediate_output=-2)[1]
    return host.library("ip_adapter.prompt").from_tokens(
        project(host, adapter, image=seen),
        project(host, adapter, image=nothing),
        adapter.fingerprint,
        adapter.label,
    )


def put(host: Any, model: Any, adapter: Any, prompt: Any, **influence: Any) -> Any:
    return host.library("ip_adapter.host.patching").apply(model, adapter, prompt, **influence)[0]


def half(is_right: bool, height: int = 64, width: int = 96) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[..., width // 2 :] = 1
    return mask if is_right else 1 - mask


def region(host: Any, prompt: Any, weight: float = 1.0, **inputs: Any) -> tuple[Any, ...]:
    node = host.node("ImagePromptRegion")
    return node.execute(prompt, weight, inputs.pop("text_weight", 1.0), **inputs).args


def applied(host: Any, model: Any, adapter: Any, regions: Any, *rest: Any, **inputs: Any) -> Any:
    node = host.node("ImagePromptApplyRegions")
    return node.execute(model, adapter, regions, *(rest or (1.0, 0.0, 1.0)), **inputs).args[0]


# Tiles


@pytest.mark.parametrize("overlap", ["share", "add"])
def test_tiles_are_a_chain_of_image_prompts_with_rectangles(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler, overlap: str
) -> None:
    """640 x 256 pixels are three tiles that begin at 0, 192 and 384; neighbours share 64."""
    image = pictures(1, 256, 640).mul(255).round().div(255)
    node = host.node("ImagePromptTiles")
    regions, tiles, masks = node.execute(adapter, vision, image, 0.0, overlap).args
    columns = ((0, 256), (192, 448), (384, 640))
    rectangles = torch.zeros(3, 256, 640)
    for rectangle, (left, right) in zip(rectangles, columns, strict=True):
        rectangle[:, left:right] = 1
    if overlap == "share":
        for left, right in ((192, 256), (384, 448)):
            rectangles[:, :, left:right] /= 2
    assert torch.equal(masks, rectangles)
    chained = model
    for (left, right), rectangle in zip(columns, rectangles, strict=True):
        prompt = prompt_of(host, adapter, vision, image[:, :, left:right])
        chained = put(host, chained, adapter, prompt, weight=0.8, mask=rectangle)
    assert torch.equal(tiles, torch.cat([image[:, :, left:right] for left, right in columns]))
    found = applied(host, model, adapter, regions, 0.8, 0.0, 1.0)
    noise = draw(1, 4, 8, 20)
    expected = sample(chained, noise=noise)
    assert_close(sample(found, noise=noise), expected, relative=1e-4)
    whole = put(host, model, adapter, prompt_of(host, adapter, vision, image), weight=0.8)
    assert relative_error(sample(whole, noise=noise), expected) > 1e-4


@pytest.mark.parametrize("size", [(300, 300), (200, 500), (500, 200), (90, 700)])
def test_sharing_tiles_of_one_colour_are_one_image_prompt(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler, size: tuple[int, int]
) -> None:
    """All tiles look alike, and their masks sum to one."""
    image = torch.full((1, *size, 3), 128 / 255)
    node = host.node("ImagePromptTiles")
    regions, _, masks = node.execute(adapter, vision, image, 0.0, "share").args
    assert_close(masks.sum(dim=0), torch.ones(masks.shape[1:]))
    noise = draw(1, 4, *(max(4, side // 40) for side in size))
    found = sample(applied(host, model, adapter, regions), noise=noise)
    alone = put(host, model, adapter, prompt_of(host, adapter, vision, image))
    assert_close(found, sample(alone, noise=noise), relative=1e-3)


def test_a_batch_of_references_is_together_or_by_frame(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    batch = pictures(2, 256, 512).mul(255).round().div(255)
    node = host.node("ImagePromptTiles")
    noise = draw(2, 4, 8, 16)

    def run(image: Tensor, noise: Tensor, **inputs: Any) -> Tensor:
        regions = node.execute(adapter, vision, image, 0.0, "share", **inputs).args[0]
        return sample(applied(host, model, adapter, regions), noise=noise)

    framed = run(batch, noise, batch="one per frame")
    for i in range(2):
        alone = run(batch[i : i + 1], noise[i : i + 1])
        assert_close(framed[i], alone[0], relative=1e-4)
    together = model
    for i, place in enumerate((slice(0, 256), slice(256, 512))):
        mask = torch.zeros(1, 256, 512)
        mask[..., place] = 1
        prompt = prompt_of(host, adapter, vision, batch[:, :, place])
        assert prompt.tokens == 2 * adapter.spec.projection.tokens, i
        together = put(host, together, adapter, prompt, mask=mask)
    assert_close(run(batch, noise), sample(together, noise=noise), relative=1e-4)


def test_tiles_are_of_the_sharpened_picture(host: Any, adapter: Any, vision: Any) -> None:
    image = pictures(1, 256, 512).mul(0.5)
    node = host.node("ImagePromptTiles")
    plain = node.execute(adapter, vision, image, 0.0, "share").args
    sharp = node.execute(adapter, vision, image, 0.6, "share").args
    assert float(sharp[1].std()) > float(plain[1].std()) > 0
    assert torch.equal(sharp[2], plain[2])
    assert relative_error(sharp[0][0].prompt.conditional, plain[0][0].prompt.conditional) > 1e-4


def test_the_black_picture_may_stand_for_no_image(host: Any, adapter: Any, vision: Any) -> None:
    image = pictures(1, 256, 512)
    node = host.node("ImagePromptTiles")
    regions = node.execute(
        adapter, vision, image, 0.0, "share", unconditional="black picture"
    ).args[0]
    black = torch.zeros(1, 28, 28, 3)
    if adapter.spec.projection.image == "pooled":
        features = torch.zeros(1, POOLED)
    else:
        features = vision.encode_image(black).penultimate_hidden_states
    expected = project(host, adapter, image=features)
    for one in regions:
        assert_close(one.prompt.unconditional, expected, relative=1e-4)


# Regions


def live(host: Any, model: Any) -> Any:
    """The branches of every layer for one positive row of a latent of `SIZE`."""
    entries = model.model_options["transformer_options"]["image_prompts"]
    library = host.library("ip_adapter.host.run")
    layers = host.library("ip_adapter.host.unet").cross_attention_layers(model)
    run = library.Run(
        entries,
        {layer.address: layer for layer in layers},
        model.get_model_object("model_sampling"),
        torch.float32,
        SIZE,
    )
    chunks = (library.Chunk(True, None, (0,)),)
    return run.live(chunks, torch.ones(1), torch.device("cpu"))


def test_each_region_changes_only_its_part_of_a_layer(
    host: Any, model: Any, apply: Applier
) -> None:
    left, right = apply.prompt(1), apply.prompt(2)
    first = region(host, left, mask=half(False))[0]
    both = region(host, right, 0.5, mask=half(True), regions=first)[0]
    branches = live(host, applied(host, model, apply.adapter, both))
    layers = ((("input", 1, 0), 32, (8, 12), 1), (("output", 6, 0), 64, (4, 6), None))
    for address, width, grid, number in layers:
        query = draw(1, grid[0] * grid[1], width)
        out = torch.zeros_like(query)
        for branch in branches[address]:
            out = branch.add(out, query, {"activations_shape": [1, width, *grid]})
        out = out.view(*grid, width)
        middle = grid[1] // 2
        for prompt, weight, columns in (
            (left, 1.0, slice(None, middle)),
            (right, 0.5, slice(middle, None)),
        ):
            alone = live(host, put(host, model, apply.adapter, prompt, weight=weight))[address][0]
            expected = alone.add(torch.zeros_like(query), query, {}).view(*grid, width)
            assert_close(out[:, columns], expected[:, columns])
            assert float(expected.abs().max()) > 0
            if number is None:
                continue
            state = apply.adapter.module.state_dict()
            tokens = prompt.conditional[0]
            key = tokens @ state[f"ip_adapter.{number}.to_k_ip.weight"].float().T
            value = tokens @ state[f"ip_adapter.{number}.to_v_ip.weight"].float().T
            heads = 8
            q, k, v = (x.view(-1, heads, width // heads) for x in (query[0], key, value))
            scores = torch.einsum("lhd,thd->hlt", q, k) / (width // heads) ** 0.5
            mixed = torch.einsum("hlt,thd->lhd", scores.softmax(-1), v).reshape(*grid, width)
            assert_close(out[:, columns], weight * mixed[:, columns], relative=1e-4)


def test_order_of_regions_does_not_matter(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    parts = [(apply.prompt(1), 0.7, half(False)), (apply.prompt(2), 1.1, half(True))]
    results = []
    for order in (parts, parts[::-1]):
        regions: Any = ()
        for prompt, weight, mask in order:
            regions = region(host, prompt, weight, mask=mask, regions=regions)[0]
        results.append(
            sample(applied(host, model, apply.adapter, regions), noise=draw(1, 4, *SIZE))
        )
    assert_close(results[0], results[1], relative=1e-4)


def test_two_people_with_a_face_a_text_and_a_mask_each(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    """Each half of the first step's picture is what its text alone makes of it, images included."""
    first, left, against = region(
        host, apply.prompt(1), mask=half(False), positive=text(1), negative=text(5)
    )
    both, right, also = region(
        host, apply.prompt(2), mask=half(True), positive=text(2), negative=text(6), regions=first
    )
    assert len(first) == 1 and len(both) == 2
    patched = applied(host, model, apply.adapter, both)
    noise = draw(1, 4, *SIZE)
    found = sample(patched, noise=noise, steps=1, positive=left + right, negative=against + also)
    for columns, positive, negative in (
        (slice(None, 6), text(1), text(5)),
        (slice(6, None), text(2), text(6)),
    ):
        alone = sample(patched, noise=noise, steps=1, positive=positive, negative=negative)
        assert_close(found[..., columns], alone[..., columns], relative=1e-4)
        assert relative_error(found, alone) > 1e-3
    without = sample(model, noise=noise, steps=1, positive=left + right, negative=against + also)
    for columns in (slice(None, 6), slice(6, None)):
        assert relative_error(found[..., columns], without[..., columns]) > 1e-3
    finished = sample(patched, noise=noise, steps=3, positive=left + right, negative=text(3))
    assert bool(torch.isfinite(finished).all())


def test_texts_are_restricted_as_the_host_does_it(host: Any, apply: Applier) -> None:
    given = text(1)
    mask = half(True)[0]
    _, positive, negative = region(
        host, apply.prompt(1), text_weight=0.6, mask=mask, positive=given
    )
    expected = host.nodes.ConditioningSetMask().append(given, mask, "default", 0.6)[0]
    assert negative is None and given[0][1] == {}
    assert positive[0][0] is given[0][0] and positive[0][1].keys() == expected[0][1].keys()
    assert torch.equal(positive[0][1]["mask"], expected[0][1]["mask"])
    for key in ("set_area_to_bounds", "mask_strength"):
        assert positive[0][1][key] == expected[0][1][key]


def test_a_background_text_counts_by_its_weight(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    """The host divides by the sum of weights in each place: 0.25 against 1 is a fifth."""
    noise = draw(1, 4, *SIZE)
    background = region(host, apply.prompt(1), text_weight=0.25, positive=text(1))[1]
    assert "mask" not in background[0][1]
    kept = region(host, apply.prompt(1), positive=text(1))[1]
    assert "strength" not in kept[0][1]
    options = {"noise": noise, "steps": 1, "cfg": 1.0}
    mixed = sample(model, positive=background + text(2), **options)
    one, two = (sample(model, positive=text(i), **options) for i in (1, 2))
    assert_close(mixed, 0.2 * one + 0.8 * two, relative=1e-4)


def test_weights_windows_and_masks_multiply_with_those_of_apply(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    noise = draw(1, 4, *SIZE)
    corner = torch.zeros(1, 64, 96)
    corner[:, :32, 48:] = 1
    low = torch.zeros(1, 16, 24)
    low[:, :8] = 1
    regions = region(host, apply.prompt(1), 0.5, mask=half(True))[0]
    found = applied(host, model, apply.adapter, regions, 0.8, 0.1, 0.7, mask=low)
    plain = apply(model, seed=1, weight=0.4, start=0.1, end=0.7, mask=corner)
    assert_close(sample(found, noise=noise, steps=3), sample(plain, noise=noise, steps=3))


def test_an_influence_of_its_own_comes_first(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    make = host.library("ip_adapter.influence").Influence
    own, shared = make(layers="style transfer"), make(layers="composition", weight=2.0)
    first = region(host, apply.prompt(1), influence=own)[0]
    both = region(host, apply.prompt(2), regions=first)[0]
    found = applied(host, model, apply.adapter, both, influence=shared)
    chained = apply(apply(model, seed=1, influence=own), seed=2, influence=shared)
    assert torch.equal(sample(found), sample(chained))


def test_the_incoming_model_and_chain_stay_as_they_are(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    plain = sample(model)
    first = region(host, apply.prompt(1))[0]
    one = sample(applied(host, model, apply.adapter, first))
    both = region(host, apply.prompt(2), regions=first)[0]
    sample(applied(host, model, apply.adapter, both))
    assert len(first) == 1
    assert torch.equal(sample(applied(host, model, apply.adapter, first)), one)
    assert torch.equal(sample(model), plain)


def test_what_does_not_belong_together_is_refused(
    host: Any, model: Any, apply: Applier, plus_adapter: Any
) -> None:
    regions = region(host, apply.prompt(1))[0]
    with pytest.raises(Exception, match="The image prompt was encoded with"):
        applied(host, model, plus_adapter, regions)
    with pytest.raises(Exception, match="mask has shape"):
        region(host, apply.prompt(1), mask=torch.zeros(3))
    with pytest.raises(Exception, match="step window"):
        applied(host, model, apply.adapter, regions, 1.0, 0.7, 0.2)
