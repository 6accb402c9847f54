"""What comes out of the pipeline: complete bytes, or the upstream's bytes as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from proxy.core.dialects.dialect import Dialect, StreamFilter
from proxy.core.errors import IbidError, UpstreamError
from proxy.core.pace import Schedule


class Head:
    """Response headers, all but those that name the request: `x-request-id`, and `id_header` where the dialect has one
    of its own. `wire` is the handler's: the same once more as it spells them."""

    __slots__ = ("id_header", "pairs", "wire")

    def __init__(self, pairs: list[tuple[str, str]], id_header: str = "") -> None:
        self.pairs = pairs
        self.id_header = id_header
        self.wire: bytes | None = None


class Paced(NamedTuple):
    """That a streamed reply goes out event by event. `settle` is called once, with the time of the first one
    (`time.perf_counter`; None when there was none) and the outcome, "ok" or "cancelled"."""

    schedule: Schedule
    heartbeat: bytes | None  # see `Dialect`
    settle: Callable[[float | None, str], None]


class Replay(NamedTuple):
    """A complete reply, status 200. Replays of one entry within one second share their head."""

    head: Head
    request_id: str
    body: bytes
    paced: Paced | None = None  # without it: at once

    def saying(self, explanation: tuple[str, str]) -> Replay:
        """The same with one more header."""
        return self._replace(head=Head([*self.head.pairs, explanation], self.head.id_header))


class Source(Protocol):
    """Where a relay's bytes come from: a seat in a flight."""

    async def next(self) -> bytes: ...

    async def whole(self) -> bytes: ...

    def leave(self) -> None: ...


class Relay:
    """A reply that follows a forward. Whoever receives it must `close` it, however the client's side went.

    `settle(relay, outcome_word)` is called once, at `close`; it records what this client got.
    """

    __slots__ = (
        "_ended", "_filter", "_seat", "_settle", "broken", "closed", "content_length", "dialect", "first_byte_s",
        "headers",
        "is_stream", "status",
    )  # fmt: skip

    def __init__(
        self,
        seat: Source,
        dialect: Dialect,
        status: int,
        headers: list[tuple[str, str]],
        content_length: int | None,
        stream_filter: StreamFilter | None,
        settle: Callable[[Relay, str], None],
    ) -> None:
        self.dialect = dialect
        self.status = status
        self.headers = headers
        self.content_length = content_length
        self.is_stream = stream_filter is not None
        self.first_byte_s: float | None = None
        self.broken: IbidError | None = None
        self.closed = False
        self._ended = False
        self._seat = seat
        self._filter = stream_filter
        self._settle = settle

    async def next(self) -> bytes:
        """Bytes for the client; b"" at the end. Raises UpstreamError where the upstream broke, also when a stream
        ended without its terminal marks: an SDK takes a silent end for success (protocols: commit rules)."""
        try:
            while piece := await self._seat.next():
                if self._filter is None or (piece := self._filter.feed(piece)):
                    return piece
            if self._filter is None or self._ended:
                return b""
            self._ended = True
            rest = self._filter.end()
            if not (self._filter.complete or self._filter.failed):
                message = "The upstream ended the stream before the answer was complete."
                raise UpstreamError(message, code="upstream_incomplete")
            return rest
        except UpstreamError as error:
            self.broken = error
            raise

    async def whole(self) -> bytes:
        """The complete body of an answer that is not a stream."""
        try:
            return await self._seat.whole()
        except UpstreamError as error:
            self.broken = error
            raise

    def saying(self, explanation: tuple[str, str]) -> Relay:
        """The same with one more header."""
        self.headers.append(explanation)
        return self

    def last_words(self, error: IbidError) -> bytes:
        """What tells the client in the stream that it broke; b"" where the dialect cannot say it."""
        return self.dialect.stream_error(error, after=-1 if self._filter is None else self._filter.number)

    def close(self, outcome: str) -> None:
        """`outcome`: "ok", "error" or "cancelled"."""
        if not self.closed:
            self.closed = True
            self._seat.leave()
            self._settle(self, outcome)
