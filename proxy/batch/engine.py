"""Which batches this process works on, and with whose credential.

A credential is in memory only. After a restart a job goes on at once when it needs none (its upstream has a key of its
own, or no client sends any), else when its owner next asks about it and so brings it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence

from proxy.batch.headers import RawHeaders, has_credentials, joined, kept, of_lines
from proxy.batch.lines import Lines
from proxy.batch.offers import Offers, family_of_path
from proxy.batch.ports import BatchStore
from proxy.batch.run.story import Run
from proxy.batch.workshop import Read, Workshop
from proxy.core.batches import Job
from proxy.core.dialects.dialect import Dialect
from proxy.core.errors import CacheFault
from proxy.ports import Upstream
from proxy.tasks import Tasks

log = logging.getLogger(__name__)

RETRY_S = 5.0


class Engine:
    """Owner of the runs. `start` once, `close` before the store."""

    def __init__(
        self,
        *,
        store: BatchStore,
        lines: Lines,
        upstream: Upstream,
        read: Read,
        dialect_of: Callable[[str], Dialect],
        tasks: Tasks,
        without_batches: Iterable[str] = (),
        keyed: frozenset[str] = frozenset(),
        concurrency: int = 16,
        poll_s: float = 30.0,
        max_lines: int = 100_000,
        line_limit_bytes: int = 4 * 1024 * 1024,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.shop = Workshop(
            store=store,
            lines=lines,
            offers=Offers(upstream, without_batches, clock),
            read=read,
            dialect_of=dialect_of,
            worker=uuid.uuid4().hex,
            slots=asyncio.Semaphore(concurrency),
            concurrency=concurrency,
            poll_s=poll_s,
            max_lines=max_lines,
            line_limit_bytes=line_limit_bytes,
            clock=clock,
        )
        self._tasks = tasks
        self._keyed = keyed  # families of which every upstream has a key of its own
        self._runs: dict[str, Run] = {}
        self._working: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self) -> None:
        """Go on with what an earlier process left, where that needs nobody. Raises CacheFault."""
        for job in await self.shop.store.unfinished():
            if not job.needs_owner or family_of_path(job.path) in self._keyed:
                await self.resume(job, ())

    async def begin(self, job: Job, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Write a new job down and work on it. Raises CacheFault."""
        job.headers, job.needs_owner = kept(headers)
        await self.shop.store.create_job(job, self.shop.worker, self.shop.lease_ms())
        self._spawn(job, of_lines(headers))

    async def resume(self, job: Job, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Work on a job that nobody works on, with what its owner has just sent. Raises CacheFault."""
        if job.is_ended or job.id in self._runs or self._closing:
            return
        if job.needs_owner and family_of_path(job.path) not in self._keyed and not has_credentials(headers):
            return
        if await self.shop.store.claim(job.id, self.shop.worker, self.shop.now_ms(), self.shop.lease_ms()):
            fresh = await self.shop.store.job(job.id, job.tenant)  # as whoever held it has left it
            if fresh is not None and job.id not in self._runs:
                self._spawn(fresh, joined(job.headers, headers))

    def live(self, job_id: str) -> Job | None:
        """A job that this process works on, as it is at this moment."""
        run = self._runs.get(job_id)
        return None if run is None else run.job

    async def cancel(self, job: Job) -> None:
        """Raises CacheFault."""
        now_ms = self.shop.now_ms()
        job.reach("cancelling", now_ms)
        await self.shop.store.cancel(job.id, job.times)
        if (run := self._runs.get(job.id)) is not None:
            run.cancel()

    @property
    def running(self) -> int:
        return len(self._runs)

    @property
    def lines_left(self) -> int:
        """Lines that wait for an answer."""
        jobs = [run.job for run in self._runs.values()]
        return sum([max(job.total - job.succeeded - job.errored - job.expired - job.cancelled, 0) for job in jobs])

    def stop(self) -> None:
        """Begin nothing more; what is being asked may end."""
        self._closing = True
        for run in self._runs.values():
            run.stop()

    async def drained(self, within_s: float) -> None:
        """After `stop`: what was being asked has ended, and is written down."""
        if self._working:
            await asyncio.wait(self._working, timeout=within_s)

    def _spawn(self, job: Job, headers: RawHeaders) -> None:
        run = self._runs[job.id] = Run(self.shop, job, headers)
        try:
            task = self._tasks.spawn(self._work(run, headers), "batch")
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        except RuntimeError:  # closing: the next process goes on with it
            del self._runs[job.id]

    async def _work(self, run: Run, headers: RawHeaders) -> None:
        job, knows_why = run.job, False
        try:
            while True:
                try:
                    await run.go()
                    break
                except* CacheFault as faults:
                    log.warning("a batch waits for the database", extra={"job": job.id, "cause": repr(faults)[:200]})
                await asyncio.sleep(RETRY_S)
                again = await self._reread(job)
                if again is None or self._closing:
                    knows_why = True
                    return
                run = self._runs[job.id] = Run(self.shop, again, headers)
            knows_why = True
            if run.job.is_ended:
                log.info("a batch ended", extra=_told(run.job))
        finally:
            self._runs.pop(job.id, None)
            if not knows_why and not self._closing:
                await self._give_up(run.job)

    async def _give_up(self, job: Job) -> None:
        """A fault of ours: said, rather than met again whenever somebody asks."""
        message = "Something failed inside ibid."
        job.errors = [*job.errors, {"code": "internal_error", "line": None, "message": message, "param": None}]
        job.reach("failed", self.shop.now_ms())
        await self.shop.store.save(job, (), (), self.shop.worker, 0)

    async def _reread(self, job: Job) -> Job | None:
        while not self._closing:
            try:
                found = await self.shop.store.job(job.id, job.tenant)
                return None if found is None or found.is_ended else found
            except CacheFault:
                await asyncio.sleep(RETRY_S)
        return None


def _told(job: Job) -> Mapping[str, object]:
    names = ("status", "total", "succeeded", "errored", "expired", "cancelled")
    return {"job": job.id, **{name: getattr(job, name) for name in names}}
