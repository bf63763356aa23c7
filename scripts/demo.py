"""Run every shipped workflow in a real ComfyUI and leave one sheet with all their pictures.

The models are tiny and untrained, built here, so the demo needs no download and no GPU; its
pictures show that the graphs run. What is built once stays in `.host/base`.

    python -m scripts.demo
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from scripts.client import Json, OutputImage, ServerError
from scripts.contact_sheet import Cell, Section, draw_sheet
from scripts.host import REPOSITORY, HostError, host_version
from scripts.pictures import write_pictures
from scripts.prompts import names, read_prompt, shrink
from scripts.server import Server
from tests.synthetic.models import FIXTURE_PACK, build_models

BASE = REPOSITORY / ".host" / "base"
SHEET = REPOSITORY / "demo" / "contact_sheet.png"
BAR = "{desc:<42.42} {percentage:3.0f}% |{bar:30}| {elapsed}"
SIZE, STEPS = 128, 6  # a CPU would take minutes for what the workflows ask of a GPU
FOOTNOTE = (
    "The models are tiny and untrained: the pictures show that every graph loads, runs and reacts "
    "to its reference, not what a trained adapter draws."
)


@dataclass(frozen=True)
class Run:
    """What one workflow left: its pictures and how long it took, in seconds."""

    name: str
    images: list[OutputImage]
    seconds: float


class Progress:
    """One bar over all stages of the demo; a stage may move it by fractions."""

    def __init__(self, stages: int) -> None:
        self.bar = tqdm(total=stages, bar_format=BAR, file=sys.stdout, mininterval=0.2)
        self.done = 0

    def say(self, text: str) -> None:
        """Name what is being done."""
        self.bar.set_description_str(text)

    def advance(self, fraction: float) -> None:
        """Move within the current stage."""
        self.bar.n = max(self.bar.n, self.done + min(fraction, 1.0))
        self.bar.refresh()

    def finish_stage(self) -> None:
        """Move on to the next stage."""
        self.done += 1
        self.advance(0.0)


def readable(name: str) -> str:
    """`ip_adapter_reference_2` -> `Reference 2`."""
    words = name.removeprefix("ip_adapter_").replace("_", " ").replace("-", " ")
    return words[:1].upper() + words[1:]


def picture_names(workflows: dict[str, Json]) -> list[str]:
    """Files of the input folder that the workflows load, each once, in order."""
    names: dict[str, None] = {}
    for workflow in workflows.values():
        for node in workflow.values():
            if node["class_type"] in ("LoadImage", "LoadImageMask"):
                names[node["inputs"]["image"]] = None
    return list(names)


def run_workflow(server: Server, name: str, workflow: Json, progress: Progress) -> Run:
    """Run one workflow and let its sampler's steps move the bar."""

    def follow(event: Json) -> None:
        if event["type"] == "progress":
            step, steps = event["data"]["value"], event["data"]["max"]
            progress.say(f"{readable(name)}, step {step}/{steps}")
            progress.advance(step / max(steps, 1))

    progress.say(readable(name))
    started = time.perf_counter()
    result = server.run(shrink(workflow, size=SIZE, steps=STEPS), on_event=follow, timeout=600)
    progress.finish_stage()
    return Run(name, result.images, time.perf_counter() - started)


def output_cells(runs: list[Run]) -> list[Cell]:
    """One captioned cell for each picture that a run saved."""
    cells = []
    for run in runs:
        saved = [image for image in run.images if image.kind == "output"]
        kept = saved or run.images  # previews only where a workflow saves nothing
        for index, output in enumerate(kept, start=1):
            image = Image.open(io.BytesIO(output.data))
            count = f"{index} of {len(kept)}, " if len(kept) > 1 else ""
            note = f"{count}{image.width} x {image.height}, {run.seconds:.1f} s"
            cells.append(Cell(image, readable(run.name), note))
    return cells


def run_demo(workflows: dict[str, Json], base: Path, sheet: Path) -> list[str]:
    """Run the workflows and draw the sheet.

    Args:
        workflows: Name -> API-format prompt.
        base: Base folder of the host; models and input pictures are kept there.
        sheet: Where the sheet is written.

    Returns:
        One line per workflow that failed.
    """
    progress = Progress(2 + len(workflows))
    progress.say("Building models")
    build_models(base, progress.say)
    write_pictures(base / "input")
    shutil.rmtree(base / "output", ignore_errors=True)
    progress.finish_stage()

    runs, failures = [], []
    progress.say("Starting ComfyUI")
    with Server(base, packs=[FIXTURE_PACK]) as server:
        progress.finish_stage()
        for name, workflow in workflows.items():
            try:
                runs.append(run_workflow(server, name, workflow, progress))
            except ServerError as error:
                failures.append(f"{name}: {error}")
                progress.finish_stage()
        version = host_version(server.host)
    progress.say("Done")
    progress.bar.close()

    seconds = sum(run.seconds for run in runs)
    references = [
        Cell(Image.open(base / "input" / name), readable(Path(name).stem))
        for name in picture_names(workflows)
    ]
    drawn = draw_sheet(
        "IP-Adapter: image prompts",
        f"{len(runs)} workflows in ComfyUI {version} on the CPU, few steps, {seconds:.0f} s in all",
        [
            Section("Reference pictures", references, columns=8),
            Section("What the workflows made", output_cells(runs), columns=5),
        ],
        FOOTNOTE,
    )
    sheet.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(sheet)
    return failures


def main() -> None:
    """Run all workflows; end with the sheet's path, or with what failed."""
    workflows = {name: read_prompt(name) for name in names()}
    try:
        failures = run_demo(workflows, BASE, SHEET)
    except (HostError, ServerError) as error:
        sys.exit(f"demo: {error}")
    if failures:
        sys.exit(
            "\n".join([f"demo: {len(failures)} of {len(workflows)} workflows failed.", *failures])
        )
    print(SHEET)


if __name__ == "__main__":
    main()
