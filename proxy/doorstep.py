"""The ports, open before the program behind them is: bound in the first tenths of a second, and answered for meanwhile.

Loading the program takes seconds. What a start can refuse cheaply is refused before: a port that is taken, a data
directory that another ibid holds or that cannot be written. From then on nobody finds a closed port: a connection to
the client port waits in the listening socket's own queue until it is accepted, and a thread answers for the admin
port, /healthz with 200, everything else with 503. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from proxy.core.errors import ConfigError, NotYet
from proxy.settings.sections import Address, Settings

BACKLOG: Final = 1024
HEAD_BYTES: Final = 16 * 1024
PATIENCE_S: Final = 1.0  # for one request's head
LOCK_NAME: Final = ".lock"

_HEALTHY: Final = (200, "OK", {"status": "ok"})
_STARTING: Final = (503, "Service Unavailable", {"ready": False, "degraded": {"program": "loading"}})
_NOT_YET: Final = (
    503,
    "Service Unavailable",
    {"error": {"message": "ibid is starting.", "type": "server_error", "param": None, "code": "loading"}},
)


class Sockets(NamedTuple):
    """Bound, listening and not blocking; whoever takes them closes them."""

    clients: list[socket.socket]
    admin: list[socket.socket]

    def close(self) -> None:
        for one in (*self.clients, *self.admin):
            one.close()


def bind(settings: Settings) -> Sockets:
    """Both ports. Raises ConfigError when one of them cannot be had."""
    clients = _bind(settings.server.listen)
    try:
        return Sockets(clients, _bind(settings.server.admin))
    except ConfigError:
        Sockets(clients, []).close()
        raise


def _bind(address: Address) -> list[socket.socket]:
    """Every address of a host, all on one port."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _kind, _protocol, _name, place in dict.fromkeys(found):
            if family not in (socket.AF_INET, socket.AF_INET6):
                continue
            one = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(one)
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((place[0], sockets[0].getsockname()[1] if len(sockets) > 1 else place[1], *place[2:]))
            one.listen(BACKLOG)
    except OSError as error:
        for one in sockets:
            one.close()
        kind = NotYet if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) else ConfigError  # may come by itself
        raise kind(f"cannot listen on {address}: {error.strerror or error}") from error
    return sockets


def refuse_if_unusable(data_dir: Path) -> None:
    """Raise ConfigError for a data directory that the store would refuse seconds later. Makes nothing."""
    nearest = next(path for path in (data_dir, *data_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"data directory {data_dir} cannot be written: {nearest} is not a folder to write to")
    with contextlib.suppress(FileNotFoundError):
        try:
            descriptor = os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(f"data directory {data_dir} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NotYet(f"another ibid is using {data_dir}", code="data_dir_locked") from error
        finally:
            os.close(descriptor)


class Doorstep:
    """Answers for the admin port until the program takes the sockets over, and leaves when it is told to."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._answer, name="ibid-doorstep", daemon=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)
        self._thread.start()

    def take(self) -> Sockets:
        """The sockets; nobody answers for them any more."""
        os.close(self._woken)
        self._thread.join()
        os.close(self._wake)
        return self._sockets

    def _answer(self) -> None:
        admin = {one.fileno(): one for one in self._sockets.admin}
        while True:
            ready, _, _ = select.select([self._wake, *admin], [], [])
            if self._wake in ready:
                return
            for number in ready:
                with contextlib.suppress(OSError):
                    client, _address = admin[number].accept()
                    with client:
                        _reply(client)


def _leave(_number: int, _frame: object) -> None:
    os._exit(0)  # nothing is open but sockets


def _reply(client: socket.socket) -> None:
    client.settimeout(PATIENCE_S)
    head = b""
    while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES:
        piece = client.recv(4096)
        if not piece:
            return
        head += piece
    words = head.split(b"\r\n", 1)[0].split(b" ")
    path = words[1].split(b"?", 1)[0] if len(words) == 3 else b""
    status, reason, found = {b"/healthz": _HEALTHY, b"/readyz": _STARTING}.get(path, _NOT_YET)
    body = json.dumps(found, separators=(",", ":")).encode()
    lines: Iterable[str] = (
        f"HTTP/1.1 {status} {reason}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Server: ibid",
        "Connection: close",
        *(["Retry-After: 1"] if status == 503 else []),
    )
    client.sendall("\r\n".join([*lines, "", ""]).encode() + (b"" if words[0] == b"HEAD" else body))
    client.shutdown(socket.SHUT_WR)


def open_doorstep(settings: Settings) -> Doorstep:
    """Refuse what can be refused now, and open the ports. Raises ConfigError."""
    refuse_if_unusable(settings.data_dir)
    return Doorstep(bind(settings))
