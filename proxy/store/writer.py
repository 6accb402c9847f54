"""The one task that writes. It takes whatever waits and commits it together, so a commit's sync is shared.

Jobs of one kind that stand next to each other in the queue become one transaction; a job that raises fails only itself
or, when the database itself is at fault, everything in its transaction. After such a fault the connection is thrown
away (a failed sync is never retried on it) and for a second every job fails at once; then a new connection is tried.
Nobody waits in a queue for a database that is down, and recovery needs no restart.

A transaction reported as failed may still be found committed after a crash, so every job must be repeatable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.errors import CacheFault
from proxy.store.engine import DATABASE_ERRORS, Database, fault_of, is_row_error, transaction

log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[AsyncConnection, Sequence[Any]], Awaitable[Sequence[Any]]]
"""(connection inside a transaction, items) → one result per item."""

ROW_ERRORS = (ValueError, OverflowError)  # a driver could not even bind the value

QUEUE_LIMIT = 10_000
BATCH_LIMIT = 256
RETRY_AFTER_S = 1.0


class _Job(NamedTuple):
    work: Work
    item: Any
    done: asyncio.Future[Any]


class Writer:
    """Owner of the writing connection. Start with `start`, end with `close`."""

    def __init__(self, database: Database, queue_limit: int = QUEUE_LIMIT) -> None:
        self._database = database
        self._limit = queue_limit
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._connection: AsyncConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._fault: CacheFault | None = None
        self._retry_at = 0.0
        self._closing = False
        self._performing = False
        self.commits = 0

    @property
    def state(self) -> str:
        """ "ok", or the code of the fault that keeps the database away: store_full, store_down."""
        return "ok" if self._fault is None else self._fault.code

    @property
    def is_trying(self) -> bool:
        """A job would reach the database, or try to."""
        return self._fault is None or time.monotonic() >= self._retry_at

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="store-writer")

    async def submit(self, work: Work, item: Any) -> Any:
        """The item's result, after its transaction is durable. Raises CacheFault; store_busy at once when full."""
        if self._closing or self._task is None:
            raise CacheFault("the store is closed", code="store_down")
        if len(self._jobs) >= self._limit:
            raise CacheFault(f"{self._limit} writes are waiting", code="store_busy")
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(work, item, done))
        self._wake.set()
        return await done

    async def run(self, act: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """One action in a transaction of its own."""

        async def alone(connection: AsyncConnection, _items: Sequence[Any]) -> Sequence[Any]:
            return [await act(connection)]

        result: T = await self.submit(alone, None)
        return result

    async def settle(self) -> None:
        """Return once every job given so far is over, those whose caller has gone as well. Raises CacheFault."""
        if self._jobs or self._performing:
            await self.submit(_nothing, None)

    async def checkpoint(self) -> bool:
        """Empty SQLite's write-ahead log, so that deleted text is gone from it too; False when others hold it.

        Raises CacheFault.
        """
        return self._database.dialect != "sqlite" or bool(await self.submit(_checkpoint, None))

    async def close(self) -> None:
        """Finish what waits, then close the connection."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        await self._drop()

    async def _run(self) -> None:
        while self._jobs or not self._closing:
            if not self._jobs:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._performing = True
            await self._perform(self._take())
            self._performing = False

    def _take(self) -> list[_Job]:
        jobs = [self._jobs.popleft()]
        while self._jobs and len(jobs) < BATCH_LIMIT and self._jobs[0].work == jobs[0].work:
            jobs.append(self._jobs.popleft())
        return jobs

    async def _perform(self, jobs: list[_Job]) -> None:
        if self._fault is not None and time.monotonic() < self._retry_at:
            _fail(jobs, self._fault)
            return
        try:
            results = await self._attempt(jobs)
        except (*DATABASE_ERRORS, *ROW_ERRORS) as error:
            await self._failed(jobs, error)
        except CacheFault as fault:
            _fail(jobs, fault)
        except BaseException:
            _fail(jobs, CacheFault("the store's writer stopped", code="store_down"))
            raise
        else:
            if self._fault is not None:
                log.warning("database writes again", extra={"store": self._database.label})
                self._fault = None
            self.commits += 1
            for job, result in zip(jobs, results, strict=True):
                if not job.done.done():
                    job.done.set_result(result)

    async def _attempt(self, jobs: list[_Job]) -> Sequence[Any]:
        if self._connection is None:
            self._connection = await self._database.writer.connect()
        items = [job.item for job in jobs]
        if jobs[0].work is _checkpoint:
            return await _checkpoint(self._connection, items)
        async with transaction(self._connection):
            return await jobs[0].work(self._connection, items)

    async def _failed(self, jobs: list[_Job], error: BaseException) -> None:
        fault = fault_of(error)
        if is_row_error(error):
            if len(jobs) == 1:
                _fail(jobs, fault)
            else:  # one bad row must not take its neighbours along
                for job in jobs:
                    await self._perform([job])
            return
        if self._fault is None:
            log.error("database does not write: %s", fault.message, extra={"store": self._database.label})
        self._fault = fault
        self._retry_at = time.monotonic() + RETRY_AFTER_S
        await self._drop()
        _fail(jobs, fault)

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if self._fault is not None:
                await connection.invalidate()
            await connection.close()
        except DATABASE_ERRORS as error:
            log.info("closing a broken connection: %s", type(error).__name__)


def _fail(jobs: list[_Job], fault: CacheFault) -> None:
    for job in jobs:
        if not job.done.done():
            job.done.set_exception(CacheFault(fault.message, code=fault.code))


async def _nothing(connection: AsyncConnection, items: Sequence[Any]) -> Sequence[Any]:
    return [None] * len(items)


async def _checkpoint(connection: AsyncConnection, items: Sequence[Any]) -> Sequence[Any]:
    raw = await connection.get_raw_connection()
    driver: Any = raw.driver_connection
    async with driver.execute("PRAGMA wal_checkpoint(TRUNCATE)") as cursor:
        is_busy, *_ = await cursor.fetchone()
    return [not is_busy] * len(items)
