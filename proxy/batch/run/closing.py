"""The end of a job: what nobody answered is reported, then the outputs are shown."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from proxy.batch.run.course import Course
from proxy.batch.run.endings import Endings
from proxy.batch.run.parts import Parts
from proxy.batch.run.questions import Questions
from proxy.batch.run.saving import Saver
from proxy.batch.workshop import new_name
from proxy.core.batches import BatchFile
from proxy.core.errors import BadRequest

OUTPUTS = ("output", "error")


@dataclass(frozen=True, slots=True)
class Closing:
    """`fail` or `finalize`, once."""

    course: Course
    questions: Questions
    saver: Saver
    endings: Endings
    parts: Parts

    async def fail(self, faults: list[dict[str, object]]) -> None:
        """A file that cannot be worked on."""
        job = self.course.job
        job.errors = faults
        job.total = 0
        job.reach("failed", self.course.now_ms())
        await self.saver.surely()

    async def finalize(self) -> None:
        course, job = self.course, self.course.job
        if course.asks_what_is_lost and course.bar is None:
            await asyncio.gather(*[self._ask_late(leader) for leader in self.questions.leaders])
        await self._report_what_is_left()
        now_ms = course.now_ms()
        job.reach("finalizing", now_ms)
        await self.saver.surely()  # no results are shown before all of them are there
        if job.dialect == "openai":
            await self._show_outputs(now_ms)
        job.reach(self._end, course.now_ms())
        await self.saver.surely()

    @property
    def _end(self) -> str:
        job = self.course.job
        if self.course.cancelling.is_set():
            return "cancelled"
        if self.parts.failed and not job.succeeded:
            return "failed"
        return "expired" if job.expired else "completed"

    async def _ask_late(self, number: int) -> None:
        """A call of its own for what a batch did not bring, at the ordinary price."""
        course, lines = self.course, self.course.shop.lines
        if course.ended[number] or number in self.questions.refused:
            return
        query = await self.questions.query(number)
        try:
            client, answered = await lines.let_in(query, course.job.path, course.headers, lambda _: not course.stopping)
        except BadRequest as refused:
            if not course.stopping:
                self.endings.refuse(number, query, refused)
            return
        if answered is None:
            try:
                async with course.shop.slots:
                    answered = await lines.ask(query, client)
            finally:
                lines.let_go(client)
        await self.endings.finish_all(number, query, answered)

    async def _report_what_is_left(self) -> None:
        state = "cancelled" if self.course.cancelling.is_set() else "expired"
        for leader in self.questions.leaders:
            for number in self.questions.alike(leader):
                if (refused := self.questions.refused.get(number)) is not None:
                    self.endings.finish(number, refused)
                else:
                    self.endings.lose(number, await self.questions.query(leader), state, None)

    async def _show_outputs(self, now_ms: int) -> None:
        job, store = self.course.job, self.course.shop.store
        sizes = {"output": job.output_bytes, "error": job.error_bytes}
        for part in OUTPUTS:
            name = f"{part}_file_id"
            if sizes[part] and not getattr(job, name):
                setattr(job, name, new_name("file-"))
        await self.saver.surely()
        for part in OUTPUTS:
            file_id = getattr(job, f"{part}_file_id")
            if file_id:
                filename = f"{job.id}_{part}.jsonl"
                file = BatchFile(
                    file_id, job.tenant, "batch_output", filename, sizes[part], now_ms, job.expires_ms, job.id, part
                )
                await store.begin_file(file)
                await store.end_file(file)
