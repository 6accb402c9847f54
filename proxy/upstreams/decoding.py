"""Compressed bodies made readable: some servers compress whatever they were asked for, and some do not say so.

A coding that is not known here (br and zstd need packages of their own) leaves the body as it is, with its header, for
a client that may know it. A body that is not what its header says is one that was not compressed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from proxy.core.errors import UpstreamError
from proxy.ports import UpstreamResponse
from proxy.upstreams.attempt import Peeked
from proxy.upstreams.response import broken

PIECE_BYTES: Final = 256 * 1024
"""At most so much comes out of one read, however little was compressed into it."""
_MAGIC: Final = b"\x1f\x8b\x08"
_TEXTS: Final = (b"{", b"[", b"data", b"event", b":")
_GZIP: Final = frozenset({"gzip", "x-gzip"})
_KNOWN: Final = _GZIP | {"deflate"}
_OF_THE_CODING: Final = frozenset({"content-encoding", "etag", "content-md5", "digest", "content-digest"})
"""Response headers that speak of the compressed bytes."""


async def readable(response: UpstreamResponse) -> UpstreamResponse:
    """The response as a reader of its text wants it. Owns what it is given. Raises UpstreamError."""
    codings = codings_of(response)
    if not codings and response.content_length is not None:  # will be told, so it must be known of what
        first = await response.read_some()
        if not first.startswith(_MAGIC):
            return Peeked(response, first)
        response = Peeked(response, first)
    if not _KNOWN.issuperset(codings):
        return response
    for coding in reversed(codings or ("gzip",)):
        response = Decoded(response, coding)
    return response


def codings_of(response: UpstreamResponse) -> tuple[str, ...]:
    """What its head says was done to the body, in that order."""
    named = (response.header("content-encoding") or "").lower().split(",")
    return tuple([coding for part in named if (coding := part.strip()) not in ("", "identity")])


class Decoded:
    """A response without one coding of its body, which shows in its first bytes or is not there."""

    def __init__(self, response: UpstreamResponse, coding: str) -> None:
        self.status = response.status
        self.headers: Sequence[tuple[str, str]] = response.headers
        self.content_type = response.content_type
        self.content_length: int | None = None
        self._response = response
        self._coding = coding
        self._packed = b""
        self._is_decided = False
        self._unpacker: zlib._Decompress | None = None  # none for a body that is plain
        self._holds_more = False  # of what was unpacked
        if codings_of(response):
            self.headers = [line for line in response.headers if line[0].lower() not in _OF_THE_CODING]

    def header(self, name: str) -> str | None:
        return None if name.lower() in _OF_THE_CODING else self._response.header(name)

    async def read_some(self) -> bytes:
        """As any response's; also raises upstream_protocol_error for what cannot be decoded."""
        while True:
            if self._unpacker is not None and (self._packed or self._holds_more):
                if piece := self._unpack(self._unpacker):
                    return piece
                continue
            piece = await self._response.read_some()
            if not self._is_decided:
                piece = await self._decide(piece)
            if self._unpacker is None:
                return piece
            if not piece:
                return self._end(self._unpacker)
            self._packed = piece

    async def _decide(self, start: bytes) -> bytes:
        """Look at the first bytes, as many as it takes, and give them back."""
        while len(start) < len(_MAGIC) and (more := await self._response.read_some()):
            start += more
        self._is_decided = True
        if self._coding in _GZIP:
            bits = zlib.MAX_WBITS | 16 if start.startswith(_MAGIC) else 0
        elif len(start) >= 2 and start[0] & 0x0F == 8 and (start[0] << 8 | start[1]) % 31 == 0:  # RFC 1950 §2.2
            bits = zlib.MAX_WBITS
        else:
            bits = 0 if start.startswith(_TEXTS) else -zlib.MAX_WBITS
        self._unpacker = zlib.decompressobj(bits) if bits and start else None
        return start

    def _unpack(self, unpacker: zlib._Decompress) -> bytes:
        try:
            piece = unpacker.decompress(self._packed, PIECE_BYTES)
        except zlib.error as error:
            self.abort()
            message = "The upstream's answer is not valid for its Content-Encoding."
            raise UpstreamError(message, code="upstream_protocol_error") from error
        self._holds_more = len(piece) == PIECE_BYTES
        self._packed = unpacker.unconsumed_tail
        if unpacker.eof:
            self._packed, self._holds_more = unpacker.unused_data, False
            if self._packed.startswith(_MAGIC):  # one more member (RFC 1952 §2.2)
                self._unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            else:
                self._packed = b""
        return piece

    def _end(self, unpacker: zlib._Decompress) -> bytes:
        if not unpacker.eof:
            self.abort()
            raise broken(False)
        return b""

    def abort(self) -> None:
        self._response.abort()

    def release(self) -> None:
        self._response.release()
