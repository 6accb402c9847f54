"""Weeks of a busy team, written into the ledger as if they had happened: for pages that show what time makes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from proxy.core.model import Call, Outcome, Usage
from proxy.core.units import DAY_MS
from proxy.store.ledger import SqlLedger

MODELS = ("gpt-4o-mini", "gpt-4o", "claude-sonnet-4-5")
TEAMS = ("support", "search", "")
MIX = (
    ("cache.exact", 27), ("cache.semantic", 16), ("stream.coalesce", 5), ("hedged", 3), ("batch", 4),
    ("bypass", 6), (None, 39),
)  # fmt: skip
"""What answered, and how often in a hundred; the cache warms up over the weeks."""


def outcomes(now_ms: int, days: int, requests: int, entries: Sequence[int], seed: int = 1) -> Iterator[Outcome]:
    """So many requests up to now, in the order of time. `entries`: what hits were served from."""
    chance = random.Random(seed)
    begin = now_ms - days * DAY_MS
    for number in range(requests):
        ts_ms = begin + (now_ms - begin) * number // requests
        kinds, weights = zip(*MIX, strict=True)
        (kind,) = chance.choices(kinds, weights)
        if kind is not None and kind.startswith("cache.") and chance.random() > 0.25 + 0.75 * number / requests:
            kind = None
        yield _outcome(f"m-{seed}-{number}", ts_ms, kind, entries, chance)


def _outcome(name: str, ts_ms: int, kind: str | None, entries: Sequence[int], chance: random.Random) -> Outcome:
    usage = Usage(chance.randint(80, 2400), chance.randint(20, 700))
    model = chance.choices(MODELS, (70, 20, 10))[0]
    upstream = "anthropic" if model.startswith("claude") else "openai"
    slow_ms = chance.lognormvariate(6.9, 0.45)
    is_hit = kind in ("cache.exact", "cache.semantic", "stream.coalesce")
    if is_hit:
        calls: tuple[Call, ...] = ()
        took_ms = {"cache.exact": 0.4, "cache.semantic": 9.0}.get(str(kind), 350.0) * chance.lognormvariate(0, 0.4)
    else:
        took_ms = slow_ms
        calls = (_call(f"{name}-c", ts_ms, upstream, model, usage, slow_ms,
                       "batch" if kind == "batch" else "default"),)  # fmt: skip
        if kind == "hedged":
            calls += (
                _call(f"{name}-h", ts_ms, upstream, model, usage, slow_ms, "default", purpose="hedge", won=False),
            )
    return Outcome(
        request_id=name,
        ts_ms=ts_ms,
        tenant="t" * 64,
        namespace="",
        tag="",
        dialect="openai",
        endpoint="/v1/chat/completions",
        stream=chance.random() < 0.6,
        model_requested=model,
        model_served=model,
        upstream=upstream,
        mechanism=kind if is_hit else None,
        cache_status="HIT" if is_hit else "BYPASS" if kind == "bypass" else "MISS",
        reason={None: "no_candidate", "bypass": "tools", "hedged": "under_threshold", "batch": ""}.get(kind, ""),
        similarity=chance.uniform(0.9, 0.99) if kind == "cache.semantic" else None,
        entry_id=chance.choice(entries) if entries and str(kind).startswith("cache.") else None,
        usage=usage,
        usage_basis="measured",
        calls=calls,
        baseline_ms=slow_ms if is_hit else None,
        team=chance.choice(TEAMS),
        ttft_ms=took_ms * 0.3,
        total_ms=took_ms,
    )


def _call(
    name: str, ts_ms: int, upstream: str, model: str, usage: Usage, took_ms: float, tier: str,
    purpose: str = "answer", won: bool = True,
) -> Call:  # fmt: skip
    return Call(
        id=name, ts_ms=ts_ms, upstream=upstream, model=model, purpose=purpose, tier=tier, won=won, usage=usage,
        usage_basis="measured", status=200, ttft_ms=took_ms * 0.3, total_ms=took_ms,
    )  # fmt: skip


async def write(ledger: SqlLedger, made: Iterator[Outcome], flush_every: int = 2_000) -> None:
    """Into the ledger, as requests write theirs."""
    for number, outcome in enumerate(made, 1):
        ledger.record(outcome)
        if number % flush_every == 0:
            await ledger.flush()
    await ledger.flush()
