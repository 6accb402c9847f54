"""The life of one batch: read its file, answer from the cache, hand the rest in or ask for it, collect, write results.

A run can be broken off anywhere and taken up again by reading the file once more: rows say which lines have ended and
which are with a provider, everything else is looked up anew. What a line got is committed together with the counters of
its job, and a line with those that repeat it, so a count never runs ahead of its rows.

Lines of one fingerprint are one question. The first of them is its leader: it alone is looked up and sent, the others
get its answer with ids of their own.

Work goes in rounds: look lines up, hand in or ask for what is left, collect. Lines that wait for another line's answer,
or for what others of this batch hold of their key's limits, are begun again in the next round.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

import orjson

from proxy.batch.files import LineFile
from proxy.batch.lines import Answered, refusal
from proxy.batch.near import Alike
from proxy.batch.providers import PART_LIMIT_BYTES, Handed, NoBatchApi, Progress, Refused, Result
from proxy.core.batches import (
    EMPTY,
    ERRORS_SHOWN,
    LOST,
    BatchFile,
    Job,
    Line,
    LineFault,
    LineRow,
    Part,
    anthropic_loss,
    anthropic_result,
    duplicate_of,
    openai_loss,
    openai_result,
    read_openai_line,
    read_requests_item,
    spell_reply,
    too_many,
)
from proxy.core.errors import BadRequest, CacheFault, UpstreamError
from proxy.core.purges import Began
from proxy.core.query import Query
from proxy.records import Client, Lookup

if TYPE_CHECKING:
    from proxy.batch.engine import Engine

log = logging.getLogger(__name__)

LEASE_S = 30.0
QUERIES_BYTES = 32 * 1024 * 1024  # of bodies whose reading is remembered between the two passes
LOOKUPS = 4096  # kept from looking a line up to storing its answer
WAITING_ROWS = 2000
LANDED_AT_ONCE = 32
SLICE = 16  # answers made before the loop gets its turn
SUBMISSIONS = 6
KEY_S = 1.0  # between two looks at whether a job's key still opens
BARRED_POLL_S = 2.0
STORED_S, STORED_POLL_S = 5.0, 0.01
GRACE_S = 7200  # after the window: a provider's own began a little later

Key = tuple[bytes, int | None, bool]
RawHeaders = tuple[tuple[bytes, bytes], ...]


class Run:
    """One job being worked on by this process. Awaiting `go` works on it until it has ended or `stop` was called."""

    def __init__(self, engine: Engine, job: Job, headers: RawHeaders) -> None:
        self.job = job
        self.cancelling = asyncio.Event()
        self._stopped = asyncio.Event()
        self._engine = engine
        self._headers = headers
        self._file = LineFile(engine.store, job.input_file_id, engine.line_limit_bytes)
        self._names: list[bytes] = []  # custom ids, as JSON
        self._leaders: list[int] = []
        self._followers: dict[int, list[int]] = {}
        self._queries: dict[int, Query] = {}
        self._queries_bytes = 0
        self._refused: dict[int, Answered] = {}
        self._lookups: dict[int, Lookup] = {}
        self._ended = bytearray()  # by number: 1 when its row is made
        self._sent: dict[int, set[int]] = {}  # by part
        self._parts: list[Part] = []
        self._pending: dict[tuple[str, str], list[int]] = {}
        self._failed_parts = False
        self._rows: list[LineRow] = []
        self._made: list[Part] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._waiters: list[asyncio.Future[None]] = []
        self._saving = asyncio.Lock()
        self._repeating = asyncio.Lock()
        self._alike = Alike(engine.lines.pipeline)
        self._waits_for: dict[int, Query] = {}  # by number: the line whose answer may serve it
        self._later: list[int] = []  # for the next round
        self._round = 0
        self._asks_alone = False  # there is no time for another batch of the provider's
        self._held: dict[int, Client] = {}  # for whom something of a key's limits is set aside, by number
        self._bar: BadRequest | None = None  # why the key of this job opens nothing more
        self._barred = asyncio.Event()

    # -- the story ----------------------------------------------------------------------------------------------

    async def go(self) -> None:
        """Raises an ExceptionGroup of CacheFault when the database cannot answer: it can be taken up again."""
        try:
            async with asyncio.TaskGroup() as group:  # a saver that breaks ends the work, whose workers wait for it
                beside = [group.create_task(self._keep_saving())]
                if self.job.key_id:
                    beside.append(group.create_task(self._watch_key()))
                await self._work()
                for task in beside:
                    task.cancel()
        finally:
            for client in self._held.values():
                self._engine.lines.let_go(client)
            self._held.clear()
        if self.stopping:
            await self._save_surely()

    async def _work(self) -> None:
        if faults := await self._read_file():
            await self._fail(faults)
            return
        if self.job.status == "validating":
            self.job.reach("in_progress", self._now_ms())
        await self._take_up()
        sent = set().union(*self._sent.values()) if self._sent else set()
        numbers = list(self._left(sent))
        if numbers:
            await self._choose_again(sorted(sent))
        await self._find_lost_parts()
        began_s = time.monotonic()
        await self._go_round(numbers)
        while self._later and self.is_open:
            left_s = (self.job.deadline_ms - self._now_ms()) / 1000
            self._asks_alone = left_s < 2 * (time.monotonic() - began_s)
            began_s = time.monotonic()
            numbers, self._later = self._later, []
            await self._go_round(numbers)
        if not self.stopping:
            await self._finalize()

    async def _go_round(self, numbers: Sequence[int]) -> None:
        self._round += 1
        await self._each(iter(numbers))
        await self._hand_in_all()
        await self._follow_parts()

    def stop(self) -> None:
        """Begin nothing more; what is being asked ends."""
        self._stopped.set()
        self._wake.set()

    @property
    def stopping(self) -> bool:
        return self._stopped.is_set()

    @property
    def is_open(self) -> bool:
        """More lines may begin."""
        return not (self.stopping or self.cancelling.is_set() or self._is_late or self._barred.is_set())

    @property
    def _is_late(self) -> bool:
        return self._now_ms() >= self.job.deadline_ms

    def _now_ms(self) -> int:
        return int(self._engine.clock() * 1000)

    # -- reading ------------------------------------------------------------------------------------------------

    async def _read_file(self) -> list[dict[str, object]]:
        """Read every line, find repeats; what is wrong with the file. The first pass."""
        faults: list[dict[str, object]] = []
        known: set[str] = set()
        leaders: dict[Key, int] = {}
        limit = self._engine.max_lines
        number = 0
        async for raw in self._file.scan():
            if number == limit:
                return [too_many(limit).shown(None)]
            line = self._read_line(raw)
            if isinstance(line, Line) and line.custom_id in known:
                line = duplicate_of(line.custom_id)
            if isinstance(line, LineFault):
                faults.append(line.shown(self._file.line))
                if len(faults) == ERRORS_SHOWN:
                    return faults
                name = b""
            else:
                known.add(line.custom_id)
                name = orjson.dumps(line.custom_id)
                if not faults:
                    self._enter(number, line, leaders)
            self._names.append(name)
            number += 1
        if not number:
            return [EMPTY.shown(None)]
        self.job.total = number
        self._ended = bytearray(number)
        return faults

    def _read_line(self, raw: bytes | None) -> Line | LineFault:
        if raw is None:
            message = f"This line is larger than {self._engine.line_limit_bytes} bytes."
            return LineFault("request_too_large", message)
        if self.job.dialect == "openai":
            return read_openai_line(raw, self.job.path, orjson.loads)
        return read_requests_item(raw, 0, orjson.loads)  # it was looked at when it arrived

    def _enter(self, number: int, line: Line, leaders: dict[Key, int]) -> None:
        try:
            query = self._engine.read(self.job.path, self.job.tenant, self._headers, line.body, self.job.key_id)
        except BadRequest as error:
            self._refused[number] = refusal(self._engine.dialect_of(self.job.path), self._engine.new_id(), error)
            self._leaders.append(number)
            return
        key = _key_of(query)
        leader = number if key is None else leaders.setdefault(key, number)
        if leader != number:
            self._followers.setdefault(leader, []).append(number)
            return
        self._leaders.append(number)
        if self._queries_bytes < QUERIES_BYTES:
            self._queries[number] = query
            self._queries_bytes += 2 * len(query.body) + 512

    async def _query(self, number: int) -> Query:
        query = self._queries.get(number)
        if query is None:
            line = self._read_line(await self._read_surely(number))
            assert isinstance(line, Line)
            query = self._engine.read(self.job.path, self.job.tenant, self._headers, line.body, self.job.key_id)
        return query

    async def _read_surely(self, number: int) -> bytes:
        """A line again, when the database can give it: what is under way is not thrown away for a moment's fault."""
        while True:
            try:
                return await self._file.read(number)
            except CacheFault:
                if self.stopping:
                    raise
                await asyncio.sleep(1.0)

    async def _take_up(self) -> None:
        """What rows say of an earlier run."""
        self._parts = list(await self._engine.store.parts(self.job.id))
        ended = {part.number for part in self._parts if part.state == "ended"}
        for number, state, part in await self._engine.store.states(self.job.id):
            if state != "sent":
                self._ended[number] = 1
            elif part is not None and part not in ended:
                self._sent.setdefault(part, set()).add(number)
        if self.job.key_id:
            for one in self._parts:
                for number in self._sent.get(one.number, ()):
                    await self._hold_again(number, one)

    async def _hold_again(self, number: int, part: Part) -> None:
        """Set aside what a line may take that a provider has had since before this process."""
        if number not in self._refused:
            client = self._held[number] = self._client()._replace(ts_ms=part.created_ms)
            self._engine.lines.keys.hold_again(await self._query(number), client.request_id, client.ts_ms)

    async def _choose_again(self, sent: Sequence[int]) -> None:
        """Look up lines that a provider has, as their answers need it anyway: others may wait for them."""
        for number in sent[:LOOKUPS]:
            if not self.is_open:
                return
            if number not in self._refused and self._alike.takes(query := await self._query(number)):
                found = self._lookups[number] = await self._engine.lines.look_up(query, self._client())
                if found.vector is not None and found.signature is not None:
                    self._alike.choose(number, query, found.vector, found.signature)

    async def _watch_key(self) -> None:
        """A key that was revoked or has expired ends what its lines have not begun."""
        keys = self._engine.lines.keys
        while True:
            self._bar = keys.barred(self.job.key_id)
            if self._bar is not None:
                self._barred.set()
                return
            await asyncio.sleep(KEY_S)

    # -- the cache, and ordinary calls ----------------------------------------------------------------------------

    def _left(self, sent: set[int]) -> Iterator[int]:
        """Lines to begin with: leaders, and followers whose leader ended in an earlier run."""
        for leader in self._leaders:
            if not self._ended[leader]:
                if leader not in sent:
                    yield leader
            else:
                yield from [n for n in self._followers.get(leader, ()) if not self._ended[n] and n not in sent]

    async def _each(self, numbers: Iterator[int]) -> None:
        """Every line on one of a bounded number of workers; the first failure ends them all."""

        async def work() -> None:
            for number in numbers:
                if not self.is_open:
                    return
                await self._room.wait()
                await self._begin(number)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._engine.concurrency):
                group.create_task(work())

    async def _begin(self, number: int, query: Query | None = None) -> None:
        """Answer a line, and those that repeat it. `query` is that of its leader, when it is not one itself."""
        if (refused := self._refused.get(number)) is not None:
            self._finish(number, refused)
            return
        query = query or await self._query(number)
        if (first := self._waits_for.pop(number, None)) is not None:
            await self._is_stored(first)
        if self._asks_alone or self._engine.has_batches(query.upstream) is False or query.controls.only_if_cached:
            if not await self._is_put_off(number, query, None):
                await self._ask(number, query)
            return
        found: Answered | Lookup | None
        client, found = await self._let_in(number, query)
        if client is None:
            return
        try:
            if found is None:
                found = await self._engine.lines.find(query, client)
            if isinstance(found, Answered):
                await self._finish_cached(number, query, found)
                return
            if await self._is_put_off(number, query, found):
                return
            if await self._engine.probe(query.upstream, self.job.path, self._headers):
                self._set_aside(number, query, found, client)
                return
        finally:
            if number not in self._held:
                self._engine.lines.let_go(client)
        await self._ask(number, query)

    async def _finish_cached(self, number: int, query: Query, found: Answered) -> None:
        self._finish(number, found)
        for follower in self._followers.get(number, ()):
            if not self._ended[follower]:
                await self._begin(follower, query)
        await asyncio.sleep(0)

    def _set_aside(self, number: int, query: Query, found: Lookup, client: Client) -> None:
        """For a batch of the provider's."""
        place = (query.upstream, query.model if self._engine.provider(self.job.path).is_per_model else "")
        self._pending.setdefault(place, []).append(number)
        if len(self._lookups) < LOOKUPS:
            self._lookups[number] = found
        if query.key_id is not None:
            self._held[number] = client

    async def _is_put_off(self, number: int, query: Query, found: Lookup | None) -> bool:
        """Whether a line waits for another one's answer, which may serve it. In the first round only: what then is not
        served is sent. `found`: what a lookup saw of it."""
        if self._round > 1 or not self._alike.takes(query):
            return False
        if found is None:
            await self._engine.lines.model_is_free()
            meaning = await self._alike.meaning(query)
        elif found.vector is None or found.signature is None:
            meaning = None
        else:
            meaning = found.vector, found.signature
        if meaning is None or (first := await self._alike.earlier(number, query, *meaning)) is None:
            return False
        if self._ended[first[0]]:
            await self._is_stored(first[1])
            return False
        self._waits_for[number] = first[1]
        self._later.append(number)
        return True

    async def _is_stored(self, first: Query) -> None:
        """Return when what an ended call brought can be found, or after STORED_S."""
        flights = self._engine.lines.pipeline.flights
        for _ in range(int(STORED_S / STORED_POLL_S)):
            if first.fingerprint not in flights:
                return
            await asyncio.sleep(STORED_POLL_S)

    async def _let_in(self, number: int, query: Query) -> tuple[Client, Answered | None] | tuple[None, None]:
        """Who may ask for a line, or has its answer; nobody, where its key does not let it in or not now."""
        lines = self._engine.lines

        def may_wait(refused: BadRequest) -> bool:  # not for what this batch itself holds until a later round
            is_held = (refused.retry_after_s or 0) <= 1
            return self.is_open and not (is_held and self._held)

        try:
            return await lines.let_in(query, self.job.path, self._headers, may_wait)
        except BadRequest as refused:
            if refused.should_retry:
                self._later.append(number)
            else:
                self._refuse(number, query, refused)
        return None, None

    def _refuse(self, number: int, query: Query, refused: BadRequest) -> None:
        """A line that its key does not let in, and those that repeat it."""
        for n in [number, *self._followers.get(number, ())]:
            if not self._ended[n]:
                self._finish(n, refusal(query.dialect, self._engine.new_id(), refused))

    async def _ask(self, number: int, query: Query) -> None:
        client, answered = self._held.pop(number, None), None
        if client is None:
            client, answered = await self._let_in(number, query)
        if client is None:
            return
        if answered is not None:
            await self._finish_cached(number, query, answered)
            return
        try:
            async with self._engine.slots:
                if not self.is_open:
                    return
                answered = await self._engine.lines.ask(query, client, self.job.deadline_ms / 1000)
        finally:
            self._engine.lines.let_go(client)
        await self._finish_all(number, query, answered)
        committed = asyncio.get_running_loop().create_future()
        self._waiters.append(committed)
        await committed  # so that a crash costs no more calls than there are workers

    def _client(self) -> Client:
        return self._engine.lines.client(self.job.path, self._headers)

    # -- a provider's batch ---------------------------------------------------------------------------------------

    async def _hand_in_all(self) -> None:
        for (upstream, model), numbers in self._pending.items():
            async for group in self._groups(numbers):
                if not self.is_open:
                    return
                await self._hand_in(upstream, model, *group)
        self._pending.clear()

    async def _groups(self, numbers: Sequence[int]) -> AsyncIterator[tuple[list[int], int]]:
        """Lines that fit into one batch of the provider's, and their bytes as they are sent."""
        provider, path = self._engine.provider(self.job.path), self.job.path
        group: list[int] = []
        size = 0
        for number in numbers:
            body = (await self._query(number)).forward_body
            own = len(body) + provider.overhead(self._tag(len(self._parts)), path, number)
            if group and (len(group) == provider.limit or size + own > PART_LIMIT_BYTES):
                yield group, size
                group, size = [], 0
                own = len(body) + provider.overhead(self._tag(len(self._parts)), path, number)
            group.append(number)
            size += own
            if number % 64 == 0:
                await asyncio.sleep(0)
        if group:
            yield group, size

    def _tag(self, part: int) -> str:
        """What names a part at its provider; of one length for any part below 1000."""
        return f"ibid-{self.job.id[-12:]}-{part:03d}"

    async def _hand_in(self, upstream: str, model: str, numbers: list[int], size_bytes: int) -> None:
        purge, now_ms = self._engine.lines.pipeline.entries.began(self._client()).purge, self._now_ms()
        part = Part(len(self._parts), upstream, model, lines=len(numbers), created_ms=now_ms, purge=purge)
        provider = self._engine.provider(self.job.path)

        async def bodies() -> AsyncIterator[tuple[int, bytes]]:
            for number in numbers:
                yield number, (await self._query(number)).forward_body

        def handed() -> Handed:
            return Handed(self._tag(part.number), self.job.path, bodies(), size_bytes)

        pause_s = self._engine.poll_s
        for attempt in range(SUBMISSIONS):
            try:
                if not part.input_file_id:
                    part.input_file_id = await provider.upload(upstream, self._headers, handed())
                if not self._sent.get(part.number):
                    self._parts.append(part)
                    self._sent[part.number] = set(numbers)
                    self._rows += [LineRow(number, "sent", part.number) for number in numbers]
                    self._made.append(part)
                    await self._save_surely()
                part.provider_id = await provider.create(upstream, self._headers, handed(), part.input_file_id)
                part.state = "running"
                self._made.append(part)
                await self._save_surely()
                return
            except NoBatchApi:
                self._engine.remember_none(upstream)
                break
            except Refused as refused:
                if refused.status not in (408, 409, 429) and refused.status < 500:
                    log.warning("a provider refuses a batch", extra={"upstream": upstream, "status": refused.status})
                    break
            except UpstreamError as error:
                log.info("handing in a batch failed", extra={"upstream": upstream, "reason": error.code})
            if attempt + 1 == SUBMISSIONS or not self.is_open:
                break
            await self._sleep(pause_s, told=False)
            pause_s *= 2
        if self.is_open:
            await self._withdraw(part, numbers)

    async def _withdraw(self, part: Part, numbers: Sequence[int]) -> None:
        """The provider does not take it: every line is asked for alone."""
        if self._sent.pop(part.number, None):
            part.state = "ended"
            self._made.append(part)

        async def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                if not self.is_open:
                    return
                await self._ask(number, await self._query(number))

        left = iter([number for number in numbers if not self._ended[number]])
        async with asyncio.TaskGroup() as group:
            for _ in range(self._engine.concurrency):
                group.create_task(work(left))

    async def _find_lost_parts(self) -> None:
        """Parts whose creation was not confirmed before a crash."""
        provider = self._engine.provider(self.job.path)
        for part in self._parts:
            if part.state != "creating":
                continue
            try:
                part.provider_id = await provider.find(part, self._headers, self._tag(part.number))
            except (UpstreamError, Refused, NoBatchApi):
                part.provider_id = ""
            if part.provider_id:
                part.state = "running"
                self._made.append(part)
            else:
                numbers = sorted(self._sent.get(part.number, ()))
                part.state = "ended"
                self._made.append(part)
                self._sent.pop(part.number, None)
                self._pending.setdefault((part.upstream, part.model), []).extend(numbers)

    async def _follow_parts(self) -> None:
        """Poll until every part has ended, and collect what it brought."""
        provider = self._engine.provider(self.job.path)
        told = False
        while running := [part for part in self._parts if part.state == "running"]:
            if self.stopping:
                return
            if not told and (self.cancelling.is_set() or self._barred.is_set() or self._is_late):
                told = True
                for part in running:
                    await self._try_quietly(provider.cancel(part, self._headers))
            for part in running:
                try:
                    progress = await provider.progress(part, self._headers)
                    if progress.has_ended:
                        await self._collect(part, progress)
                except (UpstreamError, Refused) as error:
                    log.info("polling a batch failed", extra={"upstream": part.upstream, "cause": str(error)})
                except NoBatchApi:  # it knew the batch, and does not any more
                    await self._end_part(part, Progress(True))
            if self._now_ms() > self.job.deadline_ms + GRACE_S * 1000:
                return
            if any(part.state == "running" for part in self._parts):
                poll_s = self._engine.poll_s
                await self._sleep(min(poll_s, BARRED_POLL_S) if self._barred.is_set() else poll_s, told=told)

    async def _sleep(self, pause_s: float, *, told: bool) -> None:
        """For so long, or until work must end; `told`: what ends it is being waited for already."""
        events = [self._stopped] if told else [self._stopped, self.cancelling, self._barred]
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _collect(self, part: Part, progress: Progress) -> None:
        provider = self._engine.provider(self.job.path)
        wanted = self._sent.get(part.number, set())
        results: list[Result] = []
        async for result in provider.results(part, self._headers, progress):
            if result.number in wanted and not self._ended[result.number]:
                results.append(result)
            if len(results) == LANDED_AT_ONCE:
                await self._land(results, part)
                results = []
        await self._land(results, part)
        await self._end_part(part, progress)
        await self._try_quietly(provider.clean(part, self._headers, progress))

    async def _land(self, results: Sequence[Result], part: Part) -> None:
        """Side by side: their entries share commits."""
        distinct = {result.number: result for result in results}
        await asyncio.gather(*[self._land_one(result, part) for result in distinct.values()])
        await self._room.wait()

    async def _land_one(self, result: Result, part: Part) -> None:
        number = result.number
        query, client = await self._query(number), self._client()
        if (held := self._held.get(number)) is not None and not result.lost:  # it counts in the window it was sent in
            client = client._replace(request_id=held.request_id, ts_ms=part.created_ms)
        if result.lost:
            if not self._asks_what_is_lost:
                self._lose(number, query, result.lost, result.error)
            return
        lookup = self._lookups.pop(number, None)
        if lookup is None:
            lookup = await self._engine.lines.look_up(query, client)
        began = Began(part.purge, part.created_ms)
        answered = await self._engine.lines.landed(query, client, lookup, result.status, result.body, began)
        self._free(number)
        await self._finish_all(number, query, answered)

    def _free(self, number: int) -> None:
        """Nothing of a key's limits is set aside for this line any more."""
        if (held := self._held.pop(number, None)) is not None:
            self._engine.lines.let_go(held)

    async def _end_part(self, part: Part, progress: Progress) -> None:
        """Lines of which nothing came are reported as the provider ended them."""
        for number in self._sent.get(part.number, ()):
            self._free(number)
        for number in () if self._asks_what_is_lost else sorted(self._sent.get(part.number, ())):
            if not self._ended[number]:
                self._failed_parts = self._failed_parts or progress.lost == "error"
                error = dict(progress.error) if progress.error is not None else None
                if error is not None and len(self.job.errors) < ERRORS_SHOWN:
                    self.job.errors = [*self.job.errors, {**error, "line": number + 1}]
                self._lose(number, await self._query(number), progress.lost, error)
        part.state = "ended"
        self._made.append(part)
        self._wake.set()

    async def _try_quietly(self, wanted: object) -> None:
        try:
            await wanted  # type: ignore[misc]
        except (UpstreamError, Refused, NoBatchApi) as error:
            log.info("a wish about a provider's batch failed", extra={"cause": str(error) or type(error).__name__})

    # -- results ------------------------------------------------------------------------------------------------

    async def _finish_all(self, number: int, query: Query, answered: Answered) -> None:
        """A leader's answer, for itself and for those that repeat it."""
        left = [follower for follower in self._followers.get(number, ()) if not self._ended[follower]]
        made = [(number, answered)]
        if left:
            async with self._repeating:
                repeat = self._engine.lines.repeater(query, answered)
                for follower in left:
                    made.append((follower, repeat(self._client())))
                    if len(made) % SLICE == 0:
                        await asyncio.sleep(0)
        for one in made:  # in one step, so that they are committed together
            self._finish(*one)

    def _finish(self, number: int, answered: Answered) -> None:
        name, status, body = self._names[number], answered.status, answered.body
        match self.job.dialect:
            case "openai":
                result = openai_result(name, answered.request_id, status, body)
            case "anthropic":
                result = anthropic_result(name, status, body)
            case _:
                result = spell_reply(status, answered.headers, body)
        self._end(number, "ok" if answered.is_ok else "error", result)

    def _lose(self, number: int, query: Query, state: str, error: object) -> None:
        """A line without an answer, and those that repeat it."""
        if self._bar is not None and state != "error" and not self.cancelling.is_set():
            self._refuse(number, query, self._bar)
            return
        for n in [number, *self._followers.get(number, ())]:
            if not self._ended[n]:
                client = self._client()
                self._engine.lines.lost(query, client, "cancelled" if state == "cancelled" else "error", 0)
                self._end(n, state, self._spell_loss(n, client.request_id, state, error))

    def _spell_loss(self, number: int, token: str, state: str, error: object) -> bytes:
        code, message = LOST.get(state, ("batch_failed", "The provider did not answer this request."))
        said = orjson.dumps(error if isinstance(error, dict) else {"code": code, "message": message})
        match self.job.dialect:
            case "openai":
                return openai_loss(self._names[number], token, said)
            case "anthropic" if state in LOST:
                return anthropic_loss(self._names[number], state)
        refused = BadRequest(message, status=504 if state == "expired" else 502, code=code)
        answered = refusal(self._engine.dialect_of(self.job.path), token, refused)
        if self.job.dialect == "anthropic":
            return anthropic_result(self._names[number], answered.status, answered.body)
        return spell_reply(answered.status, answered.headers, answered.body)

    def _end(self, number: int, state: str, result: bytes) -> None:
        self._ended[number] = 1
        self.job.count(state, len(result))
        self._rows.append(LineRow(number, state, None, result))
        self._queries.pop(number, None)
        self._wake.set()
        if len(self._rows) > WAITING_ROWS:
            self._room.clear()

    # -- saving ---------------------------------------------------------------------------------------------------

    async def _keep_saving(self) -> None:
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
                log.warning("a batch cannot be saved", extra={"reason": fault.code, "job": self.job.id})
                await asyncio.sleep(1.0)
                self._wake.set()

    async def _save_surely(self) -> None:
        """Return when what there is, is committed, or this run is to stop."""
        while True:
            try:
                await self._save()
                return
            except CacheFault:
                if self.stopping:
                    raise
                await asyncio.sleep(1.0)

    async def _save(self) -> None:
        async with self._saving:
            rows, parts = self._rows, list({part.number: part for part in self._made}.values())
            waiters = self._waiters
            self._rows, self._made, self._waiters = [], [], []
            engine = self._engine
            try:
                lease_ms = self._now_ms() + int(LEASE_S * 1000)
                status = await engine.store.save(self.job, rows, parts, engine.worker, lease_ms)
            except BaseException:
                self._rows, self._made, self._waiters = rows + self._rows, parts + self._made, waiters + self._waiters
                raise
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._room.set()
            if status is None:
                self.stop()  # another process has it, or it was deleted
            elif status == "cancelling" and not self.job.is_ended:
                self.cancelling.set()

    # -- the end ------------------------------------------------------------------------------------------------

    async def _fail(self, faults: list[dict[str, object]]) -> None:
        self.job.errors = faults
        self.job.total = 0
        self.job.reach("failed", self._now_ms())
        await self._save_surely()

    async def _finalize(self) -> None:
        """Report what nobody answered, then show the outputs."""
        if self._asks_what_is_lost and self._bar is None:
            await asyncio.gather(*[self._ask_late(leader) for leader in self._leaders])
        state = "cancelled" if self.cancelling.is_set() else "expired"
        for leader in self._leaders:
            for number in [leader, *self._followers.get(leader, ())]:
                if not self._ended[number]:
                    if (refused := self._refused.get(number)) is not None:
                        self._finish(number, refused)
                    else:
                        self._lose(number, await self._query(leader), state, None)
        job, now_ms = self.job, self._now_ms()
        job.reach("finalizing", now_ms)
        await self._save_surely()  # no results are shown before all of them are there
        if job.dialect == "openai":
            await self._show_outputs(now_ms)
        end = "completed"
        if self.cancelling.is_set():
            end = "cancelled"
        elif self._failed_parts and not job.succeeded:
            end = "failed"
        elif job.expired:
            end = "expired"
        job.reach(end, self._now_ms())
        await self._save_surely()

    @property
    def _asks_what_is_lost(self) -> bool:
        """A deferred call gets an answer, at the ordinary price when its batch brings none in time."""
        return self.job.dialect == "deferred"

    async def _ask_late(self, number: int) -> None:
        if self._ended[number] or number in self._refused:
            return
        query = await self._query(number)
        lines = self._engine.lines
        try:
            client, answered = await lines.let_in(query, self.job.path, self._headers, lambda _: not self.stopping)
        except BadRequest as refused:
            if not self.stopping:
                self._refuse(number, query, refused)
            return
        if answered is None:
            try:
                async with self._engine.slots:
                    answered = await lines.ask(query, client)
            finally:
                lines.let_go(client)
        await self._finish_all(number, query, answered)

    async def _show_outputs(self, now_ms: int) -> None:
        job, store = self.job, self._engine.store
        for part, size_bytes in (("output", job.output_bytes), ("error", job.error_bytes)):
            name = f"{part}_file_id"
            if size_bytes and not getattr(job, name):
                setattr(job, name, self._engine.new_name("file-"))
        await self._save_surely()
        for part, size_bytes in (("output", job.output_bytes), ("error", job.error_bytes)):
            file_id = getattr(job, f"{part}_file_id")
            if file_id:
                filename = f"{job.id}_{part}.jsonl"
                file = BatchFile(
                    file_id, job.tenant, "batch_output", filename, size_bytes, now_ms, job.expires_ms, job.id, part
                )
                await store.begin_file(file)
                await store.end_file(file)


def _key_of(query: Query) -> Key | None:
    """What lines have in common that get one answer; None for a line that nothing repeats."""
    if query.batch is not None:
        if not query.batch.fingerprints:
            return None
        return b"".join([query.batch.encoding_format.encode(), *query.batch.fingerprints]), None, False
    if not query.fingerprint or not query.controls.read:
        return None
    return query.fingerprint, query.output_limit, query.keeps_id
