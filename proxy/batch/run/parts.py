"""Parts of a batch that are with providers, and what rows say of those of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.batch.providers.provider import NoBatchApi, Refused
from proxy.batch.run.aside import Aside
from proxy.batch.run.course import Course
from proxy.batch.run.questions import Questions
from proxy.batch.run.saving import Saver
from proxy.core.batches import Part
from proxy.core.errors import UpstreamError


class Parts:
    """Which there are, and which lines each has."""

    def __init__(self, course: Course, questions: Questions, saver: Saver, aside: Aside) -> None:
        self.all: list[Part] = []
        self.sent: dict[int, set[int]] = {}  # numbers of lines, by part
        self.failed = False  # one of them brought errors where answers were due
        self._course = course
        self._questions = questions
        self._saver = saver
        self._aside = aside

    @property
    def running(self) -> list[Part]:
        return [part for part in self.all if part.state == "running"]

    @property
    def lines(self) -> set[int]:
        """Every line that a provider has."""
        return set().union(*self.sent.values())

    def tag(self, part: int) -> str:
        """What names a part at its provider; of one length for any part below 1000."""
        return f"ibid-{self._course.job.id[-12:]}-{part:03d}"

    def begin(self, part: Part, numbers: Sequence[int]) -> None:
        self.all.append(part)
        self.sent[part.number] = set(numbers)
        self._saver.send(numbers, part)

    # -- of an earlier run ----------------------------------------------------------------------------------------

    async def take_up(self) -> None:
        """What rows say: which lines have ended, which are with a provider, and what those hold of their key's
        limits."""
        job, store = self._course.job, self._course.shop.store
        self.all = list(await store.parts(job.id))
        ended = {part.number for part in self.all if part.state == "ended"}
        for number, state, part in await store.states(job.id):
            if state != "sent":
                self._course.ended[number] = 1
            elif part is not None and part not in ended:
                self.sent.setdefault(part, set()).add(number)
        if job.key_id:
            for one in self.all:
                for number in self.sent.get(one.number, ()):
                    await self._hold_again(number, one)

    async def _hold_again(self, number: int, part: Part) -> None:
        """Set aside what a line may take that a provider has had since before this process."""
        if number not in self._questions.refused:
            client = self._aside.held[number] = self._course.client()._replace(ts_ms=part.created_ms)
            keys = self._course.shop.lines.keys
            keys.hold_again(await self._questions.query(number), client.request_id, client.ts_ms)

    async def find_lost(self) -> None:
        """Parts whose creation was not confirmed before a crash."""
        for part in self.all:
            if part.state != "creating":
                continue
            try:
                part.provider_id = await self._course.provider.find(part, self._course.headers, self.tag(part.number))
            except (UpstreamError, Refused, NoBatchApi):
                part.provider_id = ""
            if part.provider_id:
                part.state = "running"
            else:
                part.state = "ended"
                self._aside.add((part.upstream, part.model), sorted(self.sent.pop(part.number, ())))
            self._saver.note(part)
