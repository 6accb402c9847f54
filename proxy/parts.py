"""The parts of the program, each made over what it stands on; `app.assemble` puts them together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import orjson

from index.guard.prior import within
from index.heap import trim_heap
from index.levels import LEVELS
from index.measured import FALSE_ALARMS, MISSES
from proxy.admin.auth import LOOPBACK_NAMES
from proxy.batch.deferred import DeferredCalls
from proxy.batch.engine import Engine
from proxy.batch.http.api import BatchApi
from proxy.batch.lines import Lines
from proxy.client.handlers import ClientHandler
from proxy.core.answer import decode_answer
from proxy.core.chains import Chains
from proxy.core.contrast import Noise
from proxy.core.cors import Cors
from proxy.core.dialects.routes import Routes
from proxy.core.errors import CacheFault, ConfigError
from proxy.core.identity import HeaderRules
from proxy.core.model import Answer
from proxy.core.purse import Purse
from proxy.core.risk import LevelName, Tally
from proxy.core.units import DAY_S
from proxy.hot import HotRows
from proxy.judging.arbiter import OF_A_MODEL, Arbiter
from proxy.judging.audits import BUILT_IN, Auditor
from proxy.judging.judge import Judge
from proxy.lanes.forwarding import Forwarder
from proxy.lanes.predict import Predictor
from proxy.lanes.prefetch import Prefetcher
from proxy.lanes.prefixes import PrefixMarks
from proxy.lanes.route import Router
from proxy.meaning import Meaning
from proxy.money.books import Books
from proxy.money.keys import KeyRing, MeteredLedger
from proxy.money.prices import Booking, Prices
from proxy.ports import EntryStore, Learner
from proxy.request.embeddings import Embeddings
from proxy.request.leaving import Finisher
from proxy.request.pipeline import Pipeline
from proxy.request.reading import Reader, Steering
from proxy.settings.config import Settings
from proxy.store.store import Store
from proxy.tasks import Tasks
from proxy.upstreams.upstream import Upstreams
from proxy.watch.memory import Memory, group_limit_bytes
from proxy.watch.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Edges:
    """What the pipeline stands between, open."""

    telemetry: Telemetry
    prices: Prices
    booking: Booking
    store: Store
    upstreams: Upstreams


class Work:
    """The program's tasks, by what ends them."""

    def __init__(self, on_failure: Callable[[str], None]) -> None:
        self.requests = Tasks(on_failure)  # a few seconds after the last request
        self.finishing = Tasks(on_failure)  # calls that every client has left: the end of the drain
        self.background = Tasks(on_failure)  # cancelled as soon as it stops


@dataclass(frozen=True, slots=True)
class Ground:
    """What several parts stand on."""

    settings: Settings
    edges: Edges
    work: Work
    secret: bytes
    hot: HotRows
    meaning: Meaning
    routes: Routes
    reader: Reader
    chains: Chains
    ring: KeyRing
    books: Books
    model_aliases: dict[str, set[str]]


def make_ground(settings: Settings, edges: Edges, work: Work, secret: bytes) -> Ground:
    """Raises ConfigError."""
    routes, chains = Routes(orjson.loads), Chains()
    steering = Steering(settings.policies, settings.aliases, settings.ready, marks=settings.lanes.prefix.by_default)
    ring = KeyRing(edges.store.keys, edges.prices, keyed=keyed(settings), only=settings.server.keys_only)
    ledger = MeteredLedger(edges.store.ledger, ring)
    return Ground(
        settings=settings,
        edges=edges,
        work=work,
        secret=secret,
        hot=HotRows(settings.cache.hot_bytes),
        meaning=Meaning(),
        routes=routes,
        chains=chains,
        reader=Reader(
            routes, edges.upstreams, settings.rules, settings.limits, steering, header_rules(settings), chains
        ),
        ring=ring,
        books=Books(ledger, edges.prices, edges.telemetry, Purse(settings.rules.learning_share)),
        model_aliases=aliases_of(settings.forward.model_aliases),
    )


BUILT_IN_NOISE = Noise.measured(FALSE_ALARMS, MISSES)
"""Of `index.answers`, on answers it was not fitted on."""


def make_auditor(ground: Ground) -> Auditor:
    settings, edges, meaning = ground.settings, ground.edges, ground.meaning
    model = settings.cache.judge_model

    def note(level: LevelName, change: Tally) -> None:
        edges.store.comparisons.note(meaning.identity, level, change)

    return Auditor(
        judge=Judge(
            settings.rules,
            new_learner,
            LEVELS,
            comparer=model or BUILT_IN,
            noise=OF_A_MODEL if model else BUILT_IN_NOISE,
            prior=within,
            note=note,
        ),
        entries=edges.store.entries,
        comparisons=edges.store.comparisons,
        meaning=meaning,
        arbiter=Arbiter(model=model, upstream=edges.upstreams, books=ground.books) if model else None,
        hot=ground.hot,
        tasks=ground.work.requests,
        telemetry=edges.telemetry,
        purse=ground.books.purse,
    )


def make_forwarder(ground: Ground) -> Forwarder:
    settings, edges = ground.settings, ground.edges
    return Forwarder(
        upstream=edges.upstreams,
        lanes=settings.lanes,
        reader=ground.reader,
        predictor=Predictor(settings.lanes.predict, answers_of(edges.store.entries, ground.hot)),
        prefixes=PrefixMarks(settings.lanes.prefix, ground.secret, edges.prices),
        purges=edges.store.entries.purges,
    )


def make_pipeline(ground: Ground, auditor: Auditor, forwarder: Forwarder) -> Pipeline:
    settings, edges = ground.settings, ground.edges
    return Pipeline(
        rules=settings.rules,
        store=edges.store.entries,
        books=ground.books,
        telemetry=edges.telemetry,
        tasks=ground.work.requests,
        hot=ground.hot,
        meaning=ground.meaning,
        auditor=auditor,
        forwarder=forwarder,
        router=Router(
            settings.lanes.route,
            reader=ground.reader,
            votes=edges.store.votes,
            meaning=ground.meaning,
        ),
        prefetcher=Prefetcher(settings.lanes.prefetch),
        stale=settings.lanes.stale,
        usage_on_hit=settings.cache.usage_on_hit,
        pace=settings.stream.pace,
        finisher=Finisher(settings.stream.on_leave, ground.work.finishing, settings.rules.answer_limit_bytes),
        model_aliases=ground.model_aliases,
        chains=ground.chains,
        semantic_misses_per_min=settings.cache.semantic_misses_per_min,
    )


def make_embeddings(ground: Ground, pipeline: Pipeline) -> Embeddings:
    settings, edges = ground.settings, ground.edges
    return Embeddings(
        pipeline=pipeline,
        store=edges.store.entries,
        books=ground.books,
        upstream=edges.upstreams,
        telemetry=edges.telemetry,
        tasks=ground.work.requests,
        usage_on_hit=settings.cache.usage_on_hit,
    )


def make_handler(ground: Ground, pipeline: Pipeline, embeddings: Embeddings) -> ClientHandler:
    settings, edges = ground.settings, ground.edges
    return ClientHandler(
        pipeline=pipeline,
        embeddings=embeddings,
        upstream=edges.upstreams,
        reader=ground.reader,
        routes=ground.routes,
        books=ground.books,
        telemetry=edges.telemetry,
        limits=settings.limits,
        secret=ground.secret,
        key_ring=ground.ring,
        header_rules=header_rules(settings),
        cors=Cors(settings.server.cors_origins),
        anonymous=settings.server.anonymous,
        keyless=settings.server.listen.host in LOOPBACK_NAMES,
    )


def make_batches(ground: Ground, pipeline: Pipeline, embeddings: Embeddings, handler: ClientHandler) -> BatchApi:
    """Batches and deferred calls."""
    settings, edges, tasks = ground.settings, ground.edges, ground.work.requests
    ours, keep_s = settings.batch, settings.batch.keep_days * DAY_S
    upstreams = settings.upstreams.items()
    keyless = {upstream.dialect for _, upstream in upstreams if upstream.key is None}
    without = [name for name, one in upstreams if one.batch == "off" or one.dialect not in ("openai", "anthropic")]
    lines = Lines(
        pipeline, embeddings, ground.books, settings.rules, ground.model_aliases, ground.ring,
        settings.cache.usage_on_hit, lambda: ground.meaning.waiting,
    )  # fmt: skip
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
        files_bytes=ours.files_bytes,
    )


def make_memory(settings: Settings, pipeline: Pipeline, handler: ClientHandler) -> Memory:
    """The bound on memory, over the caches that can be dropped and the way in that can be shut."""
    boarding, meaning = pipeline.boarding, pipeline.meaning
    caches = [pipeline.hot.clear, pipeline.judge.shed, handler.shed, meaning.shed, boarding.shed, trim_heap]
    return Memory(settings.server.memory_bytes or group_limit_bytes(), caches, handler.shut, boarding.cut_one)


def new_learner() -> Learner:
    """The first one is made behind the listeners: it brings Numba."""
    from index.learner import Learner

    return Learner()


def keyed(settings: Settings) -> set[str]:
    """Upstreams that virtual keys open: with a key of their own, or of a dialect that asks for none."""
    return {name for name, one in settings.upstreams.items() if one.key is not None or one.dialect == "ollama"}


def header_rules(settings: Settings) -> HeaderRules:
    """What the operator says of clients' headers."""
    forward = settings.forward
    named = (forward.extra_headers, forward.delivery_headers, forward.drop_headers)
    return HeaderRules(*[frozenset([name.lower().encode("latin-1", "ignore") for name in names]) for names in named])


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
