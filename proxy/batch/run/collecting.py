"""Parts that are with providers: asked how far they are, and what they brought becomes the answers of lines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from proxy.batch.providers.provider import NoBatchApi, Progress, Refused, Result
from proxy.batch.run.aside import Aside
from proxy.batch.run.course import Course
from proxy.batch.run.endings import Endings
from proxy.batch.run.parts import Parts
from proxy.batch.run.questions import Questions
from proxy.batch.run.saving import Saver
from proxy.core.batches import ERRORS_SHOWN, Part
from proxy.core.errors import UpstreamError
from proxy.core.purges import Began

log = logging.getLogger(__name__)

LANDED_AT_ONCE = 32
BARRED_POLL_S = 2.0
GRACE_S = 7200  # after the window: a provider's own began a little later


@dataclass(frozen=True, slots=True)
class Collecting:
    """Follows parts until they have ended."""

    course: Course
    questions: Questions
    saver: Saver
    endings: Endings
    aside: Aside
    parts: Parts

    async def follow(self) -> None:
        """Poll until every part has ended, and collect what it brought."""
        course, told = self.course, False
        while running := self.parts.running:
            if course.stopping:
                return
            if not told and course.is_ending:
                told = True
                for part in running:
                    await _quietly(self.course.provider.cancel(part, course.headers))
            for part in running:
                await self._poll(part)
            if course.now_ms() > course.job.deadline_ms + GRACE_S * 1000:
                return
            if self.parts.running:
                poll_s = course.shop.poll_s
                await course.sleep(min(poll_s, BARRED_POLL_S) if course.barred.is_set() else poll_s, told=told)

    async def _poll(self, part: Part) -> None:
        try:
            progress = await self.course.provider.progress(part, self.course.headers)
            if progress.has_ended:
                await self._collect(part, progress)
        except (UpstreamError, Refused) as error:
            log.info("polling a batch failed", extra={"upstream": part.upstream, "cause": str(error)})
        except NoBatchApi:  # it knew the batch, and does not any more
            await self._end(part, Progress(True))

    async def _collect(self, part: Part, progress: Progress) -> None:
        wanted = self.parts.sent.get(part.number, set())
        results: list[Result] = []
        async for result in self.course.provider.results(part, self.course.headers, progress):
            if result.number in wanted and not self.course.ended[result.number]:
                results.append(result)
            if len(results) == LANDED_AT_ONCE:
                await self._land(results, part)
                results = []
        await self._land(results, part)
        await self._end(part, progress)
        await _quietly(self.course.provider.clean(part, self.course.headers, progress))

    async def _land(self, results: Sequence[Result], part: Part) -> None:
        """Side by side: their entries share commits."""
        distinct = {result.number: result for result in results}
        await asyncio.gather(*[self._land_one(result, part) for result in distinct.values()])
        await self.saver.has_room()

    async def _land_one(self, result: Result, part: Part) -> None:
        number = result.number
        query, client = await self.questions.query(number), self.course.client()
        if result.lost:
            if not self.course.asks_what_is_lost:
                self.endings.lose(number, query, result.lost, result.error)
            return
        if (held := self.aside.held.get(number)) is not None:  # it counts in the window it was sent in
            client = client._replace(request_id=held.request_id, ts_ms=part.created_ms)
        lookup = self.aside.lookups.pop(number, None)
        if lookup is None:
            lookup = await self.course.shop.lines.look_up(query, client)
        began = Began(part.purge, part.created_ms)
        answered = await self.course.shop.lines.landed(query, client, lookup, result.status, result.body, began)
        self.aside.free(number)
        await self.endings.finish_all(number, query, answered)

    async def _end(self, part: Part, progress: Progress) -> None:
        """Lines of which nothing came are reported as the provider ended them."""
        numbers = self.parts.sent.get(part.number, set())
        for number in numbers:
            self.aside.free(number)
        if not self.course.asks_what_is_lost:
            for number in sorted(numbers):
                if not self.course.ended[number]:
                    await self._lose(number, progress)
        part.state = "ended"
        self.saver.note(part)
        self.saver.wake()

    async def _lose(self, number: int, progress: Progress) -> None:
        job = self.course.job
        self.parts.failed = self.parts.failed or progress.lost == "error"
        error = dict(progress.error) if progress.error is not None else None
        if error is not None and len(job.errors) < ERRORS_SHOWN:
            job.errors = [*job.errors, {**error, "line": number + 1}]
        self.endings.lose(number, await self.questions.query(number), progress.lost, error)


async def _quietly(wish: Awaitable[None]) -> None:
    try:
        await wish
    except (UpstreamError, Refused, NoBatchApi) as error:
        log.info("a wish about a provider's batch failed", extra={"cause": str(error) or type(error).__name__})
