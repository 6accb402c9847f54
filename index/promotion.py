"""Approximate indexes of large scopes: when one is wanted, how it is built aside, and how it is handed over.

A builder thread trains from pieces it asks the owner for. What changed in the meantime is remembered by entry id and
applied at the hand-over. Methods run on the owner thread unless they say otherwise.

States of a scope: exact (chain of slots, scanned by the kernel) → building (still exact) → approximate (FAISS
proposes, the kernel rescores) → rebuilding when twice as large → exact again when it shrinks below half the limit.
A scope whose measured recall misses the goal stays exact until it has doubled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from index.arena import Arena, Piece
from index.errors import FAULTS, IndexRoomError
from index.heap import trim_heap
from index.partition import QUERIES, Approximate, ExactBest, sample_queries

T = TypeVar("T")

_log = logging.getLogger(__name__)

PROMOTE_ABOVE: Final = 2000
RETRAIN_AT: Final = 2
"""Growth since training. At 4 a scope of 100 000 was left with lists of 330 entries and searched in 0.8 ms."""
PIECE: Final = 1024


class Ask(Protocol):
    """Runs an action on the owner thread. Raises IndexFault when that has gone."""

    def __call__(self, action: Callable[[], T], /) -> Future[T]: ...


class Promotions:
    """The approximate side of an arena. `approximate` is by scope number; `builder` is at work or None."""

    def __init__(self, arena: Arena, ask: Ask, closing: threading.Event, promote_above: int) -> None:
        self.approximate: dict[int, Approximate] = {}
        self.builder: threading.Thread | None = None
        self.faults = 0
        self.paused = False  # while rows are replayed, nothing is built: it would be outgrown at once
        self._arena = arena
        self._ask = ask
        self._closing = closing
        self._promote_above = promote_above
        self._scope = -1  # number of the scope being built
        self._touched: set[int] = set()  # ids changed in it meanwhile
        self._wanted: dict[int, None] = {}
        self._not_before: dict[int, int] = {}  # scope number -> size at which to try again after missed recall

    @property
    def building(self) -> bool:
        return self._scope >= 0

    def states(self) -> dict[bytes, tuple[int, int, float]]:
        """Scope digest → (entries, probes, recall@1 measured when built)."""
        digests = self._arena.digests()
        return {digests[n]: (a.size, a.probes, a.recall) for n, a in self.approximate.items()}

    def join(self, timeout_s: float) -> None:
        """Wait for the builder; from any thread."""
        if (builder := self.builder) is not None:
            builder.join(timeout_s)

    def entered(self, number: int, ids: NDArray[np.int64]) -> None:
        """These ids are new in the arena, in this scope."""
        if number == self._scope:
            self._touched.update(ids.tolist())
        if (approximate := self.approximate.get(number)) is not None:
            approximate.add(ids, self._arena.vectors(self._arena.find_many(ids)))
        self.consider(number)

    def left(self, number: int, ids: NDArray[np.int64]) -> None:
        """These ids have left the arena; they were in this scope."""
        if number == self._scope:
            self._touched.update(ids.tolist())
        if (approximate := self.approximate.get(number)) is not None:
            approximate.remove(ids)
        if self._arena.counts[number] * 2 < self._promote_above:  # its number may soon be another scope's
            self.approximate.pop(number, None)
            self._not_before.pop(number, None)

    def consider(self, number: int) -> None:
        """Have an approximate index built if the scope has outgrown what it has."""
        size = int(self._arena.counts[number])
        approximate = self.approximate.get(number)
        limit = RETRAIN_AT * approximate.built_for if approximate is not None else self._promote_above
        if size <= max(limit, self._not_before.get(number, 0)) or number == self._scope:
            return
        self._wanted[number] = None
        self._next_build()

    def resume(self) -> None:
        """Consider every scope after a pause."""
        self.paused = False
        for number in list(self._arena.scope_ids.values()):
            self.consider(number)

    def _next_build(self) -> None:
        if self.building or self.paused or not self._wanted or self._closing.is_set():
            return
        self._scope = next(iter(self._wanted))
        del self._wanted[self._scope]
        self._touched = set()
        slots = self._arena.slots_of(self._scope).copy()
        self.builder = threading.Thread(
            target=self._build, args=(self._scope, slots), name="ibid-index-builder", daemon=True
        )
        self.builder.start()

    # on the builder thread

    def _build(self, number: int, slots: NDArray[np.int32]) -> None:
        """Train, fill and measure, then hand over. A failure leaves the scope exact."""
        started = time.monotonic()
        built: Approximate | None = None
        try:
            built = self._built(number, slots)
        except FAULTS as fault:
            if self._closing.is_set():
                return  # the owner answers nothing more
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
        """Ids and vectors of those slots that are (still) of this scope, copied on the owner thread."""

        def copy() -> Piece:
            return self._arena.piece(slots[self._arena.scopes[slots] == number])

        piece = self._ask(copy).result()
        return piece.ids, piece.rows.astype(np.float32) * piece.scales[:, None]

    def _catch_up(self, number: int, built: Approximate) -> bool:
        """Apply what changed while building; False when so little is left that the hand-over may do it."""

        def take() -> NDArray[np.int64]:
            touched = self._touched
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

    # on the owner thread again

    def _hand_over(self, number: int, size: int, built: Approximate | None, took_s: float) -> None:
        """Apply what changed while building, then swap."""
        touched, self._touched, self._scope, self.builder = self._touched, set(), -1, None
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
            self.approximate[number] = built
            self._not_before.pop(number, None)
            _log.info(
                "scope promoted",
                extra={"entries": built.size, "probes": built.probes, "recall": built.recall, "s": took_s},
            )
        self._next_build()
