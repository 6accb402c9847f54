"""A turn for each request, and a bounded queue for those who wait for theirs."""

from __future__ import annotations

import asyncio
from collections import deque

from proxy.core.errors import Busy


class Admission:
    """A bound on requests in flight, with a bounded queue behind it. Not for threads.

    The usual way in is one comparison: `if not admission.try_enter(): await admission.enter()`. Every way in is paired
    with one `leave`. While `is_shut` nobody new gets in.
    """

    __slots__ = ("_free", "_queue", "_queue_limit", "_timeout_s", "is_shut")

    def __init__(self, in_flight: int, queued: int, timeout_s: float) -> None:
        self.is_shut = False
        self._free = in_flight
        self._queue_limit = queued
        self._timeout_s = timeout_s
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> int:
        return self._free

    def try_enter(self) -> bool:
        if self._free > 0 and not self.is_shut:
            self._free -= 1
            return True
        return False

    async def enter(self) -> None:
        """First come, first served. Raises Busy at once when the queue is full, and after `timeout_s` in it."""
        if self.try_enter():
            return
        if self.is_shut:
            raise Busy("Memory is short.")
        if len(self._queue) >= self._queue_limit:
            raise Busy("Too many requests in flight.")
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout(self._timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.leave()  # the place was given in the same moment
            elif turn in self._queue:
                self._queue.remove(turn)
            if isinstance(error, TimeoutError):
                raise Busy("Too many requests in flight: waited too long for a place.") from None
            raise

    def leave(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
