"""A complete reply as one write.

aiohttp's Response serialises its headers anew each time, a third of what an exact hit costs. The replays of one entry
differ only in the request id and the body, so the rest is spelled once a second and written with them in one piece.
Anything unusual (HTTP/1.0, a connection about to close, a body too large to hand over at once) takes aiohttp's way.
"""

from __future__ import annotations

from typing import cast

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time

from proxy.relay import Replay

AT_ONCE_LIMIT_BYTES = 256 * 1024
SERVER = "ibid"


class WireResponse:
    """What aiohttp's connection needs of a response: `prepare`, `write_eof`, `keep_alive`, and names for its log."""

    __slots__ = ("_bytes", "body_length")

    keep_alive = True
    status = 200
    reason = "OK"

    def __init__(self, whole: bytes, body_length: int) -> None:
        self._bytes = whole
        self.body_length = body_length

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


def answer_at_once(request: web.BaseRequest, replay: Replay) -> web.StreamResponse:
    """The response of a replay."""
    head, request_id, body = replay
    if request.version != HttpVersion11 or not request.keep_alive or len(body) > AT_ONCE_LIMIT_BYTES:
        headers = [*head.pairs, ("x-request-id", request_id), ("Server", SERVER)]
        return web.Response(headers=headers, body=body)
    wire = head.wire
    if wire is None:
        lines = [f"{name}: {value}\r\n" for name, value in head.pairs]
        wire = head.wire = (
            f"HTTP/1.1 200 OK\r\n{''.join(lines)}Date: {rfc822_formatted_time()}\r\nServer: {SERVER}\r\n"
        ).encode()
    whole = b"%bx-request-id: %b\r\nContent-Length: %d\r\n\r\n%b" % (wire, request_id.encode(), len(body), body)
    return cast(web.StreamResponse, WireResponse(whole, len(body)))
