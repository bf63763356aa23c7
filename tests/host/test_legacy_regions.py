"""The old ids for tiles and regions, against chains of plain image prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.host.conftest import Sampler, draw, project, text
from tests.host.test_encoding import HIDDEN, POOLED, clip_vision, pictures
from tests.synthetic import adapters
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

TILED = {
    "weight": 0.8,
    "weight_type": "linear",
    "start_at": 0.0,
    "end_at": 1.0,
    "sharpening": 0.0,
    "embeds_scaling": "V only",
}


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


def features(adapter: Any, vision: Any, image: Tensor) -> Tensor:
    out = vision.encode_image(image)
    is_pooled = adapter.spec.projection.image == "pooled"
    return out.image_embeds if is_pooled else out.penultimate_hidden_states


def prompt_of(
    host: Any, adapter: Any, vision: Any, image: Tensor, *, how: str = "concat", frames: int = 1
) -> Any:
    """As the old pack encodes: the black picture is "no image" of hidden states."""
    seen = features(adapter, vision, image)
    if how == "average":
        seen = seen.mean(dim=0, keepdim=True)
    if adapter.spec.projection.image == "pooled":
        nothing = torch.zeros(1, POOLED)
    else:
        nothing = features(adapter, vision, torch.zeros(1, 28, 28, 3))
    return host.library("ip_adapter.prompt").from_tokens(
        project(host, adapter, image=seen),
        project(host, adapter, image=nothing),
        adapter.fingerprint,
        adapter.label,
        frames,
    )


def put(host: Any, model: Any, adapter: Any, prompt: Any, **influence: Any) -> Any:
    return host.library("ip_adapter.host.patching").apply(model, adapter, prompt, **influence)[0]


def run(host: Any, node_id: str, *sockets: Any, **inputs: Any) -> tuple[Any, ...]:
    return host.node(node_id).execute(*sockets, **inputs).args


def two_by_one(count: int = 1) -> Tensor:
    """A picture of 512 x 256, which is two tiles as it is."""
    return pictures(count, 256, 512).mul(255).round().div(255)


def side(index: int) -> Tensor:
    mask = torch.zeros(1, 256, 512)
    mask[..., 256 * index : 256 * index + 256] = 1
    return mask


# Tiles


@pytest.mark.parametrize("how", ["concat", "average"])
def test_tiles_are_a_chain_of_image_prompts_with_rectangles(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler, how: str
) -> None:
    """Several references: of each place, their tiles are combined."""
    image = two_by_one(2)
    found, tiles, masks = run(
        host,
        "IPAdapterTiled",
        *(model, adapter, image),
        clip_vision=vision,
        combine_embeds=how,
        **TILED,
    )
    assert torch.equal(tiles, torch.cat((image[:, :, :256], image[:, :, 256:])))
    assert torch.equal(masks, torch.cat((side(0), side(1))))
    chained = model
    for i in range(2):
        prompt = prompt_of(host, adapter, vision, image[:, :, 256 * i : 256 * i + 256], how=how)
        chained = put(host, chained, adapter, prompt, weight=0.8, mask=side(i))
    noise = draw(1, 4, 8, 16)
    assert_close(sample(found, noise=noise), sample(chained, noise=noise), relative=1e-4)


def test_overlaps_act_twice_as_before(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    """384 x 256: both tiles cover the middle third, where their masks sum to two."""
    image = torch.full((1, 256, 384, 3), 128 / 255)
    found, _, masks = run(
        host,
        "IPAdapterTiled",
        *(model, adapter, image),
        clip_vision=vision,
        combine_embeds="concat",
        **TILED,
    )
    total = torch.ones(256, 384)
    total[:, 128:256] = 2
    assert torch.equal(masks.sum(dim=0), total)
    prompt = prompt_of(host, adapter, vision, image)
    noise = draw(1, 4, 8, 12)
    plain = put(host, model, adapter, prompt, weight=0.8, mask=total[None])
    assert_close(sample(found, noise=noise), sample(plain, noise=noise), relative=1e-3)


def test_a_mask_is_cut_with_the_picture(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    """Its left half covers the left tile; of the right one nothing is left."""
    image = two_by_one()
    upper = torch.zeros(1, 256, 512)
    upper[:, :128, :256] = 1
    found, _, masks = run(
        host,
        "IPAdapterTiled",
        *(model, adapter, image),
        clip_vision=vision,
        combine_embeds="concat",
        attn_mask=upper,
        **TILED,
    )
    assert torch.equal(masks, torch.cat((upper, torch.zeros_like(upper))))
    prompt = prompt_of(host, adapter, vision, image[:, :, :256])
    noise = draw(1, 4, 8, 16)
    plain = put(host, model, adapter, prompt, weight=0.8, mask=upper)
    assert_close(sample(found, noise=noise), sample(plain, noise=noise), relative=1e-4)


def test_sharpening_acts_on_the_scaled_picture(host: Any, model: Any, adapter: Any) -> None:
    """512 x 300 becomes 436 x 256 first, by Pillow; the sharpened tiles are read and returned."""
    image = pictures(1, 300, 512)
    retouch = host.library("ip_adapter.retouch")
    levels = (image[0] * 255).byte().numpy()
    scaled = Image.fromarray(levels).resize((436, 256), Image.Resampling.LANCZOS)
    expected = retouch.sharpen(torch.tensor(np.array(scaled))[None] / 255, 0.4)
    tiles = run(
        host,
        "IPAdapterTiled",
        *(model, adapter, image),
        clip_vision=clip_vision(),
        combine_embeds="concat",
        **{**TILED, "sharpening": 0.4},
    )[1]
    assert torch.equal(tiles, torch.cat((expected[:, :, :256], expected[:, :, 180:])))


def test_every_picture_of_a_batch_has_tiles_and_a_weight_of_its_own(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    image, weights = two_by_one(2), [0.3, 1.2]
    found, tiles, _ = run(
        host,
        "IPAdapterTiledBatch",
        *(model, adapter, image),
        clip_vision=vision,
        encode_batch_size=1,
        **{**TILED, "weight": weights},
    )
    assert tiles.shape == (4, 256, 256, 3)
    noise = draw(3, 4, 8, 16)
    together = sample(found, noise=noise)
    for frame in range(3):
        own = min(frame, 1)  # the last reference serves the rest
        chained = model
        for i in range(2):
            part = image[own : own + 1, :, 256 * i : 256 * i + 256]
            prompt = prompt_of(host, adapter, vision, part)
            chained = put(host, chained, adapter, prompt, weight=weights[own], mask=side(i))
        alone = sample(chained, noise=noise[frame : frame + 1])
        assert_close(together[frame], alone[0], relative=1e-4)


def test_a_negative_picture_takes_the_place_of_no_image(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    image, negative = two_by_one(), pictures(1, 40, 40)
    found = run(
        host,
        "IPAdapterTiled",
        *(model, adapter, image),
        clip_vision=vision,
        combine_embeds="concat",
        image_negative=negative,
        **TILED,
    )[0]
    library = host.library("ip_adapter.prompt")
    chained = model
    for i in range(2):
        part = image[:, :, 256 * i : 256 * i + 256]
        prompt = library.from_tokens(
            project(host, adapter, image=features(adapter, vision, part)),
            project(host, adapter, image=features(adapter, vision, negative)),
            adapter.fingerprint,
            adapter.label,
        )
        chained = put(host, chained, adapter, prompt, weight=0.8, mask=side(i))
    noise = draw(1, 4, 8, 16)
    assert_close(sample(found, noise=noise), sample(chained, noise=noise), relative=1e-4)


def test_without_an_encoder_it_says_what_to_connect(host: Any, model: Any, adapter: Any) -> None:
    with pytest.raises(Exception, match="clip_vision is not connected"):
        run(
            host,
            "IPAdapterTiled",
            *(model, adapter, two_by_one()),
            combine_embeds="concat",
            **TILED,
        )


# Regions


def params_of(host: Any, image: Tensor | None, mask: Tensor | None, **inputs: Any) -> Any:
    given: dict[str, Any] = {
        "image_weight": 0.8,
        "prompt_weight": 1.0,
        "weight_type": "linear",
        "start_at": 0.0,
        "end_at": 1.0,
        **inputs,
    }
    return run(host, "IPAdapterRegionalConditioning", image, mask=mask, **given)


@pytest.mark.parametrize("how", ["concat", "average"])
def test_regions_are_a_chain_of_image_prompts(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler, how: str
) -> None:
    left, right, everywhere = pictures(2), 1 - pictures(1, 30, 60), pictures(1, 64, 20)
    parts = [
        (left, side(0), {"image_weight": 0.5}),
        (right, side(1), {"weight_type": "style transfer", "start_at": 0.2}),
        (everywhere, None, {"image_weight": [0.3, 0.9], "end_at": 0.6}),
    ]
    given = [params_of(host, image, mask, **more)[0] for image, mask, more in parts]
    pair = run(host, "IPAdapterCombineParams", *given[:2])[0]
    combined = run(host, "IPAdapterCombineParams", pair, given[2])[0]
    found = run(
        host,
        "IPAdapterFromParams",
        *(model, adapter, combined, how, "V only"),
        clip_vision=vision,
    )[0]
    influence = host.library("ip_adapter.influence").Influence
    chained = put(
        host,
        model,
        adapter,
        prompt_of(host, adapter, vision, left, how=how),
        weight=0.5,
        mask=side(0),
    )
    chained = put(
        host,
        chained,
        adapter,
        prompt_of(host, adapter, vision, right),
        mask=side(1),
        influence=influence(0.8, "style transfer", start=0.2),
    )
    chained = put(  # of a list of weights the first
        host, chained, adapter, prompt_of(host, adapter, vision, everywhere), weight=0.3, end=0.6
    )
    noise = draw(1, 4, 8, 12)
    expected = sample(chained, noise=noise, steps=3)
    assert_close(sample(found, noise=noise, steps=3), expected, relative=1e-4)
    assert relative_error(sample(model, noise=noise, steps=3), expected) > 1e-3


def test_texts_are_restricted_as_the_host_does_it(host: Any) -> None:
    mask = side(0)
    params, positive, negative = params_of(
        host, pictures(1), mask, prompt_weight=0.6, positive=text(1), negative=text(2)
    )
    for found, given in ((positive, text(1)), (negative, text(2))):
        expected = host.nodes.ConditioningSetMask().append(given, mask, "default", 0.6)[0]
        assert found[0][1].keys() == expected[0][1].keys()
        assert torch.equal(found[0][1]["mask"], expected[0][1]["mask"])
        assert found[0][1]["mask_strength"] == 0.6
        assert found[0][1]["set_area_to_bounds"] is False
    assert params["attn_mask"] == [mask]


def test_without_a_mask_texts_stay_as_they_are(host: Any) -> None:
    given = text(1)
    _, positive, negative = params_of(host, pictures(1), None, prompt_weight=0.6, positive=given)
    assert positive is given and negative is None


def test_up_to_five_are_combined_in_order(host: Any) -> None:
    given = [params_of(host, pictures(1), None, image_weight=float(i))[0] for i in range(5)]
    combined = run(host, "IPAdapterCombineParams", *given)[0]
    assert combined["weight"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert all(len(values) == 5 for values in combined.values())
    some = run(host, "IPAdapterCombineParams", given[0], given[1], params_5=given[4])[0]
    assert some["weight"] == [0.0, 1.0, 4.0]
    assert all(len(one["image"]) == 1 for one in given)


def test_other_packs_may_take_it_apart_and_put_it_together(
    host: Any, model: Any, adapter: Any, vision: Any, sample: Sampler
) -> None:
    """They know a dictionary of lists by these keys, and leave a picture out by None."""
    image = pictures(1)
    assert list(params_of(host, image, None)[0]) == [
        *("image", "attn_mask", "weight", "weight_type", "start_at", "end_at")
    ]
    theirs = {
        "image": [None, image],
        "attn_mask": [None, None],
        "weight": [1.0, 0.8],
        "weight_type": ["linear", "linear"],
        "start_at": [0.0, 0.0],
        "end_at": [1.0, 1.0],
        "unknown": 3,
    }
    found = run(
        host,
        "IPAdapterFromParams",
        *(model, adapter, theirs, "concat", "V only"),
        clip_vision=vision,
    )[0]
    plain = put(host, model, adapter, prompt_of(host, adapter, vision, image), weight=0.8)
    assert_close(sample(found), sample(plain), relative=1e-4)
    theirs["image"] = [None, None]
    nothing = run(
        host,
        "IPAdapterFromParams",
        *(model, adapter, theirs, "concat", "V only"),
        clip_vision=vision,
    )[0]
    assert nothing is not model and torch.equal(sample(nothing), sample(model))


@pytest.mark.parametrize("wrong", [7, {"image": [1]}, {"image": 1}])
def test_what_is_no_params_is_refused(host: Any, wrong: Any) -> None:
    good = params_of(host, pictures(1), None)[0]
    with pytest.raises(Exception, match="Connect IPAdapter Regional Conditioning"):
        run(host, "IPAdapterCombineParams", good, wrong)
    with pytest.raises(Exception, match="equally long lists"):
        run(host, "IPAdapterCombineParams", good, {**good, "weight": [1.0, 2.0]})
