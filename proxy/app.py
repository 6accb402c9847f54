"""Composition root: builds every edge, opens them in order, closes them in reverse. Imported by the command line only.

Order: ports (`proxy.doorstep`) → data directory and secret → database → listeners → model, kernels, index, evidence
(`proxy.upkeep.loading`). Until those are there, lookups that need them are a bypass `loading`; ledger, keys, limits,
exact hits and forwards need none of them. Importing this module must stay quick: FAISS, Numba and ONNX Runtime stay
out.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson
import uvloop
from aiohttp import web

from index.answers import SENSITIVITY
from index.errors import IndexRoomError
from index.heap import trim_heap
from index.levels import LEVELS
from proxy import doorstep
from proxy.admin import server as admin
from proxy.admin.auth import LOOPBACK_NAMES, Gate, load_token
from proxy.admin.explain import Explainer
from proxy.admin.operations import Operator
from proxy.admin.reindex import Reindex
from proxy.batch.deferred import DeferredCalls
from proxy.batch.engine import Engine
from proxy.batch.http import BatchApi
from proxy.batch.lines import Lines
from proxy.client import listener
from proxy.client.handlers import ClientHandler
from proxy.core.answer import decode_answer
from proxy.core.dialects.routes import Routes
from proxy.core.errors import CacheFault, ConfigError, NotYet
from proxy.core.model import Answer
from proxy.core.rates import writes_cost_extra
from proxy.core.risk import LevelName, Tally
from proxy.core.units import DAY_S
from proxy.hot import HotRows
from proxy.judging.arbiter import Arbiter
from proxy.judging.audits import Auditor
from proxy.judging.judge import Judge
from proxy.lanes.forwarding import Forwarder
from proxy.lanes.predict import Predictor
from proxy.lanes.prefetch import Prefetcher
from proxy.lanes.prefixes import PrefixMarks
from proxy.lanes.route import Router
from proxy.meaning import Meaning, Step
from proxy.money.books import Books
from proxy.money.keys import KeyRing, MeteredLedger
from proxy.money.prices import Booking, Prices, configured
from proxy.ports import EntryStore, Learner
from proxy.request.embeddings import Embeddings
from proxy.request.leaving import Finisher
from proxy.request.pipeline import Pipeline
from proxy.request.reading import Reader, Steering
from proxy.settings.config import Settings, UpstreamSettings
from proxy.store.store import Store, open_store
from proxy.tasks import Tasks, aside
from proxy.upstreams.upstream import UpstreamAddress, UpstreamLimits, Upstreams
from proxy.watch import logs
from proxy.watch.health import Health, Trouble
from proxy.watch.memory import Memory, group_limit_bytes
from proxy.watch.telemetry import Telemetry

if TYPE_CHECKING:
    from proxy.upkeep.loading import Opened

log = logging.getLogger(__name__)

SNAPSHOT_NAME = "index.snapshot"
SECRET_NAME = "installation-secret"
BEAT_S = 0.02
HOUSEKEEPING_S = 60.0
ACCEPT_TICK_S = 0.25
PROGRESS_S = 10.0  # between two lines about a step of loading
SLOW_OPENING_S = 1.0  # a database that takes longer is named on standard error
ADMIN_LINE_BYTES = 64 * 1024  # every parameter at its longest, percent-encoded
FOLLOW_S = 2.0

Tell = Callable[[str], None]
"""Says one line to whoever started the program."""


class Pulse:
    """Measures how late the event loop wakes up, and lets once-a-second work ride along."""

    def __init__(self) -> None:
        self.longest_ms = 0.0

    async def run(self, memory: Memory, each_second: Callable[[float], None]) -> None:
        second = time.monotonic()
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT_S)
            now = time.monotonic()
            self.longest_ms = max(self.longest_ms, (now - before - BEAT_S) * 1e3)
            memory.look(now)
            if now - second >= 1.0:
                second = now
                each_second(now)


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
    health: Health
    memory: Memory
    port: int = 0
    admin_port: int = 0
    opened: Opened | None = None  # what compares by meaning, once it is loaded
    reindex: Reindex | None = None
    refusal: ConfigError | None = None  # why it stops by itself
    unlearned: str = ""  # why the judge starts without what it had learned

    async def settled(self) -> None:
        """Wait for what is loaded behind the listeners. Raises ConfigError where it is required and not to be had."""
        await self.pipeline.meaning.settled()
        if self.refusal is not None:
            raise self.refusal


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


def new_learner() -> Learner:
    """The first one is made behind the listeners: it brings Numba."""
    from index.learner import Learner

    return Learner()


async def load_meaning(app: App, stack: contextlib.AsyncExitStack, tell: Tell) -> None:
    """Open what compares questions by meaning, while requests are answered without it. `stack` closes it."""
    meaning, settings = app.pipeline.meaning, app.settings
    began_s = time.monotonic()

    def step(now: Step) -> None:
        meaning.step = now
        tell(f"loading       {now.number}/{now.of} {now.about}")

    async def progress() -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            if (now := meaning.step) is not None:
                tell(f"loading       {now.number}/{now.of} {now.about}: {time.monotonic() - began_s:.0f} s so far")

    if not settings.rules.semantic:
        meaning.close("semantic_off")
        return
    telling = asyncio.ensure_future(progress())
    try:
        step(Step("libraries", 1, 4))
        room = await aside(lambda: importlib.import_module("proxy.upkeep.loading"))
        app.opened = opened = await room.open_semantic(settings, app.store, stack, step)
        meaning.identity = opened.embedder.identity
        await learn(app)
    except (IndexRoomError, CacheFault, ImportError) as fault:
        reason = fault.code if isinstance(fault, CacheFault) else getattr(fault, "reason", "embedder_down")
        log.error("serving exact hits only", extra={"reason": reason, "cause": str(fault)})
        if settings.embedding.require_semantic:
            app.refusal = ConfigError(f"semantic lookups are required and cannot start: {fault}")
            app.stopping.set()
        meaning.close(reason, str(fault))
        tell(f"semantic      {reason}: exact hits only ({fault})")
        return
    finally:
        telling.cancel()
    app.reindex = Reindex(
        opened.embedder, app.store.entries, app.pipeline.propose, lambda: opened.embedder.queue_length
    )
    app.pipeline.on_lacking = app.reindex.wake
    meaning.open(opened.parts(guarded=settings.rules.pair_guard))
    tell(f"semantic      {describe(meaning)}, after {time.monotonic() - began_s:.1f} s")
    for line in degraded_lines(app.health):
        tell(line)


async def learn(app: App) -> None:
    """What judge and router knew when they stopped. Without it they start strict, which is safe."""
    try:
        await app.pipeline.auditor.load()
        await app.pipeline.errands.router.load()
    except CacheFault as fault:
        log.error("the judge starts without what it had learned", extra={"cause": fault.message})
        app.unlearned = fault.message


async def follow(app: App) -> None:
    """Take up what other replicas of this database purge, and what they learn, after what is written down."""
    while True:
        await asyncio.sleep(FOLLOW_S)
        try:
            await app.pipeline.follow()
            if app.pipeline.meaning.parts is not None:
                await app.pipeline.auditor.follow()
        except CacheFault as fault:
            app.telemetry.fault(fault.code)


async def renew(app: App) -> None:
    """Vectors of this model for the entries that have none of it."""
    await app.pipeline.meaning.settled()
    if app.reindex is not None:
        await app.reindex.keep_up()


class Saving:
    """The snapshot of the index, and why its last saving failed; "" when it did not."""

    def __init__(self) -> None:
        self.fault = ""

    async def save(self, app: App) -> None:
        """Raises IndexRoomError."""
        if app.opened is None:
            return
        try:
            await app.opened.index.snapshot(app.settings.data_dir / SNAPSHOT_NAME)
            self.fault = ""
        except IndexRoomError as fault:
            self.fault = str(fault)
            raise


async def housekeep(app: App, saving: Saving) -> None:
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
            if time.monotonic() - saved_s >= app.settings.index.snapshot_interval_s:
                await saving.save(app)
                saved_s = time.monotonic()
        except (CacheFault, IndexRoomError) as fault:
            app.telemetry.fault(fault.code if isinstance(fault, CacheFault) else fault.reason)


@dataclass(frozen=True, slots=True)
class Edges:
    """What the pipeline stands between, open."""

    telemetry: Telemetry
    prices: Prices
    booking: Booking
    store: Store
    upstreams: Upstreams


async def open_edges(
    settings: Settings, log_writer: logs.LogWriter | None, stack: contextlib.AsyncExitStack, tell: Tell
) -> Edges:
    """What answers requests without meaning; `stack` closes it. Raises ConfigError."""
    telemetry = Telemetry(log_writer, level=logging.getLevelNamesMapping()[settings.log.level])
    prices = configured(settings)
    booking = Booking(prices)
    slow = asyncio.get_running_loop().call_later(SLOW_OPENING_S, tell, "waiting       for the database")
    try:
        store = await open_store(
            settings.store.database_url or None,
            settings.data_dir,
            price=booking.price,
            rates=prices.rates,
            limit_entries=settings.store.max_entries,
            limit_bytes=settings.store.max_bytes,
            queue_limit=settings.store.queue,
        )
    finally:
        slow.cancel()
    stack.push_async_callback(store.close)
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
    return Edges(telemetry, prices, booking, store, upstreams)


def assemble(
    settings: Settings, edges: Edges, tasks: Tasks, finishing: Tasks
) -> tuple[Pipeline, ClientHandler, BatchApi | None]:
    """The pipeline over its edges, and the handler in front of it."""
    hot = HotRows(settings.cache.hot_bytes)
    meaning = Meaning()
    routes = Routes(orjson.loads)
    secret = read_secret(settings.data_dir)
    steering = Steering(settings.policies, settings.aliases, settings.ready)
    reader = Reader(routes, edges.upstreams, settings.rules, settings.limits, steering, extra_headers(settings))
    ring = KeyRing(edges.store.keys, edges.prices, keyed=keyed(settings), only=settings.server.keys_only)
    ledger = MeteredLedger(edges.store.ledger, ring)
    books = Books(ledger, edges.prices, edges.telemetry)
    model = settings.cache.judge_model

    def note(level: LevelName, change: Tally) -> None:
        edges.store.comparisons.note(meaning.identity, level, change)

    auditor = Auditor(
        judge=Judge(settings.rules, new_learner, LEVELS, SENSITIVITY, note),
        entries=edges.store.entries,
        comparisons=edges.store.comparisons,
        meaning=meaning,
        arbiter=Arbiter(model=model, upstream=edges.upstreams, books=books) if model else None,
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
        meaning=meaning,
        auditor=auditor,
        forwarder=forwarder,
        router=Router(
            settings.lanes.route,
            reader=reader,
            votes=edges.store.votes,
            meaning=meaning,
        ),
        prefetcher=Prefetcher(settings.lanes.prefetch),
        stale=settings.lanes.stale,
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
    batches = None
    if settings.batch.serve:
        handler.batches = batches = batch_api(settings, edges, tasks, handler, Lines(
            pipeline, embeddings, books, settings.rules, aliases_of(settings.forward.model_aliases), ring,
            settings.cache.usage_on_hit, lambda: meaning.waiting,
        ))  # fmt: skip
    return pipeline, handler, batches


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


async def open_admin(
    settings: Settings, operator: Operator, telemetry: Telemetry, token: str, sockets: Sequence[socket.socket]
) -> web.AppRunner:
    """The admin listener, accepting; the caller cleans it up."""
    gate = Gate(token, LOOPBACK_NAMES | {settings.server.admin.host})
    built = admin.build(operator, telemetry, gate)
    runner = web.AppRunner(built, access_log=None, handle_signals=False, max_line_size=ADMIN_LINE_BYTES)
    await runner.setup()
    for one in sockets:
        await web.SockSite(runner, one).start()
    return runner


def _silent(_line: str) -> None:
    return None


@contextlib.asynccontextmanager
async def open_app(
    settings: Settings,
    *,
    log_writer: logs.LogWriter | None = None,
    door: doorstep.Doorstep | None = None,
    tell: Tell = _silent,
    stopping: asyncio.Event | None = None,
) -> AsyncIterator[App]:
    """A serving ibid; what compares by meaning may still be loading (`App.settled`). Leaving the context stops
    accepting, drains, flushes and closes. `door`: where the ports are open already. Raises ConfigError."""
    stopping = stopping or asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        started_s = time.perf_counter()
        bound = doorstep.bind(settings) if door is None else None
        if bound is not None:
            stack.callback(bound.close)
        edges = await open_edges(settings, log_writer, stack, tell)
        token, token_path = load_token(settings.server.admin_token, settings.data_dir)
        if log_writer is not None:
            log_writer.form.redactor.register(token)
        tasks, background = Tasks(edges.telemetry.fault), Tasks(edges.telemetry.fault)
        finishing = Tasks(edges.telemetry.fault)
        behind = await stack.enter_async_context(contextlib.AsyncExitStack())
        stack.push_async_callback(background.close, 1.0)
        pipeline, handler, batches = assemble(settings, edges, tasks, finishing)
        try:
            await handler.keys.load()
        except CacheFault as fault:
            raise NotYet(f"virtual keys cannot be read: {fault.message}") from fault
        pulse, health, saving = Pulse(), Health(), Saving()
        operator = Operator(
            pipeline=pipeline,
            store=edges.store,
            telemetry=edges.telemetry,
            health=health,
            explain=Explainer(pipeline, handler, edges.store, settings.lanes, edges.prices).explain,
            gauges=lambda: {
                "loop_stall_ms_max": round(pulse.longest_ms, 3),
                "uptime_s": round(time.perf_counter() - started_s),
            },
            settings=settings,
            keys=handler.keys,
            reindex=lambda: app.reindex,
            spawn=background.spawn,
            is_stopping=stopping.is_set,
        )
        app = App(
            settings,
            pipeline,
            edges.store,
            edges.telemetry,
            operator,
            handler.keys,
            token,
            token_path,
            stopping,
            health,
            memory_of(settings, pipeline, handler),
        )
        watch_health(app, edges, saving)
        watch(app, handler, batches, pulse, edges)
        if door is not None:
            bound = door.take()
            stack.callback(bound.close)
        assert bound is not None
        runner = await open_admin(settings, operator, edges.telemetry, token, bound.admin)
        stack.push_async_callback(runner.cleanup)
        app.admin_port = int(runner.addresses[0][1])
        clients = listener.Listener(listener.ClientServer(handler, settings.limits), bound.clients, ACCEPT_TICK_S)
        app.port = clients.port

        def each_second(now_s: float) -> None:
            handler.beat(now_s)
            health.look()

        endless = [
            background.spawn(pulse.run(app.memory, each_second), "pulse"),
            background.spawn(load_meaning(app, behind, tell), "loading"),
            background.spawn(load_prices(edges.prices), "prices"),
            background.spawn(housekeep(app, saving), "housekeeping"),
            background.spawn(handler.keys.follow(edges.telemetry.fault), "keys"),
            background.spawn(renew(app), "reindex"),
        ]
        if edges.store.database.dialect == "postgresql":  # SQLite has one process
            endless.append(background.spawn(follow(app), "follow"))
        if batches is not None:
            endless.append(background.spawn(take_up(app, batches), "batches"))
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
            if not pipeline.meaning.is_loading:
                with contextlib.suppress(IndexRoomError):
                    await saving.save(app)


def memory_of(settings: Settings, pipeline: Pipeline, handler: ClientHandler) -> Memory:
    """The bound on memory, over the caches that can be dropped and the way in that can be shut."""

    caches = [pipeline.hot.clear, pipeline.judge.shed, handler.shed, pipeline.meaning.shed, trim_heap]
    return Memory(settings.server.memory_bytes or group_limit_bytes(), caches, handler.shut)


async def load_prices(prices: Prices) -> None:
    """The price list, behind the listeners: reading it takes most of a second."""
    await aside(prices.load)


async def take_up(app: App, batches: BatchApi) -> None:
    """Go on with batches and deferred calls of an earlier process, and of replicas that are gone: as soon as what may
    answer them without a call is loaded."""
    await app.pipeline.meaning.settled()
    while True:
        try:
            await batches.engine.start()
            await batches.deferred.start()
        except CacheFault as fault:
            log.warning("batches of before wait", extra={"cause": fault.message})
        if app.store.database.dialect == "sqlite":  # one process: nobody else can leave any
            return
        await asyncio.sleep(HOUSEKEEPING_S)


def watch(app: App, handler: ClientHandler, batches: BatchApi | None, pulse: Pulse, edges: Edges) -> None:
    """Gauges that are read at scrape time."""
    gauge = app.telemetry.watch
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
    if batches is not None:
        gauge("ibid_batches", "Batches being worked on", lambda: batches.engine.running)
        gauge("ibid_batch_lines", "Lines of batches that wait for an answer", lambda: batches.engine.lines_left)
        gauge("ibid_deferred", "Deferred calls under way", lambda: batches.deferred.waiting)
    gauge("ibid_hot_bytes", "Memory of rows served without SQL", lambda: app.pipeline.hot.size_bytes)
    gauge("ibid_memory_used_share", "Resident memory by what it may be", lambda: app.memory.used_share)
    gauge("ibid_loop_stall_seconds_max", "Longest stall of the event loop", lambda: pulse.longest_ms / 1e3)
    gauge("ibid_unpriced_models", "Models that answered without a price", lambda: len(edges.booking.unpriced))
    for part in app.health.parts:
        is_degraded = partial(lambda one: float(app.health.is_degraded(one)), part)
        gauge("ibid_degraded", "1 for a part that is not as it should be", is_degraded, part=part)
    if app.settings.rules.semantic:
        meaning = app.pipeline.meaning
        gauge("ibid_queue_length", "Waiting work", lambda: meaning.waiting, queue="embedder")
        gauge("ibid_queue_length", "Waiting work", lambda: app.opened.index.waiting if app.opened else 0, queue="index")
        gauge("ibid_vectors", "Vectors in the index", lambda: app.opened.index.size if app.opened else 0)


def watch_health(app: App, edges: Edges, saving: Saving) -> None:
    """Every part that can serve less well without anybody being told by an error."""
    meaning, store, watch = app.pipeline.meaning, app.store, app.health.watch

    def semantic() -> Trouble | None:
        if meaning.reason in ("", "semantic_off"):
            return None
        at = meaning.step
        return Trouble(meaning.reason, meaning.cause if at is None else f"{at.number}/{at.of} {at.about}")

    watch("semantic", semantic)
    watch("model", lambda: _opened_trouble(app, lambda found: "" if found.is_converted else "torch_fallback"))
    watch("pair_guard", lambda: _opened_trouble(app, lambda found: "" if found.is_guarded else "no_pair_guard"))
    watch("embedder", lambda: _opened_trouble(app, lambda found: found.embedder.trouble))
    watch("index", lambda: _opened_trouble(app, lambda found: found.index.trouble))
    watch("kernels", lambda: _opened_trouble(app, lambda found: "" if found.is_compiled else "interpreted"))
    watch("evidence", lambda: Trouble("unlearned", app.unlearned) if app.unlearned else None)
    watch("snapshot", lambda: Trouble("snapshot_unsaved", saving.fault) if saving.fault else None)
    watch("store", lambda: None if store.state == "ok" else Trouble(store.state, store.database.label))
    watch("ledger", lambda: None if store.ledger.state == "ok" else Trouble(store.ledger.state))
    watch("keys", lambda: Trouble("unread") if app.keys.is_stale else None)
    watch("prices", lambda: Trouble("unpriced", ", ".join(edges.booking.unpriced)) if edges.booking.unpriced else None)


def _opened_trouble(app: App, look: Callable[[Opened], str]) -> Trouble | None:
    """What is the matter with a part of what was loaded; none before it is."""
    if app.pipeline.meaning.parts is None or app.opened is None or not (reason := look(app.opened)):
        return None
    return Trouble(reason, app.opened.embedder.identity)


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
        f"semantic      {describe(app.pipeline.meaning)}",
        *degraded_lines(app.health),
    ]
    return "\n".join(lines)


def degraded_lines(health: Health) -> list[str]:
    """What the banner says of every part but semantic lookups, which have a line of their own."""
    return [f"degraded      {part}: {reason}" for part, reason in health.reasons().items() if part != "semantic"]


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


def describe(meaning: Meaning) -> str:
    """What the banner says of semantic lookups."""
    if meaning.embedder is not None:
        return f"on, embedder {meaning.identity}"
    return "loading; exact hits and forwards are served meanwhile" if meaning.is_loading else meaning.reason


async def run(settings: Settings, door: doorstep.Doorstep | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once. Raises ConfigError."""
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None
    stopping, is_open = asyncio.Event(), False

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()
        if not is_open:
            main.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    writer = logs.set_up(settings.log.level, as_json=settings.log.format == "json", secrets=secrets_of(settings))
    meaning: Meaning | None = None
    try:
        async with open_app(settings, log_writer=writer, door=door, tell=_say, stopping=stopping) as app:
            is_open, meaning = True, app.pipeline.meaning
            settle_garbage()
            _say(banner(app))
            await _first(stopping.wait(), meaning.settled())
            settle_garbage()
            await stopping.wait()
        if app.refusal is not None:
            raise app.refusal
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
    finally:
        logs.tear_down(writer)
    if meaning is None or meaning.is_loading:  # a thread is importing or compiling, and nobody needs what it makes
        sys.stderr.flush()
        os._exit(0)


async def _first(*events: Coroutine[Any, Any, object]) -> None:
    """Wait for one of these."""
    waiting = [asyncio.ensure_future(event) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for one in waiting:
        one.cancel()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


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


def serve(settings: Settings, door: doorstep.Doorstep | None = None) -> None:
    """Run in the foreground. What is written is its owner's alone. Raises ConfigError."""
    os.umask(0o077)
    uvloop.run(run(settings, door))
