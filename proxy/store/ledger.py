"""Where lookups and savings are written, off the request's path.

`record` appends to the journal (`store/journal.py`), a file, and to a list. A task empties the list every 200 ms, or at
512 outcomes: it settles them in slices of a fraction of a millisecond, giving the loop back between slices (settling is
Python under the GIL, so a thread would stall the loop just as long, plus the hand-over), and inserts them through the
store's writer. The journal forgets what SQL has committed. What a killed process had recorded is settled and inserted
by the next one, from the journal, at the prices it then knows for that day.

A database that does not write costs nothing but disk: the list is let go, the journal keeps the outcomes, and all of
them are inserted from it when the database is back, or at the next start. Every row has its own id and an id already
present is left alone, so inserting twice changes nothing. What the journal does not take (its disk is full, or it holds
LIMIT_BYTES) waits in memory up to a bound, then the newest outcomes are dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.errors import CacheFault
from proxy.core.model import Outcome, again
from proxy.core.saving import CALL_COLUMNS, REQUEST_COLUMNS, SAVING_COLUMNS, Dated, Pricing, Settlement, settle
from proxy.core.units import DAY_MS
from proxy.store import journal
from proxy.store.engine import Database
from proxy.store.journal import Journal, Recurred
from proxy.store.schema import lookup, request, saving, upstream_call
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
MEMORY_LIMIT = 100_000  # outcomes kept in memory: of the journal's, to spare reading them; of all others, at all
REPLAY_ROWS = 2048  # read from the journal at once
SETTLED_LIMIT = 8192  # distinct outcomes remembered, about 1 KiB each
SPILL_NAME = "ledger-spill.jsonl"  # settled rows that an earlier release could not insert

Rows = tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], list[tuple[Any, ...]], list[tuple[Any, ...]]]
"""Rows of request, upstream_call, saving and lookup, in their columns' order."""

_TABLES: tuple[tuple[Table, tuple[str, ...]], ...] = (
    (request, REQUEST_COLUMNS),
    (upstream_call, CALL_COLUMNS),
    (saving, SAVING_COLUMNS),
    (lookup, ("request_id", "record")),
)


_ENTRY = REQUEST_COLUMNS.index("entry_id")
_LANE = REQUEST_COLUMNS.index("lane")
_ADDED = (None, "")  # last columns of `request` that a spill of an earlier release does not have: key_id, team
_FORWARDS = frozenset({"forward", "bypass", "refused"})


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
        self._journal = Journal(database.data_dir)
        self._waiting: list[Outcome | Recurred] = []  # on file too
        self._loose: list[Outcome | Recurred] = []  # in memory only
        self._inserted = 0  # of the outcomes on file, in their order: those whose rows are in SQL
        self._owes = False  # outcomes are on file that are neither in memory nor known to be in SQL
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._flushing = asyncio.Lock()
        self._spill_path = database.data_dir / SPILL_NAME
        self._inserts = [_Insert(table, columns, database.dialect) for table, columns in _TABLES]
        self._settled: dict[int, Dated] = {}  # by identity; each keeps its key alive
        self._work = self._insert
        self.written = 0  # outcomes now in the database, replays included
        self.spilled = 0  # outcomes that were left to the journal, because the database did not write
        self.dropped = 0  # outcomes lost: no database, no disk, memory bound reached
        self.refused = 0  # outcomes no database takes (or that could not be settled), and torn lines

    def record(self, outcome: Outcome) -> None:
        """On file when it returns, if the disk takes it. Never waits for the database, never raises."""
        self._keep(outcome, self._journal.append(outcome))

    def record_again(self, recurring: tuple[Any, ...], request_id: str, ts_ms: int, total_ms: float) -> None:
        """As `record(again(...))`, for outcomes that recur by the thousand: they are settled once, then dated."""
        is_on_file = self._journal.append_again(recurring, request_id, ts_ms, total_ms)
        self._keep(Recurred(recurring, request_id, ts_ms, total_ms), is_on_file)

    def _keep(self, outcome: Outcome | Recurred, is_on_file: bool) -> None:
        kept = self._waiting if is_on_file else self._loose
        if len(kept) >= FLUSH_ROWS:
            self._full.set()
            if len(kept) >= MEMORY_LIMIT:
                if is_on_file:
                    self._owes = True
                else:
                    self.dropped += 1
                return
        kept.append(outcome)

    @property
    def waiting(self) -> int:
        """Outcomes in memory that are not in the database."""
        return len(self._waiting) + len(self._loose)

    @property
    def unprotected(self) -> int:
        """Outcomes that are neither in the database nor on file."""
        return len(self._loose)

    @property
    def owes(self) -> bool:
        """Outcomes of before wait in the journal for a database that writes."""
        return self._owes

    @property
    def journal_bytes(self) -> int:
        return self._journal.size_bytes

    @property
    def state(self) -> str:
        """ "ok"; "dropping" once rows were lost; why a kill could lose some now: journal_full, journal_down; "refused"
        once the database took one for none."""
        if self.dropped:
            return "dropping"
        if self._journal.state != "ok":
            return self._journal.state
        return "refused" if self.refused else "ok"

    async def start(self) -> None:
        """Insert what earlier processes recorded, then flush in the background."""
        try:
            self._journal.find()
        except OSError as error:
            log.error("the ledger's journal cannot be read: %s", error.strerror)
        self._owes = self._spill_path.exists() or bool(self._journal.sealed)
        if self._owes:
            log.info("the ledger takes up what is on file", extra={"bytes": self._journal.size_bytes})
        await self._replay()
        self._task = asyncio.create_task(self._run(), name="store-ledger")

    async def close(self) -> None:
        """Everything recorded so far is in the database, or on file for the next start."""
        self._closing = True
        self._full.set()
        if self._task is not None:
            await self._task
        await self.flush()
        self._journal.seal()
        if not self._owes:
            self._journal.forget(self._inserted)
        if self._loose:
            log.error("ledger rows lost: neither database nor disk took them", extra={"rows": len(self._loose)})
            self.dropped += len(self._loose)

    async def flush(self) -> None:
        """Write what waits now; returns when it is in the database, or left to the journal."""
        async with self._flushing:
            await self._empty()

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[bool]:
        """Inside, nothing is written; True when all that was recorded before it is in the database."""
        async with self._flushing:
            await self._empty()
            yield not (self._waiting or self._loose or self._owes)

    async def on_file(self) -> Sequence[Outcome]:
        """Inside `settled`: what virtual keys caused that the journal holds. Some of it may be in the database too."""
        current = self._journal.path
        paths = self._journal.sealed if current is None else [*self._journal.sealed, current]
        return await asyncio.to_thread(_read_keyed, paths)

    async def _empty(self) -> None:
        if self._owes and self._writer.is_trying and await self._write(()):
            await self._replay()
        while self._waiting and not self._owes:
            batch, self._waiting = self._waiting[:BATCH_ROWS], self._waiting[BATCH_ROWS:]
            if await self._write(batch):
                self._inserted += len(batch)
                if not self._owes:
                    self._journal.forget(self._inserted)
            else:
                self.spilled += len(batch)
                self._owes = True
        if self._owes:
            await self._let_go()
        if self._loose and not self._owes:
            batch, self._loose = self._loose, []
            if not await self._write(batch):
                self._loose[:0] = batch
                self.dropped += max(len(self._loose) - MEMORY_LIMIT, 0)
                del self._loose[MEMORY_LIMIT:]

    async def _let_go(self) -> None:
        """Leave what waits to the journal. It may be long until SQL has it: the disk shall, meanwhile."""
        if not self._waiting:
            return
        self.spilled += len(self._waiting)
        self._waiting.clear()
        try:
            await asyncio.to_thread(journal.sync, self._journal.to_sync())
        except OSError as error:
            log.error("the ledger's journal cannot be synced: %s", error.strerror)

    async def _run(self) -> None:
        while not self._closing:
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._full.wait()
            except TimeoutError:
                pass
            self._full.clear()
            if self._waiting or self._loose or self._owes:
                await self.flush()

    async def _write(self, batch: Sequence[Outcome | Recurred]) -> bool:
        """Settle and insert; False when the database does not write."""
        try:
            await self._submit(await self._settle(batch))
        except CacheFault as fault:
            log.info("ledger rows wait: %s", fault.message)
            return False
        return True

    async def _submit(self, rows: Rows) -> None:
        """Insert, without those rows that no database takes. Raises CacheFault when the database does not write."""
        try:
            await self._writer.submit(self._work, rows)
            self.written += len(rows[0])
        except CacheFault as fault:
            if fault.code != "store_refused":
                raise
            if len(rows[0]) > 1:
                for row in rows[0]:
                    await self._submit(_rows_of(row, rows))
            else:
                self.refused += 1
                log.error("ledger row refused: %s", fault.message)

    async def _settle(self, batch: Sequence[Outcome | Recurred]) -> Rows:
        requests: list[tuple[Any, ...]] = []
        calls: list[tuple[Any, ...]] = []
        savings: list[tuple[Any, ...]] = []
        lookups: list[tuple[Any, ...]] = []
        price, on_hit = self._price, self._on_hit
        size = max(SLICE, len(batch) // TURNS)
        for start in range(0, len(batch), size):
            for outcome in batch[start : start + size]:
                try:
                    settlement = self._date(outcome) if isinstance(outcome, Recurred) else settle(outcome, price)
                except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # a malformed outcome of ours
                    self.refused += 1
                    log.error("outcome cannot be settled: %s", type(error).__name__)
                    continue
                requests.append(settlement.request)
                calls += settlement.calls
                savings += settlement.savings
                if isinstance(outcome, Outcome) and outcome.looked:
                    lookups.append((outcome.request_id, outcome.looked))
                row = settlement.request
                if on_hit is not None and row[_ENTRY] is not None and row[_LANE] not in _FORWARDS:
                    on_hit(row[_ENTRY], row[1])
            await asyncio.sleep(0)
        return requests, calls, savings, lookups

    def _date(self, hit: Recurred) -> Settlement:
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

    async def _replay(self) -> None:
        """Insert all that is on file and remove it there; what the database does not take now stays."""
        if not self._owes:
            return
        self._journal.seal()
        self._waiting.clear()  # on file as well
        end = self._journal.appended
        try:
            if self._spill_path.exists():
                await self._replay_spill()
            for path in self._journal.sealed:
                await self._replay_segment(path)
                self._journal.remove(path)
            self._inserted = end
            self._owes = self._journal.appended - end > len(self._waiting)  # more came than memory takes
        except CacheFault as fault:
            log.warning("ledger rows wait on file: %s", fault.message)
        except OSError as error:
            log.error("the ledger's journal cannot be read: %s", error.strerror)

    async def _replay_segment(self, path: Path) -> None:
        lines = journal.read(path)
        while batch := await asyncio.to_thread(_take, lines):
            outcomes = [outcome for outcome in batch if outcome is not None]
            if torn := len(batch) - len(outcomes):
                self.refused += torn
                log.error("lines of the ledger's journal are torn; skipped", extra={"lines": torn})
            await self._submit(await self._settle(outcomes))

    async def _replay_spill(self) -> None:
        """Rows as an earlier release settled them, many on a line."""
        offset = 0
        while lines := await asyncio.to_thread(_read_lines, self._spill_path, offset):
            for line in lines:
                offset += len(line)
                try:
                    requests, calls, savings = orjson.loads(line)
                    requests = [(*r, *_ADDED[len(_ADDED) - len(REQUEST_COLUMNS) + len(r) :]) for r in requests]
                    rows: Rows = (list(map(tuple, requests)), list(map(tuple, calls)), list(map(tuple, savings)), [])
                except (ValueError, TypeError):
                    self.refused += 1  # torn by a crash while it was being written
                    log.error("a line of the ledger spill is torn; skipped")
                else:
                    await self._submit(rows)
        await asyncio.to_thread(self._spill_path.unlink, missing_ok=True)


def _rows_of(row: tuple[Any, ...], rows: Rows) -> Rows:
    """The rows of one request among those of many."""
    identity = row[0]
    calls = [call for call in rows[1] if call[1] == identity]
    steps, lookups = ([one for one in of if one[0] == identity] for of in rows[2:])
    return [row], calls, steps, lookups


def _take(lines: Iterator[Outcome | Recurred | None]) -> list[Outcome | Recurred | None]:
    return list(islice(lines, REPLAY_ROWS))


def _read_keyed(paths: Sequence[Path]) -> list[Outcome]:
    outcomes = (outcome for path in paths for outcome in journal.read(path) if outcome is not None)
    whole = (again(*o, o.total_ms) if isinstance(o, Recurred) else o for o in outcomes)
    return [outcome for outcome in whole if outcome.key_id is not None]


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
