"""The vector index: one owner thread with a bounded queue in front of it, over an arena and its promotions.

Commands are run in the order they were given, so an add followed by a search of the same caller sees the entry. The
owner alone touches the arena and the approximate indexes. Long work is cut: the builder thread of `index.promotion`
and a snapshot's writer copy pieces they ask the owner for, and what changed in the meantime is applied at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from index import kernels, snapshot
from index.arena import UNIT_TOLERANCE, Arena, Candidate, Piece, check_vectors
from index.errors import FAULTS, IndexFault, IndexRebuilding, IndexRoomError, Overloaded, SnapshotRefused
from index.partition import PROPOSALS, prepare_thread
from index.promotion import PROMOTE_ABOVE, Promotions
from index.tokens import STAMP, WIDTH

__all__ = ["Candidate", "VectorOwner"]

Vector = NDArray[np.float32]
Signature = NDArray[np.uint64]
T = TypeVar("T")
A = TypeVar("A", Vector, Signature)

_log = logging.getLogger(__name__)

QUEUE_LIMIT: Final = 4096
PIECE: Final = 1024
_SWEEP: Final = 2048


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
        self.rebuilding = False  # inside `replaying`: searches say IndexRebuilding
        self._faults = 0
        self._arena = arena if arena is not None else Arena(dimension)
        self._queue_limit = queue_limit
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._promotions = Promotions(self._arena, self._ask, self._closing, promote_above)
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
        self._promotions.join(timeout_s)

    def _run(self) -> None:
        prepare_thread()
        kernels.compile_kernels(self.dimension)
        if not self.rebuilding:
            self._promotions.resume()
        try:
            while (command := self._commands.get()) is not None:
                command()
        finally:
            self._closing.set()
            while not self._commands.empty():  # nobody may wait for a thread that has gone
                if (left := self._commands.get()) is not None:
                    left()

    @property
    def trouble(self) -> str:
        """The reason searches are refused with just now: "index_rebuilding", "index_down"; "" when they are not."""
        if self._thread is None or not self._thread.is_alive() or self._closing.is_set():
            return IndexFault.reason
        return IndexRebuilding.reason if self.rebuilding else ""

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
            except FAULTS as fault:
                self._faults += 1
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
            except FAULTS as fault:
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
            except FAULTS as fault:
                found = _as_fault(fault)
            try:
                loop.call_soon_threadsafe(_settle, answer, found)
            except RuntimeError:
                self._faults += 1  # the loop is closed: nobody waits

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
        ids = np.array([entry_id for entry_id in entry_ids if 0 <= entry_id < 1 << 63], np.int64)
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

    @contextlib.asynccontextmanager
    async def replaying(self) -> AsyncIterator[None]:
        """While rows of SQL are added: searches are refused, and nothing is promoted before all are there.

        They stay refused when it ends with an error, since the index is then not complete.
        """
        self.rebuilding = self._promotions.paused = True
        yield
        self.rebuilding = False
        await asyncio.wrap_future(self._ask(self._promotions.resume))

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
        slots = self._ask(self._hold).result()
        try:
            pieces = (self._piece(part) for part in np.array_split(slots, max(1, -(-len(slots) // snapshot.PIECE))))
            snapshot.write(path, self.identity, self.dimension, pieces, lambda: self._ask(self._arena.digests).result())
        except OSError as fault:
            raise SnapshotRefused(f"cannot write the snapshot: {fault.strerror}") from fault
        finally:
            self._ask(self._arena.release).result()

    def _hold(self) -> NDArray[np.int32]:
        """Slots in use; they do not move until `release`."""
        self._arena.hold()
        return np.flatnonzero(self._arena.ids[: self._arena.used] >= 0).astype(np.int32)

    def _piece(self, slots: NDArray[np.int32]) -> Piece:
        return self._ask(lambda: self._arena.piece(slots)).result()

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

    @property
    def faults(self) -> int:
        """Commands without a waiter, and promotions, that failed."""
        return self._faults + self._promotions.faults

    async def settled(self) -> None:
        """Return when every promotion under way has been handed over."""
        while (builder := await asyncio.wrap_future(self._ask(lambda: self._promotions.builder))) is not None:
            await asyncio.to_thread(builder.join)

    async def states(self) -> dict[bytes, tuple[int, int, float]]:
        """Approximate scopes: digest → (entries, probes, recall@1 measured when built)."""
        return await asyncio.wrap_future(self._ask(self._promotions.states))

    # on the owner thread

    def find_now(self, scope: bytes, vector: Vector, signature: Signature, now_ms: int, k: int) -> list[Candidate]:
        """`search` on the owner thread itself; vector and signature are already checked."""
        arena = self._arena
        self._latest_ms = max(self._latest_ms, now_ms)
        number = arena.scope_ids.get(scope)
        if number is None or k <= 0:
            return []
        approximate = self._promotions.approximate.get(number)
        if approximate is None:
            slots = arena.slots_of(number)
        else:
            slots = arena.find_many(approximate.propose(vector, max(PROPOSALS, 2 * k)))
        return arena.rank(slots, number, now_ms, vector, signature, k)

    def add_now(self, entry_id: int, scope: bytes, vector: Vector, signature: Signature, expires_ms: int) -> None:
        """`add` on the owner thread itself, or without one; vector and signature are already checked."""
        self._add(entry_id, scope, vector, signature, expires_ms)

    def _add(self, entry_id: int, scope: bytes, vector: Vector, signature: Signature, expires_ms: int) -> None:
        ids = np.array([entry_id], np.int64)
        self._drop(ids)
        number = self._arena.add(entry_id, scope, vector, signature, expires_ms)
        self._promotions.entered(number, ids)
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
        self._drop(ids)
        self._arena.add_many(ids, scopes, vectors, signatures, expires_ms)
        unique = np.unique(ids)
        numbers = self._arena.scopes[self._arena.find_many(unique)]
        for number, members in _grouped(numbers, unique):
            self._promotions.entered(number, members)

    def _drop(self, ids: NDArray[np.int64]) -> None:
        """Forget entries, on the approximate side as well; unknown ids are passed over."""
        slots = self._arena.find_many(ids)
        if len(slots):
            known, numbers = self._arena.ids[slots], self._arena.scopes[slots]
            self._arena.remove_many(known)
            for number, members in _grouped(numbers, known):
                self._promotions.left(number, members)

    def _remove(self, ids: NDArray[np.int64]) -> None:
        self._drop(ids)
        if not self._promotions.building:
            self._arena.compact()

    def _sweep(self, start: int, now_ms: int) -> int:
        past = self._arena.past(start, start + _SWEEP, now_ms)
        self._remove(past)
        return len(past)

    def _sweep_some(self) -> None:
        """A share of the sweep with every add, by the newest time a search told."""
        if self._sweep_at >= self._arena.used:
            self._sweep_at = 0
        past = self._arena.past(self._sweep_at, self._sweep_at + 64, self._latest_ms)
        if len(past):
            self._drop(past)
        self._sweep_at += 64

    def _checked(self, vector: Vector) -> Vector:
        if vector.shape != (self.dimension,) or vector.dtype != np.float32:
            raise IndexFault(f"a vector must be float32 ({self.dimension},), got {vector.dtype} {vector.shape}")
        if not abs(float(np.dot(vector, vector)) - 1.0) <= UNIT_TOLERANCE:  # NaN fails too
            raise IndexFault("a vector must be finite and of unit length")
        return _as_compiled(vector)


def _checked_signature(signature: Signature) -> Signature:
    if signature.shape != (WIDTH,) or signature.dtype != np.uint64:
        raise IndexFault(f"a signature must be uint64 ({WIDTH},), got {signature.dtype} {signature.shape}")
    return _as_compiled(signature)


def _as_compiled(array: A) -> A:
    """Contiguous and writeable: Numba would compile every kernel anew, for half a second, for a read-only array."""
    return array if array.flags.writeable and array.flags.c_contiguous else array.copy()


def _grouped(numbers: NDArray[np.int32], ids: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Entry ids by the number of their scope."""
    for number in np.unique(numbers).tolist():
        yield number, ids[numbers == number]


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
