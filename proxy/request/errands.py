"""Calls that no client waits for: refetching what was served stale, the likely next question, audits, and the router's
shadows. Each is booked on its own, as money spent; none delays the request on whose occasion it is made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Protocol

import numpy as np
import orjson

from proxy import ports
from proxy.core import freshness
from proxy.core.errors import CacheFault, UpstreamError
from proxy.core.fingerprint import fingerprint_of
from proxy.core.model import Answer, Entry, Miss
from proxy.core.plan import DEFAULT_PLAN
from proxy.core.purges import Began
from proxy.core.query import Query
from proxy.judging.audits import Again
from proxy.lanes.forwarding import ACTING
from proxy.lanes.route import BAD_ANSWERS
from proxy.records import Client, Fetch, Lookup
from proxy.request.collapse import Flight, Seat
from proxy.request.parts import Parts

log = logging.getLogger(__name__)

REPEAT: Final = "repeat"
"""Purpose of a call whose answer is compared and not kept."""
PLAIN: Final = DEFAULT_PLAN.lanes
"""Of a call that no lane shapes."""


class TakeOff(Protocol):
    def __call__(self, fetch: Fetch, *, shared: bool) -> Flight[Fetch]: ...


class Errands:
    """Owns nothing; the pipeline lends it the parts. Lives on the event loop."""

    def __init__(self, parts: Parts, take_off: TakeOff) -> None:
        self.router = parts.router
        self._prefetcher = parts.prefetcher
        self._auditor = parts.auditor
        self._store = parts.store
        self._hot = parts.hot
        self._tasks = parts.tasks
        self._telemetry = parts.telemetry
        self._flights = parts.flights
        self._take_off = take_off
        self._meaning = parts.meaning
        self._clock = parts.clock

    def status(self) -> Mapping[str, object]:
        """For people: what was decided, guessed and learned."""
        guesses = {"made": self._prefetcher.made, "used": self._prefetcher.used}
        return {"route": self.router.status(), "prefetch": guesses}

    # -- for the cache ------------------------------------------------------------------------------------------------

    def revalidate(self, query: Query, client: Client, entry: Entry) -> None:
        """A stale entry is being served: fetch its successor, once at a time."""
        if self._is_under_way(query) or self._tasks.closed:
            return
        lookup, draft, embedder = Lookup(Miss("expired")), entry.draft, self._meaning.embedder
        if embedder is not None and draft.embedder == embedder.identity and draft.embedding is not None:
            lookup.vector = np.frombuffer(draft.embedding, np.float32)
            lookup.signature = None if draft.signature is None else np.frombuffer(draft.signature, np.uint64)
        _ = self._tasks.spawn(self._refetch(query, client, lookup, "revalidate"), "revalidate")

    def foresee(self, query: Query, client: Client) -> None:
        """Count a question, and fetch the one that usually follows when no fresh answer to it is known."""
        likely = self._prefetcher.see(query, client)
        if likely is None or self._tasks.closed or self._is_under_way(likely):
            return
        known = self._hot.find(likely.fingerprint)
        if known is None or not _is_fresh(known.entry, client):
            _ = self._tasks.spawn(self._fetch_likely(likely, client), "prefetch")

    async def _fetch_likely(self, likely: Query, client: Client) -> None:
        try:
            entry = await self._store.find(likely.fingerprint)
        except CacheFault:
            return
        if (entry is None or not _is_fresh(entry, client)) and not self._is_under_way(likely):
            self._prefetcher.fetching(likely)
            await self._refetch(likely, client, Lookup(Miss("prefetch")), "prefetch")

    async def _refetch(self, query: Query, client: Client, lookup: Lookup, purpose: str) -> None:
        """Forward a question for the cache alone; clients who ask it meanwhile may join."""
        await _read_whole(self._take_off(self._fetch(query, client, lookup, purpose), shared=True).join())

    def _is_under_way(self, query: Query) -> bool:
        flight = self._flights.get(query.fingerprint)
        return flight is not None and flight.joinable

    # -- for the judge ------------------------------------------------------------------------------------------------

    def audit(self, query: Query, client: Client, lookup: Lookup, again: Again) -> None:
        """Ask a question once more that was served."""
        _ = self._tasks.spawn(self._ask_again(query, client, lookup, again), "audit")

    async def _ask_again(self, query: Query, client: Client, lookup: Lookup, again: Again) -> None:
        async with self._auditor.slot():
            if self._tasks.closed:
                return
            plain = replace(query, plan=replace(query.plan, lanes=query.plan.lanes - ACTING))
            again = await self._repeat(plain, client, again)
            fetch = self._fetch(plain, client, lookup, "audit")
            fetch.again = again
            await _read_whole(self._take_off(fetch, shared=False).join())

    async def _repeat(self, query: Query, client: Client, again: Again) -> Again:
        """Ask the kept question again, too: how often do two answers to one question look different here?"""
        prompt = await self._auditor.kept_prompt(again)
        asked = None if prompt is None else asking(query, prompt)
        if asked is None:
            return again
        fetch = self._fetch(asked, client, Lookup(Miss("repeat")), REPEAT)
        await _read_whole(self._take_off(fetch, shared=False).join())
        if fetch.answer is None:
            return again
        return await self._auditor.repeated(again, asked, client.headers, fetch.answer)

    # -- for the router -----------------------------------------------------------------------------------------------

    def stored(self, fetch: Fetch, entry: Entry, answer: Answer) -> None:
        """A question that may be routed was answered, and the answer stored."""
        if not self._tasks.closed:
            _ = self._tasks.spawn(self._learn(fetch, entry, answer), "route")

    def unstored(self, fetch: Fetch) -> None:
        """A candidate's answer cannot be stored."""
        if not self._tasks.closed:
            _ = self._tasks.spawn(self._unlearn(fetch), "route")

    async def _learn(self, fetch: Fetch, entry: Entry, answer: Answer) -> None:
        """What a stored answer says of who gave it, and, for a share of questions, of who did not."""
        router = self.router
        try:
            router.stored(fetch, entry)
            await router.judge(entry, answer, fetch)
            if not router.wants_shadow() or (choice := router.shadow_of(fetch)) is None:
                return
            asked = replace(choice.query, plan=replace(choice.query.plan, lanes=PLAIN))
            shadow = self._fetch(asked, fetch.client, Lookup(Miss("shadow")), "shadow")
            shadow.first = choice.sending
            await _read_whole(self._take_off(shadow, shared=False).join())
            if shadow.answer is not None:
                await router.compare(entry, choice.candidate, answer, shadow.answer, fetch)
            elif not fetch.routed_to and shadow.unstored in BAD_ANSWERS:
                await router.vote(entry.id, choice.candidate, False, shadow.unstored, fetch)
        except ports.CACHE_FAULTS as fault:
            self._telemetry.fault(reason_of(fault))

    async def _unlearn(self, fetch: Fetch) -> None:
        try:
            await self.router.unstored(fetch)
        except ports.CACHE_FAULTS as fault:
            self._telemetry.fault(reason_of(fault))

    # -- a call for no client -----------------------------------------------------------------------------------------

    def _fetch(self, query: Query, client: Client, lookup: Lookup, purpose: str) -> Fetch:
        """With the credential of the client on whose occasion it is made."""
        headers = [line for line in client.headers if line[0].lower() != b"idempotency-key"]  # it named the other
        started_s = time.perf_counter()
        own = client._replace(
            request_id=f"{client.request_id}-{purpose}",
            ts_ms=int(self._clock() * 1000),
            started_s=started_s,
            headers=headers,
        )
        began = Began(self._store.purges.newest, own.ts_ms)
        return Fetch(query, own, lookup, started_s, began, purpose=purpose)


def asking(query: Query, prompt: str) -> Query | None:
    """The same request with another text in place of the one that is compared; None where that is not the one place in
    the body that spells it."""
    if query.prompt == prompt:
        return query
    try:
        body, count = _replaced(orjson.loads(query.forward_body), query.prompt, prompt)
    except orjson.JSONDecodeError:
        return None
    if count != 1:
        return None
    raw = orjson.dumps(body)
    return replace(query, prompt=prompt, body=raw, forward_body=raw, fingerprint=fingerprint_of(query.scope, prompt))


def _replaced(value: object, text: str, other: str) -> tuple[object, int]:
    """A parsed body with `other` for every string `text`, and how many there were."""
    if isinstance(value, str):
        return (other, 1) if value == text else (value, 0)
    if isinstance(value, list):
        found = [_replaced(part, text, other) for part in value]
        return [part for part, _ in found], sum(count for _, count in found)
    if isinstance(value, dict):
        named = {name: _replaced(part, text, other) for name, part in value.items()}
        return {name: part for name, (part, _) in named.items()}, sum(count for _, count in named.values())
    return value, 0


async def _read_whole(seat: Seat[Fetch]) -> None:
    """Take a seat's bytes for nobody: what they say is read where the flight lands."""
    try:
        while await seat.next():
            pass
    except UpstreamError as error:
        log.debug("a call for no client failed: %s", error.code)
    finally:
        seat.leave()


def _is_fresh(entry: Entry, client: Client) -> bool:
    return freshness.is_fresh(entry.draft.created_ms, entry.draft.expires_ms, client.ts_ms)


def reason_of(fault: BaseException) -> str:
    """The word for a fault of ours."""
    if isinstance(fault, CacheFault):
        return fault.code
    return getattr(fault, "reason", "timeout")
