"""How a line ends: with an answer, with a refusal, or with what is said of it when nobody answered."""

from __future__ import annotations

import asyncio

import orjson

from proxy.batch.lines import Answered, new_id, refusal
from proxy.batch.run.course import Course
from proxy.batch.run.questions import Questions
from proxy.batch.run.saving import Saver
from proxy.core.batches import LOST, anthropic_loss, anthropic_result, openai_loss, openai_result, spell_reply
from proxy.core.errors import BadRequest
from proxy.core.query import Query

SLICE = 16  # answers made before the loop gets its turn


class Endings:
    """Makes the row of every line."""

    def __init__(self, course: Course, questions: Questions, saver: Saver) -> None:
        self._course = course
        self._lines = course.shop.lines
        self._questions = questions
        self._saver = saver
        self._repeating = asyncio.Lock()

    async def finish_all(self, number: int, query: Query, answered: Answered) -> None:
        """A leader's answer, for itself and for those that repeat it."""
        left = list(self._questions.repeats(number))
        made = [(number, answered)]
        if left:
            async with self._repeating:
                repeat = self._lines.repeater(query, answered)
                for follower in left:
                    made.append((follower, repeat(self._course.client())))
                    if len(made) % SLICE == 0:
                        await asyncio.sleep(0)
        for one in made:  # in one step, so that they are committed together
            self.finish(*one)

    def finish(self, number: int, answered: Answered) -> None:
        name, status, body = self._questions.names[number], answered.status, answered.body
        match self._course.job.dialect:
            case "openai":
                result = openai_result(name, answered.request_id, status, body)
            case "anthropic":
                result = anthropic_result(name, status, body)
            case _:
                result = spell_reply(status, answered.headers, body)
        self._end(number, "ok" if answered.is_ok else "error", result)

    def refuse(self, number: int, query: Query, refused: BadRequest) -> None:
        """A line that its key does not let in, and those that repeat it."""
        for n in self._questions.alike(number):
            self.finish(n, refusal(query.dialect, new_id(), refused))

    def lose(self, number: int, query: Query, state: str, error: object) -> None:
        """A line without an answer, and those that repeat it."""
        if self._course.bar is not None and state != "error" and not self._course.cancelling.is_set():
            self.refuse(number, query, self._course.bar)
            return
        for n in self._questions.alike(number):
            client = self._course.client()
            self._lines.lost(query, client, "cancelled" if state == "cancelled" else "error", 0)
            self._end(n, state, self._spell_loss(n, client.request_id, state, error))

    def _spell_loss(self, number: int, token: str, state: str, error: object) -> bytes:
        job, name = self._course.job, self._questions.names[number]
        code, message = LOST.get(state, ("batch_failed", "The provider did not answer this request."))
        said = orjson.dumps(error if isinstance(error, dict) else {"code": code, "message": message})
        match job.dialect:
            case "openai":
                return openai_loss(name, token, said)
            case "anthropic" if state in LOST:
                return anthropic_loss(name, state)
        refused = BadRequest(message, status=504 if state == "expired" else 502, code=code)
        answered = refusal(self._course.shop.dialect_of(job.path), token, refused)
        if job.dialect == "anthropic":
            return anthropic_result(name, answered.status, answered.body)
        return spell_reply(answered.status, answered.headers, answered.body)

    def _end(self, number: int, state: str, result: bytes) -> None:
        self._saver.end(number, state, result)
        self._questions.forget(number)
