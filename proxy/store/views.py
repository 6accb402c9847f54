"""What finance may query without knowing the tables: each view's question, and each column with its unit.

The SELECTs stand in `schema.VIEWS`; a test compares these columns with those the database gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_MONEY = {
    "requests": "count of clients' requests",
    "hits": "count, answered from the cache or by joining a forward in flight",
    "baseline_usd": "USD without ibid",
    "actual_usd": "USD paid",
    "saved_usd": "USD, the difference of the two",
}


@dataclass(frozen=True, slots=True)
class View:
    """`columns`: name → what it is and its unit, in the order of the view."""

    title: str
    columns: Mapping[str, str]


DESCRIBED: Mapping[str, View] = {
    "savings_daily": View("What was saved, day by day?", {"day": "UTC", **_MONEY}),
    "savings_by_model": View(
        "What was saved, by the model asked for?", {"upstream": "name", "model": "name, as requested", **_MONEY}
    ),
    "savings_by_tenant": View(
        "What was saved, by tenant?",
        {"tenant": "digest", "team": "project of the virtual key; empty without one", **_MONEY},
    ),
    "savings_by_strategy": View(
        "Which strategies earned it, and which lost money?",
        {
            "strategy": "one of six",
            "mechanism": "name",
            "steps": "count of waterfall steps",
            "saved_usd": "USD, net",
            "earned_usd": "USD of the steps that saved money",
            "spent_usd": "USD of the steps that cost money",
            "saved_s": "seconds of waiting, where they are known",
        },
    ),
    "hit_rate_daily": View(
        "How often does the cache answer, by requests and by money?",
        {
            "day": "UTC",
            "requests": "count of clients' requests",
            "hits": "count",
            "hit_rate": "share of requests, 0 to 1",
            "money_hit_rate": "share of the baseline, 0 to 1",
        },
    ),
    "wrong_hits": View(
        "How many hits were wrong, as far as anybody judged them?",
        {
            "day": "UTC",
            "model": "name, as requested",
            "lane": "mechanism",
            "hits": "count",
            "judged": "count of hits with feedback or an audit",
            "wrong": "count of the judged; an audit counts 1 less its certainty that they are the same",
            "wrong_rate": "share of the judged, 0 to 1",
        },
    ),
    "top_entries": View(
        "Which entries earn their disk?",
        {"entry_id": "id", "hits": "count", "saved_usd": "USD", "last_hit_ms": "epoch ms"},
    ),
    "latency_by_lane": View(
        "What latency did each lane give? Nearest rank.",
        {
            "lane": "mechanism, forward, bypass, audit or refused",
            "requests": "count",
            "p50_ms": "ms to the last byte",
            "p95_ms": "ms to the last byte",
            "p99_ms": "ms to the last byte",
            "ttft_p50_ms": "ms to the first byte",
            "ttft_p95_ms": "ms to the first byte",
        },
    ),
}
