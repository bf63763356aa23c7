"""Row 3: from a prompt that is accepted to its first step, in the host's own executor.

Also the long queue whose memory `remembering` watches. The nodes are the host's and ours; sources
of models and pictures are nodes of this file, which hand out what is in memory already.

An executor keeps what the last prompt made, so what is compared has an executor each: a user's
queue, in which one thing changes from prompt to prompt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import clocks, counting, estimates, models
from .errors import BenchError
from .models import Base, Kind
from .results import Figure, Row, figure
from .sampling import Scene
from .words import GOALS
from .world import Job, Settings, World, time_steps

Prompt = dict[str, dict[str, Any]]

PREFIX = "IPAdapterBench"
ENCODE = "ImagePromptEncode"

CHANGES = ("nothing", "weight", "reference")
"""What of the image prompt changes from one prompt to the next."""


def jobs(world: World) -> Iterator[Job]:
    """Both kinds of encoder features."""
    kinds: tuple[Kind, ...] = ("global", "plus")
    for kind in kinds:
        yield Job(f"SD 1.5, {kind}", partial(_measure, world, kind))


def _measure(world: World, kind: Kind) -> list[Row]:
    world.let_go()  # the queue has a base model of its own
    with inside(world.settings) as queue:
        return queue.rows(kind)  # type: ignore[no-any-return]


def inside(settings: Settings) -> Any:
    """A `Queue` of the pack as the host imports it; its nodes know no other pack's objects."""
    module = import_module(f"{host_package()}.bench.queueing")
    return module.Queue(settings)


def host_package() -> str:
    """Load the pack into the host, unless it is there, and return our package's name in it.

    Raises:
        BenchError: The host refuses it.
    """
    from ..host.standalone import PACK

    nodes: Any = import_module("nodes")
    if ENCODE not in nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(nodes.load_custom_node(str(PACK)))
    if ENCODE not in nodes.NODE_CLASS_MAPPINGS:
        raise BenchError("The host did not accept this pack; see its log above.")
    name: str = nodes.NODE_CLASS_MAPPINGS[ENCODE].__module__
    return name.removesuffix(".nodes.prompts")


class Queue:
    """Models, source nodes and executors.

    Args:
        settings: How to measure.

    Attributes:
        bare: Bytes of tensors when there was only the base model.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.base: Base = World(settings).base("SD 1.5")
        self.bare = counting.tensor_bytes()
        self.encoder = models.image_encoder(settings.size)
        self.encodings = 0
        self.first_step = 0.0
        self.encoder.model.register_forward_hook(self._note_encoding)
        self.model = self._watched(runs=True)
        self._idle = self._watched(runs=False)

    def __enter__(self) -> Queue:
        _register(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Have the host forget the source nodes, which hold the models."""
        known = import_module("nodes").NODE_CLASS_MAPPINGS
        for name in [name for name in known if name.startswith(f"{PREFIX}.")]:
            del known[name]

    def let_go(self) -> None:
        """Drop encoder and adapters, which a user's host has in the caches that /free empties."""
        self.encoder = None
        self.base.forget_adapters()

    def source(self, name: str, number: int = 0) -> Any:
        """What a source node hands out."""
        match name:
            case "Model":
                return self.model
            case "IdleModel":
                return self._idle
            case "Encoder":
                return self.encoder
            case "Image":
                generator = torch.Generator().manual_seed(number)
                return torch.rand(1, 256, 256, 3, generator=generator)
            case "Text":
                return self.base.conditioning(number)
            case "Latent":
                return {"samples": torch.zeros(1, 4, 8, 8)}
        return self.base.adapter(name, number)  # type: ignore[arg-type]

    def executor(self) -> Callable[[Prompt], None]:
        """A queue of its own: runs prompts, keeping what the last one made."""
        execution: Any = import_module("execution")
        arguments = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        made = execution.PromptExecutor(
            _Server(), cache_type=execution.CacheType.CLASSIC, cache_args=arguments
        )

        def run(prompt: Prompt) -> None:
            made.execute(prompt, "bench", {}, ["end"])
            if not made.success:
                said = [data for event, data in made.status_messages if event.endswith("error")]
                raise BenchError(f"A prompt failed in the host: {said[-1]['exception_message']}")

        run.reset = made.reset  # type: ignore[attr-defined]
        return run

    def rows(self, kind: Kind) -> list[Row]:
        """Time to the first step, for each thing that may change, and count the encoder's runs."""
        queues = [self.executor() for _ in range(1 + len(CHANGES))]
        counted = dict.fromkeys(CHANGES, 0)
        places = [None, *CHANGES]

        def go(place: int, number: int) -> None:
            change, before = places[place], self.encodings
            changed = 1 + number
            prompt = graph(
                [] if change is None else [(kind, 0)],
                seed=changed,
                reference=changed if change == "reference" else 0,
                weight=0.5 + changed / 1000 if change == "weight" else 0.5,
                model="IdleModel",
            )
            queues[place](prompt)
            if change is not None:
                counted[change] = self.encodings - before

        def to_first_step(call: Callable[[], object]) -> float:
            started = time.perf_counter()
            call()
            return self.first_step - started

        rounds = max(self.settings.rounds, 3)
        calls = [partial(go, place) for place in range(len(places))]
        offset = iter(range(10**9))
        # Every prompt is a new one, also between warming up and timing.
        seconds = clocks.interleave(
            [lambda _, c=call: c(next(offset)) for call in calls],  # type: ignore[misc]
            rounds,
            to_first_step,
            warm_up=2,
        )
        side = self.settings.pixels(512)
        scene = Scene(self.base, side, side)
        step = float(np.median(time_steps(self.settings, scene, [self.base.model], rounds=3)))
        out = []
        for place, change in enumerate(CHANGES, start=1):
            without, found = seconds[:, 0], seconds[:, place]
            out.append(
                Row(
                    f"SD 1.5, {kind}, {change} changes",
                    (
                        figure("time / without image prompt", estimates.ratio(without, found)),
                        figure(
                            f"extra time / a step at {side} x {side}",
                            estimates.bootstrap(np.median, (found - without) / step),
                        ),
                        Figure("encoder runs", counted[change], goal=GOALS["encodings"][change]),
                    ),
                    context={"seconds": seconds[:, [0, place]].tolist(), "step": step},
                )
            )
        return out

    def _watched(self, *, runs: bool) -> Any:
        """The base MODEL that notes its first step, and may leave it at that."""
        from comfy.patcher_extension import WrappersMP

        def note(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.settings.device == "cuda":
                torch.cuda.synchronize()
            self.first_step = time.perf_counter()
            return executor(x, *args, **kwargs) if runs else torch.zeros_like(x)

        model = self.base.model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PREFIX, note)
        return model

    def _note_encoding(self, *_: object) -> None:
        self.encodings += 1


def graph(
    prompts: list[tuple[Kind, int]],
    *,
    seed: int,
    reference: int = 0,
    weight: float = 0.5,
    model: str = "Model",
) -> Prompt:
    """A prompt of the host: one step, with some image prompts in a chain.

    Args:
        prompts: Kind and number of each adapter.
        seed: Of the sampler.
        reference: Number of the picture.
        weight: Of each image prompt.
        model: Source of the MODEL; ``IdleModel`` stops at its first step.
    """
    out: Prompt = {
        "model": _source(model),
        "encoder": _source("Encoder"),
        "image": _source("Image", reference),
        "positive": _source("Text", 1),
        "negative": _source("Text", 2),
        "latent": _source("Latent"),
    }
    last = "model"
    for place, (kind, number) in enumerate(prompts):
        out[f"adapter {place}"] = _source(kind, number)
        out[f"prompt {place}"] = {
            "class_type": ENCODE,
            "inputs": {
                "ip_adapter": [f"adapter {place}", 0],
                "clip_vision": ["encoder", 0],
                "image": ["image", 0],
                "fit": "crop",
            },
        }
        out[f"apply {place}"] = {
            "class_type": "ImagePromptApply",
            "inputs": {
                "model": [last, 0],
                "ip_adapter": [f"adapter {place}", 0],
                "image_prompt": [f"prompt {place}", 0],
                "weight": weight,
                "start_at": 0.0,
                "end_at": 1.0,
            },
        }
        last = f"apply {place}"
    out["sampler"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": [last, 0],
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "latent_image": ["latent", 0],
            "seed": seed,
            "steps": 1,
            "cfg": 7.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    }
    out["end"] = {"class_type": f"{PREFIX}.End", "inputs": {"latent": ["sampler", 0]}}
    return out


def _source(name: str, number: int = 0) -> dict[str, Any]:
    return {"class_type": f"{PREFIX}.{name}", "inputs": {"number": number}}


_TYPES: Mapping[str, str] = {
    "Model": "MODEL",
    "IdleModel": "MODEL",
    "Encoder": "CLIP_VISION",
    "Image": "IMAGE",
    "Text": "CONDITIONING",
    "Latent": "LATENT",
    **dict.fromkeys(models.KINDS, "IPADAPTER"),
}


def _register(queue: Queue) -> None:
    """Make the source nodes known to the host."""
    nodes: Any = import_module("nodes")
    for name, socket in _TYPES.items():

        def run(self: Any, number: int, name: str = name) -> tuple[Any]:
            return (queue.source(name, number),)

        nodes.NODE_CLASS_MAPPINGS[f"{PREFIX}.{name}"] = type(
            f"{PREFIX}{name}",
            (),
            {
                "INPUT_TYPES": classmethod(lambda _: {"required": {"number": ("INT", {})}}),
                "RETURN_TYPES": (socket,),
                "FUNCTION": "run",
                "run": run,
            },
        )
    nodes.NODE_CLASS_MAPPINGS[f"{PREFIX}.End"] = type(
        f"{PREFIX}End",
        (),
        {
            "INPUT_TYPES": classmethod(lambda _: {"required": {"latent": ("LATENT",)}}),
            "RETURN_TYPES": (),
            "FUNCTION": "run",
            "OUTPUT_NODE": True,
            "run": lambda self, latent: {},
        },
    )


class _Server:
    """What an executor tells of its progress; nobody listens."""

    client_id = None
    last_node_id = None
    last_prompt_id = None

    def send_sync(self, *_: object) -> None:
        """Told of an event."""
