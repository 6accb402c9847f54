"""One finished request → its ledger rows: what it would have cost, what it did cost, and why they differ.

The waterfall telescopes. It starts at the baseline (this request with ibid removed), every lane that acted is one step
with a `before` and an `after`, the next step starts where the last one ended, and the final `after` is what was paid.
So the steps sum to `baseline_nusd - actual_nusd` exactly, in integers, whatever the plan was, and nothing can be
counted twice. A step may be negative: audits, lost hedges and repeated attempts cost money.

Rows are tuples in the order of the `*_COLUMNS` below, ready for the database; no dictionaries on this path.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from proxy.core.model import Call, Outcome, Usage

Pricing = Callable[[str, str, Usage, str, int], tuple[int, str, str]]
"""(upstream, model, usage, tier, ts_ms) → (nano-dollars, basis, price_id): `ports.PriceBook.price`."""

REQUEST_COLUMNS = (
    "id", "ts", "day", "tenant", "namespace", "tag", "dialect", "endpoint", "stream", "model_requested",
    "model_served", "upstream", "lane", "outcome", "cache_status", "reason", "status", "similarity", "entry_id",
    "retry_of", "in_tok", "out_tok", "cache_read_tok", "cache_write_tok", "usage_basis", "baseline_nusd",
    "actual_nusd", "baseline_basis", "price_id", "ttft_ms", "total_ms", "baseline_ms", "key_id", "team",
)  # fmt: skip
CALL_COLUMNS = (
    "id", "request_id", "ts", "upstream", "model", "purpose", "tier", "won", "in_tok", "out_tok", "cache_read_tok",
    "cache_write_tok", "cost_nusd", "price_id", "usage_basis", "status", "ttft_ms", "total_ms",
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
    "audit": "cache.audit",
    "judge": "cache.audit",
    "embedding": "cache.embed",
}
"""Purpose of a call that is not the client's own answer → the mechanism its cost is booked under."""

TIERS = {"flex": "batch.flex", "batch": "batch.provider"}
"""Cheaper service tiers → the mechanism that earned the difference to the default tier."""

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
    basis: str  # "measured" | "estimated" | "none" (no usage known) | "unpriced" (no price known)
    price_id: str


_UNKNOWN = _Priced(0, "none", "")


@lru_cache(maxsize=64)
def _day(days: int) -> str:
    return datetime.fromtimestamp(days * 86_400, UTC).strftime("%Y-%m-%d")


def day_of(ts_ms: int) -> str:
    """The UTC calendar day, "2026-11-22"."""
    return _day(ts_ms // 86_400_000)


def family_of(mechanism: str) -> str:
    """The strategy a mechanism belongs to; an unknown one is a fault of ours and raises KeyError."""
    return FAMILIES[mechanism.partition(".")[0]]


def settle(outcome: Outcome, price: Pricing) -> Settlement:
    """All rows of one finished request, steps summing exactly to baseline minus actual.

    Baseline, the request with ibid removed (reference protocols §3.5):
    - answered without the provider asked for (a `mechanism`): the visible usage at the requested model's list price;
    - answered in part without it (embeddings): the whole visible usage at that price, against its call for the rest;
    - forwarded: the client's own call at the default tier. A call that failed or was cancelled would have cost the
      same without ibid, so it is its own baseline and saves nothing.
    Usage or price unknown: 0, with the basis saying so; never a guess.
    """
    costs = [_price(price, call.upstream, call.model, call.usage, call.usage_basis, call.tier, call.ts_ms)
             for call in outcome.calls]  # fmt: skip
    own = _own_call(outcome.calls)
    baseline = _baseline(outcome, costs, own, price)
    savings = _waterfall(outcome, costs, own, baseline)
    actual = sum(cost.nusd for cost in costs)
    calls = [_call_row(outcome.request_id, call, cost) for call, cost in zip(outcome.calls, costs, strict=True)]
    return Settlement(_request_row(outcome, baseline, actual), calls, savings)


def paid_nusd(outcome: Outcome, price: Pricing) -> int:
    """What its calls cost: `actual_nusd` of its row."""
    return sum(
        [_price(price, c.upstream, c.model, c.usage, c.usage_basis, c.tier, c.ts_ms).nusd for c in outcome.calls]
    )


def _price(
    price: Pricing, upstream: str, model: str, usage: Usage | None, basis: str, tier: str, ts_ms: int
) -> _Priced:
    if usage is None:
        return _UNKNOWN
    nusd, source, price_id = price(upstream, model, usage, tier, ts_ms)
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


def _baseline(outcome: Outcome, costs: list[_Priced], own: int | None, price: Pricing) -> _Priced:
    if outcome.mechanism is None and own is not None:
        call = outcome.calls[own]
        if call.upstream == outcome.upstream:
            if call.tier == "default":
                return costs[own]
            return _price(price, call.upstream, call.model, call.usage, call.usage_basis, "default", outcome.ts_ms)
    if outcome.mechanism is None and own is None:
        return _UNKNOWN  # nothing was asked of anyone: refused, or answered from nowhere
    return _price(
        price, outcome.upstream, outcome.model_requested, outcome.usage, outcome.usage_basis, "default", outcome.ts_ms
    )


def _waterfall(outcome: Outcome, costs: list[_Priced], own: int | None, baseline: _Priced) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    request_id = outcome.request_id
    paid = 0 if own is None else costs[own].nusd
    mechanism = outcome.mechanism or _difference(outcome, own, baseline.nusd != paid)
    if mechanism is not None:
        before_ms = outcome.baseline_ms
        saved_ms = None if before_ms is None else before_ms - outcome.total_ms
        rows.append((request_id, 0, family_of(mechanism), mechanism, baseline.nusd, paid, baseline.nusd - paid,
                     saved_ms, baseline.basis))  # fmt: skip
    running = paid
    for index, call in enumerate(outcome.calls):
        cost = costs[index]
        if index == own or cost.nusd == 0:
            continue
        mechanism = EXTRA_CALLS.get(call.purpose, "spec.retry")
        rows.append((request_id, len(rows), family_of(mechanism), mechanism, running, running + cost.nusd,
                     -cost.nusd, None, cost.basis))  # fmt: skip
        running += cost.nusd
    return rows


def _difference(outcome: Outcome, own: int | None, differs: bool) -> str | None:
    """What made a forward cost other than its baseline: its tier, or another upstream than the one asked for."""
    if not differs or own is None:
        return None
    call = outcome.calls[own]
    return TIERS.get(call.tier, "hybrid.route")


def _request_row(o: Outcome, baseline: _Priced, actual_nusd: int) -> tuple[Any, ...]:
    usage = o.usage
    counters = _NO_USAGE if usage is None else (
        usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens
    )  # fmt: skip
    asked = "forward" if o.calls else "refused"  # refused: only-if-cached, and nothing was
    lane = asked if o.is_partial else o.mechanism or _LANES.get(o.cache_status, asked)
    return (
        o.request_id, o.ts_ms, day_of(o.ts_ms), o.tenant, o.namespace, o.tag, o.dialect, o.endpoint, int(o.stream),
        o.model_requested, o.model_served, o.upstream, lane, o.outcome, o.cache_status, o.reason, o.status,
        o.similarity, o.entry_id, o.retry_of, *counters, o.usage_basis, baseline.nusd, actual_nusd, baseline.basis,
        baseline.price_id, o.ttft_ms, o.total_ms, o.baseline_ms, o.key_id, o.team,
    )  # fmt: skip


def _call_row(request_id: str, call: Call, cost: _Priced) -> tuple[Any, ...]:
    usage = call.usage
    counters = _NO_USAGE if usage is None else (
        usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens
    )  # fmt: skip
    return (
        call.id, request_id, call.ts_ms, call.upstream, call.model, call.purpose, call.tier, int(call.won), *counters,
        cost.nusd, cost.price_id, call.usage_basis, call.status, call.ttft_ms, call.total_ms,
    )  # fmt: skip
