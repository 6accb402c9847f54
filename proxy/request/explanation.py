"""What `x-cache-explain: 1` brings back: how this lookup came to its verdict, as one header of compact JSON.

The client sees its own scope only. `/cache/explain` tells the operator all of it.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxy.core import policy
from proxy.core.directives import header_text
from proxy.core.query import Query
from proxy.judging.judge import Judged, Opinion, finite
from proxy.records import Lookup

HEADER = "x-cache-explain"
CANDIDATES = 3  # a header has to fit into 8 KiB with the others


def explanation(query: Query, lookup: Lookup) -> tuple[str, str]:
    """The header's name and value."""
    eligibility, opinion = query.eligibility, lookup.opinion
    said: dict[str, Any] = {
        "scope": query.scope.hex()[:8],
        "level": eligibility.level.value,
        "limited_by": eligibility.reason,
        "verdict": lookup.verdict.reason,
        "plan": query.plan.text,
        "steps_ms": {name: round(spent_ms, 3) for name, spent_ms in lookup.steps_ms.items()},
    }
    if opinion is not None:
        said["max_error"] = opinion.max_error
        said["proven_from"] = finite(opinion.thresholds.proven)
        said["provisional_from"] = finite(opinion.thresholds.provisional)
        said["candidates"] = [_told(judged, opinion) for judged in opinion.judged[:CANDIDATES]]
    return HEADER, header_text(orjson.dumps(said).decode())


def _told(judged: Judged, opinion: Opinion) -> dict[str, Any]:
    candidate = judged.candidate
    return {
        "entry": candidate.entry_id,
        "similarity": round(candidate.similarity, 4),
        "probability": round(judged.probability, 4),
        "vetoes": list(policy.names(candidate.vetoes)),
        "standing": None if judged.standing is None else judged.standing.value,
        "reason": opinion.refused.get(candidate.entry_id) or judged.reason,
    }
