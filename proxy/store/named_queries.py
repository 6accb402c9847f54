# ruff: noqa: E501  SQL reads better in whole clauses
"""The named savings queries (reference protocols §3.5, Q1 to Q12), portable, each with its columns and units.

Money leaves as USD (double precision of an exact integer sum), counts as whole numbers, shares as 0…1, times in
milliseconds. `:since` and `:until` are UTC days, both inclusive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NamedQuery:
    """`columns`: name → what it is and its unit, in the order of the result."""

    name: str
    title: str
    sql: str
    columns: Mapping[str, str]


_HIT = "(r.lane LIKE 'cache.%' OR r.lane = 'stream.coalesce')"
_DAYS = "r.day >= :since AND r.day <= :until"


def _int(expression: str) -> str:
    return f"CAST(COALESCE(SUM({expression}), 0) AS BIGINT)"


def _usd(expression: str) -> str:
    return f"CAST({_int(expression)} AS DOUBLE PRECISION) / 1e9"


def _ratio(part: str, whole: str) -> str:
    return f"CAST({part} AS DOUBLE PRECISION) / NULLIF(CAST({whole} AS DOUBLE PRECISION), 0)"


_N = "CAST(COUNT(*) AS BIGINT)"
_ASKED = _int("CASE WHEN r.lane = 'audit' THEN 0 ELSE 1 END")  # an audit is ours, not a client's
_UNMEASURED = "CASE WHEN u.usage_basis = 'measured' THEN 0 ELSE 1 END"
_SAVED = "r.baseline_nusd - r.actual_nusd"
_PAYER = "CASE WHEN r.team = '' THEN r.tenant ELSE r.team END"

_QUERIES = (
    NamedQuery(
        "total",
        "What did we save, and what share of the bill?",
        f"SELECT {_ASKED} AS requests, {_usd('r.baseline_nusd')} AS baseline_usd, {_usd('r.actual_nusd')} AS actual_usd, "
        f"{_usd(_SAVED)} AS saved_usd, {_ratio(_int(_SAVED), _int('r.baseline_nusd'))} AS saved_share "
        f"FROM request r WHERE {_DAYS}",
        {
            "requests": "count",
            "baseline_usd": "USD without ibid",
            "actual_usd": "USD paid",
            "saved_usd": "USD",
            "saved_share": "share of the baseline",
        },
    ),
    NamedQuery(
        "strategies",
        "Which strategies earned it, and which lost money?",
        f"SELECT s.family AS strategy, s.mechanism AS mechanism, {_N} AS steps, {_usd('s.saved_nusd')} AS saved_usd, "
        f"{_usd('CASE WHEN s.saved_nusd < 0 THEN -s.saved_nusd ELSE 0 END')} AS spent_usd FROM saving s "
        f"JOIN request r ON r.id = s.request_id WHERE {_DAYS} GROUP BY s.family, s.mechanism "
        "ORDER BY saved_usd DESC, mechanism",
        {
            "strategy": "one of six",
            "mechanism": "name",
            "steps": "count",
            "saved_usd": "USD, net",
            "spent_usd": "USD of the steps that cost money",
        },
    ),
    NamedQuery(
        "balance",
        "Does the ledger balance? No row is the right answer.",
        "SELECT r.id AS request_id, r.baseline_nusd - r.actual_nusd AS saved_nusd, "
        "CAST(COALESCE(x.total, 0) AS BIGINT) AS steps_nusd FROM request r LEFT JOIN (SELECT request_id, "
        "SUM(saved_nusd) AS total FROM saving GROUP BY request_id) x ON x.request_id = r.id "
        f"WHERE {_DAYS} AND r.baseline_nusd - r.actual_nusd <> COALESCE(x.total, 0) ORDER BY r.id",
        {"request_id": "id", "saved_nusd": "nano-dollars", "steps_nusd": "nano-dollars"},
    ),
    NamedQuery(
        "invoice",
        "What should each provider's invoice say?",
        f"SELECT u.upstream AS upstream, u.model AS model, u.tier AS tier, {_N} AS calls, {_int('u.in_tok')} AS in_tok, "
        f"{_int('u.cache_read_tok')} AS cache_read_tok, {_int('u.out_tok')} AS out_tok, "
        f"{_usd('u.cost_nusd')} AS cost_usd, {_int(_UNMEASURED)} AS unmeasured "
        f"FROM upstream_call u JOIN request r ON r.id = u.request_id WHERE {_DAYS} "
        "GROUP BY u.upstream, u.model, u.tier ORDER BY u.upstream, u.model, u.tier",
        {
            "upstream": "name",
            "model": "name",
            "tier": "service tier",
            "calls": "count",
            "in_tok": "tokens",
            "cache_read_tok": "tokens",
            "out_tok": "tokens",
            "cost_usd": "USD",
            "unmeasured": "calls without usage",
        },
    ),
    NamedQuery(
        "waste",
        "What was paid for work nobody received?",
        f"SELECT u.purpose AS purpose, {_N} AS calls, {_usd('u.cost_nusd')} AS cost_usd FROM upstream_call u "
        f"JOIN request r ON r.id = u.request_id WHERE u.won = 0 AND {_DAYS} GROUP BY u.purpose "
        "ORDER BY cost_usd DESC, purpose",
        {"purpose": "why it was sent", "calls": "count", "cost_usd": "USD"},
    ),
    NamedQuery(
        "showback",
        "What does each team pay, per million tokens too? A tenant without a virtual key is its own team.",
        f"SELECT {_PAYER} AS team, {_ASKED} AS requests, {_usd('r.actual_nusd')} AS actual_usd, {_usd(_SAVED)} AS saved_usd, "
        f"{_ratio(_int('r.actual_nusd'), _int('COALESCE(r.in_tok, 0) + COALESCE(r.out_tok, 0)'))} / 1e3 AS usd_per_mtok "
        f"FROM request r WHERE {_DAYS} GROUP BY {_PAYER} ORDER BY actual_usd DESC, team",
        {
            "team": "project of the virtual keys, else the tenant's digest",
            "requests": "count",
            "actual_usd": "USD",
            "saved_usd": "USD",
            "usd_per_mtok": "USD per million visible tokens",
        },
    ),
    NamedQuery(
        "hit_rate",
        "How often does the cache answer, by requests and by money?",
        f"SELECT r.day AS day, {_ASKED} AS requests, {_ratio(_int(f'CASE WHEN {_HIT} THEN 1 ELSE 0 END'), _ASKED)} AS hit_rate, "
        f"{_ratio(_int(f'CASE WHEN {_HIT} THEN r.baseline_nusd ELSE 0 END'), _int('r.baseline_nusd'))} AS money_hit_rate "
        f"FROM request r WHERE {_DAYS} GROUP BY r.day ORDER BY r.day",
        {"day": "UTC", "requests": "count", "hit_rate": "share of requests", "money_hit_rate": "share of the baseline"},
    ),
    NamedQuery(
        "wrong_by_similarity",
        "Is the semantic cache safe? Judged-wrong share by similarity.",
        "SELECT b.band / 100.0 AS similarity, CAST(COUNT(*) AS BIGINT) AS hits, CAST(COUNT(b.wrong) AS BIGINT) AS judged, "
        f"{_ratio('SUM(b.wrong)', 'COUNT(b.wrong)')} AS wrong_share FROM (SELECT ROUND(r.similarity * 100 - 0.49999) "
        "AS band, COALESCE(f.wrong, a.wrong) AS wrong FROM request r LEFT JOIN (SELECT request_id, MAX(CASE WHEN verdict = "
        "'wrong' THEN 1.0 ELSE 0.0 END) AS wrong FROM feedback GROUP BY request_id) f ON f.request_id = r.id "
        "LEFT JOIN (SELECT request_id, MAX(1.0 - p_same) AS wrong FROM audit WHERE served = 1 GROUP BY request_id) a "
        "ON a.request_id = r.id "
        f"WHERE r.lane = 'cache.semantic' AND r.similarity IS NOT NULL AND {_DAYS}) b GROUP BY b.band ORDER BY b.band DESC",
        {
            "similarity": "lower edge of a band 0.01 wide",
            "hits": "count",
            "judged": "hits with feedback or an audit",
            "wrong_share": "share of the judged",
        },
    ),
    NamedQuery(
        "top_entries",
        "Which entries earn their disk?",
        f"SELECT r.entry_id AS entry_id, {_N} AS hits, {_usd(_SAVED)} AS saved_usd FROM request r "
        f"WHERE r.entry_id IS NOT NULL AND r.lane LIKE 'cache.%' AND {_DAYS} GROUP BY r.entry_id "
        "ORDER BY saved_usd DESC, hits DESC, entry_id LIMIT 20",
        {"entry_id": "id", "hits": "count", "saved_usd": "USD"},
    ),
    NamedQuery(
        "could_wait",
        "What would a half-price batch tier save, by tag?",
        f"SELECT r.tag AS tag, {_usd('u.cost_nusd')} AS default_tier_usd, {_usd('u.cost_nusd')} * 0.5 AS would_save_usd "
        f"FROM upstream_call u JOIN request r ON r.id = u.request_id WHERE u.tier = 'default' AND {_DAYS} "
        "GROUP BY r.tag ORDER BY default_tier_usd DESC, tag",
        {"tag": "request tag", "default_tier_usd": "USD", "would_save_usd": "USD at half price"},
    ),
    NamedQuery(
        "prompt_cache",
        "Does the providers' own prompt caching pay?",
        f"SELECT u.model AS model, {_ratio(_int('u.cache_read_tok'), _int('u.in_tok'))} AS read_share, "
        f"{_int('u.cache_write_tok')} AS write_tok FROM upstream_call u JOIN request r ON r.id = u.request_id "
        f"WHERE {_DAYS} GROUP BY u.model ORDER BY u.model",
        {"model": "name", "read_share": "share of input tokens", "write_tok": "tokens"},
    ),
    NamedQuery(
        "latency",
        "What latency did each lane give? Nearest rank.",
        "WITH t AS (SELECT r.lane AS lane, r.total_ms AS ms, ROW_NUMBER() OVER (PARTITION BY r.lane ORDER BY r.total_ms) "
        f"AS i, COUNT(*) OVER (PARTITION BY r.lane) AS n FROM request r WHERE {_DAYS}) SELECT lane, "
        "CAST(MAX(n) AS BIGINT) AS requests, MAX(CASE WHEN i <= (n * 50 + 99) / 100 THEN ms END) AS p50_ms, "
        "MAX(CASE WHEN i <= (n * 95 + 99) / 100 THEN ms END) AS p95_ms FROM t GROUP BY lane ORDER BY lane",
        {"lane": "mechanism, forward or bypass", "requests": "count", "p50_ms": "ms", "p95_ms": "ms"},
    ),
)

NAMED: dict[str, NamedQuery] = {query.name: query for query in _QUERIES}

GROUPS = {
    "day": "r.day",
    "model": "r.model_requested",
    "tenant": "r.tenant",
    "team": "r.team",
    "upstream": "r.upstream",
    "namespace": "r.namespace",
}


def grouped(group_by: Sequence[str]) -> str:
    """The summary by columns of GROUPS and "strategy", which the caller has checked."""
    names = {**GROUPS, "strategy": "s.family"}
    keys = ", ".join(names[name] for name in group_by)
    shown = ", ".join(f"{names[name]} AS {name}" for name in group_by)
    if "strategy" in group_by:
        return (
            f"SELECT {shown}, CAST(COUNT(DISTINCT r.id) AS BIGINT) AS requests, {_usd('s.before_nusd')} AS before_usd, "
            f"{_usd('s.after_nusd')} AS after_usd, {_usd('s.saved_nusd')} AS saved_usd FROM saving s "
            f"JOIN request r ON r.id = s.request_id WHERE {_DAYS} GROUP BY {keys} ORDER BY {keys}"
        )
    hits = _int(f"CASE WHEN {_HIT} THEN 1 ELSE 0 END")
    return (
        f"SELECT {shown}, {_ASKED} AS requests, {hits} AS hits, {_usd('r.baseline_nusd')} AS baseline_usd, "
        f"{_usd('r.actual_nusd')} AS actual_usd, {_usd(_SAVED)} AS saved_usd FROM request r WHERE {_DAYS} "
        f"GROUP BY {keys} ORDER BY {keys}"
    )
