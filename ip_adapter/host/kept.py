"""Results by the content of what they were computed from, kept with the object that computed them.

Nodes that encode and apply in one are executed anew when only a weight changes, and the host drops
their outputs before. What is kept here ends with its owner, an encoder or an adapter: that is in
the host's cache as long as a workflow uses it, and is gone when the host is told to free memory.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

V = TypeVar("V")


class Kept(Generic[V]):
    """The latest results of each owner.

    Args:
        limit: Bytes for each owner; a result of more than half of it is not kept.
        size: Bytes of a result.
    """

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self._limit = limit
        self._size = size
        self._by_owner: WeakKeyDictionary[Any, OrderedDict[Hashable, V]] = WeakKeyDictionary()

    def get(self, owner: Any, key: Hashable, make: Callable[[], V]) -> V:
        """The result for a key: the same object as before, or a new one.

        Args:
            owner: Whose end ends it. Results must not refer to it.
            key: See `digest`.
            make: Computes it.
        """
        known = self._by_owner.setdefault(owner, OrderedDict())
        if key in known:
            known.move_to_end(key)
            return known[key]
        found = make()
        if self._size(found) <= self._limit // 2:
            known[key] = found
            while sum(map(self._size, known.values())) > self._limit:
                known.popitem(last=False)
        return found


def digest(*tensors: Tensor | None) -> bytes:
    """Of shapes, dtypes and numbers."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if tensor is None:
            found.update(b"none")
            continue
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.digest()


def size_of(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()
