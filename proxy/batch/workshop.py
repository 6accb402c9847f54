"""What all batches and deferred calls of this process are worked on with."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from proxy.batch.headers import RawHeaders
from proxy.batch.lines import Lines
from proxy.batch.offers import Offers
from proxy.batch.ports import BatchStore
from proxy.core.dialects.dialect import Dialect
from proxy.core.query import Query

LEASE_S = 30.0

Read = Callable[[str, str, RawHeaders, bytes, str], Query]


@dataclass(frozen=True, slots=True)
class Workshop:
    """Owns nothing it is given. `worker` names this process where a job says who works on it."""

    store: BatchStore
    lines: Lines
    offers: Offers
    read: Read
    dialect_of: Callable[[str], Dialect]
    worker: str
    slots: asyncio.Semaphore  # for ordinary calls, of all jobs together
    concurrency: int
    poll_s: float
    max_lines: int
    line_limit_bytes: int
    clock: Callable[[], float]

    def now_ms(self) -> int:
        return int(self.clock() * 1000)

    def lease_ms(self) -> int:
        """When a job that is taken now is another process's to take."""
        return int((self.clock() + LEASE_S) * 1000)


def new_name(prefix: str) -> str:
    """An id that `core.batches.is_own` knows as ours."""
    return f"{prefix}ibid{secrets.token_hex(12)}"
