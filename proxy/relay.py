"""What comes out of the pipeline: complete bytes, or the upstream's bytes as they arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from proxy.core.dialects.dialect import Dialect, StreamFilter
from proxy.core.errors import IbidError, UpstreamError
from proxy.core.pace import Schedule

HOLD_S = 0.05
"""How long the end of an answer waits for the end of its upstream call, which says what it cost. They come together
where a server closes what it has finished."""


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


class Ending(NamedTuple):
    """How a request ended for its client."""

    word: str = "ok"  # or "error", or "cancelled"
    status: int = 200
    first_byte_s: float | None = None  # time.perf_counter

    @staticmethod
    def of(cause: BaseException) -> Ending:
        """Of a request that got no reply."""
        return Ending("error" if isinstance(cause, Exception) else "cancelled", getattr(cause, "status", 499))


class Replay(NamedTuple):
    """A complete reply, status 200. Replays of one entry within one second share their head."""

    head: Head
    request_id: str
    body: bytes
    paced: Paced | None = None  # without it: at once

    def at_once(self) -> Replay:
        """The same for one who has it in one piece, settled."""
        if self.paced is not None:
            self.paced.settle(time.perf_counter(), "ok")
        return self._replace(paced=None)

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

    `settle` is called once, with how it ended; it records what this client got. That is before the client has the
    end of an answer that is whole, so that nothing answered is unrecorded, whatever happens next; else at `close`.
    """

    __slots__ = (
        "_broke_late", "_ended", "_filter", "_given_bytes", "_is_held", "_seat", "_settle", "broken", "closed",
        "content_length", "dialect", "first_byte_s", "headers", "is_stream", "status",
    )  # fmt: skip

    def __init__(
        self,
        seat: Source,
        dialect: Dialect,
        status: int,
        headers: list[tuple[str, str]],
        content_length: int | None,
        stream_filter: StreamFilter | None,
        settle: Callable[[Ending], None],
    ) -> None:
        self.dialect = dialect
        self.status = status
        self.headers = headers
        self.content_length = content_length
        self.is_stream = stream_filter is not None
        self.first_byte_s: float | None = None  # time.perf_counter, of what `next` gave
        self.broken: IbidError | None = None
        self.closed = False
        self._broke_late: UpstreamError | None = None
        self._ended = False
        self._given_bytes = 0
        self._is_held = False
        self._seat = seat
        self._filter = stream_filter
        self._settle = settle

    async def next(self) -> bytes:
        """Bytes for the client; b"" at the end. Raises UpstreamError where the upstream broke, also when a stream
        ended without its terminal marks: an SDK takes a silent end for success (protocols: commit rules)."""
        try:
            piece = await self._next()
        except UpstreamError as error:
            self.broken = error
            raise
        if self.first_byte_s is None and piece:
            self.first_byte_s = time.perf_counter()
        if not (self._is_held or self._ended) and self._is_whole(piece):
            self._is_held = True
            piece += await self._rest()
        return piece

    async def _next(self) -> bytes:
        if self._broke_late is not None:
            raise self._broke_late
        while piece := await self._seat.next():
            if self._filter is None or (piece := self._filter.feed(piece)):
                return piece
        rest = b""
        if self._filter is not None and not self._ended:
            rest = self._filter.end()
            if not (self._filter.complete or self._filter.failed):
                self._ended = True
                message = "The upstream ended the stream before the answer was complete."
                raise UpstreamError(message, code="upstream_incomplete")
        self._ended = True
        self.close("ok" if self.status < 400 else "error")
        return rest

    def _is_whole(self, piece: bytes) -> bool:
        """With this piece the client has all of the answer, though its upstream may go on."""
        if self._filter is not None:
            return self._filter.complete
        self._given_bytes += len(piece)
        return self._given_bytes == self.content_length

    async def _rest(self) -> bytes:
        """What else comes up to the upstream's end, or within HOLD_S."""
        rest = []
        try:
            async with asyncio.timeout(HOLD_S):
                while piece := await self._next():
                    rest.append(piece)
        except TimeoutError:
            pass
        except UpstreamError as error:
            self._broke_late = error
        return b"".join(rest)

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
        """What tells the client in the stream that it broke; b"" where the dialect cannot say it, or not there."""
        if self.is_within:
            return b""
        return self.dialect.stream_error(error, after=-1 if self._filter is None else self._filter.number)

    @property
    def is_within(self) -> bool:
        """What was given last ends inside an event."""
        return self._filter is not None and self._filter.is_within

    def close(self, outcome: str) -> None:
        """`outcome`: "ok", "error" or "cancelled"."""
        if not self.closed:
            self.closed = True
            self._seat.leave()
            self._settle(Ending(outcome, self.status, self.first_byte_s))
