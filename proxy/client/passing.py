"""Everything that no dialect claims: bytes untouched in both directions, and what it cost.

A body is never whole in memory. Its first and last bytes are looked at on the way: when they name a model and its
usage, the request has a price. Only where the model decides who may be asked is it looked for first: in the path, in
JSON, which is then read whole, or in a form, which waits on disk.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import IO, Final, NamedTuple
from urllib.parse import parse_qs, unquote

from aiohttp import web
from aiohttp.hdrs import (
    CONTENT_ENCODING,
    CONTENT_TYPE,
    METH_PATCH,
    METH_POST,
    METH_PUT,
)

from proxy.aiohttp_internals import must_be_empty_body
from proxy.client.incoming import body_stream, read_body
from proxy.client.sockets import is_websocket, join, protocols_of
from proxy.client.wire import SERVER
from proxy.core import jsontext
from proxy.core.arrival import Arrival
from proxy.core.dialects import anthropic_record, gemini_answer, ollama_answer, openai_record, responses_record
from proxy.core.dialects.dialect import JSON
from proxy.core.dialects.routes import family_of
from proxy.core.errors import BadRequest, UpstreamError
from proxy.core.model import Bypass, Call, Limits, Outcome, Usage
from proxy.core.multipart import Form, boundary_of
from proxy.money.books import PASSED, Books
from proxy.ports import Upstream
from proxy.request.heads import passed_headers

HEAD_BYTES: Final = 4 * 1024  # looked at for the model
TAIL_BYTES: Final = 64 * 1024  # looked at for the usage
SPOOL_MEMORY_BYTES: Final = 1024 * 1024
SPOOL_LIMIT_BYTES: Final = 64 * 1024 * 1024  # of a form that is read for its model: a recording, some pictures
PIECE_BYTES: Final = 256 * 1024
_MODEL: Final = re.compile(rb'"model(?:Version)?"\s*:\s*"([^"\\]{1,200})"')
_IN_PATH: Final = re.compile(r"/(?:models|deployments)/([^/:]+)[/:]")
_HOLDS_FILES: Final = re.compile(r"/(?:files|uploads)(?:/|$)")
_TOLD: Final = re.compile(
    r"/(?:cancel|count_tokens|detokenize|files|input_tokens|moderations|tokenize)(?:/|$)"
    r"|:(?:countTokens|generateContent|streamGenerateContent)$"
)
_READ: Final = frozenset({"application/json", "text/event-stream", "application/x-ndjson"})
TOO_LARGE: Final = Bypass("body_too_large")  # to be read
ENCODED: Final = Bypass("body_encoding")  # in a coding that is not read here
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
    admit: Callable[[str, str | None], None] | None = None  # told upstream and model; raises unless its key may ask
    is_held_to_models: bool = False  # the model must be known before it is let in
    arrival: Arrival | None = None  # of a body that was not whole when the request was read
    names: Mapping[str, str] | None = None  # headers that decide whose path it is, where not the request's own
    verdict: Bypass = PASSED
    carry: Callable[[Iterable[tuple[str, str]]], list[tuple[str, str]]] = list  # an answer's headers to the client's


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

    def __init__(self, upstream: Upstream, books: Books, limits: Limits, clock: Callable[[], float]) -> None:
        self._upstream = upstream
        self._books = books
        self._limits = limits
        self._clock = clock

    async def answer(self, request: web.BaseRequest, asked: Passing) -> web.StreamResponse:
        """Raises IbidError while nothing has been said to the client."""
        with ExitStack() as spools:
            model = None if is_free(request) else ""
            names = request.headers if asked.names is None else asked.names
            if asked.is_held_to_models or self._upstream.is_divided(asked.path, names):
                model, asked = await self._find_model(request, asked, spools)
            upstream = self._upstream.route(asked.path, names, model)
            if asked.admit is not None:
                asked.admit(upstream, model)
            return await self._send(request, asked, upstream)

    async def _find_model(
        self, request: web.BaseRequest, asked: Passing, spools: ExitStack
    ) -> tuple[str | None, Passing]:
        """The model as `Upstream.route` takes it, and the request with its body as far as that had to be read."""
        if is_free(request):
            return None, asked
        is_socket = is_websocket(request)
        if (named := model_in_path(asked.path, asked.path_qs if is_socket else "")) is not None:
            return named, asked
        if is_socket or _HOLDS_FILES.search(asked.path) is not None:
            return "", asked
        if request.content_type == JSON and "batch" not in asked.path.lower():
            body = asked.body if isinstance(asked.body, bytes) else await self._read(request, asked)
            said = jsontext.parse(body, self._limits.json_depth).get("model")
            return said if isinstance(said, str) else "", asked._replace(body=body)
        if request.content_type == "multipart/form-data" and "boundary=" in request.headers[CONTENT_TYPE].lower():
            is_plain = CONTENT_ENCODING not in request.headers
            form = body_stream(request, self._limits, asked.arrival) if is_plain else await self._read(request, asked)
            spool = spools.enter_context(tempfile.SpooledTemporaryFile(SPOOL_MEMORY_BYTES))
            named = await _model_in_form(form, boundary_of(request.headers[CONTENT_TYPE]), spool)
            return named, asked._replace(body=_again(spool))
        return "", asked

    async def _read(self, request: web.BaseRequest, asked: Passing) -> bytes:
        return await read_body(request, self._limits, asked.arrival)

    async def _send(self, request: web.BaseRequest, asked: Passing, upstream: str) -> web.StreamResponse:
        entry = _Entry(asked, upstream, int(self._clock() * 1000))
        try:
            if is_websocket(request):
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
            self._books.settle(entry.outcome())

    async def _forward(self, request: web.BaseRequest, asked: Passing, entry: _Entry) -> web.StreamResponse:
        body = body_stream(request, self._limits, asked.arrival) if asked.body is None else asked.body
        answer = await self._upstream.open(entry.upstream, request.method, asked.path_qs, asked.headers, body)
        entry.status = answer.status
        entry.first_byte_s = time.perf_counter()
        carried = asked.carry(answer.headers)
        response = web.StreamResponse(status=answer.status, headers=[*carried, *self._verdict(asked, entry)])
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

    async def _connect(self, request: web.BaseRequest, asked: Passing, entry: _Entry) -> web.StreamResponse:
        """The upstream's handshake first, then the client's."""
        far = await self._upstream.connect(entry.upstream, asked.path_qs, asked.headers, protocols_of(request))
        entry.status, entry.word = 101, "ok"  # however it ends: a session has no answer that could be whole
        entry.first_byte_s = time.perf_counter()
        return await join(request, far, self._verdict(asked, entry))

    @staticmethod
    def _verdict(asked: Passing, entry: _Entry) -> list[tuple[str, str]]:
        return [*passed_headers(asked.verdict, asked.request_id, entry.upstream, entry.status), ("Server", SERVER)]


async def _model_in_form(body: bytes | AsyncIterator[bytes] | None, boundary: bytes, spool: IO[bytes]) -> str:
    """The field `model` of a whole form, "" when it has none; what was read is in the spool."""
    form = Form(boundary)
    async for piece in _pieces(body):
        spool.write(piece)
        if spool.tell() > SPOOL_LIMIT_BYTES:
            message = f"A form is read for its model up to {SPOOL_LIMIT_BYTES} bytes: name the model in the path."
            raise BadRequest(message, status=413, code="request_too_large")
        form.feed(piece)
    if "model" in form.repeated:
        raise BadRequest("The form names more than one model.", code="duplicate_key", param="model")
    return form.fields.get("model", b"").decode("utf-8", "replace")


async def _pieces(body: bytes | AsyncIterator[bytes] | None) -> AsyncIterator[bytes]:
    if isinstance(body, bytes | None):
        yield body or b""
        return
    async for piece in body:
        yield piece


async def _again(spool: IO[bytes]) -> AsyncIterator[bytes]:
    spool.seek(0)
    while piece := spool.read(PIECE_BYTES):
        yield piece


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
            outcome=self.word,
            cache_status="BYPASS",
            reason=asked.verdict.reason,
            status=self.status,
            usage=self.usage,
            usage_basis=basis,
            calls=(call,),
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


def is_free(request: web.BaseRequest) -> bool:
    """Whether it asks nothing of a model, and so costs nothing: it reads, or deletes."""
    return request.method not in (METH_POST, METH_PUT, METH_PATCH) and not is_websocket(request)


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
