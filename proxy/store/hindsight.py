"""What a span of time showed: requests by how they ended, money, comparisons and repeated questions.

Read from the ledger and the judge's rows by whoever asks, while ibid runs or not; the same on SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, and_, case, func, or_, select

from proxy.core.contrast import Noise, Pairs
from proxy.core.directives import WOULD
from proxy.core.model import Tier
from proxy.core.risk import Labels
from proxy.core.saving import day_of
from proxy.store.engine import Database
from proxy.store.schema import audit, entry, repeated_answer, request, saving

SHADOWED: Final = f"{WOULD}{Tier.SEMANTIC}"
QUESTION_CHARACTERS: Final = 200


class Ended(NamedTuple):
    """Requests that ended alike. Money in nano-dollars."""

    cache_status: str
    reason: str
    lane: str
    requests: int
    baseline_nusd: int
    unpriced: int  # among them, requests without a known price: their baseline is 0


class Saved(NamedTuple):
    """Steps of one mechanism that the ledger has."""

    family: str
    mechanism: str
    steps: int
    saved_nusd: int
    unpriced: int


class Asked(NamedTuple):
    """A question that was asked again, by the answer that was there for it."""

    entry_id: int
    times: int
    model: str
    baseline_nusd: int
    question: str | None  # where it was asked for, and is still stored


class Limits(NamedTuple):
    """From which probability answers are equal, and below which they differ."""

    equal: float
    wrong: float


class Hindsight:
    """Reads for people. Raises CacheFault for a database that does not answer."""

    def __init__(self, database: Database, since_ms: int, until_ms: int, limits: Limits) -> None:
        self._database = database
        self._since_ms = since_ms
        self._until_ms = until_ms
        self._limits = limits
        c = request.c
        self._in_time = and_(c.day >= day_of(since_ms), c.day <= day_of(until_ms), c.ts >= since_ms, c.ts < until_ms)

    async def ended(self) -> Sequence[Ended]:
        """All requests of clients."""
        c = request.c
        alike = (c.cache_status, c.reason, c.lane)
        unpriced = _count(c.baseline_basis == "unpriced")
        statement = (
            select(*alike, func.count(), func.sum(c.baseline_nusd), unpriced)
            .where(self._in_time, c.cache_status != "AUDIT")
            .group_by(*alike)
            .order_by(func.count().desc(), *alike)
        )
        rows = await self._database.rows(statement)
        return [Ended(row[0], row[1], row[2], row[3], int(row[4]), int(row[5])) for row in rows]

    async def saved(self) -> Sequence[Saved]:
        """What mechanisms saved, the dearest first; what ibid's own calls cost is negative."""
        c = saving.c
        total = func.sum(c.saved_nusd)
        statement = (
            select(c.family, c.mechanism, func.count(), total, _count(c.basis == "unpriced"))
            .select_from(saving.join(request, request.c.id == c.request_id))
            .where(self._in_time)
            .group_by(c.family, c.mechanism)
            .order_by(total.desc(), c.mechanism)
        )
        return [Saved(row[0], row[1], row[2], int(row[3]), int(row[4])) for row in await self._database.rows(statement)]

    async def shadowed(self) -> Labels:
        """Comparisons of what shadow kept from being served."""
        a, r = audit.c, request.c
        certain = or_(a.comparer == "", a.p_same >= self._limits.equal)
        wrong = a.p_same < self._limits.wrong
        statement = (
            select(_count(certain), _count(and_(certain, wrong)), _count(~certain), _count(and_(~certain, wrong)))
            .select_from(audit.join(request, r.id == a.request_id))
            .where(self._in_time, r.cache_status == "SHADOW", r.reason == SHADOWED, a.served == 0)
        )
        (row,) = await self._database.rows(statement)
        return Labels(*(float(value) for value in row))

    async def audited(self, comparer: str) -> tuple[Pairs, Labels]:
        """Audits of served hits with their repeats, and what somebody who knows, or equal answers, said of hits."""
        a = audit.c
        alarm, null = a.p_same < self._limits.wrong, a.p_null < self._limits.wrong
        certain = or_(a.comparer == "", a.p_same >= self._limits.equal)
        paired = and_(a.p_null.is_not(None), a.comparer == comparer)
        statement = select(
            _count(and_(paired, alarm, ~null)),
            _count(and_(paired, null, ~alarm)),
            _count(and_(paired, or_(and_(alarm, null), and_(~alarm, ~null)))),
            _count(certain),
            _count(and_(certain, alarm)),
        ).where(a.served == 1, a.ts >= self._since_ms, a.ts < self._until_ms)
        ((more, less, even, known, wrong),) = await self._database.rows(statement)
        return Pairs(float(more), float(less), float(even)), Labels(float(known), float(wrong))

    async def noise(self, comparer: str) -> Noise:
        """How often two answers to one question looked different to a comparer, at any time that is written down."""
        found = Noise()
        for table, p_same in ((repeated_answer, repeated_answer.c.p_same), (audit, audit.c.p_null)):
            noisy = p_same < self._limits.equal
            statement = select(_count(noisy), _count(p_same < self._limits.wrong)).where(table.c.comparer == comparer)
            ((repeats, alarms),) = await self._database.rows(statement)
            found = found.plus(Noise(repeats=float(repeats), false_alarms=float(alarms)))
        return found

    async def most_asked(self, limit: int, *, with_text: bool) -> Sequence[Asked]:
        """Questions that an answer was there for, the commonest first. Wordings that were found to have one answer are
        one question."""
        r = request.c
        question = func.coalesce(entry.c.group_id, r.entry_id)
        is_hit = or_(r.lane.like("cache.%"), r.reason.like(f"{WOULD}%"))
        statement = (
            select(question, func.count(), func.min(r.model_requested), func.sum(r.baseline_nusd))
            .select_from(request.outerjoin(entry, entry.c.id == r.entry_id))
            .where(self._in_time, r.entry_id.is_not(None), is_hit)
            .group_by(question)
            .order_by(func.count().desc(), question)
            .limit(limit)
        )
        rows = await self._database.rows(statement)
        texts = await self._questions([row[0] for row in rows]) if with_text else {}
        return [Asked(row[0], row[1], row[2], int(row[3]), texts.get(row[0])) for row in rows]

    async def _questions(self, entry_ids: Sequence[int]) -> dict[int, str]:
        text = func.substr(entry.c.prompt, 1, QUESTION_CHARACTERS)
        return {row[0]: row[1] for row in await self._database.rows(select(entry.c.id, text).where(
            entry.c.id.in_(entry_ids)
        ))}  # fmt: skip


def _count(condition: ColumnElement[bool]) -> ColumnElement[Any]:
    """How many rows a condition holds of; of NULL it does not."""
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)
