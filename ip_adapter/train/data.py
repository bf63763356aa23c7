"""Training rows: which picture goes with which words, reference and face, from three formats.

Rows come from a folder of pictures with captions beside them, from JSON lines, or from webdataset
shards. Reading makes a table and collects what is wrong with it; `check` then opens everything
once, before any training, and names the rows that cannot be used. In which order they are seen is
decided in `order`; nothing here encodes (`cache`).

Formats:

- folder: ``cat.png`` with its caption in ``cat.txt``, also in folders below;
- JSON lines: ``{"image": path, "text": words}`` and, if wanted, ``"reference"`` (a picture; without
  it the target is its own reference, as in the paper) and ``"face"`` (a file with a face vector).
  Paths are relative to the file;
- webdataset shards, uncompressed tar: ``key.jpg`` with ``key.txt``, or ``key.json`` that has "text"
  or "caption"; if wanted ``key.reference.jpg`` and ``key.face.npy``. Braces name many:
  ``"part-{000..120}.tar"``. The webdataset library gives the rules of naming; it can only stream,
  so members are found by the standard library's tarfile and read wherever they lie.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .pieces import VECTORS, DataError, Piece, load_picture, load_vector

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of the files that count as pictures."""

SHOWN = 5
"""How many wrong rows a message lists."""

_FIELDS = ("image", "text", "reference", "face")

Progress = Callable[[int, int], None]
"""Gets how many are done, and of how many. It may raise to stop the work."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training pair.

    Attributes:
        origin: File and line, or shard and key: how messages name it.
        image: The target picture.
        text: Its caption, which may be empty.
        reference: The picture that prompts; None where the target is its own.
        face: A file with the face vector of the reference.
    """

    origin: str
    image: Piece
    text: str
    reference: Piece | None = None
    face: Piece | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with one row.

    Attributes:
        origin: See `Row`.
        what: What was found and what is needed.
    """

    origin: str
    what: str


@dataclass(frozen=True)
class Table:
    """What was read: usable rows, and what could not become one.

    Attributes:
        rows: In a fixed order: by name, by line, or as the shard has them.
        problems: Of rows that are not in `rows`.
    """

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...] = ()


def read(source: str | Path) -> Table:
    """Read a table of rows, without opening a picture.

    Args:
        source: A folder of pictures or of shards, a ``.jsonl`` file, or one or many shards.

    Raises:
        DataError: There is nothing of the kind, or not one row in it.
    """
    path = Path(source)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        table = _join(map(_read_shard, shards)) if shards else _read_folder(path)
    elif path.suffix == ".tar":
        table = _join(map(_read_shard, _expand(str(source))))
    elif path.suffix in (".jsonl", ".json") and path.is_file():
        table = _read_lines(path)
    else:
        found = "is no such kind of file" if path.exists() else "does not exist"
        raise DataError(
            f"The training data '{source}' {found}. Needed is a folder of pictures with captions, "
            "a .jsonl file, or .tar shards."
        )
    if not table.rows and not table.problems:
        raise DataError(
            f"The training data '{source}' holds no row. Needed are pictures "
            f"({', '.join(PICTURES)}) with a caption of the same name in .txt, lines of JSON, or "
            "shards with both."
        )
    return table


def check(
    table: Table, *, needs_face: bool = False, progress: Progress | None = None, workers: int = 4
) -> tuple[Row, ...]:
    """Open every file of every row once, and refuse the table if any is wrong.

    Args:
        table: See `read`.
        needs_face: Whether the adapter reads face vectors, so that each row must have one.
        progress: Called after each row.
        workers: Threads that decode.

    Returns:
        The rows.

    Raises:
        DataError: It names the first wrong rows, what is wrong with each, and how many there are.
    """
    problems = list(table.problems)
    first: dict[tuple[object, ...], str] = {}
    with ThreadPoolExecutor(workers) as pool:
        step = 64 * workers  # not all at once: each waiting task takes memory
        for start in range(0, len(table.rows), step):
            some = table.rows[start : start + step]
            for row, found in zip(some, pool.map(partial(_faults, needs_face), some), strict=True):
                problems += [Problem(row.origin, what) for what in found]
                same = first.setdefault((row.image, row.text, row.reference, row.face), row.origin)
                if same != row.origin:
                    problems.append(Problem(row.origin, f"is the same row as {same}; remove one"))
            if progress is not None:
                progress(start + len(some), len(table.rows))
    if problems:
        raise DataError(_report(problems, len(table.rows) + len(table.problems)))
    return table.rows


def _faults(needs_face: bool, row: Row) -> list[str]:
    """Everything that is wrong with a row's files."""
    found = []
    for piece in dict.fromkeys((row.image, row.reference or row.image)):
        try:
            load_picture(piece)
        except DataError as error:
            found.append(str(error))
    if row.face is not None:
        try:
            load_vector(row.face)
        except DataError as error:
            found.append(str(error))
    elif needs_face:
        found.append('has no face vector, which this adapter reads; add "face"')
    return found


def _report(problems: Sequence[Problem], total: int) -> str:
    listed = "\n".join(f"  {problem.origin}: {problem.what}" for problem in problems[:SHOWN])
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    wrong = len({problem.origin for problem in problems})
    return (
        f"{wrong} of {total} rows of the training data cannot be used:\n{listed}{more}\nNothing "
        "was trained. Mend or remove these rows and start again."
    )


def _join(tables: Iterable[Table]) -> Table:
    rows: list[Row] = []
    problems: list[Problem] = []
    for table in tables:
        rows += table.rows
        problems += table.problems
    return Table(tuple(rows), tuple(problems))


def _read_folder(folder: Path) -> Table:
    """Pictures with captions of the same name beside them, in a folder and those below it."""
    rows, problems = [], []
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    captions = Counter(path.with_suffix(".txt") for path in files)
    for path in files:
        origin = path.relative_to(folder).as_posix()
        caption = path.with_suffix(".txt")
        try:
            if captions[caption] > 1:
                raise DataError(f"shares {caption.name} with another picture; give it its own name")
            if not caption.is_file():
                raise DataError(f"has no caption {caption.name} beside it; it may be an empty file")
            rows.append(Row(origin, Piece(path), _words(caption.read_bytes())))
        except (DataError, OSError) as error:
            problems.append(Problem(origin, str(error)))
    return Table(tuple(rows), tuple(problems))


def _read_lines(path: Path) -> Table:
    """JSON lines; blank ones do not count."""
    rows, problems = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            origin = f"{path.name} line {number}"
            try:
                if line.strip():
                    rows.append(_line_row(origin, _object(line), path.parent))
            except DataError as error:
                problems.append(Problem(origin, str(error)))
    return Table(tuple(rows), tuple(problems))


def _line_row(origin: str, fields: dict[str, object], folder: Path) -> Row:
    """The row that a JSON object describes.

    Raises:
        DataError: A field is missing, unknown or of another type.
    """
    # A misspelt "reference" would train on the target instead, without a word.
    unknown = sorted(fields.keys() - set(_FIELDS))
    if unknown:
        raise DataError(f"has an unknown key {unknown[0]!r}; needed are some of {_FIELDS}")
    missing = sorted({"image", "text"} - fields.keys())
    if missing:
        raise DataError(f'has no "{missing[0]}"')
    pieces: dict[str, Piece | None] = {}
    for name in ("image", "reference", "face"):
        value = fields.get(name)
        if value is None and name != "image":
            pieces[name] = None
        elif isinstance(value, str) and value and "\0" not in value:
            pieces[name] = Piece(folder / value)
        else:
            raise DataError(f'"{name}" is {json.dumps(value)[:60]}; needed is the path of a file')
    image = pieces["image"]
    assert image is not None
    return Row(origin, image, _text(fields["text"]), pieces["reference"], pieces["face"])


def _expand(source: str) -> list[Path]:
    """Shards named with braces, as webdataset names them.

    Raises:
        DataError: The webdataset library is not installed, or a shard is missing.
    """
    expand, _ = _webdataset()
    paths = [Path(name) for name in expand(source)] if "{" in source else [Path(source)]
    for path in paths:
        if not path.is_file():
            raise DataError(f"The shard '{path}' does not exist; it is named by '{source}'.")
    return paths


def _webdataset() -> tuple[Callable[[str], list[str]], Callable[[str], tuple[str, str]]]:
    """Webdataset's expansion of braces, and its division of a member's name."""
    try:
        from webdataset.shardlists import expand_urls
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise DataError(
            f"Training data in .tar shards needs the webdataset library, which is missing ({error})"
            ". Install it: pip install webdataset"
        ) from error
    return expand_urls, base_plus_ext


def _read_shard(path: Path) -> Table:
    """The samples of a webdataset shard; a damaged end spoils only what lies there."""
    _, divide = _webdataset()
    samples: dict[str, dict[str, Piece]] = {}
    rows, problems = [], []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                key, ending = divide(member.name)
                if not member.isreg() or not key or Path(key).name.startswith("__"):
                    continue
                piece = Piece(path, member.name, member.offset_data, member.size)
                ending = ending.lower()
                if ending in samples.setdefault(key, {}):
                    problems.append(Problem(f"{path.name} {key}", f"has two members .{ending}"))
                samples[key][ending] = piece
    except (tarfile.TarError, OSError, EOFError) as error:
        what = f"is no whole, uncompressed tar ({error}); unpack a .gz, or fetch the shard again"
        problems.append(Problem(path.name, what))
    for key, pieces in samples.items():
        origin = f"{path.name} {key}"
        try:
            rows.append(_sample_row(origin, pieces))
        except (DataError, OSError) as error:
            problems.append(Problem(origin, str(error)))
    return Table(tuple(rows), tuple(problems))


def _sample_row(origin: str, pieces: dict[str, Piece]) -> Row:
    """The row that the members of one key make.

    Raises:
        DataError: There is no picture, more than one, or no caption.
    """
    image = _member(pieces, "", PICTURES)
    if image is None:
        raise DataError(f"has no picture, only .{', .'.join(sorted(pieces))}")
    if "txt" in pieces:
        text = _words(pieces["txt"].read())
    elif "json" in pieces:
        described = _object(pieces["json"].read())
        name = "text" if "text" in described else "caption"
        if name not in described:
            raise DataError('has no .txt, and no "text" or "caption" in its .json')
        text = _text(described[name])
    else:
        raise DataError("has no caption; needed is a member .txt or .json")
    reference = _member(pieces, "reference", PICTURES)
    return Row(origin, image, text, reference, _member(pieces, "face", VECTORS))


def _member(pieces: dict[str, Piece], role: str, endings: Sequence[str]) -> Piece | None:
    """The one member with a role; `endings` begin with a dot.

    Raises:
        DataError: There are several.
    """
    names = [f"{role}{ending}".removeprefix(".") for ending in endings]
    found = [name for name in names if name in pieces]
    if len(found) > 1:
        raise DataError(f"has both .{found[0]} and .{found[1]}; needed is one")
    return pieces[found[0]] if found else None


def _words(content: bytes) -> str:
    """A caption's text.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"the caption is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error


def _text(value: object) -> str:
    """A caption from JSON.

    Raises:
        DataError: It is no text, or one that no tokenizer can take.
    """
    if not isinstance(value, str):
        raise DataError(f'"text" is {json.dumps(value)[:60]}; needed is a string, maybe empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'"text" is not valid Unicode ({error.reason})') from error
    return value.strip()


def _object(content: bytes) -> dict[str, object]:
    """One JSON object.

    Raises:
        DataError: It is not UTF-8, no JSON, no object, or has a key twice.
    """
    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start}: {error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"is a JSON {type(found).__name__}; needed is an object in braces")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f'has the key "{twice}" twice')
    return found
