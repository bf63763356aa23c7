"""docs/performance.md: the figures of results, between words written by hand (`words`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from .. import files
from .counting import Work
from .results import Figure, Results, Row
from .words import METHODS, REMARKS, TITLES

_VERDICTS = {"met": "met", "missed": "**missed**", "open": "open", "": ""}

_INTRODUCTION = """# Performance

What image prompts cost, measured against the same work without them. This page is written by
`python -m ip_adapter.bench --page`; only its words are written by hand.

All figures are ratios of times taken in one process, in interleaved rounds whose order is turned
round each time: the median over rounds, with the interval in which 95 % of the medians lie when
rounds are drawn again (bootstrap). Counted figures have no interval. Models have published shapes
and random weights. A goal is *met* where the whole interval is within it, **missed** where none of
it is, and *open* where the interval holds the goal: then the noise is larger than what is asked.
Where goals are for a *try*, on models a tenth as wide, they mean nothing.
"""


def write(path: Path, many: Sequence[Results]) -> None:
    """Write the page.

    Args:
        path: The file.
        many: Results, one for each machine.
    """
    files.write(path, markdown(many).encode())


def markdown(many: Sequence[Results]) -> str:
    """The page of some results."""
    parts = [_INTRODUCTION, _machines(many)]
    for group, title in TITLES.items():
        tables = [part for results in many for part in _tables(results, group)]
        if tables:
            remark = REMARKS.get(group, "")
            parts += [f"## {title}\n", f"{METHODS[group]}\n", *tables]
            parts += [f"{remark}\n"] if remark else []
    return "\n".join(parts)


def _machines(many: Sequence[Results]) -> str:
    lines = ["## Machines and commands\n"]
    for results in many:
        found = results.environment
        versions = ", ".join(
            f"{name} {found[name]}"
            for name in ("comfyui", "torch", "diffusers", "safetensors", "python")
            if name in found
        )
        kind = "" if found.get("size") == "real" else " A try on small models."
        lines += [f"- **{found['device']}**: {found['machine']}; {versions}.{kind}"]
        lines += [f"  `{command(results, group)}`" for group in _groups(results)]
    return "\n".join([*lines, ""])


def command(results: Results, group: str) -> str:
    """What measures a group anew."""
    rounds = sorted({one.rounds for one in results.measurements if one.group == group})
    found = results.environment
    return (
        f"python -m ip_adapter.bench {group} --again --device {found['device']} "
        f"--size {found['size']} --rounds {rounds[-1]}"
    )


def _groups(results: Results) -> list[str]:
    return [group for group in TITLES if results.rows(group)]


def _tables(results: Results, group: str) -> Iterator[str]:
    rows = results.rows(group)
    if not rows:
        return
    yield f"### {results.environment['machine']}\n"
    lines = [_cells("case", "measure", "goal", "measured", "")]
    lines.append(_cells("---", "---", "---", "---", "---"))
    for row in rows:
        case = row.case + (f" ({row.note})" if row.note else "")
        if not row.figures:
            lines.append(_cells(case, "", "", "", ""))
        for place, one in enumerate(row.figures):
            first = "" if place else case
            lines.append(_cells(first, one.measure, _goal(one), shown(one), _VERDICTS[one.verdict]))
    yield "\n".join([*lines, ""])
    counted = [row for row in rows if row.work is not None]
    if counted:
        yield _work(counted)


def _work(rows: Sequence[Row]) -> str:
    names = [field.name for field in fields(Work)]
    lines = [_cells("a step, without + added", *names), _cells(*["---"] * (1 + len(names)))]
    for row in rows:
        assert row.work is not None
        less, more = row.work
        added = more - less
        cells = [f"{getattr(less, name):.4g} {getattr(added, name):+.3g}" for name in names]
        lines.append(_cells(row.case, *cells))
    return "\n".join([*lines, ""])


def shown(one: Figure) -> str:
    """A number, its interval and its unit: ``1.012 (0.998 to 1.026)``."""
    unit = f" {one.unit}" if one.unit else ""
    if one.low is None or one.high is None:
        return f"{_number(one.value)}{unit}"
    return f"{_number(one.value)} ({_number(one.low)} to {_number(one.high)}){unit}"


def _number(value: float) -> str:
    """Three decimals for ratios; whole numbers and large ones without needless digits."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _goal(one: Figure) -> str:
    if one.goal is None:
        return ""
    unit = f" {one.unit}" if one.unit else ""
    return (
        f"{_number(one.goal)}{unit}, within noise"
        if one.is_noise_met
        else (f"at most {_number(one.goal)}{unit}")
    )


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
