"""Compressed bodies made readable: some servers compress whatever they were asked for, and some do not say so.

ibid asks for no coding at all. One that is not known here leaves the body as it is, with its header, for a client that
may know it. A body that is not what its header says is one that was not compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from proxy.core.errors import UpstreamError
from proxy.ports import UpstreamResponse
from proxy.upstreams.attempt import Peeked
from proxy.upstreams.response import broken
from proxy.upstreams.unpacking import CODINGS, GZIP_MAGIC, LONGEST_MARK, Unpacker

_OF_THE_CODING: Final = frozenset({"content-encoding", "etag", "content-md5", "digest", "content-digest"})
"""Response headers that speak of the compressed bytes."""
_IN_MEMBERS: Final = frozenset({"gzip", "x-gzip", "zstd"})
"""Codings of which several may stand one behind the other (RFC 1952 §2.2, RFC 8878 §3)."""


async def readable(response: UpstreamResponse) -> UpstreamResponse:
    """The response as a reader of its text wants it. Owns what it is given. Raises UpstreamError."""
    codings = codings_of(response)
    if not codings and response.content_length is not None:  # will be told, so it must be known of what
        first = await response.read_some()
        if not first.startswith(GZIP_MAGIC):
            return Peeked(response, first)
        response = Peeked(response, first)
    if not CODINGS.keys() >= set(codings):
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
        self._unpacker: Unpacker | None = None  # none for a body that is plain
        if codings_of(response):
            self.headers = [line for line in response.headers if line[0].lower() not in _OF_THE_CODING]

    def header(self, name: str) -> str | None:
        return None if name.lower() in _OF_THE_CODING else self._response.header(name)

    async def read_some(self) -> bytes:
        """As any response's; also raises upstream_protocol_error for what cannot be decoded."""
        while True:
            if self._unpacker is not None and (self._packed or self._unpacker.holds_more):
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
        while len(start) < LONGEST_MARK and (more := await self._response.read_some()):
            start += more
        self._is_decided = True
        self._unpacker = CODINGS[self._coding](start) if start else None
        return start

    def _unpack(self, unpacker: Unpacker) -> bytes:
        if unpacker.has_ended:  # what follows is one more member, or padding
            another = CODINGS[self._coding](self._packed) if self._coding in _IN_MEMBERS else None
            if another is None:
                self._packed = b""
                return b""
            self._unpacker = unpacker = another
        try:
            piece, self._packed = unpacker.unpack(self._packed)
        except ValueError as error:
            self.abort()
            message = "The upstream's answer is not valid for its Content-Encoding."
            raise UpstreamError(message, code="upstream_protocol_error") from error
        return piece

    def _end(self, unpacker: Unpacker) -> bytes:
        if not unpacker.has_ended:
            self.abort()
            raise broken(False)
        return b""

    def abort(self) -> None:
        self._response.abort()

    def release(self) -> None:
        self._response.release()
