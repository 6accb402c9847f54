"""Which batches this process works on, with whose credential, and what it knows of the batch APIs of its upstreams.

A credential is in memory only. After a restart a job goes on at once when it needs none (its upstream has a key of its
own, or no client sends any), else when its owner next asks about it and so brings it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from proxy.batch import lines as batch_lines
from proxy.batch.lines import Lines
from proxy.batch.ports import BatchStore
from proxy.batch.providers import NoBatchApi, Provider, Refused, providers_of
from proxy.batch.runs import LEASE_S, Run
from proxy.core.batches import ENDPOINTS, Job
from proxy.core.dialects.dialect import Dialect
from proxy.core.dialects.routes import MESSAGES_PATH
from proxy.core.errors import CacheFault, UpstreamError
from proxy.core.identity import CREDENTIALS
from proxy.core.query import Query
from proxy.ports import Upstream
from proxy.tasks import Tasks

log = logging.getLogger(__name__)

RETRY_S = 5.0
BELIEF_S = (
    60.0  # how long an answer that says nothing of the API, only of this moment or client, is not asked for again
)
BELIEFS = 1024
KEPT_HEADERS: Final = frozenset(
    {b"accept", b"anthropic-beta", b"anthropic-version", b"cache-control", b"openai-organization", b"openai-project"}
)
KEPT_PREFIXES: Final = (b"x-cache-", b"x-stainless-", b"helicone-cache-", b"x-bf-cache-", b"x-portkey-cache-")
"""Headers of a batch that are written down; none of them can hold a credential."""

_OF_THE_BODY: Final = frozenset(
    {b"content-type", b"content-length", b"content-encoding", b"idempotency-key", b"prefer"}
)

RawHeaders = tuple[tuple[bytes, bytes], ...]
Read = Callable[[str, str, RawHeaders, bytes, str], Query]


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
        self.store = store
        self.lines = lines
        self.read = read
        self.dialect_of = dialect_of
        self.concurrency = concurrency
        self.poll_s = poll_s
        self.max_lines = max_lines
        self.line_limit_bytes = line_limit_bytes
        self.clock = clock
        self.worker = uuid.uuid4().hex
        self.slots = asyncio.Semaphore(concurrency)
        self.new_id = batch_lines.new_id
        self._providers = providers_of(upstream)
        self._tasks = tasks
        self._keyed = keyed  # families of which every upstream has a key of its own
        self._batches: dict[str, bool] = dict.fromkeys(without_batches, False)  # by upstream, as far as known
        self._believed: dict[tuple[str, RawHeaders], tuple[bool, float]] = {}  # and until when
        self._probing: dict[str, asyncio.Lock] = {}
        self._runs: dict[str, Run] = {}
        self._working: set[asyncio.Task[None]] = set()
        self._closing = False

    # -- jobs ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Go on with what an earlier process left, where that needs nobody. Raises CacheFault."""
        for job in await self.store.unfinished():
            if not job.needs_owner or family_of_path(job.path) in self._keyed:
                await self.resume(job, ())

    async def begin(self, job: Job, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Write a new job down and work on it. Raises CacheFault."""
        job.headers, job.needs_owner = kept(headers)
        await self.store.create_job(job, self.worker, self._lease_ms())
        self._spawn(job, of_lines(headers))

    async def resume(self, job: Job, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Work on a job that nobody works on, with what its owner has just sent. Raises CacheFault."""
        if job.is_ended or job.id in self._runs or self._closing:
            return
        if job.needs_owner and family_of_path(job.path) not in self._keyed and not has_credentials(headers):
            return
        if await self.store.claim(job.id, self.worker, int(self.clock() * 1000), self._lease_ms()):
            fresh = await self.store.job(job.id, job.tenant)  # as whoever held it has left it
            if fresh is not None and job.id not in self._runs:
                self._spawn(fresh, joined(job.headers, headers))

    def live(self, job_id: str) -> Job | None:
        """A job that this process works on, as it is at this moment."""
        run = self._runs.get(job_id)
        return None if run is None else run.job

    async def cancel(self, job: Job) -> None:
        """Raises CacheFault."""
        now_ms = int(self.clock() * 1000)
        job.reach("cancelling", now_ms)
        await self.store.cancel(job.id, job.times)
        if (run := self._runs.get(job.id)) is not None:
            run.cancelling.set()

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
        run = self._runs[job.id] = Run(self, job, headers)
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
                run = self._runs[job.id] = Run(self, again, headers)
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
        job.reach("failed", int(self.clock() * 1000))
        await self.store.save(job, (), (), self.worker, 0)

    async def _reread(self, job: Job) -> Job | None:
        while not self._closing:
            try:
                found = await self.store.job(job.id, job.tenant)
                return None if found is None or found.is_ended else found
            except CacheFault:
                await asyncio.sleep(RETRY_S)
        return None

    def _lease_ms(self) -> int:
        return int((self.clock() + LEASE_S) * 1000)

    # -- upstreams ----------------------------------------------------------------------------------------------

    def provider(self, path: str) -> Provider:
        return self._providers[family_of_path(path)]

    def has_batches(self, upstream: str) -> bool | None:
        """Whether an upstream has a batch API; None when that is not known yet."""
        return self._batches.get(upstream)

    def remember_none(self, upstream: str) -> None:
        self._batches[upstream] = False

    async def probe(self, upstream: str, path: str, headers: RawHeaders) -> bool:
        """Ask an upstream once; while it cannot say, it is believed to have one, and handing in will show."""
        async with self._probing.setdefault(upstream, asyncio.Lock()):
            known = self._batches.get(upstream)
            if known is not None:
                return known
            believed, until_s = self._believed.get((upstream, headers), (False, 0.0))
            if self.clock() < until_s:
                return believed
            try:
                found = await self.provider(path).is_there(upstream, headers)
            except Refused as refused:
                return self._believe(upstream, headers, found=refused.status not in (400, 401, 403))
            except UpstreamError:
                return self._believe(upstream, headers, found=True)
            except NoBatchApi:
                found = False
            self._batches[upstream] = found
            log.info("asked for a batch API", extra={"upstream": upstream, "found": found})
            return found

    def _believe(self, upstream: str, headers: RawHeaders, *, found: bool) -> bool:
        if len(self._believed) >= BELIEFS:
            self._believed.clear()
        self._believed[upstream, headers] = found, self.clock() + BELIEF_S
        return found

    @staticmethod
    def new_name(prefix: str) -> str:
        """An id that `core.batches.is_own` knows as ours."""
        return f"{prefix}ibid{secrets.token_hex(12)}"


def family_of_path(path: str) -> str:
    return "anthropic" if path == MESSAGES_PATH else "openai"


def is_batchable(path: str) -> bool:
    """Whether providers take requests of this path in their batches."""
    return path in ENDPOINTS or path == MESSAGES_PATH


def kept(headers: Sequence[tuple[bytes, bytes]]) -> tuple[tuple[tuple[str, str], ...], bool]:
    """What of a client's headers may be written down, and whether there is more, so that its owner must come back."""
    shown = []
    for name, value in headers:
        low = name.lower()
        if low in KEPT_HEADERS or low.startswith(KEPT_PREFIXES):
            shown.append((low.decode("latin-1"), value.decode("latin-1")))
    return tuple(shown), has_credentials(headers)


def has_credentials(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() in CREDENTIALS for name, _ in headers)


def of_lines(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """The headers of a batch as those of each of its lines."""
    own = [(name, value) for name, value in headers if name.lower() not in _OF_THE_BODY]
    return (*own, (b"Content-Type", b"application/json"))


def joined(written: Sequence[tuple[str, str]], headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """What was written down of a batch's headers, and what else its owner sends now."""
    there = {name.encode("latin-1") for name, _ in written}
    old = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in written]
    new = [
        (name, value)
        for name, value in headers
        if (low := name.lower()) not in there and low not in KEPT_HEADERS and not low.startswith(KEPT_PREFIXES)
    ]
    return of_lines([*old, *new])


def _told(job: Job) -> Mapping[str, object]:
    names = ("status", "total", "succeeded", "errored", "expired", "cancelled")
    return {"job": job.id, **{name: getattr(job, name) for name in names}}
