"""What the areas of the batch API share: where jobs are, and how long what is handed in is kept."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.batch.engine import Engine
from proxy.batch.ports import BatchStore
from proxy.batch.room import FileRoom
from proxy.client.passing import Passing, PassThrough
from proxy.core.batches import Job
from proxy.core.errors import BadRequest
from proxy.core.model import Limits


@dataclass(frozen=True, slots=True)
class Desk:
    """Owns nothing it is given."""

    engine: Engine
    passing: PassThrough
    limits: Limits
    keep_ms: int
    room: FileRoom

    @property
    def store(self) -> BatchStore:
        return self.engine.shop.store

    def now_ms(self) -> int:
        return self.engine.shop.now_ms()

    async def jobs(self, asked: Passing, dialect: str) -> list[Job]:
        """Newest first, as they are at this moment. Whoever asks about a job brings what it may have been waiting
        for."""
        jobs = [self.engine.live(job.id) or job for job in await self.store.jobs(asked.tenant, dialect)]
        for job in jobs:
            await self.engine.resume(job, asked.headers)
        return jobs

    async def job(self, asked: Passing, job_id: str, dialect: str) -> Job:
        live = self.engine.live(job_id)  # first: what was read before it ended would be stale
        job = await self.store.job(job_id, asked.tenant) if live is None else live
        if job is None or job.dialect != dialect or job.tenant != asked.tenant:
            shown = "batch" if dialect == "openai" else "message batch"
            raise BadRequest(f"No {shown} found with id '{job_id}'.", status=404, code="not_found", param="id")
        if live is None:
            await self.engine.resume(job, asked.headers)
        return job
