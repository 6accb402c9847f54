"""One call at an upstream on behalf of a question, and the responses that lanes put in an upstream's place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from proxy.core.model import Usage
from proxy.ports import UpstreamResponse
from proxy.upstreams.sending import Sending

WHOLE_LIMIT_BYTES = 4 * 1024 * 1024


@dataclass(slots=True)
class Attempt:
    """`purpose` is "answer" for the call meant to answer, else why one more was made: a key of `EXTRA_CALLS`.

    `was_left`: given up before its end, so that what it cost can only be estimated, if it was on its way at all.
    """

    sending: Sending
    purpose: str = "answer"
    opened_s: float = field(default_factory=time.perf_counter)
    first_byte_s: float | None = None
    ended_s: float | None = None
    status: int = 0  # 0 when no response came
    usage: Usage | None = None
    size_bytes: int = 0
    was_sent: bool = False
    was_left: bool = False
    response: UpstreamResponse | None = None

    def sent(self) -> None:
        """It is on its way."""
        self.was_sent = True

    def leave(self) -> None:
        """Give it up: cut what is open."""
        self.was_left = True
        self.end()
        if self.response is not None:
            self.response.abort()

    def end(self) -> None:
        if self.ended_s is None:
            self.ended_s = time.perf_counter()


class LocalResponse:
    """A whole response made here: what stands in for an upstream's."""

    def __init__(self, status: int, content_type: str, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.status = status
        self.headers: Sequence[tuple[str, str]] = [*headers, ("Content-Type", content_type)]
        self.content_type = content_type.partition(";")[0]
        self.content_length: int | None = len(body)
        self._body = body

    def header(self, name: str) -> str | None:
        return next((value for known, value in self.headers if known.lower() == name.lower()), None)

    async def read_some(self) -> bytes:
        piece, self._body = self._body, b""
        return piece

    def abort(self) -> None:
        self._body = b""

    def release(self) -> None:
        pass


class Peeked:
    """A response whose first bytes were read already."""

    def __init__(self, response: UpstreamResponse, first: bytes) -> None:
        self.status = response.status
        self.headers = response.headers
        self.content_type = response.content_type
        self.content_length = response.content_length
        self._response = response
        self._first = first
        self._has_ended = not first

    def header(self, name: str) -> str | None:
        return self._response.header(name)

    async def read_some(self) -> bytes:
        if self._first:
            piece, self._first = self._first, b""
            return piece
        return b"" if self._has_ended else await self._response.read_some()

    def abort(self) -> None:
        self._response.abort()

    def release(self) -> None:
        self._response.release()


async def whole_of(response: UpstreamResponse) -> bytes:
    """The complete body, at most WHOLE_LIMIT_BYTES of it (b"" beyond). Ends the response. Raises UpstreamError."""
    pieces: list[bytes] = []
    size_bytes = 0
    try:
        while piece := await response.read_some():
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > WHOLE_LIMIT_BYTES:
                response.abort()
                return b""
    except BaseException:
        response.abort()
        raise
    response.release()
    return b"".join(pieces)
