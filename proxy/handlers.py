"""web.Request → Query, Reply → web.Response: the client listener's handler.

Identical bytes from identical headers are the same question, so what was read from them is remembered: headers once per
distinct header block, bodies once per distinct body. Everything remembered is a pure function of those bytes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from aiohttp import web
from aiohttp.hdrs import METH_POST

from proxy.batch_http import BatchApi
from proxy.books import Client
from proxy.core import identity
from proxy.core.dialects.dialect import JSON, Dialect
from proxy.core.dialects.routes import Routes
from proxy.core.directives import held_headers
from proxy.core.errors import BadRequest, CacheFault, IbidError, UpstreamError
from proxy.core.model import Limits, Query
from proxy.core.plan import Lane
from proxy.embeddings import Embeddings
from proxy.incoming import error_response, query_of, read_body, target_of
from proxy.keys import Grant, KeyRing
from proxy.listener import Admission
from proxy.passing import Passing, PassThrough, is_free, is_websocket, passing, tells_cost
from proxy.pipeline import Pipeline
from proxy.ports import Ledger, Upstream
from proxy.reading import Caller, Reader, Target
from proxy.relay import Paced, Relay, Replay
from proxy.telemetry import Telemetry
from proxy.wire import SERVER, answer_at_once, headers_of, relay_at_once

log = logging.getLogger(__name__)

WHOLE_LIMIT_BYTES = 1024 * 1024
MEMO_BODY_BYTES = 16 * 1024
MEMO_ENTRIES = 2048
HEARTBEAT_S = 15.0


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
        ledger: Ledger,
        telemetry: Telemetry,
        limits: Limits,
        secret: bytes,
        key_ring: KeyRing,
        extra_headers: frozenset[str] = frozenset(),
        anonymous: bool = False,
        keyless: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.admission = Admission(limits.in_flight, limits.queued, limits.queue_timeout_s)
        self.streams: set[LiveStream] = set()
        self.batches: BatchApi | None = None  # set by `app.assemble`, for it reads its lines through this handler
        self._pipeline = pipeline
        self._embeddings = embeddings
        self._reader = reader
        self._upstream = upstream
        self._routes = routes
        self.passing = PassThrough(upstream, ledger, telemetry, limits, clock)
        self._telemetry = telemetry
        self._limits = limits
        self._secret = secret
        self.keys = key_ring
        self._extra_headers = extra_headers
        self._anonymous = anonymous
        self._keyless = keyless
        self._clock = clock
        self._targets: dict[str, Target] = {}
        self._callers: dict[tuple[tuple[bytes, bytes], ...], Caller] = {}
        self._without_key: dict[tuple[tuple[bytes, bytes], ...], Caller] = {}
        self._queries: dict[tuple[Target, Caller, bytes], Query] = {}
        self._of_lines: dict[tuple[str, tuple[tuple[bytes, bytes], ...], str], Caller] = {}
        self._id_prefix = os.urandom(10).hex()
        self._id_count = int.from_bytes(os.urandom(3), "big")

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self._id_count += 1
        request_id = f"{self._id_prefix}{self._id_count:012x}"
        try:
            if not self.admission.try_enter():
                await self.admission.enter()
            try:
                return await self._answer(request, request_id)
            finally:
                self.admission.leave()
                if self.keys.held:
                    self.keys.let_go(request_id)
        except IbidError as error:
            self._telemetry.refused(error.code)
            return error_response(error, request_id, self._speech_of(request))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("a request failed inside ibid", extra={"request_id": request_id})
            broken = IbidError("Something failed inside ibid.")
            return error_response(broken, request_id, self._speech_of(request))

    def _speech_of(self, request: web.BaseRequest) -> Dialect:
        target = self._targets.get(request.raw_path)
        if target is not None and target.dialect is not None:
            return target.dialect
        return self._routes.of_errors(request.raw_path, request.headers)

    async def _answer(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        started_s = time.perf_counter()
        target = self._targets.get(request.raw_path) or self._read_target(request)
        caller = None if target.is_virtual else self._callers.get(request.raw_headers)
        if caller is None:
            caller = self._read_caller(request, target)
        if target.dialect is None:
            asked = passing(
                request, request_id=request_id, path=target.path, path_qs=target.path_qs, tenant=caller.tenant,
                headers=caller.headers, started_s=started_s, key_id=caller.key_id, team=caller.team,
            )  # fmt: skip
            if (grant := caller.grant) is not None:
                asked = asked._replace(
                    admit=partial(self._admit_passing, request, asked, grant),
                    is_held_to_models=bool(grant.live.key.models),
                )
            if target.place is not None and self.batches is not None:
                if grant is not None:
                    self.keys.check(grant)
                return await self.batches.answer(request, target.place, asked)
            return await self.passing.answer(request, asked)
        if request.method != METH_POST:
            raise BadRequest("Use POST here.", code="method_not_allowed", status=405)
        if not caller.is_json:
            raise BadRequest("Content-Type must be application/json.", code="unsupported_media_type", status=415)
        body = await read_body(request, self._limits)
        query = self._queries.get((target, caller, body))
        if query is None:
            query = self.read_query(target, caller, body)
            if len(body) <= MEMO_BODY_BYTES:
                _remember(self._queries, (target, caller, body), query)
        if caller.is_deferring and self.batches is not None:
            if caller.grant is not None:
                self.keys.check_query(caller.grant, query)
            return await self.batches.defer(query, target.path_qs, caller.headers)
        client = Client(
            request_id, int(self._clock() * 1000), started_s, query.path_qs, caller.headers, caller.is_retry
        )
        reply: Replay | Relay | None
        grant = caller.grant
        if grant is not None and (spent := self.keys.admit(grant, query, request_id, client.ts_ms)) is not None:
            reply = await self._recall_only(query, client, spent)
        elif query.batch is not None:
            reply = await self._embeddings.answer(query, client)
        else:
            reply = self._pipeline.recall(query, client)
        if reply is None and query.controls.deadline_s is not None:
            return await self._answer_patiently(request, query, client)
        if reply is None:
            reply = await self._pipeline.answer(query, client)
        if isinstance(reply, Replay):
            if reply.paced is not None:
                return await self._pace(request, reply, reply.paced)
            return answer_at_once(request, reply)
        return await self._relay(request, reply)

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

    def _admit_passing(
        self, request: web.BaseRequest, asked: Passing, grant: Grant, upstream: str, model: str | None
    ) -> None:
        """As `KeyRing.admit` for what passes through. A key held to some models must name one of them where that may
        cost something. Raises BadRequest."""
        is_socket, costs_nothing = is_websocket(request), is_free(request)
        self.keys.admit_passing(
            grant, upstream, model, asked.request_id, int(self._clock() * 1000),
            is_free=costs_nothing, is_told=costs_nothing or (not is_socket and tells_cost(asked.path)),
        )  # fmt: skip

    # -- reading --------------------------------------------------------------------------------------------------

    def _read_target(self, request: web.BaseRequest) -> Target:
        target = self.target(target_of(request), query_of(request))
        if request.raw_path.startswith("/"):
            _remember(self._targets, request.raw_path, target)
        return target

    def target(self, path: str, query: str = "") -> Target:
        """Where a path leads, and the query behind it, its question mark included."""
        return self._reader.target(path, query)

    def _read_caller(self, request: web.BaseRequest, target: Target) -> Caller:
        headers = request.raw_headers
        known, anonymous = self._callers, self._anonymous
        in_header = any(name.lower() == b"x-goog-api-key" for name, _ in headers)
        if target.key and (target.is_virtual or not in_header):
            headers = (*headers, (b"x-goog-api-key", target.key))
        elif target.is_keyless and self._keyless:
            known, anonymous = self._without_key, True
        if (found := known.get(headers)) is not None:
            return found
        who = identity.credential(headers, anonymous=anonymous)
        grant = self.keys.grant(who)
        caller = Caller(
            identity.tenant_of(self._secret, who) if grant is None else grant.live.tenant,
            headers if grant is None else identity.without_credentials(headers),
            identity.scope_headers(headers, self._extra_headers),
            is_json=request.content_type == "application/json",
            is_retry=request.headers.get("x-stainless-retry-count", "0") not in ("", "0"),
            grant=grant,
            is_deferring="respond-async" in request.headers.get("Prefer", ""),
        )
        _remember(known, headers, caller)
        return caller

    def read_query(self, target: Target, caller: Caller, raw: bytes) -> Query:
        """The question in a body. Raises BadRequest."""
        query = self._reader.read(target, caller, raw)
        if len(raw) <= MEMO_BODY_BYTES:
            _remember(self._queries, (target, caller, raw), query)
        return query

    def read_line(
        self, path_qs: str, tenant: str, headers: tuple[tuple[bytes, bytes], ...], raw: bytes, key_id: str = ""
    ) -> Query:
        """The question in a body that came in a batch, or came earlier, with this virtual key. Raises BadRequest."""
        caller = self._of_lines.get((tenant, headers, key_id))
        if caller is None:
            scope_headers = identity.scope_headers(headers, self._extra_headers)
            grant = self.keys.grant_of(key_id) if key_id else None
            caller = Caller(tenant, headers, scope_headers, is_json=True, is_retry=False, grant=grant)
            _remember(self._of_lines, (tenant, headers, key_id), caller)
        return self.read_query(self.target_of(path_qs), caller, raw)

    def target_of(self, path_qs: str) -> Target:
        """The target of a path that was asked for before."""
        if (target := self._targets.get(path_qs)) is None:
            path, mark, query = path_qs.partition("?")
            target = self.target(path, mark + query)
            _remember(self._targets, path_qs, target)
        return target

    def dialect_of(self, path_qs: str) -> Dialect:
        """Which dialect speaks on a path that has one."""
        dialect = self.target_of(path_qs).dialect
        assert dialect is not None
        return dialect

    # -- a client that can wait -----------------------------------------------------------------------------------

    async def _answer_patiently(self, request: web.BaseRequest, query: Query, client: Client) -> web.StreamResponse:
        """Answer one who named a deadline. When the answer is long in coming, the response is begun without it and
        kept alive by what the dialect allows; its headers then cannot tell what the cache did."""
        asked = asyncio.ensure_future(self._ask(query, client))
        try:
            beat = query.dialect.heartbeat if query.stream else query.dialect.patience
            await asyncio.wait([asked], timeout=HEARTBEAT_S if beat is not None else None)
            if not asked.done() and beat is not None:
                return await self._hold(request, query, client, asked, beat)
            reply = await asked
        except BaseException:
            await _drop(asked)
            raise
        if isinstance(reply, Replay):
            return answer_at_once(request, reply)
        return await self._relay(request, reply)

    async def _ask(self, query: Query, client: Client) -> Replay | Relay:
        """The answer of a provider's batch where client and plan allow that it takes so long, else the usual one."""
        if Lane.DEFER in query.plan.lanes and self.batches is not None and not query.stream:
            try:
                self.keys.let_go(client.request_id)  # the call is let in on its own
                return await self.batches.deferred.wait(query, client)
            except CacheFault as fault:
                self._telemetry.fault(fault.code)
        return await self._pipeline.answer(query, client)

    async def _hold(
        self,
        request: web.BaseRequest,
        query: Query,
        client: Client,
        asked: asyncio.Future[Replay | Relay],
        beat: bytes,
    ) -> web.StreamResponse:
        dialect = query.dialect
        kind = f"{dialect.stream_type}; charset=utf-8" if query.stream else JSON
        headers = [*held_headers(query.plan.text, client.request_id), ("Content-Type", kind), ("Server", SERVER)]
        if dialect.id_header:
            headers.append((dialect.id_header, client.request_id))
        live = LiveStream(web.StreamResponse(status=200, headers=headers), beat)
        response = live.response
        self.streams.add(live)
        try:
            await response.prepare(request)
            await live.write(beat)
            reply = await asked
            if isinstance(reply, Replay):
                await live.write(reply.body)
            else:
                await self._carry_on(request, reply, live)
        except IbidError as error:
            response.force_close()
            if not (said := dialect.stream_error(error, client.request_id) if query.stream else b""):
                _cut(request)  # the head said 200: a cut is the only honest end
                return response
            await live.write(said)
        finally:
            self.streams.discard(live)
        await response.write_eof()
        return response

    async def _carry_on(self, request: web.BaseRequest, relay: Relay, live: LiveStream) -> None:
        outcome = "cancelled"
        try:
            if relay.status >= 400:
                outcome = "error"
                raise UpstreamError("The upstream refused the request.", code="upstream_error", status=relay.status)
            while piece := await relay.next():
                await live.write(piece)
            outcome = "ok"
        except UpstreamError:
            outcome = "error"
            raise
        finally:
            relay.close(outcome)

    # -- writing --------------------------------------------------------------------------------------------------

    async def _relay(self, request: web.BaseRequest, relay: Relay) -> web.StreamResponse:
        outcome = "cancelled"
        try:
            if relay.content_length is not None and relay.content_length <= WHOLE_LIMIT_BYTES and not relay.is_stream:
                body = await relay.whole()
                outcome = "ok" if relay.status < 400 else "error"
                relay.close(outcome)  # settles, and so knows the cost
                return relay_at_once(request, relay.status, relay.headers, body)
            response = web.StreamResponse(status=relay.status, headers=[*relay.headers, ("Server", SERVER)])
            live = LiveStream(response, relay.dialect.heartbeat if relay.is_stream else None)
            self.streams.add(live)
            try:
                outcome = await self._copy(request, relay, live)
            finally:
                self.streams.discard(live)
            return response
        except UpstreamError:
            outcome = "error"
            raise
        finally:
            relay.close(outcome)

    async def _pace(self, request: web.BaseRequest, replay: Replay, paced: Paced) -> web.StreamResponse:
        """Write a replay in whole events, each when it is due."""
        response = web.StreamResponse(headers=headers_of(replay))
        live = LiveStream(response, paced.heartbeat)
        begun_s: float | None = None
        start, outcome = 0, "cancelled"
        self.streams.add(live)
        try:
            await response.prepare(request)
            for end, due_s in paced.schedule:
                if begun_s is None:
                    begun_s = time.perf_counter()
                elif (rest_s := begun_s + due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(rest_s)
                await live.write(replay.body[start:end])
                start = end
            await response.write_eof()
            outcome = "ok"
        finally:
            self.streams.discard(live)
            paced.settle(begun_s, outcome)
        return response

    async def _copy(self, request: web.BaseRequest, relay: Relay, live: LiveStream) -> str:
        """Relay piece by piece. Past the first byte an upstream's fault is said in the stream, or by cutting it."""
        response = live.response
        await response.prepare(request)
        try:
            while piece := await relay.next():
                if relay.first_byte_s is None:
                    relay.first_byte_s = time.perf_counter()
                await live.write(piece)
        except UpstreamError as error:
            if not relay.is_stream:
                response.force_close()
                return _cut(request)
            response.force_close()
            if not (said := relay.last_words(error)):
                return _cut(request)
            await live.write(said)
        await response.write_eof()
        return "error" if relay.broken is not None or relay.status >= 400 else "ok"

    def beat(self, now_s: float) -> None:
        """Called about once a second: keep silent event streams alive. `now_s` is `time.monotonic`."""
        for live in self.streams:
            live.beat(now_s)


class LiveStream:
    """A response being written piece by piece, and when it last said something."""

    __slots__ = ("_heartbeat", "_spoke_s", "_writing", "response")

    def __init__(self, response: web.StreamResponse, heartbeat: bytes | None) -> None:
        self.response = response
        self._heartbeat = heartbeat
        self._spoke_s = time.monotonic()
        self._writing = False

    async def write(self, piece: bytes) -> None:
        self._writing = True
        await self.response.write(piece)
        self._writing = False
        self._spoke_s = time.monotonic()

    def beat(self, now_s: float) -> None:
        """The dialect's heartbeat when nothing was said for HEARTBEAT_S; only ever between two events."""
        if self._heartbeat is not None and not self._writing and now_s - self._spoke_s >= HEARTBEAT_S:
            self._spoke_s = now_s
            asyncio.ensure_future(self.response.write(self._heartbeat)).add_done_callback(_swallow_connection_loss)


async def _drop(asked: asyncio.Future[Replay | Relay]) -> None:
    """Give up an answer nobody waits for any more."""
    asked.cancel()
    await asyncio.wait([asked])
    if not asked.cancelled() and asked.exception() is None and isinstance(reply := asked.result(), Relay):
        reply.close("cancelled")


def _cut(request: web.BaseRequest) -> str:
    """End a response that cannot say that it broke."""
    if request.transport is not None:
        request.transport.abort()
    return "error"


def _swallow_connection_loss(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and (fault := task.exception()) is not None and not isinstance(fault, ConnectionError):
        log.warning("heartbeat failed", exc_info=fault)


K = TypeVar("K")
V = TypeVar("V")


def _remember(memo: dict[K, V], key: K, value: V) -> None:
    """Keep at most MEMO_ENTRIES, oldest out first."""
    memo[key] = value
    if len(memo) > MEMO_ENTRIES:
        del memo[next(iter(memo))]
