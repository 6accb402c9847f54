"""What a request leaves behind: its ledger row, its counters, and the entry its answer becomes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from proxy import ports
from proxy.core import policy
from proxy.core.answer import encode_answer
from proxy.core.directives import reason_told
from proxy.core.model import (
    Answer,
    Bypass,
    Call,
    Draft,
    Entry,
    Hit,
    Miss,
    NearMiss,
    Outcome,
    Rules,
    Tier,
    Usage,
    Verdict,
    again,
)
from proxy.core.purse import LEARNING, Purse, worth
from proxy.core.query import Query
from proxy.hot import Form
from proxy.records import Client, Fetch
from proxy.relay import Ending
from proxy.upstreams.attempt import Attempt
from proxy.upstreams.sending import Sending
from proxy.watch.telemetry import Telemetry

REPEATED, COLLAPSED, PASSED = Miss("repeated"), Miss("collapsed"), Bypass("pass_through")
MECHANISMS = {Tier.EXACT: "cache.exact", Tier.SEMANTIC: "cache.semantic", Tier.STALE: "cache.stale"}


class Books:
    """Writes requests into ledger, counters and log. Owns none of them."""

    def __init__(
        self, ledger: ports.Ledger, prices: ports.PriceBook, telemetry: Telemetry, purse: Purse | None = None
    ) -> None:
        self._ledger = ledger
        self.purse = purse or Purse(0.0)
        self._prices = prices
        self._telemetry = telemetry
        self._serial = itertools.count(1)

    def price(self, query: Query, usage: Usage | None, ts_ms: int, tier: str | None = None) -> int:
        """List price of these tokens at the model asked for, nano-dollars; 0 when either is unknown."""
        tier = query.tier if tier is None else tier
        return 0 if usage is None else self._prices.price(query.upstream, query.model, usage, tier, ts_ms).nusd

    def cost(self, call: Call) -> int:
        """What a call is billed, nano-dollars; 0 when usage or price is unknown."""
        if call.usage is None:
            return 0
        seconds = call.total_ms / 1e3
        return self._prices.price(call.upstream, call.model, call.usage, call.tier, call.ts_ms, seconds).nusd

    def recurring(self, query: Query, model_served: str, hit: Hit) -> tuple[Any, ...]:
        """What every hit of this kind has in common, see `Outcome.recurring`."""
        draft = hit.entry.draft
        return (
            _asked(query)
            ._replace(
                cache_status="STALE" if hit.tier is Tier.STALE else "HIT",
                reason=hit.reason,
                mechanism=MECHANISMS[hit.tier],
                model_served=model_served,
                similarity=hit.similarity,
                entry_id=hit.entry.id,
                usage=draft.usage,
                usage_basis=_basis(draft.usage),
                baseline_ms=draft.total_ms,
            )
            .recurring
        )

    def settle(
        self,
        outcome: Outcome,
        steps_ms: Mapping[str, float] | None = None,
        *,
        recurring: tuple[Any, ...] | None = None,
        scope: bytes = b"",
        age_s: int | None = None,
        saved_nusd: int = 0,
        costs_nusd: Mapping[str, int] | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """Where everything ends that is asked: the one place that writes ledger row, counters and line of the log.

        `recurring`: of an outcome that is nothing but `again(recurring, ...)`. For the rest see `Telemetry.lookup`.
        """
        if recurring is None:
            self._ledger.record(outcome)
        else:
            self._ledger.record_again(recurring, outcome.request_id, outcome.ts_ms, outcome.total_ms)
        self._telemetry.lookup(
            outcome, steps_ms, scope=scope, age_s=age_s, saved_nusd=saved_nusd, costs_nusd=costs_nusd, headers=headers
        )

    def hit(
        self,
        form: Form,
        client: Client,
        steps_ms: dict[str, float] | None,
        scope: bytes,
        age_s: int,
        ending: Ending | None = None,
        looked: str = "",
    ) -> None:
        """Book a hit; `ending`: of one that went out over time. `looked`: see `Outcome`."""
        if form.worth:
            self.purse.earn(form.worth)
        recurring: tuple[Any, ...] | None = form.recurring
        total_ms = _ms_since(client)
        if ending is None:
            outcome = again(form.recurring, client.request_id, client.ts_ms, total_ms, total_ms)
        else:
            outcome = again(form.recurring, client.request_id, client.ts_ms, _ttft_ms(ending, client), total_ms)
            outcome, recurring = outcome._replace(outcome=ending.word), None
        if looked:
            outcome, recurring = outcome._replace(looked=looked), None
        self.settle(
            outcome,
            steps_ms,
            recurring=recurring,
            scope=scope,
            age_s=age_s,
            saved_nusd=form.baseline_nusd,
            headers=client.headers,
        )

    def call_of(self, fetch: Fetch, status: int, size_bytes: int, *, is_stream: bool, won: bool) -> Call:
        """The upstream call of a fetch that has ended. Usage that was not told is estimated from what arrived."""
        query, usage, basis = fetch.query, fetch.usage, "measured"
        attempt = fetch.attempt
        sending = fetch.sending if attempt is None else attempt.sending
        if usage is None and status == 200 and size_bytes:
            has_output = query.batch is None
            usage = policy.estimate_usage(sending.body, size_bytes, is_stream, has_output=has_output)
            basis = "estimated"
        opened_s = fetch.opened_s if attempt is None else attempt.opened_s
        first_byte_s = fetch.first_byte_s if attempt is None else attempt.first_byte_s
        ended_s = (None if attempt is None else attempt.ended_s) or time.perf_counter()
        return Call(
            id=f"{fetch.client.request_id}-{next(self._serial):x}",
            ts_ms=fetch.client.ts_ms,
            upstream=sending.upstream,
            model=fetch.answer.model if fetch.answer is not None else sending.model,
            purpose=fetch.purpose,
            tier=_tier_told(fetch.answer) or sending.tier,
            won=won and fetch.purpose == "answer",
            usage=usage,
            usage_basis=basis if usage is not None else "none",
            status=status,
            ttft_ms=None if first_byte_s is None else (first_byte_s - opened_s) * 1e3,
            total_ms=(ended_s - opened_s) * 1e3,
            shaped_by=sending.shaped_by,
        )

    def lost_calls(self, fetch: Fetch, own: Usage | None) -> tuple[Call, ...]:
        """The calls made for a fetch that did not give its answer. `own`: the usage of the one that did.

        What a call given up would be billed is not told by anyone: its input counts, which is that of the same question
        at the same model where this is known, and of its output what had arrived.
        """
        return tuple(
            [self._lost_call(fetch, attempt, own) for attempt in fetch.attempts if attempt is not fetch.attempt]
        )

    def _lost_call(self, fetch: Fetch, attempt: Attempt, own: Usage | None) -> Call:
        sending, usage, basis = attempt.sending, attempt.usage, "measured"
        is_open = attempt.was_left or attempt.ended_s is None
        if usage is None and attempt.was_sent and attempt.status < 400 and is_open:
            usage, basis = policy.estimate_usage(sending.body, attempt.size_bytes, False), "estimated"
            won = fetch.attempt
            if own is not None and won is not None and _is_same_model(won.sending, sending):
                usage = Usage(own.input_tokens, usage.output_tokens if attempt.size_bytes else 0,
                              own.cache_read_tokens, own.cache_write_tokens)  # fmt: skip
            elif not attempt.size_bytes:
                usage = Usage(usage.input_tokens, 0)
        return Call(
            id=f"{fetch.client.request_id}-{next(self._serial):x}",
            ts_ms=fetch.client.ts_ms,
            upstream=sending.upstream,
            model=sending.model,
            purpose=attempt.purpose,
            tier=sending.tier,
            won=False,
            usage=usage,
            usage_basis=basis if usage is not None else "none",
            status=attempt.status,
            ttft_ms=None if attempt.first_byte_s is None else (attempt.first_byte_s - attempt.opened_s) * 1e3,
            total_ms=((attempt.ended_s or time.perf_counter()) - attempt.opened_s) * 1e3,
            shaped_by=sending.shaped_by,
        )

    def forwarded(
        self, query: Query, client: Client, fetch: Fetch, ending: Ending, *, collapsed: bool = False, looked: str = ""
    ) -> int:
        """Book a request that was not answered from entries, or not all of it; what it cost, in nano-dollars."""
        verdict = COLLAPSED if collapsed else fetch.lookup.verdict
        calls = fetch.lookup.spent
        if not collapsed:
            calls = (*calls, *(() if fetch.call is None else (fetch.call,)), *fetch.extra)
        mechanism, usage, basis = _answered_by(fetch, is_ok=ending.word == "ok", collapsed=collapsed)
        outcome = _asked(query)._replace(
            request_id=client.request_id,
            ts_ms=client.ts_ms,
            outcome=ending.word,
            status=ending.status,
            cache_status=_cache_status(query, verdict, mechanism),
            reason=reason_told(verdict, shadow=query.controls.shadow),
            mechanism=mechanism,
            model_served=fetch.answer.model if fetch.answer is not None else query.model,
            similarity=verdict.similarity if isinstance(verdict, NearMiss | Hit) else None,
            entry_id=_entry_id(query, verdict),
            usage=usage,
            usage_basis=basis,
            calls=calls,
            retry_of=fetch.client.request_id if collapsed and client.is_retry else None,
            looked=looked,
            ttft_ms=_ttft_ms(ending, client),
            total_ms=_ms_since(client),
        )
        costs_nusd: dict[str, int] = {}
        for made in calls:
            costs_nusd[made.upstream] = costs_nusd.get(made.upstream, 0) + self.cost(made)
        cost_nusd = sum(costs_nusd.values())
        saved_nusd = self.price(query, usage, client.ts_ms) - cost_nusd if outcome.is_partial else 0
        self.settle(
            outcome,
            fetch.lookup.steps_ms,
            scope=query.scope,
            saved_nusd=saved_nusd,
            costs_nusd=costs_nusd,
            headers=client.headers,
        )
        return cost_nusd

    def served(
        self,
        query: Query,
        client: Client,
        entries: Sequence[Entry],
        model_served: str,
        usage: Usage | None,
        steps_ms: dict[str, float],
    ) -> None:
        """Book a request answered by several entries together; their calls' longest time is what it saved."""
        total_ms = _ms_since(client)
        outcome = _asked(query)._replace(
            request_id=client.request_id,
            ts_ms=client.ts_ms,
            cache_status="HIT",
            reason="hit",
            mechanism=MECHANISMS[Tier.EXACT],
            model_served=model_served,
            similarity=1.0,
            entry_id=entries[0].id if len(entries) == 1 else None,
            usage=usage,
            usage_basis=_basis(usage),
            baseline_ms=max([entry.draft.total_ms for entry in entries]),
            ttft_ms=total_ms,
            total_ms=total_ms,
        )
        self.settle(
            outcome,
            steps_ms,
            scope=query.scope,
            saved_nusd=self.price(query, usage, client.ts_ms),
            headers=client.headers,
        )

    def repeated(
        self, query: Query, client: Client, usage: Usage | None, model_served: str, word: str, status: int
    ) -> None:
        """Book a line of a batch that got the answer of another line of it, which asks the same."""
        outcome = _asked(query)._replace(
            request_id=client.request_id,
            ts_ms=client.ts_ms,
            outcome=word,
            status=status,
            reason=REPEATED.reason,
            mechanism="batch.dedup",
            model_served=model_served,
            usage=usage,
            usage_basis=_basis(usage),
            total_ms=_ms_since(client),
        )
        self.settle(
            outcome, scope=query.scope, saved_nusd=self.price(query, usage, client.ts_ms), headers=client.headers
        )

    def batch_tier(self, query: Query, usage: Usage | None, ts_ms: int) -> str:
        """The tier a call of a provider's batch is booked at: "default", which is never too little, when nobody knows
        the price of the other."""
        if usage is None:
            return "batch"
        known = self._prices.price(query.upstream, query.model, usage, "batch", ts_ms).basis != "unpriced"
        return "batch" if known else "default"

    def unasked(self, fetch: Fetch) -> None:
        """Book a call made for no client (an audit, a revalidation, …): all it cost is a negative saving."""
        assert fetch.call is not None
        self._unasked(fetch.query, fetch.client.request_id, fetch.call, fetch.purpose, ok=fetch.answer is not None)

    def judged(self, query: Query, call: Call, *, ok: bool) -> None:
        """Book a question to the model that compares answers, as an audit is."""
        self._unasked(query, call.id, call, "judge", ok=ok)

    def _unasked(self, query: Query, request_id: str, call: Call, reason: str, *, ok: bool) -> None:
        outcome = _asked(query)._replace(
            request_id=request_id,
            ts_ms=call.ts_ms,
            outcome="ok" if ok else "error",
            status=call.status,
            cache_status="AUDIT",
            reason=reason,
            model_served=call.model,
            calls=(call,),
            ttft_ms=call.ttft_ms,
            total_ms=call.total_ms,
        )
        cost_nusd = self.cost(call)
        if reason in LEARNING:
            self.purse.spend(worth(cost_nusd, call.usage))
        self.settle(outcome, scope=query.scope, costs_nusd={query.upstream: cost_nusd} if cost_nusd else None)


def _ms_since(client: Client) -> float:
    return (time.perf_counter() - client.started_s) * 1e3


def _ttft_ms(ending: Ending, client: Client) -> float | None:
    return None if ending.first_byte_s is None else (ending.first_byte_s - client.started_s) * 1e3


_TOLD_TIERS = {"default": "default", "standard": "default", "flex": "flex", "priority": "priority"}


def _tier_told(answer: Answer | None) -> str | None:
    """The service tier that an answer says it was given at."""
    told = None if answer is None else answer.extra.get("service_tier")
    return _TOLD_TIERS.get(told) if isinstance(told, str) else None


def _is_same_model(one: Sending, other: Sending) -> bool:
    return (one.upstream, one.model) == (other.upstream, other.model)


def added(*usages: Usage | None) -> Usage | None:
    """What is known of several usages, together; None when nothing is."""
    known = [usage for usage in usages if usage is not None]
    if not known:
        return None
    return Usage(
        sum([usage.input_tokens for usage in known]),
        sum([usage.output_tokens for usage in known]),
        sum([usage.cache_read_tokens for usage in known]),
        sum([usage.cache_write_tokens for usage in known]),
    )


def draft_of(fetch: Fetch, answer: Answer, embedder: str, rules: Rules, now_ms: int) -> Draft:
    """The entry this answer becomes. Without a vector it is found by its exact identity only."""
    query, lookup = fetch.query, fetch.lookup
    is_compared = not (answer.opaque or answer.calls)  # what is signed, or acts, is for the very same question
    embedded = is_compared and lookup.vector is not None and lookup.signature is not None
    return Draft(
        scope=query.scope,
        fingerprint=query.fingerprint,
        tenant=query.tenant,
        namespace=query.controls.namespace,
        upstream=query.upstream,
        operation=query.dialect.operation,
        model=query.model,
        prompt=query.prompt if is_compared else "",
        answer=encode_answer(answer, orjson.dumps),
        usage=answer.usage,
        created_ms=now_ms,
        expires_ms=now_ms + int(policy.ttl_s(query.eligibility, query.controls, rules) * 1000),
        request_id=fetch.client.request_id,
        total_ms=fetch.call.total_ms if fetch.call is not None else 0.0,
        tags=query.controls.tags,
        embedding=lookup.vector.tobytes() if embedded and lookup.vector is not None else None,
        embedder=embedder if embedded else None,
        signature=lookup.signature.tobytes() if embedded and lookup.signature is not None else None,
    )


def _answered_by(fetch: Fetch, *, is_ok: bool, collapsed: bool) -> tuple[str | None, Usage | None, str]:
    """What gave the answer if not a call for it alone, the answer's usage, and how that is known."""
    usage = fetch.usage if is_ok else None
    if fetch.stand_in and is_ok:
        return fetch.stand_in, usage, _basis(usage)
    if collapsed:
        return "stream.coalesce", usage, _basis(usage)
    if is_ok and fetch.served is not None and fetch.call is not None and fetch.call.usage is not None:
        return MECHANISMS[Tier.EXACT], added(fetch.served, fetch.call.usage), fetch.call.usage_basis
    return None, usage, _basis(usage)


def _cache_status(query: Query, verdict: Verdict, mechanism: str | None) -> str:
    if query.controls.refresh:
        return "REFRESH"
    if mechanism == "cache.stale-if-error":
        return "STALE"
    if isinstance(verdict, Bypass):
        return "BYPASS"
    return "SHADOW" if query.controls.shadow else "MISS"


def _entry_id(query: Query, verdict: Verdict) -> int | None:
    """The entry that was nearly served, or would have been."""
    if isinstance(verdict, Hit):
        return verdict.entry.id if query.controls.shadow else None
    return verdict.entry_id if isinstance(verdict, NearMiss) else None


def _asked(query: Query) -> Outcome:
    """What the question alone says of its outcome; the rest is that of a miss of which nothing is known."""
    return Outcome(
        request_id="",
        ts_ms=0,
        tenant=query.tenant,
        namespace=query.controls.namespace,
        tag=query.controls.tags[0] if query.controls.tags else "",
        dialect=query.dialect.name,
        endpoint=query.endpoint,
        stream=query.stream,
        model_requested=query.model,
        model_served=query.model,
        upstream=query.upstream,
        tier=query.tier,
        key_id=query.key_id,
        team=query.team,
    )


def _basis(usage: Usage | None) -> str:
    return "none" if usage is None else "measured"
