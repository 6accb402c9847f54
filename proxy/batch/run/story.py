"""The life of one batch: read its file, answer from the cache, hand the rest in or ask for it, collect, write results.

A run can be broken off anywhere and taken up again by reading the file once more: rows say which lines have ended and
which are with a provider, everything else is looked up anew.

Work goes in rounds: look lines up, hand in or ask for what is left, collect. Lines that wait for another line's answer,
or for what others of this batch hold of their key's limits, are begun again in the next round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from proxy.batch.headers import RawHeaders
from proxy.batch.run.aside import Aside
from proxy.batch.run.asking import Asking
from proxy.batch.run.closing import Closing
from proxy.batch.run.collecting import Collecting
from proxy.batch.run.course import Course
from proxy.batch.run.endings import Endings
from proxy.batch.run.handing import Handing
from proxy.batch.run.parts import Parts
from proxy.batch.run.questions import Questions
from proxy.batch.run.saving import Saver
from proxy.batch.workshop import Workshop
from proxy.core.batches import Job


class Run:
    """One job being worked on by this process. Awaiting `go` works on it until it has ended or `stop` was called."""

    def __init__(self, shop: Workshop, job: Job, headers: RawHeaders) -> None:
        self.job = job
        self._course = course = Course(shop, job, headers)
        self._questions = questions = Questions(course)
        self._saver = saver = Saver(course)
        self._aside = aside = Aside(shop.lines)
        endings = Endings(course, questions, saver)
        self._parts = parts = Parts(course, questions, saver, aside)
        self._asking = Asking(course, questions, saver, endings, aside)
        self._handing = Handing(course, questions, saver, self._asking, aside, parts)
        self._collecting = Collecting(course, questions, saver, endings, aside, parts)
        self._closing = Closing(course, questions, saver, endings, parts)

    def cancel(self) -> None:
        """Begin nothing more, and end what providers have."""
        self._course.cancelling.set()

    def stop(self) -> None:
        """Begin nothing more; what is being asked ends."""
        self._course.stopped.set()
        self._saver.wake()

    async def go(self) -> None:
        """Raises an ExceptionGroup of CacheFault when the database cannot answer: it can be taken up again."""
        try:
            async with asyncio.TaskGroup() as group:  # a saver that breaks ends the work, whose workers wait for it
                beside = [group.create_task(self._saver.keep_saving())]
                if self.job.key_id:
                    beside.append(group.create_task(self._course.watch_key()))
                await self._work()
                for task in beside:
                    task.cancel()
        finally:
            self._aside.free_all()
        if self._course.stopping:
            await self._saver.surely()

    async def _work(self) -> None:
        if faults := await self._questions.read():
            await self._closing.fail(faults)
            return
        if self.job.status == "validating":
            self.job.reach("in_progress", self._course.now_ms())
        await self._go_rounds(await self._take_up())
        if not self._course.stopping:
            await self._closing.finalize()

    async def _take_up(self) -> list[int]:
        """Lines to begin with: all, or what an earlier run has left."""
        await self._parts.take_up()
        sent = self._parts.lines
        numbers = list(self._questions.left(sent))
        if numbers:
            await self._asking.choose_again(sorted(sent))
        await self._parts.find_lost()
        return numbers

    async def _go_rounds(self, numbers: Sequence[int]) -> None:
        asking = self._asking
        began_s = time.monotonic()
        await self._go_round(numbers)
        while asking.later and self._course.is_open:
            left_s = (self.job.deadline_ms - self._course.now_ms()) / 1000
            asking.asks_alone = left_s < 2 * (time.monotonic() - began_s)
            began_s = time.monotonic()
            numbers, asking.later = asking.later, []
            await self._go_round(numbers)

    async def _go_round(self, numbers: Sequence[int]) -> None:
        await self._asking.begin_all(numbers)
        await self._handing.hand_in_all()
        await self._collecting.follow()
