"""Everything that no dialect claims: bytes untouched in both directions, WebSockets included, and what it cost.

A body is never whole in memory. Its first and last bytes are looked at on the way: when they name a model and its
usage, the request has a price.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, NamedTuple
from urllib.parse import parse_qs, unquote

from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.hdrs import METH_GET, SEC_WEBSOCKET_PROTOCOL, UPGRADE
from aiohttp.helpers import must_be_empty_body

from proxy.core.arrival import Arrival
from proxy.core.dialects import anthropic_record, gemini_answer, ollama_answer, openai_record, responses_record
from proxy.core.dialects.routes import family_of
from proxy.core.directives import verdict_headers
from proxy.core.errors import UpstreamError
from proxy.core.model import Bypass, Call, Limits, Outcome, Usage
from proxy.incoming import body_stream
from proxy.ports import Ledger, Upstream, WebSocket
from proxy.telemetry import Telemetry
from proxy.wire import SERVER

HEAD_BYTES: Final = 4 * 1024  # looked at for the model
TAIL_BYTES: Final = 64 * 1024  # looked at for the usage
MESSAGE_LIMIT_BYTES: Final = 16 * 1024 * 1024
_MODEL: Final = re.compile(rb'"model(?:Version)?"\s*:\s*"([^"\\]{1,200})"')
_IN_PATH: Final = re.compile(r"/(?:models|deployments)/([^/:]+)[/:]")
_TOLD: Final = re.compile(
    r"/(?:cancel|count_tokens|detokenize|files|input_tokens|moderations|tokenize)(?:/|$)"
    r"|:(?:countTokens|generateContent|streamGenerateContent)$"
)
_READ: Final = frozenset({"application/json", "text/event-stream", "application/x-ndjson"})
_PASSED: Final = Bypass("pass_through")
_USAGES: Final[Mapping[str, tuple[Callable[[bytes], Usage | None], ...]]] = {
    "anthropic": (anthropic_record.find_usage,),
    "gemini": (gemini_answer.find_usage,),
    "ollama": (ollama_answer.find_usage,),
    "openai": (openai_record.find_usage, responses_record.find_usage),
}


class Passing(NamedTuple):
    """One request that passes through."""

    request_id: str
    path: str
    path_qs: str
    tenant: str
    headers: tuple[tuple[bytes, bytes], ...]
    family: str
    started_s: float  # time.perf_counter
    key_id: str | None = None
    team: str = ""
    body: bytes | AsyncIterator[bytes] | None = None  # where it was read before it was known to pass through
    admit: Callable[[Passing], Awaitable[Passing]] | None = None  # asked first, where it is not yet known to pass
    arrival: Arrival | None = None  # of a body that was not whole when the request was read


class Glance:
    """The first and last bytes of a body that goes by."""

    __slots__ = ("_head", "_tail")

    def __init__(self) -> None:
        self._head = self._tail = b""

    def see(self, piece: bytes) -> None:
        if len(self._head) < HEAD_BYTES:
            self._head += piece[: HEAD_BYTES - len(self._head)]
        self._tail = (self._tail + piece)[-TAIL_BYTES:]

    def told(self, family: str) -> tuple[str, Usage | None]:
        """The model named, or "", and the usage told by a body of this family of dialects."""
        usage = next(filter(None, (find(self._tail) for find in _USAGES[family])), None)
        named = _MODEL.search(self._head) or _MODEL.search(self._tail)
        return ("" if named is None else named[1].decode("utf-8", "replace")), usage


class PassThrough:
    """Owns nothing it is given."""

    def __init__(
        self, upstream: Upstream, ledger: Ledger, telemetry: Telemetry, limits: Limits, clock: Callable[[], float]
    ) -> None:
        self._upstream = upstream
        self._ledger = ledger
        self._telemetry = telemetry
        self._limits = limits
        self._clock = clock

    async def answer(self, request: web.BaseRequest, asked: Passing) -> web.StreamResponse:
        """Raises UpstreamError while nothing has been said to the client."""
        upstream = self._upstream.route(asked.path, request.headers)
        entry = _Entry(asked, upstream, int(self._clock() * 1000))
        try:
            if request.method == METH_GET and request.headers.get(UPGRADE, "").lower() == "websocket":
                return await self._connect(request, asked, entry)
            return await self._forward(request, asked, entry)
        except UpstreamError as error:
            entry.status, entry.word = error.status, "error"
            raise
        finally:
            self._book(entry)

    def _book(self, entry: _Entry) -> None:
        """Once: before the client has the last byte of an answer, so that nothing answered is unrecorded."""
        if not entry.is_booked:
            entry.is_booked = True
            outcome = entry.outcome()
            self._ledger.record(outcome)
            self._telemetry.lookup(outcome)

    async def _forward(self, request: web.BaseRequest, asked: Passing, entry: _Entry) -> web.StreamResponse:
        body = body_stream(request, self._limits, asked.arrival) if asked.body is None else asked.body
        answer = await self._upstream.open(entry.upstream, request.method, asked.path_qs, asked.headers, body)
        entry.status = answer.status
        entry.first_byte_s = time.perf_counter()
        response = web.StreamResponse(status=answer.status, headers=[*answer.headers, *self._verdict(asked, entry)])
        glance = Glance() if answer.status == 200 and answer.content_type in _READ else None
        left_bytes = answer.content_length
        last = b""
        try:
            if left_bytes is not None:
                response.content_length = left_bytes
            if left_bytes != 0 and not must_be_empty_body(request.method, answer.status):  # else the head is all of it
                await response.prepare(request)
            while piece := await answer.read_some():
                if glance is not None:
                    glance.see(piece)
                if left_bytes is not None:
                    left_bytes -= len(piece)
                if left_bytes == 0:  # the client waits for nothing after these
                    last = piece
                else:
                    await response.write(piece)
            entry.ended(answer.status, glance, asked.family)
            self._book(entry)
            await response.prepare(request)
            await response.write_eof(last)
        except BaseException as cause:
            answer.abort()
            if isinstance(cause, UpstreamError):  # the head is out: a cut is the only honest end
                entry.word = "error"
                response.force_close()
                if request.transport is not None:
                    request.transport.abort()
                return response
            raise
        answer.release()
        return response

    @staticmethod
    def _verdict(asked: Passing, entry: _Entry) -> list[tuple[str, str]]:
        told = verdict_headers(_PASSED, request_id=asked.request_id, upstream=entry.upstream, fwd_status=entry.status)
        return [*told, ("Server", SERVER)]

    # -- WebSockets -----------------------------------------------------------------------------------------------

    async def _connect(self, request: web.BaseRequest, asked: Passing, entry: _Entry) -> web.StreamResponse:
        """Both handshakes, the upstream's first, then messages either way until one side closes; so does the other,
        with the same code."""
        wanted = [p.strip() for p in request.headers.get(SEC_WEBSOCKET_PROTOCOL, "").split(",") if p.strip()]
        wanted = [protocol for protocol in wanted if "ibid-" not in protocol]  # browsers hide a key there
        far = await self._upstream.connect(entry.upstream, asked.path_qs, asked.headers, wanted)
        entry.status, entry.word = 101, "ok"  # however it ends: a session has no answer that could be whole
        entry.first_byte_s = time.perf_counter()
        chosen = (far.protocol,) if far.protocol else ()
        near = web.WebSocketResponse(
            protocols=chosen, autoping=False, autoclose=False, max_msg_size=MESSAGE_LIMIT_BYTES
        )
        near.headers.extend(self._verdict(asked, entry))
        ways: list[asyncio.Future[None]] = []
        try:
            await near.prepare(request)
            ways += [asyncio.ensure_future(_carry(near, far)), asyncio.ensure_future(_carry(far, near))]
            await asyncio.wait(ways)  # either way ends by closing what it writes to, and so ends the other
        finally:  # a client that is gone cancels this task
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            await far.close(code=WSCloseCode.GOING_AWAY)
        await near.close()
        return near


async def _carry(source: WebSocket, target: WebSocket) -> None:
    """Every message of one side to the other, then its close."""
    while True:
        message = await source.receive()
        match message.type:
            case WSMsgType.TEXT:
                await target.send_str(message.data)
            case WSMsgType.BINARY:
                await target.send_bytes(message.data)
            case WSMsgType.PING:
                await target.ping(message.data)
            case WSMsgType.PONG:
                await target.pong(message.data)
            case WSMsgType.CLOSE:
                code, reason = message.data or WSCloseCode.OK, (message.extra or "").encode()
                await target.close(code=code, message=reason)
                await source.close(code=code, message=reason)  # only now: who closed may go at once
                return
            case _:  # it broke, or was closed by us
                await target.close(code=WSCloseCode.GOING_AWAY)
                return


class _Entry:
    """What the ledger will say."""

    __slots__ = ("_asked", "_ts_ms", "first_byte_s", "is_booked", "model", "status", "upstream", "usage", "word")

    def __init__(self, asked: Passing, upstream: str, ts_ms: int) -> None:
        self._asked = asked
        self._ts_ms = ts_ms
        self.upstream = upstream
        self.first_byte_s: float | None = None
        self.model = ""
        self.usage: Usage | None = None
        self.status = 0
        self.word = "cancelled"
        self.is_booked = False

    def ended(self, status: int, glance: Glance | None, family: str) -> None:
        """The upstream has said all of its answer."""
        self.word = "ok" if status < 400 else "error"
        if glance is not None:
            self.model, self.usage = glance.told(family)

    def outcome(self) -> Outcome:
        asked, basis = self._asked, "none" if self.usage is None else "measured"
        total_ms = (time.perf_counter() - asked.started_s) * 1e3
        ttft_ms = None if self.first_byte_s is None else (self.first_byte_s - asked.started_s) * 1e3
        call = Call(
            id=f"{asked.request_id}-p",
            ts_ms=self._ts_ms,
            upstream=self.upstream,
            model=self.model,
            purpose="pass",
            tier="default",
            won=self.word == "ok",
            usage=self.usage,
            usage_basis=basis,
            status=self.status,
            ttft_ms=ttft_ms,
            total_ms=total_ms,
        )
        return Outcome(
            request_id=asked.request_id,
            ts_ms=self._ts_ms,
            tenant=asked.tenant,
            namespace="",
            tag="",
            dialect="",
            endpoint=asked.path[:200],
            stream=False,
            model_requested=self.model,
            model_served=self.model,
            upstream=self.upstream,
            mechanism=None,
            outcome=self.word,
            cache_status="BYPASS",
            reason=_PASSED.reason,
            status=self.status,
            similarity=None,
            entry_id=None,
            retry_of=None,
            usage=self.usage,
            usage_basis=basis,
            calls=(call,),
            baseline_ms=None,
            tier="default",
            ttft_ms=ttft_ms,
            total_ms=total_ms,
            key_id=asked.key_id,
            team=asked.team,
        )


def passing(
    request: web.BaseRequest,
    *,
    request_id: str,
    path: str,
    path_qs: str,
    tenant: str,
    headers: tuple[tuple[bytes, bytes], ...],
    started_s: float,
    key_id: str | None = None,
    team: str = "",
) -> Passing:
    """A request on its way past the cache."""
    family = family_of(path, request.headers)
    return Passing(request_id, path, path_qs, tenant, headers, family, started_s, key_id, team)


def tells_cost(path: str) -> bool:
    """Whether a request to this path costs nothing, or its answer tells its usage. Batches, pictures, speech, training
    and sockets do not."""
    return _TOLD.search(path) is not None


def model_in_path(path: str, query: str = "") -> str | None:
    """The model that a path or its query names, as Gemini, Azure and OpenAI's WebSockets do."""
    if (found := _IN_PATH.search(path)) is not None:
        return unquote(found[1])
    named = parse_qs(query.partition("?")[2]).get("model", [])
    return named[0] if len(named) == 1 else None
