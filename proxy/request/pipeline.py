"""The life of a request, top to bottom: recall → exact → alike → serve or forward → settle.

What comes out is a `Replay` (complete bytes) or a `Relay` (the upstream's bytes as they arrive); `handlers.py` turns
either into HTTP. `lookup` finds, `serving` replays; `boarding` joins a call in flight or makes one, `landing` is that
call's end; `entries` is what this process holds of what is stored; and `settle` is where every request ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy import ports
from proxy.core import policy
from proxy.core.model import Hit, Level, Miss, Tier
from proxy.core.plan import Lane
from proxy.core.query import Query
from proxy.lanes.route import Choice
from proxy.records import Client, Lookup
from proxy.relay import Relay, Replay
from proxy.request.boarding import Boarding
from proxy.request.entries import Entries
from proxy.request.errands import Errands, reason_of
from proxy.request.explanation import explanation, of_lookup
from proxy.request.landing import Landing, may_route
from proxy.request.lookup import Finder, is_fresh
from proxy.request.parts import Parts
from proxy.request.serving import Server
from proxy.request.settle import Request, Settler


@dataclass(eq=False, repr=False, kw_only=True)
class Pipeline(Parts):
    """The parts, and the stages made of them."""

    def __post_init__(self) -> None:
        self.judge = self.auditor.judge
        self.entries = Entries(self)
        self.finder = Finder(self, self.entries)
        self.errands = Errands(self, lambda fetch, shared: self.boarding.take_off(fetch, shared=shared))
        self.server = Server(self)
        self.settler = Settler(self, self.errands)
        self.landing = Landing(self, self.entries, self.errands)
        self.boarding: Boarding = Boarding(self, self.entries, self.landing, self.server, self.settler)

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
        if alias.epoch != self.judge.epoch or alias.used >= alias.uses or controls.max_error is not None:
            return None
        row = self.hot.get(alias.entry_id)
        if row is None or row.entry.draft.scope != query.scope:
            return None
        if not is_fresh(row.entry, query, client) or policy.unfit(row.answer, query) is not None:
            return None
        alias.used += 1
        hit = Hit(row.entry, Tier.SEMANTIC, alias.similarity, alias.probability)
        self.settler.learn_again(query, client, hit)
        return self.server.serve(query, client, row, hit, None)

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
        while (flight := self.boarding.joinable(query, client)) is not None or request.lookup is None:
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
        looked = "" if lookup.opinion is None else of_lookup(query, lookup)
        return self.server.serve(query, client, lookup.row, hit, lookup.steps_ms, looked)

    async def _route(self, request: Request) -> Choice | None:
        query, lookup = request.query, request.lookup
        if lookup is None or not may_route(query) or query.controls.only_if_cached:
            return None
        return await self.errands.router.choose(query, request.client, lookup)

    async def _serve_routed(self, choice: Choice, request: Request) -> Replay | None:
        """What the chosen model answered to this very question before, if that is fresh."""
        query, client, found = request.query, request.client, Lookup(Miss("routed"))
        if not query.controls.read or query.controls.shadow:
            return None
        try:
            if not await self.finder.find_exact(choice.query, client, found) or found.row is None:
                return None
        except ports.CACHE_FAULTS as fault:
            self.telemetry.fault(reason_of(fault))
            return None
        if not isinstance(found.verdict, Hit) or found.verdict.tier is not Tier.EXACT:
            return None
        steps_ms = None if request.lookup is None else request.lookup.steps_ms
        return self.server.serve(query, client, found.row, found.verdict, steps_ms)
