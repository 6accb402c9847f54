"""Builders of drafts, calls and outcomes for the store's tests, and a price list small enough to check by hand."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from proxy.core.model import Call, Draft, Outcome, Usage
from proxy.core.purges import Began
from proxy.core.rates import Rate
from proxy.ports import Price

NOON_MS = 1_795_348_800_000  # 2026-11-22 12:00 UTC
HOUR_MS = 3_600_000
NOW = Began(0, NOON_MS)
"""When no purge was made yet."""


def list_price(upstream: str, model: str, usage: Usage, tier: str, ts_ms: int, seconds: float = 0.0) -> Price:
    """1,000 nano-dollars an input token, 4,000 an output token, half of it on flex; "free" models have no price, those
    of "edge" cost 700 a second; what is read from a prefix cache costs 100, what is written to it 1,250."""
    if model == "free":
        return Price(0, "unpriced", "")
    if upstream == "edge":
        return Price(round(700 * seconds), "override", "test edge/*")
    nusd = usage.input_tokens * 1_000 + usage.output_tokens * 4_000
    nusd += usage.cache_write_tokens * 250 - min(usage.cache_read_tokens, usage.input_tokens) * 900
    return Price(nusd // 2 if tier == "flex" else nusd, "list", f"test {upstream}/{model}")


def list_rates(upstream: str, model: str, tier: str, ts_ms: int) -> tuple[Rate, ...] | None:
    """The same in pico-dollars a token, half of it in a batch too; a cache read costs a tenth of it, a write 1.25."""
    if model == "free":
        return None
    share = 2 if tier in ("flex", "batch") else 1
    return (Rate(-1, *(pusd // share for pusd in (1_000_000, 4_000_000, 100_000, 1_250_000))),)


def digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def draft(name: str = "a", **changes: Any) -> Draft:
    """A storable answer whose fingerprint follows from its name."""
    embedding = np.random.default_rng(int.from_bytes(digest(name)[:4], "little")).normal(size=8).astype("<f4")
    embedding /= np.linalg.norm(embedding)
    fields: dict[str, Any] = {
        "scope": digest("scope"), "fingerprint": digest(name), "tenant": "t" * 64, "namespace": "", "model": "m",
        "upstream": "openai", "operation": "chat", "prompt": f"question {name}", "answer": f"answer {name}".encode(),
        "usage": Usage(10, 5, 2, 1), "created_ms": NOON_MS, "expires_ms": NOON_MS + HOUR_MS, "request_id": f"r-{name}",
        "total_ms": 812.5, "tags": (), "embedding": embedding.tobytes(), "embedder": "e1",
        "signature": np.arange(4, dtype="<u8").tobytes(),
    }  # fmt: skip
    return Draft(**{**fields, **changes})


def call(name: str = "c", **changes: Any) -> Call:
    fields: dict[str, Any] = {
        "id": name, "ts_ms": NOON_MS, "upstream": "openai", "model": "m", "purpose": "answer", "tier": "default",
        "won": True, "usage": Usage(100, 20), "usage_basis": "measured", "status": 200, "ttft_ms": 90.0,
        "total_ms": 800.0,
    }  # fmt: skip
    return Call(**{**fields, **changes})


def outcome(name: str = "q", **changes: Any) -> Outcome:
    """A forward that cost 180,000 nano-dollars; give `mechanism` and `calls=()` for a hit."""
    fields: dict[str, Any] = {
        "request_id": name, "ts_ms": NOON_MS, "tenant": "t" * 64, "namespace": "", "tag": "", "dialect": "openai",
        "endpoint": "/v1/chat/completions", "stream": False, "model_requested": "m", "model_served": "m",
        "upstream": "openai", "mechanism": None, "outcome": "ok", "cache_status": "MISS", "reason": "nothing_alike",
        "status": 200, "similarity": None, "entry_id": None, "retry_of": None, "usage": Usage(100, 20),
        "usage_basis": "measured", "calls": (call(f"{name}-call"),), "ttft_ms": 90.0, "total_ms": 800.0,
        "baseline_ms": None, "tier": "default", "key_id": None, "team": "",
    }  # fmt: skip
    return Outcome(**{**fields, **changes})


def hit(name: str = "h", mechanism: str = "cache.exact", **changes: Any) -> Outcome:
    return outcome(
        name,
        **{"mechanism": mechanism, "calls": (), "cache_status": "HIT", "reason": "hit", "entry_id": 1, "total_ms": 2.0,
           "baseline_ms": 800.0, "similarity": 1.0, **changes},
    )  # fmt: skip
