"""Rows of batches: files in compressed chunks, jobs, lines, parts at providers, deferred calls.

All of it is in SQL, the bytes of files included, so that every process of a fleet sees them and a copy of the database
is a copy of everything. A job is run by one process: the one whose name is in `worker`, until `lease_ms`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields
from typing import Any

import orjson
from sqlalchemy import ColumnElement, and_, case, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.batches import ENDED, BatchFile, Deferred, Job, LineRow, Part
from proxy.store.engine import Database
from proxy.store.schema import batch_chunk, batch_file, batch_job, batch_line, batch_part, deferred
from proxy.store.writer import Writer

PIECE_ROWS = 250
UPLOAD_S = 3600  # an upload that took longer was given up
_FILE = tuple(spec.name for spec in fields(BatchFile))
_JOB = tuple(spec.name for spec in fields(Job))
_PART = tuple(spec.name for spec in fields(Part))
_DEFERRED = tuple(spec.name for spec in fields(Deferred))
_JSON = ("headers", "metadata", "errors", "times")
_PROGRESS = (
    "status", "errors", "times", "total", "succeeded", "errored", "expired", "cancelled", "output_bytes",
    "error_bytes", "output_file_id", "error_file_id",
)  # fmt: skip


class Batches:
    """Owner: `Store`. Every method raises CacheFault when the database cannot answer."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer
        self._make = sqlite.insert if database.dialect == "sqlite" else postgresql.insert

    # -- files ----------------------------------------------------------------------------------------------------

    async def begin_file(self, file: BatchFile) -> None:
        """A file whose bytes follow; nobody sees it before `end_file`. Once more is no fault."""
        await self._run(self._make(batch_file).values(whole=0, **_row_of_file(file)).on_conflict_do_nothing())

    async def add_chunk(self, file_id: str, number: int, data: bytes) -> None:
        packed = await asyncio.to_thread(zlib.compress, data, 1)
        await self._run(insert(batch_chunk).values(file_id=file_id, number=number, data=packed))

    async def end_file(self, file: BatchFile) -> None:
        """It is whole, of the size it now has."""
        values = {name: getattr(file, name) for name in ("size_bytes", "filename", "expires_ms")} | {"whole": 1}
        await self._run(update(batch_file).where(batch_file.c.id == file.id).values(values))

    async def file(self, file_id: str, tenant: str) -> BatchFile | None:
        """A whole file of this tenant's."""
        found = await self._files(batch_file.c.id == file_id, batch_file.c.tenant == tenant)
        return found[0] if found else None

    async def files(self, tenant: str) -> list[BatchFile]:
        """Newest first, those of Anthropic's requests left out."""
        return await self._files(batch_file.c.tenant == tenant, batch_file.c.purpose != "requests")

    async def _files(self, *conditions: Any) -> list[BatchFile]:
        statement = (
            select(*(batch_file.c[name] for name in _FILE))
            .where(batch_file.c.whole == 1, *conditions)
            .order_by(batch_file.c.created_ms.desc(), batch_file.c.id)
        )
        return [BatchFile(*row) for row in await self._database.rows(statement)]

    async def bytes_of_files(self, tenant: str) -> tuple[int, int]:
        """Of all whole files that were handed in, and of this tenant's."""
        size, handed_in = batch_file.c.size_bytes, (batch_file.c.whole == 1, batch_file.c.part == "input")
        own = case((batch_file.c.tenant == tenant, size), else_=0)
        rows = await self._database.rows(select(func.sum(size), func.sum(own)).where(*handed_in))
        return int(rows[0][0] or 0), int(rows[0][1] or 0)

    async def delete_file(self, file_id: str) -> None:
        await self._run(delete(batch_file).where(batch_file.c.id == file_id))

    async def chunks(self, file_id: str) -> AsyncIterator[bytes]:
        """The bytes of an uploaded file, in order."""
        number = 0
        while data := await self.chunk(file_id, number):
            yield data
            number += 1

    async def chunk(self, file_id: str, number: int) -> bytes:
        """CHUNK_BYTES of a file, fewer at its end, b"" behind it."""
        statement = select(batch_chunk.c.data).where(batch_chunk.c.file_id == file_id, batch_chunk.c.number == number)
        rows = await self._database.rows(statement)
        return await asyncio.to_thread(zlib.decompress, rows[0][0]) if rows else b""

    # -- jobs -----------------------------------------------------------------------------------------------------

    async def create_job(self, job: Job, worker: str, lease_ms: int) -> None:
        await self._run(insert(batch_job).values(worker=worker, lease_ms=lease_ms, **_row_of_job(job)))

    async def job(self, job_id: str, tenant: str) -> Job | None:
        """A job of this tenant's."""
        found = await self._jobs(batch_job.c.id == job_id, batch_job.c.tenant == tenant)
        return found[0] if found else None

    async def jobs(self, tenant: str, dialect: str) -> list[Job]:
        """Newest first."""
        return await self._jobs(batch_job.c.tenant == tenant, batch_job.c.dialect == dialect)

    async def recent(self, *, limit: int, before: str | None) -> list[dict[str, Any]]:
        """For people: jobs of every tenant, newest first, without what was asked. `before`: "created_ms:id" of one."""
        shown = (
            "id", "tenant", "key_id", "dialect", "path", "status", "created_ms", "deadline_ms", "expires_ms", "total",
            "succeeded", "errored", "expired", "cancelled",
        )  # fmt: skip
        c = batch_job.c
        statement = select(*(c[name] for name in shown)).order_by(c.created_ms.desc(), c.id.desc()).limit(limit)
        if before is not None:
            created_ms, _, job_id = before.partition(":")
            statement = statement.where(
                or_(c.created_ms < int(created_ms), and_(c.created_ms == int(created_ms), c.id < job_id))
            )
        return [dict(row._mapping) for row in await self._database.rows(statement)]

    async def unfinished(self) -> list[Job]:
        """Every job that has not ended, whosever it is."""
        return await self._jobs(batch_job.c.status.not_in(sorted(ENDED)))

    async def _jobs(self, *conditions: Any) -> list[Job]:
        statement = (
            select(*(batch_job.c[name] for name in _JOB))
            .where(*conditions)
            .order_by(batch_job.c.created_ms.desc(), batch_job.c.id)
        )
        return [_job_of(row) for row in await self._database.rows(statement)]

    async def claim(self, job_id: str, worker: str, now_ms: int, lease_ms: int) -> bool:
        """Whether the job is this process's now: it has not ended, and nobody else holds it.

        SQLite has one process: whoever held it is gone.
        """
        free = (batch_job.c.lease_ms < now_ms) | (batch_job.c.worker == worker)
        mine = (batch_job.c.id == job_id) & batch_job.c.status.not_in(sorted(ENDED))
        if self._database.dialect == "postgresql":
            mine &= free

        return await self._claimed(update(batch_job).where(mine).values(worker=worker, lease_ms=lease_ms))

    async def _claimed(self, change: Any) -> bool:
        async def act(connection: AsyncConnection) -> bool:
            return (await connection.execute(change)).rowcount == 1

        return await self._writer.run(act)

    async def save(
        self, job: Job, lines: Sequence[LineRow], parts: Sequence[Part], worker: str, lease_ms: int
    ) -> str | None:
        """Keep lines, parts and the job's progress, together. A status "cancelling" that somebody else wrote stays;
        what the status is now, or None when the job is no longer this process's, or gone."""
        values = {name: value for name, value in _row_of_job(job).items() if name in _PROGRESS}
        mine = (batch_job.c.id == job.id) & (batch_job.c.worker == worker)

        async def act(connection: AsyncConnection) -> str | None:
            asked = select(batch_job.c.status, batch_job.c.times).where(mine)
            found = (await connection.execute(asked)).first()
            if found is None:
                return None
            kept = dict(values)
            if found[0] == "cancelling" and not job.is_ended:
                kept |= {"status": found[0], "times": found[1]}
            await connection.execute(update(batch_job).where(mine).values(lease_ms=lease_ms, **kept))
            upsert = self._upsert(batch_line, ("state", "part", "result"))
            for start in range(0, len(lines), PIECE_ROWS):
                rows = [{"job_id": job.id, **line._asdict()} for line in lines[start : start + PIECE_ROWS]]
                await connection.execute(upsert, rows)
            if parts:
                made = [{"job_id": job.id, **{name: getattr(part, name) for name in _PART}} for part in parts]
                await connection.execute(self._upsert(batch_part, _PART[1:]), made)
            return str(kept["status"])

        return await self._writer.run(act)

    def _upsert(self, table: Any, changed: Sequence[str]) -> Any:
        statement = self._make(table)
        return statement.on_conflict_do_update(
            index_elements=["job_id", "number"], set_={name: statement.excluded[name] for name in changed}
        )

    async def cancel(self, job_id: str, times: dict[str, int]) -> bool:
        """Mark a job that has not ended as cancelling; whether there was one."""
        open_ = (batch_job.c.id == job_id) & batch_job.c.status.not_in(sorted(ENDED))
        return await self._claimed(update(batch_job).where(open_).values(status="cancelling", times=_dumped(times)))

    async def delete_job(self, job: Job) -> None:
        """With its lines, and with its input when that came without a file."""

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(delete(batch_job).where(batch_job.c.id == job.id))
            unseen = (batch_file.c.id == job.input_file_id) & (batch_file.c.purpose == "requests")
            await connection.execute(delete(batch_file).where(unseen | (batch_file.c.job_id == job.id)))

        await self._writer.run(act)

    # -- lines and parts --------------------------------------------------------------------------------------------

    async def states(self, job_id: str) -> list[tuple[int, str, int | None]]:
        """(number, state, part) of every line there is a row for."""
        columns = (batch_line.c.number, batch_line.c.state, batch_line.c.part)
        rows = await self._database.rows(select(*columns).where(batch_line.c.job_id == job_id))
        return [(row[0], row[1], row[2]) for row in rows]

    async def parts(self, job_id: str) -> list[Part]:
        """In order."""
        statement = select(*(batch_part.c[name] for name in _PART)).where(batch_part.c.job_id == job_id)
        return [Part(*row) for row in await self._database.rows(statement.order_by(batch_part.c.number))]

    async def known_parts(self, provider_ids: Sequence[str]) -> set[str]:
        """Which of these are batches that we made at a provider."""
        if not provider_ids:
            return set()
        statement = select(batch_part.c.provider_id).where(batch_part.c.provider_id.in_(provider_ids))
        return {row[0] for row in await self._database.rows(statement)}

    async def results(self, job_id: str, part: str) -> AsyncIterator[bytes]:
        """Lines of an output: "output", "error", or "" for all, in the order of the input, many in each piece."""
        wanted: ColumnElement[bool] = batch_line.c.result.is_not(None)
        if part:
            wanted = wanted & ((batch_line.c.state == "ok") if part == "output" else (batch_line.c.state != "ok"))
        last = -1
        while True:
            statement = (
                select(batch_line.c.number, batch_line.c.result)
                .where(batch_line.c.job_id == job_id, batch_line.c.number > last, wanted)
                .order_by(batch_line.c.number)
                .limit(PIECE_ROWS)
            )
            rows = await self._database.rows(statement)
            if not rows:
                return
            last = rows[-1][0]
            yield b"".join([row[1] for row in rows])

    async def result(self, job_id: str, number: int) -> bytes | None:
        """One line of the results, once it is there."""
        statement = select(batch_line.c.result).where(batch_line.c.job_id == job_id, batch_line.c.number == number)
        rows = await self._database.rows(statement)
        return rows[0][0] if rows else None

    # -- deferred calls ---------------------------------------------------------------------------------------------

    async def put_deferred(self, call: Deferred, worker: str, lease_ms: int) -> None:
        values = {name: getattr(call, name) for name in _DEFERRED} | {"worker": worker, "lease_ms": lease_ms}
        values |= {"headers": _dumped(call.headers), "needs_owner": int(call.needs_owner)}
        await self._run(insert(deferred).values(values))

    async def deferred(self, call_id: str, tenant: str) -> Deferred | None:
        """A call of this tenant's."""
        found = await self._deferred(deferred.c.id == call_id, deferred.c.tenant == tenant)
        return found[0] if found else None

    async def open_deferred(self) -> list[Deferred]:
        """Those without a reply that went with no batch yet, or with one that was never made."""
        return await self._deferred(deferred.c.reply.is_(None), deferred.c.job_id.not_in(select(batch_job.c.id)))

    async def _deferred(self, *conditions: Any) -> list[Deferred]:
        statement = select(*(deferred.c[name] for name in _DEFERRED)).where(*conditions)
        found = []
        for row in await self._database.rows(statement.order_by(deferred.c.created_ms, deferred.c.id)):
            values = dict(row._mapping)
            values |= {"headers": _pairs(values["headers"]), "needs_owner": bool(values["needs_owner"])}
            found.append(Deferred(**values))
        return found

    async def claim_deferred(self, call_id: str, worker: str, now_ms: int, lease_ms: int) -> bool:
        """As `claim`, of a call."""
        open_ = (deferred.c.id == call_id) & deferred.c.reply.is_(None)
        if self._database.dialect == "postgresql":
            open_ &= deferred.c.lease_ms < now_ms
        return await self._claimed(update(deferred).where(open_).values(worker=worker, lease_ms=lease_ms))

    async def settle_deferred(self, call_id: str, reply: bytes) -> None:
        await self._run(update(deferred).where(deferred.c.id == call_id).values(reply=reply))

    async def join_deferred(self, job_id: str, call_ids: Sequence[str]) -> None:
        """They went with this batch, in this order."""

        async def act(connection: AsyncConnection) -> None:
            for number, call_id in enumerate(call_ids):
                change = update(deferred).where(deferred.c.id == call_id).values(job_id=job_id, number=number)
                await connection.execute(change)

        await self._writer.run(act)

    # -- upkeep -------------------------------------------------------------------------------------------------------

    async def housekeep(self, now_ms: int) -> None:
        """Delete what has expired, and uploads that never ended."""
        abandoned = (batch_file.c.whole == 0) & (batch_file.c.created_ms < now_ms - UPLOAD_S * 1000)

        async def act(connection: AsyncConnection) -> None:
            await connection.execute(delete(batch_job).where(batch_job.c.expires_ms < now_ms))
            await connection.execute(delete(batch_file).where((batch_file.c.expires_ms < now_ms) | abandoned))
            await connection.execute(delete(deferred).where(deferred.c.expires_ms < now_ms))

        await self._writer.run(act)

    async def _run(self, statement: Any) -> None:
        async def act(connection: AsyncConnection) -> None:
            await connection.execute(statement)

        await self._writer.run(act)


def _dumped(value: Any) -> str:
    return orjson.dumps(value).decode()


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in orjson.loads(text))


def _row_of_file(file: BatchFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in _FILE}


def _row_of_job(job: Job) -> dict[str, Any]:
    row = {name: getattr(job, name) for name in _JOB}
    row |= {name: _dumped(row[name]) for name in _JSON if row[name] is not None}
    return row | {"needs_owner": int(job.needs_owner)}


def _job_of(row: Any) -> Job:
    values = dict(row._mapping)
    values["headers"] = _pairs(values["headers"])
    values["needs_owner"] = bool(values["needs_owner"])
    for name in ("metadata", "errors", "times"):
        values[name] = None if values[name] is None else orjson.loads(values[name])
    return Job(**values)
