"""The client listener: aiohttp's HTTP protocol with the deadlines, bounds and error envelopes it does not have.

aiohttp bounds lines, headers and pipelining, and closes idle keep-alive connections. Added here (catalogue rows 5-12,
47, 48, 51): an absolute deadline for a request's head, JSON envelopes for what the parser refuses, a bound on
connections, an accept loop that survives a full descriptor table (uvloop's own closes the socket on an accept error),
and an answer for a client that half-closes.

No request arms a timer. A connection in an unusual state (half a head, half closed, a reader that stalls) is put on
the server's watch list, and one sweep every `tick_s` looks at that list only.

Half-close against gone: both arrive as the same FIN. A watched half-closed connection is sent bytes without meaning (an
interim 102 before the head, RFC 9110 §15.2; a leading zero of the next chunk size after it, RFC 9112 §7.1). A client
that left answers them with a reset, which shows as a pending socket error and cancels the handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections import deque
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.http_writer import StreamWriter
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestPayloadError, _ErrInfo

from proxy.client.incoming import error_response, new_request_id, parser_error, raw_response
from proxy.core.errors import BadRequest, Busy, IbidError
from proxy.core.model import Limits

log = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

PROBE_EVERY_S = 1.0
LINGERING_S = 2.0  # how long the rest of an unwanted body is read and dropped, so that the answer is not reset away
DESCRIPTORS_KEPT = 128  # for upstreams, database, index and logs
REFUSED_AT_ONCE = 64
ACCEPTS_PER_WAKEUP = 64


class ClientConnection(web.RequestHandler):
    """One client's connection. Owned by its `ClientServer`."""

    __slots__ = (
        "_half_closed",
        "_head_since",
        "_limits",
        "_open_body",
        "_owner",
        "_probed",
        "_stalled",
        "_stalled_since",
    )

    def __init__(self, owner: ClientServer, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        super().__init__(
            owner,
            loop=loop,
            keepalive_timeout=limits.keep_alive_s,
            access_log=None,  # type: ignore[arg-type]
            max_line_size=limits.header_line_bytes,
            # A line is name, colon, space and value; two limits tell a long URL from a long header (`parser_error`).
            max_field_size=limits.header_line_bytes - 2,
            max_headers=limits.headers,
            lingering_time=LINGERING_S,
            auto_decompress=False,
        )
        self._owner = owner
        self._limits = limits
        self._head_since = 0.0  # loop time of the first byte of a head that is not whole yet
        self._open_body: StreamReader | None = None  # body still arriving
        self._half_closed = False
        self._probed = 0.0
        self._stalled = 0  # bytes waiting for a slow reader, when last seen
        self._stalled_since = 0.0

    def data_received(self, data: bytes) -> None:
        if self._upgraded:  # a WebSocket's frames are no requests
            web.RequestHandler.data_received(self, data)
            return
        before = self._request_count
        web.RequestHandler.data_received(self, data)
        if self._request_count != before and self._open_body is None:
            messages = self._messages
            if not messages or messages[-1][1].is_eof():  # whole requests: nearly always
                self._head_since = 0.0
                return
        self._note_partial(self._request_count != before, data)

    def _note_partial(self, has_message: bool, data: bytes) -> None:
        body = self._open_body
        if has_message:
            self._head_since = 0.0
            message, payload = self._messages[-1]
            if isinstance(message, _ErrInfo):
                if body is not None and not body.is_eof():
                    # The parser drops a body it cannot follow without telling its reader.
                    body.set_exception(RequestPayloadError("Body framing"))
                    body.feed_eof()
                self._open_body = None
            else:
                self._open_body = None if payload.is_eof() else payload
        elif body is not None:
            if body.is_eof():
                self._open_body = None
        elif data and not self._head_since and not (self._close or self._force_close):
            self._head_since = self._loop.time()
            self._owner.watch(self)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection while something is being answered; the request itself must be whole."""
        if self._upgraded or self._is_idle() or (self._open_body is not None and not self._open_body.is_eof()):
            return False
        self._half_closed = True
        self._owner.watch(self)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_since = self._loop.time()
        self._stalled = 0
        self._owner.watch(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_since = 0.0

    def _is_idle(self) -> bool:
        waiter = self._waiter
        return waiter is not None and not waiter.done() and not self._messages

    def inspect(self, now: float) -> bool:
        """Apply the deadlines of an unusual state; True while there is one."""
        transport = self.transport
        if transport is None:
            return False
        if self._head_since and now - self._head_since >= self._limits.header_timeout_s:
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
            if self._is_idle():
                self.force_close()
                return False
            if _has_failed(transport):
                transport.abort()
                return False
            self._probe(transport, now)
        return bool(self._head_since or self._stalled_since or self._half_closed)

    def _expire_head(self, transport: asyncio.Transport) -> None:
        if self._is_idle():
            message = "The request's headers did not arrive in time."
            transport.write(raw_response(BadRequest(message, code="request_timeout", status=408, should_retry=True)))
            self.force_close()
        else:
            self.finish_up()  # half a request behind one that is being answered

    def _probe(self, transport: asyncio.Transport, now: float) -> None:
        request = self._current_request
        if request is None or now - self._probed < PROBE_EVERY_S:
            return
        writer = request.writer
        assert isinstance(writer, StreamWriter)
        if writer.output_size == 0:
            if request.version >= HttpVersion11:
                transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        elif writer.chunked and not writer._eof and not self._probed:
            transport.write(b"0")
        self._probed = now

    def finish_up(self) -> None:
        """Take no further request: close now when idle, else after the answer under way."""
        if self._is_idle():
            self.force_close()
        else:
            self._close = True

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
        request._version = HttpVersion11  # aiohttp's stand-in for an unparsed request says HTTP/1.0
        response = error_response(error, new_request_id())
        response.force_close()
        return response


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
        self._watched: set[ClientConnection] = set()

    def __call__(self) -> ClientConnection:
        return ClientConnection(self, self._loop, self.limits)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self.open_count -= 1
        self._watched.discard(handler)  # it holds its last request
        super().connection_lost(handler, exc)

    def watch(self, connection: ClientConnection) -> None:
        self._watched.add(connection)

    def sweep(self, now: float) -> None:
        """`now` is loop time, seconds."""
        if self._watched:
            self._watched = {connection for connection in tuple(self._watched) if connection.inspect(now)}

    def finish_up(self) -> None:
        for connection in self.connections:
            assert isinstance(connection, ClientConnection)
            connection.finish_up()


class Listener:
    """Listening sockets and the server behind them. Made by `start`, ended by `stop`."""

    def __init__(self, server: ClientServer, sockets: list[socket.socket], tick_s: float) -> None:
        self.server = server
        self.sockets = sockets
        self._loop = asyncio.get_running_loop()
        self._connections_limit = _connection_limit(server.limits.connections)
        self._joining: set[asyncio.Task[None]] = set()
        self._refused: deque[socket.socket] = deque()
        self._paused: list[socket.socket] = []
        self._accepting = True
        self._tick_s = tick_s
        self._overloaded = raw_response(Busy("Too many connections."))
        for sock in sockets:
            self._loop.add_reader(sock.fileno(), self._accept, sock)
        self._timer = self._loop.call_later(tick_s, self._tick)

    @property
    def port(self) -> int:
        port: int = self.sockets[0].getsockname()[1]
        return port

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_WAKEUP):
            try:
                client, _address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor or no memory: try again at the next tick
                log.warning("cannot accept", extra={"errno": error.errno})
                self._loop.remove_reader(listening.fileno())
                self._paused.append(listening)
                return
            client.setblocking(False)
            if self.server.open_count >= self._connections_limit:
                self._refuse(client)
                continue
            self.server.open_count += 1
            task = self._loop.create_task(self._join(client))
            self._joining.add(task)
            task.add_done_callback(self._joining.discard)

    async def _join(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self.server, client)
        except OSError as error:  # gone before it was served
            log.debug("lost while accepting", extra={"errno": error.errno})
            self.server.open_count -= 1
            client.close()

    def _refuse(self, client: socket.socket) -> None:
        """Say why, and close at the next tick, so that the answer is read before a reset can drop it."""
        try:
            client.send(self._overloaded)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            client.close()
            return
        self._refused.append(client)
        if len(self._refused) > REFUSED_AT_ONCE:
            self._refused.popleft().close()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._tick_s, self._tick)
        while self._refused:
            self._refused.popleft().close()
        self.server.sweep(self._loop.time())
        if self._paused and self._accepting:
            paused, self._paused = self._paused, []
            for sock in paused:
                self._loop.add_reader(sock.fileno(), self._accept, sock)

    def stop_accepting(self) -> None:
        """At once; connections that are open stay."""
        self._accepting = False
        for sock in self.sockets:
            if sock.fileno() >= 0:
                self._loop.remove_reader(sock.fileno())
                sock.close()

    async def stop(self, drain_s: float = 30.0) -> None:
        """Stop accepting, let what is being answered finish within `drain_s`, cancel the rest, close everything."""
        self.stop_accepting()
        if self._joining:
            await asyncio.wait(self._joining)
        self.server.finish_up()
        busy = {task for c in self.server.connections if (task := c._task_handler) is not None and not task.done()}
        if busy and drain_s > 0:
            await asyncio.wait(busy, timeout=drain_s)
        await self.server.shutdown(0.05)
        self._timer.cancel()
        while self._refused:
            self._refused.popleft().close()


def _connection_limit(wanted: int) -> int:
    """`wanted`, or what the descriptor limit leaves."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, soft - DESCRIPTORS_KEPT))


async def start(
    handler: Handler,
    host: str,
    port: int,
    limits: Limits,
    *,
    reuse_port: bool = False,
    backlog: int = 1024,
    tick_s: float = 0.25,
) -> Listener:
    """A listener that is accepting. Every address of `host` is bound. Raises OSError when the port cannot be had."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        for family, _kind, _protocol, _name, address in dict.fromkeys(found):
            if family not in (socket.AF_INET, socket.AF_INET6):
                continue
            sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and sockets:  # one free port for every address
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sock.bind(address)
            sock.listen(backlog)
            sockets.append(sock)
        undo.pop_all()
    return Listener(ClientServer(handler, limits), sockets, tick_s)


class Admission:
    """A bound on requests in flight, with a bounded queue behind it. Not for threads.

    The usual way in is one comparison: `if not admission.try_enter(): await admission.enter()`. Every way in is paired
    with one `leave`. While `is_shut` nobody new gets in.
    """

    __slots__ = ("_free", "_queue", "_queue_limit", "_timeout_s", "is_shut")

    def __init__(self, in_flight: int, queued: int, timeout_s: float) -> None:
        self.is_shut = False
        self._free = in_flight
        self._queue_limit = queued
        self._timeout_s = timeout_s
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> int:
        return self._free

    def try_enter(self) -> bool:
        if self._free > 0 and not self.is_shut:
            self._free -= 1
            return True
        return False

    async def enter(self) -> None:
        """First come, first served. Raises Busy at once when the queue is full, and after `timeout_s` in it."""
        if self.try_enter():
            return
        if self.is_shut:
            raise Busy("Memory is short.")
        if len(self._queue) >= self._queue_limit:
            raise Busy("Too many requests in flight.")
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout(self._timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.leave()  # the place was given in the same moment
            elif turn in self._queue:
                self._queue.remove(turn)
            if isinstance(error, TimeoutError):
                raise Busy("Too many requests in flight: waited too long for a place.") from None
            raise

    def leave(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
