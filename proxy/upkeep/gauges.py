"""Gauges that are read at scrape time, by the part that they look at."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import partial
from importlib import metadata

from proxy.batch.http.api import BatchApi
from proxy.client.handlers import ClientHandler
from proxy.core.model import Limits
from proxy.hot import HotRows
from proxy.money.prices import Booking
from proxy.store.schema import HEAD
from proxy.store.store import Store
from proxy.upkeep.semantic import Semantic
from proxy.upstreams.upstream import Upstreams
from proxy.watch.health import Health
from proxy.watch.memory import Memory
from proxy.watch.pulse import Pulse
from proxy.watch.telemetry import Telemetry


def watch_upstreams(telemetry: Telemetry, upstreams: Upstreams, names: Iterable[str]) -> None:
    gauge = telemetry.watch
    for name in names:
        is_open = partial(lambda one: float(upstreams.breaker(one).is_open), name)
        gauge("ibid_upstream_down", "An upstream that keeps failing is only probed", is_open, upstream=name)


def watch_clients(telemetry: Telemetry, handler: ClientHandler, limits: Limits) -> None:
    gauge = telemetry.watch
    gauge("ibid_in_flight", "Client requests being answered", lambda: limits.in_flight - handler.admission.free)
    gauge("ibid_queue_length", "Waiting work", lambda: handler.admission.queued, queue="admission")
    gauge("ibid_queue_length", "Waiting work", lambda: len(handler.arriving), queue="bodies")


def watch_store(telemetry: Telemetry, store: Store) -> None:
    gauge, ledger = telemetry.watch, store.ledger
    gauge("ibid_queue_length", "Waiting work", lambda: ledger.waiting, queue="ledger")
    gauge("ibid_queue_length", "Waiting work", lambda: store.writer.waiting, queue="store")
    gauge("ibid_ledger_journal_bytes", "Ledger rows on file, not known to SQL yet", lambda: ledger.journal_bytes)
    gauge("ibid_ledger_unprotected", "Ledger rows in memory alone: a kill loses them", lambda: ledger.unprotected)
    gauge("ibid_ledger_dropped", "Ledger rows lost for want of database, disk and memory", lambda: ledger.dropped)


def watch_batches(telemetry: Telemetry, batches: BatchApi) -> None:
    gauge = telemetry.watch
    gauge("ibid_batches", "Batches being worked on", lambda: batches.engine.running)
    gauge("ibid_batch_lines", "Lines of batches that wait for an answer", lambda: batches.engine.lines_left)
    gauge("ibid_deferred", "Deferred calls under way", lambda: batches.deferred.waiting)


def watch_process(telemetry: Telemetry, hot: HotRows, memory: Memory, pulse: Pulse, booking: Booking) -> None:
    gauge = telemetry.watch
    version, python = metadata.version("ibid-proxy"), platform.python_version()
    gauge("ibid_build_info", "Which ibid it is", lambda: 1.0, version=version, python=python, schema=HEAD)
    gauge("ibid_hot_bytes", "Memory of rows served without SQL", lambda: hot.size_bytes)
    gauge("ibid_memory_used_share", "Resident memory by what it may be", lambda: memory.used_share)
    gauge("ibid_loop_stall_seconds_max", "Longest stall of the event loop", lambda: pulse.longest_ms / 1e3)
    gauge("ibid_unpriced_models", "Models that answered without a price", lambda: len(booking.unpriced))


def watch_health(telemetry: Telemetry, health: Health) -> None:
    """Every part that the register knows by now."""
    gauge = telemetry.watch
    for part in health.parts:
        is_degraded = partial(lambda one: float(health.is_degraded(one)), part)
        gauge("ibid_degraded", "1 for a part that is not as it should be", is_degraded, part=part)


def watch_semantic(telemetry: Telemetry, semantic: Semantic) -> None:
    gauge, meaning = telemetry.watch, semantic.meaning
    gauge("ibid_queue_length", "Waiting work", lambda: meaning.waiting, queue="embedder")
    gauge(
        "ibid_queue_length",
        "Waiting work",
        lambda: semantic.opened.index.waiting if semantic.opened else 0,
        queue="index",
    )
    gauge("ibid_vectors", "Vectors in the index", lambda: semantic.opened.index.size if semantic.opened else 0)
