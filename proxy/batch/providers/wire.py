"""Requests about batches, and what can be read of the answers in any dialect."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from proxy.batch.providers.provider import Handed, NoBatchApi, RawHeaders, Refused, Result
from proxy.core.errors import UpstreamError
from proxy.ports import Upstream
from proxy.upstreams.decoding import readable

NO_SUCH_API: Final = frozenset({404, 405, 501})
REPLY_LIMIT_BYTES: Final = 4 * 1024 * 1024
PIECE_BYTES: Final = 256 * 1024
RESULT_LIMIT_BYTES: Final = 64 * 1024 * 1024
_UNSENT: Final = frozenset(
    {b"accept", b"content-length", b"content-type", b"content-encoding", b"idempotency-key", b"prefer"}
)
_NUMBER = re.compile(r"-(\d{1,9})\Z")


@dataclass(frozen=True, slots=True)
class Wire:
    """One upstream after another, asked about batches."""

    upstream: Upstream

    async def call(
        self,
        name: str,
        method: str,
        path: str,
        headers: RawHeaders,
        body: bytes | AsyncIterator[bytes] | None = None,
        also: RawHeaders = (),
    ) -> tuple[int, Any]:
        """Status, and what the body says as JSON: None when it is none. Raises UpstreamError."""
        response = await self.upstream.open(name, method, path, [*_sendable(headers), *also], body)
        raw = b""
        try:
            response = await readable(response)
            while piece := await response.read_some():
                raw += piece
                if len(raw) > REPLY_LIMIT_BYTES:
                    raise UpstreamError("The upstream's answer about a batch is too long.", code="upstream_too_large")
        except BaseException:
            response.abort()
            raise
        response.release()
        try:
            return response.status, orjson.loads(raw)
        except ValueError:
            return response.status, None

    async def listed(self, name: str, path: str, headers: RawHeaders) -> list[Any] | None:
        """What a list has; None where there is no such list. Raises UpstreamError, Refused."""
        status, said = await self.call(name, "GET", path, headers)
        if status in NO_SUCH_API:
            return None
        if status != 200:
            raise Refused(status, said)
        data = said.get("data") if isinstance(said, dict) else None
        return data if isinstance(data, list) else None

    async def results(
        self, name: str, places: Iterable[str], headers: RawHeaders, read: Callable[[bytes], Result | None]
    ) -> AsyncIterator[Result]:
        """Lines of files, as far as `read` can read them. Raises UpstreamError."""
        for place in places:
            async for line in self._lines(name, place, headers):
                if (result := read(line)) is not None:
                    yield result

    async def _lines(self, name: str, path: str, headers: RawHeaders) -> AsyncIterator[bytes]:
        """Lines of a file. Raises UpstreamError."""
        response = await self.upstream.open(name, "GET", path, _sendable(headers), None)
        rest = b""
        try:
            if response.status != 200:
                raise UpstreamError(f"The upstream answered {response.status} for the results of a batch.")
            response = await readable(response)
            while piece := await response.read_some():
                rest += piece
                if b"\n" in piece:
                    *whole, rest = rest.split(b"\n")
                    for line in whole:
                        if line.strip():
                            yield line
                elif len(rest) > RESULT_LIMIT_BYTES:
                    raise UpstreamError("A result of a batch is too long.", code="upstream_too_large")
        except BaseException:
            response.abort()
            raise
        response.release()
        if rest.strip():
            yield rest


def _sendable(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    return [line for line in headers if line[0].lower() not in _UNSENT]


def checked(status: int, said: Any, kind: str, word: str) -> dict[str, Any]:
    """The object that was asked for."""
    if status in NO_SUCH_API or (status < 300 and (not isinstance(said, dict) or said.get(kind) != word)):
        raise NoBatchApi
    if status >= 300:
        raise Refused(status, said)
    assert isinstance(said, dict)
    return said


def number_of(custom_id: Any) -> int:
    """The line a name of ours stands for; -1 for another's."""
    found = _NUMBER.search(custom_id) if isinstance(custom_id, str) else None
    return -1 if found is None else int(found[1])


async def packed(handed: Handed, wrapped: Callable[[int, bytes], bytes]) -> AsyncIterator[bytes]:
    """Lines joined into pieces worth a write."""
    held: list[bytes] = []
    size = 0
    async for number, body in handed.lines:
        held.append(wrapped(number, body))
        size += len(held[-1])
        if size >= PIECE_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
