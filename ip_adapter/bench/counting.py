"""Work and memory that is counted, not timed: the same on every machine, without noise.

Counted is what reaches torch's dispatcher. In inference mode, which the host samples in, that is
the call as Python makes it; elsewhere it is what the call is made of.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import BenchError

_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}
_READS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal"}
_CONVOLUTIONS = {"conv2d", "convolution"}


@dataclass(frozen=True)
class Work:
    """What a piece of work is made of.

    Attributes:
        operators: Calls of torch, views included.
        attentions: Calls of torch's attention; the host's own for a CPU is written in products.
        products: Calls of matrix products and Linears.
        reads: Values read back from a tensor: on a GPU each one waits.
        allocations: Tensors made with memory of their own.
        flops: Arithmetic in attention, products and convolutions, two for a multiplication and
            an addition.
    """

    operators: int = 0
    attentions: int = 0
    products: int = 0
    reads: int = 0
    allocations: int = 0
    flops: int = 0

    def __sub__(self, other: Work) -> Work:
        names = (one.name for one in fields(self))
        return Work(**{name: getattr(self, name) - getattr(other, name) for name in names})


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the work done within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = {field.name: 0 for field in fields(Work)}

    @property
    def work(self) -> Work:
        """What was counted."""
        return Work(**self._counts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call, and make it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = _storages((args, kwargs))
        counts = self._counts
        counts["operators"] += 1
        counts["attentions"] += "scaled_dot_product" in name
        counts["products"] += name in _PRODUCTS
        counts["reads"] += name in _READS
        counts["allocations"] += bool(_storages(out).keys() - given.keys())
        counts["flops"] += _flops(name, args, out)
        return out


def count(work: Callable[[], object]) -> Work:
    """Count the work of one call."""
    counter = Count()
    with counter:
        work()
    return counter.work


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of the tensors that are made within it; `peak` is the most at a time.

    What was there before does not count, nor does what an operator needs inside for itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call, and note the storages it made."""
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        out = func(*args, **kwargs)
        for place, storage in _storages(out).items():
            if place in given or place in self._known:
                continue
            size = storage.nbytes()
            self._known.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, place, size).atexit = False
        return out

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """The most memory that tensors made by a call have at a time.

    Args:
        work: On a CPU it should not run in inference mode, whose operators hide their parts.
        device: On CUDA the allocator is asked, on a CPU tensors are counted: its process's memory
            does not resolve the megabytes of an image prompt.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated() - before)
    live = LiveBytes()
    with live:
        work()
    return live.peak


def tensor_bytes() -> int:
    """The memory of all tensors that Python can reach now, each storage once."""
    gc.collect()
    seen: dict[int, int] = {}
    for thing in gc.get_objects():
        # By its type, for some packages' lazy objects answer isinstance with an import.
        if issubclass(type(thing), Tensor):
            try:
                storage = thing.untyped_storage()
                seen[storage._cdata] = storage.nbytes()
            except (NotImplementedError, RuntimeError):  # without storage: meta, sparse
                continue
    return sum(seen.values())


def resident() -> int:
    """The process's resident memory in bytes.

    What the C library keeps of freed memory is given back first: it is a place for growth to hide
    in, and changes by itself.

    Raises:
        BenchError: psutil is missing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return int(_process().memory_info().rss)


@contextmanager
def peak_resident(every: float = 0.001) -> Iterator[list[int]]:
    """Watch the process's resident memory.

    Args:
        every: Seconds between two looks.

    Yields:
        A list that gets one number in the end: the most, in bytes over that at the beginning.

    Raises:
        BenchError: psutil is missing.
    """
    process = _process()
    before = highest = int(process.memory_info().rss)
    done = threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(every):
            highest = max(highest, int(process.memory_info().rss))

    watcher = threading.Thread(target=look, daemon=True)
    out: list[int] = []
    watcher.start()
    try:
        yield out
    finally:
        highest = max(highest, int(process.memory_info().rss))
        done.set()
        watcher.join()
        out.append(highest - before)


def _process() -> Any:
    try:
        import psutil
    except ImportError as error:
        raise BenchError(
            "Memory is read with psutil, which is not installed; ComfyUI needs it as well. Run: "
            "pip install psutil"
        ) from error
    return psutil.Process()


def _storages(tree: Any) -> dict[int, Any]:
    found = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            storage = leaf.untyped_storage()
            found[storage._cdata] = storage
    return found


def _flops(name: str, args: Any, out: Any) -> int:
    """Of one operator; those without products are not worth counting."""
    if "scaled_dot_product" in name:
        query, value = args[0], args[2]
        length, width = value.shape[-2:]
        rows = query.numel() // query.shape[-1]
        return int(2 * rows * length * (query.shape[-1] + width))
    if name in ("addmm", "baddbmm"):
        return int(2 * out.numel() * args[1].shape[-1])
    if name in _PRODUCTS and name != "einsum":
        return int(2 * out.numel() * args[0].shape[-1])
    if name in _CONVOLUTIONS:
        return int(2 * out.numel() * args[1][0].numel())
    return 0
