"""Asking the likely next question before it is asked.

Per asker it is counted which question follows which. A question that has followed often enough is fetched when its
forerunner comes again and no fresh answer to it is stored, at the cheaper service tier only: a guess is not worth the
full price. When too few of the answers fetched are ever used, guessing stops.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Final, NamedTuple

from proxy.core.model import Level
from proxy.core.plan import Lane, Plan
from proxy.core.query import Query
from proxy.records import Client
from proxy.settings.lanes import PrefetchLane

QUESTIONS = 4_096
ASKERS = 4_096
BODY_BYTES = 16 * 1024
TRIALS = 20  # guesses before their use decides
PLAN: Final = Plan(frozenset({Lane.EXACT, Lane.TIER}), "prefetch")


class _Asked(NamedTuple):
    fingerprint: bytes
    ts_ms: int


class _Known:
    """A question, and what followed it."""

    __slots__ = ("followed", "query", "total")

    def __init__(self, query: Query) -> None:
        self.query = query
        self.followed: dict[bytes, int] = {}
        self.total = 0


class Prefetcher:
    """Memory of one process, bounded. Lives on the event loop."""

    def __init__(self, lane: PrefetchLane) -> None:
        self.made = 0
        self.used = 0
        self._lane = lane
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._last: OrderedDict[tuple[str, str], _Asked] = OrderedDict()
        self._guessed: OrderedDict[bytes, None] = OrderedDict()

    def see(self, query: Query, client: Client) -> Query | None:
        """Count a question; the one worth fetching now, as it is to be asked, or None."""
        if query.eligibility.level is Level.NONE or len(query.body) > BODY_BYTES or not query.controls.write:
            return None
        fingerprint = query.fingerprint
        if fingerprint in self._guessed:
            del self._guessed[fingerprint]
            self.used += 1
        known = self._remember(query)
        asker = (query.tenant, query.controls.user)
        last = self._last.get(asker)
        if last is not None and last.fingerprint != fingerprint and client.ts_ms - last.ts_ms <= self._within_ms:
            self._count(last.fingerprint, fingerprint)
        self._last[asker] = _Asked(fingerprint, client.ts_ms)
        self._last.move_to_end(asker)
        if len(self._last) > ASKERS:
            self._last.popitem(last=False)
        return self._guess(known)

    @property
    def _within_ms(self) -> float:
        return self._lane.within_s * 1e3

    def _remember(self, query: Query) -> _Known:
        known = self._known.get(query.fingerprint)
        if known is None:
            known = self._known[query.fingerprint] = _Known(query)
            if len(self._known) > QUESTIONS:
                self._known.popitem(last=False)
        self._known.move_to_end(query.fingerprint)
        return known

    def _count(self, before: bytes, after: bytes) -> None:
        known = self._known.get(before)
        if known is not None:
            known.total += 1
            known.followed[after] = known.followed.get(after, 0) + 1
            if len(known.followed) > 64:
                del known.followed[min(known.followed, key=known.followed.__getitem__)]

    def _guess(self, known: _Known) -> Query | None:
        if not known.followed or (self.made >= TRIALS and self.used < self.made * self._lane.min_share / 2):
            return None
        likely = max(known.followed, key=known.followed.__getitem__)
        count = known.followed[likely]
        if count < self._lane.min_count or count < known.total * self._lane.min_share:
            return None
        successor = self._known.get(likely)
        if successor is None or likely in self._guessed:
            return None
        query = successor.query
        ttl_s = self._lane.ttl_s if query.controls.ttl_s is None else min(self._lane.ttl_s, query.controls.ttl_s)
        return replace(query, controls=replace(query.controls, ttl_s=ttl_s), plan=PLAN)

    def fetching(self, query: Query) -> None:
        """A guess is being fetched."""
        self.made += 1
        self._guessed[query.fingerprint] = None
        if len(self._guessed) > QUESTIONS:
            self._guessed.popitem(last=False)
