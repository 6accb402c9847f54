"""What a request would cost under its plan, before anybody is asked.

Input tokens are estimated by size; output tokens are those of the entry that would be served, else the mean of that
model's answers in the ledger, within the client's own limit. Every figure is an estimate and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.core import policy
from proxy.core.model import Usage
from proxy.core.patterns import is_one_of
from proxy.core.plan import Lane
from proxy.core.query import Query
from proxy.ports import PriceBook
from proxy.settings.lanes import LaneSettings

USUAL_OUTPUT_TOKENS = 256  # of a model nobody asked yet


def plan_of(query: Query) -> Mapping[str, Any]:
    """The plan as people and programs read it."""
    return {"lanes": query.plan.text.split(",") if query.plan.lanes else [], "policy": query.plan.policy or "default"}


def foresee(
    query: Query, lanes: LaneSettings, prices: PriceBook, now_ms: int, *, output_tokens: float | None, is_hit: bool
) -> Mapping[str, Any]:
    """Baseline, likely and highest cost in nano-dollars, and what they rest on."""
    usage = _usage(query, output_tokens)
    asked = prices.price(query.upstream, query.model, usage, query.tier, now_ms)
    edge_nusd = _edge_nusd(query, lanes, prices, usage, now_ms)
    likely = at_most = asked.nusd
    plan = query.plan.lanes
    if is_hit:
        likely = at_most = 0
    elif Lane.EDGE in plan and edge_nusd is not None:
        likely = at_most = edge_nusd
    else:
        if Lane.TIER in plan and is_one_of(query.model, lanes.tier.models):
            cheap = prices.price(query.upstream, query.model, usage, lanes.tier.name, now_ms)
            likely = cheap.nusd if cheap.basis != "unpriced" else likely
        if not plan.isdisjoint((Lane.CASCADE, Lane.RACE)) and query.wants_json and edge_nusd is not None:
            likely, at_most = edge_nusd, at_most + edge_nusd
        if Lane.HEDGE in plan:
            at_most += asked.nusd
    return {
        "basis": "unpriced" if asked.basis == "unpriced" else "estimated",
        "price": asked.price_id or None,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "baseline_nusd": asked.nusd,
        "likely_nusd": likely,
        "at_most_nusd": at_most,
    }


def _usage(query: Query, output_tokens: float | None) -> Usage:
    expected = USUAL_OUTPUT_TOKENS if output_tokens is None else round(output_tokens)
    if query.output_limit is not None:
        expected = min(expected, query.output_limit)
    return Usage(policy.estimate_usage(query.forward_body, 0, False).input_tokens, expected)


def _edge_nusd(query: Query, lanes: LaneSettings, prices: PriceBook, usage: Usage, now_ms: int) -> int | None:
    edge = lanes.edge
    if edge.upstream is None or edge.model is None:
        return None
    return prices.price(edge.upstream, edge.model, usage, "default", now_ms).nusd
