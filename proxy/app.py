"""Composition root: builds every edge, opens them in order, closes them in reverse. Imported by the command line only.

Order: data directory and secret → database → model and index → listeners. The client listener accepts only when the
embedder is warm, the kernels are compiled and the index holds what SQL holds, or when it is certain that they will not
be there (then exact hits and forwarding still work, and `/readyz` says what is degraded).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import orjson
import uvloop
from aiohttp import web

from index.answers import SENSITIVITY, Comparer
from index.batcher import QUEUE_DEADLINE_S, EmbedderOwner, open_embedder
from index.errors import IndexRoomError, SnapshotRefused
from index.features import compile_features
from index.kernels import compile_kernels
from index.learner import LEVELS, Learner
from index.partition import trim_heap
from index.vectors import VectorOwner
from proxy import admin, listener, logs
from proxy.admin_auth import LOOPBACK_NAMES, Gate, load_token
from proxy.arbiter import Arbiter
from proxy.audits import Auditor
from proxy.batch_engine import Engine
from proxy.batch_http import BatchApi
from proxy.batch_lines import Lines
from proxy.books import Books
from proxy.config import Address, Settings, UpstreamSettings
from proxy.core.answer import decode_answer
from proxy.core.dialects.routes import Routes
from proxy.core.errors import CacheFault, ConfigError, NotYet
from proxy.core.model import Answer
from proxy.core.rates import writes_cost_extra
from proxy.core.units import DAY_S
from proxy.deferred import DeferredCalls
from proxy.embeddings import Embeddings
from proxy.explain import Explainer
from proxy.handlers import ClientHandler
from proxy.hot import HotRows
from proxy.judge import Judge
from proxy.keys import KeyRing, MeteredLedger
from proxy.lanes.forwarding import Forwarder
from proxy.lanes.predict import Predictor
from proxy.lanes.prefetch import Prefetcher
from proxy.lanes.prefixes import PrefixMarks
from proxy.lanes.route import Router
from proxy.leaving import Finisher
from proxy.memory import Memory, group_limit_bytes
from proxy.operations import Operator
from proxy.pipeline import Pipeline
from proxy.ports import EntryStore
from proxy.prices import Prices, configured
from proxy.reading import Reader, Steering
from proxy.reindex import Reindex
from proxy.store.store import Store, open_store
from proxy.tasks import Tasks
from proxy.telemetry import Telemetry
from proxy.upstream import UpstreamAddress, UpstreamLimits, Upstreams

log = logging.getLogger(__name__)

BUNDLED_MODEL = "all-MiniLM-L6-v2"
SNAPSHOT_NAME = "index.snapshot"
SECRET_NAME = "installation-secret"
BEAT_S = 0.02
HOUSEKEEPING_S = 60.0
ADMIN_LINE_BYTES = 64 * 1024  # every parameter at its longest, percent-encoded
FOLLOW_S = 2.0


class Pulse:
    """Measures how late the event loop wakes up, and lets once-a-second work ride along."""

    def __init__(self) -> None:
        self.longest_ms = 0.0

    async def run(self, handler: ClientHandler, memory: Memory) -> None:
        second = time.monotonic()
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT_S)
            now = time.monotonic()
            self.longest_ms = max(self.longest_ms, (now - before - BEAT_S) * 1e3)
            memory.look(now)
            if now - second >= 1.0:
                second = now
                handler.beat(now)


@dataclass(slots=True)
class App:
    """A running ibid. `stopping` ends it when set."""

    settings: Settings
    pipeline: Pipeline
    store: Store
    telemetry: Telemetry
    operator: Operator
    keys: KeyRing
    admin_token: str
    admin_token_path: Path | None
    stopping: asyncio.Event
    memory: Memory
    port: int = 0
    admin_port: int = 0


def read_secret(data_dir: Path) -> bytes:
    """The installation's own secret, 32 bytes, made at the first start. Raises ConfigError when it cannot be kept."""
    path = data_dir / SECRET_NAME
    try:
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.urandom(32))
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise ConfigError(f"{path} must be readable by its owner only (chmod 600).") from None
        secret = path.read_bytes()
    except OSError as fault:
        raise ConfigError(f"{path} cannot be used: {fault.strerror}.") from fault
    if len(secret) != 32:
        raise ConfigError(f"{path} is damaged: it must hold 32 bytes.")
    return secret


async def open_index(settings: Settings, embedder: EmbedderOwner, store: Store) -> VectorOwner:
    """The index as SQL says it must be: the snapshot, less what SQL no longer has, plus what it does not hold yet."""
    path = settings.data_dir / SNAPSHOT_NAME
    promote_above, queue_limit = settings.index.promote_at, settings.index.queue
    try:
        index = await asyncio.to_thread(
            VectorOwner.load,
            path,
            embedder.identity,
            embedder.dimension,
            promote_above=promote_above,
            queue_limit=queue_limit,
        )
    except SnapshotRefused as refusal:
        log.info("building the index from SQL", extra={"reason": str(refusal)})
        index = VectorOwner(embedder.identity, embedder.dimension, promote_above=promote_above, queue_limit=queue_limit)
    try:
        async with index.replaying():
            index.start()
            await _reconcile(index, embedder.identity, store)
    except BaseException:
        await asyncio.to_thread(index.close)
        raise
    return index


async def _reconcile(index: VectorOwner, identity: str, store: Store) -> None:
    held, wanted = await index.ids(), await store.entries.ids(identity)
    gone = np.setdiff1d(held, wanted, assume_unique=True)
    if len(gone):
        index.remove(gone.tolist())
    missing = np.setdiff1d(wanted, held, assume_unique=True)
    if not len(missing):
        return
    async for block in store.entries.vectors(identity, after_id=int(missing[0]) - 1):
        places = np.minimum(np.searchsorted(missing, block.ids), len(missing) - 1)
        new = missing[places] == block.ids
        scopes = [scope.tobytes() for scope in block.scopes[new]]
        await index.add_many(block.ids[new], scopes, block.vectors[new], block.signatures[new], block.expires_ms[new])


async def open_semantic(
    settings: Settings, store: Store, stack: contextlib.AsyncExitStack
) -> tuple[EmbedderOwner | None, VectorOwner | None, str]:
    """Embedder and index, or why there are none. Raises ConfigError when `embedding.require_semantic` is set."""
    wanted = settings.embedding
    if not settings.rules.semantic:
        return None, None, "semantic_off"
    try:
        embedder = await open_embedder(
            settings.data_dir,
            model=None if wanted.model == BUNDLED_MODEL else wanted.model,
            backend=wanted.backend,
            threads=wanted.threads,
            queue=wanted.queue,
            lru=wanted.lru,
            states_bytes=wanted.states_bytes,
            guarded=settings.rules.pair_guard,
            encode_deadline_s=wanted.deadline_ms / 1000,
            queue_deadline_s=max(QUEUE_DEADLINE_S, wanted.deadline_ms / 1000),  # a turn may take as long as a call
        )
        stack.push_async_callback(embedder.close)
        if settings.rules.pair_guard and not embedder.can_verify:
            log.warning("no pair guard for this model: only evidence serves", extra={"cause": embedder.identity})
        index = await open_index(settings, embedder, store)
        stack.push_async_callback(asyncio.to_thread, index.close)
    except (IndexRoomError, CacheFault) as fault:
        if wanted.require_semantic:
            raise ConfigError(f"semantic lookups are required and cannot start: {fault}") from fault
        reason = fault.code if isinstance(fault, CacheFault) else fault.reason
        log.error("serving exact hits only", extra={"reason": reason, "cause": str(fault)})
        return None, None, reason
    return embedder, index, ""


def renewal(edges: Edges, pipeline: Pipeline) -> Reindex | None:
    embedder = edges.embedder
    if embedder is None:
        return None
    reindex = Reindex(embedder, edges.store.entries, pipeline.propose, lambda: embedder.queue_length)
    pipeline.on_lacking = reindex.wake
    return reindex


async def learn(pipeline: Pipeline) -> None:
    """What judge and router knew when they stopped. Without it they start strict, which is safe."""
    try:
        await pipeline.auditor.load()
        await pipeline.errands.router.load()
    except CacheFault as fault:
        log.error("the judge starts without what it had learned", extra={"cause": fault.message})


async def follow(app: App) -> None:
    """Learn what other replicas of this database purge and learn."""
    while True:
        await asyncio.sleep(FOLLOW_S)
        try:
            await app.pipeline.follow()
            await app.pipeline.auditor.follow()
        except CacheFault as fault:
            app.telemetry.fault(fault.code)


async def housekeep(app: App, index: VectorOwner | None) -> None:
    """Expire, evict, and save the index now and then."""
    saved_s = time.monotonic()
    while True:
        await asyncio.sleep(HOUSEKEEPING_S)
        try:
            now_ms = int(time.time() * 1000)
            stale = app.settings.lanes.stale
            kept_ms = int(max(stale.while_revalidate_s, stale.if_error_s) * 1000)
            app.pipeline.forget(await app.store.entries.housekeep(now_ms, stale_for_ms=kept_ms))
            await app.store.comparisons.housekeep()
            await app.store.votes.housekeep()
            await app.store.batches.housekeep(now_ms)
            if index is not None and time.monotonic() - saved_s >= app.settings.index.snapshot_interval_s:
                await index.snapshot(app.settings.data_dir / SNAPSHOT_NAME)
                saved_s = time.monotonic()
        except (CacheFault, IndexRoomError) as fault:
            app.telemetry.fault(fault.code if isinstance(fault, CacheFault) else fault.reason)


@dataclass(frozen=True, slots=True)
class Edges:
    """What the pipeline stands between, open and warm."""

    telemetry: Telemetry
    prices: Prices
    store: Store
    upstreams: Upstreams
    embedder: EmbedderOwner | None
    index: VectorOwner | None
    semantic_fault: str


def _compile() -> None:
    compile_kernels()
    compile_features()


async def open_edges(settings: Settings, log_writer: logs.LogWriter | None, stack: contextlib.AsyncExitStack) -> Edges:
    """Everything but the listeners; `stack` closes it. Raises ConfigError."""
    telemetry = Telemetry(log_writer, level=logging.getLevelNamesMapping()[settings.log.level])
    prices = configured(settings)
    if settings.rules.semantic:  # seconds: beside the opening of database and model; whoever needs them waits
        compiling = asyncio.get_running_loop().run_in_executor(None, _compile)
        stack.push_async_callback(asyncio.wait, [compiling])
    await asyncio.to_thread(prices.load)
    store = await open_store(
        settings.store.database_url or None,
        settings.data_dir,
        price=prices.price,
        rates=prices.rates,
        limit_entries=settings.store.max_entries,
        limit_bytes=settings.store.max_bytes,
        queue_limit=settings.store.queue,
    )
    stack.push_async_callback(store.close)
    embedder, index, fault = await open_semantic(settings, store, stack)
    forward = settings.forward
    upstreams = Upstreams(
        [upstream_address(name, upstream) for name, upstream in settings.upstreams.items()],
        UpstreamLimits(
            forward.connect_timeout_s,
            forward.first_byte_timeout_s,
            forward.idle_timeout_s,
            memo_bytes=settings.limits.memo_bytes,
        ),
        extra_headers=extra_headers(settings),
    )
    await upstreams.start()
    stack.push_async_callback(upstreams.close)
    return Edges(telemetry, prices, store, upstreams, embedder, index, fault)


def assemble(settings: Settings, edges: Edges, tasks: Tasks, finishing: Tasks) -> tuple[Pipeline, ClientHandler]:
    """The pipeline over its edges, and the handler in front of it."""
    hot = HotRows(settings.cache.hot_bytes)
    embedder = edges.embedder
    routes = Routes(orjson.loads)
    secret = read_secret(settings.data_dir)
    steering = Steering(settings.policies, settings.aliases, settings.ready)
    reader = Reader(routes, edges.upstreams, settings.rules, settings.limits, steering, extra_headers(settings))
    ring = KeyRing(edges.store.keys, edges.prices, keyed=keyed(settings), only=settings.server.keys_only)
    ledger = MeteredLedger(edges.store.ledger, ring)
    books = Books(ledger, edges.prices, edges.telemetry)
    model = settings.cache.judge_model
    identity = "" if embedder is None else embedder.identity
    auditor = Auditor(
        judge=Judge(settings.rules, Learner, LEVELS, SENSITIVITY, partial(edges.store.comparisons.note, identity)),
        entries=edges.store.entries,
        comparisons=edges.store.comparisons,
        comparer=None if embedder is None else Comparer(embedder.embed, lambda: embedder.queue_length),
        arbiter=Arbiter(model=model, upstream=edges.upstreams, books=books) if model else None,
        verify=embedder.verify if embedder is not None and embedder.can_verify and settings.rules.pair_guard else None,
        embedder=identity,
        hot=hot,
        tasks=tasks,
        telemetry=edges.telemetry,
    )
    forwarder = Forwarder(
        upstream=edges.upstreams,
        lanes=settings.lanes,
        facts=reader.facts,
        predictor=Predictor(settings.lanes.predict, answers_of(edges.store.entries, hot)),
        prefixes=PrefixMarks(
            settings.lanes.prefix,
            secret,
            lambda upstream, model, ts_ms: writes_cost_extra(edges.prices.rates(upstream, model, "default", ts_ms)),
        ),
        purges=edges.store.entries.purges,
    )
    pipeline = Pipeline(
        rules=settings.rules,
        store=edges.store.entries,
        books=books,
        telemetry=edges.telemetry,
        tasks=tasks,
        hot=hot,
        embedder=embedder,
        index=edges.index,
        auditor=auditor,
        forwarder=forwarder,
        router=Router(
            settings.lanes.route,
            reader=reader,
            votes=edges.store.votes,
            embedder=embedder,
            index=edges.index,
            comparer=None if embedder is None else Comparer(embedder.embed, lambda: embedder.queue_length),
        ),
        prefetcher=Prefetcher(settings.lanes.prefetch),
        stale=settings.lanes.stale,
        semantic_fault=edges.semantic_fault,
        usage_on_hit=settings.cache.usage_on_hit,
        pace=settings.stream.pace,
        finisher=Finisher(settings.stream.on_leave, finishing, settings.rules.answer_limit_bytes),
        model_aliases=aliases_of(settings.forward.model_aliases),
        semantic_misses_per_min=settings.cache.semantic_misses_per_min,
    )
    embeddings = Embeddings(
        pipeline=pipeline,
        store=edges.store.entries,
        books=books,
        upstream=edges.upstreams,
        telemetry=edges.telemetry,
        tasks=tasks,
        usage_on_hit=settings.cache.usage_on_hit,
        model_aliases=aliases_of(settings.forward.model_aliases),
    )
    handler = ClientHandler(
        pipeline=pipeline,
        embeddings=embeddings,
        upstream=edges.upstreams,
        reader=reader,
        routes=routes,
        ledger=ledger,
        telemetry=edges.telemetry,
        limits=settings.limits,
        secret=secret,
        key_ring=ring,
        extra_headers=extra_headers(settings),
        anonymous=settings.server.anonymous,
        keyless=settings.server.listen.host in LOOPBACK_NAMES,
    )
    if settings.batch.serve:
        handler.batches = batch_api(settings, edges, tasks, handler, Lines(
            pipeline, embeddings, books, settings.rules, aliases_of(settings.forward.model_aliases), ring,
            settings.cache.usage_on_hit, lambda: 0 if embedder is None else embedder.queue_length,
        ))  # fmt: skip
    return pipeline, handler


def batch_api(settings: Settings, edges: Edges, tasks: Tasks, handler: ClientHandler, lines: Lines) -> BatchApi:
    """Batches and deferred calls, not started."""
    ours, keep_s = settings.batch, settings.batch.keep_days * DAY_S
    upstreams = settings.upstreams.items()
    keyless = {upstream.dialect for _, upstream in upstreams if upstream.key is None}
    without = [name for name, one in upstreams if one.batch == "off" or one.dialect not in ("openai", "anthropic")]
    engine = Engine(
        store=edges.store.batches,
        lines=lines,
        upstream=edges.upstreams,
        read=handler.read_line,
        dialect_of=handler.dialect_of,
        tasks=tasks,
        without_batches=without,
        keyed=frozenset({"openai", "anthropic"} - keyless),
        concurrency=ours.concurrency,
        poll_s=ours.poll_interval_s,
        max_lines=ours.max_lines,
        line_limit_bytes=settings.limits.body_bytes,
    )
    return BatchApi(
        engine=engine,
        deferred=DeferredCalls(engine, tasks, collect_s=ours.collect_s, keep_s=keep_s),
        passing=handler.passing,
        upstream=edges.upstreams,
        limits=settings.limits,
        keep_s=keep_s,
    )


async def open_admin(settings: Settings, operator: Operator, edges: Edges, token: str) -> web.AppRunner:
    """The admin listener, accepting; the caller cleans it up. Raises ConfigError."""
    gate = Gate(token, LOOPBACK_NAMES | {settings.server.admin.host})
    built = admin.build(operator, edges.telemetry, gate)
    runner = web.AppRunner(built, access_log=None, handle_signals=False, max_line_size=ADMIN_LINE_BYTES)
    await runner.setup()
    site = web.TCPSite(runner, settings.server.admin.host, settings.server.admin.port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise _no_listener(settings.server.admin, error) from error
    return runner


async def open_clients(settings: Settings, handler: ClientHandler) -> listener.Listener:
    """The client listener, accepting. Raises ConfigError."""
    address = settings.server.listen
    try:
        return await listener.start(handler, address.host, address.port, settings.limits)
    except OSError as error:
        raise _no_listener(address, error) from error


def _no_listener(address: Address, error: OSError) -> ConfigError:
    """A port that another process holds, and an address that the machine does not have, may come by themselves."""
    kind = NotYet if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) else ConfigError
    return kind(f"cannot listen on {address}: {error.strerror}")


@contextlib.asynccontextmanager
async def open_app(settings: Settings, *, log_writer: logs.LogWriter | None = None) -> AsyncIterator[App]:
    """A serving ibid; leaving the context stops accepting, drains, flushes and closes. Raises ConfigError."""
    async with contextlib.AsyncExitStack() as stack:
        started_s = time.perf_counter()
        edges = await open_edges(settings, log_writer, stack)
        token, token_path = load_token(settings.server.admin_token, settings.data_dir)
        if log_writer is not None:
            log_writer.form.redactor.register(token)
        tasks, background = Tasks(edges.telemetry.fault), Tasks(edges.telemetry.fault)
        finishing = Tasks(edges.telemetry.fault)
        stack.push_async_callback(background.close, 1.0)
        pipeline, handler = assemble(settings, edges, tasks, finishing)
        try:
            await handler.keys.load()
        except CacheFault as fault:
            raise NotYet(f"virtual keys cannot be read: {fault.message}") from fault
        if edges.embedder is not None:
            await learn(pipeline)
        pulse, stopping = Pulse(), asyncio.Event()
        reindex = renewal(edges, pipeline)
        operator = Operator(
            pipeline=pipeline,
            store=edges.store,
            telemetry=edges.telemetry,
            explain=Explainer(pipeline, handler, edges.store, settings.lanes, edges.prices).explain,
            gauges=lambda: {
                "loop_stall_ms_max": round(pulse.longest_ms, 3),
                "uptime_s": round(time.perf_counter() - started_s),
            },
            settings=settings,
            keys=handler.keys,
            reindex=reindex,
            spawn=background.spawn,
            is_stopping=stopping.is_set,
        )
        memory = memory_of(settings, pipeline, handler)
        app = App(
            settings, pipeline, edges.store, edges.telemetry, operator, handler.keys, token, token_path, stopping,
            memory,
        )  # fmt: skip
        watch(app, handler, pulse, edges)
        runner = await open_admin(settings, operator, edges, token)
        stack.push_async_callback(runner.cleanup)
        app.admin_port = int(runner.addresses[0][1])
        clients = await open_clients(settings, handler)
        app.port = clients.port
        endless = [
            background.spawn(pulse.run(handler, memory), "pulse"),
            background.spawn(housekeep(app, edges.index), "housekeeping"),
            background.spawn(handler.keys.follow(edges.telemetry.fault), "keys"),
        ]
        if reindex is not None:
            endless.append(background.spawn(reindex.keep_up(), "reindex"))
        if edges.store.database.dialect == "postgresql":  # SQLite has one process
            endless.append(background.spawn(follow(app), "follow"))
        if (batches := handler.batches) is not None:
            endless.append(background.spawn(take_up(batches, edges.store.database.dialect), "batches"))
        try:
            yield app
        finally:
            stopping.set()
            for task in endless:
                task.cancel()
            drained_s = time.perf_counter() + settings.server.drain_timeout_s
            if batches is not None:
                batches.deferred.stop()
                batches.engine.stop()
            await clients.stop(settings.server.drain_timeout_s)
            if batches is not None:
                await batches.engine.drained(settings.server.drain_timeout_s)
                await batches.deferred.drained(settings.server.drain_timeout_s)
            await finishing.close(max(0.0, drained_s - time.perf_counter()))
            await tasks.close(5.0)
            if edges.index is not None:
                with contextlib.suppress(IndexRoomError):
                    await edges.index.snapshot(settings.data_dir / SNAPSHOT_NAME)


def memory_of(settings: Settings, pipeline: Pipeline, handler: ClientHandler) -> Memory:
    """The bound on memory, over the caches that can be dropped and the way in that can be shut."""
    embedder = pipeline.embedder
    caches = [pipeline.hot.clear, pipeline.judge.shed]
    if isinstance(embedder, EmbedderOwner):
        caches.append(embedder.shed)

    def refuse(is_short: bool) -> None:
        handler.admission.is_shut = is_short

    return Memory(settings.server.memory_bytes or group_limit_bytes(), [*caches, trim_heap], refuse)


async def take_up(batches: BatchApi, database: str) -> None:
    """Go on with batches and deferred calls of an earlier process, and of replicas that are gone."""
    while True:
        try:
            await batches.engine.start()
            await batches.deferred.start()
        except CacheFault as fault:
            log.warning("batches of before wait", extra={"cause": fault.message})
        if database == "sqlite":  # one process: nobody else can leave any
            return
        await asyncio.sleep(HOUSEKEEPING_S)


def watch(app: App, handler: ClientHandler, pulse: Pulse, edges: Edges) -> None:
    """Gauges that are read at scrape time."""
    gauge, embedder, index = app.telemetry.watch, edges.embedder, edges.index
    for name in app.settings.upstreams:
        is_open = partial(lambda one: float(edges.upstreams.breaker(one).is_open), name)
        gauge("ibid_upstream_down", "An upstream that keeps failing is only probed", is_open, upstream=name)
    limits = app.settings.limits
    gauge("ibid_in_flight", "Client requests being answered", lambda: limits.in_flight - handler.admission.free)
    gauge("ibid_queue_length", "Waiting work", lambda: handler.admission.queued, queue="admission")
    gauge("ibid_queue_length", "Waiting work", lambda: len(handler.arriving), queue="bodies")
    gauge("ibid_queue_length", "Waiting work", lambda: app.store.ledger.waiting, queue="ledger")
    gauge("ibid_queue_length", "Waiting work", lambda: app.store.writer.waiting, queue="store")
    ledger = app.store.ledger
    gauge("ibid_ledger_journal_bytes", "Ledger rows on file, not known to SQL yet", lambda: ledger.journal_bytes)
    gauge("ibid_ledger_unprotected", "Ledger rows in memory alone: a kill loses them", lambda: ledger.unprotected)
    gauge("ibid_ledger_dropped", "Ledger rows lost for want of database, disk and memory", lambda: ledger.dropped)
    if (batches := handler.batches) is not None:
        gauge("ibid_batches", "Batches being worked on", lambda: batches.engine.running)
        gauge("ibid_batch_lines", "Lines of batches that wait for an answer", lambda: batches.engine.lines_left)
        gauge("ibid_deferred", "Deferred calls under way", lambda: batches.deferred.waiting)
    gauge("ibid_hot_bytes", "Memory of rows served without SQL", lambda: app.pipeline.hot.size_bytes)
    gauge("ibid_memory_used_share", "Resident memory by what it may be", lambda: app.memory.used_share)
    gauge("ibid_loop_stall_seconds_max", "Longest stall of the event loop", lambda: pulse.longest_ms / 1e3)
    if embedder is not None and index is not None:
        gauge("ibid_queue_length", "Waiting work", lambda: embedder.queue_length, queue="embedder")
        gauge("ibid_queue_length", "Waiting work", lambda: index.waiting, queue="index")
        gauge("ibid_vectors", "Vectors in the index", lambda: index.size)


def keyed(settings: Settings) -> set[str]:
    """Upstreams that virtual keys open: with a key of their own, or of a dialect that asks for none."""
    return {name for name, one in settings.upstreams.items() if one.key is not None or one.dialect == "ollama"}


def upstream_address(name: str, settings: UpstreamSettings) -> UpstreamAddress:
    return UpstreamAddress(name, settings.base_url, settings.dialect, settings.models, settings.key)


def banner(app: App) -> str:
    """What the operator needs to know, once, without secrets."""
    token = app.admin_token_path or "IBID_ADMIN_TOKEN"
    host = app.settings.server
    lines = [
        f"ibid serves   http://{host.listen.host}:{app.port}/v1",
        f"admin         http://{host.admin.host}:{app.admin_port}  (token: {token})",
        f"upstreams     {', '.join(f'{n} {u.base_url}' for n, u in app.settings.upstreams.items())}",
        f"database      {app.store.database.label}{' (new)' if app.store.database.is_new else ''}",
        f"semantic      {describe(app.pipeline)}",
    ]
    return "\n".join(lines)


def extra_headers(settings: Settings) -> frozenset[str]:
    """Headers beyond the allow-list that reach the upstream, and so are part of the scope."""
    return frozenset(name.lower() for name in settings.forward.extra_headers)


def aliases_of(pairs: Sequence[str]) -> dict[str, set[str]]:
    """Model asked → names its upstream may answer with. Raises ConfigError for a pair without its equals sign."""
    aliases: dict[str, set[str]] = {}
    for pair in pairs:
        asked, sign, answered = pair.partition("=")
        if not (asked and sign and answered):
            raise ConfigError(f"forward.model_aliases: {pair!r} must be asked=answered")
        aliases.setdefault(asked, set()).add(answered)
    return aliases


def answers_of(entries: EntryStore, hot: HotRows) -> Callable[[int], Awaitable[Answer | None]]:
    """Stored answers by entry id, from memory or SQL; None where there is none, or none can be read."""

    async def find(entry_id: int) -> Answer | None:
        if (row := hot.get(entry_id)) is not None:
            return row.answer
        try:
            entry = await entries.get(entry_id)
        except CacheFault:
            return None
        return None if entry is None else decode_answer(entry.draft.answer, orjson.loads)

    return find


def describe(pipeline: Pipeline) -> str:
    return pipeline.semantic_fault if pipeline.embedder is None else f"on, embedder {pipeline.embedder.identity}"


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once."""
    writer = logs.set_up(settings.log.level, as_json=settings.log.format == "json", secrets=secrets_of(settings))
    try:
        async with open_app(settings, log_writer=writer) as app:
            loop = asyncio.get_running_loop()

            def on_signal() -> None:
                if app.stopping.is_set():
                    os._exit(1)
                app.stopping.set()

            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, on_signal)
            settle_garbage()
            sys.stderr.write(banner(app) + "\n")
            sys.stderr.flush()
            await app.stopping.wait()
    finally:
        logs.tear_down(writer)


def settle_garbage() -> None:
    """Take what was made at start out of the collector's sight and let it look less often.

    Modules, compiled kernels and SQL statements are about a million objects that never die; a full collection over
    them stopped the loop for 110-195 ms each time (measured 2026-11-22 under load).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def secrets_of(settings: Settings) -> list[str]:
    """What no log line may show."""
    password = urlsplit(settings.store.database_url).password
    keys = [upstream.key for upstream in settings.upstreams.values()]
    return [secret for secret in (settings.server.admin_token, password, *keys) if secret]


def serve(settings: Settings) -> None:
    """Run in the foreground. Raises ConfigError."""
    uvloop.run(run(settings))
