"""A small training inside the host: its memory, its progress bar, its pictures, its stop button."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from torch import Tensor

from .. import drawing
from ..errors import IncompatibleModelError
from ..host import adapters
from ..host.adapters import LoadedAdapter
from ..host.features import show_on_node
from ..host.standalone import Models

PROJECTIONS = ("global", "plus", "full")
"""Those that read pictures; FaceID needs face vectors, which the command line takes."""

FOLDER = "ip_adapter_training"
"""In the host's temporary folder: pictures and features, which the next run uses again."""


@dataclass(frozen=True, eq=False)
class Done:
    """What a training came to.

    Attributes:
        adapter: Loaded from the file that was written.
        words: See `train.small.Trained`.
        curve: The loss over the steps as a picture, ``[1, H, W, 3]``.
        shown: The same with the newest samples below, ``[1, H', W, 3]``.
    """

    adapter: LoadedAdapter
    words: str
    curve: Tensor
    shown: Tensor


def train(
    models: Models,
    pictures: Tensor,
    captions: str,
    references: Tensor | None,
    projection: str,
    start: LoadedAdapter | None,
    target: Path,
    *,
    size: int = 0,
    sample_every: int = 0,
    **numbers: float,
) -> Done:
    """Train an adapter on a batch of pictures.

    The stop button is asked after each step and each encoded row; what was trained until then is
    written. The host's models are moved out of the way, and nothing is kept in memory. The node
    shows the loss, and samples; see `train.live`.

    Args:
        models: Of the host; they are not changed.
        pictures: ``[B, H, W, C]`` in 0..1.
        captions: See `train.small.pairs`.
        references: See `train.small.pairs`.
        projection: One of `PROJECTIONS`; not asked for where there is `start`.
        start: The adapter to go on with, or None.
        target: The file to write.
        size: Side of the pictures in pixels; 0 is the family's own.
        sample_every: Steps from one sample to the next, at least; 0 for none.
        **numbers: Fields of `train.recipe.Recipe`.

    Raises:
        IPAdapterError: See `train.small.train`; or `start` reads more than a picture.
    """
    from . import curve, live, recipe, small  # with pydantic, which no other node needs

    if start is not None:
        projection = start.spec.projection.layout
        if projection not in PROJECTIONS:
            raise IncompatibleModelError(
                f"{start.label} reads more than a picture, and cannot be trained in a graph. "
                "Start from a global, plus or full adapter, or use the command line."
            )
    device = comfy.model_management.get_torch_device()
    in_bf16 = device.type != "cpu" and comfy.model_management.should_use_bf16(device)
    asked = recipe.make(
        {
            "projection": projection,
            "start_from": None if start is None else start.path,
            "mixed_precision": "bf16" if in_bf16 else "no",
            "save_every": numbers["steps"],
            **numbers,
        },
        "The node's recipe",
    )
    bar = comfy.utils.ProgressBar(asked.steps)
    view = live.Live(asked.steps, sample_every)

    def on_row(done: int, total: int) -> None:
        show_on_node(f"encoding, {done} of {total}")
        comfy.model_management.throw_exception_if_processing_interrupted()

    def on_ready(session: Any) -> None:
        view.begin(live.first_reference(session), live.sampler(session))
        show_on_node(f"training on {len(session.rows)} pictures")

    def on_step(step: Any) -> None:
        picture = view(step)
        bar.update_absolute(step.number, None, picture and ("PNG", picture, None))
        comfy.model_management.throw_exception_if_processing_interrupted()

    try:
        done = small.train(
            asked,
            models,
            pictures,
            captions,
            references,
            target,
            Path(folder_paths.get_temp_directory()) / FOLDER,
            size=size or None,
            cpu=device.type == "cpu",
            progress=on_row,
            on_step=on_step,
            before_copy=comfy.model_management.unload_all_models,
            on_ready=on_ready,
        )
    except comfy.model_management.InterruptProcessingException:
        if target.is_file():
            show_on_node(f"stopped; what was trained is in {target.name}")
        raise
    finally:
        view.close()  # it holds the session
        gc.collect()
        comfy.model_management.soft_empty_cache()
    return Done(
        adapters.load(target),
        done.words,
        drawing.to_image(curve.draw_curve(done.losses, asked.steps)),
        drawing.to_image(view.picture()),
    )
