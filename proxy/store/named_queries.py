# ruff: noqa: E501  SQL reads better in whole clauses
"""The named savings queries (reference protocols §3.5, Q1 to Q12), portable, each with its columns and units.

Money leaves as USD (double precision of an exact integer sum), counts as whole numbers, shares as 0…1, times in
milliseconds. `:since` and `:until` are UTC days, both inclusive; what is asked of calls alone goes by the time of the
call (`:since_ms` ≤ ts < `:until_ms`), as an invoice does.

A query that prices tokens reads a table `rate`, which `with_rates` puts in front of it: whole pico-dollars a token by
upstream, model, tier and size of the input, from the price list in force at the last call. A cost is rounded to
nano-dollars call by call, half up, before it is summed, so that a sum stays an exact integer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.core.rates import Rate
from proxy.core.units import HOUR_MS


@dataclass(frozen=True, slots=True)
class NamedQuery:
    """`columns`: name → what it is and its unit, in the order of the result. `priced`: it reads the table `rate`."""

    name: str
    title: str
    sql: str
    columns: Mapping[str, str]
    priced: bool = False


_HIT = "(r.lane LIKE 'cache.%' OR r.lane = 'stream.coalesce')"
_DAYS = "r.day >= :since AND r.day <= :until"
_CALLED = "u.ts >= CAST(:since_ms AS BIGINT) AND u.ts < CAST(:until_ms AS BIGINT)"


def _int(expression: str) -> str:
    return f"CAST(COALESCE(SUM({expression}), 0) AS BIGINT)"


def _usd(expression: str) -> str:
    return f"CAST({_int(expression)} AS DOUBLE PRECISION) / 1e9"


def _ratio(part: str, whole: str) -> str:
    return f"CAST({part} AS DOUBLE PRECISION) / NULLIF(CAST({whole} AS DOUBLE PRECISION), 0)"


_N = "CAST(COUNT(*) AS BIGINT)"
_ASKED = _int("CASE WHEN r.lane = 'audit' THEN 0 ELSE 1 END")  # an audit is ours, not a client's
_UNMEASURED = "CASE WHEN u.usage_basis = 'measured' THEN 0 ELSE 1 END"
_UNPRICED = "CASE WHEN u.cost_basis = 'unpriced' THEN 1 ELSE 0 END"
_SAVED = "r.baseline_nusd - r.actual_nusd"
_READ, _WRITE = "COALESCE(u.cache_read_tok, 0)", "COALESCE(u.cache_write_tok, 0)"
_PLAIN = f"CASE WHEN u.in_tok >= {_READ} + {_WRITE} THEN u.in_tok - {_READ} - {_WRITE} ELSE u.in_tok END"


def _rated(tier: str) -> str:
    """The join of a call with what its tokens would cost in a tier; no row where that is not known."""
    return (
        f"LEFT JOIN rate p ON p.upstream = u.upstream AND p.model = u.model AND p.tier = {tier} "
        "AND u.in_tok > p.above AND u.in_tok <= p.upto"
    )


_BATCH, _BILLED = _rated("'batch'"), _rated("u.tier")


def _nusd(pusd: str) -> str:
    """A call's pico-dollars in whole nano-dollars. Both databases cut integer division towards zero."""
    return f"(({pusd}) + 500) / 1000"


LATELY = 5_000
"""Requests that a page looks at where it would else sort them all."""


def _latency(requests: str) -> str:
    """Percentiles of the lane, ttft_ms and total_ms of these."""
    return (
        "WITH t AS (SELECT r.lane AS lane, r.ttft_ms AS ttft_ms, r.total_ms AS ms, "
        "ROW_NUMBER() OVER (PARTITION BY r.lane ORDER BY CASE WHEN r.ttft_ms IS NULL THEN 1 ELSE 0 END, r.ttft_ms) AS k, "
        "COUNT(r.ttft_ms) OVER (PARTITION BY r.lane) AS m, "
        "ROW_NUMBER() OVER (PARTITION BY r.lane ORDER BY r.total_ms) AS i, COUNT(*) OVER (PARTITION BY r.lane) AS n "
        f"FROM ({requests}) r) SELECT lane, CAST(MAX(n) AS BIGINT) AS requests, "
        "MAX(CASE WHEN k <= (m * 50 + 99) / 100 THEN ttft_ms END) AS ttft_p50_ms, "
        "MAX(CASE WHEN k <= (m * 95 + 99) / 100 THEN ttft_ms END) AS ttft_p95_ms, "
        "MAX(CASE WHEN i <= (n * 50 + 99) / 100 THEN ms END) AS p50_ms, "
        "MAX(CASE WHEN i <= (n * 95 + 99) / 100 THEN ms END) AS p95_ms FROM t GROUP BY lane ORDER BY lane"
    )


_LATENCY_COLUMNS = {
    "lane": "mechanism, forward, bypass, audit or refused",
    "requests": "count",
    "ttft_p50_ms": "ms to the first byte",
    "ttft_p95_ms": "ms to the first byte",
    "p50_ms": "ms to the last byte",
    "p95_ms": "ms to the last byte",
}

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
        f"{_int('u.cache_read_tok')} AS cache_read_tok, {_int('u.cache_write_tok')} AS cache_write_tok, "
        f"{_int('u.out_tok')} AS out_tok, {_usd('u.cost_nusd')} AS cost_usd, {_int(_UNMEASURED)} AS unmeasured, "
        f"{_int(_UNPRICED)} AS unpriced "
        f"FROM upstream_call u WHERE {_CALLED} "
        "GROUP BY u.upstream, u.model, u.tier ORDER BY u.upstream, u.model, u.tier",
        {
            "upstream": "name",
            "model": "name",
            "tier": "service tier",
            "calls": "count",
            "in_tok": "tokens, cache reads and writes included",
            "cache_read_tok": "tokens",
            "cache_write_tok": "tokens",
            "out_tok": "tokens",
            "cost_usd": "USD",
            "unmeasured": "calls whose usage the provider did not tell",
            "unpriced": "calls without a known price, at 0 USD",
        },
    ),
    NamedQuery(
        "waste",
        "What was paid for work nobody received?",
        f"SELECT u.purpose AS purpose, {_N} AS calls, {_int('u.in_tok')} AS in_tok, {_int('u.out_tok')} AS out_tok, "
        f"{_usd('u.cost_nusd')} AS cost_usd FROM upstream_call u WHERE u.won = 0 AND {_CALLED} GROUP BY u.purpose "
        "ORDER BY cost_usd DESC, purpose",
        {
            "purpose": "why it was sent",
            "calls": "count",
            "in_tok": "tokens",
            "out_tok": "tokens",
            "cost_usd": "USD",
        },
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
        "What would a batch have saved, by tag, at each model's own batch price?",
        f"SELECT c.tag AS tag, {_N} AS calls, {_usd('c.cost_nusd')} AS default_tier_usd, "
        f"{_usd('CASE WHEN c.batch_nusd IS NULL THEN 0 ELSE c.cost_nusd END')} AS batchable_usd, "
        f"{_usd('c.batch_nusd')} AS batch_usd, {_usd('c.cost_nusd - c.batch_nusd')} AS would_save_usd FROM "
        "(SELECT r.tag AS tag, u.cost_nusd AS cost_nusd, "
        + _nusd(f"({_PLAIN}) * p.input + u.out_tok * p.output + {_READ} * p.cache_read + {_WRITE} * p.cache_write")
        + f" AS batch_nusd FROM upstream_call u JOIN request r ON r.id = u.request_id {_BATCH} "
        f"WHERE u.tier = 'default' AND {_CALLED}) c GROUP BY c.tag ORDER BY would_save_usd DESC, tag",
        {
            "tag": "first tag of the request",
            "calls": "count, of the default tier",
            "default_tier_usd": "USD paid",
            "batchable_usd": "USD of it for models whose batch price is known",
            "batch_usd": "USD these would have cost in a batch",
            "would_save_usd": "USD, the difference of the two",
        },
        priced=True,
    ),
    NamedQuery(
        "prompt_cache",
        "Does the providers' own prompt caching pay, at each model's own rates?",
        f"SELECT c.upstream AS upstream, c.model AS model, {_N} AS calls, {_int('c.in_tok')} AS in_tok, "
        f"{_int('c.read_tok')} AS read_tok, {_int('c.write_tok')} AS write_tok, "
        f"{_ratio(_int('c.read_tok'), _int('c.in_tok'))} AS read_share, {_usd('c.won_nusd')} AS reads_saved_usd, "
        f"{_usd('c.spent_nusd')} AS writes_cost_usd, {_usd('c.won_nusd - c.spent_nusd')} AS net_usd, "
        f"{_int('c.unpriced')} AS unpriced FROM (SELECT u.upstream AS upstream, u.model AS model, u.in_tok AS in_tok, "
        f"{_READ} AS read_tok, {_WRITE} AS write_tok, {_nusd(f'{_READ} * (p.input - p.cache_read)')} AS won_nusd, "
        f"{_nusd(f'{_WRITE} * (p.cache_write - p.input)')} AS spent_nusd, "
        "CASE WHEN p.tier IS NULL AND u.in_tok IS NOT NULL THEN 1 ELSE 0 END AS unpriced "
        f"FROM upstream_call u {_BILLED} WHERE {_CALLED}) c "
        "GROUP BY c.upstream, c.model ORDER BY net_usd DESC, upstream, model",
        {
            "upstream": "name",
            "model": "name",
            "calls": "count",
            "in_tok": "tokens, cache reads and writes included",
            "read_tok": "tokens",
            "write_tok": "tokens",
            "read_share": "share of input tokens",
            "reads_saved_usd": "USD below the input price",
            "writes_cost_usd": "USD above the input price",
            "net_usd": "USD",
            "unpriced": "calls whose rates are not known, left out of the three before",
        },
        priced=True,
    ),
    NamedQuery(
        "latency",
        "What latency did each lane give, to the first byte and to the last? Nearest rank.",
        _latency(f"SELECT r.lane, r.ttft_ms, r.total_ms FROM request r WHERE {_DAYS}"),
        _LATENCY_COLUMNS,
    ),
    NamedQuery(
        "latency_lately",
        f"What latency did each lane give, of the newest {LATELY:,} requests?",
        _latency(
            f"SELECT r.lane, r.ttft_ms, r.total_ms FROM request r WHERE {_DAYS} "
            f"ORDER BY r.day DESC, r.ts DESC, r.id DESC LIMIT {LATELY}"
        ),
        _LATENCY_COLUMNS,
    ),
)

NAMED: dict[str, NamedQuery] = {query.name: query for query in _QUERIES}

PRICED_CALLS = (
    "SELECT u.upstream, u.model, u.tier, CAST(MAX(u.ts) AS BIGINT) FROM upstream_call u "
    f"WHERE u.in_tok IS NOT NULL AND {_CALLED} GROUP BY u.upstream, u.model, u.tier "
    "ORDER BY SUM(u.cost_nusd) DESC, u.upstream, u.model, u.tier"
)
"""Upstream, model, tier and last call of all that tokens were billed for, the dearest first."""

MOST_TOKENS = 2**62


@dataclass(frozen=True, slots=True)
class Rated:
    """Rates of a model in a tier, as `Rate` orders them."""

    upstream: str
    model: str
    tier: str
    rates: Sequence[Rate]


def with_rates(sql: str, rated: Sequence[Rated]) -> tuple[str, dict[str, Any]]:
    """The text with the table `rate` in front, and its parameters. Names are bound, numbers stand in the text."""
    rows: list[str] = []
    names: dict[str, Any] = {}
    for number, one in enumerate(rated):
        upto = MOST_TOKENS
        names |= {f"u{number}": one.upstream, f"m{number}": one.model, f"t{number}": one.tier}
        key = f"CAST(:u{number} AS TEXT), CAST(:m{number} AS TEXT), CAST(:t{number} AS TEXT)"
        for rate in one.rates:
            numbers = (rate.above, upto, rate.input, rate.output, rate.cache_read, rate.cache_write)
            rows.append(f"({key}, {', '.join(f'CAST({number} AS BIGINT)' for number in numbers)})")
            upto = rate.above
    table = f"VALUES {', '.join(rows)}" if rows else _NO_RATES
    columns = "upstream, model, tier, above, upto, input, output, cache_read, cache_write"
    return f"WITH rate ({columns}) AS ({table}) {sql}", names


_NO_RATES = (
    "SELECT CAST('' AS TEXT), CAST('' AS TEXT), CAST('' AS TEXT), "
    + ", ".join(["CAST(0 AS BIGINT)"] * 6)
    + " WHERE 1 = 0"
)

GROUPS = {
    "day": "r.day",
    "hour": f"r.ts / {HOUR_MS} * {HOUR_MS}",
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
