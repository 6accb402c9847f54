"""The life of a request, top to bottom: recall → exact → alike → serve or forward → settle.

What comes out is a `Replay` (complete bytes) or a `Relay` (the upstream's bytes as they arrive); `handlers.py` turns
either into HTTP. `lookup` finds, `serving` replays; `boarding` joins a call in flight or makes one, `landing` is that
call's end; `entries` is what this process holds of what is stored; and `settle` is where every request ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from proxy import ports
from proxy.core import policy
from proxy.core.dialects.dialect import UsageMode
from proxy.core.model import Hit, Level, Miss, Rules, Tier
from proxy.core.pace import Pace
from proxy.core.plan import Lane
from proxy.core.query import Query
from proxy.hot import HotRows
from proxy.judging.audits import Auditor
from proxy.lanes.forwarding import Forwarder
from proxy.lanes.prefetch import Prefetcher
from proxy.lanes.route import Choice, Router
from proxy.meaning import Meaning
from proxy.money.books import Books
from proxy.records import Client, Fetch, Lookup
from proxy.relay import Relay, Replay
from proxy.request.boarding import Boarding
from proxy.request.collapse import Flight
from proxy.request.entries import Entries
from proxy.request.errands import Errands, reason_of
from proxy.request.explanation import explanation
from proxy.request.landing import Landing, may_route
from proxy.request.leaving import Finisher
from proxy.request.lookup import Finder, is_fresh
from proxy.request.serving import Server
from proxy.request.settle import Request, Settler
from proxy.settings.lanes import StaleLane
from proxy.tasks import Tasks
from proxy.watch.telemetry import Telemetry


class Pipeline:
    """Owns nothing it is given; `app.py` opens and closes the edges."""

    boarding: Boarding

    def __init__(
        self,
        *,
        rules: Rules,
        store: ports.EntryStore,
        books: Books,
        telemetry: Telemetry,
        tasks: Tasks,
        hot: HotRows,
        meaning: Meaning,
        auditor: Auditor,
        forwarder: Forwarder,
        router: Router,
        prefetcher: Prefetcher,
        stale: StaleLane,
        usage_on_hit: UsageMode = "original",
        pace: Pace = "instant",
        finisher: Finisher | None = None,
        model_aliases: Mapping[str, Collection[str]] | None = None,
        semantic_misses_per_min: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.rules = rules
        self.hot = hot
        self.meaning = meaning
        self.auditor = auditor
        self.judge = auditor.judge
        self.forwarder = forwarder
        self._telemetry = telemetry
        self._tasks = tasks
        self._clock = clock
        self.flights: dict[bytes, Flight[Fetch]] = {}
        self.entries = Entries(store, hot, meaning, self.flights, telemetry)
        self.errands = Errands(
            router=router,
            prefetcher=prefetcher,
            auditor=auditor,
            store=store,
            hot=hot,
            tasks=tasks,
            telemetry=telemetry,
            flights=self.flights,
            take_off=lambda fetch, shared: self.boarding.take_off(fetch, shared=shared),
            embedder=lambda: meaning.embedder,
            clock=clock,
        )
        self.finder = Finder(
            rules=rules,
            store=store,
            hot=hot,
            meaning=meaning,
            entries=self.entries,
            auditor=auditor,
            stale=stale,
            telemetry=telemetry,
            semantic_misses_per_min=semantic_misses_per_min,
        )
        self.server = Server(books, hot, usage_on_hit, pace)
        self.settler = Settler(books, hot, auditor, self.errands)
        self.landing = Landing(
            rules=rules,
            books=books,
            telemetry=telemetry,
            tasks=tasks,
            meaning=meaning,
            entries=self.entries,
            auditor=auditor,
            forwarder=forwarder,
            errands=self.errands,
            finisher=finisher,
            flights=self.flights,
            model_aliases=model_aliases or {},
            clock=clock,
        )
        self.boarding = Boarding(
            flights=self.flights,
            entries=self.entries,
            forwarder=forwarder,
            landing=self.landing,
            server=self.server,
            settler=self.settler,
            finisher=finisher,
        )

    @property
    def embedder(self) -> ports.Embedder | None:
        return self.meaning.embedder

    @property
    def index(self) -> ports.VectorIndex | None:
        return self.meaning.index

    @property
    def semantic_fault(self) -> str:
        """Why there is no embedder and index, or not yet; "" when there are."""
        return self.meaning.reason

    def recall(self, query: Query, client: Client) -> Replay | None:
        """Answer from memory without waiting for anything, or None."""
        controls = query.controls
        if not controls.read or controls.shadow or controls.explain or query.eligibility.level is Level.NONE:
            return None
        if Lane.PREFETCH in query.plan.lanes:
            return None  # every question counts
        row = self.hot.find(query.fingerprint)
        if row is not None:
            if not is_fresh(row.entry, query, client) or policy.unfit(row.answer, query) is not None:
                return None
            return self.server.serve(query, client, row, Hit(row.entry, Tier.EXACT, 1.0, 1.0), None)
        alias = self.hot.alias(query.fingerprint)
        if alias is None or query.eligibility.level is not Level.FULL or controls.exact_only:
            return None
        if Lane.SEMANTIC not in query.plan.lanes:
            return None
        if alias.epoch != self.judge.epoch or controls.max_error is not None:
            return None
        row = self.hot.get(alias.entry_id)
        if row is None or row.entry.draft.scope != query.scope:
            return None
        if not is_fresh(row.entry, query, client) or policy.unfit(row.answer, query) is not None:
            return None
        self.auditor.remember(client.request_id, query.fingerprint, row.entry.id)
        return self.server.serve(
            query, client, row, Hit(row.entry, Tier.SEMANTIC, alias.similarity, alias.probability), None
        )

    async def answer(self, query: Query, client: Client) -> Replay | Relay:
        """Serve or forward. Raises BadRequest (only-if-cached) and UpstreamError; cache faults never leave here."""
        request = Request(query, client)
        with self.settler.failing(request):
            reply = await self._reply(request)
        if not query.controls.explain or request.has_joined or request.lookup is None:
            return reply
        return reply.saying(explanation(query, request.lookup))

    async def _reply(self, request: Request) -> Replay | Relay:
        query, client = request.query, request.client
        if Lane.PREFETCH in query.plan.lanes and not query.controls.only_if_cached:
            self.errands.foresee(query, client)
        while (flight := self.boarding.joinable(query)) is not None or request.lookup is None:
            if flight is None:
                request.lookup = await self.finder.look_up(query, client, is_capped=True)
                if (served := self._serve(query, client, request.lookup)) is not None:
                    return served
            elif (reply := await self.boarding.join(flight, request)) is not None:
                return reply
            elif flight.context.answer is not None:  # it can be joined by others, but does not suit this one
                break
        choice = None if request.has_joined else await self._route(request)
        if choice is not None and (served := await self._serve_routed(choice, request)) is not None:
            return served
        return await self.boarding.forward(request, choice)

    async def find(self, query: Query, client: Client, *, serve: bool = True) -> Replay | Lookup:
        """An answer from the cache, or what was looked up in vain: for those who ask an upstream in their own way."""
        lookup = await self.finder.look_up(query, client)
        return (self._serve(query, client, lookup, refetches=False) if serve else None) or lookup

    def _serve(self, query: Query, client: Client, lookup: Lookup, *, refetches: bool = True) -> Replay | None:
        """What was found, if anything was, and is to be served."""
        if lookup.row is None or not isinstance(hit := lookup.verdict, Hit) or query.controls.shadow:
            return None
        self.settler.learn(query, client, lookup, refetches=refetches)
        return self.server.serve(query, client, lookup.row, hit, lookup.steps_ms)

    async def _route(self, request: Request) -> Choice | None:
        query, lookup = request.query, request.lookup
        if lookup is None or not may_route(query) or query.controls.only_if_cached:
            return None
        return await self.errands.router.choose(query, request.client, lookup)

    async def _serve_routed(self, choice: Choice, request: Request) -> Replay | None:
        """What the chosen model answered to this very question before, if that is fresh."""
        query, client, found = request.query, request.client, Lookup(Miss("routed"))
        if not query.controls.read:
            return None
        try:
            if not await self.finder.find_exact(choice.query, client, found) or found.row is None:
                return None
        except ports.CACHE_FAULTS as fault:
            self._telemetry.fault(reason_of(fault))
            return None
        if not isinstance(found.verdict, Hit) or found.verdict.tier is not Tier.EXACT:
            return None
        steps_ms = None if request.lookup is None else request.lookup.steps_ms
        return self.server.serve(query, client, found.row, found.verdict, steps_ms)
