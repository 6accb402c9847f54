"""Reply → web.Response, where it cannot be written at once: piece by piece as it comes, in whole events when they are
due, or after a wait in which the client is kept from giving up.
"""

from __future__ import annotations

import asyncio
import logging
import time

from aiohttp import web

from proxy.client.wire import SERVER, answer_at_once, headers_of, relay_at_once
from proxy.core.dialects.dialect import JSON
from proxy.core.directives import held_headers
from proxy.core.errors import IbidError, UpstreamError
from proxy.core.query import Query
from proxy.relay import Paced, Relay, Replay

log = logging.getLogger(__name__)

WHOLE_LIMIT_BYTES = 1024 * 1024
HEARTBEAT_S = 15.0


class Delivery:
    """Writes replies, and knows which are being written."""

    def __init__(self) -> None:
        self.streams: set[LiveStream] = set()

    async def relay(self, request: web.BaseRequest, relay: Relay) -> web.StreamResponse:
        """What follows a forward. Closes it."""
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

    async def pace(self, request: web.BaseRequest, replay: Replay, paced: Paced) -> web.StreamResponse:
        """Write a replay in whole events, each when it is due."""
        response = web.StreamResponse(headers=headers_of(replay))
        live = LiveStream(response, paced.heartbeat)
        begun_s: float | None = None
        start, is_settled = 0, False
        self.streams.add(live)
        try:
            await response.prepare(request)
            for end, due_s in paced.schedule:
                if begun_s is None:
                    begun_s = time.perf_counter()
                elif (rest_s := begun_s + due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(rest_s)
                if end == len(replay.body):
                    is_settled = True
                    paced.settle(begun_s, "ok")
                await live.write(replay.body[start:end])
                start = end
            await response.write_eof()
        finally:
            self.streams.discard(live)
            if not is_settled:
                paced.settle(begun_s, "cancelled")
        return response

    async def _copy(self, request: web.BaseRequest, relay: Relay, live: LiveStream) -> str:
        """Relay piece by piece. Past the first byte an upstream's fault is said in the stream, or by cutting it."""
        response = live.response
        await response.prepare(request)
        try:
            while piece := await relay.next():
                await live.write(piece, is_within=relay.is_within)
        except UpstreamError as error:
            relay.close("error")
            if not relay.is_stream:
                response.force_close()
                return _cut(request)
            response.force_close()
            if not (said := relay.last_words(error)):
                return _cut(request)
            await live.write(said)
        await response.write_eof()
        return "error" if relay.broken is not None or relay.status >= 400 else "ok"

    async def patiently(
        self, request: web.BaseRequest, query: Query, request_id: str, asked: asyncio.Future[Replay | Relay]
    ) -> web.StreamResponse:
        """To one who named a deadline. When the answer is long in coming, the response is begun without it and kept
        alive by what the dialect allows; its headers then cannot tell what the cache did. Ends `asked`."""
        try:
            beat = query.dialect.heartbeat if query.stream else query.dialect.patience
            await asyncio.wait([asked], timeout=HEARTBEAT_S if beat is not None else None)
            if not asked.done() and beat is not None:
                return await self._hold(request, query, request_id, asked, beat)
            reply = await asked
        except BaseException:
            await _drop(asked)
            raise
        if isinstance(reply, Replay):
            return answer_at_once(request, reply.at_once())
        return await self.relay(request, reply)

    async def _hold(
        self,
        request: web.BaseRequest,
        query: Query,
        request_id: str,
        asked: asyncio.Future[Replay | Relay],
        beat: bytes,
    ) -> web.StreamResponse:
        dialect = query.dialect
        kind = f"{dialect.stream_type}; charset=utf-8" if query.stream else JSON
        headers = [*held_headers(query.plan.text, request_id), ("Content-Type", kind), ("Server", SERVER)]
        if dialect.id_header:
            headers.append((dialect.id_header, request_id))
        live = LiveStream(web.StreamResponse(status=200, headers=headers), beat)
        response = live.response
        self.streams.add(live)
        try:
            await response.prepare(request)
            await live.write(beat)
            reply = await asked
            if isinstance(reply, Replay):
                await live.write(reply.at_once().body)
            else:
                await self._carry_on(request, reply, live)
        except IbidError as error:
            response.force_close()
            if not (said := dialect.stream_error(error, request_id) if query.stream else b""):
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
                await live.write(piece, is_within=relay.is_within)
            outcome = "ok"
        except UpstreamError:
            outcome = "error"
            raise
        finally:
            relay.close(outcome)

    def beat(self, now_s: float) -> None:
        """Called about once a second: keep silent event streams alive. `now_s` is `time.monotonic`."""
        for live in self.streams:
            live.beat(now_s)


class LiveStream:
    """A response being written piece by piece, and when it last said something."""

    __slots__ = ("_heartbeat", "_is_within", "_spoke_s", "_writing", "response")

    def __init__(self, response: web.StreamResponse, heartbeat: bytes | None) -> None:
        self.response = response
        self._heartbeat = heartbeat
        self._spoke_s = time.monotonic()
        self._writing = False
        self._is_within = False

    async def write(self, piece: bytes, *, is_within: bool = False) -> None:
        """`is_within`: the piece ends inside an event."""
        self._writing = True
        await self.response.write(piece)
        self._writing = False
        self._is_within = is_within
        self._spoke_s = time.monotonic()

    def beat(self, now_s: float) -> None:
        """The dialect's heartbeat when nothing was said for HEARTBEAT_S; only ever between two events."""
        if self._heartbeat is None or self._writing or self._is_within:
            return
        if now_s - self._spoke_s >= HEARTBEAT_S:
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
