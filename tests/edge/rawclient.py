"""A client that sends exact bytes over a socket and reads what comes back. Deadlines here only catch hangs."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any, NamedTuple

from tests.waiting import PATIENCE_S


class Answer(NamedTuple):
    version: str
    status: int
    headers: dict[str, str]  # lower-case names; the last one wins
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"].startswith("application/json"), self
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == ("invalid_request_error" if self.status < 500 else "server_error")
        assert self.headers["x-request-id"]
        return error  # type: ignore[no-any-return]

    @property
    def code(self) -> str:
        return self.error["code"]  # type: ignore[no-any-return]


class RawClient:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> RawClient:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 24))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[str, int, dict[str, str]]:
        async with asyncio.timeout(PATIENCE_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        version, status, _reason = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return version, int(status), headers

    async def answer(self, interim: list[int] | None = None) -> Answer:
        while True:
            version, status, headers = await self.head()
            if status >= 200:
                break
            if interim is not None:
                interim.append(status)
        async with asyncio.timeout(PATIENCE_S):
            if "chunked" in headers.get("transfer-encoding", ""):
                body = await self._chunks()
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
        return Answer(version, status, headers, body)

    async def _chunks(self) -> bytes:
        pieces = []
        while size := int(await self.reader.readline(), 16):
            pieces.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return b"".join(pieces)

    async def rest(self) -> bytes:
        """Everything until the server closes; a reset counts as closing."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    def half_close(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.close()


def post(body: bytes = b"", *headers: str, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def get(path: str = "/v1/models", *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode("latin-1")
