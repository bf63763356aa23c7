"""The command line: say what files are, and convert them.

Usage, in the pack's folder:
    python -m ip_adapter describe FILE...
    python -m ip_adapter convert SOURCE [TARGET]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import catalogue, checkpoint
from .convert import convert
from .detection import AUTOMATIC
from .errors import IPAdapterError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 if a file was refused."""
    options = _parser().parse_args(arguments)
    if options.command == "describe":
        return max(_describe(path) for path in options.files)
    return _convert(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ip_adapter", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    describe = commands.add_parser("describe", help="say what adapter files hold")
    describe.add_argument("files", nargs="+", type=Path)
    converting = commands.add_parser(
        "convert", help="write any adapter or training dump as one flat .safetensors"
    )
    converting.add_argument("source", type=Path, help="a file, or the folder of a training dump")
    converting.add_argument(
        "target", type=Path, nargs="?", help="default: the source's name with .safetensors"
    )
    converting.add_argument(
        "--variant",
        default=AUTOMATIC,
        choices=[AUTOMATIC, *sorted({row.variant for row in catalogue.PUBLISHED})],
        help="which adapter it is, where tensors leave a choice",
    )
    converting.add_argument("--licence", help="its terms, written into the metadata")
    converting.add_argument("--overwrite", action="store_true", help="replace an existing target")
    return parser


def _describe(path: Path) -> int:
    try:
        found = checkpoint.read(path)
        found.build()
    except (IPAdapterError, OSError) as error:
        return _refuse(error)
    sys.stdout.write(f"{path.name}: {found.spec.describe()}\n")
    return 0


def _convert(options: argparse.Namespace) -> int:
    source: Path = options.source
    target: Path = options.target or source.with_suffix(".safetensors")
    try:
        done = convert(
            source,
            target,
            variant=options.variant,
            licence=options.licence,
            overwrite=options.overwrite,
        )
    except (IPAdapterError, OSError) as error:
        return _refuse(error)
    sys.stdout.write(f"{done.path}: {done.spec.describe()}, {done.tensors} tensors\n")
    return 0


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"{error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
