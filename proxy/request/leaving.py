"""What becomes of an upstream call that every client has left: it is cut, or read to its end and stored.

A provider bills what it has generated, whether anyone reads it or not. Cutting saves what is not generated yet;
finishing pays for it and keeps an answer that the next one who asks would pay for whole. What is being finished can
be joined: a client that comes back has every byte. How long an answer will be is not known, so "half" is half of the
mean of those that came whole from the same model in the same form.
"""

from __future__ import annotations

import logging
from typing import Literal

from proxy.core.errors import UpstreamError
from proxy.core.query import Query
from proxy.records import Fetch
from proxy.request.collapse import Flight, Seat
from proxy.tasks import Tasks

log = logging.getLogger(__name__)

OnLeave = Literal["abort", "finish", "finish_half"]

FINISHING_MAX = 256  # calls without a client at once; beyond it they are cut
SAMPLES_MIN = 3
SAMPLES_MAX = 100  # how many count: then the mean moves with the traffic
LENGTHS_KEPT = 1024


class Finisher:
    """Takes the seat of the last client that leaves. `tasks` are its own: closing them is the end of all it reads."""

    def __init__(self, on_leave: OnLeave, tasks: Tasks, answer_limit_bytes: int) -> None:
        self._on_leave = on_leave
        self._tasks = tasks
        self._answer_limit_bytes = answer_limit_bytes
        self._lengths: dict[tuple[str, ...], tuple[int, float]] = {}  # samples, mean bytes; oldest out first

    def left(self, flight: Flight[Fetch]) -> None:
        """Nobody reads this flight any more: join it, or let it be cut."""
        if self._on_leave == "abort" or not self._may_be_stored(flight):
            return
        if self._tasks.closed or len(self._tasks) >= FINISHING_MAX:
            return
        if self._on_leave == "finish" or self._is_half(flight):
            _ = self._tasks.spawn(self._finish(flight, flight.join(is_client=False)), "finish")

    def landed(self, flight: Flight[Fetch]) -> None:
        """Learn how long answers are."""
        if self._on_leave != "finish_half" or flight.context.answer is None:
            return
        kind = _kind(flight.context.query)
        count, mean = self._lengths.pop(kind, (0, 0.0))
        count = min(count + 1, SAMPLES_MAX)
        self._lengths[kind] = count, mean + (flight.size_bytes - mean) / count
        if len(self._lengths) > LENGTHS_KEPT:
            del self._lengths[next(iter(self._lengths))]

    def _may_be_stored(self, flight: Flight[Fetch]) -> bool:
        fetch, response = flight.context, flight.response
        is_other = fetch.stand_in or (fetch.attempt is not None and fetch.attempt.sending.is_other)
        return (
            flight.shared
            and not flight.trimmed
            and fetch.query.controls.write
            and not is_other
            and flight.size_bytes <= self._answer_limit_bytes
            and (response is None or response.status == 200)
        )

    def _is_half(self, flight: Flight[Fetch]) -> bool:
        count, mean = self._lengths.get(_kind(flight.context.query), (0, 0.0))
        return count >= SAMPLES_MIN and flight.size_bytes >= mean / 2

    async def _finish(self, flight: Flight[Fetch], seat: Seat[Fetch]) -> None:
        try:
            while await seat.next() and self._may_be_stored(flight):
                pass
        except UpstreamError as error:
            log.debug("a call nobody waited for failed: %s", error.code)
        finally:
            seat.leave()


def _kind(query: Query) -> tuple[str, ...]:
    return query.upstream, query.model, query.dialect.name, query.dialect.operation, str(query.stream)
