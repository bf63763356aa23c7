"""Recording where image prompts act while a MODEL samples, for `maps`.

A `Recorder` travels in the options of a MODEL, as image prompts do, so it may be put there before
or after them. Each sampling makes a `Recording`; a `Slot` shows it what its layer got and said.
Everything is added up on the device, and read when the sampling is over. A MODEL without a recorder
does nothing of this.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from torch import Tensor

from .. import maps
from ..errors import IncompatibleModelError
from ..layers import Address, Block
from ..maps import Area, Grid, Group, Maps
from .branch import Branch, Chunk
from .run import Entry
from .unet import HostLayer

log = logging.getLogger(__name__)

KEY = "image_prompts.recorder"
"""Under this name a MODEL carries its recorder in the transformer options."""

STRETCHES = 10
"""A schedule of more steps has several of them in one map."""

_KEPT = 4
"""Samplings that a recorder keeps, the latest: one MODEL may serve several samplers."""

_PROBES = 4096
"""Numbers of a sampler's result by which it is known again."""

_NAMES: dict[Block, str] = {"input": "down", "middle": "middle", "output": "up"}

Witness = Callable[[Tensor, Tensor, Sequence[Branch], dict[str, Any]], None]
"""Gets a layer's text attention and query, the image prompts in it, and the host's options."""


class Recorder:
    """What travels on an ATTENTION_MAPS socket: the maps of the latest samplings of a MODEL.

    Args:
        picture: Number of the picture in the batch whose maps are wanted; the last one if there
            are fewer.
    """

    def __init__(self, picture: int = 0) -> None:
        self.picture = picture
        self._kept: deque[tuple[Tensor, Maps]] = deque(maxlen=_KEPT)

    def __deepcopy__(self, memo: object) -> Recorder:
        return self

    def keep(self, recorded: Maps, latent: Tensor) -> None:
        """Keep the maps of a sampling with what it made."""
        self._kept.append((_probe(latent), recorded))

    def find(self, latent: Tensor) -> Maps:
        """The maps of the sampling that made a latent; the latest where none is known to have.

        Args:
            latent: ``[B, C, h, w]``.

        Raises:
            IncompatibleModelError: Nothing was recorded.
        """
        if not self._kept:
            raise IncompatibleModelError(
                "No attention maps were recorded. Needed is a MODEL with an image prompt, from "
                "Record Attention Maps to the sampler; connect that sampler's latent to Show "
                "Attention Maps, so that it waits for it."
            )
        wanted = _probe(latent)
        same = [
            (float((probe - wanted).abs().mean()), -age, found)
            for age, (probe, found) in enumerate(self._kept)
            if probe.shape == wanted.shape
            and torch.allclose(probe, wanted, rtol=0.02, atol=0.02)  # half precision in between
        ]
        if not same:
            log.warning(
                "IP-Adapter: the latent at Show Attention Maps is of no sampling that was "
                "recorded; shown is the latest one"
            )
            return self._kept[-1][1]
        return min(same, key=lambda one: one[:2])[2]


def record(model: Any, picture: int = 0) -> tuple[Any, Recorder]:
    """Have a clone of a MODEL record where its image prompts act.

    Args:
        model: The host's MODEL; it is not changed. Image prompts may be applied before or after.
        picture: See `Recorder`.
    """
    recorder = Recorder(picture)
    recorded = model.clone()
    options = recorded.model_options["transformer_options"]
    recorded.model_options["transformer_options"] = {**options, KEY: recorder}
    return recorded, recorder


def start(
    options: Mapping[str, Any],
    entries: Sequence[Entry],
    layers: Mapping[Address, HostLayer],
    patcher: Any,
    sigmas: Tensor,
    shape: Sequence[int],
) -> Recording | None:
    """A sampling begins; see `Recording`.

    Args:
        options: The transformer options of the MODEL that runs.
        entries: See `Recording`.
        layers: See `Recording`.
        patcher: See `Recording`.
        sigmas: See `Recording`.
        shape: See `Recording`.

    Returns:
        None where nothing is to be recorded.
    """
    recorder: Recorder | None = options.get(KEY)
    if recorder is None:
        return None
    return Recording(recorder, entries, layers, patcher, sigmas, shape)


class Recording:
    """One sampling.

    Args:
        recorder: Who wants it.
        entries: What is applied to the model, in order.
        layers: The model's cross-attention layers by address.
        patcher: The MODEL that runs.
        sigmas: ``[steps + 1]``, the noise levels at the start of each step and at the end.
        shape: Of the noise, ``[B, C, h, w]``.
    """

    def __init__(
        self,
        recorder: Recorder,
        entries: Sequence[Entry],
        layers: Mapping[Address, HostLayer],
        patcher: Any,
        sigmas: Tensor,
        shape: Sequence[int],
    ) -> None:
        self.picture = min(recorder.picture, shape[0] - 1)
        self.is_complete = True
        self._recorder = recorder
        self._latent: Grid = (shape[-2], shape[-1])
        self._labels = [entry.adapter.path.stem for entry in entries]
        self._counts = [count_references(entry) for entry in entries]
        self._lengths = [entry.adapter.spec.projection.tokens for entry in entries]
        self._levels = sigmas[:-1].tolist() or [0.0]
        self._stretches = maps.stretches(len(self._levels), STRETCHES)
        groups, self._group_of = _groups(layers, patcher, self._latent)
        self.sums = maps.Sums(groups, sum(self._counts), len(self._stretches), self._latent)

    def begin(self, chunks: Sequence[Chunk], sigma: Tensor) -> Pass | None:
        """A forward pass begins.

        Args:
            chunks: What its rows are.
            sigma: ``[B]``, the noise level; it is read.

        Returns:
            Who watches its layers; None where it does not make the wanted picture.
        """
        rows: list[tuple[int, Area | None]] = []
        first = 0
        for chunk in chunks:
            if chunk.is_positive and self.picture in chunk.frames:
                area = chunk.area
                known = (area[0], area[1], area[2], area[3]) if area else None
                rows.append((first + chunk.frames.index(self.picture), known))
            first += len(chunk.frames)
        if not rows:
            return None
        step = self._stretch(float(sigma.max()))
        for _, area in rows:
            self.sums.begin(step, area)
        return Pass(self, tuple(rows), first, step)

    def finish(self, latent: Tensor) -> None:
        """The sampling is over; the recorder keeps the maps."""
        if not self.is_complete:
            log.warning(
                "IP-Adapter: the attention maps are not complete, because another node pack cuts "
                "the picture up behind the sampler's back (a tiled sampler, for example)"
            )
        numbers = range(1, len(self._counts) + 1)
        names = [
            (f"{number}.{part + 1}" if count > 1 else str(number), label)
            for number, count, label in zip(numbers, self._counts, self._labels, strict=True)
            for part in range(count)
        ]
        found = Maps(
            references=tuple(name for name, _ in names),
            labels=tuple(label for _, label in names),
            groups=self.sums.groups,
            steps=self._stretches,
            means=self.sums.means(),
            latent=self._latent,
            picture=self.picture,
        )
        self._recorder.keep(found, latent)

    def references(self, entry: int) -> tuple[int, int, int]:
        """Of an entry's references: the first one's number, how many, and the tokens of each."""
        return sum(self._counts[:entry]), self._counts[entry], self._lengths[entry]

    def group(self, address: Address) -> int:
        """The number of a layer's group."""
        return self._group_of[address]

    def _stretch(self, sigma: float) -> int:
        """The stretch whose steps begin at a noise level, or near it: samplers look ahead."""
        levels = self._levels
        step = min(range(len(levels)), key=lambda number: abs(levels[number] - sigma)) + 1
        return next(n for n, (_, last) in enumerate(self._stretches) if step <= last)


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass that makes the wanted picture.

    Attributes:
        recording: The sampling.
        rows: Which rows of the batch are the picture's, and the part of it that each sees.
        announced: The number of all rows.
        step: The stretch of the schedule.
    """

    recording: Recording
    rows: tuple[tuple[int, Area | None], ...]
    announced: int
    step: int

    def at(self, address: Address) -> Witness:
        """Who watches a layer."""
        return partial(self.see, address)

    def see(
        self,
        address: Address,
        text: Tensor,
        query: Tensor,
        branches: Sequence[Branch],
        options: dict[str, Any],
    ) -> None:
        """Add up what the image prompts do in a layer.

        Args:
            address: Of the layer.
            text: ``[B, L, C]``, the result of its text attention.
            query: ``[B, L, C]``.
            branches: The image prompts.
            options: What the host says of the call.
        """
        recording = self.recording
        grid = tuple(options["activations_shape"][-2:])
        if len(query) != self.announced or grid[0] * grid[1] != query.shape[1]:
            recording.is_complete = False
            return
        for branch in branches:
            key, value, places = branch.inputs(query, options)
            for number, entry in enumerate(branch.entries):
                first, count, length = recording.references(entry)
                tokens = slice(number * branch.tokens, (number + 1) * branch.tokens)
                for row, area in self.rows:
                    group = row * len(key) // self.announced
                    here = None
                    if places is not None:
                        here = places[row if len(places) > 1 else 0, :, number][None, :, None]
                    found = maps.strength(
                        text[row : row + 1],
                        query[row : row + 1],
                        key[group : group + 1, :, tokens],
                        value[group : group + 1, :, tokens],
                        references=count,
                        length=length if count > 1 else None,
                        places=here,
                        precision=options.get("attn_precision"),
                    )
                    recording.sums.add(
                        recording.group(address),
                        self.step,
                        first,
                        found.view(count, *grid),
                        area,
                    )


def count_references(entry: Entry) -> int:
    """How many references an image prompt is of; it keeps their tokens side by side.

    Where the sides of a prompt differ in number, their tokens were repeated to match.
    """
    tokens, length = entry.prompt.conditional, entry.adapter.spec.projection.tokens
    if tokens.shape[1] % length:
        return 1
    each = tokens.reshape(len(tokens), -1, length, tokens.shape[-1])  # [F, N, T, D]
    count: int = each.shape[1]
    for period in range(1, count):
        if count % period == 0 and torch.equal(each[:, period:], each[:, :-period]):
            return period
    return count


def _groups(
    layers: Mapping[Address, HostLayer], patcher: Any, latent: Grid
) -> tuple[list[Group], dict[Address, int]]:
    """The layers by part and grid, in the order in which they run, and each layer's number."""
    halvings = _halvings(patcher)
    blocks = get_args(Block)
    placed = {address: (blocks.index(address[0]), halvings[address[:2]]) for address in layers}
    sizes = Counter(placed.values())
    # Down the grids get smaller, up they get larger again.
    order = sorted(sizes, key=lambda one: (one[0], -one[1] if one[0] == 2 else one[1]))
    groups = []
    for part, halved in order:
        height, width = (-(-side // 2**halved) for side in latent)
        name = f"{_NAMES[blocks[part]]} {height}"
        groups.append(Group(name, (height, width), sizes[part, halved]))
    return groups, {address: order.index(one) for address, one in placed.items()}


def _halvings(patcher: Any) -> dict[tuple[Block, int], int]:
    """How often the grid was halved before the attention of each block."""
    unet = patcher.get_model_object("diffusion_model")
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile's shell
    found: dict[tuple[Block, int], int] = {}
    halved = 0
    for number, block in enumerate(unet.input_blocks):
        halved += any(isinstance(part, Downsample) for part in block.modules())
        found["input", number] = halved
    found["middle", 0] = halved
    for number, block in enumerate(unet.output_blocks):
        found["output", number] = halved
        halved -= any(isinstance(part, Upsample) for part in block.modules())
    return found


def _probe(latent: Tensor) -> Tensor:
    """Some numbers of a latent, spread evenly, on the CPU."""
    flat = latent.detach().flatten()
    stride = -(-flat.numel() // _PROBES)
    return flat[:: max(stride, 1)].to("cpu", torch.float32, copy=True)
