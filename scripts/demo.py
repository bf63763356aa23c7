"""Show what image prompts do: a real ComfyUI runs the miniature, one sheet has all its pictures.

The miniature is a pocket-size Stable Diffusion family that this project trained (`miniature/`), so
the pictures are true results, and no download and no GPU is needed.

    python -m scripts.demo [SHEET]
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from miniature import family, reader, world
from scripts import claims
from scripts import miniature_graphs as graphs
from scripts.claims import Claim
from scripts.client import Json, Result, ServerError
from scripts.contact_sheet import Column, Section, draw_sheet
from scripts.host import REPOSITORY, HostError, host_version
from scripts.server import Server

PACK = REPOSITORY / "miniature"
BASE = REPOSITORY / ".host" / "base"
SHEET = REPOSITORY / "demo" / "contact_sheet.png"
BAR = "{desc:<42.42} {percentage:3.0f}% |{bar:30}| {elapsed}"
TITLE = "What an image prompt does"
FOOTNOTE = (
    "Weight 1 and the global adapter where nothing else is said. The miniature is a Stable "
    "Diffusion family of pocket size that this project trained, adapters included, in under two "
    "hours on two CPU cores. The references are the first of a seed; no training saw their "
    "combinations of shape, colour and texture. Nothing is cherry-picked. The figures are read off "
    "the pictures by a formula, not by a net: look is texture, colour and ground of the reference, "
    "marks are the four in its corners."
)


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


def pictures(result: Result) -> list[Image.Image]:
    """What a run saved, in order."""
    return [
        Image.open(io.BytesIO(image.data)).convert("RGB")
        for image in result.images
        if image.kind == "output"
    ]


def readings(images: Sequence[Image.Image]) -> list[reader.Reading]:
    """Read pictures, and of wide ones each half."""
    side = world.SIZE
    squares = [
        image.crop((left, 0, left + side, side))
        for image in images
        for left in range(0, image.width, side)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))
    return reader.read(pixels.movedim(-1, 1) / 255)


def run_demo(base: Path, sheet: Path) -> None:
    """Make all pictures and draw the sheet.

    Args:
        base: Base folder of the host; its input pictures are written there.
        sheet: Where the sheet is written.

    Raises:
        HostError: No ComfyUI was found.
        ServerError: It did not start, or refused or failed a prompt.
    """
    began = time.monotonic()
    single, double = claims.single(), claims.double()
    progress = Progress(len(single) + 3)
    progress.say("Starting ComfyUI")
    claims.write_inputs(base / "input")
    shutil.rmtree(base / "output", ignore_errors=True)
    with Server(base, packs=[PACK]) as server:
        progress.finish_stage()
        made = {
            name: run(server, claim.prompt, f"{claim.heading}, {claim.note}", progress)
            for name, claim in single.items()
        }
        wide = run(server, double.prompt, "two references, each in its mask", progress)
        version = host_version(server.host)
    progress.say("Reading the pictures")
    sections = [table(single, made, base / "input"), masked(double, wide, base / "input")]
    progress.finish_stage()
    progress.say("Done")
    progress.bar.close()

    count = sum(map(len, made.values())) + len(wide)
    seconds = time.monotonic() - began
    subtitle = f"{count} pictures by ComfyUI {version} on the CPU, {seconds:.0f} s in all"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(TITLE, subtitle, sections, FOOTNOTE).save(sheet, optimize=True)


def run(server: Server, prompt: Json, name: str, progress: Progress) -> list[Image.Image]:
    """Make a batch of pictures and let the sampler's steps move the bar."""

    def follow(event: Json) -> None:
        if event["type"] == "progress":
            progress.advance(event["data"]["value"] / max(event["data"]["max"], 1))

    progress.say(name[:1].upper() + name[1:])
    made = pictures(server.run(prompt, on_event=follow, timeout=300))
    progress.finish_stage()
    return made


def table(single: dict[str, Claim], made: dict[str, list[Image.Image]], inputs: Path) -> Section:
    """References, hints, and what was made of them."""
    columns = [Column("reference", "", loaded(inputs, "reference"))]
    for name, claim in single.items():
        if name == "control":
            columns.append(Column("hint", "for ControlNet", loaded(inputs, "hint")))
        columns.append(column(claim, made[name]))
    return Section("One reference and one noise in each row", columns)


def masked(double: Claim, made: Sequence[Image.Image], inputs: Path) -> Section:
    """Pairs of references with their masks, and what was made of them."""
    pairs = [
        beside(*pair)
        for pair in zip(loaded(inputs, "reference"), loaded(inputs, "other"), strict=False)
    ]
    masks = [Image.open(inputs / claims.MASK)] * len(pairs)
    columns = [
        Column("references", "left and right", pairs),
        Column("mask", "white: the left reference's", masks),
        Column("hint", "for ControlNet", loaded(inputs, "pair_hint")),
        column(double, made),
    ]
    return Section("Two references, each in its mask", columns)


def column(claim: Claim, made: Sequence[Image.Image]) -> Column:
    """A claim's pictures with what is read off them."""
    found = readings(made)
    return Column(claim.heading, claim.note, made, [figure(found) for figure in claim.figures])


def loaded(inputs: Path, kind: str) -> list[Image.Image]:
    """What the graphs load, as `claims.names` names it."""
    return [Image.open(inputs / name) for name in claims.names(kind)]


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures as one."""
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def missing() -> list[Path]:
    """Files of the miniature that are needed and not there."""
    adapters = [family.ADAPTERS / name for name in (graphs.GLOBAL, graphs.PLUS)]
    needed = [family.BASE, family.CLIP_VISION, family.FINE_TUNE, family.CONTROLNET, *adapters]
    return [path for path in needed if not path.exists()]


def main(arguments: Sequence[str] = ()) -> None:
    """Make the sheet, at the path that is given or the usual one; end with it or what failed."""
    sheet = Path(arguments[0]) if arguments else SHEET
    absent = [str(path.relative_to(REPOSITORY)) for path in missing()]
    if absent:
        sys.exit(
            f"demo: {', '.join(absent)} is missing. Check the repository out again, or train with "
            "`python -m miniature`."
        )
    try:
        run_demo(BASE, sheet)
    except (HostError, ServerError) as error:
        sys.exit(f"demo: {error}")
    print(sheet)


if __name__ == "__main__":
    main(sys.argv[1:])
