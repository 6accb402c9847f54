"""Where lookups and savings are written, off the request's path.

`record` appends to a list. A task empties the list every 200 ms, or at 512 outcomes: it settles them in slices of a
fraction of a millisecond, giving the loop back between slices (settling is Python under the GIL, so a thread would
stall the loop just as long, plus the hand-over), and inserts them through the store's writer.

A database that does not write costs nothing but disk: settled rows go to `ledger-spill.jsonl` in the data directory and
are inserted when the database is back, or at the next start. Every row has its own id and an id already present is
left alone, so replaying twice changes nothing. If the spill cannot be written either, outcomes wait in memory up to a
bound, then the newest are dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.errors import CacheFault
from proxy.core.model import Outcome, again
from proxy.core.saving import CALL_COLUMNS, REQUEST_COLUMNS, SAVING_COLUMNS, Dated, Pricing, Settlement, settle
from proxy.store.engine import Database
from proxy.store.schema import request, saving, upstream_call
from proxy.store.writer import Writer

log = logging.getLogger(__name__)

FLUSH_S = 0.2
FLUSH_ROWS = 512
BATCH_ROWS = 16_384  # in one transaction
SLICE = 16  # outcomes settled before the loop gets its turn: about 0.2 ms
TURNS = 32
"""A batch is settled in about TURNS turns of the loop, whatever its size: a loop under load serves more requests a turn
than SLICE, and the ledger would fall behind for as long as the load lasts (73,000 rows after 5 s of 20,000 hits/s on 64
connections and one core, November 2026)."""
MEMORY_LIMIT = 100_000  # outcomes kept when neither database nor spill can be written
SPILL_LIMIT_BYTES = 256 * 1024 * 1024
DAY_MS = 86_400_000
SETTLED_LIMIT = 8192  # distinct outcomes remembered, about 1 KiB each
SPILL_NAME = "ledger-spill.jsonl"

Rows = tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], list[tuple[Any, ...]]]
"""Rows of request, upstream_call and saving, in their columns' order."""

_TABLES: tuple[tuple[Table, tuple[str, ...]], ...] = (
    (request, REQUEST_COLUMNS),
    (upstream_call, CALL_COLUMNS),
    (saving, SAVING_COLUMNS),
)


_ENTRY = REQUEST_COLUMNS.index("entry_id")
_LANE = REQUEST_COLUMNS.index("lane")
_ADDED = (None, "")  # last columns of `request` that a spill of an earlier release does not have: key_id, team
_FORWARDS = frozenset({"forward", "bypass", "refused"})


class _Again(NamedTuple):
    recurring: tuple[Any, ...]
    request_id: str
    ts_ms: int
    total_ms: float


class SqlLedger:
    """Ledger over SQL. `on_hit(entry_id, ts_ms)` is told of every answer an entry gave, for eviction by use."""

    def __init__(
        self,
        database: Database,
        writer: Writer,
        price: Pricing,
        *,
        on_hit: Callable[[int, int], None] | None = None,
    ) -> None:
        self._database = database
        self._writer = writer
        self._price = price
        self._on_hit = on_hit
        self._waiting: list[Outcome | _Again] = []
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._flushing = asyncio.Lock()
        self._spill_path = database.data_dir / SPILL_NAME
        self._spilled = False
        self._inserts = [_Insert(table, columns, database.dialect) for table, columns in _TABLES]
        self._settled: dict[int, Dated] = {}  # by identity; each keeps its key alive
        self._work = self._insert
        self.written = 0  # outcomes now in the database, replays included
        self.spilled = 0  # outcomes that went to the spill file
        self.dropped = 0  # outcomes lost: no database, no disk, memory bound reached
        self.refused = 0  # outcomes no database takes (or that could not be settled)

    @property
    def state(self) -> str:
        """ "ok"; "spilling" while rows wait in the spill file; "dropping" or "refused" once rows were lost."""
        if self.dropped:
            return "dropping"
        if self._spilled:
            return "spilling"
        return "refused" if self.refused else "ok"

    def record(self, outcome: Outcome) -> None:
        """An append. Never blocks, never raises."""
        self._append(outcome)

    def record_again(self, recurring: tuple[Any, ...], request_id: str, ts_ms: int, total_ms: float) -> None:
        """As `record(again(...))`, for outcomes that recur by the thousand: they are settled once, then dated."""
        self._append(_Again(recurring, request_id, ts_ms, total_ms))

    def _append(self, outcome: Outcome | _Again) -> None:
        waiting = self._waiting
        if len(waiting) >= FLUSH_ROWS:
            if len(waiting) >= MEMORY_LIMIT:
                self.dropped += 1
                return
            self._full.set()
        waiting.append(outcome)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def start(self) -> None:
        """Replay what an earlier run spilled, then flush in the background."""
        self._spilled = self._spill_path.exists()
        await self._replay()
        self._task = asyncio.create_task(self._run(), name="store-ledger")

    async def close(self) -> None:
        """Write or spill everything recorded so far."""
        self._closing = True
        self._full.set()
        if self._task is not None:
            await self._task
        await self.flush()

    async def flush(self) -> None:
        """Write what waits now; returns when it is in the database or in the spill file."""
        async with self._flushing:
            await self._empty()

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[bool]:
        """Inside, nothing is written; True when all that was recorded before it is in the database."""
        async with self._flushing:
            await self._empty()
            yield not self._waiting and not self._spilled

    async def _empty(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:BATCH_ROWS], self._waiting[BATCH_ROWS:]
            if not await self._write(batch):
                return
        if self._spilled and self._writer.is_trying:
            await self._replay()

    async def _run(self) -> None:
        while not self._closing:
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._full.wait()
            except TimeoutError:
                pass
            self._full.clear()
            if self._waiting or self._spilled:
                await self.flush()

    async def _write(self, batch: list[Outcome | _Again]) -> bool:
        """Settle and insert, else spill; False when the outcomes had to stay in memory."""
        rows = await self._settle(batch)
        try:
            await self._writer.submit(self._work, rows)
            self.written += len(rows[0])
        except CacheFault as fault:
            if fault.code == "store_refused":
                await self._one_by_one(rows)
            elif not await asyncio.to_thread(self._spill, rows):
                room = max(MEMORY_LIMIT - len(self._waiting), 0)
                self.dropped += max(len(batch) - room, 0)
                self._waiting[:0] = batch[:room]
                return False
        return True

    async def _settle(self, batch: Sequence[Outcome | _Again]) -> Rows:
        requests: list[tuple[Any, ...]] = []
        calls: list[tuple[Any, ...]] = []
        savings: list[tuple[Any, ...]] = []
        price, on_hit = self._price, self._on_hit
        size = max(SLICE, len(batch) // TURNS)
        for start in range(0, len(batch), size):
            for outcome in batch[start : start + size]:
                try:
                    settlement = self._date(outcome) if isinstance(outcome, _Again) else settle(outcome, price)
                except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # a malformed outcome of ours
                    self.refused += 1
                    log.error("outcome cannot be settled: %s", type(error).__name__)
                    continue
                requests.append(settlement.request)
                calls += settlement.calls
                savings += settlement.savings
                row = settlement.request
                if on_hit is not None and row[_ENTRY] is not None and row[_LANE] not in _FORWARDS:
                    on_hit(row[_ENTRY], row[1])
            await asyncio.sleep(0)
        return requests, calls, savings

    def _date(self, hit: _Again) -> Settlement:
        """The rows of a recurring outcome. One settlement serves a day: list prices are dated."""
        recurring, day = hit.recurring, hit.ts_ms // DAY_MS
        known = self._settled.get(id(recurring))
        if known is None or known.day != day:
            if len(self._settled) >= SETTLED_LIMIT:
                self._settled.clear()
            outcome = again(recurring, hit.request_id, hit.ts_ms, hit.total_ms, hit.total_ms)
            known = self._settled[id(recurring)] = Dated(recurring, day, settle(outcome, self._price))
        return known.at(hit.request_id, hit.ts_ms, hit.total_ms)

    async def _insert(self, connection: AsyncConnection, batches: Sequence[Rows]) -> Sequence[None]:
        for index, insert in enumerate(self._inserts):
            await insert.run(connection, [row for rows in batches for row in rows[index]])
        return [None] * len(batches)

    async def _one_by_one(self, rows: Rows) -> None:
        """Find the outcome a database refuses, write the others."""
        for row in rows[0]:
            identity = row[0]
            alone: Rows = (
                [row],
                [call for call in rows[1] if call[1] == identity],
                [step for step in rows[2] if step[0] == identity],
            )
            try:
                await self._writer.submit(self._work, alone)
                self.written += 1
            except CacheFault as fault:
                if fault.code == "store_refused":
                    self.refused += 1
                    log.error("ledger row refused: %s", fault.message)
                elif not await asyncio.to_thread(self._spill, alone):
                    self.dropped += 1

    def _spill(self, rows: Rows) -> bool:
        """Append one line of settled rows, synced; False when the disk does not take it. Runs in a thread."""
        try:
            line = orjson.dumps(rows) + b"\n"
        except TypeError:  # a string or number JSON has no form for
            self.refused += len(rows[0])
            return True
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self._spill_path, flags, 0o600)
            try:
                start = os.fstat(descriptor).st_size
                if start + len(line) > SPILL_LIMIT_BYTES:
                    return False
                if os.write(descriptor, line) != len(line):
                    os.ftruncate(descriptor, start)
                    return False
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("ledger spill cannot be written: %s", error.strerror)
            return False
        self._spilled = True
        self.spilled += len(rows[0])
        return True

    async def _replay(self) -> None:
        """Insert what was spilled and remove the file; leaves it when the database still does not write."""
        if not self._spilled:
            return
        offset = 0
        try:
            while lines := await asyncio.to_thread(_read_lines, self._spill_path, offset):
                for line in lines:
                    offset += len(line)
                    await self._replay_line(line)
            await asyncio.to_thread(self._spill_path.unlink, missing_ok=True)
            self._spilled = False
        except CacheFault as fault:
            log.warning("ledger spill waits: %s", fault.message)
        except OSError as error:
            log.error("ledger spill cannot be read: %s", error.strerror)

    async def _replay_line(self, line: bytes) -> None:
        try:
            requests, calls, savings = orjson.loads(line)
            requests = [(*r, *_ADDED[len(_ADDED) - len(REQUEST_COLUMNS) + len(r) :]) for r in requests]
            rows: Rows = ([tuple(r) for r in requests], [tuple(c) for c in calls], [tuple(s) for s in savings])
        except (ValueError, TypeError):
            self.refused += 1  # torn by a crash while it was being written
            log.error("a line of the ledger spill is torn; skipped")
            return
        try:
            await self._writer.submit(self._work, rows)
            self.written += len(rows[0])
        except CacheFault as fault:
            if fault.code != "store_refused":
                raise
            await self._one_by_one(rows)


class _Insert:
    """INSERT … ON CONFLICT DO NOTHING for one table, spelled once.

    The driver repeats it row by row: one INSERT of 32 rows was measured at twice the CPU (22 Nov 2026, SQLite 3.40).
    """

    def __init__(self, table: Table, columns: tuple[str, ...], dialect: str) -> None:
        names = list(columns)
        if dialect == "sqlite":
            one = sqlite.insert(table).on_conflict_do_nothing()
            self._text = str(one.compile(dialect=sqlite.dialect(), column_keys=names))
        else:
            many = postgresql.insert(table).on_conflict_do_nothing()
            self._text = str(many.compile(dialect=asyncpg.dialect(), column_keys=names))  # type: ignore[no-untyped-call]

    async def run(self, connection: AsyncConnection, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            await connection.exec_driver_sql(self._text, rows)


def _read_lines(path: Path, offset: int) -> list[bytes]:
    """Up to about 1 MiB of lines from an offset; a last line without its end counts as a line."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.readlines(1 << 20)
