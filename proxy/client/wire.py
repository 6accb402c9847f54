"""A complete reply as one write.

aiohttp's Response serialises its headers anew each time, a third of what an exact hit costs. The replays of one entry
differ only in the request id and the body, so the rest is spelled once a second and written with them in one piece.
Anything unusual (HTTP/1.0, a connection about to close, a body too large to hand over at once) takes aiohttp's way.
"""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus
from typing import cast

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from proxy.aiohttp_internals import rfc822_formatted_time
from proxy.relay import Replay

AT_ONCE_LIMIT_BYTES = 256 * 1024
SERVER = "ibid"
_BODILESS = frozenset({100, 101, 102, 103, 204, 205, 304})


class WireResponse:
    """What aiohttp's connection needs of a response: `prepare`, `write_eof`, `keep_alive`, and names for its log."""

    __slots__ = ("_bytes", "body_length", "status")

    keep_alive = True
    reason = ""

    def __init__(self, whole: bytes, body_length: int, status: int = 200) -> None:
        self._bytes = whole
        self.body_length = body_length
        self.status = status

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        transport.write(self._bytes)
        if request.protocol.writing_paused:
            await request.writer.drain()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


@lru_cache(maxsize=64)
def _status_line(status: int) -> str:
    try:
        return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    except ValueError:
        return f"HTTP/1.1 {status} \r\n"


def relay_at_once(
    request: web.BaseRequest, status: int, headers: list[tuple[str, str]], body: bytes
) -> web.StreamResponse:
    """The response of a forward whose body is whole. Header values were parsed, so no line ends in one."""
    if (
        request.version != HttpVersion11
        or not request.keep_alive
        or len(body) > AT_ONCE_LIMIT_BYTES
        or status in _BODILESS
        or request.method == "HEAD"
    ):
        return web.Response(status=status, headers=[*headers, ("Server", SERVER)], body=body)
    names = "".join([f"{name}: {value}\r\n" for name, value in headers])
    head = f"{_status_line(status)}{names}Date: {rfc822_formatted_time()}\r\nServer: {SERVER}\r\n"
    whole = b"%bContent-Length: %d\r\n\r\n%b" % (head.encode("utf-8", "surrogateescape"), len(body), body)
    return cast(web.StreamResponse, WireResponse(whole, len(body), status))


def answer_at_once(request: web.BaseRequest, replay: Replay) -> web.StreamResponse:
    """The response of a replay."""
    head, request_id, body, _ = replay
    if request.version != HttpVersion11 or not request.keep_alive or len(body) > AT_ONCE_LIMIT_BYTES:
        return web.Response(headers=headers_of(replay), body=body)
    wire = head.wire
    if wire is None:
        lines = [f"{name}: {value}\r\n" for name, value in head.pairs]
        wire = head.wire = (
            f"HTTP/1.1 200 OK\r\n{''.join(lines)}Date: {rfc822_formatted_time()}\r\nServer: {SERVER}\r\n"
        ).encode()
    named = request_id.encode()
    if head.id_header:
        named = b"%b\r\n%b: %b" % (named, head.id_header.encode(), named)
    whole = b"%bx-request-id: %b\r\nContent-Length: %d\r\n\r\n%b" % (wire, named, len(body), body)
    return cast(web.StreamResponse, WireResponse(whole, len(body)))


def headers_of(replay: Replay) -> list[tuple[str, str]]:
    """All headers of a replay that goes aiohttp's way."""
    head = replay.head
    named = [("x-request-id", replay.request_id), ("Server", SERVER)]
    if head.id_header:
        named.append((head.id_header, replay.request_id))
    return [*head.pairs, *named]
