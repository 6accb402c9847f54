"""What becomes of an upstream call that every client has left: it is cut, or read to its end and stored.

A provider bills what it has generated, whether anyone reads it or not. Cutting saves what is not generated yet;
finishing pays for it and keeps an answer that the next one who asks would pay for whole. What is being finished can
be joined: a client that comes back has every byte. How long an answer will be is not known, so "half" is half of the
mean of those that came whole from the same model in the same form.

A client whose own read timeout ended is not gone: its library tries again within seconds, and would pay for the same
answer twice. Its call is read on for as long as that takes, whatever is said of other calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Literal

from proxy.core.errors import UpstreamError
from proxy.core.model import Level
from proxy.core.query import Query
from proxy.lanes.patience import read_timeout_s
from proxy.records import Fetch
from proxy.request.collapse import Flight, Seat
from proxy.tasks import Tasks

log = logging.getLogger(__name__)

OnLeave = Literal["abort", "finish", "finish_half"]

AWAITED_S = 10.0  # the SDKs wait 8 s at most before they try again
NEARLY = 0.9  # of a timeout: its clock began a little later than ours, or ended earlier
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
        if self._tasks.closed or len(self._tasks) >= FINISHING_MAX:
            return
        if self._may_be_finished(flight):
            _ = self._tasks.spawn(self._finish(flight, flight.join(is_client=False)), "finish")
        elif _is_tried_again(flight):
            flight.context.was_awaited = True
            _ = self._tasks.spawn(self._await_retry(flight.join(is_client=False)), "await retry")

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

    def _may_be_finished(self, flight: Flight[Fetch]) -> bool:
        if self._on_leave == "abort" or not self._may_be_stored(flight):
            return False
        return self._on_leave == "finish" or self._is_half(flight)

    def _may_be_stored(self, flight: Flight[Fetch]) -> bool:
        fetch, response = flight.context, flight.response
        is_other = fetch.stand_in or (fetch.attempt is not None and fetch.attempt.sending.is_other)
        return (
            flight.shared
            and fetch.query.eligibility.level is not Level.NONE
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

    async def _await_retry(self, seat: Seat[Fetch]) -> None:
        """Read on for the client that will be back."""
        try:
            async with asyncio.timeout(AWAITED_S):
                while await seat.next():
                    pass
        except (UpstreamError, TimeoutError):
            log.debug("nobody came back for a call")
        finally:
            seat.leave()


def _is_tried_again(flight: Flight[Fetch]) -> bool:
    """Whether its client's own time was over without a byte: its library comes back at once, for the same."""
    fetch = flight.context
    timeout_s = read_timeout_s(fetch.client) if fetch.client.tries_again else None
    if timeout_s is None or fetch.was_awaited or flight.trimmed or not flight.shared:
        return False
    last_s = flight.arrived_s[-1] if flight.arrived_s else fetch.client.started_s
    return time.perf_counter() - last_s >= timeout_s * NEARLY


def _kind(query: Query) -> tuple[str, ...]:
    return query.upstream, query.model, query.dialect.name, query.dialect.operation, str(query.stream)
