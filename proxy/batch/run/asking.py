"""Lines that begin: answered by the cache, put off until another's answer is there, set aside for a batch of the
provider's, or asked for by an ordinary call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

from proxy.batch.lines import Answered
from proxy.batch.near import Alike
from proxy.batch.run.aside import LOOKUPS, Aside
from proxy.batch.run.course import Course
from proxy.batch.run.endings import Endings
from proxy.batch.run.questions import Questions
from proxy.batch.run.saving import Saver
from proxy.core.errors import BadRequest
from proxy.core.query import Query
from proxy.records import Client, Lookup

STORED_S, STORED_POLL_S = 5.0, 0.01


class Asking:
    """Begins lines, on a bounded number of workers. What cannot begin now is left in `later`."""

    def __init__(self, course: Course, questions: Questions, saver: Saver, endings: Endings, aside: Aside) -> None:
        self.later: list[int] = []  # for the next round
        self.asks_alone = False  # there is no time for another batch of the provider's
        self._course = course
        self._shop = course.shop
        self._lines = course.shop.lines
        self._questions = questions
        self._saver = saver
        self._endings = endings
        self._aside = aside
        self._alike = Alike(course.shop.lines.pipeline)
        self._waits_for: dict[int, Query] = {}  # by number: the line whose answer may serve it
        self._round = 0

    async def choose_again(self, sent: Sequence[int]) -> None:
        """Look up lines that a provider has, as their answers need it anyway: others may wait for them."""
        for number in sent[:LOOKUPS]:
            if not self._course.is_open:
                return
            if number in self._questions.refused or not self._alike.takes(query := await self._questions.query(number)):
                continue
            found = await self._lines.look_up(query, self._course.client())
            self._aside.remember(number, found)
            if found.vector is not None and found.signature is not None:
                self._alike.choose(number, query, found.vector, found.signature)

    async def begin_all(self, numbers: Sequence[int]) -> None:
        """One round."""

        async def step(number: int) -> None:
            await self._saver.has_room()
            await self._begin(number)

        self._round += 1
        await self._side_by_side(iter(numbers), step)

    async def ask_all(self, numbers: Sequence[int]) -> None:
        """Every line by a call of its own."""

        async def step(number: int) -> None:
            await self._ask(number, await self._questions.query(number))

        await self._side_by_side(iter(numbers), step)

    async def _side_by_side(self, numbers: Iterator[int], step: Callable[[int], Awaitable[None]]) -> None:
        """Every line on one of a bounded number of workers; the first failure ends them all."""

        async def work() -> None:
            for number in numbers:
                if not self._course.is_open:
                    return
                await step(number)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._shop.concurrency):
                group.create_task(work())

    # -- one line -------------------------------------------------------------------------------------------------

    async def _begin(self, number: int, query: Query | None = None) -> None:
        """Answer a line, and those that repeat it. `query` is that of its leader, when it is not one itself."""
        if (refused := self._questions.refused.get(number)) is not None:
            self._endings.finish(number, refused)
            return
        query = query or await self._questions.query(number)
        if (first := self._waits_for.pop(number, None)) is not None:
            await self._is_stored(first)
        if self.asks_alone or self._shop.offers.known(query.upstream) is False or query.controls.only_if_cached:
            if not await self._is_put_off(number, query, None):
                await self._ask(number, query)
            return
        found: Answered | Lookup | None
        client, found = await self._let_in(number, query)
        if client is None:
            return
        try:
            if found is None:
                found = await self._lines.find(query, client)
            if isinstance(found, Answered):
                await self._finish_cached(number, query, found)
                return
            if await self._is_put_off(number, query, found):
                return
            if await self._shop.offers.probe(query.upstream, self._course.job.path, self._course.headers):
                self._set_aside(number, query, found, client)
                return
        finally:
            if number not in self._aside.held:
                self._lines.let_go(client)
        await self._ask(number, query)

    async def _finish_cached(self, number: int, query: Query, found: Answered) -> None:
        self._endings.finish(number, found)
        for follower in self._questions.repeats(number):
            await self._begin(follower, query)
        await asyncio.sleep(0)

    def _set_aside(self, number: int, query: Query, found: Lookup, client: Client) -> None:
        """For a batch of the provider's."""
        model = query.model if self._course.provider.is_per_model else ""
        self._aside.add((query.upstream, model), [number])
        self._aside.remember(number, found)
        if query.key_id is not None:
            self._aside.held[number] = client

    async def _ask(self, number: int, query: Query) -> None:
        client, answered = self._aside.held.pop(number, None), None
        if client is None:
            client, answered = await self._let_in(number, query)
        if client is None:
            return
        if answered is not None:
            await self._finish_cached(number, query, answered)
            return
        try:
            async with self._shop.slots:
                if not self._course.is_open:
                    return
                answered = await self._lines.ask(query, client, self._course.job.deadline_ms / 1000)
        finally:
            self._lines.let_go(client)
        await self._endings.finish_all(number, query, answered)
        await self._saver.committed()  # so that a crash costs no more calls than there are workers

    # -- what it has to wait for ----------------------------------------------------------------------------------

    async def _let_in(self, number: int, query: Query) -> tuple[Client, Answered | None] | tuple[None, None]:
        """Who may ask for a line, or has its answer; nobody, where its key does not let it in or not now."""

        def may_wait(refused: BadRequest) -> bool:  # not for what this batch itself holds until a later round
            is_held = (refused.retry_after_s or 0) <= 1
            return self._course.is_open and not (is_held and self._aside.held)

        try:
            return await self._lines.let_in(query, self._course.job.path, self._course.headers, may_wait)
        except BadRequest as refused:
            if refused.should_retry:
                self.later.append(number)
            else:
                self._endings.refuse(number, query, refused)
        return None, None

    async def _is_put_off(self, number: int, query: Query, found: Lookup | None) -> bool:
        """Whether a line waits for another one's answer, which may serve it. In the first round only: what then is not
        served is sent. `found`: what a lookup saw of it."""
        if self._round > 1 or not self._alike.takes(query):
            return False
        if found is None:
            await self._lines.model_is_free()
            meaning = await self._alike.meaning(query)
        elif found.vector is None or found.signature is None:
            meaning = None
        else:
            meaning = found.vector, found.signature
        if meaning is None or (first := await self._alike.earlier(number, query, *meaning)) is None:
            return False
        if self._course.ended[first[0]]:
            await self._is_stored(first[1])
            return False
        self._waits_for[number] = first[1]
        self.later.append(number)
        return True

    async def _is_stored(self, first: Query) -> None:
        """Return when what an ended call brought can be found, or after STORED_S."""
        flights = self._lines.pipeline.flights
        for _ in range(int(STORED_S / STORED_POLL_S)):
            if first.fingerprint not in flights:
                return
            await asyncio.sleep(STORED_POLL_S)
