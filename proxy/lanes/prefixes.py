"""Marks for the provider's own prefix cache: `cache_control` for Anthropic, `prompt_cache_key` for OpenAI.

Only what the client left to us is marked. A key helps OpenAI to reads that it would have given anyway, so it books no
saving; a breakpoint makes reads that there would not have been, and writes that may cost extra. So breakpoints go only
to models of which the price list says that reads are cheaper, and rest where they were measured not to pay.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol

import orjson

from proxy import ports
from proxy.core.dialects.anthropic import Messages
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.dialects.responses import Responses
from proxy.core.jsontext import set_member
from proxy.core.model import Usage
from proxy.core.prefix import (
    BYTES_PER_TOKEN,
    Balance,
    PrefixMemory,
    anthropic_breakpoints,
    inject,
    minimum_tokens,
    openai_cache_key,
    without_breakpoints,
)
from proxy.core.rates import Rate, reads_cost_less, writes_cost_extra
from proxy.records import Fetch
from proxy.settings.lanes import PrefixLane
from proxy.upstreams.sending import Sending

MECHANISM: Final = "cache.prefix"
REFUSALS: Final = 1_024  # remembered, each for REFUSED_S
REFUSED_S: Final = 3600.0


class Prices(ports.PriceBook, Protocol):
    """What this needs of the price list."""

    def rates(self, upstream: str, model: str, tier: str, ts_ms: int) -> Sequence[Rate] | None: ...


class PrefixMarks:
    """Memory of one process, bounded. Lives on the event loop."""

    def __init__(self, lane: PrefixLane, secret: bytes, prices: Prices) -> None:
        self._secret = secret
        self._prices = prices
        self._memory = PrefixMemory(lane.lifetime_s)
        self._balance = Balance()
        self._refused_until: dict[tuple[str, str], float] = {}

    def mark(self, sending: Sending, fetch: Fetch) -> Sending:
        """The call with its marks, or as it was."""
        dialect = fetch.asked.dialect
        if self._refused_until.get((sending.upstream, sending.model), 0.0) > time.monotonic():
            return sending
        if isinstance(dialect, Messages):
            return self._with_breakpoints(sending, fetch)
        if isinstance(dialect, OpenAIChat | Responses):
            key = openai_cache_key(orjson.loads(sending.body), self._salt(fetch, sending))
            if key is not None:
                return replace(sending, body=set_member(sending.body, "prompt_cache_key", orjson.dumps(key)))
        return sending

    def _with_breakpoints(self, sending: Sending, fetch: Fetch) -> Sending:
        least_tokens, now_s = minimum_tokens(sending.model), time.monotonic()
        if len(sending.body) < BYTES_PER_TOKEN * least_tokens:
            return sending
        rates = self._prices.rates(sending.upstream, sending.model, sending.tier, fetch.client.ts_ms)
        if not reads_cost_less(rates) or self._balance.rests(_whose(fetch, sending), now_s):
            return sending
        decision = self._memory.decide(
            anthropic_breakpoints(orjson.loads(sending.body), self._salt(fetch, sending)),
            now_s,
            least_tokens=least_tokens,
            writes_cost_extra=writes_cost_extra(rates),
        )
        if not decision.places:
            return sending
        return sending.by(MECHANISM, body=inject(sending.body, decision.places))

    def learn(self, fetch: Fetch, sending: Sending, usage: Usage) -> None:
        """What a call with breakpoints cost, beside what it would have cost without."""
        there = sending.upstream, sending.model
        bare, paid = (
            self._prices.price(*there, counted, sending.tier, fetch.client.ts_ms).nusd
            for counted in (without_breakpoints(usage), usage)
        )
        self._balance.see(_whose(fetch, sending), bare - paid, time.monotonic())

    def refused(self, sending: Sending) -> None:
        """An upstream did not take a call with breakpoints that it took without."""
        if MECHANISM in sending.shaped_by:
            if len(self._refused_until) >= REFUSALS:  # the models are of clients' naming
                del self._refused_until[next(iter(self._refused_until))]
            self._refused_until[sending.upstream, sending.model] = time.monotonic() + REFUSED_S

    def _salt(self, fetch: Fetch, sending: Sending) -> bytes:
        named = f"{fetch.asked.tenant}\0{sending.upstream}".encode()
        return hashlib.sha256(b"prefix\0" + self._secret + named).digest()


def _whose(fetch: Fetch, sending: Sending) -> tuple[str, str, str]:
    return fetch.asked.tenant, sending.upstream, sending.model
