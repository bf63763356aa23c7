"""The old node ids against the old pack's formulas, on the real layer plans of SD 1.5 and SDXL.

One denoising prediction, or a short sampling, of a narrow UNet in the real host: once through the
old node, once with `old_pack`'s plain attention in every attn2 slot. Both sides see the features of
the same small image tower, read by the host's own `encode_image`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import host_process
from tests.parity import old_pack, old_tiles, unets
from tests.parity.old_pack import KINDS, SCALINGS, SIDE, Applied, File, Strength
from tests.synthetic import adapters, catalogue
from tests.tolerance import relative_error

pytestmark = [pytest.mark.parity, pytest.mark.host]

FAMILIES = ("SD 1.5", "SDXL")
CONTEXT = {"SD 1.5": 768, "SDXL": 2048}
ODD = {"9 x 13": (9, 13), "8 x 22": (8, 22), "6 x 7": (6, 7)}
"""Latents (height, width) that do not halve evenly, or are far from square.

The old pack takes the 2 x 2 tokens of the last one, where it is halved twice, for 1 x 4.
"""


@dataclass(frozen=True)
class Side:
    """A family: the UNet, the adapter in our hands and the same file in plain ones."""

    pair: unets.Pair
    adapter: Any
    file: File
    known: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.pair.family

    def predict(self, model: Any, size: tuple[int, int] = (8, 8), count: int = 1) -> Tensor:
        given = replace(unets.inputs(self.family, size), x=unets.draw(count, 4, *size, seed=11))
        return unets.predict(model, given)

    def bare(self, size: tuple[int, int] = (8, 8), count: int = 1) -> Tensor:
        """Without any adapter; computed once."""
        if (size, count) not in self.known:
            self.known[size, count] = self.predict(self.pair.model, size, count)
        return self.known[size, count]

    def old(self, *applied: Applied) -> Any:
        return old_pack.install(self.pair.model, applied, self.family)

    def run(self, node: str, model: Any = None, **inputs: Any) -> Any:
        """The node's MODEL."""
        return execute(
            node,
            model=model or self.pair.model,
            ipadapter=self.adapter,
            clip_vision=self.file.vision,
            **inputs,
        )[0]


def execute(node: str, **inputs: Any) -> tuple[Any, ...]:
    with torch.inference_mode():
        return host_process.start().node(node).execute(**inputs).args  # type: ignore[no-any-return]


def make(family: str, folder: Path, *, plus: bool = False) -> Side:
    torch.set_num_threads(1)
    pair = unets.pair(family)
    widths, context = catalogue.widths(family, nano=True), CONTEXT[family]
    if plus:
        tensors = adapters.plus_sd15(
            widths, 3, features=old_pack.HIDDEN, inner=64, heads=1, context=context
        )
    else:
        tensors = adapters.base_sd15(widths, 3, features=old_pack.POOLED, context=context)
    path = adapters.write_safetensors(tensors, folder / f"{family}{plus}.safetensors")
    return Side(pair, unets.load(path), File.of(tensors, old_pack.tower()))


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Side:
    with torch.no_grad():
        return make(request.param, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plus(tmp_path_factory: pytest.TempPathFactory) -> Side:
    with torch.no_grad():
        return make("SD 1.5", tmp_path_factory.mktemp("plus"), plus=True)


def pictures(count: int, seed: int = 5, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def ramp(height: int, width: int) -> Tensor:
    """A mask ``[1, H, W]``, black to the left, grey in the middle."""
    across = torch.linspace(-0.5, 1.5, width).clamp(0, 1).expand(height, width)
    down = torch.linspace(0.4, 1.0, height)[:, None]
    return (across * down)[None].contiguous()


PLAIN: dict[str, Any] = {
    "weight_type": "linear",
    "start_at": 0.0,
    "end_at": 1.0,
    "embeds_scaling": "V only",
}
"""What nearly all apply nodes ask for."""


def advanced(**changes: Any) -> dict[str, Any]:
    return {**PLAIN, "combine_embeds": "concat", **changes}


def check(found: Tensor, expected: Tensor, without: Tensor, name: str = "") -> None:
    """The same, and not because nothing happened."""
    assert found.shape == expected.shape
    error, effect = relative_error(found, expected), relative_error(without, expected)
    print(f"{name}: relative error {error:.1e}, effect {effect:.1e}")
    assert error < 1e-4, f"relative error {error:.3g}"
    assert effect > 1e-3, f"the adapter changes only {effect:.3g}"


# Which layers


@pytest.mark.parametrize("kind", KINDS)
def test_weight_types(base: Side, kind: str) -> None:
    """Each with two scalings. The layout has weight 1 in "style and composition", as it had."""
    image = pictures(1)
    features = base.file.see(image)
    without = base.bare()
    other = SCALINGS[1 + KINDS.index(kind) % 3]
    for scaling in ("V only", other):
        found = base.run(
            "IPAdapterAdvanced",
            image=image,
            weight=0.8,
            **advanced(weight_type=kind, embeds_scaling=scaling),
        )
        strength = Strength(0.8, kind, scaling, composition=1.0)
        expected = base.predict(base.old(base.file.apply(features, strength)))
        check(base.predict(found), expected, without, f"{base.family} {kind} {scaling}")


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("standard", "linear"),
        ("prompt is more important", "ease out"),
        ("style transfer", "style transfer"),
    ],
)
def test_the_simple_node(base: Side, label: str, kind: str) -> None:
    """It has no socket for the image encoder: that comes with the adapter."""
    image = pictures(1)
    found = execute(
        "IPAdapter",
        model=base.pair.model,
        ipadapter=replace(base.adapter, clip_vision=base.file.vision),
        image=image,
        weight=1.2,
        start_at=0.0,
        end_at=1.0,
        weight_type=label,
    )[0]
    expected = base.old(base.file.apply(base.file.see(image), Strength(1.2, kind)))
    check(base.predict(found), base.predict(expected), base.bare(), label)


@pytest.mark.parametrize(
    ("scaling", "weight"), list(zip(SCALINGS, [-0.7, 1.7, -0.4, -1.2], strict=True))
)
def test_scalings(base: Side, scaling: str, weight: float) -> None:
    image = pictures(2)
    found = base.run(
        "IPAdapterAdvanced", image=image, weight=weight, **advanced(embeds_scaling=scaling)
    )
    strength = Strength(weight, scaling=scaling)
    expected = base.old(base.file.apply(base.file.see(image), strength))
    without = base.bare()
    check(base.predict(found), base.predict(expected), without, f"{base.family} {scaling}")


def test_weight_zero_is_the_base_model(base: Side) -> None:
    for scaling in SCALINGS:
        found = base.run(
            "IPAdapterAdvanced",
            image=pictures(1),
            weight=0.0,
            **advanced(embeds_scaling=scaling),
        )
        assert torch.equal(base.predict(found), base.bare())


LAYER_WEIGHTS = {
    "linear": "0:0.3, 3:1.0,5:-0.4, 6:0.9",
    "style transfer precise": "2:0.5, 3:0.8, 4:0.3, 5:1.0, 6:0.9",
    "composition precise": "2:0.5, 3:0.8, 4:0.3, 5:1.0, 6:0.9",
}


@pytest.mark.parametrize("kind", LAYER_WEIGHTS)
def test_layer_weights(base: Side, kind: str) -> None:
    image, text = pictures(1), LAYER_WEIGHTS[kind]
    found = base.run(
        "IPAdapterMS",
        image=image,
        weight=0.9,
        weight_faceidv2=1.0,
        layer_weights=text,
        **advanced(weight_type=kind),
    )
    strength = Strength(0.9, kind, layer_weights=text)
    expected = base.old(base.file.apply(base.file.see(image), strength))
    check(base.predict(found), base.predict(expected), base.bare(), kind)


PRECISE: dict[str, tuple[str, dict[str, Any]]] = {
    "IPAdapterPreciseStyleTransfer": ("style transfer precise", {"style_boost": 1.4}),
    "IPAdapterPreciseComposition": ("composition precise", {"composition_boost": 0.6}),
}


@pytest.mark.parametrize("node", PRECISE)
@pytest.mark.parametrize("scaling", SCALINGS[::3])
def test_precise_nodes(base: Side, node: str, scaling: str) -> None:
    image, (kind, boost) = pictures(1), PRECISE[node]
    inputs = advanced(embeds_scaling=scaling)
    del inputs["weight_type"]
    found = base.run(node, image=image, weight=0.8, **boost, **inputs)
    strength = Strength(0.8, kind, scaling, **boost)
    expected = base.old(base.file.apply(base.file.see(image), strength))
    check(base.predict(found), base.predict(expected), base.bare(), node)


@pytest.mark.parametrize("base", ["SDXL"], indirect=True)  # the old node refuses SD 1.5
@pytest.mark.parametrize("expand", [False, True])
def test_style_of_one_picture_and_layout_of_another(base: Side, expand: bool) -> None:
    style, layout = pictures(2), pictures(2, seed=6)
    inputs = advanced(combine_embeds="average")
    del inputs["weight_type"]
    found = base.run(
        "IPAdapterStyleComposition",
        image_style=style,
        image_composition=layout,
        weight_style=0.9,
        weight_composition=1.3,
        expand_style=expand,
        **inputs,
    )
    kind = "strong style and composition" if expand else "style and composition"
    strength = Strength(0.9, kind, composition=1.3)
    features = base.file.see(style)
    one = base.file.apply(features, strength, how="average", layout=base.file.see(layout))
    check(base.predict(found), base.predict(base.old(one)), base.bare(), str(expand))


# Which references


@pytest.mark.parametrize("how", ["concat", "add", "subtract", "average", "norm average"])
def test_combinations(base: Side, how: str) -> None:
    image, negative = pictures(3), pictures(2, seed=9)
    found = base.run(
        "IPAdapterAdvanced",
        image=image,
        weight=0.9,
        image_negative=negative,
        **advanced(combine_embeds=how),
    )
    see = base.file.see
    one = base.file.apply(see(image), Strength(0.9), negative=see(negative), how=how)
    without = base.bare()
    check(base.predict(found), base.predict(base.old(one)), without, f"{base.family} {how}")


@pytest.mark.parametrize("how", ["concat", "norm average", "max", "min"])
def test_embeds(base: Side, how: str) -> None:
    """Encoder, Combine Embeds and Embeds in a row; max and min are there only."""
    image, positive, negative = pictures(3), [], None
    for row in range(3):
        encoded = execute(
            "IPAdapterEncoder",
            ipadapter=base.adapter,
            image=image[row : row + 1],
            weight=1.0 + row / 4,
            clip_vision=base.file.vision,
        )
        positive.append(encoded[0])
        negative = encoded[1]
    names = ("embed1", "embed2", "embed3")
    both = execute("IPAdapterCombineEmbeds", method=how, **dict(zip(names, positive, strict=True)))
    inputs = {**PLAIN, "pos_embed": both[0], "neg_embed": negative}
    found = base.run("IPAdapterEmbeds", weight=0.9, **inputs)
    weights = torch.tensor([1.0, 1.25, 1.5])[:, None]
    features = old_pack.combine(base.file.see(image) * weights, how)
    expected = base.old(base.file.apply(features, Strength(0.9)))
    check(base.predict(found), base.predict(expected), base.bare(), how)


@pytest.mark.parametrize("noise", ["fade", "dissolve", "gaussian", "shuffle"])
def test_noise_as_negative(plus: Side, noise: str) -> None:
    image = pictures(1)
    (negative,) = execute(
        "IPAdapterNoise", type=noise, strength=0.6, blur=3, image_optional=pictures(1, seed=8)
    )
    found = plus.run(
        "IPAdapterAdvanced", image=image, weight=0.9, image_negative=negative, **advanced()
    )
    see = plus.file.see
    expected = plus.old(plus.file.apply(see(image), Strength(0.9), negative=see(negative)))
    check(plus.predict(found), plus.predict(expected), plus.bare(), noise)
    black = plus.old(plus.file.apply(see(image), Strength(0.9)))
    assert relative_error(plus.predict(black), plus.predict(expected)) > 1e-3


def test_a_plus_adapter_leads_away_from_a_black_picture(plus: Side) -> None:
    image = pictures(2)
    found = plus.run("IPAdapterAdvanced", image=image, weight=0.9, **advanced())
    features = plus.file.see(image)
    expected = plus.predict(plus.old(plus.file.apply(features, Strength(0.9))))
    check(plus.predict(found), expected, plus.bare(), "black")
    zero = torch.zeros(1, 3, SIDE, SIDE)
    grey = plus.file.vision.model(pixel_values=zero, intermediate_output=-2)[1]
    trained = plus.old(plus.file.apply(features, Strength(0.9), negative=grey))
    assert relative_error(plus.predict(trained), expected) > 1e-3


# Where


@pytest.mark.parametrize(("size", "scaling"), list(zip(ODD, SCALINGS[::-1][:3], strict=True)))
def test_masks_at_odd_sizes(base: Side, size: str, scaling: str) -> None:
    """Averaged over the cells of the true grid; that the old pack guesses it is not kept."""
    height, width = ODD[size]
    image, mask = pictures(1), ramp(8 * height, 8 * width)
    found = base.run(
        "IPAdapterAdvanced",
        image=image,
        weight=1.0,
        attn_mask=mask,
        **advanced(embeds_scaling=scaling),
    )
    one = base.file.apply(base.file.see(image), Strength(1.0, scaling=scaling, mask=mask))
    expected = base.predict(base.old(one), (height, width))
    without = base.bare((height, width))
    check(base.predict(found, (height, width)), expected, without, f"{base.family} {size}")
    if size == "6 x 7" and base.family == "SDXL":  # in SD 1.5 the guess divides by zero
        guessed = base.old(replace(one, mask_rule="guessed"))
        assert relative_error(base.predict(guessed, (height, width)), expected) > 1e-2


@pytest.mark.parametrize("shape", [(128, 128), (32, 64)])
def test_masks_with_edges_on_the_token_grid_are_those_of_the_old_pack(
    base: Side, shape: tuple[int, int]
) -> None:
    """Where the guess is right and every token all in or all out, the old rule gives the same."""
    image, size = pictures(1), (16, 16)
    mask = torch.zeros(1, *shape)
    mask[:, :, shape[1] // 2 :] = 1
    found = base.run("IPAdapterAdvanced", image=image, weight=1.0, attn_mask=mask, **advanced())
    one = base.file.apply(base.file.see(image), Strength(mask=mask))
    expected = base.predict(base.old(replace(one, mask_rule="guessed")), size)
    check(base.predict(found, size), expected, base.bare(size), str(shape))


@pytest.mark.parametrize("shape", [(300, 290), (256, 600), (1500, 256)])
def test_tiles(base: Side, shape: tuple[int, int]) -> None:
    """Almost square, wide, and higher than four tiles; with a mask, at an odd latent size."""
    image, mask, size = pictures(1, height=shape[0], width=shape[1]), ramp(72, 104), (9, 13)
    inputs = advanced(embeds_scaling="K+V", weight_type="ease in")
    out = execute(
        "IPAdapterTiled",
        model=base.pair.model,
        ipadapter=base.adapter,
        clip_vision=base.file.vision,
        image=image,
        weight=0.7,
        sharpening=0.0,
        attn_mask=mask,
        **inputs,
    )
    cut = old_tiles.tiles(image, mask)
    assert out[1].shape[0] == len(cut) == {(300, 290): 4, (256, 600): 3, (1500, 256): 4}[shape]
    assert relative_error(out[1], torch.cat([tile for tile, _ in cut])) < 1e-6
    assert relative_error(out[2], torch.cat([place for _, place in cut])) < 1e-5
    strength = Strength(0.7, "ease in", "K+V")
    many = [
        base.file.apply(base.file.see(tile), replace(strength, mask=place)) for tile, place in cut
    ]
    expected = base.predict(base.old(*many), size)
    check(base.predict(out[0], size), expected, base.bare(size), str(shape))


# When, and for which picture of a batch


def denoise(side: Side, model: Any, steps: int, count: int = 1) -> Tensor:
    """A short sampling with guidance."""
    import comfy.sample

    given = unets.inputs(side.family, (8, 8))

    def conditioning(row: int) -> list[Any]:
        pooled = None if given.pooled is None else given.pooled[row : row + 1]
        extra = {} if pooled is None else {"pooled_output": pooled}
        return [[given.text[row : row + 1], extra]]

    noise = unets.draw(count, 4, 8, 8, seed=21)
    with torch.inference_mode():
        return comfy.sample.sample(  # type: ignore[no-any-return]
            model,
            noise,
            steps,
            4.0,
            "euler",
            "sgm_uniform",
            conditioning(1),
            conditioning(0),
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )


@pytest.mark.parametrize("window", [(0.0, 0.3), (0.3, 1.0), (0.6, 0.6)])
def test_windows(base: Side, window: tuple[float, float]) -> None:
    image, (start, end) = pictures(1), window
    found = base.run(
        "IPAdapterAdvanced", image=image, weight=1.0, **advanced(start_at=start, end_at=end)
    )
    one = base.file.apply(base.file.see(image), Strength(start=start, end=end))
    expected = denoise(base, base.old(one), 2)
    if start == end:  # the steps are at 0 and at a half
        assert torch.equal(denoise(base, found, 2), denoise(base, base.pair.model, 2))
        assert relative_error(denoise(base, found, 2), expected) < 1e-4
        return
    check(denoise(base, found, 2), expected, denoise(base, base.pair.model, 2), str(window))


@pytest.mark.parametrize(
    ("scaling", "kind"),
    list(zip(SCALINGS, ("ease in-out", "style transfer precise") * 2, strict=True)),
)
def test_weights_by_frame(base: Side, scaling: str, kind: str) -> None:
    """Two references and two weights for a batch of three: the last ones serve the others."""
    image, weights = pictures(2), [0.4, -0.8]
    found = base.run(
        "IPAdapterBatch",
        image=image,
        weight=weights,
        encode_batch_size=0,
        **{**PLAIN, "weight_type": kind, "embeds_scaling": scaling},
    )
    strength = Strength(weights, kind, scaling)
    one = base.file.apply(base.file.see(image), strength, by_frame=True)
    expected = base.predict(base.old(one), count=3)
    without = base.bare(count=3)
    check(base.predict(found, count=3), expected, without, f"{base.family} {scaling} {kind}")


def test_a_list_counts_by_its_first_weight_elsewhere(base: Side) -> None:
    image = pictures(2)
    found = base.run("IPAdapterAdvanced", image=image, weight=[0.6, 5.0], **advanced())
    one = base.file.apply(base.file.see(image), Strength(0.6))
    expected = base.predict(base.old(one), count=2)
    without = base.bare(count=2)
    check(base.predict(found, count=2), expected, without, base.family)


def test_masks_and_negatives_by_frame(base: Side) -> None:
    image, negative = pictures(3), pictures(2, seed=9)
    mask = torch.cat((ramp(72, 104), 1 - ramp(72, 104)))
    found = base.run(
        "IPAdapterBatch",
        image=image,
        weight=[1.0, 0.5, 0.0],
        encode_batch_size=1,
        image_negative=negative,
        attn_mask=mask,
        **PLAIN,
    )
    see = base.file.see
    strength = Strength([1.0, 0.5, 0.0], mask=mask)
    one = base.file.apply(see(image), strength, negative=see(negative), by_frame=True)
    expected = base.predict(base.old(one), (9, 13), count=3)
    without = base.bare((9, 13), count=3)
    check(base.predict(found, (9, 13), count=3), expected, without, base.family)


def test_two_nodes_on_one_model_over_a_batch(base: Side) -> None:
    """Each with its own pictures, layers, scaling, window and mask."""
    first, second, mask = pictures(2), pictures(3, seed=6), ramp(64, 64)
    model = base.run(
        "IPAdapterAdvanced",
        image=first,
        weight=0.8,
        attn_mask=mask,
        **advanced(embeds_scaling="K+V", end_at=0.6),
    )
    found = base.run(
        "IPAdapterBatch",
        model=model,
        image=second,
        weight=0.7,
        encode_batch_size=0,
        **{**PLAIN, "weight_type": "composition", "start_at": 0.4},
    )
    applied = (
        base.file.apply(base.file.see(first), Strength(0.8, scaling="K+V", end=0.6, mask=mask)),
        base.file.apply(
            base.file.see(second), Strength(0.7, "composition", start=0.4), by_frame=True
        ),
    )
    expected = denoise(base, base.old(*applied), 2, count=2)
    without = denoise(base, base.pair.model, 2, count=2)
    check(denoise(base, found, 2, count=2), expected, without, base.family)
