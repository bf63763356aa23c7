"""The steps of a training run: on one process or many, to be stopped and resumed at any step.

Hugging Face accelerate spreads the work (DDP, or DeepSpeed by its own configuration); what it
wraps is the adapter alone. Batches come from an order that is a function of the number of samples
seen, and so does all chance (`objective.draw`); with the optimizer's state that makes a resumed
run equal to one that was never stopped, bit for bit where the machine computes repeatably.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import objective
from ..adapter import IPAdapter
from ..errors import IPAdapterError
from ..objective import Base, Batch, Decoupled, Nothing, Simple, usable
from . import state
from .board import Board
from .recipe import Recipe, RecipeError, differences
from .state import Progress, SaveError

log = logging.getLogger(__name__)


class TrainingError(IPAdapterError):
    """A run that cannot begin or go on."""


class Source(Protocol):
    """Where batches come from."""

    def __call__(self, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """Endless batches of one process.

        Args:
            start: Samples that all processes together have seen before.
            batch: Rows of one batch.
            rank: Which process this is. Of each ``batch * world`` samples in a row it gets the
                part from ``rank * batch`` on.
            world: How many there are.
        """


@dataclass(frozen=True)
class Step:
    """What is known after a step.

    Attributes:
        number: Optimizer steps done, from 1.
        loss: Mean over the step's samples, on all processes.
        learning_rate: Of the step.
        samples: Samples seen so far by all processes.
    """

    number: int
    loss: float
    learning_rate: float
    samples: int


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        step: Optimizer steps done.
        weights: The newest weights, in use as any adapter.
        is_finished: Whether all steps of the recipe are done; else the run was stopped.
    """

    step: int
    weights: Path
    is_finished: bool


def weights_path(out: Path, step: int) -> Path:
    """Where the weights of a step lie in a run's folder."""
    return out / f"ip-adapter-{step:08d}.safetensors"


def train(
    recipe: Recipe,
    base: Base,
    adapter: IPAdapter,
    source: Source,
    nothing: Nothing,
    out: Path,
    *,
    resume: bool = False,
    notes: Mapping[str, str] | None = None,
    lora: Mapping[str, Tensor] | None = None,
    on_step: Callable[[Step], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    is_quiet: bool = False,
    cpu: bool = False,
) -> Result:
    """Train an adapter.

    With the host's base, call it within `host.training.training_mode`.

    Args:
        recipe: What to do.
        base: Frozen; it is moved to where this process computes.
        adapter: What is trained, in place.
        source: The batches.
        nothing: What stands for a dropped condition.
        out: The run's folder: weights, `state.STATES`, and ``log`` for TensorBoard.
        resume: Go on from the newest state in `out`; begin where there is none.
        notes: More metadata of the weights, such as ``base_checkpoint``.
        lora: See `state.Start`.
        on_step: Called after each step, on the main process only. What it raises ends the run,
            after saving where there is one process.
        should_stop: Asked after each step; True on any process saves and ends the run on all.
        is_quiet: Without a progress bar.
        cpu: Compute on the CPU also where there is something faster.

    Raises:
        TrainingError: accelerate is missing, the run exists and `resume` is not set, or the loss is
            no number any more.
        RecipeError: A resumed run had another recipe, or the precision needs a GPU.
        SaveError: The last save failed. One in between is logged, and training goes on.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        run = stack.enter_context(
            _Run(recipe, base, adapter, nothing, Path(out), dict(notes or {}), lora, cpu)
        )
        run.begin(resume)
        return run.go(source, on_step, should_stop, is_quiet)


class _Run:
    """A run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        adapter: IPAdapter,
        nothing: Nothing,
        out: Path,
        notes: dict[str, str],
        lora: Mapping[str, Tensor] | None,
        cpu: bool,
    ) -> None:
        self.recipe, self.adapter = recipe, adapter
        self.out, self.notes, self.lora = out, notes, lora
        self.accelerator = _accelerator(recipe, cpu)
        self.world: int = self.accelerator.num_processes
        device: torch.device = self.accelerator.device
        self.base: Base = base.to(device)
        self.nothing = Nothing(
            usable(nothing.text).to(device),
            None if nothing.pooled is None else usable(nothing.pooled).to(device),
            None if nothing.image is None else usable(nothing.image).to(device),
        )
        module: nn.Module = (Simple if recipe.design == "simple" else Decoupled)(adapter)
        module.train().to(device)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.step = self.samples = self.saved = 0

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of what accelerate keeps for the process, so that another run may follow."""
        self.accelerator.free_memory()
        if self.world > 1:
            self.accelerator.end_training()
        _forget_accelerate()

    def begin(self, resume: bool) -> None:
        """Go on from the newest state, if there is one."""
        found = state.latest(self.out)
        if found is None:
            return
        path, progress = found
        if not resume:
            raise TrainingError(
                f"'{self.out}' already holds a run, saved at step {progress.step}. Resume it, or "
                "choose another folder."
            )
        differing = differences(self.recipe, progress.recipe)
        if differing:
            raise RecipeError(
                f"The run in '{self.out}' cannot be resumed with this recipe: "
                f"{'; '.join(differing)}. Use the recipe it began with, or choose another folder."
            )
        if progress.processes != self.world:
            log.warning(
                "IP-Adapter: the run had %d processes and is resumed with %d: a step now has %d "
                "samples",
                progress.processes,
                self.world,
                self.recipe.batch_size * self.recipe.gradient_accumulation * self.world,
            )
        self.accelerator.load_state(str(path))
        self.step, self.samples, self.saved = progress.step, progress.samples, progress.step

    def go(
        self,
        source: Source,
        on_step: Callable[[Step], None] | None,
        should_stop: Callable[[], bool] | None,
        is_quiet: bool,
    ) -> Result:
        """All steps that are left, or as many as are wanted."""
        recipe, is_main = self.recipe, self.accelerator.is_main_process
        rank = self.accelerator.process_index
        batches = source(self.samples, recipe.batch_size, rank, self.world)
        stopped = False
        with ExitStack() as stack:
            bar = stack.enter_context(_bar(recipe.steps, self.step, is_quiet or not is_main))
            board = stack.enter_context(Board(self.out / "log", self.step, is_main))
            while self.step < recipe.steps and not stopped:
                done, stopped = self._one_step(batches, rank, should_stop)
                bar.update()
                bar.set_postfix(loss=f"{done.loss:.4f}", refresh=False)
                board.number("loss", done.loss, done.number)
                board.number("learning rate", done.learning_rate, done.number)
                is_last = stopped or self.step >= recipe.steps
                if is_last or self.step % recipe.save_every == 0:
                    self._save(must=is_last)
                if on_step is not None and is_main:
                    try:
                        on_step(done)
                    except BaseException:
                        if self.world == 1 and self.saved < self.step:
                            self._save(must=True)
                        raise
        path = weights_path(self.out, self.step)
        if not path.is_file():  # resumed when all was done, and the file was moved away
            self._save(must=True)
        return Result(self.step, path, self.step >= recipe.steps)

    def _one_step(
        self, batches: Iterator[Batch], rank: int, should_stop: Callable[[], bool] | None
    ) -> tuple[Step, bool]:
        recipe, device = self.recipe, self.accelerator.device
        total = torch.zeros((), device=device)
        for _ in range(recipe.gradient_accumulation):
            batch = {name: usable(rows).to(device) for name, rows in next(batches).items()}
            first = self.samples + rank * recipe.batch_size
            draws = objective.draw(
                recipe.seed,
                range(first, first + recipe.batch_size),
                batch["latents"].shape[1:],
                self.base.schedule.steps,
            )
            draws = objective.Draws(
                draws.timesteps.to(device), draws.chance.to(device), draws.noise.to(device)
            )
            with self.accelerator.accumulate(self.module):
                value = objective.loss(
                    self.module,
                    self.base,
                    batch,
                    draws,
                    drops=recipe.drops,
                    nothing=self.nothing,
                )
                self.accelerator.backward(value)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.samples += recipe.batch_size * self.world
            total += value.detach() / recipe.gradient_accumulation
        wants_stop = float(should_stop is not None and should_stop())
        told = torch.stack((total, torch.tensor(wants_stop, device=device)))
        loss, stops = self.accelerator.reduce(told, "sum").tolist()
        loss /= self.world
        self.step += 1
        if not math.isfinite(loss):
            kept = f"The state of step {self.saved} is kept" if self.saved else "Nothing was saved"
            raise TrainingError(
                f"The loss is {loss} at step {self.step}; no step after it can be good. {kept}. "
                "Use a lower learning_rate, or mixed_precision bf16 or no instead of fp16."
            )
        rate = float(self.optimizer.param_groups[0]["lr"])
        return Step(self.step, loss, rate, self.samples), stops > 0

    def _save(self, *, must: bool) -> None:
        """Write weights and state; a failure is final only where nothing comes after."""
        try:
            self._write()
            self.saved = self.step
        except SaveError as error:
            if must:
                raise
            log.error("IP-Adapter: %s Training goes on.", error)

    def _write(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        failure: SaveError | None = None
        if accelerator.is_main_process:
            try:
                state.write_weights(
                    self.adapter,
                    weights_path(self.out, self.step),
                    state.metadata(self.adapter.spec, recipe, self.step, self.notes),
                    dtype=state.DTYPES[recipe.weights],
                    lora=self.lora,
                )
            except SaveError as error:
                failure = error
        if not self._agree(failure is None):
            raise failure or SaveError("The main process could not write the weights; see its log.")
        progress = Progress(self.step, self.samples, self.world, recipe.lasting())
        state.save_state(
            self.out,
            progress,
            lambda folder: accelerator.save_state(str(folder)),
            is_main=accelerator.is_main_process,
            agree=self._agree,
        )

    def _agree(self, is_well: bool) -> bool:
        if self.world == 1:
            return is_well
        told = torch.tensor(float(is_well), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, "sum").item() == self.world)


def _accelerator(recipe: Recipe, cpu: bool) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TrainingError(
            "Training needs accelerate, which is not installed. In ComfyUI's Python environment "
            "run: pip install accelerate tensorboard"
        ) from error
    reason = "on the CPU its gradients would not be scaled"
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.gradient_accumulation,
            cpu=cpu,
        )
    except ValueError as error:
        if recipe.mixed_precision == "no":
            raise
        accelerator, reason = None, str(error)
    # On the CPU accelerate takes fp16 without a word, and does not do it.
    is_fp16 = recipe.mixed_precision == "fp16"
    if accelerator is None or (is_fp16 and accelerator.device.type == "cpu"):
        _forget_accelerate()
        raise RecipeError(
            f"mixed_precision is {recipe.mixed_precision}, which cannot be had here ({reason}). "
            "Use no, or bf16 where the hardware has it."
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # it asks for what it would otherwise read off a data loader
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = recipe.batch_size
    return accelerator


def _forget_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def _bar(total: int, initial: int, is_quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, disable=is_quiet, unit="step", desc="training")
