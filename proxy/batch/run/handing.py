"""Lines that were set aside are handed in at their providers, in batches these can take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from proxy.batch.providers.provider import PART_LIMIT_BYTES, Handed, NoBatchApi, Refused
from proxy.batch.run.aside import Aside
from proxy.batch.run.asking import Asking
from proxy.batch.run.course import Course
from proxy.batch.run.parts import Parts
from proxy.batch.run.questions import Questions
from proxy.batch.run.saving import Saver
from proxy.core.batches import Part
from proxy.core.errors import UpstreamError

log = logging.getLogger(__name__)

SUBMISSIONS = 6


@dataclass(frozen=True, slots=True)
class Handing:
    """Makes parts of what is pending. What no provider takes is asked for."""

    course: Course
    questions: Questions
    saver: Saver
    asking: Asking
    aside: Aside
    parts: Parts

    async def hand_in_all(self) -> None:
        for (upstream, model), numbers in self.aside.pending.items():
            async for group in self._groups(numbers):
                if not self.course.is_open:
                    return
                await self._hand_in(upstream, model, *group)
        self.aside.pending.clear()

    async def _groups(self, numbers: Sequence[int]) -> AsyncIterator[tuple[list[int], int]]:
        """Lines that fit into one batch of the provider's, and their bytes as they are sent."""
        group: list[int] = []
        size = 0
        for number in numbers:
            own = await self._size(number)
            if group and (len(group) == self.course.provider.limit or size + own > PART_LIMIT_BYTES):
                yield group, size
                group, size = [], 0
                own = await self._size(number)
            group.append(number)
            size += own
            if number % 64 == 0:
                await asyncio.sleep(0)
        if group:
            yield group, size

    async def _size(self, number: int) -> int:
        """Bytes of a line in the next part."""
        tag = self.parts.tag(len(self.parts.all))
        body = (await self.questions.query(number)).forward_body
        return len(body) + self.course.provider.overhead(tag, self.course.job.path, number)

    async def _hand_in(self, upstream: str, model: str, numbers: list[int], size_bytes: int) -> None:
        purge, now_ms = self.course.shop.lines.pipeline.entries.began(self.course.client()).purge, self.course.now_ms()
        number = len(self.parts.all)
        part = Part(number, upstream, model, lines=len(numbers), created_ms=now_ms, purge=purge)
        pause_s = self.course.shop.poll_s
        for attempt in range(SUBMISSIONS):
            outcome = await self._try(part, numbers, size_bytes)
            if outcome == "taken":
                return
            if outcome == "never" or attempt + 1 == SUBMISSIONS or not self.course.is_open:
                break
            await self.course.sleep(pause_s, told=False)
            pause_s *= 2
        if self.course.is_open:
            await self._withdraw(part, numbers)

    async def _try(self, part: Part, numbers: list[int], size_bytes: int) -> Literal["taken", "not now", "never"]:
        """Rows say where lines go before the provider is told, so that after a crash they are not sent twice."""
        upstream, headers = part.upstream, self.course.headers
        try:
            if not part.input_file_id:
                part.input_file_id = await self.course.provider.upload(
                    upstream, headers, self._handed(part, numbers, size_bytes)
                )
            if not self.parts.sent.get(part.number):
                self.parts.begin(part, numbers)
                await self.saver.surely()
            handed = self._handed(part, numbers, size_bytes)
            part.provider_id = await self.course.provider.create(upstream, headers, handed, part.input_file_id)
            part.state = "running"
            self.saver.note(part)
            await self.saver.surely()
            return "taken"
        except NoBatchApi:
            self.course.shop.offers.remember_none(upstream)
            return "never"
        except Refused as refused:
            if refused.status not in (408, 409, 429) and refused.status < 500:
                log.warning("a provider refuses a batch", extra={"upstream": upstream, "status": refused.status})
                return "never"
        except UpstreamError as error:
            log.info("handing in a batch failed", extra={"upstream": upstream, "reason": error.code})
        return "not now"

    def _handed(self, part: Part, numbers: Sequence[int], size_bytes: int) -> Handed:
        async def bodies() -> AsyncIterator[tuple[int, bytes]]:
            for number in numbers:
                yield number, (await self.questions.query(number)).forward_body

        return Handed(self.parts.tag(part.number), self.course.job.path, bodies(), size_bytes)

    async def _withdraw(self, part: Part, numbers: Sequence[int]) -> None:
        """The provider does not take it: every line is asked for alone."""
        if self.parts.sent.pop(part.number, None):
            part.state = "ended"
            self.saver.note(part)
        await self.asking.ask_all([number for number in numbers if not self.course.ended[number]])
