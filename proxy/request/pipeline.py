"""The life of a request, top to bottom: recall → exact → embed → search → judge → serve or forward → store → record.

Every `await` is one port, every decision one call into core. What comes out is a `Replay` (complete bytes) or a `Relay`
(the upstream's bytes as they arrive); `handlers.py` turns either into HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

import numpy as np
import orjson

from proxy import ports
from proxy.core import freshness, policy
from proxy.core.allowance import Allowance
from proxy.core.answer import decode_answer
from proxy.core.dialects.dialect import JSON, Recording, Template, UsageMode
from proxy.core.directives import stale_headers, verdict_headers
from proxy.core.errors import BadRequest
from proxy.core.model import Answer, Bypass, Candidate, Entry, Hit, Level, Miss, NearMiss, Rules, Tier, Verdict
from proxy.core.pace import Pace, Schedule, ends_of, has_pace, progress, runs_of, schedule, texts_of
from proxy.core.plan import Lane
from proxy.core.purges import Began, asked_ms, marks_of, reaches
from proxy.core.query import Query
from proxy.core.units import usd
from proxy.hot import Alias, Form, HotRow, HotRows
from proxy.judging.audits import Auditor
from proxy.judging.judge import Judged, Opinion, Place, objection, verdict_of
from proxy.lanes.forwarding import ACTING, STALE_IF_ERROR, Forwarder
from proxy.lanes.prefetch import Prefetcher
from proxy.lanes.route import MECHANISM as ROUTED
from proxy.lanes.route import Choice, Router
from proxy.meaning import Meaning
from proxy.money.books import Books, draft_of
from proxy.records import Client, Fetch, Lookup, Stale
from proxy.relay import Head, Paced, Relay, Replay
from proxy.request.collapse import Flight, Seat
from proxy.request.errands import Errands, reason_of
from proxy.request.explanation import explanation
from proxy.request.leaving import Finisher
from proxy.settings.lanes import StaleLane
from proxy.tasks import Tasks
from proxy.watch.telemetry import Telemetry

log = logging.getLogger(__name__)

CANDIDATES = 16
ROUNDING = 1e-3  # between a similarity of the index, in fixed point, and one of the row


class Pipeline:
    """Owns nothing it is given; `app.py` opens and closes the edges."""

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
        self._misses = Allowance(semantic_misses_per_min)
        self.hot = hot
        self.meaning = meaning
        self.auditor = auditor
        self.judge = auditor.judge
        self.flights: dict[bytes, Flight[Fetch]] = {}
        self._store = store
        self._books = books
        self.forwarder = forwarder
        self._stale = stale
        self._telemetry = telemetry
        self._tasks = tasks
        self._usage_on_hit = usage_on_hit
        self._pace = pace
        self._finisher = finisher
        self._model_aliases = model_aliases or {}
        self._clock = clock
        self.errands = Errands(
            router=router,
            prefetcher=prefetcher,
            auditor=auditor,
            store=store,
            hot=hot,
            tasks=tasks,
            telemetry=telemetry,
            flights=self.flights,
            take_off=self._take_off,
            embedder=lambda: meaning.embedder,
            clock=clock,
        )
        self.purges = 0  # rows read or written before the last of them may be gone
        self._followed = store.purges.newest
        self.on_lacking: Callable[[], None] = _nobody_is_told  # an entry was stored without the vector of its question

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

    # -- the story ----------------------------------------------------------------------------------------------

    async def answer(self, query: Query, client: Client) -> Replay | Relay:
        """Serve or forward. Raises BadRequest (only-if-cached) and UpstreamError; cache faults never leave here."""
        if Lane.PREFETCH in query.plan.lanes and not query.controls.only_if_cached:
            self.errands.foresee(query, client)
        if (flight := self._joinable(query)) is not None:
            return await self._join(flight, query, client)
        lookup = await self._look_up(query, client, is_capped=True)
        match lookup.verdict:
            case Hit() as hit if not query.controls.shadow:
                assert lookup.row is not None
                if hit.tier is Tier.SEMANTIC:
                    self._count_alike(query, client, lookup)
                elif (
                    hit.tier is Tier.STALE and Lane.REVALIDATE in query.plan.lanes and not query.controls.only_if_cached
                ):
                    self.errands.revalidate(query, client, hit.entry)
                replay = self._serve(query, client, lookup.row, hit, lookup.steps_ms)
                return replay if not query.controls.explain else replay.saying(explanation(query, lookup))
            case Hit() | NearMiss() | Miss() | Bypass():
                pass
            case _:
                assert_never(lookup.verdict)
        if (flight := self._joinable(query)) is not None:  # it may have started while this one was looking
            return await self._join(flight, query, client)
        routes = _may_route(query) and not query.controls.only_if_cached
        choice = await self.errands.router.choose(query, client, lookup) if routes else None
        reply = None if choice is None else await self._serve_routed(choice, query, client, lookup)
        if reply is None:
            reply = await self.forward(query, client, lookup, choice)
        return reply if not query.controls.explain else reply.saying(explanation(query, lookup))

    async def find(self, query: Query, client: Client, *, serve: bool = True) -> Replay | Lookup:
        """An answer from the cache, or what was looked up in vain: for those who ask an upstream in their own way."""
        lookup = await self._look_up(query, client)
        hit = lookup.verdict
        if not isinstance(hit, Hit) or not serve or query.controls.shadow:
            return lookup
        assert lookup.row is not None
        if hit.tier is Tier.SEMANTIC:
            self._count_alike(query, client, lookup)
        return self._serve(query, client, lookup.row, hit, lookup.steps_ms)

    def compares(self, query: Query) -> bool:
        """Whether a question is looked up by its meaning as well."""
        if query.eligibility.level is not Level.FULL or query.controls.exact_only:
            return False
        return Lane.SEMANTIC in query.plan.lanes

    async def knows(self, query: Query) -> bool:
        """Whether this very question has an entry, fresh or not, or was answered by one. Raises CacheFault."""
        if self.hot.find(query.fingerprint) is not None or self.hot.alias(query.fingerprint) is not None:
            return True
        return await self._store.find(query.fingerprint) is not None

    def recall(self, query: Query, client: Client) -> Replay | None:
        """Answer from memory without waiting for anything, or None."""
        controls = query.controls
        if not controls.read or controls.shadow or controls.explain or query.eligibility.level is Level.NONE:
            return None
        if Lane.PREFETCH in query.plan.lanes:
            return None  # every question counts
        row = self.hot.find(query.fingerprint)
        if row is not None:
            if not _is_fresh(row.entry, query, client) or policy.unfit(row.answer, query) is not None:
                return None
            return self._serve(query, client, row, Hit(row.entry, Tier.EXACT, 1.0, 1.0), None)
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
        if not _is_fresh(row.entry, query, client) or policy.unfit(row.answer, query) is not None:
            return None
        self.auditor.remember(client.request_id, query.fingerprint, row.entry.id)
        return self._serve(query, client, row, Hit(row.entry, Tier.SEMANTIC, alias.similarity, alias.probability), None)

    async def _look_up(self, query: Query, client: Client, *, is_capped: bool = False) -> Lookup:
        """`is_capped`: semantic misses count against the key's allowance; a batch's lines do not."""
        eligibility, controls = query.eligibility, query.controls
        if eligibility.level is Level.NONE:
            return Lookup(Bypass(eligibility.reason or "bypass"))
        lookup = Lookup(Miss(eligibility.reason or "nothing_alike"))
        try:
            if controls.read and await self._find_exact(query, client, lookup):
                return lookup
            if self.compares(query):
                unfit = lookup.verdict.reason
                if not is_capped or self._may_compare(query, client, lookup):
                    await self._find_alike(query, client, lookup)
                if is_capped and lookup.opinion is not None and not isinstance(lookup.verdict, Hit):
                    self._misses.count(_prober(query), client.started_s)
                if isinstance(lookup.verdict, Miss) and unfit in policy.UNFIT:
                    lookup.verdict = Miss(unfit)
        except ports.CACHE_FAULTS as fault:
            reason = reason_of(fault)
            if reason == "too_long":  # a property of the text, not a fault
                lookup.verdict = Miss(reason)
            else:
                self._telemetry.fault(reason)
                lookup.verdict = Bypass(reason)
        if not controls.read and not isinstance(lookup.verdict, Bypass):
            lookup.verdict = Bypass("refresh" if controls.refresh else "no_cache")
        return lookup

    def _may_compare(self, query: Query, client: Client, lookup: Lookup) -> bool:
        """Whether the key has semantic misses left; whoever sends near copies in bulk maps what is stored."""
        if self._misses.has_room(_prober(query), client.started_s):
            return True
        lookup.verdict = Miss("too_many_misses")
        return False

    async def _find_exact(self, query: Query, client: Client, lookup: Lookup) -> bool:
        started = time.perf_counter()
        purges, began = self.purges, self.began(client)
        entry = await self._store.find(query.fingerprint)
        lookup.steps_ms["exact"] = (time.perf_counter() - started) * 1e3
        if entry is None or entry.draft.scope != query.scope:
            return False
        if not _is_fresh(entry, query, client):
            lookup.verdict = Miss("expired")
            return self._may_serve_stale(entry, query, client, lookup, purges, began)
        row = self.warm(entry, purges)
        if (reason := policy.unfit(row.answer, query)) is not None:
            lookup.verdict = Miss(reason)
            return False
        lookup.row = row
        lookup.verdict = Hit(entry, Tier.EXACT, 1.0, 1.0)
        return True

    def _may_serve_stale(
        self, entry: Entry, query: Query, client: Client, lookup: Lookup, purges: int, began: Began
    ) -> bool:
        """Whether an expired entry is served now; if only in place of an upstream that fails, it is kept for that."""
        lanes, controls = query.plan.lanes, query.controls
        allowed_s = [controls.max_stale_s] if controls.max_stale_s is not None else []
        if Lane.REVALIDATE in lanes:
            allowed_s.append(self._stale.while_revalidate_s)
        if not (allowed_s or Lane.STALE_IF_ERROR in lanes):
            return False
        row = self.warm(entry, purges)
        if policy.unfit(row.answer, query) is not None:
            return False
        draft = entry.draft
        times = (draft.created_ms, draft.expires_ms, client.ts_ms)
        if freshness.may_serve_stale(*times, max(allowed_s, default=None), controls.max_age_s):
            lookup.row = row
            lookup.verdict = Hit(entry, Tier.STALE, 1.0, 1.0, "stale")
            return True
        if Lane.STALE_IF_ERROR in lanes and freshness.may_serve_stale(*times, self._stale.if_error_s):
            lookup.stale = Stale(row, began)
        return False

    async def _find_alike(self, query: Query, client: Client, lookup: Lookup) -> None:
        """Embed, search, judge, and pass the gate: the index proposes, the row decides."""
        if self.embedder is None or self.index is None:
            lookup.verdict = Bypass(self.semantic_fault)
            return
        started = time.perf_counter()
        lookup.signature = signature = self.embedder.signature(query.prompt)
        lookup.vector = vector = await self.embedder.embed(query.prompt, query.tenant)
        embedded = time.perf_counter()
        lookup.steps_ms["embed"] = (embedded - started) * 1e3
        if not query.controls.read:
            return
        found = await self.index.search(query.scope, vector, signature, client.ts_ms, CANDIDATES)
        searched = time.perf_counter()
        lookup.steps_ms["search"] = (searched - embedded) * 1e3
        place = Place(query.scope, query.controls.namespace, query.tenant, query.fingerprint)
        max_error = policy.error_bound(self.rules, query.controls)
        if found:
            await self.auditor.evidence.read(place)
        opinion = self.judge.consider(place, signature, [Candidate(*proposed) for proposed in found], max_error)
        lookup.opinion = opinion
        self.judge.see(place, signature)
        while (chosen := opinion.chosen) is not None:
            row = await self._pass_gate(chosen, opinion, query, client, lookup)
            if isinstance(row, HotRow) and (held := self.auditor.hold(opinion, chosen)):
                opinion.held = held
            elif isinstance(row, HotRow):
                lookup.row = row
                lookup.verdict = Hit(row.entry, Tier.SEMANTIC, chosen.candidate.similarity, chosen.probability)
                break
            else:
                opinion.refused[chosen.candidate.entry_id] = row
        else:
            lookup.verdict = verdict_of(opinion, self.rules.near_floor)
            if isinstance(lookup.verdict, NearMiss):
                self._telemetry.veto(lookup.verdict.reason)
        lookup.steps_ms["judge"] = (time.perf_counter() - searched) * 1e3 - lookup.steps_ms.get("guard", 0.0)

    async def _pass_gate(
        self, chosen: Judged, opinion: Opinion, query: Query, client: Client, lookup: Lookup
    ) -> HotRow | str:
        """The row, if SQL still has it, its own scope, times, embedder, vector and token classes agree, nobody said
        that it is wrong for this question, and the pair guard lets it pass; else why not."""
        assert self.embedder is not None
        assert self.index is not None
        assert lookup.vector is not None
        entry_id = chosen.candidate.entry_id
        row, purges, epoch = self.hot.get(entry_id), self.purges, self.judge.epoch
        if row is not None and row.entry.draft.embedder != self.embedder.identity:
            row = None  # it was given its vector since
        entry = row.entry if row is not None else await self._store.get(entry_id)
        if entry is None:
            self.index.remove([entry_id])
            return "gone"
        draft = entry.draft
        if (
            draft.scope != query.scope
            or draft.embedder != self.embedder.identity
            or draft.embedding is None
            or draft.signature is None
        ):
            return "changed"
        if not _is_fresh(entry, query, client):
            return "expired"
        similarity, vetoes = self.index.compare(lookup.vector, opinion.signature, draft.embedding, draft.signature)
        if not abs(similarity - chosen.candidate.similarity) <= ROUNDING or vetoes != chosen.candidate.vetoes:
            return "changed"
        row = row if row is not None else self.warm(entry, purges)
        if (reason := policy.unfit(row.answer, query)) is not None:
            return reason
        if await self.auditor.is_refused(query.fingerprint, draft.fingerprint):
            return "refused_before"
        asked = time.perf_counter()
        against = await self.ask_guard(chosen, opinion, query.prompt, draft.prompt)
        lookup.steps_ms["guard"] = lookup.steps_ms.get("guard", 0.0) + (time.perf_counter() - asked) * 1e3
        if against:
            return against
        if (purges, epoch) != (self.purges, self.judge.epoch):  # while the guard was asked; its answer is remembered
            return await self._pass_gate(chosen, opinion, query, client, lookup)
        return row

    async def ask_guard(self, judged: Judged, opinion: Opinion, asked: str, kept: str) -> str:
        """What the pair guard has against serving `kept`'s answer for `asked`, or ""."""
        assert self.embedder is not None
        against = objection(opinion, judged, self.rules, can_verify=self.embedder.can_verify)
        if against is None:
            (logit,) = await self.embedder.verify(asked, [kept], opinion.place.tenant)
            opinion.logits[judged.candidate.entry_id] = logit
            against = objection(opinion, judged, self.rules, can_verify=True)
        return against or ""

    def _count_alike(self, query: Query, client: Client, lookup: Lookup) -> None:
        """A semantic hit is about to be served: count it, remember the wording, and perhaps ask again upstream."""
        opinion, row = lookup.opinion, lookup.row
        assert opinion is not None
        assert row is not None
        chosen = opinion.chosen
        assert chosen is not None
        alias = Alias(row.entry.id, chosen.candidate.similarity, chosen.probability, self.judge.epoch)
        self.hot.add_alias(query.fingerprint, alias)
        again = self.auditor.served(opinion, chosen, client.request_id)
        if again is not None and not query.controls.only_if_cached:
            self.errands.audit(query, client, lookup, again)

    def warm(self, entry: Entry, purges: int) -> HotRow:
        """A row to serve, kept in memory unless a purge came while it was read."""
        answer = decode_answer(entry.draft.answer, orjson.loads)
        return self.hot.put(entry, answer) if purges == self.purges else HotRow(entry, answer)

    # -- serve ----------------------------------------------------------------------------------------------------

    def _serve(self, query: Query, client: Client, row: HotRow, hit: Hit, steps_ms: dict[str, float] | None) -> Replay:
        """Replay an entry. What two hits of one entry share is made once: template, headers of a second, ledger row."""
        kind = (query.form, hit.tier, hit.similarity)
        form = row.forms.get(kind)
        if form is None:
            form = row.forms[kind] = self._form(query, client, row, hit)
            self.hot.grew(row, form.template.nbytes)
        second = client.ts_ms // 1000
        head = form.head
        if head is None or form.second != second:
            head = form.head = self._hit_head(query, client, row, hit, form.baseline_nusd)
            form.second = second
        body = form.template.fill(client.request_id, second)
        age_s = freshness.age_s(row.entry.draft.created_ms, client.ts_ms)
        replay = Replay(head, client.request_id, body)
        pace = query.controls.pace or self._pace
        if pace != "instant" and query.stream and len(due := _schedule(query, row.answer, body, pace)) > 1:

            def settle(first_byte_s: float | None, outcome: str) -> None:
                self._books.paced(
                    form.recurring, client, steps_ms, query.scope, age_s, form.baseline_nusd, first_byte_s, outcome
                )

            return replay._replace(paced=Paced(due, query.dialect.heartbeat, settle))
        self._books.hit(form.recurring, client, steps_ms, query.scope, age_s, form.baseline_nusd)
        return replay

    def _form(self, query: Query, client: Client, row: HotRow, hit: Hit) -> Form:
        recurring = self._books.recurring(query, row.answer.model, hit)
        baseline_nusd = self._books.price(query, row.entry.draft.usage, client.ts_ms)
        return Form(self._template(query, row.answer), recurring, baseline_nusd)

    def _hit_head(self, query: Query, client: Client, row: HotRow, hit: Hit, baseline_nusd: int) -> Head:
        draft = row.entry.draft
        headers = verdict_headers(
            hit,
            upstream=query.upstream if draft.model == query.model else draft.upstream,
            age_s=freshness.age_s(draft.created_ms, client.ts_ms),
            ttl_s=freshness.remaining_s(draft.created_ms, draft.expires_ms, client.ts_ms),
            saved_nusd=baseline_nusd,
            cost_nusd=0,
            plan=query.plan.text,
        )
        headers.append(("Content-Type", _content_type(query)))
        return Head(headers, query.dialect.id_header)

    def _template(self, query: Query, answer: Answer) -> Template:
        return query.dialect.render(
            answer, stream=query.stream, wants_usage=query.wants_usage, usage_mode=self._usage_on_hit
        )

    # -- forward ----------------------------------------------------------------------------------------------------

    def _joinable(self, query: Query) -> Flight[Fetch] | None:
        if not _may_share(query):
            return None
        flight = self.flights.get(query.fingerprint)
        if flight is None or not flight.joinable:
            return None
        first = flight.context.asked
        if first.plan.lanes & ACTING != query.plan.lanes & ACTING:
            return None  # what may answer the one may not answer the other
        asked, own = first.output_limit, query.output_limit
        return flight if own is None or (asked is not None and asked <= own) else None

    async def _serve_routed(
        self, choice: Choice, query: Query, client: Client, lookup: Lookup
    ) -> Replay | Relay | None:
        """What the chosen model answered to this very question before, if that is fresh."""
        if not query.controls.read:
            return None
        found = Lookup(Miss("routed"))
        try:
            if not await self._find_exact(choice.query, client, found) or found.row is None:
                return None
        except ports.CACHE_FAULTS as fault:
            self._telemetry.fault(reason_of(fault))
            return None
        if not isinstance(found.verdict, Hit) or found.verdict.tier is not Tier.EXACT:
            return None
        return self._serve(query, client, found.row, found.verdict, lookup.steps_ms)

    async def forward(
        self, query: Query, client: Client, lookup: Lookup, choice: Choice | None = None
    ) -> Replay | Relay:
        if query.controls.only_if_cached:
            unsent = Fetch(query, client, lookup, time.perf_counter(), self.began(client))
            _ = self._books.forwarded(query, client, lookup.verdict, unsent, "error", 504, None, collapsed=False)
            raise BadRequest(
                "Not in the cache, and the request asked for cached answers only.", status=504, code="not_cached"
            )
        shared = _may_share(query)
        current = self.flights.get(query.fingerprint)
        shared = shared and (current is None or not current.joinable)  # it goes on for those it suits
        fetch = Fetch(query, client, lookup, time.perf_counter(), self.began(client))
        if choice is not None:
            fetch.query, fetch.asked_as, fetch.first = choice.query, query, choice.sending
            fetch.routed_to, fetch.neighbour = choice.candidate, choice.neighbour
        flight = self._take_off(fetch, shared=shared)
        if shared:
            self.flights[query.fingerprint] = flight
        return await self._board(flight, flight.join(), query, client, lookup.verdict, collapsed=False)

    def _take_off(self, fetch: Fetch, *, shared: bool) -> Flight[Fetch]:
        """A forward that opens with its first seat."""
        on_left = None if self._finisher is None else self._finisher.left
        return Flight(fetch, lambda: self.forwarder.open(fetch), self._landed, shared=shared, on_left=on_left)

    async def _join(self, flight: Flight[Fetch], query: Query, client: Client) -> Replay | Relay:
        """Share a forward in flight: its bytes when both stream alike, its answer once it is whole when not."""
        seat = flight.join()
        if _same_bytes(flight.context.asked, query):
            return await self._board(flight, seat, query, client, Miss("collapsed"), collapsed=True)
        try:
            while await seat.next():  # read and let go: the answer is with the flight
                pass
        except BaseException as cause:
            outcome = "error" if isinstance(cause, Exception) else "cancelled"
            status = getattr(cause, "status", 499)
            self._books.forwarded(
                query, client, Miss("collapsed"), flight.context, outcome, status, None, collapsed=True
            )
            raise
        finally:
            seat.leave()
        answer = flight.context.answer
        if answer is None:
            if (other := self._joinable(query)) is not None:  # one of those who waited asks again, for all of them
                return await self._join(other, query, client)
            return await self.forward(query, client, Lookup(Miss(flight.context.unstored)))
        if (reason := policy.unfit(answer, query)) is not None:
            return await self.forward(query, client, Lookup(Miss(reason)))
        return self._serve_shared(flight.context, answer, query, client)

    def _serve_shared(self, fetch: Fetch, answer: Answer, query: Query, client: Client) -> Replay:
        headers = verdict_headers(
            Miss("collapsed"), upstream=query.upstream, fwd_status=200, collapsed=True, plan=query.plan.text
        )
        headers.append(("Content-Type", _content_type(query)))
        body = self._template(query, answer).fill(client.request_id, client.ts_ms // 1000)
        self._books.forwarded(query, client, Miss("collapsed"), fetch, "ok", 200, None, collapsed=True)
        return Replay(Head(headers, query.dialect.id_header), client.request_id, body)

    async def _board(
        self,
        flight: Flight[Fetch],
        seat: Seat[Fetch],
        query: Query,
        client: Client,
        verdict: Verdict,
        *,
        collapsed: bool,
    ) -> Relay:
        """Wait for the response head; from then on the caller owns the seat through the Relay."""
        try:
            response = await flight.head()
        except BaseException as cause:
            seat.leave()
            outcome = "error" if isinstance(cause, Exception) else "cancelled"
            status = getattr(cause, "status", 499)
            self._after(
                flight,
                lambda: self._books.forwarded(
                    query, client, verdict, flight.context, outcome, status, None, collapsed=collapsed
                ),
            )
            raise
        dialect = query.dialect
        is_stream = query.stream and response.status == 200 and response.content_type == dialect.stream_type
        headers = self._forward_head(flight.context, query, client, verdict, response.status, collapsed=collapsed)
        headers += response.headers

        def settle(relay: Relay, outcome: str) -> None:
            ttft_ms = None if relay.first_byte_s is None else (relay.first_byte_s - client.started_s) * 1e3

            def book() -> None:
                cost_nusd = self._books.forwarded(
                    query, client, verdict, flight.context, outcome, response.status, ttft_ms, collapsed=collapsed
                )
                headers.append(("x-cost-usd", usd(cost_nusd)))  # in time for an answer that is not a stream

            self._after(flight, book)

        return Relay(
            seat,
            dialect,
            response.status,
            headers,
            response.content_length,
            dialect.filter(wants_usage=query.wants_usage, n=query.n) if is_stream else None,
            settle,
        )

    def _forward_head(
        self, fetch: Fetch, query: Query, client: Client, verdict: Verdict, status: int, *, collapsed: bool
    ) -> list[tuple[str, str]]:
        stale, attempt = fetch.lookup.stale, fetch.attempt
        if fetch.stand_in == STALE_IF_ERROR and stale is not None:
            draft = stale.row.entry.draft
            return stale_headers(
                stale.row.entry.id,
                upstream=query.upstream,
                request_id=client.request_id,
                age_s=freshness.age_s(draft.created_ms, client.ts_ms),
                ttl_s=freshness.remaining_s(draft.created_ms, draft.expires_ms, client.ts_ms),
                plan=query.plan.text,
            )
        sending = fetch.sending if attempt is None else attempt.sending
        return verdict_headers(
            verdict,
            request_id=client.request_id,
            upstream=sending.upstream,
            fwd_status=fetch.stand_in_for or status,
            collapsed=collapsed,
            shadow=query.controls.shadow,
            refresh=query.controls.refresh,
            edge=sending.is_other and sending.is_foreign,
            plan=query.plan.text,
        )

    def _after(self, flight: Flight[Fetch], settle: Callable[[], object]) -> None:
        """Settle once the call's own end is known: others may still be reading what this client started."""
        if flight.ended:
            settle()
        else:
            flight.context.deferred.append(settle)

    # -- store and record ------------------------------------------------------------------------------------------

    def _landed(self, flight: Flight[Fetch]) -> None:
        """The upstream call ended, one way or the other: read what it said, book it, store it if it may be stored."""
        fetch = flight.context
        query = fetch.asked
        response = flight.response
        status = 0 if response is None else response.status
        body = b"" if flight.trimmed else flight.body
        is_stream = response is not None and response.content_type == query.dialect.stream_type
        recording: Recording | None = None
        if status == 200 and query.eligibility.level is Level.NONE:
            fetch.usage = fetch.usage or query.dialect.find_usage(body)
        elif status == 200:
            recording = query.dialect.record(body, is_stream=is_stream, n=query.n, keeps_id=query.keeps_id)
            fetch.usage = fetch.usage or recording.usage
        fetch.unstored = self._why_unstored(flight, recording)
        if recording is not None and not fetch.unstored:
            answer = recording.answer
            if answer is not None and answer.usage is None and query.output_limit is not None:
                answer = replace(answer, limit=query.output_limit)
            if answer is not None and is_stream and has_pace(flight.arrived_s):
                texts = texts_of(answer.message.get("content"), answer.pieces)
                answer = replace(answer, runs=runs_of(flight.pieces, flight.arrived_s, texts))
            fetch.answer = answer
        self._count_calls(flight, status, is_stream=is_stream)
        if self._finisher is not None:
            self._finisher.landed(flight)
        if fetch.purpose != "answer":
            self._books.unasked(fetch)
        for settle in fetch.deferred:
            settle()
        fetch.deferred.clear()
        if fetch.answer is not None:
            _ = self._tasks.spawn(self._keep(flight, fetch.answer), "store")
        else:
            self._telemetry.unstored(fetch.unstored or "no_answer")
            self._forget_flight(flight)
            if fetch.routed_to:
                self.errands.unstored(fetch)

    def _count_calls(self, flight: Flight[Fetch], status: int, *, is_stream: bool) -> None:
        """The calls that were made, now that their end is known."""
        fetch = flight.context
        if fetch.attempt is None and not fetch.stand_in and fetch.attempts:  # it ended while several were under way
            fetch.attempt = fetch.attempts[0]
        if fetch.stand_in != STALE_IF_ERROR:
            won = flight.is_delivered
            fetch.call = self._books.call_of(fetch, status, flight.size_bytes, is_stream=is_stream, won=won)
            self.forwarder.learn(fetch)
        if len(fetch.attempts) > 1 or fetch.attempt is None:
            fetch.extra = self._books.lost_calls(fetch, fetch.usage)

    def _why_unstored(self, flight: Flight[Fetch], recording: Recording | None) -> str:
        response = flight.response
        whole = flight.complete and flight.error is None and not flight.trimmed
        fetch = flight.context
        if response is None or not whole:
            return "truncated"
        sending = fetch.sending if fetch.attempt is None else fetch.attempt.sending
        if fetch.stand_in or (sending.is_other and ROUTED not in sending.shaped_by):
            return "other_model"  # whose answer is not the one that is asked for under this scope
        return (
            policy.storable(
                None if recording is None else recording.answer or recording.refusal_reason,
                fetch.query,
                self.rules,
                status=response.status,
                size_bytes=flight.size_bytes,
                header=response.header,
                aliases=self._model_aliases,
            )
            or ""
        )

    async def _keep(self, flight: Flight[Fetch], answer: Answer) -> None:
        """The flight stays joinable until its entry is committed."""
        try:
            await self.keep(flight.context, answer)
        finally:
            self._forget_flight(flight)

    async def keep(self, fetch: Fetch, answer: Answer) -> None:
        """Commit the entry, then let memory and index know it."""
        query, lookup = fetch.query, fetch.lookup
        identity = "" if self.embedder is None else self.embedder.identity
        draft = draft_of(fetch, answer, identity, self.rules, int(self._clock() * 1000))
        try:
            purges = self.purges
            stored = await self._store.put(draft, fetch.began)
            if stored is None:
                self._telemetry.unstored("purged")
                return
            entry, replaced = stored
            while purges != self.purges:  # a purge came meanwhile: it may have taken this one along
                purges = self.purges
                if await self._store.get(entry.id) is None:
                    return
            if replaced:
                self.forget(replaced)
            self.hot.put(entry, answer)
            self.propose(entry)
            if draft.prompt and draft.embedding is None:
                self.on_lacking()
            opinion = None if fetch.routed_to else lookup.opinion  # of answers of the model asked for
            self.auditor.stored(opinion, fetch.again, query, fetch.client.headers, entry, answer)
            if fetch.purpose == "answer" and _may_route(fetch.asked):
                self.errands.stored(fetch, entry, answer)
        except ports.CACHE_FAULTS as fault:
            self._telemetry.fault(reason_of(fault))

    def _forget_flight(self, flight: Flight[Fetch]) -> None:
        fingerprint = flight.context.asked.fingerprint
        if self.flights.get(fingerprint) is flight:
            del self.flights[fingerprint]

    def propose(self, entry: Entry) -> None:
        """Put a stored entry back into the index."""
        draft = entry.draft
        if (
            self.index is not None
            and self.embedder is not None
            and draft.embedder == self.embedder.identity
            and draft.embedding is not None
            and draft.signature is not None
        ):
            vector = np.frombuffer(draft.embedding, np.float32)
            self.index.add(entry.id, draft.scope, vector, np.frombuffer(draft.signature, np.uint64), draft.expires_ms)

    def forget(self, entry_ids: Sequence[int]) -> None:
        """Drop entries that SQL no longer has from memory and index."""
        self.purges += bool(entry_ids)
        self.hot.forget(entry_ids)
        if self.index is not None:
            self.index.remove(entry_ids)

    # -- purges -----------------------------------------------------------------------------------------------------

    def began(self, client: Client) -> Began:
        """What begins now, on account of this client."""
        return Began(self._store.purges.newest, client.ts_ms)

    def purged(self, entry_ids: Sequence[int]) -> None:
        """After a purge was made: what it removed is nowhere in memory, and nobody new joins a call it overtook."""
        self.purges += 1
        self.forget(entry_ids)
        known = self._store.purges
        for fingerprint, flight in list(self.flights.items()):
            if known.overtook(flight.context.marks, flight.context.began):
                del self.flights[fingerprint]

    async def follow(self) -> None:
        """Do as much for purges that other processes made. Raises CacheFault."""
        await self._store.follow()
        if made := self._store.purges.after(self._followed):
            self._followed = self._store.purges.newest
            self.purged(
                self.hot.those(lambda draft: any(reaches(purge, marks_of(draft), asked_ms(draft)) for purge in made))
            )


def _nobody_is_told() -> None:
    """There is no embedder that would make it."""


def _content_type(query: Query) -> str:
    return f"{query.dialect.stream_type}; charset=utf-8" if query.stream else JSON


def _prober(query: Query) -> str:
    return query.key_id or query.tenant


def _may_route(query: Query) -> bool:
    return Lane.ROUTE in query.plan.lanes and query.eligibility.level is not Level.NONE and query.batch is None


def _may_share(query: Query) -> bool:
    return query.controls.read and query.eligibility.level is not Level.NONE and Lane.COLLAPSE in query.plan.lanes


def _schedule(query: Query, answer: Answer, body: bytes, pace: Pace) -> Schedule:
    ends = ends_of(body, query.dialect.stream_type)
    done = progress(body, ends, texts_of(answer.message.get("content"), answer.pieces)) if pace == "recorded" else ends
    return schedule(ends, done, pace, answer.runs, len(ends) if answer.usage is None else answer.usage.output_tokens)


def _same_bytes(one: Query, other: Query) -> bool:
    """Whether the reply to one can be relayed to the other as it arrives."""
    return (
        one.stream == other.stream
        and one.endpoint == other.endpoint
        and one.dialect is other.dialect
        and one.output_limit == other.output_limit
    )


def _is_fresh(entry: Entry, query: Query, client: Client) -> bool:
    return freshness.is_fresh(entry.draft.created_ms, entry.draft.expires_ms, client.ts_ms, query.controls.max_age_s)
