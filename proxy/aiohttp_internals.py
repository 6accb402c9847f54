"""Every name of aiohttp that its documentation does not promise, said in our words: nobody else spells one.

What is promised is imported where it is used (`aiohttp`, `aiohttp.web`, `.hdrs`, `.abc`). The rest may move with any
release: `tests/contracts/test_aiohttp_internals.py` looks at all of it on real objects and says what did. Where a
request passes, the private names are read by methods of a subclass, not through a layer of calls.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import HttpVersion11, StreamReader, web
from aiohttp.client import IDEMPOTENT_METHODS
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.helpers import must_be_empty_body, rfc822_formatted_time
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError, LineTooLong
from aiohttp.http_parser import RawResponseMessage
from aiohttp.http_writer import StreamWriter
from aiohttp.http_writer import _serialize_headers as serialize_headers
from aiohttp.web_protocol import _ErrInfo

__all__ = [
    "CLOSING",
    "IDEMPOTENT_METHODS",
    "TOO_MANY_HEADERS",
    "BadHttpMessage",
    "Connection",
    "HttpProcessingError",
    "LineTooLong",
    "RawResponseMessage",
    "ResponseHandler",
    "ServerConnection",
    "answer_as_http11",
    "can_take_a_chunk",
    "close_undrained",
    "left_behind",
    "limit_of",
    "must_be_empty_body",
    "read_all_there_is",
    "rfc822_formatted_time",
    "serialize_headers",
    "take_small",
]

CLOSING: Final = "Cannot write to closing transport"  # of a reset before the first byte was written
TOO_MANY_HEADERS: Final = "Too many headers received"  # of a BadHttpMessage


class ServerConnection(web.RequestHandler):
    """aiohttp's end of a client's connection, which knows how much of a request has arrived and what is answered."""

    __slots__ = ("_open_body", "head_since")

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, **settings: Any) -> None:
        super().__init__(server, loop=loop, **settings)
        self.head_since = 0.0  # loop time of the first byte of a head that is not whole yet
        self._open_body: StreamReader | None = None  # body still arriving

    def head_grew(self, size_bytes: int) -> None:
        """Called when bytes of a head have arrived and the last have not."""

    def head_ended(self) -> None:
        """Called when the head that grew is whole, or refused."""

    def data_received(self, data: bytes) -> None:
        if self._upgraded:  # a WebSocket's frames are no requests
            web.RequestHandler.data_received(self, data)
            return
        before = self._request_count
        web.RequestHandler.data_received(self, data)
        if self._request_count != before and self._open_body is None:
            messages = self._messages
            if not messages or messages[-1][1].is_eof():  # whole requests: nearly always
                if self.head_since:
                    self._end_head()
                return
        self._note_partial(self._request_count != before, data)

    def _note_partial(self, has_message: bool, data: bytes) -> None:
        body = self._open_body
        if has_message:
            if self.head_since:
                self._end_head()
            message, payload = self._messages[-1]
            if isinstance(message, _ErrInfo):
                if body is not None and not body.is_eof():
                    # The parser drops a body it cannot follow without telling its reader.
                    body.set_exception(web.RequestPayloadError("Body framing"))
                    body.feed_eof()
                self._open_body = None
            else:
                self._open_body = None if payload.is_eof() else payload
        elif body is not None:
            if body.is_eof():
                self._open_body = None
        elif data and not (self._close or self._force_close):
            self.head_since = self.head_since or self.now()
            self.head_grew(len(data))

    def _end_head(self) -> None:
        self.head_since = 0.0
        self.head_ended()

    def now(self) -> float:
        return self._loop.time()

    def is_idle(self) -> bool:
        """Is nothing being answered, and nothing waiting to be?"""
        waiter = self._waiter
        return waiter is not None and not waiter.done() and not self._messages

    def is_answering(self) -> bool:
        """Is a request being answered that has arrived whole?"""
        is_whole = self._open_body is None or self._open_body.is_eof()
        return is_whole and not self._upgraded and not self.is_idle()

    @property
    def request(self) -> web.BaseRequest | None:
        """What is being answered."""
        return self._current_request

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What answers, one request after the other, as long as the connection lives."""
        return self._task_handler


# --- a request of the client's ----------------------------------------------------------------------------------------


def answer_as_http11(request: web.BaseRequest) -> None:
    """Answer in HTTP/1.1 whatever version the request names: aiohttp's stand-in for an unparsed one says 1.0."""
    request._version = HttpVersion11
    request._cache.pop("version", None)  # the property remembers what it was asked before


def close_undrained(request: web.BaseRequest) -> None:
    """Once it is answered, close without reading the rest of its body."""
    request.protocol._lingering_time = 0.0


def can_take_a_chunk(request: web.BaseRequest) -> bool:
    """Has the answer begun in chunks, and not said the last one?"""
    writer = request.writer
    assert isinstance(writer, StreamWriter)
    return writer.output_size > 0 and writer.chunked and not writer._eof


def limit_of(fault: LineTooLong) -> int:
    """Which bound was exceeded, bytes: the parser tells the request line from a header by nothing else."""
    limit: int = fault.args[1]
    return limit


# --- a body -----------------------------------------------------------------------------------------------------------


def take_small(content: StreamReader) -> bytes:
    """A whole body below the low-water mark, under which nothing waits to be resumed."""
    pieces = content._buffer
    return pieces.popleft() if len(pieces) == 1 else content.read_nowait()


def left_behind(content: StreamReader) -> bytes:
    """What came before a break, and would be dropped with it."""
    return content._read_nowait(-1)


async def read_all_there_is(content: StreamReader) -> bytes:
    """`content.readany()`, with the pieces taken at once: taking them one by one, aiohttp looks after each, however
    many HTTP chunks arrived together, whether parser and transport have to be resumed."""
    if (error := content.exception()) is not None:
        raise error
    if content.at_eof():
        return b""
    while not content._buffer and not content._eof:
        await content._wait("readany")
    pieces = content._buffer
    if not pieces or content._buffer_offset or content._protocol._reading_paused:
        return content._read_nowait(-1)
    whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    pieces.clear()
    content._size = 0
    content._cursor += len(whole)
    if content._http_chunk_splits:
        content._http_chunk_splits.clear()
    return whole
