"""Measure what the paper claims, on the miniature, and write it down as docs/evidence.md.

    python -m miniature.evidence              measure all; 20 minutes on one core
    python -m miniature.evidence --page       write the page anew from docs/evidence.json

Every scene that is asked for is of a combination of shape, colour and texture that no part of the
miniature was trained on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ip_adapter.evaluate import metrics

from . import adapters, measures, studio, world
from .measures import ALL, Figure, Lab, Table, exact, over_seeds, share, verdict
from .world import Scene

COUNT = 96
"""Pictures in a condition."""

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
ADAPTERS = ("global", "plus")
DENOISE = 0.6
"""Of image-to-image."""

EACH = 4
"""Pictures of each sample under the paper's protocol."""

LAYOUT = ("shape", "place")
FOLLOWED = ("shape", "place", "layout", "texture", "colour", "ground", "look", "marks")


@dataclass(frozen=True, eq=False)
class Section:
    """What one question found.

    Attributes:
        key: Its name.
        tables: Figures.
        notes: Sentences that follow from the figures.
        columns: Pictures side by side, with what they are.
    """

    key: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    columns: tuple[tuple[str, Tensor], ...]


def quality(lab: Lab) -> Section:
    """How far the reader and the base can be trusted, before any adapter."""
    scenes = lab.references
    asked = [world.caption(scene) for scene in scenes]
    made = lab.make(asked)
    coded = lab.shown(scenes, coded=True)
    named = tuple(None if name == "marks" else made.agreement(scenes, name) for name in ALL)
    table = Table(
        "Agreement with the scene",
        ALL,
        {
            "chance": _chance(ALL),
            "the painted picture": lab.shown(scenes).line(scenes, ALL),
            "the same through the VAE": coded.line(scenes, ALL),
            "base, full caption": named,
        },
    )
    columns = (("scene", world.render(scenes)), ("by the VAE", coded.pictures))
    return Section("quality", (table,), (), (*columns, ("base", made.pictures)))


def sweep(lab: Lab) -> Section:
    """Image prompts alone, at rising weight."""
    scenes = lab.references
    tables, notes, columns = [], [], [("reference", world.render(scenes))]
    for adapter in ADAPTERS:
        rows = {}
        for weight in WEIGHTS:
            made = _weighted(lab, adapter, weight)
            rows[f"weight {weight:g}"] = made.line(scenes, ALL)
            if weight in (0.0, 0.5, 1.0) and (weight or adapter == ADAPTERS[0]):
                columns.append((f"{adapter} {weight:g}" if weight else "weight 0", made.pictures))
        tables.append(Table(f"Agreement with the reference: {adapter}", ALL, rows))
        notes.append(
            f"Weight 0 of {adapter} and no adapter: "
            + ("equal in every bit." if is_base_at_zero(lab, adapter) else "NOT equal.")
        )
    return Section("sweep", tuple(tables), tuple(notes), tuple(columns))


def is_base_at_zero(lab: Lab, adapter: str, few: int = 8) -> bool:
    """Whether weight 0 gives the very pictures of the base, on one run of the sampler."""
    found = lab.make(references=lab.references[:few], adapter=adapter, weight=0.0).pictures
    return torch.equal(found, lab.make([""] * few).pictures)


def image_only(lab: Lab) -> Section:
    """Image prompts alone against no reference, another one's reference, and chance."""
    scenes = lab.references
    rows: dict[str, tuple[Figure | None, ...]] = {
        "chance": _chance(ALL),
        "no adapter": lab.make().line(scenes, ALL),
    }
    columns = [("reference", world.render(scenes)), ("no adapter", lab.make().pictures)]
    for adapter in ADAPTERS:
        made = lab.make(references=scenes, adapter=adapter)
        rows[f"{adapter}, shuffled references"] = made.line(measures.shuffled(scenes), ALL)
        rows[adapter] = made.line(scenes, ALL)
        columns.append((adapter, made.pictures))
    table = Table("Agreement with the reference", ALL, rows)
    return Section("image_only", (table,), (), tuple(columns))


def multimodal(lab: Lab) -> Section:
    """Text names shape and place, the reference shows the look on another shape elsewhere."""
    targets = lab.targets
    texts = layouts(lab)
    rows: dict[str, tuple[Figure | None, ...]] = {
        "chance": _chance(FOLLOWED),
        "text alone": lab.make(texts).line(targets, FOLLOWED),
    }
    columns = [("reference", world.render(lab.givers)), ("text alone", lab.make(texts).pictures)]
    clashes = clashing(lab)
    chance = exact(measures.chance("colour"))
    conflicts = {"chance": (chance, chance, exact(1 - 2 * chance.value))}
    for adapter in ADAPTERS:
        alone = lab.make(references=lab.givers, adapter=adapter)
        both = lab.make(texts, lab.givers, adapter=adapter)
        rows[f"{adapter}: reference alone"] = alone.line(targets, FOLLOWED)
        rows[f"{adapter}: text and reference"] = both.line(targets, FOLLOWED)
        conflicts[adapter] = _conflict(lab, clashes, adapter)
        columns += [(f"{adapter} alone", alone.pictures), (f"{adapter} + text", both.pictures)]
    columns.append(("wanted", world.render(targets)))
    return Section(
        "multimodal",
        (
            Table(
                "Shape and place as the text says, the rest as the reference shows", FOLLOWED, rows
            ),
            Table(
                "Conflict: the text names another colour than the reference's; colour found",
                ("the text's", "the reference's", "another"),
                conflicts,
            ),
        ),
        (),
        tuple(columns),
    )


def layouts(lab: Lab) -> list[str]:
    """Texts that name the targets' shape and place and leave the look open."""
    return [world.caption(scene, LAYOUT) for scene in lab.targets]


def clashing(lab: Lab) -> list[Scene]:
    """The targets in a colour that is not the reference's."""
    names = list(world.COLOURS)
    return [
        replace(scene, colour=names[(names.index(scene.colour) + 3) % len(names)])
        for scene in lab.targets
    ]


def _conflict(lab: Lab, said: Sequence[Scene], adapter: str) -> tuple[Figure, ...]:
    texts = [world.caption(scene, ("colour", *LAYOUT)) for scene in said]
    made = lab.make(texts, lab.givers, adapter=adapter)
    by_text, by_image = made.values(said, "colour"), made.values(lab.givers, "colour")
    neither = [1.0 - one - other for one, other in zip(by_text, by_image, strict=True)]
    return share(by_text), share(by_image), share(neither)


def ablation(lab: Lab) -> Section:
    """Three designs with equal budget, each trained with three seeds."""
    names = ("look, image", "layout, image", "marks, image", "CLIP-I, image")
    names = (*names, "layout, both", "look, both", "marks, both")
    each: dict[str, tuple[Figure, ...]] = {}
    columns = [("reference", world.render(lab.givers))]
    for kind in adapters.KINDS:
        for seed in adapters.SEEDS:
            each[f"{kind}, seed {seed}"] = ablated(lab, kind, seed)
        both = lab.make(layouts(lab), lab.givers, adapter=kind)
        columns.append((f"{kind} + text", both.pictures))
    columns.append(("wanted", world.render(lab.targets)))
    rows = {}
    for kind in adapters.KINDS:
        own = [each[f"{kind}, seed {seed}"] for seed in adapters.SEEDS]
        rows[kind] = tuple(over_seeds(column) for column in zip(*own, strict=True))
    spread = Table("Mean of three training seeds, with the least and the greatest", names, rows)
    notes = [
        _compared("Decoupled (global) against simple", spread, "global", "simple", names),
        _compared("Plus against global", spread, "plus", "global", names),
    ]
    return Section(
        "ablation", (spread, Table("Seed by seed", names, each)), tuple(notes), tuple(columns)
    )


def ablated(lab: Lab, kind: adapters.Kind, seed: int) -> tuple[Figure, ...]:
    """The figures of one training: with the image prompt alone, and with text and image."""
    adapter = adapters.path(kind, seed).stem.removeprefix("miniature_")
    scenes = lab.references
    alone = lab.make(references=scenes, adapter=adapter)
    both = lab.make(layouts(lab), lab.givers, adapter=adapter)
    return (
        *alone.line(scenes, ("look", "layout", "marks")),
        alone.clip_i(lab.shown(scenes).embedded),
        *both.line(lab.targets, ("layout", "look", "marks")),
    )


def _compared(what: str, table: Table, one: str, other: str, names: Sequence[str]) -> str:
    found = [
        f"{name} {table[one, name].value - table[other, name].value:+.3f} "
        f"({verdict(table[one, name], table[other, name])})"
        for name in names
    ]
    return f"{what}: {'; '.join(found)}."


def reuse(lab: Lab) -> Section:
    """The adapters that were trained on the base, on the fine-tune of it."""
    texts, targets = layouts(lab), lab.targets
    names = ("layout", "texture", "colour", "ground", "look", "marks")
    rows: dict[str, tuple[Figure | None, ...]] = {}
    columns = [("reference", world.render(lab.givers))]
    for on, said in (("base", "base"), ("fine_tune", "fine-tune")):
        for adapter in (None, *ADAPTERS):
            how = {} if adapter is None else {"references": lab.givers, "adapter": adapter}
            made = lab.make(texts, on=on, **how)
            label = f"{said}, {adapter or 'no adapter'}"
            rows[label] = (*made.line(targets, names), made.outlined())
            columns.append((label, made.pictures))
    table = Table("Text names shape and place", (*names, "outlined"), rows)
    return Section("reuse", (table,), (), tuple(columns))


def structure(lab: Lab) -> Section:
    """The ControlNet reads a silhouette, the adapter a reference of another shape elsewhere."""
    hints, scenes = lab.others, lab.references
    wanted = [
        replace(scene, shape=hint.shape, place=hint.place)
        for scene, hint in zip(scenes, hints, strict=True)
    ]
    alone = lab.make(hints=hints)
    rows: dict[str, tuple[Figure | None, ...]] = {
        "chance": _chance(FOLLOWED),
        "hint alone": alone.line(wanted, FOLLOWED),
    }
    columns = [("reference", world.render(scenes)), ("hint", world.outlines(hints))]
    columns.append(("hint alone", alone.pictures))
    for adapter in ADAPTERS:
        free = lab.make(references=scenes, adapter=adapter)
        led = lab.make(references=scenes, hints=hints, adapter=adapter)
        rows[f"{adapter}: reference alone"] = free.line(wanted, FOLLOWED)
        rows[f"{adapter}: hint and reference"] = led.line(wanted, FOLLOWED)
        columns += [(f"{adapter} alone", free.pictures), (f"{adapter} + hint", led.pictures)]
    table = Table("Shape and place of the hint, the rest of the reference", FOLLOWED, rows)
    return Section("structure", (table,), (), tuple(columns))


def image_to_image(lab: Lab) -> Section:
    """From a picture, with the reference of another: what stays and what moves."""
    starts, scenes = lab.others, lab.references
    seen = ("shape", "place", "look", "marks")
    names = tuple(f"{name}, {whose}" for whose in ("start's", "reference's") for name in seen)
    rows, columns = {}, [("start", world.render(starts)), ("reference", world.render(scenes))]
    for adapter in (None, *ADAPTERS):
        how = {} if adapter is None else {"references": scenes, "adapter": adapter}
        made = lab.make(starts=starts, denoise=DENOISE, **how)
        label = adapter or "no adapter"
        rows[label] = (*made.line(starts, seen), *made.line(scenes, seen))
        columns.append((label, made.pictures))
    rows = {"chance": _chance(seen) * 2, **rows}
    table = Table(f"Denoise {DENOISE:g}, no text", names, rows)
    return Section("image_to_image", (table,), (), tuple(columns))


def inpainting(lab: Lab) -> Section:
    """In a mask only: what is outside stays, what is inside follows the reference."""
    starts, scenes = lab.others, lab.references
    names = ("latents outside", "pixels outside", "pixels inside", "texture", "colour")
    rows: dict[str, tuple[Figure | None, ...]] = {}
    columns = [("start", world.render(starts)), ("reference", world.render(scenes))]
    for mask in ("half", "shape"):
        for adapter in (None, *ADAPTERS):
            how = {} if adapter is None else {"references": scenes, "adapter": adapter}
            made = lab.make(starts=starts, mask=mask, **how)
            label = f"{mask}, {adapter or 'no adapter'}"
            follows = made.line(scenes, names[3:]) if mask == "shape" else (None, None)
            rows[label] = (*kept(lab, made, measures.masks(starts, mask)), *follows)
            columns.append((label, made.pictures))
    return Section("inpainting", (Table("By mask", names, rows),), (), tuple(columns))


def kept(lab: Lab, made: measures.Shots, mask: Tensor) -> tuple[Figure, ...]:
    """Change of latents outside of a mask at most; of pixels outside and inside in the mean.

    Pixels are compared with the start as the VAE gives it back. "Outside" leaves out a latent's
    width around the mask, for the decoder mixes neighbours.
    """
    assert made.start is not None
    away = (made.latents - made.start).abs().amax(1)  # [N, 8, 8]
    away[mask[:, ::8, ::8] > 0] = 0.0
    greatest = float(away.max())
    change = (made.pictures - lab.decode(made.start)).abs().mean(1)  # [N, 64, 64]
    near = torch.nn.functional.max_pool2d(mask[:, None], 17, stride=1, padding=8)[:, 0]
    out, into = (
        ((change * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)).tolist()
        for where in (1 - near, mask)
    )
    n = len(mask)
    return Figure(greatest, greatest, greatest, n, "exact"), measures.mean(out), measures.mean(into)


def scores(lab: Lab) -> Section:
    """CLIP-I and CLIP-T under the paper's protocol: four pictures for each reference."""
    samples = lab.references[: lab.count // EACH]
    scenes = [scene for scene in samples for _ in range(EACH)]
    swapped = [scene for scene in measures.shuffled(samples) for _ in range(EACH)]
    captions = [world.caption(scene) for scene in samples]
    images, words = lab.shown(samples).embedded, lab.clip.texts(captions)
    names = ("CLIP-I", "CLIP-T", "cosine under CLIP-T")
    tables, columns = [], [("reference", world.render(samples))]
    for title, texts in (
        ("Image prompt only", None),
        ("Image prompt and full caption", [world.caption(scene) for scene in scenes]),
    ):
        rows = {}
        for label, references, adapter in (
            ("no adapter", None, "global"),
            ("global, shuffled references", swapped, "global"),
            ("plus, shuffled references", swapped, "plus"),
            ("global", scenes, "global"),
            ("plus", scenes, "plus"),
        ):
            how = {} if references is None else {"adapter": adapter}
            made = lab.make(texts or [""] * len(scenes), references, **how)
            embedded = made.embedded.unflatten(0, (len(samples), EACH))
            cosine = metrics.clip_t(embedded, words)
            figures = (metrics.clip_i(embedded, images), metrics.clip_score(cosine), cosine)
            rows[label] = tuple(measures.summary(metrics.summarise(x)) for x in figures)
            if "shuffled" not in label:
                columns.append((label + (" + text" if texts else ""), made.pictures[::EACH]))
        tables.append(Table(title, names, rows))
    return Section("scores", tuple(tables), (), tuple(columns))


SECTIONS: tuple[Callable[[Lab], Section], ...] = (
    quality,
    sweep,
    image_only,
    multimodal,
    ablation,
    reuse,
    structure,
    image_to_image,
    inpainting,
    scores,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; the exit status is 0."""
    from . import evidence_page

    parser = argparse.ArgumentParser(
        prog="python -m miniature.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=COUNT, help="pictures in a condition")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    if not options.page:
        began = time.monotonic()
        torch.set_num_threads(1)  # more are slower on models this small
        lab = Lab(studio.Studio.open(), options.count)
        found = []
        for measure in SECTIONS:
            found.append(measure(lab))
            sys.stderr.write(f"{measure.__name__}: {time.monotonic() - began:.0f} s\n")
        evidence_page.keep(found, evidence_page.environment(lab, time.monotonic() - began))
    evidence_page.write()
    return 0


def _weighted(lab: Lab, adapter: str, weight: float) -> measures.Shots:
    if weight == 0.0:
        return lab.make()  # `is_base_at_zero` proves it
    return lab.make(references=lab.references, adapter=adapter, weight=weight)


def _chance(names: Sequence[str]) -> tuple[Figure, ...]:
    return tuple(exact(measures.chance(name)) for name in names)


if __name__ == "__main__":
    sys.exit(main())
