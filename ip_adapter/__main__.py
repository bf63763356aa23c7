"""The command line: say what files are, convert them, list and download what was published.

Usage, in the pack's folder:
    python -m ip_adapter describe FILE...
    python -m ip_adapter convert SOURCE [TARGET]
    python -m ip_adapter models [--family FAMILY] [--purpose PURPOSE] [--installed]
    python -m ip_adapter download NAME...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import catalogue, checkpoint, downloads, hub, model_folders
from .convert import convert
from .detection import AUTOMATIC
from .downloads import ALL, Download, Installed
from .errors import DownloadError, IPAdapterError
from .model_folders import ModelFolders
from .obtain import Request, missing, obtain

STOPPED = 130
"""The exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 if a file was refused."""
    options = _parser().parse_args(arguments)
    match options.command:
        case "describe":
            return max(_describe(path) for path in options.files)
        case "convert":
            return _convert(options)
        case "models":
            return _models(options)
    return _download(options)


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
    _add_models(
        commands.add_parser("models", help="list what was published, and what is installed")
    )
    _add_download(commands.add_parser("download", help="fetch adapters and encoders by name"))
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    slugs = dict.fromkeys(one.name.split("/")[0] for one in downloads.DOWNLOADS if one.family)
    parser.add_argument("--family", default=ALL, choices=[ALL, *slugs], help="of the base model")
    parser.add_argument("--purpose", default=ALL, choices=[ALL, *catalogue.PURPOSES])
    parser.add_argument("--installed", action="store_true", help="only what is installed")
    _add_folders(parser)


def _add_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="as `models` lists them")
    parser.add_argument(
        "--accept-licence",
        action="store_true",
        help="accept the non-commercial licence of the face adapters",
    )
    parser.add_argument(
        "--without-encoder",
        action="store_true",
        help="do not fetch the image encoder that an adapter reads",
    )
    _add_folders(parser)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--comfyui",
        type=Path,
        metavar="DIR",
        help="the ComfyUI whose folders are meant, extra_model_paths.yaml included; default: "
        "COMFYUI_PATH, else the one that this pack is installed in",
    )
    where.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="a folder of models instead: adapters go to its ipadapter, encoders to its "
        "clip_vision",
    )


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


def _models(options: argparse.Namespace) -> int:
    try:
        folders = _folders(options)
        present = model_folders.installed(folders) if folders else None
    except IPAdapterError as error:
        return _refuse(error)
    rows = downloads.select(options.family, options.purpose)
    if options.installed:
        if present is None:
            return _refuse(_no_folder())
        rows = tuple(one for one in rows if one.name in present)
    for line in _table(rows, present):
        sys.stdout.write(f"{line}\n")
    return 0


def _table(rows: Sequence[Download], present: Installed | None) -> list[str]:
    """The rows of a list as columns of equal width, and what they leave open below."""
    if not rows:
        return ["Nothing of that kind."]
    head = ("name", "purpose", "size", "licence", "needs", "state")
    cells = [
        (
            one.name,
            one.purpose,
            hub.words(one.size),
            downloads.short_licence(one),
            one.needs,
            downloads.state(one, present),
        )
        for one in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *cells)
    ]
    if present is None:
        lines += ["", f"What is installed is not known. {_no_folder()}"]
    return [*lines, "", *downloads.notes(rows).splitlines()]


def _download(options: argparse.Namespace) -> int:
    try:
        requests = [
            Request(downloads.find(name), options.accept_licence, not options.without_encoder)
            for name in options.names
        ]
        folders = _folders(options)
        if folders is None:
            raise _no_folder()
        present = model_folders.installed(folders)
        for request in requests:  # all that can be refused is, before the first download
            missing(request, present, folders)
        for request in requests:
            done = obtain(request, present, folders)
            present |= done.added
            sys.stdout.write(f"{done.text}\n")
    except IPAdapterError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. What has arrived is kept: run it again to get the rest.\n")
        return STOPPED
    return 0


def _folders(options: argparse.Namespace) -> ModelFolders | None:
    if options.to is not None:
        return model_folders.of_models(options.to.expanduser().absolute())
    comfyui = model_folders.find_comfyui(options.comfyui)
    return None if comfyui is None else model_folders.of_comfyui(comfyui)


def _no_folder() -> DownloadError:
    return DownloadError(
        "No ComfyUI was found around this pack. Name it with --comfyui DIR or COMFYUI_PATH, or a "
        "folder of models with --to FOLDER."
    )


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"{error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
