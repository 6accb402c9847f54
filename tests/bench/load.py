"""A closed-loop HTTP/1.1 load generator on raw uvloop protocols: the same client for every floor and for ibid.

One process, one loop; each connection sends its next request when the last answer is complete. Latency is from the
write of a request to the last byte of its answer (for a stream, also to its first body byte).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass
class Result:
    """Answers per second and latencies in ms of one run."""

    count: int = 0
    errors: int = 0
    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)

    @property
    def rps(self) -> float:
        return self.count / self.seconds

    def quantile(self, q: float) -> float:
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class Connection(asyncio.Protocol):
    def __init__(
        self,
        next_request: Callable[[], bytes | None],
        result: Result,
        done: asyncio.Future[None],
        pause_s: float = 0.0,
    ) -> None:
        self.pause_s = pause_s
        self.next_request = next_request
        self.result = result
        self.done = done
        self.buffer = b""
        self.need = -1  # bytes of the whole answer, 0 while chunked
        self.sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.send()

    def send(self) -> None:
        request = self.next_request()
        if request is None:
            self.transport.close()
            return
        self.buffer = b""
        self.need = -1
        self.sent_s = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer = self.buffer + data if self.buffer else data
        if self.need < 0:
            head_end = self.buffer.find(b"\r\n\r\n")
            if head_end < 0:
                return
            head = self.buffer[:head_end].lower()
            at = head.find(b"content-length:")
            if at >= 0:
                self.need = head_end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
            else:
                self.need = 0
            if not head.startswith(b"http/1.1 200"):
                self.result.errors += 1
        whole = len(self.buffer) >= self.need if self.need else self.buffer.endswith(END_OF_CHUNKS)
        if whole:
            self.result.count += 1
            self.result.latencies_ms.append((time.perf_counter() - self.sent_s) * 1e3)
            if self.pause_s:
                _ = asyncio.get_running_loop().call_later(self.pause_s, self.send)
            else:
                self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.result.errors += 1
        if not self.done.done():
            self.done.set_result(None)


async def run(
    port: int, next_request: Callable[[], bytes], connections: int, seconds: float, pause_s: float = 0.0
) -> Result:
    """Load 127.0.0.1:port for `seconds` with `connections` keep-alive connections, each resting `pause_s` between two
    requests: for latencies of a server that is not saturated."""
    loop = asyncio.get_running_loop()
    result = Result()
    deadline = time.perf_counter() + seconds

    def bounded() -> bytes | None:
        return next_request() if time.perf_counter() < deadline else None

    started = time.perf_counter()
    futures = [loop.create_future() for _ in range(connections)]
    for future in futures:
        await loop.create_connection(lambda f=future: Connection(bounded, result, f, pause_s), "127.0.0.1", port)
    await asyncio.wait_for(asyncio.gather(*futures), seconds + 60)
    result.seconds = time.perf_counter() - started
    return result


def post(path: str, body: bytes, headers: str = "") -> bytes:
    """One chat request as an SDK would frame it."""
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer sk-bench-0123456789\r\n"
        f"content-type: application/json\r\naccept: application/json\r\nuser-agent: bench/1\r\n{headers}"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body
