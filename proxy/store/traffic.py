"""What was asked, as the rows still tell: stored questions in their order, who was found to say the same, and its cost.

Only what the database keeps: a question that was answered from another one's entry and not audited left no row of its
own, an entry that expired or was purged is gone.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import ColumnElement, case, func, select

from proxy.store.engine import Database
from proxy.store.schema import audit, entry, request, upstream_call


class Question(NamedTuple):
    """A stored question. `group_id` names those found to have its answer; `price_nusd` is what answering it costs."""

    entry_id: int
    scope: bytes
    prompt: str
    group_id: int
    price_nusd: int


class Traffic(NamedTuple):
    questions: list[Question]
    differing: set[tuple[int, int]]  # (entry id of the question, group id): compared, and found to differ
    requests: int
    exact_hits: int
    semantic_hits: int


async def read_traffic(database: Database, *, namespace: str | None, limit: int) -> Traffic:
    """The newest `limit` stored questions that took part in matching, oldest first. Raises CacheFault."""
    conditions: list[ColumnElement[bool]] = [entry.c.embedder.is_not(None)]
    if namespace is not None:
        conditions.append(entry.c.namespace == namespace)
    # an audit has no baseline, for nobody asked; what it paid is what the question would have cost
    price_nusd = case((request.c.lane == "audit", request.c.actual_nusd), else_=request.c.baseline_nusd)
    rows = await database.rows(
        select(
            entry.c.id, entry.c.scope, entry.c.prompt, func.coalesce(entry.c.group_id, entry.c.id),
            func.coalesce(price_nusd, 0), entry.c.fingerprint,
        )
        .select_from(entry.outerjoin(request, request.c.id == entry.c.request_id))
        .where(*conditions)
        .order_by(entry.c.id.desc())
        .limit(limit)
    )  # fmt: skip
    questions = [Question(row[0], bytes(row[1]), row[2], row[3], row[4]) for row in reversed(rows)]
    by_fingerprint = {bytes(row[5]): row[0] for row in rows}
    compared = await database.rows(select(audit.c.fingerprint, audit.c.group_id).where(audit.c.p_same < 0.5))
    differing = {(by_fingerprint[bytes(f)], group) for f, group in compared if bytes(f) in by_fingerprint}
    lanes = dict(
        tuple(row) for row in await database.rows(select(request.c.lane, func.count()).group_by(request.c.lane))
    )
    return Traffic(
        questions,
        differing,
        sum(count for lane, count in lanes.items() if lane != "audit"),
        lanes.get("cache.exact", 0),
        lanes.get("cache.semantic", 0),
    )


MEAN_OVER = 200  # calls


async def read_mean_output(database: Database, upstream: str, model: str) -> float | None:
    """Mean output tokens of the last MEAN_OVER measured calls of a model; None without any. Raises CacheFault."""
    c = upstream_call.c
    latest = (
        select(c.out_tok)
        .where(c.upstream == upstream, c.model == model, c.usage_basis == "measured")
        .order_by(c.ts.desc())
        .limit(MEAN_OVER)
        .subquery()
    )
    ((mean,),) = await database.rows(select(func.avg(latest.c.out_tok)))
    return None if mean is None else float(mean)
