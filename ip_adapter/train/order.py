"""In which order rows are seen: endless, seeded, resumable, shared out over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .pieces import DataError


@dataclass(frozen=True)
class Position:
    """How far a run has come in the data.

    Attributes:
        epoch: How many times all rows have been seen.
        index: How many rows of the current epoch have been seen.
    """

    epoch: int = 0
    index: int = 0


START = Position()


def permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch: a permutation of ``0..rows-1``, the same on every machine.

    Raw bits of PCG64 are sorted: NumPy promises these bits for good, unlike its shuffles.
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(rows)
    return np.argsort(bits, kind="stable")


def order(
    rows: int,
    batch: int,
    seed: int,
    start: Position = START,
    *,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[list[int], Position]]:
    """Endless batches of row numbers; every process sees its part of one common order.

    The epochs' permutations follow each other without a gap, and a batch may span two. Each step
    takes ``batch * world`` rows, of which each process gets consecutive ones; so the parts of all
    ranks, in the order of ranks, are what one process with the whole batch gets.

    Args:
        rows: How many rows there are.
        batch: Rows per step and process.
        seed: Decides the order.
        start: Where to go on, by any number of processes and any batch.
        rank: Which process this is.
        world: How many there are.

    Yields:
        This process's rows, and the position after the step, the same in all processes.

    Raises:
        DataError: There are no rows, or a number makes no sense.
    """
    if rows < 1 or batch < 1 or seed < 0 or not 0 <= rank < world or not 0 <= start.index <= rows:
        raise DataError(
            f"No order of {rows} rows in batches of {batch} with seed {seed} from row "
            f"{start.index} for process {rank} of {world}. Needed are at least one row and one row "
            "per batch, a seed of 0 or more, a start within the rows, and ranks from 0."
        )
    epoch, index = start.epoch, start.index
    shuffled = permutation(rows, seed, epoch)
    while True:
        step: list[int] = []
        while len(step) < batch * world:
            if index == rows:
                epoch, index = epoch + 1, 0
                shuffled = permutation(rows, seed, epoch)
            taken = shuffled[index : index + batch * world - len(step)].tolist()
            step += taken
            index += len(taken)
        yield step[rank * batch : (rank + 1) * batch], Position(epoch, index)
