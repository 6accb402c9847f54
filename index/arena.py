"""Where vectors live in memory: parallel arrays over slots, a chain of slots per scope, a table from entry id to slot.

Not thread-safe; the index's owner thread is the only caller. Nothing here is a Python object per entry: at 384
dimensions an entry takes 768 B (fixed-point row) + 112 B (signature) + 32 B (id, times, links) + 30 B (id table).
Removing unlinks at once and the slot is used again; `compact` closes holes when a quarter of the slots are free.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Piece(NamedTuple):
    """Some live entries, copied: what snapshots and builders take away."""

    ids: NDArray[np.int64]
    scopes: NDArray[np.int32]
    expires_ms: NDArray[np.int64]
    scales: NDArray[np.float32]
    rows: NDArray[np.int16]
    signatures: NDArray[np.uint64]


class Candidate(NamedTuple):
    """What the index proposes: similarity -1 to 1, vetoes a bit set over tokens.GUARDS."""

    entry_id: int
    similarity: float
    vetoes: int


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
        size = 1 << (size - 1).bit_length()
        self.keys = np.empty(size, np.int64)
        self.values = np.full(size, _NONE, np.int32)
        kernels.table_fill(self.keys, self.values, self.ids, self.used)

    def _reserve(self, n: int) -> None:
        """Room for n more entries."""
        missing = self.used + n - len(self._free) - self.ids.shape[0]
        if missing > 0:
            capacity = self.ids.shape[0]
            self._allocate(max(capacity + missing, capacity + capacity // 2))
        if (self.live + n) * 5 > self.keys.shape[0] * 3:
            self._table((self.live + n) * 2)

    def _slot(self) -> int:
        if self._free:
            return self._free.pop()
        self.used += 1
        return self.used - 1

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

    def find(self, entry_id: int) -> int:
        """Slot of an entry, or -1."""
        return int(kernels.table_find(self.keys, self.values, entry_id))

    def add(self, entry_id: int, scope: bytes, vector: Vector, signature: Signature, expires_ms: int) -> int:
        """Store one checked vector; an entry of the same id is replaced. Returns the scope's number."""
        self.remove(entry_id)
        self._reserve(1)
        number = self._scope(scope)
        slot = self._slot()
        self.scales[slot] = kernels.quantise(vector, self.rows[slot])
        self.signatures[slot] = signature
        self.ids[slot], self.scopes[slot], self.expires_ms[slot] = entry_id, number, expires_ms
        kernels.table_put(self.keys, self.values, entry_id, slot)
        kernels.link(self.heads, self.after, self.ahead, number, slot)
        self.counts[number] += 1
        self.live += 1
        return number

    def _claim(self, ids: NDArray[np.int64], scopes: Sequence[bytes]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Slots for new ids, and which of the given entries they are: of an id given twice the last counts."""
        for entry_id in ids.tolist():
            if self.find(entry_id) >= 0:
                self.remove(entry_id)
        last = {entry_id: i for i, entry_id in enumerate(ids.tolist())}
        chosen = np.fromiter(last.values(), np.int64, len(last))
        self._reserve(len(chosen))
        slots = np.fromiter((self._slot() for _ in range(len(chosen))), np.int32, len(chosen))
        self.ids[slots] = ids[chosen]
        self.scopes[slots] = np.fromiter((self._scope(scopes[i]) for i in chosen.tolist()), np.int32, len(chosen))
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
        slots, chosen = self._claim(ids, scopes)
        kernels.write_many(np.ascontiguousarray(vectors[chosen]), slots, self.rows, self.scales)
        self.signatures[slots] = signatures[chosen]
        self.expires_ms[slots] = expires_ms[chosen]
        self._enter(slots)

    def add_piece(self, piece: Piece, digests: Sequence[bytes]) -> None:
        """Take in what `piece` gave elsewhere; digests[n] is the scope that its number n stood for."""
        slots, chosen = self._claim(piece.ids, [digests[n] for n in piece.scopes.tolist()])
        self.rows[slots], self.scales[slots] = piece.rows[chosen], piece.scales[chosen]
        self.signatures[slots], self.expires_ms[slots] = piece.signatures[chosen], piece.expires_ms[chosen]
        self._enter(slots)

    def remove(self, entry_id: int) -> int:
        """Forget an entry; returns the number of the scope it was in, or -1 when it was unknown."""
        slot = int(kernels.table_take(self.keys, self.values, entry_id))
        if slot < 0:
            return _NONE
        number = int(self.scopes[slot])
        kernels.unlink(self.heads, self.after, self.ahead, number, slot)
        self.ids[slot] = self.scopes[slot] = _NONE
        self._free.append(slot)
        self.live -= 1
        self.counts[number] -= 1
        if not self.counts[number]:
            if self.held:
                self._emptied.append(number)
            else:
                self._forget_scope(number)
        return number

    def compact(self) -> bool:
        """Close the holes when more than a quarter of the slots are free; returns whether slots moved."""
        if self.held or self.used < 4096 or len(self._free) * 4 <= self.used:
            return False
        holes = sorted(self._free)
        source = self.used - 1
        for target in holes:
            while source > target and self.ids[source] < 0:
                source -= 1
            if source <= target:
                break
            kernels.move_slot(
                source, target, self.rows, self.scales, self.signatures, self.ids, self.scopes, self.expires_ms,
                self.heads, self.after, self.ahead, self.keys, self.values,
            )  # fmt: skip
            source -= 1
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
        return [Candidate(*row) for row in zip(ids, similarities[:n].tolist(), vetoes[:n].tolist(), strict=True)]

    def find_many(self, entry_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        out = np.empty(entry_ids.shape[0], np.int32)
        return out[: kernels.find_many(self.keys, self.values, entry_ids, out)]

    def vectors(self, slots: NDArray[np.int32]) -> NDArray[np.float32]:
        """Stored vectors, (n, d) float32, as exact as fixed point keeps them."""
        out = np.empty((slots.shape[0], self.dimension), np.float32)
        kernels.restore(self.rows, self.scales, slots, out)
        return out

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

    def past(self, start: int, stop: int, now_ms: int) -> list[int]:
        """Ids of entries in slots [start, stop) whose time is over."""
        out = np.empty(max(stop - start, 0), np.int64)
        n = kernels.expired(self.ids, self.expires_ms, start, min(stop, self.used), now_ms, out)
        return [int(entry_id) for entry_id in out[:n]]
