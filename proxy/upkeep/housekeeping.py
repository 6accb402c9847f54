"""What a running ibid does beside requests until it is cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from index.errors import IndexRoomError
from proxy.batch.http.api import BatchApi
from proxy.core.errors import CacheFault
from proxy.request.pipeline import Pipeline
from proxy.settings.sections import Settings
from proxy.store.store import Store
from proxy.upkeep.semantic import Semantic

log = logging.getLogger(__name__)

HOUSEKEEPING_S: Final = 60.0
FOLLOW_S: Final = 2.0

Fault = Callable[[str], None]
"""Counts a fault by its reason."""


async def housekeep(settings: Settings, pipeline: Pipeline, store: Store, semantic: Semantic, fault: Fault) -> None:
    """Expire, evict, and save the index now and then."""
    saved_s = time.monotonic()
    while True:
        await asyncio.sleep(HOUSEKEEPING_S)
        try:
            now_ms = int(time.time() * 1000)
            stale = settings.lanes.stale
            kept_ms = int(max(stale.while_revalidate_s, stale.if_error_s) * 1000)
            pipeline.entries.forget(await store.entries.housekeep(now_ms, stale_for_ms=kept_ms))
            await store.comparisons.housekeep()
            await store.votes.housekeep()
            await store.batches.housekeep(now_ms)
            if time.monotonic() - saved_s >= settings.index.snapshot_interval_s:
                await semantic.save()
                saved_s = time.monotonic()
        except (CacheFault, IndexRoomError) as error:
            fault(error.code if isinstance(error, CacheFault) else error.reason)


async def follow(pipeline: Pipeline, semantic: Semantic, fault: Fault) -> None:
    """Take up what other replicas of this database purge, what they learn, after what is written down, and the normal
    forms of what they store."""
    while True:
        await asyncio.sleep(FOLLOW_S)
        try:
            await pipeline.entries.follow()
            if pipeline.meaning.parts is not None:
                await pipeline.auditor.follow()
                await semantic.follow()
        except CacheFault as error:
            fault(error.code)


async def take_up(batches: BatchApi, semantic: Semantic, *, shared: bool) -> None:
    """Go on with batches and deferred calls of an earlier process, and of replicas that are gone: as soon as what may
    answer them without a call is loaded. `shared`: there may be replicas; a process alone looks once."""
    await semantic.meaning.settled()
    while True:
        try:
            await batches.engine.start()
            await batches.deferred.start()
        except CacheFault as fault:
            log.warning("batches of before wait", extra={"cause": fault.message})
        if not shared:
            return
        await asyncio.sleep(HOUSEKEEPING_S)
