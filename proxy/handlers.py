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
from typing import NamedTuple, TypeVar

from aiohttp import web
from aiohttp.hdrs import METH_POST

from proxy.books import Client
from proxy.core import fingerprint, identity, jsontext, policy
from proxy.core.dialects.dialect import Dialect
from proxy.core.dialects.fields import CACHE_TWIN
from proxy.core.dialects.routes import Routes, family_of, key_in
from proxy.core.directives import controls_of
from proxy.core.errors import BadRequest, IbidError, UpstreamError
from proxy.core.model import Batch, Controls, Level, Limits, Query, Rules
from proxy.embeddings import Embeddings
from proxy.incoming import error_response, query_of, read_body, target_of
from proxy.listener import Admission
from proxy.passing import PassThrough, passing
from proxy.pipeline import Pipeline
from proxy.ports import Ledger, Upstream
from proxy.relay import Relay, Replay
from proxy.telemetry import Telemetry
from proxy.wire import SERVER, answer_at_once, relay_at_once

log = logging.getLogger(__name__)

WHOLE_LIMIT_BYTES = 1024 * 1024
MEMO_BODY_BYTES = 16 * 1024
MEMO_ENTRIES = 2048
HEARTBEAT_S = 15.0


class Target(NamedTuple):
    """Where a raw request target leads."""

    path: str
    path_qs: str  # as it goes upstream
    query: str  # what of it may change the answer
    dialect: Dialect | None = None  # without one the request passes through
    model: str = ""  # where the path says it
    stream: bool = False  # likewise
    key: bytes = b""  # a credential in the query, as Gemini allows
    is_keyless: bool = False  # of a dialect whose own server asks for no credential


class Caller:
    """What a header block says. Compared by identity: one object per distinct block."""

    __slots__ = ("controls", "headers", "is_json", "is_retry", "scope_headers", "tenant")

    def __init__(
        self,
        tenant: str,
        headers: tuple[tuple[bytes, bytes], ...],
        scope_headers: tuple[tuple[str, str], ...],
        *,
        is_json: bool,
        is_retry: bool,
    ) -> None:
        self.controls: Controls | None = None  # read with the first body that leaves them to the headers
        self.tenant = tenant
        self.headers = headers
        self.scope_headers = scope_headers
        self.is_json = is_json
        self.is_retry = is_retry


class ClientHandler:
    """Answers every request of the client listener. Owns its memos; everything else is lent to it."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        embeddings: Embeddings,
        upstream: Upstream,
        routes: Routes,
        ledger: Ledger,
        telemetry: Telemetry,
        rules: Rules,
        limits: Limits,
        secret: bytes,
        extra_headers: frozenset[str] = frozenset(),
        anonymous: bool = False,
        keyless: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.admission = Admission(limits.in_flight, limits.queued, limits.queue_timeout_s)
        self.streams: set[LiveStream] = set()
        self._pipeline = pipeline
        self._embeddings = embeddings
        self._upstream = upstream
        self._routes = routes
        self._passing = PassThrough(upstream, ledger, telemetry, limits, clock)
        self._telemetry = telemetry
        self._rules = rules
        self._limits = limits
        self._secret = secret
        self._extra_headers = extra_headers
        self._anonymous = anonymous
        self._keyless = keyless
        self._clock = clock
        self._targets: dict[str, Target] = {}
        self._callers: dict[tuple[tuple[bytes, bytes], ...], Caller] = {}
        self._without_key: dict[tuple[tuple[bytes, bytes], ...], Caller] = {}
        self._queries: dict[tuple[Target, Caller, bytes], Query] = {}
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
        caller = self._callers.get(request.raw_headers) or self._read_caller(request, target)
        if target.dialect is None:
            asked = passing(
                request, request_id=request_id, path=target.path, path_qs=target.path_qs, tenant=caller.tenant,
                headers=caller.headers, started_s=started_s,
            )  # fmt: skip
            return await self._passing.answer(request, asked)
        if request.method != METH_POST:
            raise BadRequest("Use POST here.", code="method_not_allowed", status=405)
        if not caller.is_json:
            raise BadRequest("Content-Type must be application/json.", code="unsupported_media_type", status=415)
        body = await read_body(request, self._limits)
        query = self._queries.get((target, caller, body)) or self.read_query(target, caller, body)
        client = Client(
            request_id, int(self._clock() * 1000), started_s, target.path_qs, caller.headers, caller.is_retry
        )
        if query.batch is not None:
            reply = await self._embeddings.answer(query, client)
        else:
            reply = self._pipeline.recall(query, client) or await self._pipeline.answer(query, client)
        if isinstance(reply, Replay):
            return answer_at_once(request, reply)
        return await self._relay(request, reply)

    # -- reading --------------------------------------------------------------------------------------------------

    def _read_target(self, request: web.BaseRequest) -> Target:
        target = self.target(target_of(request), query_of(request))
        if request.raw_path.startswith("/"):
            _remember(self._targets, request.raw_path, target)
        return target

    def target(self, path: str, query: str = "") -> Target:
        """Where a path leads, and the query behind it, its question mark included."""
        route = self._routes.find(path, query)
        return Target(
            path,
            route.path + query,
            route.scope_query,
            route.dialect,
            route.model,
            route.stream,
            key_in(query),
            is_keyless=family_of(path, {}) == "ollama",
        )

    def _read_caller(self, request: web.BaseRequest, target: Target) -> Caller:
        headers = request.raw_headers
        known, anonymous = self._callers, self._anonymous
        if target.key and not any(name.lower() == b"x-goog-api-key" for name, _ in headers):
            headers = (*headers, (b"x-goog-api-key", target.key))
        elif target.is_keyless and self._keyless:
            known, anonymous = self._without_key, True
        if (found := known.get(headers)) is not None:
            return found
        tenant = identity.tenant_of(self._secret, identity.credential(headers, anonymous=anonymous))
        caller = Caller(
            tenant,
            headers,
            identity.scope_headers(headers, self._extra_headers),
            is_json=request.content_type == "application/json",
            is_retry=request.headers.get("x-stainless-retry-count", "0") not in ("", "0"),
        )
        _remember(known, headers, caller)
        return caller

    def read_query(self, target: Target, caller: Caller, raw: bytes) -> Query:
        """The question in a body. Raises BadRequest."""
        dialect = target.dialect
        assert dialect is not None
        body = jsontext.parse(raw, self._limits.json_depth)
        facts = dialect.read(body, model=target.model, stream=target.stream)
        twin = body.get(CACHE_TWIN)
        controls = caller.controls if twin is None else None
        if controls is None:
            controls = controls_of(caller.headers, twin)
            if twin is None:
                caller.controls = controls
        upstream = self._upstream.route(target.path, {}, facts.model)
        eligibility = policy.classify(facts, controls, self._rules)
        scope = digest = b""
        if eligibility.level is not Level.NONE:
            scope = fingerprint.scope_of(
                facts,
                tenant=caller.tenant,
                upstream=self._upstream.place(upstream),
                operation=dialect.operation,
                controls=controls,
                headers=caller.scope_headers,
                query=target.query,
            )
            digest = b"" if facts.inputs else fingerprint.fingerprint_of(scope, facts.prompt)
        batch = None
        if facts.encoding_format:
            prints = tuple([fingerprint.fingerprint_of(scope, asked) for asked in facts.inputs]) if scope else ()
            batch = Batch(facts.inputs, prints, facts.encoding_format, is_open=not facts.unknown)
        query = Query(
            dialect=dialect,
            endpoint=target.path_qs.partition("?")[0],
            upstream=upstream,
            tenant=caller.tenant,
            model=facts.model,
            stream=facts.stream,
            wants_usage=facts.wants_usage,
            prompt=facts.prompt or "",
            scope=scope,
            fingerprint=digest,
            eligibility=eligibility,
            controls=controls,
            body=raw,
            forward_body=dialect.forward_body(raw, body),
            n=facts.n,
            wants_json=facts.response_format in ("json_object", "json_schema"),
            output_limit=facts.output_limit,
            has_stops=facts.has_stops,
            batch=batch,
            keeps_id=facts.keeps_id,
        )
        if len(raw) <= MEMO_BODY_BYTES:
            _remember(self._queries, (target, caller, raw), query)
        return query

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
