"""Where the judge's labels come from, all of it off the client's path.

- A miss that had a candidate: the new answer is compared with the one that would have been served. Free, because the
  answer was fetched anyway.
- An audit: a hit that was served is asked again upstream, and so is the kept question; both answers are compared with
  the kept one (`proxy.core.contrast` says why both). That costs two calls, booked as negative savings, and in all never
  more than the share of what semantic hits saved that the operator allows. Audits wait for one another; when too many
  wait, or that share is spent, hits go on under the evidence there is.
- A question that is answered anew anyway (no-cache, expiry) tells how often two answers to one question look different.
- Feedback: somebody who knows.

Answers are compared by `index.answers`, and where the operator names one by a language model (`proxy.judging.arbiter`).

Every comparison becomes a row first and is learned from then; the rows bring the judge back after a restart, and tell
other replicas. What cannot be compared (an answer that may not be stored, a part that is down, too much at once) gives
no label and costs nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import orjson

from proxy import ports
from proxy.core.answer import decode_answer
from proxy.core.model import Answer, Comparison, Entry, RepeatedAnswer
from proxy.core.policy import ALWAYS
from proxy.core.purse import Purse
from proxy.core.query import Query
from proxy.core.spare import Spare
from proxy.hot import HotRow, HotRows
from proxy.judging.evidence import Evidence
from proxy.judging.judge import (
    EQUAL,
    LEARN_FROM,
    SAME_FROM,
    WRONG_BELOW,
    Judge,
    Judged,
    Opinion,
    Place,
    comparison,
    place_of,
    signature_from,
)
from proxy.meaning import Meaning
from proxy.tasks import Tasks
from proxy.watch.telemetry import Telemetry

log = logging.getLogger(__name__)

AUDITS_AT_ONCE = 4
AUDITS_WAITING = 16
COMPARISONS_AT_ONCE = 32  # after misses; an audit, which was paid for, is always compared
OTHER_GROUPS = 1  # further groups a new answer is compared with, to join one
COMPARING = 0.05  # share of a core that comparisons may take; after it misses go without, whatever they would say
BURST_S = 2.0
THICK_LABELS = 1_000.0  # of a scope; beyond them a miss is compared with the chance of THICK_LABELS / labels
REMEMBERED = 16_384  # semantic hits that feedback can still name
BUILT_IN = "built-in"  # the comparer of `index.answers`
RELEARNED_AT_ONCE = 32  # a millisecond or two
LATE = 10_000  # corrections kept until what is written down was learned
LOADED = 10_000  # comparisons a start learns from


Headers = Sequence[tuple[bytes, bytes]]


class Again(NamedTuple):
    """What a forward that asks a served question again is for."""

    opinion: Opinion
    judged: Judged
    request_id: str  # of the hit
    weight: float  # hits like it that this one stands for
    p_null: float | None = None  # that the kept question, asked again, was answered as before
    comparer: str = BUILT_IN  # what said so


class _Hit(NamedTuple):
    """A semantic hit, as feedback needs it. `opinion` is None when an earlier judgement was remembered."""

    asked: bytes
    entry_id: int
    opinion: Opinion | None
    judged: Judged | None


class Auditor:
    """Owns nothing it is given. Lives on the event loop."""

    def __init__(
        self,
        *,
        judge: Judge,
        entries: ports.EntryStore,
        comparisons: ports.Comparisons,
        meaning: Meaning,
        arbiter: ports.Arbiter | None,
        hot: HotRows,
        tasks: Tasks,
        telemetry: Telemetry,
        purse: Purse,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.judge = judge
        self.evidence = Evidence(judge, comparisons, lambda: meaning.identity, tasks)
        self._entries = entries
        self._comparisons = comparisons
        self._meaning = meaning
        self._arbiter = arbiter
        self._hot = hot
        self._tasks = tasks
        self._telemetry = telemetry
        self.purse = purse
        self._clock = clock
        self._chance = chance
        self._slots = asyncio.Semaphore(AUDITS_AT_ONCE)
        self._audits = 0  # waiting or under way
        self._comparing = 0
        self._spare = Spare(COMPARING, BURST_S)
        self._spent_s = 0.0  # by the comparer, as far as `_spare` knows of it
        self._hits: OrderedDict[str, _Hit] = OrderedDict()
        self._shadowed: OrderedDict[tuple[bytes, int], None] = OrderedDict()  # pairs of a wording and an entry
        self._last_row = 0
        self._has_learned = False
        self._late: deque[tuple[Comparison, float]] = deque(maxlen=LATE)  # corrections that came while it was learning
        self._last_refused_ms = 0

    # -- what was served --------------------------------------------------------------------------------------------

    def remember(self, request_id: str, asked: bytes, entry_id: int) -> None:
        """A hit on a wording judged before: feedback may name it."""
        self._note(request_id, _Hit(asked, entry_id, None, None))

    def draw(self, opinion: Opinion, judged: Judged, uses: int = 1) -> None:
        """Draw whether serving this calls for an audit; for how many hits it then stands. A wording that was served
        `uses` times since it was judged last is audited for all of them."""
        share = self.judge.audit_share(opinion, judged, uses)
        due = self._meaning.comparer is not None and self._chance() < share
        opinion.stands_for = 1.0 / share if due else None

    def served(
        self, opinion: Opinion, judged: Judged, request_id: str, hits: int = 1, *, may_ask: bool
    ) -> Again | None:
        """Count a semantic hit, or all `hits` on its wording since it was judged last; what to ask again upstream, or
        None when this one is not audited."""
        self._note(request_id, _Hit(opinion.place.fingerprint, judged.candidate.entry_id, opinion, judged))
        self.judge.serve(opinion.place, float(hits))
        if opinion.stands_for is None or self._tasks.closed or not may_ask:
            return None
        if self._audits >= AUDITS_AT_ONCE + AUDITS_WAITING or not self.purse.has_room:
            self._telemetry.audit("skipped")
            return None
        self.purse.begin()
        return Again(opinion, judged, request_id, opinion.stands_for)

    def _note(self, request_id: str, hit: _Hit) -> None:
        self._hits[request_id] = hit
        if len(self._hits) > REMEMBERED:
            self._hits.popitem(last=False)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits until an audit may be made; afterwards it is paid."""
        self._audits += 1
        try:
            async with self._slots:
                yield
        finally:
            self._audits -= 1
            self.purse.end()

    # -- what came of it --------------------------------------------------------------------------------------------

    def stored(
        self,
        opinion: Opinion | None,
        again: Again | None,
        query: Query,
        headers: Headers,
        entry: Entry,
        answer: Answer,
    ) -> None:
        """An answer was fetched (with `headers`) and stored: compare it with what was, or would have been, served."""
        if opinion is None:
            return
        is_wanted = again is not None or (bool(opinion.judged) and self._wants(opinion))
        if not is_wanted or not self._may_compare(is_paid=again is not None):
            if is_wanted:
                self._telemetry.audit("skipped")
            self.judge.enter(opinion.place, entry.id, entry.id)
            return
        self._comparing += again is None
        _ = self._tasks.spawn(self._compare(opinion, again, query, headers, entry, answer), "compare")

    async def kept_prompt(self, again: Again) -> str | None:
        """The question that the served answer was given to; None when the entry is gone."""
        try:
            kept = await self._kept(again.judged.candidate.entry_id)
        except ports.CACHE_FAULTS:
            return None
        return None if kept is None else kept.entry.draft.prompt

    async def repeated(self, again: Again, query: Query, headers: Headers, answer: Answer) -> Again:
        """The kept question was asked again (`query`) and answered: what that says of comparing answers here."""
        try:
            kept = await self._kept(again.judged.candidate.entry_id)
            if kept is None or self._meaning.comparer is None:
                return again
            p_null, comparer = await self._verdict(answer, kept, query, headers, again.request_id, is_paid=True)
        except ports.CACHE_FAULTS:
            return again
        return again._replace(p_null=p_null, comparer=comparer)

    def refetched(self, before: HotRow, query: Query, request_id: str, answer: Answer) -> None:
        """A question was answered anew that had an answer: a repeat that costs nothing."""
        if self._may_compare():
            _ = self._tasks.spawn(self._see_repeat(before, query, request_id, answer), "compare")

    async def _see_repeat(self, before: HotRow, query: Query, request_id: str, answer: Answer) -> None:
        place = Place(query.scope, query.controls.namespace, query.tenant, query.fingerprint)
        self._comparing += 1
        try:
            p_same = await self._likeness(answer, before, query.tenant)
        finally:
            self._comparing -= 1
        if self.judge.comparer == BUILT_IN:
            self.judge.saw_repeat(place, p_same)
        self._comparisons.repeated(
            RepeatedAnswer(int(self._clock() * 1000), request_id, before.entry.id, BUILT_IN, p_same)
        )

    def shadowed(
        self, opinion: Opinion | None, kept: HotRow, query: Query, headers: Headers, request_id: str, answer: Answer
    ) -> None:
        """In shadow, a question that `kept` would have answered was answered anew: what comes of comparing both costs
        nothing. Of a wording that is alike it is a label, once for each pair: what is asked often is no proof of what
        is asked seldom. Of the very same question it tells how often two answers to one question look different."""
        if opinion is None or opinion.chosen is None:
            self.refetched(kept, query, request_id, answer)
            return
        pair = query.fingerprint, kept.entry.id
        if pair in self._shadowed or not (self._wants(opinion) and self._may_compare()):
            return
        self._shadowed[pair] = None
        if len(self._shadowed) > REMEMBERED:
            self._shadowed.popitem(last=False)
        _ = self._tasks.spawn(self._compare_shadow(opinion, kept, query, headers, request_id, answer), "compare")

    async def _compare_shadow(
        self, opinion: Opinion, kept: HotRow, query: Query, headers: Headers, request_id: str, answer: Answer
    ) -> None:
        judged = opinion.chosen
        assert judged is not None
        self._comparing += 1
        try:
            p_same, comparer = await self._verdict(answer, kept, query, headers, request_id, is_paid=False)
            weight = await self._weight(opinion, judged, query, kept)
        except ports.CACHE_FAULTS as fault:
            self._telemetry.audit("failed")
            log.debug("answers were not compared: %s", type(fault).__name__)
            return
        finally:
            self._comparing -= 1
        self._comparisons.record(self._learn(opinion, judged, p_same, weight, request_id, comparer, served=False))

    def _may_compare(self, *, is_paid: bool = False) -> bool:
        """What was paid for is always compared."""
        comparer = self._meaning.comparer
        if comparer is None or self._tasks.closed:
            return False
        self._spare.spend(comparer.spent_s - self._spent_s)
        self._spent_s = comparer.spent_s
        has_slot = self._comparing < COMPARISONS_AT_ONCE
        return is_paid or (has_slot and self._spare.has_room(time.monotonic()))

    def _wants(self, opinion: Opinion) -> bool:
        """Draw whether a miss is worth comparing, and note for how many it stands: the more is known, the fewer are."""
        chance = min(1.0, THICK_LABELS / max(1.0, self.judge.labels_of(opinion.place)))
        opinion.stands_for = 1.0 / chance
        return self._chance() < chance

    async def _compare(
        self,
        opinion: Opinion,
        again: Again | None,
        query: Query,
        headers: Headers,
        entry: Entry,
        answer: Answer,
    ) -> None:
        group = entry.id
        found: Comparison | None = None
        try:
            judged = again.judged if again is not None else opinion.decision
            if judged is not None and judged.candidate.similarity >= LEARN_FROM:
                kept = await self._kept(judged.candidate.entry_id)
                if kept is not None:
                    request_id = entry.draft.request_id
                    paid = again is not None
                    p_same, comparer = await self._verdict(answer, kept, query, headers, request_id, is_paid=paid)
                    if again is None:
                        weight = await self._weight(opinion, judged, query, kept)
                        found = self._learn(opinion, judged, p_same, weight, request_id, comparer, served=False)
                    else:
                        p_null = again.p_null if again.comparer == comparer else None
                        found = self._learn(
                            opinion, judged, p_same, again.weight, again.request_id, comparer, p_null, served=True
                        )
                        await self._close_audit(opinion, judged, again, p_same)
                    group = judged.group_id if p_same >= SAME_FROM else entry.id
            if group == entry.id:
                group = await self._find_group(opinion, judged, answer) or entry.id
        except ports.CACHE_FAULTS as fault:
            self._telemetry.audit("failed")
            log.debug("answers were not compared: %s", type(fault).__name__)
        finally:
            self._comparing -= again is None
            self._comparisons.record(found, entry.id, group)
            self.judge.enter(opinion.place, entry.id, group)

    async def _find_group(self, opinion: Opinion, but: Judged | None, answer: Answer) -> int | None:
        """The group of a further candidate that was given the same answer, as far as words alone tell."""
        comparer = self._meaning.comparer
        assert comparer is not None
        others = [j for j in opinion.judged if j is not but and j.candidate.similarity >= LEARN_FROM]
        for judged in others[:OTHER_GROUPS]:
            kept = await self._kept(judged.candidate.entry_id)
            if kept is not None and comparer.by_words(_text(answer), _text(kept.answer)) >= SAME_FROM:
                return judged.group_id
        return None

    async def _kept(self, entry_id: int) -> HotRow | None:
        """What a candidate is; None when it is gone."""
        row = self._hot.get(entry_id)
        if row is None and (entry := await self._entries.get(entry_id)) is not None:
            row = HotRow(entry, decode_answer(entry.draft.answer, orjson.loads))
        return row

    async def _likeness(self, answer: Answer, kept: HotRow, tenant: str) -> float:
        """Probability that two answers say the same."""
        comparer = self._meaning.comparer
        assert comparer is not None
        return await comparer.compare(_text(answer), _text(kept.answer), tenant)

    async def _verdict(
        self, answer: Answer, kept: HotRow, query: Query, headers: Headers, request_id: str, *, is_paid: bool
    ) -> tuple[float, str]:
        """Probability that two answers say the same, and who says so: the language model where there is one, and this
        comparison `is_paid` for."""
        p_same = await self._likeness(answer, kept, query.tenant)
        if self._arbiter is None or not is_paid or p_same >= EQUAL:
            return p_same, BUILT_IN if p_same < EQUAL else self.judge.comparer
        asked = await self._arbiter.compare(
            query,
            headers,
            request_id,
            answer=_text(answer),
            kept_prompt=kept.entry.draft.prompt,
            kept_answer=_text(kept.answer),
        )
        return (p_same, BUILT_IN) if asked is None else (asked, self.judge.comparer)

    async def _weight(self, opinion: Opinion, judged: Judged, query: Query, kept: HotRow) -> float:
        """For how many decisions a forwarded one stands: 0 when the pair guard would have refused it. It is asked only
        where the decision would count."""
        if judged.log_odds < self.judge.least_odds and judged.standing is None:
            return 0.0
        logit, verify = opinion.logits.get(judged.candidate.entry_id), self._meaning.verify
        if logit is None and verify is not None:
            with contextlib.suppress(*ports.CACHE_FAULTS):  # not asked: like any other, which is strict
                (logit,) = await verify(query.prompt, [kept.entry.draft.prompt], query.tenant)
        is_refused = logit is not None and logit <= 0.0
        return 0.0 if is_refused else opinion.stands_for or 1.0

    def _learn(
        self,
        opinion: Opinion,
        judged: Judged,
        p_same: float,
        weight: float,
        request_id: str,
        comparer: str,
        p_null: float | None = None,
        *,
        served: bool,
    ) -> Comparison:
        found = comparison(
            opinion,
            judged,
            p_same=p_same,
            weight=weight,
            served=served,
            comparer=comparer,
            p_null=p_null,
            source="audit" if served else "forward",
            request_id=request_id,
            embedder=self._meaning.identity,
            ts_ms=int(self._clock() * 1000),
        )
        self.judge.apply(found)
        if not served and comparer == self.judge.comparer and judged.candidate.vetoes & ALWAYS:
            self.judge.saw_differing(opinion.place, p_same)
        return found

    async def _close_audit(self, opinion: Opinion, judged: Judged, again: Again, p_same: float) -> None:
        same = p_same >= WRONG_BELOW or (again.p_null is not None and again.p_null < WRONG_BELOW)
        self._telemetry.audit("same" if same else "different")
        if not same:
            await self._never_again(opinion.place.fingerprint, judged.candidate.entry_id, again.request_id, "audit")

    # -- feedback ---------------------------------------------------------------------------------------------------

    async def feedback(self, request_id: str | None, entry_id: int, verdict: str) -> None:
        """Learn from a verdict, "right" or "wrong", on a request's answer or on an entry; right undoes wrong."""
        hit = None if request_id is None else self._hits.get(request_id)
        if verdict == "wrong":
            if hit is not None and request_id is not None:
                await self._never_again(hit.asked, hit.entry_id, request_id, "feedback")
        else:
            for pair in await self._comparisons.refused_for(request_id, entry_id):
                self.judge.allow(pair.asked, pair.kept)
                await self._comparisons.allow(pair.asked, pair.kept)
        known = await self._comparisons.judged(request_id, entry_id)
        p_same = 1.0 if verdict == "right" else 0.0
        for seen in known:
            await self._correct(seen.comparison, p_same)
            await self._comparisons.correct(seen.id, p_same, "feedback")
        if not known and hit is not None and hit.opinion is not None and hit.judged is not None:
            assert request_id is not None
            found = comparison(
                hit.opinion,
                hit.judged,
                p_same=p_same,
                weight=1.0,
                served=True,
                source="feedback",
                request_id=request_id,
                embedder=self._meaning.identity,
                ts_ms=int(self._clock() * 1000),
            )
            self.judge.apply(found)
            await self._comparisons.keep(found)  # whoever gave the verdict is told that it counts

    async def near_miss(self, seen: ports.SeenComparison, verdict: str) -> None:
        """Learn whether what was nearly served had the same answer ("right") or another one ("wrong")."""
        p_same = 1.0 if verdict == "right" else 0.0
        await self._correct(seen.comparison, p_same)
        await self._comparisons.correct(seen.id, p_same, "feedback")

    async def _correct(self, found: Comparison, p_same: float) -> None:
        """At once, or after what is written down was learned: the judge knows nothing of it before."""
        if self._has_learned:
            await self.evidence.read(place_of(found))
            self.judge.correct(found, p_same)
        else:
            self._late.append((found, p_same))

    async def _never_again(self, asked: bytes, entry_id: int, request_id: str, source: str) -> None:
        """A hard negative: in memory at once, then in SQL."""
        row = self._hot.get(entry_id)
        entry = row.entry if row is not None else await self._entries.get(entry_id)
        if entry is None:
            return
        kept = entry.draft.fingerprint
        if asked == kept:
            return  # an exact hit: the entry itself is wrong
        self._hot.drop_alias(asked)
        self.judge.refuse(asked, kept)
        await self._comparisons.refuse(
            ports.RefusedPair(asked, kept, int(self._clock() * 1000), request_id, entry_id, source)
        )

    # -- memory -----------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Learn what is written down, from comparisons made with the same embedder. Raises CacheFault."""
        for pair in await self._comparisons.refused(0):
            self.judge.refuse(pair.asked, pair.kept)
            self._last_refused_ms = max(self._last_refused_ms, pair.ts_ms)
        async for entry_id, group_id in self._comparisons.groups():
            self.judge.join(entry_id, group_id)
        known = await self._comparisons.newest(self._meaning.identity, LOADED)
        for place, seen in enumerate(known):
            self._relearn(seen.comparison)
            self._last_row = seen.id
            if place % RELEARNED_AT_ONCE == 0:
                await asyncio.sleep(0)  # requests are answered meanwhile
        await self.evidence.read_all()
        self._has_learned = True
        while self._late:
            await self._correct(*self._late.popleft())

    async def follow(self) -> None:
        """Learn what other replicas wrote since. Raises CacheFault."""
        for pair in await self._comparisons.refused(self._last_refused_ms):
            if not self.judge.is_refused(pair.asked, pair.kept):
                self.judge.refuse(pair.asked, pair.kept)
                self._hot.drop_alias(pair.asked)
            self._last_refused_ms = max(self._last_refused_ms, pair.ts_ms)
        for seen in await self._comparisons.after(self._meaning.identity, self._last_row):
            self._last_row = seen.id
            if not seen.own:
                self._relearn(seen.comparison)

    def _relearn(self, found: Comparison) -> None:
        place = place_of(found)
        self.judge.see(place, signature_from(found.signature))
        if found.served:
            self.judge.serve(place, found.weight, own=False)
        self.judge.apply(found, own=False)

    async def is_refused(self, asked: bytes, kept: bytes) -> bool:
        """Whether the entry of fingerprint `kept` must not be served for `asked`. Raises CacheFault."""
        if self.judge.is_refused(asked, kept):
            return True
        return not self.judge.knows_all_refused and await self._comparisons.is_refused(asked, kept)

    def status(self) -> dict[str, Any]:
        """For the admin: evidence by level, refused pairs, work under way."""
        return {
            "levels": self.judge.status(),
            "refused_pairs": self.judge.refused_pairs,
            "auditing": self._audits,
            "comparing": self._comparing,
        }


def _text(answer: Answer) -> str:
    content = answer.message.get("content")
    return content if isinstance(content, str) else ""
