"""The end of an upstream call: what it said is read and booked, those who followed it are settled, and it is stored if
it may be stored."""

from __future__ import annotations

from dataclasses import replace

from proxy import ports
from proxy.core import policy
from proxy.core.dialects.dialect import Recording, is_streamed
from proxy.core.model import Answer, Hit, Level, Tier
from proxy.core.pace import has_pace, runs_of, texts_of
from proxy.core.plan import Lane
from proxy.core.query import Query
from proxy.hot import HotRow
from proxy.lanes.failover import STALE_IF_ERROR
from proxy.lanes.route import MECHANISM as ROUTED
from proxy.money.books import draft_of
from proxy.records import Fetch
from proxy.request.collapse import Flight
from proxy.request.entries import Entries
from proxy.request.errands import REPEAT, Errands, reason_of
from proxy.request.parts import Parts
from proxy.upstreams.decoding import codings_of


class Landing:
    """Owns nothing it is given."""

    def __init__(self, parts: Parts, entries: Entries, errands: Errands) -> None:
        self._parts = parts
        self._books = parts.books
        self._telemetry = parts.telemetry
        self._entries = entries
        self._errands = errands

    def landed(self, flight: Flight[Fetch]) -> None:
        """The upstream call ended, one way or the other."""
        fetch, response = flight.context, flight.response
        status = 0 if response is None else response.status
        start = b"" if flight.trimmed or not flight.pieces else flight.pieces[0]
        is_stream = response is not None and is_streamed(fetch.asked.dialect, response.content_type, start)
        self._read(flight, status, is_stream=is_stream)
        self._count_calls(flight, status, is_stream=is_stream)
        if self._parts.finisher is not None:
            self._parts.finisher.landed(flight)
        if fetch.purpose != "answer":
            self._books.unasked(fetch)
        for settle in fetch.deferred:
            settle()
        fetch.deferred.clear()
        if fetch.purpose == REPEAT:
            self._forget_flight(flight)
        elif fetch.answer is not None:
            _ = self._parts.tasks.spawn(self._keep(flight, fetch.answer), "store")
        else:
            self._telemetry.unstored(fetch.unstored or "no_answer")
            self._forget_flight(flight)
            if fetch.routed_to:
                self._errands.unstored(fetch)

    def _read(self, flight: Flight[Fetch], status: int, *, is_stream: bool) -> None:
        """Usage, and the answer if it may be stored, into the fetch."""
        fetch, recording = flight.context, None
        query = fetch.asked
        body = b"" if flight.trimmed else flight.body
        if status == 200 and query.eligibility.level is Level.NONE:
            fetch.usage = fetch.usage or query.dialect.find_usage(body)
        elif status == 200:
            recording = query.dialect.record(body, is_stream=is_stream, n=query.n, keeps_id=query.keeps_id)
            fetch.usage = fetch.usage or recording.usage
        if recording is not None and recording.answer is not None and query.keeps_id:
            asked = fetch.query
            self._parts.chains.learn(asked.tenant, asked.upstream, asked.fingerprint, recording.answer)
        fetch.unstored = self._why_unstored(flight, recording)
        answer = None if recording is None or fetch.unstored else recording.answer
        if answer is None:
            return
        if answer.usage is None and query.output_limit is not None:
            answer = replace(answer, limit=query.output_limit)
        if is_stream and has_pace(flight.arrived_s):
            texts = texts_of(answer.message.get("content"), answer.pieces)
            answer = replace(answer, runs=runs_of(flight.pieces, flight.arrived_s, texts))
        fetch.answer = answer

    def _count_calls(self, flight: Flight[Fetch], status: int, *, is_stream: bool) -> None:
        """The calls that were made, now that their end is known."""
        fetch = flight.context
        if fetch.attempt is None and not fetch.stand_in and fetch.attempts:  # it ended while several were under way
            fetch.attempt = fetch.attempts[0]
        if fetch.stand_in != STALE_IF_ERROR:
            won = flight.is_delivered
            fetch.call = self._books.call_of(fetch, status, flight.size_bytes, is_stream=is_stream, won=won)
            self._parts.forwarder.learn(fetch)
        if len(fetch.attempts) > 1 or fetch.attempt is None:
            fetch.extra = self._books.lost_calls(fetch, fetch.usage)

    def _why_unstored(self, flight: Flight[Fetch], recording: Recording | None) -> str:
        response = flight.response
        whole = flight.complete and flight.error is None and not flight.trimmed
        fetch = flight.context
        if response is None or not whole:
            return "truncated"
        sending = fetch.sending if fetch.attempt is None else fetch.attempt.sending
        if fetch.stand_in or (sending.is_other and ROUTED not in sending.shaped_by):
            return "other_model"  # whose answer is not the one that is asked for under this scope
        answer = None if recording is None else recording.answer
        if answer is not None:
            self._parts.naming.see(sending.upstream, sending.model, answer.model)
        if recording is not None and codings_of(response):
            return "encoded"
        return (
            policy.storable(
                None if recording is None else answer or recording.refusal_reason,
                fetch.query,
                self._parts.rules,
                status=response.status,
                size_bytes=flight.size_bytes,
                header=response.header,
                aliases=self._parts.names_of(fetch.query),
            )
            or ""
        )

    async def _keep(self, flight: Flight[Fetch], answer: Answer) -> None:
        """The flight stays joinable until its entry is committed."""
        try:
            await self.keep(flight.context, answer)
        finally:
            self._forget_flight(flight)

    def _forget_flight(self, flight: Flight[Fetch]) -> None:
        key = flight.context.flight_key
        if self._parts.flights.get(key) is flight:
            del self._parts.flights[key]

    async def keep(self, fetch: Fetch, answer: Answer) -> None:
        """Store an answer, and learn from it."""
        if (seen := _seen_in_shadow(fetch)) is not None:
            self._parts.store.mark_used(seen.entry.id, int(self._parts.clock() * 1000))
            self._parts.auditor.shadowed(
                fetch.lookup.opinion, seen, fetch.query, fetch.client.headers, fetch.client.request_id, answer
            )
            return
        embedder = self._parts.meaning.embedder
        identity = "" if embedder is None else embedder.identity
        draft = draft_of(fetch, answer, identity, self._parts.rules, int(self._parts.clock() * 1000))
        before = self._parts.hot.find(draft.fingerprint)
        try:
            entry = await self._entries.put(draft, answer, fetch.began)
            if entry is None:
                return
            if before is not None and fetch.again is None and not fetch.routed_to:
                self._parts.auditor.refetched(before, fetch.query, fetch.client.request_id, answer)
            opinion = None if fetch.routed_to else fetch.lookup.opinion  # of answers of the model asked for
            self._parts.auditor.stored(opinion, fetch.again, fetch.query, fetch.client.headers, entry, answer)
            if fetch.purpose == "answer" and may_route(fetch.asked):
                self._errands.stored(fetch, entry, answer)
        except ports.CACHE_FAULTS as fault:
            self._telemetry.fault(reason_of(fault))


def _seen_in_shadow(fetch: Fetch) -> HotRow | None:
    """What would have been served in place of this call. Its question is not stored anew, for it would not have been:
    an entry ends when it would have ended, and a wording that is alike stays alike."""
    verdict = fetch.lookup.verdict
    if not fetch.asked.controls.shadow or fetch.routed_to or fetch.purpose != "answer":
        return None
    is_served = isinstance(verdict, Hit) and verdict.tier in (Tier.EXACT, Tier.SEMANTIC)
    return fetch.lookup.row if is_served else None


def may_route(query: Query) -> bool:
    return Lane.ROUTE in query.plan.lanes and query.eligibility.level is not Level.NONE and query.batch is None
