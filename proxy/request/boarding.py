"""Calls in flight: to join one that will answer this question too, or to take off with one of its own."""

from __future__ import annotations

import time
from functools import partial

from proxy.core import policy, retries
from proxy.core.dialects.dialect import is_streamed
from proxy.core.errors import BadRequest, UpstreamError
from proxy.core.identity import scope_headers
from proxy.core.model import Level, Miss
from proxy.core.plan import Lane
from proxy.core.query import Query
from proxy.lanes.forwarding import ACTING
from proxy.lanes.route import Choice
from proxy.ports import UpstreamResponse
from proxy.records import Client, Fetch, Lookup
from proxy.relay import Ending, Relay, Replay
from proxy.request.collapse import Flight, Seat
from proxy.request.entries import Entries
from proxy.request.heads import forward_headers
from proxy.request.landing import Landing
from proxy.request.parts import Parts
from proxy.request.serving import Server
from proxy.request.settle import Request, Settler
from proxy.upstreams.decoding import codings_of


class Boarding:
    """Owns nothing it is given. `flights`: those that others may join, by fingerprint; `aloft`: all of them."""

    def __init__(self, parts: Parts, entries: Entries, landing: Landing, server: Server, settler: Settler) -> None:
        self._flights = parts.flights
        self._aloft: set[Flight[Fetch]] = set()
        self._forwarder = parts.forwarder
        self._on_left = None if parts.finisher is None else parts.finisher.left
        self._entries = entries
        self._landing = landing
        self._server = server
        self._settler = settler

    def joinable(self, query: Query, client: Client) -> Flight[Fetch] | None:
        """The flight whose answer will be this question's too."""
        key = _key_of(query, client, client.is_retry)
        flight = self._flights.get(key) if key else None
        if flight is None or not flight.joinable:
            return None
        first = flight.context.asked
        if first.plan.acts(ACTING) != query.plan.acts(ACTING):
            return None  # what may answer the one may not answer the other
        asked, own = first.output_limit, query.output_limit
        return flight if own is None or (asked is not None and asked <= own) else None

    async def join(self, flight: Flight[Fetch], request: Request) -> Replay | Relay | None:
        """Share a forward in flight: its bytes when both stream alike, its answer once it is whole when not. None when
        that cannot be used; the request's lookup says why."""
        query, fetch, seat = request.query, flight.context, flight.join()
        request.fetch, request.is_collapsed, request.has_joined = fetch, True, True
        if _same_bytes(fetch.asked, query):
            return await self._board(request, flight, seat)
        try:
            while await seat.next():  # read and let go: the answer is with the flight
                pass
        finally:
            seat.leave()
        reason = fetch.unstored if fetch.answer is None else policy.unfit(fetch.answer, query)
        if fetch.answer is None or reason is not None:
            request.lookup, request.is_collapsed = Lookup(Miss(reason or "")), False
            return None
        reply = self._server.share(query, request.client, fetch.answer)
        self._settler.settle(request, Ending())
        return reply

    async def forward(self, request: Request, choice: Choice | None = None) -> Relay:
        """Ask the upstream. Raises BadRequest where the request asked for cached answers only."""
        query, client, lookup = request.query, request.client, request.lookup
        assert lookup is not None
        if query.controls.only_if_cached:
            request.fetch = None  # of another's call, which it joined in vain
            raise BadRequest(
                "Not in the cache, and the request asked for cached answers only.", status=504, code="not_cached"
            )
        fetch = request.fetch = Fetch(query, client, lookup, time.perf_counter(), self._entries.began(client))
        if choice is not None:
            fetch.query, fetch.asked_as, fetch.first = choice.query, query, choice.sending
            fetch.routed_to, fetch.neighbour = choice.candidate, choice.neighbour
        fetch.flight_key = _key_of(query, client, client.tries_again)
        current = self._flights.get(fetch.flight_key)  # while others can join it, it goes on for those it suits
        shared = bool(fetch.flight_key) and (current is None or not current.joinable)
        flight = self.take_off(fetch, shared=shared)
        return await self._board(request, flight, flight.join())

    def take_off(self, fetch: Fetch, *, shared: bool) -> Flight[Fetch]:
        """A forward that opens with its first seat; `shared`: others may join it."""
        flight = Flight(fetch, partial(self._forwarder.open, fetch), self._landed, shared=shared, on_left=self._on_left)
        self._aloft.add(flight)
        if shared:
            fetch.flight_key = fetch.flight_key or fetch.asked.fingerprint
            self._flights[fetch.flight_key] = flight
        return flight

    def _landed(self, flight: Flight[Fetch]) -> None:
        self._aloft.discard(flight)
        self._landing.landed(flight)

    def shed(self) -> None:
        """For want of memory: what every client of a call has read is forgotten, and the answer not stored."""
        for flight in self._aloft:
            flight.forget()

    def cut_one(self) -> None:
        """For want of memory: end the call that holds the most for its clients."""
        begun = [flight for flight in self._aloft if flight.response is not None]
        if begun:
            error = UpstreamError("Memory is short.", code="overloaded", status=503, retry_after_s=1)
            max(begun, key=lambda flight: flight.held_bytes).cut(error)

    async def _board(self, request: Request, flight: Flight[Fetch], seat: Seat[Fetch]) -> Relay:
        """Wait for the response head; from then on the caller owns the seat through the Relay."""
        request.flight = flight
        try:
            response = await flight.head()
            is_stream = request.query.stream and response.status == 200 and await _is_streamed(request, response, seat)
        except BaseException:
            seat.leave()
            raise
        query, dialect = request.query, request.query.dialect
        request.headers = forward_headers(request, flight.context, response.status, query.plan.text)
        request.headers += response.headers
        return Relay(
            seat,
            dialect,
            response.status,
            request.headers,
            response.content_length,
            dialect.filter(wants_usage=query.wants_usage, n=query.n) if is_stream else None,
            partial(self._settler.settle, request),
        )


def _may_share(query: Query) -> bool:
    """In shadow every request makes its own call."""
    controls = query.controls
    if not controls.read or controls.shadow:
        return False
    return query.eligibility.level is not Level.NONE and Lane.COLLAPSE in query.plan.lanes


def _key_of(query: Query, client: Client, tries_again: bool) -> bytes:
    """By what others find its call: whoever asks the same, or else only its own client when it tries again; b"" where
    nobody may."""
    if _may_share(query):
        return query.fingerprint
    if not tries_again:
        return b""
    named = [value for name, value in client.headers if name.lower() == b"idempotency-key"]
    return retries.key_of(query.tenant, query.path_qs, scope_headers(client.headers), named, query.body)


async def _is_streamed(request: Request, response: UpstreamResponse, seat: Seat[Fetch]) -> bool:
    """Whether there is a stream to filter, whatever it is called."""
    dialect = request.query.dialect
    if codings_of(response):
        return False  # nobody here can read it
    is_called_one = response.content_type == dialect.stream_type
    return is_called_one or is_streamed(dialect, response.content_type, await seat.peek())


def _same_bytes(one: Query, other: Query) -> bool:
    """Whether the reply to one can be relayed to the other as it arrives."""
    return (
        one.stream == other.stream
        and one.endpoint == other.endpoint
        and one.dialect is other.dialect
        and one.output_limit == other.output_limit
    )
