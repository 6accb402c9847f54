"""How things stand with one job: what the stories of its run share."""

from __future__ import annotations

import asyncio

from proxy.batch.headers import RawHeaders
from proxy.batch.workshop import Workshop
from proxy.core.batches import Job
from proxy.core.errors import BadRequest
from proxy.records import Client

KEY_S = 1.0  # between two looks at whether a job's key still opens


class Course:
    """The job, what it is worked on with, and whether that goes on."""

    def __init__(self, shop: Workshop, job: Job, headers: RawHeaders) -> None:
        self.shop = shop
        self.job = job
        self.headers = headers
        self.provider = shop.offers.provider(job.path)  # one dialect's batch API, at any upstream
        self.stopped = asyncio.Event()
        self.cancelling = asyncio.Event()
        self.barred = asyncio.Event()
        self.bar: BadRequest | None = None  # why the key of this job opens nothing more
        self.ended = bytearray()  # by number: 1 when its row is made

    @property
    def stopping(self) -> bool:
        return self.stopped.is_set()

    @property
    def is_ending(self) -> bool:
        """No line begins any more, and providers are told to end what they have."""
        return self.cancelling.is_set() or self.barred.is_set() or self.now_ms() >= self.job.deadline_ms

    @property
    def is_open(self) -> bool:
        """More lines may begin."""
        return not (self.stopping or self.is_ending)

    @property
    def asks_what_is_lost(self) -> bool:
        """A deferred call gets an answer, at the ordinary price when its batch brings none in time."""
        return self.job.dialect == "deferred"

    def now_ms(self) -> int:
        return self.shop.now_ms()

    def client(self) -> Client:
        return self.shop.lines.client(self.job.path, self.headers)

    async def sleep(self, pause_s: float, *, told: bool) -> None:
        """For so long, or until work must end; `told`: what ends it is being waited for already."""
        events = [self.stopped] if told else [self.stopped, self.cancelling, self.barred]
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def watch_key(self) -> None:
        """A key that was revoked or has expired ends what its lines have not begun."""
        keys = self.shop.lines.keys
        while True:
            self.bar = keys.barred(self.job.key_id)
            if self.bar is not None:
                self.barred.set()
                return
            await asyncio.sleep(KEY_S)
