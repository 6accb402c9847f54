"""One client's connection: aiohttp's HTTP protocol with the deadlines, bounds and error envelopes it does not have.

aiohttp bounds lines, headers and pipelining, and closes idle keep-alive connections. Added here (catalogue rows 5-12,
47, 48, 51): an absolute deadline for a request's head, a bound on the memory of all half heads, JSON envelopes for what
the parser refuses, and an answer for a client that half-closes.

No request arms a timer. A connection in an unusual state (half a head, half closed, a reader that stalls) is put on
the server's watch list, and one sweep every `tick_s` looks at that list only.

Half-close against gone: both arrive as the same FIN. A watched half-closed connection is sent bytes without meaning (an
interim 102 before the head, RFC 9110 §15.2; a leading zero of the next chunk size after it, RFC 9112 §7.1). A client
that left answers them with a reset, which shows as a pending socket error and cancels the handler.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, web

from proxy.aiohttp_internals import BadHttpMessage, ServerConnection, answer_as_http11, can_take_a_chunk
from proxy.client.incoming import error_response, network_of, new_request_id, parser_error, raw_response
from proxy.core.arrival import HeadRoom
from proxy.core.errors import BadRequest, Busy, IbidError
from proxy.core.model import Limits

log = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

PROBE_EVERY_S = 1.0
LINGERING_S = 2.0  # how long the rest of an unwanted body is read and dropped, so that the answer is not reset away


class ClientConnection(ServerConnection):
    """One client's connection. Owned by its `ClientServer`."""

    __slots__ = ("_half_closed", "_limits", "_owner", "_probed", "_stalled", "_stalled_since")

    def __init__(self, owner: ClientServer, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        super().__init__(
            owner,
            loop,
            keepalive_timeout=limits.keep_alive_s,
            access_log=None,
            max_line_size=limits.header_line_bytes,
            # A line is name, colon, space and value; two limits tell a long URL from a long header (`parser_error`).
            max_field_size=limits.header_line_bytes - 2,
            max_headers=limits.headers,
            lingering_time=LINGERING_S,
            auto_decompress=False,
        )
        self._owner = owner
        self._limits = limits
        self._half_closed = False
        self._probed = 0.0
        self._stalled = 0  # bytes waiting for a slow reader, when last seen
        self._stalled_since = 0.0

    def head_grew(self, size_bytes: int) -> None:
        self._owner.watch(self)
        self._owner.hold_head(self, size_bytes)

    def head_ended(self) -> None:
        self._owner.heads.leave(self)

    def refuse_head(self) -> None:
        """End half a head at once, for want of room, and what is being answered before it too."""
        transport = self.transport
        if transport is None:
            return
        if self.is_idle():
            transport.write(raw_response(Busy("Too many request heads are on their way.")))
            self.force_close()
        else:
            transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection while something is being answered; the request itself must be whole."""
        if not self.is_answering():
            return False
        self._half_closed = True
        self._owner.watch(self)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_since = self.now()
        self._stalled = 0
        self._owner.watch(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_since = 0.0

    def inspect(self, now: float) -> bool:
        """Apply the deadlines of an unusual state; True while there is one."""
        transport = self.transport
        if transport is None:
            return False
        if self.head_since and now - self.head_since >= self._limits.header_timeout_s:
            self._expire_head(transport)
            return False
        if self._stalled_since:
            waiting = transport.get_write_buffer_size()
            if waiting != self._stalled:
                self._stalled, self._stalled_since = waiting, now
            elif now - self._stalled_since >= self._limits.write_stall_s:
                transport.abort()
                return False
        if self._half_closed:
            if self.is_idle():
                self.force_close()
                return False
            if _has_failed(transport):
                transport.abort()
                return False
            self._probe(transport, now)
        return bool(self.head_since or self._stalled_since or self._half_closed)

    def _expire_head(self, transport: asyncio.Transport) -> None:
        if self.is_idle():
            message = "The request's headers did not arrive in time."
            transport.write(raw_response(BadRequest(message, code="request_timeout", status=408, should_retry=True)))
            self.force_close()
        else:
            self.finish_up()  # half a request behind one that is being answered

    def _probe(self, transport: asyncio.Transport, now: float) -> None:
        request = self.request
        if request is None or now - self._probed < PROBE_EVERY_S:
            return
        if request.writer.output_size == 0:
            if request.version >= HttpVersion11:
                transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        elif not self._probed and can_take_a_chunk(request):
            transport.write(b"0")
        self._probed = now

    def finish_up(self) -> None:
        """Take no further request: close now when idle, else after the answer under way."""
        if self.is_idle():
            self.force_close()
        else:
            self.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The envelope for what the parser refused, or for a handler that broke its contract. Always closes."""
        error: IbidError
        if isinstance(exc, BadHttpMessage):
            error = parser_error(exc, self._limits)
            log.debug("refused", extra={"code": error.code, "status": error.status})
        else:
            error = IbidError("The proxy failed to handle this request.")
            log.error("handler failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("The response has begun; only closing can tell the client.")
        answer_as_http11(request)
        response = error_response(error, new_request_id())
        response.force_close()
        return response


def _address_of(connection: ClientConnection) -> str:
    transport = connection.transport
    peer = None if transport is None else transport.get_extra_info("peername")
    return network_of(str(peer[0])) if peer else ""


def _has_failed(transport: asyncio.Transport) -> bool:
    """Has the peer reset the connection while nothing was read from it? Linux reports EPIPE or ECONNRESET here."""
    sock = transport.get_extra_info("socket")
    return sock is None or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


class ClientServer(web.Server):
    """Protocol factory of the client listener; one per event loop."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        super().__init__(handler, handler_cancellation=True)
        self.limits = limits
        self.open_count = 0  # connections accepted and not lost yet
        self.heads: HeadRoom[ClientConnection] = HeadRoom(limits)
        self._watched: set[ClientConnection] = set()

    def __call__(self) -> ClientConnection:
        return ClientConnection(self, asyncio.get_running_loop(), self.limits)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self.open_count -= 1
        assert isinstance(handler, ClientConnection)
        self._watched.discard(handler)  # it holds its last request
        self.heads.leave(handler)
        super().connection_lost(handler, exc)

    def watch(self, connection: ClientConnection) -> None:
        self._watched.add(connection)

    def hold_head(self, connection: ClientConnection, size_bytes: int) -> None:
        for ended in self.heads.hold(connection, _address_of(connection), size_bytes):
            ended.refuse_head()

    def sweep(self, now: float) -> None:
        """`now` is loop time, seconds."""
        if self._watched:
            self._watched = {connection for connection in tuple(self._watched) if connection.inspect(now)}

    def finish_up(self) -> set[asyncio.Task[None]]:
        """Let no connection take a further request; the tasks that still answer one."""
        busy = set()
        for connection in self.connections:
            assert isinstance(connection, ClientConnection)
            connection.finish_up()
            if (task := connection.task) is not None and not task.done():
                busy.add(task)
        return busy
