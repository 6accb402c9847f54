"""Rows of what the judge learned from: comparisons of answers, refused pairs, groups of entries, tallies of levels.

The judge's memory is derived from these rows, as the index is from the entries: a start applies the newest of them, a
running process applies those that other replicas wrote since. A tally is written as what is added to it, in one
transaction with the comparisons it counts, so that processes add up and none overwrites another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Table, and_, bindparam, delete, func, insert, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.errors import CacheFault
from proxy.core.model import Comparison, RepeatedAnswer
from proxy.core.risk import LevelName, Tally
from proxy.ports import RefusedPair, SeenComparison
from proxy.store.engine import Database
from proxy.store.schema import audit, entry, evidence, refused_pair, repeated_answer
from proxy.store.writer import Writer

FLUSH_S = 0.25
RETRY_S = 1.0
BATCH = 512
WAITING = 10_000
PURGED = 100_000  # ids of entries: comparisons with them may be under way
KEPT = 200_000  # comparisons; older ones go
PIECE = 1_000
SHOWN_CHARACTERS = 2_000  # of a question, for people
PAIRS = 100_000  # refused pairs read at once
CLEAN_KEPT_MS = 30 * 86_400_000  # a tally that narrows nothing and does not change any more
CLEAN_LABELS = 100  # from which one narrows: its level is judged by its own evidence alone
_FLAGS = ("served",)


class Comparisons:
    """Owner: `Store`. Every method raises CacheFault when the database cannot answer."""

    def __init__(self, database: Database, writer: Writer, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._changes: dict[tuple[str, LevelName], Tally] = {}  # to be written: of levels changed since, by embedder
        self._writing = asyncio.Lock()  # held while they are written, and while they are read
        self._database = database
        self._writer = writer
        self._writer_id = uuid.uuid4().hex
        self._waiting: list[tuple[Comparison | None, int, int]] = []
        self._repeats: list[RepeatedAnswer] = []
        self._flushing: asyncio.Task[None] | None = None
        self._purged: dict[int, None] = {}  # entry ids, oldest out first
        make = sqlite.insert if database.dialect == "sqlite" else postgresql.insert
        self._refuse = make(refused_pair).on_conflict_do_nothing()
        added = make(evidence)
        self._add = added.on_conflict_do_update(
            index_elements=list(evidence.primary_key),
            set_={
                "changed_ms": added.excluded.changed_ms,
                **{name: evidence.c[name] + added.excluded[name] for name in Tally._fields},
            },
        )

    def record(self, found: Comparison | None, entry_id: int = 0, group_id: int = 0) -> None:
        """Keep a comparison, and that an entry's answer is the same as another's; written with others within FLUSH_S.

        Never blocks, never raises: while the database is away the newest WAITING are kept in memory.
        """
        self._waiting.append((found, entry_id, group_id))
        if len(self._waiting) > WAITING:
            del self._waiting[0]
        self._flush_later()

    def repeated(self, found: RepeatedAnswer) -> None:
        """As `record`, of two answers to one question."""
        self._repeats.append(found)
        if len(self._repeats) > WAITING:
            del self._repeats[0]
        self._flush_later()

    @property
    def _waits(self) -> bool:
        return bool(self._waiting or self._repeats or self._changes)

    def note(self, embedder: str, level: LevelName, change: Tally) -> None:
        """Add to a level's tally, as `record` does its part."""
        key = embedder, level
        self._changes[key] = self._changes.get(key, Tally()).plus(change)
        self._flush_later()

    def _flush_later(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush_soon(), name="store-comparisons")

    async def _flush_soon(self) -> None:
        await asyncio.sleep(FLUSH_S)
        while self._waits:
            try:
                await self.flush()
            except CacheFault:
                await asyncio.sleep(RETRY_S)

    async def keep(self, found: Comparison) -> None:
        """As `record`, and written when it returns. Raises CacheFault, and then it waits like any other."""
        self.record(found)
        await self.flush()

    async def flush(self) -> None:
        """Write what waits. Raises CacheFault, and then it still waits."""
        async with self._writing:
            while self._waits:
                batch = self._waiting[:BATCH]
                del self._waiting[: len(batch)]
                repeats = self._repeats[:BATCH]
                del self._repeats[: len(repeats)]
                changes, self._changes = self._changes, {}
                try:
                    await self._writer.run(partial(self._write, batch=batch, repeats=repeats, changes=changes))
                except BaseException:
                    self._waiting[:0] = batch
                    self._repeats[:0] = repeats
                    for (embedder, level), change in changes.items():
                        self.note(embedder, level, change)
                    raise

    async def close(self) -> None:
        """Write what waits, if the database takes it."""
        with contextlib.suppress(CacheFault):
            while self._waits:
                await self.flush()
        if self._flushing is not None:
            self._flushing.cancel()

    async def _write(
        self,
        connection: AsyncConnection,
        batch: Sequence[tuple[Comparison | None, int, int]],
        repeats: Sequence[RepeatedAnswer],
        changes: Mapping[tuple[str, LevelName], Tally],
    ) -> None:
        rows = [self._row(found) for found, _, _ in batch if found is not None and found.entry_id not in self._purged]
        joined = [{"member": entry_id, "group": group_id} for _, entry_id, group_id in batch if entry_id != group_id]
        if rows:
            await connection.execute(insert(audit), rows)
        if repeats:
            values = [found._asdict() for found in repeats]
            await connection.execute(insert(repeated_answer), [{"ts": one.pop("ts_ms"), **one} for one in values])
        if joined:
            change = update(entry).where(entry.c.id == bindparam("member")).values(group_id=bindparam("group"))
            await connection.execute(change, joined)
        if changes:
            now_ms = int(self._clock() * 1000)
            tallies = [
                {"embedder": key[0], **key[1]._asdict(), "changed_ms": now_ms, **changes[key]._asdict()}
                for key in sorted(changes)  # in one order, so that replicas never deadlock
            ]
            await connection.execute(self._add, tallies)

    def _row(self, found: Comparison) -> dict[str, Any]:
        values = {**found._asdict(), "ts": found.ts_ms, "writer": self._writer_id}
        del values["ts_ms"]
        return values | {flag: int(values[flag]) for flag in _FLAGS}

    async def tallies(self, embedder: str, levels: Sequence[LevelName]) -> Mapping[LevelName, Tally]:
        """What was noted of each of these levels in all, written or not: true at the moment this returns."""
        c = evidence.c
        key = tuple_(c.kind, c.scope, c.tenant, c.namespace)
        statement = select(c.kind, c.scope, c.tenant, c.namespace, *(c[name] for name in Tally._fields)).where(
            c.embedder == embedder, key.in_([tuple(level) for level in levels])
        )
        async with self._writing:
            found = dict.fromkeys(levels, Tally())
            for kind, scope, tenant, namespace, *sums in await self._database.rows(statement):
                found[LevelName(kind, bytes(scope), tenant, namespace)] = Tally(*sums)
        for level in levels:
            found[level] = found[level].plus(self._changes.get((embedder, level), Tally()))
        return found

    async def of_level(self, embedder: str, level: LevelName, limit: int) -> list[Comparison]:
        """The last `limit` comparisons of a level, written or not, oldest first."""
        async with self._writing:
            rows = await self._rows(_in_level(level) & (audit.c.embedder == embedder), newest=limit)
        written = [self._seen(row).comparison for row in reversed(rows)]
        waiting = [found for found, _, _ in self._waiting if found is not None and _is_of(found, level)]
        return (written + waiting)[-limit:]

    async def newest(self, embedder: str, limit: int) -> list[SeenComparison]:
        """The last `limit` comparisons made with this embedder, oldest first."""
        rows = await self._rows(audit.c.embedder == embedder, newest=limit)
        return [self._seen(row) for row in reversed(rows)]

    async def after(self, embedder: str, row_id: int) -> list[SeenComparison]:
        """Comparisons with a higher id, at most PIECE, oldest first."""
        statement = (
            select(audit.c.id, audit.c.writer, *_columns())
            .where(audit.c.embedder == embedder, audit.c.id > row_id)
            .order_by(audit.c.id)
            .limit(PIECE)
        )
        return [self._seen(row) for row in await self._database.rows(statement)]

    async def judged(self, request_id: str | None, entry_id: int) -> list[SeenComparison]:
        """Comparisons that a verdict overrules: of this served request, or those of feedback on this entry."""
        await self.flush()
        if request_id is not None:
            condition = (audit.c.request_id == request_id) & (audit.c.served == 1)
        else:
            condition = (audit.c.entry_id == entry_id) & (audit.c.source == "feedback")
        return [self._seen(row) for row in await self._rows(condition, newest=PIECE)]

    async def near_miss(self, row_id: int) -> SeenComparison | None:
        """The comparison of this id, if it is one of what was forwarded."""
        rows = await self._rows((audit.c.id == row_id) & (audit.c.served == 0), newest=1)
        return self._seen(rows[0]) if rows else None

    async def correct(self, row_id: int, p_same: float, source: str) -> None:
        """Overwrite what a comparison found."""

        async def act(connection: AsyncConnection) -> None:
            change = update(audit).where(audit.c.id == row_id)
            await connection.execute(change.values(p_same=p_same, source=source, comparer="", p_null=None))

        await self._writer.run(act)

    async def recent(self, *, limit: int, before_id: int | None, near_misses: bool) -> list[dict[str, Any]]:
        """For people, newest first: near-misses (forwarded, and compared with what was nearly served), or audits of
        hits. Without arrays; with the stored question as "prompt", where its entry still exists, and the question asked
        as "asked" with its "asked_entry_id", where its own answer was stored."""
        await self.flush()
        kind = audit.c.served == (0 if near_misses else 1)
        shown = (
            "id", "ts", "source", "request_id", "tenant", "namespace", "entry_id", "group_id", "similarity", "log_odds",
            "standing", "region", "comparer", "p_same", "p_null", "weight",
        )  # fmt: skip
        asked, written = entry.alias("asked"), entry.alias("written")
        own = select(func.min(written.c.id)).where(
            written.c.request_id == audit.c.request_id, written.c.id != audit.c.entry_id
        )
        statement = (
            select(
                *(audit.c[name] for name in shown),
                func.substr(entry.c.prompt, 1, SHOWN_CHARACTERS).label("prompt"),
                asked.c.id.label("asked_entry_id"),
                func.substr(asked.c.prompt, 1, SHOWN_CHARACTERS).label("asked"),
            )
            .select_from(
                audit.outerjoin(entry, entry.c.id == audit.c.entry_id).outerjoin(
                    asked, asked.c.id == own.correlate(audit).scalar_subquery()
                )
            )
            .where(kind, *(() if before_id is None else (audit.c.id < before_id,)))
            .order_by(audit.c.id.desc())
            .limit(limit)
        )
        return [dict(row._mapping) for row in await self._database.rows(statement)]

    async def refuse(self, pair: RefusedPair) -> None:
        """Never serve this pair again."""
        values = {
            "asked": pair.asked, "kept": pair.kept, "ts": pair.ts_ms, "request_id": pair.request_id,
            "entry_id": pair.entry_id, "source": pair.source,
        }  # fmt: skip

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(self._refuse.values(values))

        await self._writer.run(act)

    async def allow(self, asked: bytes, kept: bytes) -> bool:
        """Undo `refuse`; whether there was such a pair."""
        change = delete(refused_pair).where(refused_pair.c.asked == asked, refused_pair.c.kept == kept)

        async def act(connection: AsyncConnection) -> bool:
            return (await connection.execute(change)).rowcount > 0

        return await self._writer.run(act)

    async def refused(self, since_ms: int = 0, limit: int = PAIRS) -> list[RefusedPair]:
        """The last `limit` pairs refused at or after an instant, oldest first."""
        c = refused_pair.c
        newest = await self._pairs(c.ts >= since_ms, limit)
        return newest[::-1]

    async def is_refused(self, asked: bytes, kept: bytes) -> bool:
        """Whether this very pair was refused."""
        c = refused_pair.c
        statement = select(c.ts).where(c.asked == asked, c.kept == kept)
        return bool(await self._database.rows(statement))

    async def refused_for(self, request_id: str | None, entry_id: int) -> list[RefusedPair]:
        """Pairs refused on account of this request, or by feedback on this entry."""
        c = refused_pair.c
        if request_id is not None:
            return await self._pairs(c.request_id == request_id)
        return await self._pairs((c.entry_id == entry_id) & (c.source == "feedback"))

    async def _pairs(self, condition: ColumnElement[bool], limit: int = PAIRS) -> list[RefusedPair]:
        c = refused_pair.c
        columns = (c.asked, c.kept, c.ts, c.request_id, c.entry_id, c.source)
        statement = select(*columns).where(condition).order_by(c.ts.desc(), c.asked, c.kept).limit(limit)
        return [RefusedPair(bytes(row[0]), bytes(row[1]), *row[2:]) for row in await self._database.rows(statement)]

    async def groups(self) -> AsyncIterator[tuple[int, int]]:
        """(entry id, group id) of every entry in a group that another one founded, in id order."""
        last = 0
        while True:
            statement = (
                select(entry.c.id, entry.c.group_id)
                .where(entry.c.group_id.is_not(None), entry.c.id > last)
                .order_by(entry.c.id)
                .limit(20 * PIECE)
            )
            rows = await self._database.rows(statement)
            for row in rows:
                yield row[0], row[1]
            if len(rows) < 20 * PIECE:
                return
            last = rows[-1][0]

    def forget(self, entry_ids: Sequence[int]) -> None:
        """Write nothing down any more that is learned from entries which were purged: their words are in it, as
        digests. What was written went with them."""
        for entry_id in entry_ids:
            self._purged[entry_id] = None
        while len(self._purged) > PURGED:
            del self._purged[next(iter(self._purged))]

    async def housekeep(self) -> None:
        """Keep the newest KEPT rows, and every tally that narrows anything."""
        await self._forget_clean()
        for table in (audit, repeated_answer):
            await self._keep_newest(table)

    async def _keep_newest(self, table: Table) -> None:
        ((newest,),) = await self._database.rows(select(func.coalesce(func.max(table.c.id), 0)))
        old = select(table.c.id).where(table.c.id <= newest - KEPT).limit(PIECE)

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(delete(table).where(table.c.id.in_(old)))

        if newest > KEPT:
            await self._writer.run(act)

    async def _forget_clean(self) -> None:
        """Drop tallies that leave the judge as free as none would: no wrong label, too few to stand alone, and old."""
        c = evidence.c
        wrong = (c.counted_wrong, c.would_be_wrong, c.start_wrong, c.normal_wrong, c.more, c.normal_more)
        no_wrong = and_(*(column == 0 for column in wrong))
        is_old = c.changed_ms < int(self._clock() * 1000) - CLEAN_KEPT_MS
        clean = no_wrong & is_old & (c.labelled < CLEAN_LABELS)

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(delete(evidence).where(clean))

        if await self._database.rows(select(c.kind).where(clean).limit(1)):
            await self._writer.run(act)

    async def _rows(self, condition: ColumnElement[bool], newest: int) -> Sequence[Any]:
        statement = (
            select(audit.c.id, audit.c.writer, *_columns()).where(condition).order_by(audit.c.id.desc()).limit(newest)
        )
        return await self._database.rows(statement)

    def _seen(self, row: Any) -> SeenComparison:
        values = dict(zip(Comparison._fields, row[2:], strict=True))
        for flag in _FLAGS:
            values[flag] = bool(values[flag])
        return SeenComparison(row[0], row[1] == self._writer_id, Comparison(**values))


def _in_level(level: LevelName) -> ColumnElement[bool]:
    """Whether a comparison counts in a level."""
    if level.kind == "scope":
        return audit.c.scope == level.scope
    if level.kind == "namespace":
        return (audit.c.tenant == level.tenant) & (audit.c.namespace == level.namespace)
    return audit.c.tenant == level.tenant if level.kind == "tenant" else audit.c.id > 0


def _is_of(found: Comparison, level: LevelName) -> bool:
    """`_in_level`, of one that is not written yet."""
    if level.kind == "scope":
        return found.scope == level.scope
    if level.kind == "installation":
        return True
    return found.tenant == level.tenant and (level.kind == "tenant" or found.namespace == level.namespace)


def _columns() -> list[Any]:
    return [audit.c["ts" if name == "ts_ms" else name] for name in Comparison._fields]
