"""Train an IP-Adapter on a checkpoint that ComfyUI loads.

Usage, in the pack's folder, with the Python that runs ComfyUI:
    python -m ip_adapter.train --checkpoint SD15.safetensors --encoder VIT_H.safetensors \
        --data PICTURES --projection global --out RUN
    python -m ip_adapter.train --resume --out RUN
    accelerate launch -m ip_adapter.train ...
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import IPAdapterError, MissingFileError
from ..host import standalone
from . import data, session, state
from .loop import TrainingError
from .observer import Observer
from .recipe import Recipe, RecipeError, differences, make, read

SETTINGS = "run.json"
"""In the run's folder: what it was begun with, so that ``--resume --out RUN`` is enough."""

STOPPED = 130
"""Exit status of a run that was interrupted and can be resumed."""

_RECIPE = {
    "projection": "how features become image tokens: global (4 tokens of one embedding), plus (16 "
    "of patch features, closer to the reference), full (one per patch), faceid (a face vector); "
    "default global",
    "start_from": "a published or own adapter to go on from, in any container",
    "steps": "optimizer steps; default 20000",
    "batch_size": "rows per step and process; default 8",
    "gradient_accumulation": "batches per step; default 1",
    "learning_rate": "of AdamW; default 0.0001",
    "weight_decay": "of AdamW; default 0.01",
    "mixed_precision": "no, bf16 or fp16; default no",
    "gradient_checkpointing": "less memory, about a third more time",
    "seed": "of everything that is drawn; default 0",
    "save_every": "steps between saves; default 1000",
    "validate_every": "steps between validations, 0 for none; default 1000",
}
_FILES = ("checkpoint", "encoder", "data", "cache", "config", "start_from", "out")
_OTHER = {
    "checkpoint": None,
    "encoder": None,
    "data": None,
    "cache": None,
    "size": None,
    "fit": "crop",
    "mirror": False,
    "hold_out": None,
    "samples": 4,
    "sample_every": None,
    "sample_steps": 20,
}
"""What a run depends on beside its recipe, with defaults."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status is 0, 1 if something was refused, or 130 if it was interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return _run(options)
    except (IPAdapterError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        begun = state.latest(Path(options.out))
        sys.stderr.write(
            "\nStopped. What was computed of the rows is kept: give the same command again.\n"
            if begun is None
            else f"\nStopped. Step {begun[1].step} is kept: give the same command with --resume.\n"
        )
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ip_adapter.train",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Rows are checked before anything is computed; a wrong one is named. Ctrl-C saves, "
        "and --resume goes on exactly there. docs/training.md is the guide.",
    )
    files = parser.add_argument_group("what to train on")
    files.add_argument("--checkpoint", help="base model: a whole checkpoint of SD 1.5 or SDXL")
    files.add_argument("--encoder", help="image encoder; not needed for faceid")
    files.add_argument(
        "--data",
        help="a folder of pictures with captions in .txt, a .jsonl file, or .tar shards",
    )
    files.add_argument("--out", required=True, help="folder of this run: weights, state, logs")
    files.add_argument("--cache", help="folder of computed features; default OUT/cache")
    files.add_argument("--size", type=int, help="side of the pictures; default 512, SDXL 1024")
    files.add_argument(
        "--fit", choices=["crop", "pad"], help="how a reference becomes square; default crop"
    )
    files.add_argument(
        "--mirror", action="store_const", const=True, help="see each row mirrored, too"
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--config", help="a recipe in YAML or JSON; the options here come first")
    for name, words in _RECIPE.items():
        field = Recipe.model_fields[name]
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            recipe.add_argument(flag, action="store_const", const=True, help=words)
        else:
            recipe.add_argument(flag, metavar=name.split("_")[-1].upper(), help=words)
    watch = parser.add_argument_group("watching")
    watch.add_argument(
        "--hold-out", type=int, help="rows for validation; default a tenth, 64 at most, 0 for none"
    )
    watch.add_argument("--samples", type=int, help="references in a sample grid; default 4")
    watch.add_argument("--sample-every", type=int, help="steps; default as --validate-every")
    watch.add_argument("--sample-steps", type=int, help="of the sampler; default 20")
    run = parser.add_argument_group("run")
    run.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    run.add_argument(
        "--cache-only", action="store_true", help="compute features and stop; for one process"
    )
    run.add_argument("--cpu", action="store_true", help="compute on the CPU")
    run.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _run(options: argparse.Namespace) -> int:
    out = Path(options.out).resolve()
    recipe, settings = _settings(options, out)
    for name in ("checkpoint", "data"):
        if settings[name] is None:
            raise MissingFileError(
                f"--{name} is missing, and '{out}' holds no run to resume. Give it, or --resume "
                "with the folder of a run."
            )
    if session.needs_encoder(recipe) and settings["encoder"] is None:
        raise MissingFileError(
            f"--encoder is missing; a {recipe.projection} projection reads a CLIP image encoder. "
            "Give its file, such as ComfyUI/models/clip_vision/"
            "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors."
        )
    begun = state.latest(out)
    if begun is not None and not options.resume and not options.cache_only:
        raise TrainingError(
            f"'{out}' already holds a run, saved at step {begun[1].step}. Add --resume to go on "
            "with it, or choose another folder."
        )
    process, is_main, first = _processes(options.cpu)
    say = _say if is_main else _silent
    with first():
        table = data.read(settings["data"])
        rows: Sequence[data.Row] = table.rows
        if is_main:
            with _bar("checking rows", options.quiet) as progress:
                rows = data.check(table, needs_face=session.needs_face(recipe), progress=progress)
    say(f"{len(rows)} rows")
    standalone.start(cpu=options.cpu)
    encoder = settings["encoder"]
    models = standalone.load(
        Path(settings["checkpoint"]), None if encoder is None else Path(encoder)
    )
    held = settings["hold_out"]
    with first(), _bar("computing features", options.quiet or not is_main) as progress:
        ready = session.prepare(
            recipe,
            models,
            rows,
            Path(settings["cache"] or out / "cache"),
            size=settings["size"],
            fit=settings["fit"],
            mirror=bool(settings["mirror"]),
            held=min(64, len(rows) // 10) if held is None else held,
            progress=progress,
            before_copy=_free,
        )
    say(f"{ready.adapter.spec.summary()}; {len(ready.rows)} rows, {len(ready.held_out)} held out")
    if options.cache_only:
        say("All features are cached.")
        return 0
    # A resumption that will be refused must not change what the run was begun with.
    if is_main and (begun is None or not differences(recipe, begun[1].recipe)):
        _write_settings(out, recipe, settings)
    step = begun[1].step if begun is not None else 0
    observer = None
    if is_main:
        observer = Observer(
            ready,
            out,
            step,
            say=say,
            shown=settings["samples"],
            sample_every=settings["sample_every"],
            sample_steps=settings["sample_steps"],
        )
    notes = {"base_checkpoint": Path(settings["checkpoint"]).name}
    try:
        with _interrupts(say) as stop:
            result = ready.train(
                out,
                resume=options.resume,
                notes=notes,
                on_step=observer,
                should_stop=stop,
                is_quiet=options.quiet,
                cpu=options.cpu,
            )
    finally:
        if observer is not None:
            observer.close()
        del process
    return _finish(result, out, say)


def _finish(result: Any, out: Path, say: Callable[[str], object]) -> int:
    if result.is_finished:
        say(
            f"Done: {result.weights}\nCopy it to ComfyUI/models/ipadapter and choose it in Load "
            "IP-Adapter."
        )
        return 0
    say(
        f"Stopped and saved at step {result.step}: {result.weights}\n"
        f"Go on with: python -m ip_adapter.train --resume --out {out}"
    )
    return STOPPED


def _settings(options: argparse.Namespace, out: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the other settings: given here, else of the run to resume, else default."""
    given = {
        name: _absolute(name, value) for name, value in vars(options).items() if value is not None
    }
    before: Mapping[str, Any] = {}
    file = out / SETTINGS
    if options.resume and file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecipeError(
                f"'{file}' is damaged ({error}). Remove it, and resume with all options."
            ) from error
    values: dict[str, Any] = dict(before.get("recipe", {}))
    if options.config is not None:
        values |= read(Path(given["config"])).model_dump(mode="json", exclude_unset=True)
    values |= {name: given[name] for name in _RECIPE if name in given}
    start = values.get("start_from")
    if start is not None:
        if not Path(start).exists():
            raise MissingFileError(f"There is no file '{start}' to start from.")
        if "projection" not in values:
            from .. import checkpoint

            layout = checkpoint.read(Path(start)).spec.projection.layout
            if layout in ("global", "plus", "full", "faceid"):
                values["projection"] = layout
    settings = {
        name: given.get(name, before.get(name, default)) for name, default in _OTHER.items()
    }
    return make(_numbers(values), "The recipe"), settings


def _absolute(name: str, value: Any) -> Any:
    """Files and folders by their full path, for a run that is resumed from elsewhere."""
    return os.path.abspath(os.path.expanduser(value)) if name in _FILES else value


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed for a number, as one; the recipe says what is wrong with anything else."""
    out = dict(values)
    for name, value in values.items():
        if isinstance(value, str) and name not in _FILES:
            try:
                out[name] = json.loads(value)
            except ValueError:
                continue
    return out


def _write_settings(out: Path, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    text = json.dumps({**settings, "recipe": recipe.model_dump(mode="json")}, indent=2)
    files.write(out / SETTINGS, text.encode())


def _processes(cpu: bool) -> tuple[Any, bool, Callable[[], Any]]:
    """What accelerate knows of the others, whether this is the main one, and "main one first"."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None, True, nullcontext
    from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]

    # The others wait while the main process computes features, which may take hours.
    found = PartialState(
        cpu=cpu or not torch.accelerator.is_available(), timeout=timedelta(hours=48)
    )
    return found, bool(found.is_main_process), found.main_process_first


@contextmanager
def _interrupts(say: Callable[[str], object]) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C, or a polite request to end, into a question that is answered True."""
    wanted = False

    def note(number: int, _: Any) -> None:
        nonlocal wanted
        if wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        wanted = True
        say("\nSaving after this step. Press Ctrl-C again to stop at once, from the last save.")

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield lambda: wanted
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def _bar(words: str, is_quiet: bool) -> Iterator[data.Progress | None]:
    """A progress bar that learns its length from the first call."""
    if is_quiet:
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=words, unit="row", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _free() -> None:
    """The encoders have done their work; the base needs their place."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def _say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)  # above a progress bar, where there is one
    sys.stdout.flush()


def _silent(_: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
