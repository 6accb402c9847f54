"""Rows of the purges that were made: the order of what narrows, for all processes of a database.

A purge takes its number in the transaction that removes. On SQLite one writer runs one transaction after the other. On
PostgreSQL a lock of the database does the same for these: a purge waits until every transaction that stores has ended,
and those that follow wait for it. So what is stored has either been seen by the purge, or sees it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.purges import Purge, Purges, Selector, prefixes
from proxy.store.engine import Database
from proxy.store.schema import purge
from proxy.store.writer import Writer

log = logging.getLogger(__name__)

_LOCK: Final = int.from_bytes(b"purges", "big")
_COLUMNS = (purge.c.number, purge.c.ts, purge.c.selector, purge.c.removed)


class PurgeLog:
    """Owner: `Entries`. `known` is what the rows say, as far as they were read; `read` and `catch_up` read on."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer
        self.known = Purges()

    async def read(self) -> None:
        """Take up what any process has purged. Raises CacheFault."""
        newer = select(*_COLUMNS).where(purge.c.number > self.known.newest).order_by(purge.c.number)
        self.known.learn(map(_purge, await self._database.rows(newer)))

    async def catch_up(self, connection: AsyncConnection, *, alone: bool = False) -> None:
        """The same inside a transaction: until it ends no purge is made, and `alone` nothing is stored either."""
        if connection.dialect.name == "postgresql":
            take = func.pg_advisory_xact_lock if alone else func.pg_advisory_xact_lock_shared
            await connection.execute(select(take(_LOCK)))
        newer = select(*_COLUMNS).where(purge.c.number > self.known.newest).order_by(purge.c.number)
        self.known.learn(map(_purge, (await connection.execute(newer)).all()))

    async def record(
        self, connection: AsyncConnection, selector: Selector, fingerprints: Iterable[bytes], now_ms: int
    ) -> Purge:
        """Write a purge down, in the transaction that removed these and was `alone`. It is known once it is read."""
        made = Purge(self.known.newest + 1, now_ms, selector, prefixes(fingerprints))
        row = {"number": made.number, "ts": now_ms, "selector": json.dumps(asdict(selector)), "removed": made.removed}
        await connection.execute(insert(purge), row)
        return made

    async def housekeep(self, now_ms: int) -> None:
        """Remove the rows of what nothing under way is older than. Raises CacheFault."""
        await self.read()
        forgotten = self.known.forget(now_ms)

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(delete(purge).where(purge.c.number <= forgotten))

        if forgotten:
            await self._writer.run(act)


def _purge(row: Sequence[Any]) -> Purge:
    said = json.loads(row[2])
    selector = Selector(**{**said, "ids": tuple(said["ids"]), "tags": tuple(said["tags"])})
    return Purge(row[0], row[1], selector, bytes(row[3]))
