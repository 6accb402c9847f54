"""Composition root: builds every edge, opens them in order, closes them in reverse. Imported by the command line only.

Order: ports (`proxy.doorstep`) → price list → data directory and secret → database → listeners → model, kernels, index,
evidence (`proxy.upkeep.semantic`). Until those last are there, lookups that need them are a bypass `loading`; ledger,
keys, limits, exact hits and forwards need none of them. Importing this module must stay quick: FAISS, Numba and ONNX
Runtime stay out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from index.errors import IndexRoomError
from proxy import doorstep, parts
from proxy.admin import server as admin
from proxy.admin.auth import LOOPBACK_NAMES, Gate, load_token
from proxy.admin.explain import Explainer
from proxy.admin.operations import Operator
from proxy.admin.roles import Role, Token
from proxy.admin.sessions import Sessions
from proxy.batch.http.api import BatchApi
from proxy.client import listener
from proxy.client.connection import ClientServer
from proxy.client.handlers import ClientHandler
from proxy.core.errors import CacheFault, ConfigError, NotYet
from proxy.money.keys import KeyRing
from proxy.money.prices import Booking, Prices, configured
from proxy.parts import Edges, Work
from proxy.request.pipeline import Pipeline
from proxy.settings.config import Settings, UpstreamSettings
from proxy.store.store import Store, open_store
from proxy.upkeep import gauges, troubles
from proxy.upkeep.housekeeping import follow, housekeep, take_up
from proxy.upkeep.semantic import Semantic, Tell
from proxy.upstreams.address import UpstreamAddress
from proxy.upstreams.upstream import UpstreamLimits, Upstreams
from proxy.watch import logs
from proxy.watch.health import Health
from proxy.watch.memory import Memory
from proxy.watch.pulse import Pulse
from proxy.watch.telemetry import Telemetry
from proxy.watch.tracing import Spans

SECRET_NAME = "installation-secret"
ACCEPT_TICK_S = 0.25
SLOW_OPENING_S = 1.0  # a database that takes longer is named on standard error
ADMIN_LINE_BYTES = 64 * 1024  # every parameter at its longest, percent-encoded


@dataclass(slots=True)
class App:
    """A running ibid. `stopping` ends it when set."""

    settings: Settings
    edges: Edges
    work: Work
    pipeline: Pipeline
    handler: ClientHandler
    batches: BatchApi | None
    semantic: Semantic
    operator: Operator
    health: Health
    memory: Memory
    pulse: Pulse
    stopping: asyncio.Event
    admin_token: str
    admin_token_path: Path | None
    sessions: Sessions = field(default_factory=Sessions)
    port: int = 0
    admin_port: int = 0

    @property
    def store(self) -> Store:
        return self.edges.store

    @property
    def telemetry(self) -> Telemetry:
        return self.edges.telemetry

    @property
    def keys(self) -> KeyRing:
        return self.handler.keys

    async def settled(self) -> None:
        """Wait for what is loaded behind the listeners. Raises ConfigError where it is required and not to be had."""
        await self.semantic.settled()


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
    pulse = Pulse()
    async with contextlib.AsyncExitStack() as stack:
        bound = None if door is not None else own(doorstep.bind(settings), stack)
        edges = await open_edges(settings, log_writer, stack, tell)
        token = open_token(settings, log_writer)
        work = Work(edges.telemetry.fault)
        behind = await stack.enter_async_context(contextlib.AsyncExitStack())
        stack.push_async_callback(work.background.close, 1.0)
        secret = read_secret(settings.data_dir)
        app = assemble(settings, edges, work, token, secret, pulse, stopping or asyncio.Event())
        await open_keys(app.keys)
        watch(app)
        if door is not None:
            bound = own(door.take(), stack)
        assert bound is not None
        app.admin_port = await open_admin(app, bound.admin, stack)
        clients = open_clients(app, bound.clients)
        app.port = clients.port
        endless = start(app, behind, tell)
        try:
            yield app
        finally:
            await stop(app, clients, endless)


def assemble(
    settings: Settings,
    edges: Edges,
    work: Work,
    token: tuple[str, Path | None],
    secret: bytes,
    pulse: Pulse,
    stopping: asyncio.Event,
) -> App:
    """Every part over its edges, nothing started. Raises ConfigError."""
    ground = parts.make_ground(settings, edges, work, secret)
    pipeline = parts.make_pipeline(ground, parts.make_auditor(ground), parts.make_forwarder(ground))
    embeddings = parts.make_embeddings(ground, pipeline)
    handler = parts.make_handler(ground, pipeline, embeddings)
    batches = parts.make_batches(ground, pipeline, embeddings, handler) if settings.batch.serve else None
    handler.batches = batches
    memory = parts.make_memory(settings, pipeline, handler)
    health = Health()
    semantic = Semantic(settings, pipeline, edges.store, health, stopping)
    operator = Operator(
        pipeline=pipeline,
        store=edges.store,
        telemetry=edges.telemetry,
        health=health,
        explain=Explainer(pipeline, handler, edges.store, settings.lanes, edges.prices).explain,
        gauges=pulse.told,
        settings=settings,
        keys=handler.keys,
        reindex=lambda: semantic.reindex,
        spawn=work.background.spawn,
        is_stopping=stopping.is_set,
        installation=hashlib.sha256(b"ibid installation\x00" + secret).hexdigest()[:16],
    )
    return App(
        settings, edges, work, pipeline, handler, batches, semantic, operator, health, memory, pulse, stopping, *token
    )


# --- the edges, one by one ------------------------------------------------------------------------------------------


def own(bound: doorstep.Sockets, stack: contextlib.AsyncExitStack) -> doorstep.Sockets:
    """The sockets, which `stack` closes."""
    stack.callback(bound.close)
    return bound


async def open_edges(
    settings: Settings, log_writer: logs.LogWriter | None, stack: contextlib.AsyncExitStack, tell: Tell
) -> Edges:
    """What answers requests without meaning; `stack` closes it. Raises ConfigError."""
    log = settings.log
    level = logging.getLevelNamesMapping()[log.level]
    telemetry = Telemetry(log_writer, level=level, sample=log.sample, slow_ms=log.slow_s * 1e3)
    if log.traces == "otlp":
        telemetry.spans = spans = Spans(importlib.metadata.version("ibid-proxy"))
        stack.push_async_callback(asyncio.to_thread, spans.close)
    prices = configured(settings)
    prices.load()  # before anybody is answered: every row has a price, and a request must not wait for an import
    booking = Booking(prices)
    store = await open_database(settings, prices, booking, tell)
    stack.push_async_callback(store.close)
    upstreams = await open_upstreams(settings)
    stack.push_async_callback(upstreams.close)
    return Edges(telemetry, prices, booking, store, upstreams)


async def open_database(settings: Settings, prices: Prices, booking: Booking, tell: Tell) -> Store:
    """Says so when it has to be waited for. Raises ConfigError; the caller closes it."""
    slow = asyncio.get_running_loop().call_later(SLOW_OPENING_S, tell, "waiting       for the database")
    try:
        return await open_store(
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


async def open_upstreams(settings: Settings) -> Upstreams:
    """Started; the caller closes them."""
    forward = settings.forward
    upstreams = Upstreams(
        [upstream_address(name, upstream) for name, upstream in settings.upstreams.items()],
        UpstreamLimits(
            forward.connect_timeout_s,
            forward.first_byte_timeout_s,
            forward.idle_timeout_s,
            memo_bytes=settings.limits.memo_bytes,
        ),
        header_rules=parts.header_rules(settings),
    )
    await upstreams.start()
    return upstreams


def upstream_address(name: str, settings: UpstreamSettings) -> UpstreamAddress:
    return UpstreamAddress(
        name,
        settings.base_url,
        settings.dialect,
        settings.models,
        settings.key,
        settings.proxy,
        settings.stands_in_for,
    )


def open_token(settings: Settings, log_writer: logs.LogWriter | None) -> tuple[str, Path | None]:
    """The admin token, which no log line shows, and the file that keeps it. Raises ConfigError."""
    token, path = load_token(settings.server.admin_token, settings.data_dir)
    if log_writer is not None:
        log_writer.form.redactor.register(token)
        for other in other_tokens(settings):
            log_writer.form.redactor.register(other.secret)
    return token, path


def other_tokens(settings: Settings) -> tuple[Token, ...]:
    """The admin tokens that a file names, each with its role."""
    named = settings.admin_tokens.items()
    return tuple(Token(name, Role[one.role.upper()], one.token) for name, one in named if one.token is not None)


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


async def open_keys(keys: KeyRing) -> None:
    """Virtual keys as the database has them. Raises NotYet."""
    try:
        await keys.load()
    except CacheFault as fault:
        raise NotYet(f"virtual keys cannot be read: {fault.message}") from fault


async def open_admin(app: App, sockets: Sequence[socket.socket], stack: contextlib.AsyncExitStack) -> int:
    """Port of the admin listener, accepting; `stack` closes it."""
    hosts = LOOPBACK_NAMES | {app.settings.server.admin.host}
    gate = Gate(app.admin_token, hosts, sessions=app.sessions, others=other_tokens(app.settings))
    built = admin.build(app.operator, app.telemetry, gate)
    runner = web.AppRunner(built, access_log=None, handle_signals=False, max_line_size=ADMIN_LINE_BYTES)
    await runner.setup()
    for one in sockets:
        await web.SockSite(runner, one).start()
    stack.push_async_callback(runner.cleanup)
    return int(runner.addresses[0][1])


def open_clients(app: App, sockets: list[socket.socket]) -> listener.Listener:
    """The client listener, accepting; `stop` ends it."""
    return listener.Listener(ClientServer(app.handler, app.settings.limits), sockets, ACCEPT_TICK_S)


# --- what runs beside requests --------------------------------------------------------------------------------------


def watch(app: App) -> None:
    """Register of health first: its parts have gauges too."""
    edges, semantic, health, telemetry = app.edges, app.semantic, app.health, app.telemetry
    troubles.watch_semantic(health, semantic)
    troubles.watch_store(health, edges.store)
    troubles.watch_money(health, app.keys, edges.booking)
    gauges.watch_upstreams(telemetry, edges.upstreams, app.settings.upstreams)
    gauges.watch_clients(telemetry, app.handler, app.settings.limits)
    gauges.watch_store(telemetry, edges.store)
    if app.batches is not None:
        gauges.watch_batches(telemetry, app.batches)
    gauges.watch_process(telemetry, app.pipeline.hot, app.memory, app.pulse, edges.booking)
    gauges.watch_health(telemetry, health)
    if app.settings.rules.semantic:
        gauges.watch_semantic(telemetry, semantic)


def start(app: App, behind: contextlib.AsyncExitStack, tell: Tell) -> list[asyncio.Task[None]]:
    """What runs until `stop` cancels it. `behind` closes what is loaded behind the listeners."""
    spawn, fault = app.work.background.spawn, app.telemetry.fault
    is_shared = app.store.database.dialect == "postgresql"  # SQLite has one process

    def each_second(now_s: float) -> None:
        app.handler.beat(now_s)
        app.health.look()

    endless = [
        spawn(app.pulse.run(app.memory, each_second, app.handler.asked), "pulse"),
        spawn(app.semantic.load(behind, tell), "loading"),
        spawn(housekeep(app.settings, app.pipeline, app.store, app.semantic, fault), "housekeeping"),
        spawn(app.keys.follow(fault), "keys"),
        spawn(app.semantic.renew(), "reindex"),
    ]
    if is_shared:
        endless.append(spawn(follow(app.pipeline, app.semantic, fault), "follow"))
    if app.batches is not None:
        endless.append(spawn(take_up(app.batches, app.semantic, shared=is_shared), "batches"))
    return endless


async def stop(app: App, clients: listener.Listener, endless: Sequence[asyncio.Task[None]]) -> None:
    """Take no more, let what is under way end in the time it has, and save the index."""
    drain_s, batches = app.settings.server.drain_timeout_s, app.batches
    app.stopping.set()
    for task in endless:
        task.cancel()
    drained_s = time.perf_counter() + drain_s
    if batches is not None:
        batches.deferred.stop()
        batches.engine.stop()
    await clients.stop(drain_s)
    if batches is not None:
        await batches.engine.drained(drain_s)
        await batches.deferred.drained(drain_s)
    await app.work.finishing.close(max(0.0, drained_s - time.perf_counter()))
    await app.work.requests.close(5.0)
    if not app.pipeline.meaning.is_loading:
        with contextlib.suppress(IndexRoomError):
            await app.semantic.save()
