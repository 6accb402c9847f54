"""The vector index: one owner thread, a bounded queue in front of it, approximate indexes for large scopes.

Commands are run in the order they were given, so an add followed by a search of the same caller sees the entry. The
owner alone touches the arena and the approximate indexes. Long work is cut: a builder thread trains an approximate
index from pieces it asks the owner for, and hands it back; a snapshot is read the same way. What changed in the
meantime is remembered by entry id and applied at the hand-over.

States of a scope: exact (chain of slots, scanned by the kernel) → building (still exact) → approximate (FAISS
proposes, the kernel rescores) → rebuilding when twice as large → exact again when it shrinks below half the limit.
A scope whose measured recall misses the goal stays exact until it has doubled.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from index import kernels, snapshot
from index.arena import UNIT_TOLERANCE, Arena, Candidate, Piece, check_vectors
from index.errors import IndexFault, IndexRebuilding, IndexRoomError, Overloaded, SnapshotRefused
from index.partition import QUERIES, Approximate, ExactBest, prepare_thread, sample_queries, trim_heap
from index.tokens import STAMP, WIDTH

__all__ = ["Candidate", "VectorOwner"]

Vector = NDArray[np.float32]
Signature = NDArray[np.uint64]
T = TypeVar("T")

_log = logging.getLogger(__name__)

PROMOTE_ABOVE: Final = 2000
RETRAIN_AT: Final = 2
"""Growth since training. At 4 a scope of 100 000 was left with lists of 330 entries and searched in 0.8 ms."""
QUEUE_LIMIT: Final = 4096
PIECE: Final = 1024
_SWEEP: Final = 2048
_FAULTS: Final = (
    IndexRoomError, ValueError, TypeError, IndexError, KeyError, RuntimeError, MemoryError, AssertionError,
)  # fmt: skip
"""What NumPy, Numba and FAISS raise; anything else ends the thread and every later call says IndexFault."""


class _Busy(Overloaded):
    reason = "index_busy"


class VectorOwner:
    """`proxy.ports.VectorIndex` over an arena. Start it, use it from one event loop, close it."""

    def __init__(
        self,
        identity: str,
        dimension: int,
        *,
        arena: Arena | None = None,
        promote_above: int = PROMOTE_ABOVE,
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        self.identity = identity
        self.dimension = dimension
        self.rebuilding = False  # set while SQL rows are still being replayed: searches say IndexRebuilding
        self.faults = 0  # commands without a waiter that failed
        self._arena = arena if arena is not None else Arena(dimension)
        self._promote_above = promote_above
        self._queue_limit = queue_limit
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._builder: threading.Thread | None = None
        self._closing = threading.Event()
        self._approximate: dict[int, Approximate] = {}
        self._touched: set[int] | None = None  # ids changed in the scope being built
        self._building = -1
        self._wanted: dict[int, None] = {}
        self._not_before: dict[int, int] = {}  # scope number -> size at which to try again after missed recall
        self._sweep_at = 0
        self._latest_ms = 0

    # life

    def start(self) -> None:
        """Start the owner thread; kernels are compiled before it answers."""
        if self._thread is not None:
            raise IndexFault("already started")
        self._thread = threading.Thread(target=self._run, name="ibid-index", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what is queued and stop both threads. Idempotent; blocks up to the timeout."""
        self._closing.set()
        if self._thread is None:
            return
        self._commands.put(None)
        self._thread.join(timeout_s)
        if self._builder is not None:
            self._builder.join(timeout_s)

    def _run(self) -> None:
        prepare_thread()
        kernels.compile_kernels(self.dimension)
        for number in list(self._arena.scope_ids.values()):
            self._consider(number)
        try:
            while (command := self._commands.get()) is not None:
                command()
        finally:
            self._closing.set()
            while not self._commands.empty():  # nobody may wait for a thread that has gone
                if (left := self._commands.get()) is not None:
                    left()

    def _submit(self, command: Callable[[], None], bounded: bool = True) -> None:
        if self._thread is None or not self._thread.is_alive() or self._closing.is_set():
            raise IndexFault("the index is not running")
        if bounded and self._commands.qsize() >= self._queue_limit:
            raise _Busy(f"{self._queue_limit} commands are waiting")
        self._commands.put(command)

    def _quietly(self, action: Callable[[], Any]) -> Callable[[], None]:
        def command() -> None:
            try:
                action()
            except _FAULTS as fault:
                self.faults += 1
                _log.warning("index command failed", extra={"fault": type(fault).__name__})

        return command

    def _ask(self, action: Callable[[], T]) -> Future[T]:
        """Run `action` on the owner thread; unbounded, for our own threads and rare calls."""
        answer: Future[T] = Future()

        def command() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(action())
            except _FAULTS as fault:
                answer.set_exception(_as_fault(fault))

        self._submit(command, bounded=False)
        return answer

    # the port

    async def search(
        self, scope: bytes, vector: Vector, signature: Signature, now_ms: int, k: int = 8
    ) -> list[Candidate]:
        """At most k fresh candidates of this scope, best first. Raises IndexFault, IndexRebuilding, Overloaded."""
        if self.rebuilding:
            raise IndexRebuilding("the index is being rebuilt")
        query = self._checked(vector)
        signs = _checked_signature(signature)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Candidate]] = loop.create_future()

        def command() -> None:
            if answer.cancelled():
                return
            try:
                found: list[Candidate] | IndexRoomError = self.find_now(scope, query, signs, now_ms, k)
            except _FAULTS as fault:
                found = _as_fault(fault)
            try:
                loop.call_soon_threadsafe(_settle, answer, found)
            except RuntimeError:
                self.faults += 1  # the loop is closed: nobody waits

        self._submit(command)
        return await answer

    def add(self, entry_id: int, scope: bytes, vector: Vector, signature: Signature, expires_ms: int) -> None:
        """Enqueue; an entry of the same id is replaced. Raises IndexFault for a bad vector, Overloaded when full."""
        checked = self._checked(vector).copy()
        signs = _checked_signature(signature).copy()
        if entry_id < 0:
            raise IndexFault("entry ids are not negative")
        self._submit(self._quietly(lambda: self._add(entry_id, scope, checked, signs, expires_ms)))

    def remove(self, entry_ids: Sequence[int]) -> None:
        """Enqueue; unknown ids are passed over. Never refused for load: a purge must reach the index."""
        ids = list(entry_ids)
        self._submit(self._quietly(lambda: self._remove(ids)), bounded=False)

    def compare(
        self, vector: Vector, signature: Signature, row_vector: bytes, row_signature: bytes
    ) -> tuple[float, int]:
        """Similarity and veto bits against a row's own bytes; (nan, 0) when either side is damaged."""
        if (
            len(row_vector) != 4 * self.dimension
            or len(row_signature) != 8 * WIDTH
            or vector.shape != (self.dimension,)
        ):
            return math.nan, 0
        row = np.frombuffer(row_vector, "<f4")
        signs = np.frombuffer(row_signature, "<u8").astype(np.uint64)
        length = float(np.dot(row, row))
        if not abs(length - 1.0) <= UNIT_TOLERANCE or int(signs[6]) >> 48 != STAMP:
            return math.nan, 0
        return float(np.dot(vector, row)), int(kernels.veto_bits(_checked_signature(signature), signs))

    # more than the port

    async def add_many(
        self,
        ids: NDArray[np.int64],
        scopes: Sequence[bytes],
        vectors: NDArray[np.float32],
        signatures: NDArray[np.uint64],
        expires_ms: NDArray[np.int64],
    ) -> None:
        """Add n entries in pieces between which searches are served. Raises IndexFault."""
        checked = check_vectors(vectors, self.dimension)
        for at in range(0, len(ids), PIECE):
            part = slice(at, at + PIECE)
            add = partial(self._add_many, ids[part], scopes[part], checked[part], signatures[part], expires_ms[part])
            await asyncio.wrap_future(self._ask(add))

    async def ids(self) -> NDArray[np.int64]:
        """Ids of every entry, ascending: what a reconciliation with SQL compares."""
        return await asyncio.wrap_future(self._ask(self._arena.live_ids))

    async def sweep(self, now_ms: int) -> int:
        """Forget everything past its time; returns how many. Also happens bit by bit while entries are added."""
        swept = 0
        at = 0
        while at < self._arena.used:
            swept += await asyncio.wrap_future(self._ask(partial(self._sweep, at, now_ms)))
            at += _SWEEP
        return swept

    async def snapshot(self, path: Path) -> None:
        """Write every entry to `path` atomically. Raises SnapshotRefused when the disk refuses."""
        await asyncio.to_thread(self._write_snapshot, path)

    def _write_snapshot(self, path: Path) -> None:
        slots = self._ask(self._begin_pieces).result()
        try:
            pieces = (self._piece(part) for part in np.array_split(slots, max(1, -(-len(slots) // snapshot.PIECE))))
            snapshot.write(path, self.identity, self.dimension, pieces, lambda: self._ask(self._arena.digests).result())
        except OSError as fault:
            raise SnapshotRefused(f"cannot write the snapshot: {fault.strerror}") from fault
        finally:
            self._ask(self._arena.release).result()

    @classmethod
    def load(cls, path: Path, identity: str, dimension: int, **options: Any) -> VectorOwner:
        """An owner (not started) holding a snapshot's entries. Raises SnapshotRefused; a bad file becomes *.bad."""
        arena = Arena(dimension)
        snapshot.read(path, identity, dimension, arena)
        return cls(identity, dimension, arena=arena, **options)

    @property
    def size(self) -> int:
        """Entries held, without asking the owner: for metrics."""
        return self._arena.live

    @property
    def waiting(self) -> int:
        return self._commands.qsize()

    async def settled(self) -> None:
        """Return when every promotion under way has been handed over."""
        while await asyncio.wrap_future(self._ask(lambda: self._builder)) is not None:
            builder = self._builder
            if builder is not None:
                await asyncio.to_thread(builder.join)

    async def states(self) -> dict[bytes, tuple[int, int, float]]:
        """Approximate scopes: digest → (entries, probes, recall@1 measured when built)."""
        return await asyncio.wrap_future(self._ask(self._states))

    def _states(self) -> dict[bytes, tuple[int, int, float]]:
        digests = self._arena.digests()
        return {digests[n]: (a.size, a.probes, a.recall) for n, a in self._approximate.items()}

    # on the owner thread

    def find_now(self, scope: bytes, vector: Vector, signature: Signature, now_ms: int, k: int) -> list[Candidate]:
        """`search` on the owner thread itself; vector and signature are already checked."""
        arena = self._arena
        self._latest_ms = max(self._latest_ms, now_ms)
        number = arena.scope_ids.get(scope)
        if number is None or k <= 0:
            return []
        approximate = self._approximate.get(number)
        if approximate is None:
            slots = arena.slots_of(number)
        else:
            slots = arena.find_many(approximate.propose(vector, max(32, 4 * k)))
        return arena.rank(slots, number, now_ms, vector, signature, k)

    def _add(self, entry_id: int, scope: bytes, vector: Vector, signature: Signature, expires_ms: int) -> None:
        self._drop(entry_id)
        number = self._arena.add(entry_id, scope, vector, signature, expires_ms)
        self._enter(number, np.array([entry_id], np.int64))
        self._sweep_some()

    def _add_many(
        self,
        ids: NDArray[np.int64],
        scopes: Sequence[bytes],
        vectors: NDArray[np.float32],
        signatures: NDArray[np.uint64],
        expires_ms: NDArray[np.int64],
    ) -> None:
        if signatures.shape != (len(ids), WIDTH) or len(scopes) != len(ids) or np.any(ids < 0):
            raise IndexFault("arrays of one bulk add must agree")
        for entry_id in self._arena.ids[self._arena.find_many(ids)].tolist():
            self._drop(entry_id)
        self._arena.add_many(ids, scopes, vectors, signatures, expires_ms)
        unique = np.unique(ids)
        numbers = self._arena.scopes[self._arena.find_many(unique)]
        for number in np.unique(numbers).tolist():
            self._enter(number, unique[numbers == number])

    def _enter(self, number: int, ids: NDArray[np.int64]) -> None:
        """Tell the approximate side that ids are new in a scope."""
        if number == self._building and self._touched is not None:
            self._touched.update(ids.tolist())
        if (approximate := self._approximate.get(number)) is not None:
            approximate.add(ids, self._arena.vectors(self._arena.find_many(ids)))
        self._consider(number)

    def _drop(self, entry_id: int) -> None:
        arena = self._arena
        slot = arena.find(entry_id)
        if slot < 0:
            return
        number = int(arena.scopes[slot])
        arena.remove(entry_id)
        if number == self._building and self._touched is not None:
            self._touched.add(entry_id)
        if (approximate := self._approximate.get(number)) is not None:
            approximate.remove(np.array([entry_id], np.int64))
            if arena.counts[number] * 2 < self._promote_above:
                del self._approximate[number]

    def _remove(self, ids: Sequence[int]) -> None:
        for entry_id in ids:
            self._drop(entry_id)
        if self._building < 0:
            self._arena.compact()

    def _sweep(self, start: int, now_ms: int) -> int:
        past = self._arena.past(start, start + _SWEEP, now_ms)
        self._remove(past)
        return len(past)

    def _sweep_some(self) -> None:
        """A share of the sweep with every add, by the newest time a search told."""
        if self._sweep_at >= self._arena.used:
            self._sweep_at = 0
        for entry_id in self._arena.past(self._sweep_at, self._sweep_at + 64, self._latest_ms):
            self._drop(entry_id)
        self._sweep_at += 64

    # promotion

    def _consider(self, number: int) -> None:
        size = int(self._arena.counts[number])
        approximate = self._approximate.get(number)
        limit = RETRAIN_AT * approximate.built_for if approximate is not None else self._promote_above
        if size <= max(limit, self._not_before.get(number, 0)) or number == self._building:
            return
        self._wanted[number] = None
        self._next_build()

    def _next_build(self) -> None:
        if self._building >= 0 or not self._wanted or self._closing.is_set():
            return
        self._building = next(iter(self._wanted))
        del self._wanted[self._building]
        self._touched = set()
        slots = self._begin_pieces(self._building)
        self._builder = threading.Thread(
            target=self._build, args=(self._building, slots), name="ibid-index-builder", daemon=True
        )
        self._builder.start()

    def _begin_pieces(self, number: int | None = None) -> NDArray[np.int32]:
        """Slots to copy from; they do not move until `release`."""
        if number is not None:
            return self._arena.slots_of(number).copy()
        self._arena.hold()
        return np.flatnonzero(self._arena.ids[: self._arena.used] >= 0).astype(np.int32)

    def _piece(self, slots: NDArray[np.int32], number: int | None = None) -> Piece:
        def copy() -> Piece:
            chosen = slots if number is None else slots[self._arena.scopes[slots] == number]
            return self._arena.piece(chosen)

        return self._ask(copy).result()

    def _build(self, number: int, slots: NDArray[np.int32]) -> None:
        """On the builder thread: train, fill and measure, then hand over. A failure leaves the scope exact."""
        started = time.monotonic()
        built: Approximate | None = None
        try:
            built = self._built(number, slots)
        except _FAULTS as fault:
            self.faults += 1
            _log.warning("promotion failed", extra={"fault": type(fault).__name__})
        took = time.monotonic() - started
        try:
            while built is not None and self._catch_up(number, built):
                pass
            self._ask(lambda: self._hand_over(number, len(slots), built, took)).result()
        except IndexRoomError:
            return  # closing
        trim_heap()

    def _catch_up(self, number: int, built: Approximate) -> bool:
        """Apply what changed while building; False when so little is left that the hand-over may do it."""

        def take() -> NDArray[np.int64]:
            touched = self._touched or set()
            if len(touched) <= 256:
                return np.empty(0, np.int64)
            self._touched = set()
            return np.fromiter(touched, np.int64, len(touched))

        changed = self._ask(take).result()
        for at in range(0, len(changed), PIECE):
            part = changed[at : at + PIECE]
            built.remove(part)
            slots = self._ask(lambda part=part: self._arena.find_many(part)).result()  # type: ignore[misc]
            if len(slots):
                ids, vectors = self._floats(slots, number)
                known = np.isin(ids, part)  # a slot may have changed hands since: then it was touched again
                built.add(ids[known], vectors[known])
        return len(changed) > 0

    def _built(self, number: int, slots: NDArray[np.int32]) -> Approximate | None:
        shuffled = np.random.default_rng(len(slots)).permutation(slots)
        n = Approximate.sample_size(len(slots))
        parts = [self._floats(some, number)[1] for some in np.array_split(shuffled[:n], max(1, n // PIECE))]
        approximate = Approximate.train(np.concatenate(parts), len(slots))
        del parts
        asked = shuffled[n:][:QUERIES]  # not those it was fitted to
        exact = ExactBest(sample_queries(self._floats(asked, number)[1]))
        for part in np.array_split(slots, max(1, len(slots) // PIECE)):
            if self._closing.is_set():
                return None
            ids, vectors = self._floats(part, number)
            approximate.add(ids, vectors)
            exact.see(ids, vectors)
        return approximate if approximate.tune(exact.queries, exact.ids) else None

    def _floats(self, slots: NDArray[np.int32], number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        piece = self._piece(slots, number)
        return piece.ids, piece.rows.astype(np.float32) * piece.scales[:, None]

    def _hand_over(self, number: int, size: int, built: Approximate | None, took_s: float) -> None:
        """Apply what changed while building, then swap."""
        touched, self._touched, self._building, self._builder = self._touched or set(), None, -1, None
        if built is None:
            self._not_before[number] = 2 * size
        elif self._arena.counts[number] * 2 >= self._promote_above:
            changed = np.fromiter(touched, np.int64, len(touched))
            if len(changed):
                built.remove(changed)
                slots = self._arena.find_many(changed)
                slots = slots[self._arena.scopes[slots] == number]
                if len(slots):
                    built.add(self._arena.ids[slots], self._arena.vectors(slots))
            self._approximate[number] = built
            self._not_before.pop(number, None)
            _log.info(
                "scope promoted",
                extra={"entries": built.size, "probes": built.probes, "recall": built.recall, "s": took_s},
            )
        self._next_build()

    def _checked(self, vector: Vector) -> Vector:
        if vector.shape != (self.dimension,) or vector.dtype != np.float32:
            raise IndexFault(f"a vector must be float32 ({self.dimension},), got {vector.dtype} {vector.shape}")
        if not abs(float(np.dot(vector, vector)) - 1.0) <= UNIT_TOLERANCE:  # NaN fails too
            raise IndexFault("a vector must be finite and of unit length")
        return np.ascontiguousarray(vector)


def _checked_signature(signature: Signature) -> Signature:
    if signature.shape != (WIDTH,) or signature.dtype != np.uint64:
        raise IndexFault(f"a signature must be uint64 ({WIDTH},), got {signature.dtype} {signature.shape}")
    return np.ascontiguousarray(signature)


def _as_fault(fault: BaseException) -> IndexRoomError:
    if isinstance(fault, IndexRoomError):
        return fault
    wrapped = IndexFault(f"the index failed: {type(fault).__name__}")
    wrapped.__cause__ = fault
    return wrapped


def _settle(answer: asyncio.Future[list[Candidate]], found: list[Candidate] | IndexRoomError) -> None:
    if answer.done():
        return
    if isinstance(found, IndexRoomError):
        answer.set_exception(found)
    else:
        answer.set_result(found)
