"""web.Request → Query, Reply → web.Response: the client listener's handler.

Every head is checked. Then identical bytes from identical headers are the same question, so what was read of them is
remembered: targets, callers, bodies, each by all that decides it, within `limits.memo_bytes`, and only of requests that
were answered. A body that is still arriving has a place of its own, see `core.arrival`; a turn is taken once it is
whole, and what memory answers needs none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from aiohttp import web
from aiohttp.hdrs import METH_POST

from proxy.client.admission import Admission
from proxy.client.callers import Callers, Lines
from proxy.client.delivery import Delivery
from proxy.client.incoming import (
    Unread,
    address_of,
    body_at_hand,
    check_head,
    error_response,
    query_of,
    read_body,
    resumed,
    target_of,
)
from proxy.client.passing import ENCODED, TOO_LARGE, Passing, PassThrough, is_free, passing, tells_cost
from proxy.client.sockets import is_websocket
from proxy.client.wire import answer_at_once
from proxy.core.arrival import Arrival, Room
from proxy.core.batches import Place
from proxy.core.cors import Cors, is_preflight
from proxy.core.dialects.dialect import Dialect
from proxy.core.dialects.routes import Routes, family_of
from proxy.core.errors import BadRequest, CacheFault, IbidError
from proxy.core.identity import BUILT_IN, HeaderRules
from proxy.core.memo import Memo, size_of
from proxy.core.model import Limits
from proxy.core.plan import Lane
from proxy.core.query import Query
from proxy.money.books import Books
from proxy.money.keys import Grant, KeyRing
from proxy.ports import Upstream
from proxy.records import Client
from proxy.relay import Head, Relay, Replay
from proxy.request.embeddings import Embeddings
from proxy.request.pipeline import Pipeline
from proxy.request.reading import Caller, Reader, Target
from proxy.watch.telemetry import Telemetry

log = logging.getLogger(__name__)

MEMO_BODY_BYTES = 16 * 1024
TARGET_BYTES = 2048
QUERY_BYTES = 4096
"""Of a Target and of a Query, but for the texts in them."""


class Batches(Protocol):
    """The batch API and deferred calls: what clients wait for elsewhere. See `proxy.batch.http`."""

    async def answer(self, request: web.BaseRequest, place: Place, asked: Passing) -> web.StreamResponse: ...

    async def defer(
        self, query: Query, asked_path: str, headers: Sequence[tuple[bytes, bytes]]
    ) -> web.StreamResponse: ...

    async def wait(self, query: Query, client: Client) -> Replay: ...


class ClientHandler:
    """Answers every request of the client listener. Owns its memos; everything else is lent to it."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        embeddings: Embeddings,
        upstream: Upstream,
        reader: Reader,
        routes: Routes,
        books: Books,
        telemetry: Telemetry,
        limits: Limits,
        secret: bytes,
        key_ring: KeyRing,
        header_rules: HeaderRules = BUILT_IN,
        anonymous: bool = False,
        keyless: bool = False,
        cors: Cors | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.admission = Admission(limits.in_flight, limits.queued, limits.queue_timeout_s)
        self.arriving = Room(limits)
        self._delivery = Delivery()
        self.streams = self._delivery.streams
        self.batches: Batches | None = None  # set by `app.assemble`, for it reads its lines through this handler
        self._pipeline = pipeline
        self._embeddings = embeddings
        self._reader = reader
        self._upstream = upstream
        self._routes = routes
        self.passing = PassThrough(upstream, books, limits, clock)
        self._telemetry = telemetry
        self._limits = limits
        self.keys = key_ring
        self._clock = clock
        self._cors = cors or Cors()
        self.header_rules = header_rules
        self._callers = Callers(secret, key_ring, header_rules, limits.memo_bytes, anonymous=anonymous, keyless=keyless)
        self._targets: Memo[str, Target] = Memo(limits.memo_bytes)
        self._queries: Memo[tuple[Target, Caller, bytes], Query] = Memo(limits.memo_bytes)
        self._id_prefix = os.urandom(10).hex()
        self._id_count = int.from_bytes(os.urandom(3), "big")

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self._id_count += 1
        request_id = f"{self._id_prefix}{self._id_count:012x}"
        try:
            check_head(request)
            try:
                return await self._answer(request, request_id)
            finally:
                if self.keys.held:
                    self.keys.let_go(request_id)
        except IbidError as error:
            self._telemetry.refused(error.code)
            return self._refused(request, error, request_id)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("a request failed inside ibid", extra={"request_id": request_id})
            return self._refused(request, IbidError("Something failed inside ibid."), request_id)

    def _refused(self, request: web.BaseRequest, error: IbidError, request_id: str) -> web.StreamResponse:
        response = error_response(error, request_id, self._speech_of(request))
        if (origin := request.headers.get("origin")) is not None:
            response.headers.extend(self._cors.granted(family_of(request.path, {}), origin))
        return response

    def _speech_of(self, request: web.BaseRequest) -> Dialect:
        target = self._targets.get(request.raw_path)
        if target is None:
            with contextlib.suppress(BadRequest):
                target = self._read_target(request)
        if target is not None and target.dialect is not None:
            return target.dialect
        return self._routes.of_errors(request.raw_path, request.headers)

    async def _answer(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        started_s = time.perf_counter()
        headers = request.raw_headers
        target = self._targets.get(request.raw_path) or self._read_target(request)
        if is_preflight(request.method, request.headers):
            return await self._preflight(request, request_id, started_s, target)
        caller = self._callers.find(headers, target) or self._callers.read(headers, target)
        if target.dialect is None or request.method != METH_POST:  # only a POST asks a question
            return await self._pass(request, request_id, started_s, target, caller)
        if not caller.is_json:
            raise BadRequest("Content-Type must be application/json.", code="unsupported_media_type", status=415)
        body = body_at_hand(request, self._limits)
        if body is None:
            try:
                with self._place(request, caller) as arrival:
                    body = await read_body(request, self._limits, arrival)
            except Unread as error:  # to be looked at, not to be asked
                return await self._pass(request, request_id, started_s, target, caller, unread=error)
        query = self._queries.get((target, caller, body))
        is_new = query is None
        if query is None:
            query = self.read_query(target, caller, body)
        grant = caller.grant
        if caller.is_deferring and self.batches is not None:
            if grant is not None:
                self.keys.check_query(grant, query)
            async with self._turn():
                return await self.batches.defer(query, target.path_qs, caller.headers)
        client = Client(request_id, int(self._clock() * 1000), started_s, query.path_qs, caller.headers,
                        caller.is_retry, caller.tries_again)  # fmt: skip
        spent = None if grant is None else self.keys.admit(grant, query, request_id, client.ts_ms)
        replay = None if spent is not None or query.batch is not None else self._pipeline.recall(query, client)
        if replay is not None and replay.paced is None:
            if is_new:
                self._remember(request, target, caller, body, query)
            if caller.origin:
                replay = self._granted_hit(replay, target, caller.origin)
            return answer_at_once(request, replay)
        if not self.admission.try_enter():
            await self.admission.enter()
        try:
            if replay is None and spent is None and query.batch is None and query.controls.deadline_s is not None:
                asked = asyncio.ensure_future(self._ask(query, client))
                return await self._delivery.patiently(request, query, request_id, asked)
            reply = replay or await self._reply(query, client, spent)
            if caller.origin:
                reply = self._granted(reply, target, caller.origin)
            if is_new and (isinstance(reply, Replay) or reply.status < 400):
                self._remember(request, target, caller, body, query)
            if isinstance(reply, Relay):
                return await self._delivery.relay(request, reply)
            if reply.paced is not None:
                return await self._delivery.pace(request, reply, reply.paced)
            return answer_at_once(request, reply)
        finally:
            self.admission.leave()

    async def _reply(self, query: Query, client: Client, spent: BadRequest | None) -> Replay | Relay:
        if spent is not None:
            return await self._recall_only(query, client, spent)
        if query.batch is not None:
            return await self._embeddings.answer(query, client)
        return await self._pipeline.answer(query, client)

    def _granted(self, reply: Replay | Relay, target: Target, origin: str) -> Replay | Relay:
        """The same as a page of this origin may read it."""
        if isinstance(reply, Relay):
            reply.headers = self._cors.carried(family_of(target.path, {}), origin, reply.headers)
            return reply
        return self._granted_hit(reply, target, origin)

    def _granted_hit(self, reply: Replay, target: Target, origin: str) -> Replay:
        granted = self._cors.granted(family_of(target.path, {}), origin)
        return reply._replace(head=Head([*reply.head.pairs, *granted], reply.head.id_header)) if granted else reply

    async def _preflight(
        self, request: web.BaseRequest, request_id: str, started_s: float, target: Target
    ) -> web.StreamResponse:
        if (told := self._cors.preflight(request.headers)) is not None:
            return web.Response(status=204, headers=told)
        caller = self._callers.of_preflight(request.raw_headers)
        wanted = request.headers.get("access-control-request-headers", "").lower().split(",")
        names = {name.strip(): "" for name in wanted}  # the request itself will have them
        return await self._pass(request, request_id, started_s, target._replace(place=None), caller, names)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if not self.admission.try_enter():
            await self.admission.enter()
        try:
            yield
        finally:
            self.admission.leave()

    @contextlib.contextmanager
    def _place(self, request: web.BaseRequest, caller: Caller) -> Iterator[Arrival]:
        """Room for a body that is still arriving. Raises Busy."""
        owners = (("tenant", caller.tenant), ("address", address_of(request)))
        arrival = self.arriving.enter(owners, asyncio.get_running_loop().time())
        try:
            yield arrival
        finally:
            arrival.leave()

    async def _recall_only(self, query: Query, client: Client, spent: BadRequest) -> Replay | Relay:
        """What the cache has, for a key whose money is spent. Raises `spent` when it has nothing."""
        only = replace(query, controls=replace(query.controls, only_if_cached=True))
        try:
            if only.batch is not None:
                return await self._embeddings.answer(only, client)
            return self._pipeline.recall(only, client) or await self._pipeline.answer(only, client)
        except BadRequest as error:
            if error.code != "not_cached":
                raise
            raise spent from None

    async def _pass(
        self,
        request: web.BaseRequest,
        request_id: str,
        started_s: float,
        target: Target,
        caller: Caller,
        names: Mapping[str, str] | None = None,
        unread: Unread | None = None,
    ) -> web.StreamResponse:
        """A request that no dialect claims, or one that is not read. Its body passes
        while it is answered, so it takes a turn at once, and a place beside it until its body is whole."""
        asked = passing(
            request, request_id=request_id, path=target.path, path_qs=target.path_qs, tenant=caller.tenant,
            headers=caller.headers, started_s=started_s, key_id=caller.key_id, team=caller.team,
        )._replace(names=names)  # fmt: skip
        if caller.origin:
            family = family_of(target.path, {} if names is None else names)
            asked = asked._replace(carry=partial(self._cors.carried, family, caller.origin))
        with contextlib.nullcontext() if request.content.is_eof() else self._place(request, caller) as arrival:
            if unread is not None:
                verdict = TOO_LARGE if unread.status == 413 else ENCODED
                asked = asked._replace(body=resumed(request, self._limits, arrival, unread.begun), verdict=verdict)
            async with self._turn():
                response = await self._pass_on(request, target, caller.grant, asked._replace(arrival=arrival))
        if response.status < 400 and names is None:
            self._remember_caller(request, target, caller)
        return response

    async def _pass_on(
        self, request: web.BaseRequest, target: Target, grant: Grant | None, asked: Passing
    ) -> web.StreamResponse:
        if grant is not None:
            asked = asked._replace(
                admit=partial(self._admit_passing, request, asked, grant), is_held_to_models=bool(grant.live.key.models)
            )
        if target.place is not None and self.batches is not None:
            if grant is not None:
                self.keys.check(grant)
            return await self.batches.answer(request, target.place, asked)
        if grant is not None:
            self.keys.check_passing(
                grant, int(self._clock() * 1000), is_free=is_free(request), is_told=_is_told(request, asked.path)
            )
        return await self.passing.answer(request, asked)

    def _admit_passing(
        self, request: web.BaseRequest, asked: Passing, grant: Grant, upstream: str, model: str | None
    ) -> None:
        """As `KeyRing.admit` for what passes through. A key held to some models must name one of them where that may
        cost something. Raises BadRequest."""
        self.keys.admit_passing(
            grant, upstream, model, asked.request_id, int(self._clock() * 1000),
            is_free=is_free(request), is_told=_is_told(request, asked.path),
        )  # fmt: skip

    # -- reading --------------------------------------------------------------------------------------------------

    def _read_target(self, request: web.BaseRequest) -> Target:
        return self._reader.target(target_of(request), query_of(request))

    def target(self, path: str, query: str = "") -> Target:
        """Where a path leads, and the query behind it, its question mark included."""
        return self._reader.target(path, query)

    def target_of(self, path_qs: str) -> Target:
        """The target of a path that was asked for before."""
        if (target := self._targets.get(path_qs)) is None:
            path, mark, query = path_qs.partition("?")
            target = self.target(path, mark + query)
            self._targets.put(path_qs, target, 2 * size_of(target[:3]) + TARGET_BYTES)
        return target

    def read_query(self, target: Target, caller: Caller, raw: bytes) -> Query:
        """The question in a body. Raises BadRequest."""
        return self._reader.read(target, caller, raw)

    def read_line(self, path_qs: str, tenant: str, headers: Lines, raw: bytes, key_id: str = "") -> Query:
        """The question in a body that came in a batch, or came earlier, with this virtual key. Raises BadRequest."""
        return self.read_query(self.target_of(path_qs), self._callers.of_line(tenant, headers, key_id), raw)

    def _remember(self, request: web.BaseRequest, target: Target, caller: Caller, body: bytes, query: Query) -> None:
        """What was read of a request that was answered."""
        self._remember_caller(request, target, caller)
        if (
            len(body) <= MEMO_BODY_BYTES and query.eligibility.reason != "previous_response"
        ):  # it may be known next time
            self._queries.put((target, caller, body), query, _size_of_query(query))

    def _remember_caller(self, request: web.BaseRequest, target: Target, caller: Caller) -> None:
        if self._callers.find(request.raw_headers, target) is not caller:
            self._callers.remember(request.raw_headers, target, caller)
        raw_path = request.raw_path
        if self._targets.get(raw_path) is None and raw_path.startswith("/"):
            self._targets.put(raw_path, target, 2 * size_of((raw_path, *target[:3])) + TARGET_BYTES)

    def dialect_of(self, path_qs: str) -> Dialect:
        """Which dialect speaks on a path that has one."""
        dialect = self.target_of(path_qs).dialect
        assert dialect is not None
        return dialect

    async def _ask(self, query: Query, client: Client) -> Replay | Relay:
        """The answer of a provider's batch where client and plan allow that it takes so long, else the usual one."""
        if Lane.DEFER in query.plan.lanes and self.batches is not None and not query.stream:
            try:
                self.keys.let_go(client.request_id)  # the call is let in on its own
                return await self.batches.wait(query, client)
            except CacheFault as fault:
                self._telemetry.fault(fault.code)
        return await self._pipeline.answer(query, client)

    def shed(self) -> None:
        """Drop what is remembered of requests, for want of memory."""
        self._targets.clear()
        self._queries.clear()
        self._callers.shed()

    def shut(self, is_shut: bool) -> None:
        """Let nobody new in, for want of memory, or let them in again."""
        self.admission.is_shut = self.arriving.is_shut = is_shut

    def asked(self) -> int:
        """Requests so far, from wherever the count began."""
        return self._id_count

    def beat(self, now_s: float) -> None:
        """Called about once a second: keep silent event streams alive. `now_s` is `time.monotonic`."""
        self._delivery.beat(now_s)


def _is_told(request: web.BaseRequest, path: str) -> bool:
    """Whether what it costs can be known."""
    return is_free(request) or (not is_websocket(request) and tells_cost(path))


def _size_of_query(query: Query) -> int:
    """What a memo holds for a query, its key included."""
    texts = (query.prompt, query.body, query.forward_body)
    parts = () if query.batch is None else (query.batch.inputs, query.batch.fingerprints)
    return size_of(texts) + size_of(parts) + QUERY_BYTES
