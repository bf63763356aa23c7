"""Train the miniature's adapters with the project's own trainer, as a user would train one.

python -m miniature global_0 plus_0 simple_0
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

from ip_adapter.host.standalone import Models
from ip_adapter.train import data, recipe, session

from . import family, world

Kind = Literal["global", "plus", "simple"]
"""Which adapter: with a global or a fine-grained projection, or the coupled one of the ablation."""

KINDS: tuple[Kind, ...] = ("global", "plus", "simple")
SEEDS = (0, 1, 2)
"""Each kind is trained with each of these; the first is the one that the demo uses."""

PAIRS = 4000
STEPS = 1500
FIELDS: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 32,
    # The paper's 1e-4 is for a million steps.
    "learning_rate": 5e-4,
    "save_every": 1_000_000,
    "validate_every": 0,
}
"""Of every recipe; the rest are the trainer's defaults, which are the paper's."""

_OWN: dict[Kind, dict[str, Any]] = {
    "global": {"projection": "global"},
    "plus": {"projection": "plus", "inner": 64, "heads": 4, "depth": 2},
    "simple": {"projection": "global", "design": "simple"},
}


def path(kind: Kind, seed: int = 0) -> Path:
    """Where an adapter lies among the models."""
    name = f"miniature_{kind}" if seed == SEEDS[0] else f"miniature_{kind}_{seed}"
    # The coupled adapter is a projection alone, which no node can apply.
    listed = seed == SEEDS[0] and kind != "simple"
    return (family.ADAPTERS if listed else family.ABLATION) / f"{name}.safetensors"


def write_pairs(rows: Path, count: int = PAIRS, seed: int = 0) -> Path:
    """Paint training pairs: half with the target as reference, half with another like it.

    The other shares texture, colour, ground and marks, and is elsewhere. So a reference tells how
    things look; what is where is told by the text, or, without one, also by the reference.

    Args:
        rows: The JSON lines that `ip_adapter.train` reads; the pictures go beside it.
        count: How many pairs.
        seed: Decides which.

    Returns:
        `rows`.
    """
    folder = rows.parent
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines = []
    for number in range(count):
        scene = world.draw(rng)
        row = {
            "image": f"{number:05d}.png",
            "text": world.caption(scene, world.some_names(rng, 0.5)),
        }
        save(folder / row["image"], scene)
        if rng.random() < 0.5:
            row["reference"] = f"{number:05d}-reference.png"
            save(folder / row["reference"], world.like(scene, rng))
        lines.append(json.dumps(row))
    rows.write_text("\n".join(lines) + "\n")
    return rows


def save(file: Path, scene: world.Scene) -> None:
    """Paint one scene into a PNG."""
    world.pil(world.render([scene]))[0].save(file)


def cache(models: Models, rows: Path) -> None:
    """Compute the features of all pairs, so that several trainings can read them at once."""
    for kind in KINDS[:2]:
        _prepare(kind, models, rows, seed=0, steps=1)
    (rows.parent / "cached").touch()


def train(
    kind: Kind, models: Models, rows: Path, out: Path, *, seed: int = 0, steps: int = STEPS
) -> Path:
    """Train one adapter.

    Args:
        kind: Which.
        models: The base and the image encoder, as the host loads them.
        rows: See `write_pairs`; with their features, see `cache`.
        out: The run's folder.
        seed: Decides weights, order, noise and drops.
        steps: Of AdamW.

    Returns:
        The adapter's file.
    """
    return _prepare(kind, models, rows, seed=seed, steps=steps).train(out).weights


def _prepare(kind: Kind, models: Models, rows: Path, *, seed: int, steps: int) -> session.Session:
    plan = recipe.make({**FIELDS, **_OWN[kind], "seed": seed, "steps": steps})
    table = data.check(data.read(rows))
    return session.prepare(plan, models, table, rows.parent / "features")
