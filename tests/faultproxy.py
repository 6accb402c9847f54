"""A TCP proxy that breaks things ("FP"): delay, slice, cut at byte n, RST, half-close, blackhole.

    async with FaultProxy("127.0.0.1", up.port) as fp:
        fp.downstream = Fault(cut_at=120, how="rst")      # what the server's bytes suffer
        ... fp.url

Faults apply to connections accepted after they were set; each direction has its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What happens to the bytes of one direction."""

    delay_s: float = 0.0  # before each piece
    slice_bytes: int = 0  # pieces of this size, each its own segment; 0: as they come
    cut_at: int | None = None  # after so many bytes of the connection…
    how: str = "fin"  # …"fin" closes, "rst" resets, "half" ends only this direction, "stall" sends nothing more
    blackhole: bool = False  # reads and passes nothing


NONE = Fault()


class FaultProxy:
    """Owns its listener and its connections; `async with` opens and closes them."""

    def __init__(self, host: str, port: int) -> None:
        self.upstream: Fault = NONE  # client → server
        self.downstream: Fault = NONE  # server → client
        self.refuse = False  # accept, then reset at once
        self.connections = 0
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self.refuse:
                _reset(writer)
            else:
                await self._couple(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()  # the proxy is closing; nothing waits for this connection
        finally:
            self._tasks.discard(task)

    async def _couple(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        both = (writer, back)
        pumps = [
            asyncio.ensure_future(_pump(reader, back, self.upstream, both)),
            asyncio.ensure_future(_pump(there, writer, self.downstream, both)),
        ]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in both:
                end.close()


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    fault: Fault,
    both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
) -> None:
    passed = 0
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            if fault.blackhole:
                continue
            if fault.cut_at is not None:
                data = data[: fault.cut_at - passed]
            size = fault.slice_bytes or len(data) or 1
            for start in range(0, len(data), size):
                if fault.delay_s:
                    await asyncio.sleep(fault.delay_s)
                writer.write(data[start : start + size])
                await writer.drain()
            passed += len(data)
            if fault.cut_at is not None and passed >= fault.cut_at:
                await _cut(writer, fault.how, both)
                return
        if not fault.blackhole and writer.can_write_eof():
            writer.write_eof()


async def _cut(writer: asyncio.StreamWriter, how: str, both: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
    if how == "rst":
        for end in both:
            _reset(end)
    elif how == "half":
        writer.write_eof()
    elif how == "fin":
        for end in both:
            end.close()
    else:
        await asyncio.Event().wait()  # until the proxy closes


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
