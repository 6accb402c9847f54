"""What became of a request and why, in sentences: made from its ledger row, its calls, and the record of its lookup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proxy.core.reasons import MEANINGS
from proxy.core.saving import STAND_INS
from proxy.core.units import usd

Row = Mapping[str, Any]


def tell(found: Row) -> list[str]:
    """Why one request was answered as it was, first things first. `found` as `Queries.request` gives it."""
    return [*_answered(found), *_ended(found), *_compared(found), *_kept(found)]


def bill(found: Row) -> list[str]:
    """What was called for it, and what that cost and saved."""
    return [*_called(found), *_paid(found)]


def _answered(found: Row) -> Iterator[str]:
    """Who answered, and what kept the cache from it."""
    lane, entry, reason = found["lane"], found["entry_id"], _meaning(found["reason"])
    looked = found["lookup"] or {}
    model = f"{found['model_requested']} at {found['upstream']}"
    if found["cache_status"] == "AUDIT":
        yield f"A call of ibid's own to {model}, made for no client: {found['reason']}."
    elif lane == "cache.exact":
        whose = "entries" if entry is None else f"entry {entry}"
        yield f"Answered from the cache: the same was asked before, and {whose} had the answer."
    elif lane == "cache.semantic":
        yield f"Answered from the cache by meaning: entry {entry} answers a question that is {_alike(found)}."
    elif lane == "cache.stale":
        yield f"Answered from the cache by entry {entry}, past its lifetime: the settings or the client allow it."
    elif lane in STAND_INS:
        stand_in = "an answer past its lifetime" if lane.startswith("cache.") else "the local model"
        yield f"The upstream {found['upstream']} failed, and {stand_in} stood in for it."
    elif "joined" in looked:
        yield f"Shared the answer of an identical request that was under way, {looked['joined']}."
    elif found["cache_status"] == "BYPASS":
        yield f"The cache was not used, and the request went to {model}: {reason}."
    elif entry is not None:
        yield f"Not answered from the cache, though entry {entry} is {_alike(found)}; asked {model}: {reason}."
    else:
        yield f"Not answered from the cache; asked {model}: {reason}."
    if (limited := looked.get("limited_by")) and limited != found["reason"]:
        yield f"It was not compared by meaning: {_meaning(limited)} ({limited})."


def _ended(found: Row) -> Iterator[str]:
    if found["outcome"] == "cancelled":
        yield "The client left before the answer was complete."
    elif found["outcome"] != "ok":
        yield f"It ended with an error, status {found['status']}."


def _compared(found: Row) -> Iterator[str]:
    """The stored questions that came closest, what each lacked, and what was asked of them."""
    looked = found["lookup"] or {}
    candidates: Sequence[Row] = looked.get("candidates", ())
    if "candidates" in looked and not candidates:
        yield "Nothing stored under these conditions was alike enough to be considered."
    for one in candidates:
        said = (
            f"Entry {one['entry']}: similarity {one['similarity']:.3f}, probability {one['probability']:.3f} of the "
            "same answer"
        )
        if one["entry"] == found["entry_id"] and found["lane"] == "cache.semantic":
            yield f"{said}; served as {one['standing']}."
        else:
            others = [name for name in one["vetoes"] if name != one["reason"]]
            also = f"; also noticed: {', '.join(others)}" if others else ""
            yield f"{said}; not served: {_meaning(one['reason'])} ({one['reason']}){also}."
    if candidates:
        yield _bound(looked, candidates)


def _bound(looked: Row, candidates: Sequence[Row]) -> str:
    budget = f"Up to {looked['max_error']:.2%} of the hits might be wrong"
    if not looked["has_room"]:
        return f"{budget}, and that budget was spent."
    needed = [odds for odds in (looked["proven_from"], looked["provisional_from"]) if odds is not None]
    if not needed:
        return f"{budget}; there was too little evidence yet to serve more than what is nearly the same question."
    best = max(one["log_odds"] for one in candidates)
    return f"{budget}: evidence asked for log-odds of {min(needed):g}, and the best candidate had {best:g}."


def _kept(found: Row) -> Iterator[str]:
    if unstored := (found["lookup"] or {}).get("unstored"):
        yield f"Its answer was not kept: {_meaning(unstored)} ({unstored})."


def _called(found: Row) -> Iterator[str]:
    for call in found["calls"]:
        price = "unpriced" if call["cost_basis"] == "unpriced" else f"${usd(call['cost_nusd'])}"
        yield (
            f"Call to {call['upstream']}, {call['model']} ({call['purpose']}): status {call['status']}, "
            f"{call['total_ms']:.0f} ms, {price}."
        )


def _paid(found: Row) -> Iterator[str]:
    if found["baseline_basis"] == "unpriced":
        yield "No price is known for this model, so nothing is counted as saved."
        return
    baseline, actual = found["baseline_nusd"], found["actual_nusd"]
    yield f"Without ibid it would have cost ${usd(baseline)}; it cost ${usd(actual)}: ${usd(baseline - actual)} saved."
    for step in found["savings"]:
        yield f"{step['mechanism']} ({step['family']}): ${usd(step['saved_nusd'])}, {step['basis']}."


def _alike(found: Row) -> str:
    similarity = found["similarity"]
    return "alike" if similarity is None else f"alike (similarity {similarity:.3f})"


def _meaning(reason: str) -> str:
    return MEANINGS.get(reason, reason or "no reason was recorded")
