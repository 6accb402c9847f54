"""One upstream call, any number of readers.

A `Flight` is a forward in progress and the bytes it has delivered so far; a `Seat` is one client's place in it. There
is no producer task and no leader: whichever seat first needs bytes that are not there yet reads them from the
upstream, the others wait for it. If that seat's client leaves, its read is cancelled and a waiting seat takes over the
same upstream response. A client that is slow to take its bytes does not read, so when all are slow the upstream is
paused. When the last seat is left, `on_left` may take one to read on for nobody; else the upstream call is cut.

Opening is the one step that cannot change hands halfway, so it runs in a task of its own when the flight may be
shared, and is cancelled only when nobody waits for it any more.

Source of the rules: RFC 9211 §2.6 (`collapsed`); varnish's waiting list.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from proxy.core.errors import UpstreamError
from proxy.ports import UpstreamResponse

REPLAY_LIMIT_BYTES = 4 * 1024 * 1024  # beyond it a flight takes no more joiners and forgets what all have read

Context = TypeVar("Context")


class Flight(Generic[Context]):
    """`on_end` is called exactly once: when the body ended, failed, or was cut because the last seat was left.

    `context` is the caller's own record of what this forward is for.
    """

    def __init__(
        self,
        context: Context,
        open_: Callable[[], Awaitable[UpstreamResponse]],
        on_end: Callable[[Flight[Context]], None],
        *,
        shared: bool,
        on_left: Callable[[Flight[Context]], None] | None = None,
    ) -> None:
        self.context = context
        self.shared = shared
        self.pieces: list[bytes] = []
        self.arrived_s: list[float] = []  # of each piece until trimmed, time.perf_counter
        self.size_bytes = 0
        self.ended = False
        self.complete = False  # the body ended cleanly, at the transport's level
        self.error: UpstreamError | None = None
        self.trimmed = False
        self._open = open_
        self._on_end = on_end
        self._on_left = on_left
        self._response: UpstreamResponse | None = None
        self._opening: asyncio.Task[UpstreamResponse] | None = None
        self._seats: set[Seat[Context]] = set()
        self._reading = False
        self._waiters: list[asyncio.Future[None]] = []
        self._base = 0  # number of pieces dropped from the front

    @property
    def joinable(self) -> bool:
        """A late joiner can still have every byte, and the upstream has not failed."""
        return self.shared and not self.trimmed and self.error is None and (self.complete or not self.ended)

    @property
    def response(self) -> UpstreamResponse | None:
        """The response head, once it came."""
        return self._response

    @property
    def body(self) -> bytes:
        """All bytes so far; meaningless when trimmed."""
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)

    @property
    def is_delivered(self) -> bool:
        """The body ended cleanly, and a client was there to take it."""
        return self.complete and any([seat.is_client for seat in self._seats])

    def join(self, *, is_client: bool = True) -> Seat[Context]:
        seat = Seat(self, is_client)
        self._seats.add(seat)
        return seat

    async def head(self) -> UpstreamResponse:
        """Wait for the response head. Raises UpstreamError, to every seat alike."""
        if self._response is None:
            if self.error is not None:
                raise self.error
            try:
                if self.shared:
                    if self._opening is None:
                        self._opening = asyncio.ensure_future(self._open())
                    self._response = await asyncio.shield(self._opening)
                else:
                    self._response = await self._open()
            except UpstreamError as error:
                self._end(error)
                raise
        return self._response

    async def next_for(self, seat: Seat[Context]) -> bytes:
        while True:
            position = seat.position - self._base
            if position < len(self.pieces):
                seat.position = self._base + len(self.pieces)
                waiting = self.pieces[position:] if position else self.pieces
                piece = waiting[0] if len(waiting) == 1 else b"".join(waiting)
                if self.trimmed:
                    self._trim()
                return piece
            if self.ended:
                if self.error is not None:
                    raise self.error
                return b""
            if self._reading:
                await self._wait()
            elif self._response is None:
                await self.head()  # while this one waited, another seat may have begun to read: look again
            else:
                await self._advance(self._response)

    async def _advance(self, response: UpstreamResponse) -> None:
        self._reading = True
        try:
            piece = await response.read_some()
        except UpstreamError as error:
            self._end(error)
            return
        finally:
            self._reading = False
            if self._waiters:
                self._wake()
        if piece:
            self.pieces.append(piece)
            if not self.trimmed:
                self.arrived_s.append(time.perf_counter())
            self.size_bytes += len(piece)
            if self.size_bytes > REPLAY_LIMIT_BYTES:
                self.trimmed = True
        else:
            self.complete = True
            self._end(None)

    @property
    def held_bytes(self) -> int:
        return sum(map(len, self.pieces))

    def forget(self) -> None:
        """Keep only what a seat has not read yet, from now on: nobody joins any more, and it cannot be stored."""
        self.trimmed = True
        self.arrived_s.clear()
        self._trim()

    def cut(self, error: UpstreamError) -> None:
        """End it for every seat, without what they have not read yet. Only once its head has come."""
        self.trimmed = True
        self.pieces.clear()
        self._end(error)

    def leave(self, seat: Seat[Context]) -> None:
        self._seats.discard(seat)
        if not self._seats and not self.ended:
            if self._on_left is not None:
                self._on_left(self)
            if not self._seats:
                self._end(None)

    def _trim(self) -> None:
        slowest = min(seat.position for seat in self._seats)
        if slowest > self._base:
            del self.pieces[: slowest - self._base]
            self._base = slowest

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _end(self, error: UpstreamError | None) -> None:
        if self.ended:
            return
        self.ended = True
        self.error = error
        if self._response is None:
            opening = self._opening
            if opening is not None and not opening.cancel() and not opening.cancelled() and opening.exception() is None:
                opening.result().abort()  # the head came in the turn in which the last seat was left
        elif self.complete:
            self._response.release()
        else:
            self._response.abort()
        self._wake()
        self._on_end(self)


class Seat(Generic[Context]):
    """A place in a flight, a client's or that of whoever reads on for none. Whoever joins must `leave`, whatever
    happens in between."""

    __slots__ = ("_first", "flight", "is_client", "position")

    def __init__(self, flight: Flight[Context], is_client: bool = True) -> None:
        self.flight = flight
        self.is_client = is_client
        self.position = 0
        self._first = b""

    async def next(self) -> bytes:
        """The bytes this client has not had yet; b"" at a clean end. Raises UpstreamError where the body broke."""
        if self._first:
            piece, self._first = self._first, b""
            return piece
        return await self.flight.next_for(self)

    async def peek(self) -> bytes:
        """The first bytes, which `next` gives again. Raises UpstreamError where the body broke."""
        self._first = self._first or await self.flight.next_for(self)
        return self._first

    async def whole(self) -> bytes:
        """The complete body. Raises UpstreamError where it broke."""
        parts = []
        while piece := await self.next():
            parts.append(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def leave(self) -> None:
        self.flight.leave(self)
