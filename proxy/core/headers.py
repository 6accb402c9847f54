"""The headers ibid reads and sends, each with what it does: `directives` reads these names, the pages list them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Asked(NamedTuple):
    """One control. `twin`: the member of the body's `cache` object that does the same, or ""."""

    header: str
    twin: str
    does: str

    @property
    def name(self) -> str:
        return self.header.partition(":")[0].lower()


ASKED: Final[tuple[Asked, ...]] = (
    Asked("Cache-Control: no-cache", '"no-cache": true', "ask the model server anew and store the new answer"),
    Asked("Cache-Control: no-store", '"no-store": true', "neither look up nor store"),
    Asked("Cache-Control: max-age=60", '"s-maxage": 60', "only answers of at most this age, in seconds"),
    Asked("Cache-Control: max-stale=60", "", "also answers that expired no longer ago than this, while they are kept"),
    Asked("Cache-Control: only-if-cached", "", "never ask the model server: 504 `not_cached` instead"),
    Asked("x-cache-mode: off", '"mode": "off"', "neither look up nor store; also `use-cache: false` in the body"),
    Asked("x-cache-mode: read", '"mode": "read"', "look up, but store nothing"),
    Asked("x-cache-mode: write", '"mode": "write"', "store, but do not look up"),
    Asked("x-cache-mode: exact", '"mode": "exact"', "no semantic hits"),
    Asked("x-cache-mode: semantic", '"mode": "semantic"', "the default; allows nothing the operator forbids"),
    Asked("x-cache-mode: shadow", '"mode": "shadow"', "look up and tell, but ask the model server all the same"),
    Asked("x-cache-mode: refresh", '"mode": "refresh"', "the same as `no-cache`"),
    Asked("x-cache-ttl: 3600", '"ttl": 3600', "how long the answer is kept, in seconds, up to `cache.max_ttl_s`"),
    Asked("x-cache-namespace: docs", '"namespace": "docs"', "a separate part of the cache"),
    Asked("x-cache-tags: doc:42,team:a", '"tags": ["doc:42"]', "up to 16 marks to purge by; the ledger has the first"),
    Asked("x-cache-max-error: 0.005", "", "a tighter `max_error_rate` for this request; a looser one has no effect"),
    Asked("x-cache-sample: 3", "", "which of several answers to one question; each is kept under its own name"),
    Asked("x-cache-user: u1", "", "the end user: nobody else is served this answer"),
    Asked(
        "x-cache-pace: recorded", "", "a streamed hit as fast as it first came, `instant`, or so many tokens a second"
    ),
    Asked("x-cache-explain: 1", "", "the response's `x-cache-explain` tells how it was decided, as JSON"),
    Asked("x-plan: +hedge,-semantic", '"plan": "…"', "lanes to add or leave out, or the whole list"),
    Asked("x-deadline: 24h", "", "how long the answer may take (s, m, h, d): cheaper ways are tried first"),
    Asked("Prefer: respond-async", "", "202 at once; the answer is fetched from `Location` later"),
)

TOLD: Final[Mapping[str, str]] = {
    "Cache-Status": "RFC 9211: `hit` with `ttl`, or `fwd=miss`, `stale`, `request`, `bypass` with `fwd-status`; "
    "`collapsed`; `detail` is the tier or the reason",
    "x-cache": "HIT, MISS, BYPASS, STALE, REFRESH or SHADOW",
    "x-cache-tier": "how it was served, or in shadow would have been: exact, semantic, collapsed, stale, edge, or "
    "failover: by another upstream",
    "x-cache-similarity": "-1 to 1, of the closest stored question",
    "x-cache-confidence": "how probable it is that one answer serves both questions, 0 to 1",
    "x-cache-entry": "id of the stored answer, for `ibid explain`, feedback and purges",
    "x-cache-reason": "why it was not served, see [reasons](verdicts.md#reasons)",
    "x-cache-partial": "embeddings: how many of how many inputs came from the cache, as in 90/100",
    "Age": "seconds since the answer was stored",
    "x-cache-saved-usd": "list price that was not spent",
    "x-cost-usd": "what the request cost; a stream's cost is only in the ledger",
    "x-upstream": "the configured name of the server that answered",
    "x-plan": "the lanes that were allowed, in the order in which they act",
    "x-request-id": "id of the request's row in the ledger",
}

PEERS: Final[Mapping[str, str]] = {
    "cf-aig-skip-cache": "off",
    "cf-aig-cache-ttl": "ttl",
    "cf-aig-cache-key": "key",
    "x-portkey-cache-force-refresh": "refresh",
    "x-portkey-cache-namespace": "key",
    "helicone-cache-enabled": "on",
    "helicone-cache-seed": "key",
    "x-bf-cache-key": "key",
    "x-bf-cache-ttl": "ttl",
    "x-bf-cache-type": "type",
    "x-bf-cache-no-store": "no_store",
    "x-vsr-cache-control": "control",
    "x-openrouter-cache": "on",
    "x-openrouter-cache-ttl": "ttl",
    "x-openrouter-cache-clear": "refresh",
    "x-higress-skip-ai-cache": "off",
}
"""What other gateways call it → what it means here, so that moving to ibid is a change of base URL.

A key of the client's own becomes a namespace: it keeps requests apart and never joins them. Thresholds are not here:
ibid takes none.
"""

MEANT: Final[Mapping[str, str]] = {
    "off": "`true` is `x-cache-mode: off`",
    "on": "`false` is `x-cache-mode: off`",
    "refresh": "`true` is `x-cache-mode: refresh`",
    "ttl": "`x-cache-ttl`",
    "key": "`x-cache-namespace`: keeps requests apart, never joins them",
    "type": "`direct` is `x-cache-mode: exact`",
    "no_store": "`true` stores nothing",
    "control": "as `Cache-Control`; `bypass` and `ttl=` too",
}
"""What a meaning of PEERS does."""
