"""The end of a job: what nobody answered is reported, then the outputs are shown."""

from __future__ import annotations

import asyncio

from proxy.batch.run.course import Course
from proxy.batch.run.endings import Endings
from proxy.batch.run.parts import Parts
from proxy.batch.run.questions import Questions
from proxy.batch.run.saving import Saver
from proxy.batch.workshop import new_name
from proxy.core.batches import BatchFile
from proxy.core.errors import BadRequest

OUTPUTS = ("output", "error")


class Closing:
    """`fail` or `finalize`, once."""

    def __init__(self, course: Course, questions: Questions, saver: Saver, endings: Endings, parts: Parts) -> None:
        self._course = course
        self._questions = questions
        self._saver = saver
        self._endings = endings
        self._parts = parts

    async def fail(self, faults: list[dict[str, object]]) -> None:
        """A file that cannot be worked on."""
        job = self._course.job
        job.errors = faults
        job.total = 0
        job.reach("failed", self._course.now_ms())
        await self._saver.surely()

    async def finalize(self) -> None:
        course, job = self._course, self._course.job
        if course.asks_what_is_lost and course.bar is None:
            await asyncio.gather(*[self._ask_late(leader) for leader in self._questions.leaders])
        await self._report_what_is_left()
        now_ms = course.now_ms()
        job.reach("finalizing", now_ms)
        await self._saver.surely()  # no results are shown before all of them are there
        if job.dialect == "openai":
            await self._show_outputs(now_ms)
        job.reach(self._end, course.now_ms())
        await self._saver.surely()

    @property
    def _end(self) -> str:
        job = self._course.job
        if self._course.cancelling.is_set():
            return "cancelled"
        if self._parts.failed and not job.succeeded:
            return "failed"
        return "expired" if job.expired else "completed"

    async def _ask_late(self, number: int) -> None:
        """A call of its own for what a batch did not bring, at the ordinary price."""
        course, lines = self._course, self._course.shop.lines
        if course.ended[number] or number in self._questions.refused:
            return
        query = await self._questions.query(number)
        try:
            client, answered = await lines.let_in(query, course.job.path, course.headers, lambda _: not course.stopping)
        except BadRequest as refused:
            if not course.stopping:
                self._endings.refuse(number, query, refused)
            return
        if answered is None:
            try:
                async with course.shop.slots:
                    answered = await lines.ask(query, client)
            finally:
                lines.let_go(client)
        await self._endings.finish_all(number, query, answered)

    async def _report_what_is_left(self) -> None:
        state = "cancelled" if self._course.cancelling.is_set() else "expired"
        for leader in self._questions.leaders:
            for number in self._questions.alike(leader):
                if (refused := self._questions.refused.get(number)) is not None:
                    self._endings.finish(number, refused)
                else:
                    self._endings.lose(number, await self._questions.query(leader), state, None)

    async def _show_outputs(self, now_ms: int) -> None:
        job, store = self._course.job, self._course.shop.store
        sizes = {"output": job.output_bytes, "error": job.error_bytes}
        for part in OUTPUTS:
            name = f"{part}_file_id"
            if sizes[part] and not getattr(job, name):
                setattr(job, name, new_name("file-"))
        await self._saver.surely()
        for part in OUTPUTS:
            file_id = getattr(job, f"{part}_file_id")
            if file_id:
                filename = f"{job.id}_{part}.jsonl"
                file = BatchFile(
                    file_id, job.tenant, "batch_output", filename, sizes[part], now_ms, job.expires_ms, job.id, part
                )
                await store.begin_file(file)
                await store.end_file(file)
