"""What a run has made and not yet committed: rows of lines, parts at providers, and those who wait for them.

What a line got is committed together with the counters of its job, and a line with those that repeat it, so a count
never runs ahead of its rows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from proxy.batch.run.course import Course
from proxy.batch.workshop import LEASE_S
from proxy.core.batches import LineRow, Part
from proxy.core.errors import CacheFault

log = logging.getLogger(__name__)

WAITING_ROWS = 2000


class Saver:
    """`keep_saving` beside the work; `surely` where it must not go on before."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._rows: list[LineRow] = []
        self._parts: list[Part] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._saving = asyncio.Lock()

    # -- what there is --------------------------------------------------------------------------------------------

    def end(self, number: int, state: str, result: bytes) -> None:
        """A line has ended."""
        self._course.ended[number] = 1
        self._course.job.count(state, len(result))
        self._rows.append(LineRow(number, state, None, result))
        self.wake()
        if len(self._rows) > WAITING_ROWS:
            self._room.clear()

    def send(self, numbers: Iterable[int], part: Part) -> None:
        """Lines go to a provider with a part."""
        self._rows += [LineRow(number, "sent", part.number) for number in numbers]
        self._parts.append(part)

    def note(self, part: Part) -> None:
        """A part is not what it was."""
        self._parts.append(part)

    def wake(self) -> None:
        self._wake.set()

    async def has_room(self) -> None:
        """Return when there are few enough rows for more to be made."""
        await self._room.wait()

    async def committed(self) -> None:
        """Return when what was made until now is committed."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    # -- committing it --------------------------------------------------------------------------------------------

    async def keep_saving(self) -> None:
        """Commit what there is, again and again: results within moments, the lease before it ends."""
        while True:
            try:
                async with asyncio.timeout(LEASE_S / 3):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._save()
            except CacheFault as fault:
                log.warning("a batch cannot be saved", extra={"reason": fault.code, "job": self._course.job.id})
                await asyncio.sleep(1.0)
                self._wake.set()

    async def surely(self) -> None:
        """Return when what there is, is committed, or this run is to stop."""
        while True:
            try:
                await self._save()
                return
            except CacheFault:
                if self._course.stopping:
                    raise
                await asyncio.sleep(1.0)

    async def _save(self) -> None:
        async with self._saving:
            rows, parts = self._rows, list({part.number: part for part in self._parts}.values())
            waiters = self._waiters
            self._rows, self._parts, self._waiters = [], [], []
            course, shop = self._course, self._course.shop
            try:
                status = await shop.store.save(course.job, rows, parts, shop.worker, shop.lease_ms())
            except BaseException:
                self._rows, self._parts, self._waiters = rows + self._rows, parts + self._parts, waiters + self._waiters
                raise
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._room.set()
            if status is None:  # another process has it, or it was deleted
                course.stopped.set()
                self.wake()
            elif status == "cancelling" and not course.job.is_ended:
                course.cancelling.set()
