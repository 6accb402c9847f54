"""What batches and deferred calls need of the store. See `proxy.store.batches`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from proxy.core.batches import BatchFile, Deferred, Job, LineRow, Part


class BatchStore(Protocol):
    """Every method raises CacheFault when the database cannot answer."""

    async def begin_file(self, file: BatchFile) -> None:
        """A file whose bytes follow; nobody sees it before `end_file`."""
        ...

    async def add_chunk(self, file_id: str, number: int, data: bytes) -> None: ...

    async def end_file(self, file: BatchFile) -> None:
        """It is whole, of the size it now has."""
        ...

    async def file(self, file_id: str, tenant: str) -> BatchFile | None: ...

    async def files(self, tenant: str) -> Sequence[BatchFile]:
        """Newest first, those of Anthropic's requests left out."""
        ...

    async def delete_file(self, file_id: str) -> None: ...

    async def bytes_of_files(self, tenant: str) -> tuple[int, int]:
        """Of all whole files that were handed in, and of this tenant's."""
        ...

    def chunks(self, file_id: str) -> AsyncIterator[bytes]:
        """The bytes of an uploaded file, in order."""
        ...

    async def chunk(self, file_id: str, number: int) -> bytes: ...

    async def create_job(self, job: Job, worker: str, lease_ms: int) -> None: ...

    async def job(self, job_id: str, tenant: str) -> Job | None: ...

    async def jobs(self, tenant: str, dialect: str) -> Sequence[Job]:
        """Newest first."""
        ...

    async def unfinished(self) -> Sequence[Job]:
        """Every job that has not ended, whosever it is."""
        ...

    async def claim(self, job_id: str, worker: str, now_ms: int, lease_ms: int) -> bool:
        """Whether the job is this process's now: it has not ended, and nobody else holds it."""
        ...

    async def save(
        self, job: Job, lines: Sequence[LineRow], parts: Sequence[Part], worker: str, lease_ms: int
    ) -> str | None:
        """Keep lines, parts and the job's progress, together. A status "cancelling" that somebody else wrote stays;
        what the status is now, or None when the job is no longer this process's, or gone."""
        ...

    async def cancel(self, job_id: str, times: dict[str, int]) -> bool:
        """Mark a job that has not ended as cancelling; whether there was one."""
        ...

    async def delete_job(self, job: Job) -> None:
        """With its lines, and with its input when that came without a file."""
        ...

    async def states(self, job_id: str) -> Sequence[tuple[int, str, int | None]]:
        """(number, state, part) of every line there is a row for."""
        ...

    async def parts(self, job_id: str) -> Sequence[Part]: ...

    async def known_parts(self, provider_ids: Sequence[str]) -> set[str]:
        """Which of these are batches that we made at a provider."""
        ...

    def results(self, job_id: str, part: str) -> AsyncIterator[bytes]:
        """Lines of an output: "output", "error", or "" for all, in the order of the input."""
        ...

    async def result(self, job_id: str, number: int) -> bytes | None: ...

    async def put_deferred(self, call: Deferred, worker: str, lease_ms: int) -> None: ...

    async def claim_deferred(self, call_id: str, worker: str, now_ms: int, lease_ms: int) -> bool:
        """As `claim`, of a call."""
        ...

    async def deferred(self, call_id: str, tenant: str) -> Deferred | None: ...

    async def open_deferred(self) -> Sequence[Deferred]:
        """Those without a reply that went with no batch yet."""
        ...

    async def settle_deferred(self, call_id: str, reply: bytes) -> None: ...

    async def join_deferred(self, job_id: str, call_ids: Sequence[str]) -> None:
        """They went with this batch, in this order."""
        ...

    async def housekeep(self, now_ms: int) -> None:
        """Delete what has expired, and uploads that never ended."""
        ...
