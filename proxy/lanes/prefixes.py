"""Marks for the provider's own prefix cache: `cache_control` for Anthropic, `prompt_cache_key` for OpenAI.

Only what the client left to us is marked. A key helps OpenAI to reads that it would have given anyway, so it books no
saving; a breakpoint makes reads that there would not have been, and writes that may cost extra.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import orjson

from proxy.core.dialects.anthropic import Messages
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.dialects.responses import Responses
from proxy.core.jsontext import set_member
from proxy.core.prefix import PrefixMemory, anthropic_breakpoints, inject, minimum_tokens, openai_cache_key
from proxy.records import Fetch
from proxy.settings.lanes import PrefixLane
from proxy.upstreams.sending import Sending

MECHANISM: Final = "cache.prefix"
REFUSALS: Final = 1_024  # remembered, each for REFUSED_S
REFUSED_S: Final = 3600.0

WritesCostExtra = Callable[[str, str, int], bool]
"""(upstream, model, ts_ms) → whether writing to the provider's cache is dearer than plain input."""


class PrefixMarks:
    """Memory of one process, bounded. Lives on the event loop."""

    def __init__(self, lane: PrefixLane, secret: bytes, writes_cost_extra: WritesCostExtra) -> None:
        self._secret = secret
        self._writes_cost_extra = writes_cost_extra
        self._memory = PrefixMemory(lane.lifetime_s)
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
        body = orjson.loads(sending.body)
        decision = self._memory.decide(
            anthropic_breakpoints(body, self._salt(fetch, sending)),
            time.monotonic(),
            least_tokens=minimum_tokens(sending.model),
            writes_cost_extra=self._writes_cost_extra(sending.upstream, sending.model, fetch.client.ts_ms),
        )
        if not decision.places:
            return sending
        return sending.by(MECHANISM, body=orjson.dumps(inject(body, decision.places)))

    def refused(self, sending: Sending) -> None:
        """An upstream did not take a call that was shaped."""
        if MECHANISM in sending.shaped_by:
            if len(self._refused_until) >= REFUSALS:  # the models are of clients' naming
                del self._refused_until[next(iter(self._refused_until))]
            self._refused_until[sending.upstream, sending.model] = time.monotonic() + REFUSED_S

    def _salt(self, fetch: Fetch, sending: Sending) -> bytes:
        named = f"{fetch.asked.tenant}\0{sending.upstream}".encode()
        return hashlib.sha256(b"prefix\0" + self._secret + named).digest()
