"""Who did what as an administrator: a row before each act and its outcome after it, so that none goes unrecorded.

An act whose outcome is still "begun" was cut off, by a crash perhaps, and may have been carried out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.store.engine import Database
from proxy.store.schema import act
from proxy.store.writer import Writer

BEGUN = "begun"


class Acts:
    """Append-only, but for the outcome of what was begun."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer

    async def begin(
        self, ts_ms: int, who: str, role: str, route: str, parameters: Mapping[str, Any], outcome: str = BEGUN
    ) -> int:
        """Id of a new row, durable. `parameters` hold neither secrets nor prompt text. Raises CacheFault."""
        said = json.dumps(parameters, ensure_ascii=False, sort_keys=True)
        row = {"ts": ts_ms, "who": who, "role": role, "route": route, "parameters": said, "outcome": outcome}

        async def write(connection: AsyncConnection) -> int:
            made = await connection.execute(insert(act).returning(act.c.id), row)
            return int(made.scalar_one())

        return await self._writer.run(write)

    async def end(self, act_id: int, outcome: str, touched: int | None) -> None:
        """What came of it; `touched`: how many rows, None where none are counted. Raises CacheFault."""
        change = update(act).where(act.c.id == act_id).values(outcome=outcome, touched=touched)

        async def write(connection: AsyncConnection) -> None:
            await connection.execute(change)

        await self._writer.run(write)

    async def recent(self, *, limit: int, before_id: int | None, about: str | None) -> Sequence[Mapping[str, Any]]:
        """Newest first. `about` is looked for literally in the route and the parameters. Raises CacheFault."""
        statement = select(act).order_by(act.c.id.desc()).limit(limit)
        if before_id is not None:
            statement = statement.where(act.c.id < before_id)
        if about is not None:
            told = act.c.route + " " + act.c.parameters
            statement = statement.where(told.contains(about, autoescape=True))
        rows = await self._database.rows(statement)
        return [{**row._mapping, "parameters": json.loads(row.parameters)} for row in rows]
