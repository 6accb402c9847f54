"""The client listener's sockets: a bound on connections, an accept loop that survives a full descriptor table (uvloop's
own closes the socket on an accept error), and an end that lets what is being answered finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections import deque

from proxy.client.connection import ClientServer, Handler
from proxy.client.incoming import raw_response
from proxy.core.errors import Busy
from proxy.core.model import Limits

log = logging.getLogger(__name__)

DESCRIPTORS_KEPT = 128  # for upstreams, database, index and logs
REFUSED_AT_ONCE = 64
ACCEPTS_PER_WAKEUP = 64


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
        busy = self.server.finish_up()
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
