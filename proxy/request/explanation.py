"""How a lookup came to its verdict: told to the client that asks for it, and kept with the ledger row.

`x-cache-explain: 1` brings back one header of compact JSON; the client sees its own scope only. The record is what
`ibid explain REQUEST_ID` and `GET /requests/{id}` tell the operator later, when the cache has changed. Neither has text
of a prompt or an answer in it.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxy.core import policy
from proxy.core.directives import header_text
from proxy.core.query import Query
from proxy.judging.judge import Judged, Opinion, finite
from proxy.records import Fetch, Lookup

HEADER = "x-cache-explain"
CANDIDATES = 3  # a header has to fit into 8 KiB with the others


def explanation(query: Query, lookup: Lookup) -> tuple[str, str]:
    """The header's name and value."""
    said = {"scope": query.scope.hex()[:8], "verdict": lookup.verdict.reason, **_told(query, lookup)}
    return HEADER, header_text(orjson.dumps(said).decode())


def of_lookup(query: Query, lookup: Lookup) -> str:
    """The record of a request that was answered from what was found."""
    return orjson.dumps(_told(query, lookup)).decode()


def recorded(query: Query, fetch: Fetch, collapsed: bool) -> str:
    """The record of a request that ended otherwise: with an answer fetched for it, or for another's that it joined."""
    said = {"joined": fetch.client.request_id} if collapsed else _told(query, fetch.lookup)
    if fetch.unstored:
        said["unstored"] = fetch.unstored
    return orjson.dumps(said).decode()


def _told(query: Query, lookup: Lookup) -> dict[str, Any]:
    eligibility, opinion = query.eligibility, lookup.opinion
    said: dict[str, Any] = {
        "level": eligibility.level.value,
        "limited_by": eligibility.reason,
        "plan": query.plan.text,
        "steps_ms": {name: round(spent_ms, 3) for name, spent_ms in lookup.steps_ms.items()},
    }
    if opinion is not None:
        said["max_error"] = opinion.max_error
        said["proven_from"] = finite(opinion.thresholds.proven)
        said["provisional_from"] = finite(opinion.thresholds.provisional)
        said["has_room"] = opinion.has_room
        said["evidence_of"] = opinion.level
        said["candidates"] = [_shown(judged, opinion) for judged in opinion.judged[:CANDIDATES]]
    return said


def _shown(judged: Judged, opinion: Opinion) -> dict[str, Any]:
    candidate = judged.candidate
    logit = opinion.logits.get(candidate.entry_id)
    return {
        "entry": candidate.entry_id,
        "similarity": round(candidate.similarity, 4),
        "log_odds": round(judged.log_odds, 2),
        "probability": round(judged.probability, 4),
        "vetoes": list(policy.names(candidate.vetoes)),
        "pair_guard": None if logit is None else finite(logit),
        "standing": None if judged.standing is None else judged.standing.value,
        "reason": opinion.refused.get(candidate.entry_id) or judged.reason,
    }
