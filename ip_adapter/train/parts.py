"""One kind of features for all rows: which are missing, and making them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .pieces import DataError
from .store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

NOTHING = "nothing"
"""Key of the features of an empty text, of no picture and of no face."""


@dataclass(frozen=True, eq=False)
class Part(Generic[T]):
    """One kind of features: what each row's are called, and how they are made.

    Attributes:
        store: Where they are.
        keys: One per row.
        prepare: Reads what row i needs; runs in a thread.
        encode: What `prepare` gave -> tensors of one row.
        origins: How messages name row i.
        dtype: Of the tensors.
        nothing: Features of nothing; None where there is no such thing.
    """

    store: Store
    keys: tuple[str, ...]
    prepare: Callable[[int], T]
    encode: Callable[[T], dict[str, Tensor]]
    origins: Sequence[str]
    dtype: torch.dtype
    nothing: Callable[[], dict[str, Tensor]] | None = None

    def missing(self) -> list[int]:
        """One row for each key that has no entry."""
        first: dict[str, int] = {}
        for row, key in enumerate(self.keys):
            if key not in self.store:
                first.setdefault(key, row)
        return list(first.values())

    def keep(self, key: str, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Cast and store; numbers that overflow are refused."""
        kept = {}
        for name, tensor in tensors.items():
            whole = not tensor.is_floating_point()
            kept[name] = tensor if whole else tensor.to(self.dtype)
            if not bool(kept[name].isfinite().all()):
                raise DataError(
                    f"{origin}: its {name} have values that are not numbers, or too large for "
                    f"{str(self.dtype).removeprefix('torch.')}. The encoder may have overflowed: "
                    "start with --fp32-vae and --fp32-text-enc, or cache in float32."
                )
        self.store.add(key, kept)


def complete(part: Part[T], count: Callable[[], None], workers: int) -> None:
    """Encode what is missing of one part; what was done is on disk, however this ends.

    Args:
        part: What.
        count: Called after each row; it may raise to stop the work.
        workers: Threads that prepare rows.

    Raises:
        DataError: A file cannot be read, a number overflows, or the disk is full.
    """
    try:
        if part.nothing is not None and NOTHING not in part.store:
            part.keep(NOTHING, part.nothing(), "features of nothing")
        for row, prepared in _ahead(part, part.missing(), workers):
            part.keep(part.keys[row], part.encode(prepared), part.origins[row])
            count()
    except BaseException:
        try:
            part.store.flush()
        except DataError as error:  # it must not hide why the work ended
            log.warning("IP-Adapter: %s", error)
        raise
    part.store.flush()


def _ahead(part: Part[T], rows: Sequence[int], workers: int) -> Iterator[tuple[int, T]]:
    """Prepare rows in threads, a few before they are wanted."""
    waiting: deque[tuple[int, Future[T]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for row in rows:
                waiting.append((row, pool.submit(part.prepare, row)))
                if len(waiting) > 2 * workers:
                    yield _result(part, *waiting.popleft())
            while waiting:
                yield _result(part, *waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(part: Part[T], row: int, prepared: Future[T]) -> tuple[int, T]:
    try:
        return row, prepared.result()
    except DataError as error:
        raise DataError(
            f"{part.origins[row]}: {error}. Did the file change after the check? Start again."
        ) from error
