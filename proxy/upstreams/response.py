"""A response whose head has arrived: its end-to-end headers, its body piece by piece, and the ways it may end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

import aiohttp
from aiohttp import StreamReader, hdrs

from proxy.aiohttp_internals import (
    Connection,
    HttpProcessingError,
    RawResponseMessage,
    ResponseHandler,
    left_behind,
    read_all_there_is,
)
from proxy.core.errors import UpstreamError

NAMES_KEPT = 1024
_DROPPED = frozenset(
    # hop-by-hop (RFC 9110 §7.6.1), then what describes this connection, the other origin, or another client's session
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    "upgrade content-length date server set-cookie set-cookie2 alt-svc strict-transport-security".split()
)
_RENAMED = {"x-request-id": "x-upstream-request-id"}


class Owner(Protocol):
    """Who looks after responses that are being read."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    def forget(self, response: OpenResponse) -> None: ...


class OpenResponse:
    """A response whose head has arrived. Ended by `release` or `abort`; reading may be cancelled and taken up again."""

    __slots__ = (
        "_connection",
        "_content",
        "_is_cut_by_close",
        "_owner",
        "_protocol",
        "_received",
        "_response",
        "content_length",
        "content_type",
        "headers",
        "status",
        "waiting_since",
    )

    def __init__(
        self,
        owner: Owner,
        status: int,
        head: RawResponseMessage | aiohttp.ClientResponse,
        content: StreamReader,
        connection: Connection | None,  # None: the body is here already
        response: aiohttp.ClientResponse | Connection,  # what ends it
    ) -> None:
        self._owner = owner
        self._received = received = head.headers
        self._content = content
        self._connection = connection
        self._protocol: ResponseHandler | None = connection.protocol if connection is not None else None
        self._response = response
        length = received.get(hdrs.CONTENT_LENGTH)
        self.status = status
        self.content_type: str = received.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
        self.content_length: int | None = int(length) if length is not None and length.isdigit() else None
        self.headers: Sequence[tuple[str, str]] = _end_to_end(received)
        self.waiting_since = 0.0
        self._is_cut_by_close = length is None and hdrs.TRANSFER_ENCODING not in received

    def header(self, name: str) -> str | None:
        """One header of the response, the lines of a repeated one joined (RFC 9110 §5.3); None when absent."""
        return ", ".join(lines) if (lines := self._received.getall(name, None)) else None

    async def read_some(self) -> bytes:
        """Next bytes; b"" at a clean end. Raises UpstreamError: upstream_incomplete, upstream_reset (502),
        upstream_idle_timeout (504)."""
        self.waiting_since = self._owner.loop.time()
        try:
            piece = await read_all_there_is(self._content)
        except aiohttp.SocketTimeoutError as error:
            self.abort()
            message = "The upstream stopped in the middle of its answer."
            raise UpstreamError(message, code="upstream_idle_timeout", status=504) from error
        except (aiohttp.ClientError, OSError) as error:
            if held := left_behind(self._content):  # came before the break, and aiohttp would drop it
                return held
            was_reset = self._was_reset() or isinstance(error, OSError)
            self.abort()
            raise broken(was_reset) from error
        finally:
            self.waiting_since = 0.0
        if not piece and self._is_cut_by_close and self._was_reset():  # aiohttp ends such a body cleanly
            self.abort()
            raise broken(True)
        return piece

    def _was_reset(self) -> bool:
        return self._protocol is not None and isinstance(self._protocol.exception(), OSError)

    def inspect(self, now: float, idle_s: float) -> None:
        """Wake a reader whose next bytes are late, or will not come: aiohttp drops a body whose framing breaks
        without telling its reader."""
        if not self.waiting_since:
            return
        if now - self.waiting_since >= idle_s:
            self._content.set_exception(aiohttp.SocketTimeoutError("idle"))
        elif self._protocol is not None and isinstance(self._protocol.exception(), HttpProcessingError):
            self._content.set_exception(aiohttp.ClientPayloadError("framing"))

    def abort(self) -> None:
        """Close the connection at once, whatever is still on its way in either direction; who reads is told."""
        self._owner.forget(self)
        if self.waiting_since:
            self._content.set_exception(aiohttp.ClientPayloadError("aborted"))
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.abort()
        self._response.close()

    def release(self) -> None:
        """Give the connection back when the body has ended; otherwise close it."""
        self._owner.forget(self)
        transport = None if self._connection is None else self._connection.transport
        if transport is not None and self._response is self._connection and transport.get_write_buffer_size():
            self.abort()  # answered before all of the body was taken: nothing may queue behind the rest
        else:
            self._response.release()


def broken(was_reset: bool) -> UpstreamError:
    if was_reset:
        return UpstreamError("The upstream reset the connection.", code="upstream_reset")
    return UpstreamError("The upstream closed the connection before its answer was whole.", code="upstream_incomplete")


_names: dict[str, str] = {}  # as received → as the client gets it, "" when it does not


def _end_to_end(received: Mapping[str, str]) -> list[tuple[str, str]]:
    """Headers that may reach the client. A coding that came in spite of `identity` stays on its body; the upstream's
    own `x-request-id` gives way to ours under another name."""
    named = received.get(hdrs.CONNECTION)
    also_dropped = {name.strip().lower() for name in named.split(",")} if named else ()
    kept = []
    for name, value in received.items():
        shown = _names.get(name)
        if shown is None:
            if len(_names) >= NAMES_KEPT:
                _names.clear()
            shown = _RENAMED.get(name.lower(), str(name))
            shown = _names[str(name)] = "" if name.lower() in _DROPPED else shown
        if shown and not (also_dropped and name.lower() in also_dropped):
            kept.append((shown, value))
    return kept
