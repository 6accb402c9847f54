"""Rows of virtual keys, and what the ledger says each has spent. A secret never comes here, only its digest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from sqlalchemy import BigInteger, Row, case, cast, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.keys import Cost, Key, Kind, Limit, Window
from proxy.core.model import Outcome
from proxy.store.engine import Database
from proxy.store.ledger import SqlLedger
from proxy.store.schema import api_key, request, upstream_call
from proxy.store.writer import Writer

IDS_AT_ONCE = 500
_FIELDS = tuple(Key.__dataclass_fields__)


class Keys:
    """Owner: `Store`. Every method raises CacheFault when the database cannot answer."""

    def __init__(self, database: Database, writer: Writer, ledger: SqlLedger) -> None:
        self._database = database
        self._writer = writer
        self._ledger = ledger

    @property
    def is_shared(self) -> bool:
        """Other processes may write to this database."""
        return self._database.dialect == "postgresql"

    async def mark(self) -> object:
        """Differs from an earlier one when keys were made, changed or removed since."""
        c = api_key.c
        counts = select(func.count(), func.count(c.revoked_ms), func.coalesce(func.max(c.changed_ms), 0))
        return tuple((await self._database.rows(counts))[0])

    async def keys(self) -> Sequence[Key]:
        """All of them, revoked ones too."""
        return [_key_of(row) for row in await self._database.rows(select(*[api_key.c[name] for name in _FIELDS]))]

    async def create(self, key: Key) -> None:
        await self._change(insert(api_key).values(_values(key)), key.created_ms)

    async def revoke(self, key_id: str, now_ms: int) -> Key | None:
        """Revoke a key, the first time for good; the key as it is now."""
        change = update(api_key).where(api_key.c.id == key_id, api_key.c.revoked_ms.is_(None))
        await self._change(change.values(revoked_ms=now_ms), now_ms)
        return await self._find(key_id)

    async def rotate(self, key_id: str, digest: bytes, now_ms: int) -> Key | None:
        """Give a key another secret; the key as it is now, None when there is none to open with it."""
        change = update(api_key).where(api_key.c.id == key_id, api_key.c.revoked_ms.is_(None))
        if not await self._change(change.values(digest=digest, rotated_ms=now_ms), now_ms):
            return None
        return await self._find(key_id)

    async def _find(self, key_id: str) -> Key | None:
        wanted = select(*[api_key.c[name] for name in _FIELDS]).where(api_key.c.id == key_id)
        return next((_key_of(row) for row in await self._database.rows(wanted)), None)

    async def _change(self, statement: Any, now_ms: int) -> bool:
        """Whether a row changed."""

        async def act(connection: AsyncConnection) -> bool:
            last = (await connection.execute(select(func.coalesce(func.max(api_key.c.changed_ms), 0)))).scalar_one()
            done = await connection.execute(statement.values(changed_ms=max(now_ms, last + 1)))
            return bool(done.rowcount)

        return await self._writer.run(act)

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[bool]:
        """Inside, the ledger writes nothing; True when all that was recorded before is in the database."""
        async with self._ledger.settled() as is_settled:
            yield is_settled

    async def unwritten(self) -> Sequence[Outcome]:
        """Inside `settled`: what keys caused that is on file and not in the database."""
        found = {outcome.request_id: outcome for outcome in await self._ledger.on_file()}
        ids = list(found)
        for at in range(0, len(ids), IDS_AT_ONCE):
            known = select(request.c.id).where(request.c.id.in_(ids[at : at + IDS_AT_ONCE]))
            for (request_id,) in await self._database.rows(known):
                del found[request_id]
        return list(found.values())

    async def spent(self, key_ids: Sequence[str], starts: Mapping[str, int]) -> Mapping[tuple[str, str], Cost]:
        """(key id, window) → what its requests took that began at or after the window's start.

        Tokens are those the client saw; where none were told it, those its calls were billed for.
        """
        found: dict[tuple[str, str], Cost] = {}
        r, call = request.c, upstream_call.c
        billed = select(func.sum(call.in_tok + call.out_tok)).where(call.request_id == r.id).scalar_subquery()
        is_audit = r.cache_status == "AUDIT"  # ours: its money counts, its question does not
        kinds = (
            r.actual_nusd,
            case((is_audit, 0), else_=1),
            case((is_audit, 0), else_=func.coalesce(r.in_tok + r.out_tok, cast(billed, BigInteger), 0)),
        )
        begun = [(window, r.ts >= start_ms) for window, start_ms in starts.items()]
        sums = [cast(func.sum(case((has, kind), else_=0)), BigInteger) for _, has in begun for kind in kinds]
        for at in range(0, len(key_ids), IDS_AT_ONCE):
            wanted = (
                select(r.key_id, *sums)
                .where(r.key_id.in_(key_ids[at : at + IDS_AT_ONCE]), r.ts >= min(starts.values()))
                .group_by(r.key_id)
            )
            for key_id, *values in await self._database.rows(wanted):
                for number, window in enumerate(starts):
                    found[key_id, window] = Cost(*values[3 * number : 3 * number + 3])
        return found


def _values(key: Key) -> dict[str, Any]:
    values = {name: getattr(key, name) for name in _FIELDS}
    limits = [[limit.kind.value, limit.amount, limit.window.value] for limit in key.limits]
    return values | {"limits": orjson.dumps(limits).decode(), "models": orjson.dumps(list(key.models)).decode()}


def _key_of(row: Row[Any]) -> Key:
    values = dict(zip(_FIELDS, row, strict=True))
    limits = [Limit(Kind(kind), amount, Window(window)) for kind, amount, window in orjson.loads(values["limits"])]
    models = tuple(orjson.loads(values["models"]))
    return Key(**values | {"digest": bytes(values["digest"]), "limits": tuple(limits), "models": models})
