"""Where vectors live in memory: parallel arrays over slots, a chain of slots per scope, a table from entry id to slot.

Not thread-safe; the index's owner thread is the only caller. Nothing here is a Python object per entry: at 384
dimensions an entry takes 768 B (fixed-point row) + 112 B (signature) + 32 B (id, times, links) + 30 B (id table).
Removing unlinks at once and the slot is used again; `compact` closes holes when a quarter of the slots are free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index import kernels
from index.errors import IndexFault
from index.tokens import WIDTH

Vector = NDArray[np.float32]
Signature = NDArray[np.uint64]

_NONE: Final = -1
UNIT_TOLERANCE: Final = 1e-3
_FIXED_POINT: Final = np.float32(32767.0)


class Piece(NamedTuple):
    """Some live entries, copied: what snapshots and builders take away."""

    ids: NDArray[np.int64]
    scopes: NDArray[np.int32]
    expires_ms: NDArray[np.int64]
    scales: NDArray[np.float32]
    rows: NDArray[np.int16]
    signatures: NDArray[np.uint64]


class Candidate(NamedTuple):
    """What the index proposes: similarity -1 to 1, vetoes a bit set over tokens.GUARDS, the stored text's classes."""

    entry_id: int
    similarity: float
    vetoes: int
    signature: Signature  # (WIDTH,)


def fixed_point(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Vectors (n, d) as rows (n, d) int16 and scales (n,): value = row * scale."""
    scales = np.maximum(vectors.max(axis=1), -vectors.min(axis=1)) / _FIXED_POINT
    return np.rint(vectors / scales[:, None]).astype(np.int16), scales


def check_vectors(vectors: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """The same vectors, (n, dimension) float32 contiguous, all finite and of unit length; IndexFault otherwise."""
    if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise IndexFault(f"vectors must be float32 (n, {dimension}), got {vectors.dtype} {vectors.shape}")
    lengths = np.einsum("ij,ij->i", vectors, vectors)
    if not np.all(np.abs(lengths - 1.0) <= UNIT_TOLERANCE):  # NaN fails too
        raise IndexFault("vectors must be finite and of unit length")
    return np.ascontiguousarray(vectors)


class Arena:
    """Entries of every scope. `used` is the high-water mark of slots, `live` how many hold an entry."""

    def __init__(self, dimension: int, capacity: int = 1024) -> None:
        self.dimension = dimension
        self.live = 0
        self.used = 0
        self.scope_ids: dict[bytes, int] = {}
        self.held = False  # while a snapshot is read, scope numbers are not reused and slots do not move
        self._digests: list[bytes | None] = []
        self._free_scopes: list[int] = []
        self._emptied: list[int] = []
        self.heads = np.full(64, _NONE, np.int32)
        self.counts = np.zeros(64, np.int32)
        self._free: list[int] = []
        self._allocate(max(capacity, 16))
        self._table(max(64, capacity * 2))
        self._scratch = np.empty(4096, np.int32)

    rows: NDArray[np.int16]
    signatures: NDArray[np.uint64]
    scales: NDArray[np.float32]
    ids: NDArray[np.int64]
    expires_ms: NDArray[np.int64]
    scopes: NDArray[np.int32]
    after: NDArray[np.int32]
    ahead: NDArray[np.int32]

    def _allocate(self, capacity: int) -> None:
        """Fresh arrays of this many slots, the used part copied; pages never touched are not resident."""
        used = self.used
        rows = np.empty((capacity, self.dimension), np.int16)
        signatures = np.empty((capacity, WIDTH), np.uint64)
        scales = np.empty(capacity, np.float32)
        ids, expires = np.full(capacity, _NONE, np.int64), np.zeros(capacity, np.int64)
        scopes, after, ahead = (np.full(capacity, _NONE, np.int32) for _ in range(3))
        if used:
            rows[:used], signatures[:used], scales[:used] = self.rows[:used], self.signatures[:used], self.scales[:used]
            ids[:used], expires[:used], scopes[:used] = self.ids[:used], self.expires_ms[:used], self.scopes[:used]
            after[:used], ahead[:used] = self.after[:used], self.ahead[:used]
        self.rows, self.signatures, self.scales = rows, signatures, scales
        self.ids, self.expires_ms, self.scopes = ids, expires, scopes
        self.after, self.ahead = after, ahead

    def _table(self, size: int) -> None:
        """Another id table and fresh chains, with every live slot entered again."""
        size = 1 << (size - 1).bit_length()
        self.keys = np.empty(size, np.int64)
        self.values = np.full(size, _NONE, np.int32)
        self.heads[:] = _NONE
        self.counts[:] = 0
        self.live = 0
        if self.used:  # making an arena does not compile a kernel
            self._enter(np.flatnonzero(self.ids[: self.used] >= 0).astype(np.int32))

    def _reserve(self, n: int) -> None:
        """Room for n more entries."""
        missing = self.used + n - len(self._free) - self.ids.shape[0]
        if missing > 0:
            capacity = self.ids.shape[0]
            self._allocate(max(capacity + missing, capacity + capacity // 2))
        if (self.live + n) * 5 > self.keys.shape[0] * 3:
            self._table((self.live + n) * 2)

    def _slots(self, n: int) -> NDArray[np.int32]:
        """n free slots, (n,) int32, for which there is room."""
        again = min(n, len(self._free))
        taken = self._free[len(self._free) - again :]
        del self._free[len(self._free) - again :]
        fresh = n - again
        self.used += fresh
        return np.concatenate([np.array(taken, np.int32), np.arange(self.used - fresh, self.used, dtype=np.int32)])

    def _scope(self, digest: bytes) -> int:
        """Number of a scope, made on first use."""
        number = self.scope_ids.get(digest)
        if number is not None:
            return number
        if self._free_scopes and not self.held:
            number = self._free_scopes.pop()
            self._digests[number] = digest
        else:
            number = len(self._digests)
            self._digests.append(digest)
            if number >= self.heads.shape[0]:
                self.heads = np.concatenate([self.heads, np.full(number, _NONE, np.int32)])
                self.counts = np.concatenate([self.counts, np.zeros(number, np.int32)])
        self.scope_ids[digest] = number
        return number

    def _forget_scope(self, number: int) -> None:
        digest = self._digests[number]
        if digest is not None:
            del self.scope_ids[digest]
            self._digests[number] = None
            self._free_scopes.append(number)

    def hold(self) -> None:
        """Keep scope numbers and slots where they are until `release`."""
        self.held = True

    def release(self) -> None:
        self.held = False
        emptied, self._emptied = self._emptied, []
        for number in emptied:
            if not self.counts[number]:
                self._forget_scope(number)

    def find_many(self, entry_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Slots of entry ids, in order, without the unknown."""
        out = np.empty(entry_ids.shape[0], np.int32)
        return out[: kernels.find_many(self.keys, self.values, entry_ids, out)]

    def find(self, entry_id: int) -> int:
        """Slot of an entry, or -1."""
        found = self.find_many(np.array([entry_id], np.int64))
        return int(found[0]) if len(found) else _NONE

    def add(self, entry_id: int, scope: bytes, vector: Vector, signature: Signature, expires_ms: int) -> int:
        """Store one checked vector; an entry of the same id is replaced. Returns the scope's number."""
        ids, times = np.array([entry_id], np.int64), np.array([expires_ms], np.int64)
        self.add_many(ids, [scope], vector[None], signature[None], times)
        return self.scope_ids[scope]

    def _claim(
        self, ids: NDArray[np.int64], numbers: Callable[[NDArray[np.int64]], NDArray[np.int32]]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Slots for new ids, and which of the given entries they are: of an id given twice the last counts."""
        self.remove_many(ids)
        chosen = len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]
        chosen.sort()
        self._reserve(len(chosen))
        scopes = numbers(chosen)
        slots = self._slots(len(chosen))
        self.ids[slots], self.scopes[slots] = ids[chosen], scopes
        return slots, chosen

    def _enter(self, slots: NDArray[np.int32]) -> None:
        kernels.enter_many(
            self.keys, self.values, self.heads, self.after, self.ahead, self.ids, self.scopes, self.counts, slots
        )
        self.live += len(slots)

    def add_many(
        self,
        ids: NDArray[np.int64],
        scopes: Sequence[bytes],
        vectors: NDArray[np.float32],
        signatures: NDArray[np.uint64],
        expires_ms: NDArray[np.int64],
    ) -> None:
        """`add` for n checked vectors: ids (n,), vectors (n, d), signatures (n, WIDTH), expires_ms (n,)."""
        slots, chosen = self._claim(ids, lambda kept: self._numbers([scopes[i] for i in kept.tolist()]))
        self.rows[slots], self.scales[slots] = fixed_point(vectors[chosen])
        self.signatures[slots] = signatures[chosen]
        self.expires_ms[slots] = expires_ms[chosen]
        self._enter(slots)

    def _numbers(self, scopes: Sequence[bytes]) -> NDArray[np.int32]:
        return np.fromiter((self._scope(scope) for scope in scopes), np.int32, len(scopes))

    def add_piece(self, piece: Piece, digests: Sequence[bytes]) -> None:
        """Take in what `piece` gave elsewhere; digests[n] is the scope that its number n stood for."""

        def numbers(kept: NDArray[np.int64]) -> NDArray[np.int32]:
            names, which = np.unique(piece.scopes[kept], return_inverse=True)
            return self._numbers([digests[name] for name in names.tolist()])[which]

        slots, chosen = self._claim(piece.ids, numbers)
        self.rows[slots], self.scales[slots] = piece.rows[chosen], piece.scales[chosen]
        self.signatures[slots], self.expires_ms[slots] = piece.signatures[chosen], piece.expires_ms[chosen]
        self._enter(slots)

    def remove_many(self, entry_ids: NDArray[np.int64]) -> None:
        """Forget entries; unknown ids are passed over."""
        slots = np.empty(entry_ids.shape[0], np.int32)
        n = kernels.leave_many(
            self.keys, self.values, self.heads, self.after, self.ahead, self.ids, self.scopes, self.counts,
            entry_ids, slots,
        )  # fmt: skip
        if not n:
            return
        slots = slots[:n]
        numbers = set(self.scopes[slots].tolist())
        self.ids[slots] = self.scopes[slots] = _NONE
        self._free.extend(slots.tolist())
        self.live -= n
        for number in numbers:
            if not self.counts[number]:
                if self.held:
                    self._emptied.append(number)
                else:
                    self._forget_scope(number)

    def remove(self, entry_id: int) -> None:
        """Forget an entry, if it is known."""
        self.remove_many(np.array([entry_id], np.int64))

    def compact(self) -> bool:
        """Close the holes when more than a quarter of the slots are free; returns whether slots moved."""
        if self.held or self.used < 4096 or len(self._free) * 4 <= self.used:
            return False
        targets = np.sort(np.array(self._free, np.int32))
        targets = targets[targets < self.live]
        sources = self.live + np.flatnonzero(self.ids[self.live : self.used] >= 0)
        for array in (self.rows, self.signatures, self.scales, self.ids, self.expires_ms, self.scopes):
            for at in range(0, len(targets), 4096):  # a temporary copy of a part only
                array[targets[at : at + 4096]] = array[sources[at : at + 4096]]
        self._free.clear()
        self.used = self.live
        self._allocate(max(1024, self.live + self.live // 4))
        self._table(max(64, self.live * 2))
        return True

    def slots_of(self, number: int) -> NDArray[np.int32]:
        """Slots of a scope, (n,) int32, newest first; the array is reused by the next call."""
        n = int(self.counts[number])
        if self._scratch.shape[0] < n:
            self._scratch = np.empty(n + n // 2, np.int32)
        return self._scratch[: kernels.chain(self.heads, self.after, number, self._scratch)]

    def rank(
        self, slots: NDArray[np.int32], number: int, now_ms: int, query: Vector, signature: Signature, k: int
    ) -> list[Candidate]:
        """The k most similar fresh entries of a scope among these slots, best first."""
        best_slots, similarities, vetoes = np.empty(k, np.int32), np.empty(k, np.float32), np.empty(k, np.int64)
        n = kernels.rank(
            self.rows, self.scales, self.signatures, self.scopes, self.expires_ms, slots, slots.shape[0],
            number, now_ms, query, signature, best_slots, similarities, vetoes,
        )  # fmt: skip
        ids = self.ids[best_slots[:n]].tolist()
        signatures = self.signatures[best_slots[:n]]
        rows = zip(ids, similarities[:n].tolist(), vetoes[:n].tolist(), signatures, strict=True)
        return [Candidate(*row) for row in rows]

    def vectors(self, slots: NDArray[np.int32]) -> NDArray[np.float32]:
        """Stored vectors, (n, d) float32, as exact as fixed point keeps them."""
        return self.rows[slots].astype(np.float32) * self.scales[slots, None]

    def piece(self, slots: NDArray[np.int32]) -> Piece:
        """A copy of what these slots hold; free slots are left out."""
        slots = slots[self.ids[slots] >= 0]
        return Piece(
            self.ids[slots], self.scopes[slots], self.expires_ms[slots], self.scales[slots], self.rows[slots],
            self.signatures[slots],
        )  # fmt: skip

    def digests(self) -> list[bytes]:
        """Scope digest by scope number; b"" for a number not in use."""
        return [digest or b"" for digest in self._digests]

    def live_ids(self) -> NDArray[np.int64]:
        """Entry ids, (live,) int64, ascending."""
        ids = self.ids[: self.used]
        return np.sort(ids[ids >= 0])

    def past(self, start: int, stop: int, now_ms: int) -> NDArray[np.int64]:
        """Ids of entries in slots [start, stop) whose time is over."""
        part = slice(start, min(stop, self.used))
        ids = self.ids[part]
        return ids[(ids >= 0) & (self.expires_ms[part] <= now_ms)]
