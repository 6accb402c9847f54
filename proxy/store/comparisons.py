"""Rows of what the judge learned from: comparisons of answers, refused pairs, groups of entries.

The judge's memory is derived from these rows, as the index is from the entries: a start applies the newest of them, a
running process applies those that other replicas wrote since.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.errors import CacheFault
from proxy.core.model import Comparison
from proxy.ports import RefusedPair, SeenComparison
from proxy.store.engine import Database
from proxy.store.schema import audit, entry, refused_pair
from proxy.store.writer import Writer

FLUSH_S = 0.25
RETRY_S = 1.0
BATCH = 512
WAITING = 10_000
KEPT = 200_000  # comparisons; older ones go
PIECE = 1_000
_FLAGS = ("served", "near_same")


class Comparisons:
    """Owner: `Store`. Every method raises CacheFault when the database cannot answer."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer
        self._writer_id = uuid.uuid4().hex
        self._waiting: list[tuple[Comparison | None, int, int]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        make = sqlite.insert if database.dialect == "sqlite" else postgresql.insert
        self._refuse = make(refused_pair).on_conflict_do_nothing()

    def record(self, found: Comparison | None, entry_id: int = 0, group_id: int = 0) -> None:
        """Keep a comparison, and that an entry's answer is the same as another's; written with others within FLUSH_S.

        Never blocks, never raises: while the database is away the newest WAITING are kept in memory.
        """
        self._waiting.append((found, entry_id, group_id))
        if len(self._waiting) > WAITING:
            del self._waiting[0]
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush_soon(), name="store-comparisons")

    async def _flush_soon(self) -> None:
        await asyncio.sleep(FLUSH_S)
        while self._waiting:
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
            while batch := self._waiting[:BATCH]:
                del self._waiting[: len(batch)]
                try:
                    await self._writer.run(partial(self._write, batch=batch))
                except BaseException:
                    self._waiting[:0] = batch
                    raise

    async def close(self) -> None:
        """Write what waits, if the database takes it."""
        with contextlib.suppress(CacheFault):
            while self._waiting:
                await self.flush()
        if self._flushing is not None:
            self._flushing.cancel()

    async def _write(self, connection: AsyncConnection, batch: Sequence[tuple[Comparison | None, int, int]]) -> None:
        rows = [self._row(found) for found, _, _ in batch if found is not None]
        joined = [{"member": entry_id, "group": group_id} for _, entry_id, group_id in batch if entry_id != group_id]
        if rows:
            await connection.execute(insert(audit), rows)
        if joined:
            change = update(entry).where(entry.c.id == bindparam("member")).values(group_id=bindparam("group"))
            await connection.execute(change, joined)

    def _row(self, found: Comparison) -> dict[str, Any]:
        values = {**found._asdict(), "ts": found.ts_ms, "writer": self._writer_id}
        del values["ts_ms"]
        return values | {flag: int(values[flag]) for flag in _FLAGS}

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

    async def correct(self, row_id: int, p_same: float, source: str) -> None:
        """Overwrite what a comparison found."""

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(update(audit).where(audit.c.id == row_id).values(p_same=p_same, source=source))

        await self._writer.run(act)

    async def recent(self, *, limit: int, before_id: int | None, near_misses: bool) -> list[dict[str, Any]]:
        """For people, newest first: near-misses (forwarded, and compared with what was nearly served), or audits of
        hits. Without arrays; with the stored question, where its entry still exists."""
        await self.flush()
        kind = audit.c.served == (0 if near_misses else 1)
        shown = (
            "id", "ts", "source", "request_id", "tenant", "namespace", "entry_id", "group_id", "similarity", "log_odds",
            "standing", "p_same", "weight",
        )  # fmt: skip
        statement = (
            select(*(audit.c[name] for name in shown), func.substr(entry.c.prompt, 1, 200).label("prompt"))
            .select_from(audit.outerjoin(entry, entry.c.id == audit.c.entry_id))
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

    async def refused(self, since_ms: int = 0) -> list[RefusedPair]:
        """Pairs refused at or after an instant."""
        return await self._pairs(refused_pair.c.ts >= since_ms)

    async def refused_for(self, request_id: str | None, entry_id: int) -> list[RefusedPair]:
        """Pairs refused on account of this request, or by feedback on this entry."""
        c = refused_pair.c
        if request_id is not None:
            return await self._pairs(c.request_id == request_id)
        return await self._pairs((c.entry_id == entry_id) & (c.source == "feedback"))

    async def _pairs(self, condition: ColumnElement[bool]) -> list[RefusedPair]:
        c = refused_pair.c
        statement = select(c.asked, c.kept, c.ts, c.request_id, c.entry_id, c.source).where(condition)
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

    async def forget(self, entry_ids: Sequence[int]) -> None:
        """Remove what was learned from entries that were purged: their words are in it, as digests."""
        change = delete(audit).where(audit.c.entry_id == bindparam("gone"))

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(change, [{"gone": entry_id} for entry_id in entry_ids])

        if entry_ids:
            await self._writer.run(act)

    async def housekeep(self) -> None:
        """Keep the newest KEPT rows."""
        ((newest,),) = await self._database.rows(select(func.coalesce(func.max(audit.c.id), 0)))
        old = select(audit.c.id).where(audit.c.id <= newest - KEPT).limit(PIECE)

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(delete(audit).where(audit.c.id.in_(old)))

        if newest > KEPT:
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


def _columns() -> list[Any]:
    return [audit.c["ts" if name == "ts_ms" else name] for name in Comparison._fields]
