"""Votes of the router as rows: whether a candidate's answer to the question of an entry was good."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.ports import Vote
from proxy.store.engine import Database
from proxy.store.schema import route_vote
from proxy.store.writer import Writer

KEPT = 200_000
PIECE = 1_000


class RouteVotes:
    """Append-only; the newest KEPT stay."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer

    async def record(self, vote: Vote) -> None:
        """Raises CacheFault."""
        row = {
            "ts": vote.ts_ms, "entry_id": vote.entry_id, "candidate": vote.candidate, "good": int(vote.good),
            "source": vote.source, "request_id": vote.request_id,
        }  # fmt: skip

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(insert(route_vote), row)

        await self._writer.run(act)

    async def newest(self, limit: int, after_id: int = 0) -> Sequence[tuple[int, Vote]]:
        """(row id, vote) of the newest rows with a higher id, oldest first. Raises CacheFault."""
        c = route_vote.c
        statement = (
            select(c.id, c.ts, c.entry_id, c.candidate, c.good, c.source, c.request_id)
            .where(c.id > after_id)
            .order_by(c.id.desc())
            .limit(limit)
        )
        rows = await self._database.rows(statement)
        return [(row[0], Vote(row[1], row[2], row[3], bool(row[4]), row[5], row[6])) for row in reversed(rows)]

    async def housekeep(self) -> None:
        """Keep the newest KEPT rows. Raises CacheFault."""
        ((newest,),) = await self._database.rows(select(func.coalesce(func.max(route_vote.c.id), 0)))
        old = select(route_vote.c.id).where(route_vote.c.id <= newest - KEPT).limit(PIECE)

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(delete(route_vote).where(route_vote.c.id.in_(old)))

        if newest > KEPT:
            await self._writer.run(act)
