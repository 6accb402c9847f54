"""One finished request → its ledger rows: what it would have cost, what it did cost, and why they differ.

The waterfall telescopes. It starts at the baseline (this request with ibid removed), every lane that acted is one step
with a `before` and an `after`, the next step starts where the last one ended, and the final `after` is what was paid.
So the steps sum to `baseline_nusd - actual_nusd` exactly, in integers, whatever the plan was, and nothing can be
counted twice. A step may be negative: audits, lost hedges and repeated attempts cost money.

Rows are tuples in the order of the `*_COLUMNS` below, ready for the database; no dictionaries on this path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from proxy.core.model import Call, Outcome, Usage
from proxy.core.units import DAY_MS, DAY_S

Pricing = Callable[[str, str, Usage, str, int, float], tuple[int, str, str]]
"""(upstream, model, usage, tier, ts_ms, seconds) → (nano-dollars, basis, price_id): `ports.PriceBook.price`."""

REQUEST_COLUMNS = (
    "id", "ts", "day", "tenant", "namespace", "tag", "dialect", "endpoint", "stream", "model_requested",
    "model_served", "upstream", "lane", "outcome", "cache_status", "reason", "status", "similarity", "entry_id",
    "retry_of", "in_tok", "out_tok", "cache_read_tok", "cache_write_tok", "usage_basis", "baseline_nusd",
    "actual_nusd", "baseline_basis", "price_id", "ttft_ms", "total_ms", "baseline_ms", "key_id", "team",
)  # fmt: skip
CALL_COLUMNS = (
    "id", "request_id", "ts", "upstream", "model", "purpose", "tier", "won", "in_tok", "out_tok", "cache_read_tok",
    "cache_write_tok", "accepted_pred_tok", "rejected_pred_tok", "cost_nusd", "price_id", "cost_basis", "usage_basis",
    "status", "ttft_ms", "total_ms",
)  # fmt: skip
SAVING_COLUMNS = (
    "request_id", "step", "family", "mechanism", "before_nusd", "after_nusd", "saved_nusd", "saved_ms", "basis",
)  # fmt: skip

FAMILIES = {
    "cache": "cached",
    "stream": "streaming",
    "batch": "batch",
    "edge": "edge",
    "hybrid": "hybrid",
    "spec": "speculative",
}
"""First word of a mechanism → one of the six strategies."""

EXTRA_CALLS = {
    "answer": "spec.retry",  # a further attempt at the same answer that did not reach a client
    "hedge": "spec.hedge",
    "race": "spec.race",
    "prefetch": "spec.prefetch",
    "shadow": "hybrid.shadow",
    "cascade": "hybrid.cascade",
    "edge": "edge.local",
    "revalidate": "cache.revalidate",
    "audit": "cache.audit",
    "repeat": "cache.audit",
    "judge": "cache.audit",
    "embedding": "cache.embed",
}
"""Purpose of a call that is not the client's own answer → the mechanism its cost is booked under."""

TIERS = {"flex": "batch.flex", "batch": "batch.provider"}
"""Cheaper service tiers → the mechanism that earned the difference to the tier asked for."""

SUBSTITUTES = frozenset({"hybrid.route", "hybrid.cascade", "spec.race", "edge.local"})
"""Mechanisms by which another model, or another server, gave the answer."""

STAND_INS = frozenset({"edge.offline", "hybrid.failover", "cache.stale-if-error"})
"""Mechanisms that answered because the upstream failed. Without ibid there would have been an error, which costs
nothing: what a stand-in costs is a negative saving."""

_LANES = {"BYPASS": "bypass", "AUDIT": "audit"}
_TTFT = REQUEST_COLUMNS.index("ttft_ms")  # total_ms follows it
_BASELINE_MS = REQUEST_COLUMNS.index("baseline_ms")
_SAVED_MS = SAVING_COLUMNS.index("saved_ms")
_NO_USAGE = (None, None, None, None)


class Settlement(NamedTuple):
    """Rows of one request: `request` in REQUEST_COLUMNS' order, the others likewise."""

    request: tuple[Any, ...]
    calls: list[tuple[Any, ...]]
    savings: list[tuple[Any, ...]]


class Dated:
    """The settlement of a recurring outcome without calls, ready to be dated again on the same day."""

    __slots__ = ("_after", "_baseline_ms", "_middle", "_steps", "day", "recurring")

    def __init__(self, recurring: tuple[Any, ...], day: int, settlement: Settlement) -> None:
        assert not settlement.calls
        self.recurring = recurring
        self.day = day
        self._middle = settlement.request[2:_TTFT]
        self._after = settlement.request[_TTFT + 2 :]
        self._baseline_ms: float | None = settlement.request[_BASELINE_MS]
        self._steps = [(step[1:_SAVED_MS], step[_SAVED_MS + 1 :]) for step in settlement.savings]

    def at(self, request_id: str, ts_ms: int, total_ms: float) -> Settlement:
        request = (request_id, ts_ms, *self._middle, total_ms, total_ms, *self._after)
        saved_ms = None if self._baseline_ms is None else self._baseline_ms - total_ms
        return Settlement(request, [], [(request_id, *before, saved_ms, *after) for before, after in self._steps])


class _Priced(NamedTuple):
    nusd: int
    basis: str  # "measured" | "estimated" | "none" (no usage known) | "unpriced" (no price known) | "failed"
    price_id: str


class _Sold(NamedTuple):
    """A call as a price list sees it."""

    upstream: str
    model: str
    tier: str
    usage: Usage | None


_UNKNOWN = _Priced(0, "none", "")
_FAILED = _Priced(0, "failed", "")


@lru_cache(maxsize=64)
def _day(days: int) -> str:
    return datetime.fromtimestamp(days * DAY_S, UTC).strftime("%Y-%m-%d")


def day_of(ts_ms: int) -> str:
    """The UTC calendar day, "2026-11-22"."""
    return _day(ts_ms // DAY_MS)


def family_of(mechanism: str) -> str:
    """The strategy a mechanism belongs to; an unknown one is a fault of ours and raises KeyError."""
    return FAMILIES[mechanism.partition(".")[0]]


def settle(outcome: Outcome, price: Pricing) -> Settlement:
    """All rows of one finished request, steps summing exactly to baseline minus actual.

    Baseline, the request with ibid removed (reference protocols §3.5):
    - answered without the provider asked for (a `mechanism`): the visible usage at the requested model's list price;
    - answered in part without it (embeddings): the whole visible usage at that price, against its call for the rest;
    - answered by something else because the provider failed: nothing, since an error costs nothing;
    - forwarded: the client's own call as it would have been without what shaped it: asked of the model and the tier
      asked for, without what was injected. Each mechanism is a step from the call before it acted to the call after.
      A call that failed or was cancelled would have cost the same without ibid, so it is its own baseline and saves
      nothing.
    Usage or price unknown: 0, with the basis saying so; never a guess.
    """
    costs = [_cost(price, call) for call in outcome.calls]
    if outcome.mechanism is None and len(costs) == 1 and _is_plain(outcome, outcome.calls[0]):  # nearly every forward
        row = _request_row(outcome, costs[0], costs[0].nusd)
        return Settlement(row, [_call_row(outcome.request_id, outcome.calls[0], costs[0])], [])
    own = _own_call(outcome.calls)
    chain = _chain(outcome, costs, own, price)
    savings = _waterfall(outcome, costs, own, chain)
    actual = sum(cost.nusd for cost in costs)
    calls = [_call_row(outcome.request_id, call, cost) for call, cost in zip(outcome.calls, costs, strict=True)]
    return Settlement(_request_row(outcome, chain[0][1], actual), calls, savings)


def paid_nusd(outcome: Outcome, price: Pricing) -> int:
    """What its calls cost: `actual_nusd` of its row."""
    return sum([_cost(price, call).nusd for call in outcome.calls])


def _is_plain(outcome: Outcome, call: Call) -> bool:
    """The client's own call and nothing else: its own baseline."""
    is_own = call.won or call.purpose == "answer"
    return is_own and not call.shaped_by and call.upstream == outcome.upstream and call.tier == outcome.tier


def _cost(price: Pricing, call: Call) -> _Priced:
    sold = _Sold(call.upstream, call.model, call.tier, call.usage)
    return _price(price, sold, call.usage_basis, call.ts_ms, call.total_ms)


def _price(price: Pricing, sold: _Sold, basis: str, ts_ms: int, total_ms: float) -> _Priced:
    if sold.usage is None:
        return _UNKNOWN
    nusd, source, price_id = price(sold.upstream, sold.model, sold.usage, sold.tier, ts_ms, total_ms / 1e3)
    return _Priced(nusd, "unpriced" if source == "unpriced" else basis, price_id)


def _own_call(calls: tuple[Call, ...]) -> int | None:
    """Index of the call that is the client's own: the one that won, else the first made for its answer."""
    if len(calls) == 1:
        return 0 if calls[0].won or calls[0].purpose == "answer" else None
    for index, call in enumerate(calls):
        if call.won:
            return index
    for index, call in enumerate(calls):
        if call.purpose == "answer":
            return index
    return None


def _chain(outcome: Outcome, costs: list[_Priced], own: int | None, price: Pricing) -> list[tuple[str, _Priced]]:
    """The baseline (under ""), then for each mechanism that acted what the request costs with it."""
    mechanism = outcome.mechanism
    paid = _UNKNOWN if own is None else costs[own]
    if mechanism in STAND_INS:
        return [("", _FAILED), (mechanism, paid)]
    if mechanism is None and own is None:
        return [("", _UNKNOWN)]  # nothing was asked of anyone: refused, or answered from nowhere
    if mechanism is None and own is not None:
        stood_in = next((name for name in outcome.calls[own].shaped_by if name in STAND_INS), None)
        if stood_in is not None:  # and was not heard to its end
            return [("", _FAILED), (stood_in, paid)]
        return _shaped(outcome, outcome.calls[own], paid, price)
    asked = _Sold(outcome.upstream, outcome.model_requested, outcome.tier, outcome.usage)
    baseline = _price(price, asked, outcome.usage_basis, outcome.ts_ms, outcome.baseline_ms or 0.0)
    assert mechanism is not None
    return [("", baseline), (mechanism, paid)]


def _shaped(outcome: Outcome, call: Call, paid: _Priced, price: Pricing) -> list[tuple[str, _Priced]]:
    acted = list(call.shaped_by)
    if call.upstream != outcome.upstream and SUBSTITUTES.isdisjoint(acted):
        acted.insert(0, "hybrid.route")
    if call.tier != outcome.tier and call.tier in TIERS and TIERS[call.tier] not in acted:
        acted.append(TIERS[call.tier])
    if not acted:
        return [("", paid)]
    sold = _unshaped(outcome, call, acted)
    is_other = call.usage_basis == "measured" and not SUBSTITUTES.isdisjoint(acted)  # whose tokens are other tokens
    chain = [("", _price(price, sold, "estimated" if is_other else call.usage_basis, outcome.ts_ms, call.total_ms))]
    for mechanism in acted:
        sold = _acted(mechanism, sold, call)
        chain.append((mechanism, _price(price, sold, call.usage_basis, call.ts_ms, call.total_ms)))
    chain[-1] = (acted[-1], paid)
    if any([after.basis == "unpriced" for _, after in chain[1:]]):  # what it cost is not known, nor so what it saved
        return [(mechanism, paid._replace(basis="unpriced")) for mechanism, _ in chain]
    return chain


def _unshaped(outcome: Outcome, call: Call, acted: list[str]) -> _Sold:
    """The call as the client would have made it. A tier that the provider changed, it would have changed for anyone."""
    usage, tier = call.usage, outcome.tier if TIERS.get(call.tier) in acted else call.tier
    if usage is not None and "cache.prefix" in acted:
        usage = replace(usage, cache_read_tokens=0, cache_write_tokens=0)
    if usage is not None and "spec.predict" in acted:
        usage = replace(usage, output_tokens=max(0, usage.output_tokens - usage.rejected_prediction_tokens))
    if SUBSTITUTES.isdisjoint(acted):
        return _Sold(call.upstream, call.model, tier, usage)
    return _Sold(outcome.upstream, outcome.model_requested, tier, usage)


def _acted(mechanism: str, sold: _Sold, call: Call) -> _Sold:
    """The same after one mechanism."""
    usage = sold.usage
    if mechanism in SUBSTITUTES:
        return sold._replace(upstream=call.upstream, model=call.model)
    if mechanism in TIERS.values():
        return sold._replace(tier=call.tier)
    if usage is None or call.usage is None:
        return sold
    if mechanism == "cache.prefix":
        read, written = call.usage.cache_read_tokens, call.usage.cache_write_tokens
        return sold._replace(usage=replace(usage, cache_read_tokens=read, cache_write_tokens=written))
    if mechanism == "spec.predict":
        return sold._replace(usage=replace(usage, output_tokens=call.usage.output_tokens))
    return sold  # a hedge: the same call once more


def _waterfall(
    outcome: Outcome, costs: list[_Priced], own: int | None, chain: list[tuple[str, _Priced]]
) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    request_id = outcome.request_id
    running = chain[0][1]
    for mechanism, after in chain[1:]:
        before_ms = outcome.baseline_ms
        saved_ms = None if before_ms is None else before_ms - outcome.total_ms
        rows.append((request_id, len(rows), family_of(mechanism), mechanism, running.nusd, after.nusd,
                     running.nusd - after.nusd, saved_ms, running.basis))  # fmt: skip
        running = after
    total = running.nusd if own is not None or len(chain) > 1 else 0
    for index, call in enumerate(outcome.calls):
        cost = costs[index]
        if index == own or cost.nusd == 0:
            continue
        mechanism = EXTRA_CALLS.get(call.purpose, "spec.retry")
        rows.append((request_id, len(rows), family_of(mechanism), mechanism, total, total + cost.nusd,
                     -cost.nusd, None, cost.basis))  # fmt: skip
        total += cost.nusd
    return rows


def _request_row(o: Outcome, baseline: _Priced, actual_nusd: int) -> tuple[Any, ...]:
    usage = o.usage
    counters = _NO_USAGE if usage is None else (
        usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens
    )  # fmt: skip
    asked = "forward" if o.calls else "refused"  # refused: only-if-cached, and nothing was
    lane = asked if o.is_partial else o.mechanism or _LANES.get(o.cache_status) or answered_by(o.calls) or asked
    return (
        o.request_id, o.ts_ms, day_of(o.ts_ms), o.tenant, o.namespace, o.tag, o.dialect, o.endpoint, int(o.stream),
        o.model_requested, o.model_served, o.upstream, lane, o.outcome, o.cache_status, o.reason, o.status,
        o.similarity, o.entry_id, o.retry_of, *counters, o.usage_basis, baseline.nusd, actual_nusd, baseline.basis,
        baseline.price_id, o.ttft_ms, o.total_ms, o.baseline_ms, o.key_id, o.team,
    )  # fmt: skip


def answered_by(calls: tuple[Call, ...]) -> str | None:
    """The mechanism by which something else than the model asked gave the answer, if it was so."""
    if not calls or (len(calls) == 1 and not calls[0].shaped_by):  # of nearly every forward
        return None
    return next((name for call in calls if call.won for name in call.shaped_by if name in SUBSTITUTES), None)


def _call_row(request_id: str, call: Call, cost: _Priced) -> tuple[Any, ...]:
    usage = call.usage
    counters = _NO_USAGE if usage is None else (
        usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens
    )  # fmt: skip
    predicted = (None, None) if usage is None else (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens)
    return (
        call.id, request_id, call.ts_ms, call.upstream, call.model, call.purpose, call.tier, int(call.won), *counters,
        *predicted, cost.nusd, cost.price_id, cost.basis, call.usage_basis, call.status, call.ttft_ms, call.total_ms,
    )  # fmt: skip
