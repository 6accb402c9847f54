"""What is remembered of work done before, bounded by bytes.

A memo is right only if its key holds everything that decides its value, and harmless only if nobody can fill it: the
caller names the size of what it keeps, and keeps nothing of a request that was refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

ENTRY_BYTES = 400
"""Of two dictionaries for one entry, with the room they leave for growth, and a key tuple."""


class Memo(Generic[K, V]):
    """At most `limit_bytes`, the oldest out first. What is larger than an eighth of that is not kept."""

    __slots__ = ("_kept", "_sizes", "get", "limit_bytes", "size_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self._kept: dict[K, V] = {}
        self._sizes: dict[K, int] = {}
        self.get: Callable[[K], V | None] = self._kept.get

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: K, value: V, size_bytes: int) -> None:
        """`size_bytes`: of key and value together, without the dictionary's own."""
        size_bytes += ENTRY_BYTES
        self.forget(key)
        if size_bytes > self.limit_bytes // 8:
            return
        self._kept[key] = value
        self._sizes[key] = size_bytes
        self.size_bytes += size_bytes
        while self.size_bytes > self.limit_bytes:
            self.forget(next(iter(self._kept)))

    def clear(self) -> None:
        self._kept.clear()
        self._sizes.clear()
        self.size_bytes = 0

    def forget(self, key: K) -> None:
        if self._kept.pop(key, None) is not None:
            self.size_bytes -= self._sizes.pop(key)


def size_of(value: object) -> int:
    """Bytes of memory of texts, numbers and tuples of them. What two share counts twice."""
    if isinstance(value, tuple | frozenset):
        return sys.getsizeof(value) + sum([size_of(part) for part in value])
    return sys.getsizeof(value)
