"""The whole store behind one door: open it, use its parts, close it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import insert, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.rates import Rating
from proxy.core.saving import Pricing
from proxy.store import migrate
from proxy.store.acts import Acts
from proxy.store.batches import Batches
from proxy.store.comparisons import Comparisons
from proxy.store.engine import DATABASE_ERRORS, Database, open_database, transaction, unavailable
from proxy.store.entries import Entries
from proxy.store.keys import Keys
from proxy.store.ledger import SqlLedger
from proxy.store.queries import Queries
from proxy.store.schema import HEAD, entry, feedback, request
from proxy.store.votes import RouteVotes
from proxy.store.writer import QUEUE_LIMIT, Writer

log = logging.getLogger(__name__)


@dataclass
class Store:
    """Everything SQL. Owner: the composition root, which calls `close` last, after the pipeline has stopped."""

    database: Database
    writer: Writer
    entries: Entries
    ledger: SqlLedger
    queries: Queries
    comparisons: Comparisons
    votes: RouteVotes
    keys: Keys
    batches: Batches
    acts: Acts

    @property
    def state(self) -> str:
        """ "ok", "full", "down", or "gone" when the file is not where it was: what /readyz says of the store."""
        if self.database.is_gone:
            return "gone"
        if self.writer.state == "ok":
            return "down" if self.database.is_failing else "ok"
        return "full" if self.writer.state == "store_full" else "down"

    async def ping(self) -> None:
        """One round trip to the database. Raises CacheFault."""
        await self.database.rows(select(literal(1)))

    async def feedback(
        self,
        *,
        verdict: str,
        ts_ms: int,
        request_id: str | None = None,
        entry_id: int | None = None,
        source: str = "admin",
    ) -> int | None:
        """Record a judgement ("right" | "wrong") of a request's or an entry's answer.

        The entry it speaks of: its id, 0 when the request had none, None when neither is known (nothing is recorded).
        A request just answered is flushed first, so it can be judged at once. Raises CacheFault.
        """
        if request_id is not None:
            await self.ledger.flush()
            rows = await self.database.rows(select(request.c.entry_id).where(request.c.id == request_id))
            if not rows:
                return None
            entry_id = rows[0][0] if entry_id is None else entry_id
        elif entry_id is None or not await self.database.rows(select(entry.c.id).where(entry.c.id == entry_id)):
            return None
        row = {"ts": ts_ms, "request_id": request_id, "entry_id": entry_id, "verdict": verdict, "source": source}

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(insert(feedback), row)

        await self.writer.run(act)
        return entry_id or 0

    async def close(self) -> None:
        """Flush the ledger, finish queued writes, close every connection, release the directory."""
        await self.ledger.close()
        await self.comparisons.close()
        await self.writer.close()
        await self.database.close()


async def open_store(
    url: str | None,
    data_dir: Path,
    *,
    price: Pricing,
    rates: Rating | None = None,
    limit_entries: int = 100_000,
    limit_bytes: int = 1 << 30,
    queue_limit: int = QUEUE_LIMIT,
) -> Store:
    """Open, check the schema, create it in an empty database, start the writer and the ledger.

    `url`: sqlite:///FILE or postgresql://…; None is DATA_DIR/ibid.db. `price`, `rates`: those of `Prices(...)`.
    Raises ConfigError: directory not writable, symbolic link, schema older (names `ibid migrate`) or newer; and NotYet:
    directory in use, database unreachable. A corrupt SQLite file is moved aside: `store.database.quarantined` names it.
    """
    database = open_database(url, data_dir)
    writer = Writer(database, queue_limit)
    entries = Entries(database, writer, limit_entries=limit_entries, limit_bytes=limit_bytes)
    ledger = SqlLedger(database, writer, price, on_hit=entries.mark_used)
    try:
        await _ensure_schema(database)
        writer.start()
        await entries.load()
        await ledger.start()
    except BaseException:
        await writer.close()
        await database.close()
        raise
    return Store(
        database,
        writer,
        entries,
        ledger,
        Queries(database, rates),
        Comparisons(database, writer),
        RouteVotes(database, writer),
        Keys(database, writer, ledger),
        Batches(database, writer),
        Acts(database, writer),
    )


async def migrate_store(url: str | None, data_dir: Path) -> migrate.Migrated:
    """Bring the database to this program's schema in one transaction; an older SQLite file is copied first.

    Raises ConfigError as `open_store` does, and when the schema is newer than this program.
    """
    database = open_database(url, data_dir)
    try:
        before = await _revision(database)
        if before is None or before == HEAD:
            if before is None:
                await _upgrade(database)
            return migrate.Migrated(before, HEAD, None)
        if before not in migrate.known_revisions():
            migrate.refuse_unless_current(before)
        backup = await _back_up(database, before)
        await _upgrade(database)
        return migrate.Migrated(before, HEAD, backup)
    finally:
        await database.close()


async def _ensure_schema(database: Database) -> None:
    found = await _revision(database)
    migrate.refuse_unless_current(found)
    if found is None:
        await _upgrade(database)
        database.is_new = True


async def _revision(database: Database) -> str | None:
    """Read through a reader: a schema that is not ours must not be written to, not even its journal mode."""
    try:
        async with database.reader.connect() as connection:
            return await connection.run_sync(migrate.revision_of)
    except DATABASE_ERRORS as error:
        raise unavailable(database.label, error) from error


async def _upgrade(database: Database) -> None:
    try:
        async with database.writer.connect() as connection, transaction(connection):
            await connection.run_sync(migrate.upgrade)
    except DATABASE_ERRORS as error:
        raise unavailable(database.label, error) from error


async def _back_up(database: Database, revision: str) -> str | None:
    """A copy of the SQLite file beside it, mode 0600; PostgreSQL has its own tools."""
    if database.path is None:
        return None
    target = database.path.with_name(f"{database.path.name}.{revision}-{time.time_ns() // 1_000_000}.bak")
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    async with database.writer.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        await (await raw.execute("VACUUM INTO ?", (str(target),))).close()
    await asyncio.to_thread(_sync, target)
    return str(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
