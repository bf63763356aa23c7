"""Measure where old node ids differ from ComfyUI_IPAdapter_plus: the table of docs/migration.md.

The old pack's side is its formulas (`tests.parity.old_pack`), ours the nodes under the same ids, on
a narrow UNet with the layers of SD 1.5 or SDXL and an adapter and an image encoder with random
weights. The figures say how large a difference can be, not what it looks like.

    python -m scripts.migration
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests import host_process
from tests.parity import old_pack, unets
from tests.parity.old_pack import KINDS, SCALINGS, SIDE, Applied, File, Strength
from tests.synthetic import adapters, catalogue

ADVANCED: dict[str, Any] = {
    "weight_type": "linear",
    "combine_embeds": "concat",
    "start_at": 0.0,
    "end_at": 1.0,
    "embeds_scaling": "V only",
}
CONTEXT = {"SD 1.5": 768, "SDXL": 2048}
MASKED = {"512 x 512": (64, 64), "1024 x 568": (71, 128), "560 x 608": (76, 70)}
"""Width and height of a picture in pixels -> height and width of its latent."""


def pictures(count: int, seed: int = 5) -> Tensor:
    """Random pictures of the encoder's size."""
    return torch.rand(count, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    """Distance relative to the length of what is expected."""
    return float((found - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Bench:
    """A UNet of a family, and one adapter file on both sides.

    Attributes:
        family: "SD 1.5" or "SDXL".
        is_plus: Whether the adapter reads hidden states.
    """

    family: str
    is_plus: bool = False

    @cached_property
    def _parts(self) -> tuple[Any, Any, File]:
        with torch.no_grad():
            model = unets.pair(self.family).model
            widths = catalogue.widths(self.family, nano=True)
            context = CONTEXT[self.family]
            if self.is_plus:
                tensors = adapters.plus_sd15(
                    widths, 3, features=old_pack.HIDDEN, inner=64, heads=1, context=context
                )
            else:
                tensors = adapters.base_sd15(widths, 3, features=old_pack.POOLED, context=context)
            with tempfile.TemporaryDirectory() as folder:
                path = adapters.write_safetensors(tensors, Path(folder) / "adapter.safetensors")
                return model, unets.load(path), File.of(tensors, old_pack.tower())

    @property
    def model(self) -> Any:
        """The host's MODEL without an adapter."""
        return self._parts[0]

    @property
    def adapter(self) -> Any:
        """The adapter as the new loaders give it."""
        return self._parts[1]

    @property
    def file(self) -> File:
        """The same in plain formulas."""
        return self._parts[2]

    def predict(self, model: Any, size: tuple[int, int] = (8, 8)) -> Tensor:
        """The guided noise of one step."""
        return unets.predict(model, unets.inputs(self.family, size))

    def ours(self, image: Tensor, model: Any = None, weight: float = 1.0, **changes: Any) -> Any:
        """IPAdapter Advanced, as this pack has it."""
        with torch.inference_mode():
            return (
                host_process.start()
                .node("IPAdapterAdvanced")
                .execute(
                    model=model or self.model,
                    ipadapter=self.adapter,
                    clip_vision=self.file.vision,
                    image=image,
                    weight=weight,
                    **{**ADVANCED, **changes},
                )
                .args[0]
            )

    def applied(self, image: Tensor, *, weight: float = 1.0, **changes: Any) -> Applied:
        """What the old pack's apply node puts on a model."""
        return self.file.apply(self.file.see(image), Strength(weight, **changes))

    def old(self, *applied: Applied, middle: bool = False) -> Any:
        """The old pack's MODEL, in which the middle block gets no image."""
        return old_pack.install(self.model, applied, self.family, middle=middle)


Figures = tuple[str, str]
"""The old pack's and ours."""


def percent(value: float) -> str:
    """0.123 -> 12 %."""
    if value == 0:
        return "0"
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def add_in_place(upstream: Any, applied: Applied) -> Any:
    """Another adapter on a clone, as the old pack does it: by a list that all clones share."""
    clone = upstream.clone()
    for slot in clone.model_options["transformer_options"]["patches_replace"]["attn2"].values():
        slot.applied.append(applied)
    return clone


def leak(bench: Bench) -> Figures:
    """How much the branch with one adapter changes when a second is put on its clone."""
    first, second = pictures(1), pictures(1, seed=6)
    upstream = bench.old(bench.applied(first))
    before = bench.predict(upstream)
    add_in_place(upstream, bench.applied(second))
    theirs = relative(bench.predict(upstream), before)
    upstream = bench.ours(first)
    before = bench.predict(upstream)
    bench.ours(second, upstream)
    return percent(theirs), percent(relative(bench.predict(upstream), before))


def requeue(bench: Bench) -> Figures:
    """How far the second run is from a fresh one after the second adapter's weight changed."""
    first, second = pictures(1), pictures(1, seed=6)
    right = bench.predict(bench.old(bench.applied(first), bench.applied(second, weight=0.3)))
    upstream = bench.old(bench.applied(first))
    add_in_place(upstream, bench.applied(second))
    again = add_in_place(upstream, bench.applied(second, weight=0.3))
    theirs = relative(bench.predict(again), right)
    fresh = bench.predict(bench.ours(second, bench.ours(first), 0.3))
    upstream = bench.ours(first)
    bench.ours(second, upstream)
    return percent(theirs), percent(
        relative(bench.predict(bench.ours(second, upstream, 0.3)), fresh)
    )


def middle(bench: Bench, kind: str = "linear") -> Figures:
    """The part of the adapter's effect that is missing."""
    image, bare = pictures(1), bench.predict(bench.model)
    one = bench.applied(image, kind=kind)
    whole = bench.predict(bench.old(one, middle=True))
    effect = float((whole - bare).norm())
    theirs = float((bench.predict(bench.old(one)) - whole).norm()) / effect
    found = bench.predict(bench.ours(image, weight_type=kind))
    return percent(theirs), percent(_noise(float((found - whole).norm()) / effect))


def _noise(value: float) -> float:
    """Rounding counts for nothing."""
    return 0.0 if value < 1e-4 else value


def fold(vectors: Tensor, side: int) -> Tensor:
    """The old pack's pooling of embeddings ``[k*k, E]``: folded, stitched, averaged."""
    grid = math.isqrt(len(vectors))
    squares = vectors.reshape(grid, grid, side, side)
    stitched = squares.transpose(1, 2).reshape(1, 1, grid * side, grid * side)
    return F.adaptive_avg_pool2d(stitched, side).flatten()


def enhancer(_: Bench) -> Figures:
    """Cosine with the mean of four tiles' embeddings, which are 0.7 alike, as ViT-H's width."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1024, generator=generator)
    tiles = 0.7**0.5 * shared + 0.3**0.5 * torch.randn(4, 1024, generator=generator)
    mean = tiles.mean(0)
    merged = host_process.start().library("ip_adapter.enhance").merge(tiles, 2)[0]
    similar = torch.nn.functional.cosine_similarity
    return f"{similar(fold(tiles, 32), mean, 0):.2f}", f"{similar(merged, mean, 0):.2f}"


def enhancer_widths(_: Bench) -> Figures:
    """Of the widths of ViT-H, bigG and CLIP-L those that work."""
    merge = host_process.start().library("ip_adapter.enhance").merge
    found: tuple[list[str], list[str]] = ([], [])
    for width in (1024, 1280, 768):
        tiles = torch.ones(4, width)
        if math.isqrt(width) ** 2 == width:
            found[0].append(str(width))
        if merge(tiles, 2).shape == (1, width):
            found[1].append(str(width))
    return ", ".join(found[0]), ", ".join(found[1])


def _grids(latent: tuple[int, int]) -> list[tuple[int, int]]:
    """The token grids of SD 1.5's layers: each level halves the one before, rounding up."""
    found = [latent]
    for _ in range(3):
        found.append((-(-found[-1][0] // 2), -(-found[-1][1] // 2)))
    return found


def misplaced(latent: tuple[int, int]) -> Figures:
    """The part of a mask's weight that falls in the wrong place, in the worst layer."""
    mask = torch.zeros(1, 8 * latent[0], 8 * latent[1])
    mask[:, :, : 4 * latent[1]] = 1
    masks = host_process.start().library("ip_adapter.masks")
    worst = [0.0, 0.0]
    for height, width in _grids(latent):
        right = old_pack.shrink(mask, height, width).flatten()
        theirs = old_pack.on_tokens(mask, latent, height * width, "guessed")[0]
        ours = masks.to_tokens(masks.to_latent(mask, *latent), height, width)[0, :, 0]
        for side, found in enumerate((theirs, ours)):
            wrong = float((found - right).abs().sum() / right.sum() / 2)
            worst[side] = max(worst[side], wrong)
    return percent(_noise(worst[0])), percent(_noise(worst[1]))


def wrong_sizes(_: Bench) -> Figures:
    """Of the sizes from 512 to 1920 pixels in steps of 8, those with a wrong grid somewhere."""
    sides = range(512 // 8, 1920 // 8 + 1)
    wrong = 0
    for latent in ((height, width) for height in sides for width in sides):
        grids = _grids(latent)[1:]
        wrong += any(old_pack.guessed_grid(latent, h * w) != (h, w) for h, w in grids)
    return f"{wrong} of {len(sides) ** 2}", "0, as the host says it"


def round_mask(bench: Bench) -> Figures:
    """How far a mask with a round edge is from the mean over each token, at a good size."""
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    mask = (((rows - 120) ** 2 + (columns - 140) ** 2) < 90**2).float()[None]
    image, size = pictures(1), (32, 32)
    one = bench.applied(image, mask=mask)
    right = bench.predict(bench.old(one, middle=True), size)
    sampled = bench.old(replace(one, mask_rule="guessed"), middle=True)
    found = bench.predict(bench.ours(image, attn_mask=mask), size)
    theirs = relative(bench.predict(sampled, size), right)
    return percent(theirs), percent(_noise(relative(found, right)))


def negatives(bench: Bench) -> Figures:
    """Tokens of the black picture against those of the zero picture; ours with old ids."""
    _, trained, black = _no_images(bench)
    prompt = host_process.start().library("ip_adapter.legacy.calls")
    with torch.inference_mode():
        features = bench.file.see(pictures(1))
        ours = prompt.encode(bench.adapter, bench.file.vision, features).unconditional
    return percent(relative(black, trained)), percent(relative(ours, trained))


def negatives_latent(bench: Bench) -> Figures:
    """The prediction with the black picture against that with the zero picture."""
    grey, _, _ = _no_images(bench)
    image = pictures(1)
    features = bench.file.see(image)
    trained = bench.file.apply(features, Strength(), negative=grey)
    right = bench.predict(bench.old(trained, middle=True))
    black = bench.predict(bench.old(bench.file.apply(features, Strength()), middle=True))
    return percent(relative(black, right)), percent(
        relative(bench.predict(bench.ours(image)), right)
    )


def _no_images(bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the zero picture; tokens of it and of the black one."""
    with torch.no_grad():
        zero = torch.zeros(1, 3, SIDE, SIDE)
        grey = bench.file.vision.model(pixel_values=zero, intermediate_output=-2)[1].float()
        black = bench.file.see(torch.zeros(1, SIDE, SIDE, 3))
        return grey, bench.file.tokens(grey), bench.file.tokens(black)


def agreement(bench: Bench) -> Figures:
    """The largest error over every weight type and scaling, the middle block aside."""
    image, worst = pictures(2), 0.0
    for kind in KINDS:
        for scaling in SCALINGS if bench.family == "SD 1.5" else SCALINGS[::3]:
            one = bench.applied(image, weight=0.8, kind=kind, scaling=scaling, composition=1.0)
            expected = bench.predict(bench.old(one, middle=True))
            found = bench.ours(image, weight=0.8, weight_type=kind, embeds_scaling=scaling)
            worst = max(worst, relative(bench.predict(found), expected))
    return "", f"{worst:.0e}"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: What is measured.
        measure: How.
        family: On which layers.
        is_plus: With which adapter.
        is_slow: Whether the test of the page leaves it out.
    """

    title: str
    measure: Callable[[Bench], Figures]
    family: str = "SD 1.5"
    is_plus: bool = False
    is_slow: bool = False


ROWS = (
    Row("a second adapter on a clone changes the branch it was cloned from by", leak),
    Row("the same queued again with another weight is off by", requeue),
    Row("the adapter's effect that is missing without the middle block, SD 1.5", middle),
    Row(
        "the adapter's effect that is missing without the middle block, SDXL",
        middle,
        family="SDXL",
        is_slow=True,
    ),
    Row(
        "the same for weight type *strong middle*, SD 1.5",
        lambda bench: middle(bench, "strong middle"),
    ),
    Row("enhancer: widths of pooled embeddings that work", enhancer_widths),
    Row("enhancer: cosine of the merged embedding with the mean of the tiles'", enhancer),
    Row("sizes from 512 to 1920 at which a mask's grid is wrong in some layer", wrong_sizes),
    *(
        Row(
            f"mask of the left half, {name}: weight in the wrong place, worst layer",
            lambda _, latent=latent: misplaced(latent),  # type: ignore[misc]
        )
        for name, latent in MASKED.items()
    ),
    Row("mask with a round edge, 256 x 256: prediction is off by", round_mask),
    Row("*plus*: tokens of no image differ from those of training by", negatives, is_plus=True),
    Row("*plus*: prediction differs from that with training's by", negatives_latent, is_plus=True),
    Row(
        "the rest: largest difference over weight types and scalings, SD 1.5",
        agreement,
        is_slow=True,
    ),
    Row(
        "the rest: largest difference over weight types and scalings, SDXL",
        agreement,
        family="SDXL",
        is_slow=True,
    ),
)


def measure(rows: Iterable[Row] = ROWS) -> dict[str, Figures]:
    """The figures by title."""
    torch.set_num_threads(1)  # the kernels are so small that a second thread costs time
    benches: dict[tuple[str, bool], Bench] = {}
    found = {}
    with torch.no_grad():
        for row in rows:
            key = (row.family, row.is_plus)
            found[row.title] = row.measure(benches.setdefault(key, Bench(*key)))
    return found


if __name__ == "__main__":
    print("| measured | old pack | this pack |\n|---|---|---|")
    for title, figures in measure().items():
        print(f"| {title} | {figures[0]} | {figures[1]} |")
