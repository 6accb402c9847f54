"""Questions through the shipped matching, in this process: hits counted, and wrong hits where the answer is known.

The model, the signatures, the arena and its kernels, the policy's eligibility, the judge and its account are the ones
that serve; what is left out is HTTP, SQL and the upstream, whose part the known answers play. A question that is
forwarded gets its label at once (its answer was fetched); one that is served only when the judge would audit it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.answers import compared
from index.batcher import SPECIAL_TOKENS
from index.closeness import Closeness, closeness
from index.embedder import Backend, TokenStates
from index.errors import EmbedderFault, TextTooLong
from index.features import compile_features
from index.guard.head import MAX_TOKENS, Guard
from index.kernels import compile_kernels
from index.learner import Learner
from index.levels import LEVELS
from index.measured import FALSE_ALARMS, MISSES
from index.tokens import signature as signature_of
from index.vectors import VectorOwner
from proxy.commands.labelled import Asked, Readings
from proxy.commands.printing import Bar
from proxy.core import policy
from proxy.core.contrast import Noise
from proxy.core.facts import Facts
from proxy.core.model import Candidate, Controls, Level, Rules
from proxy.judging.audits import BUILT_IN
from proxy.judging.judge import FEEDBACK, LEARN_FROM, Judge, Judged, Opinion, Place, comparison, objection
from proxy.request.lookup import CANDIDATES

FAR_MS: Final = 1 << 52
BATCH: Final = 32  # texts of one length in a call: more than serving allows itself, for a clock nobody waits on

LABELS: Final = {
    "perfect": (0.0, 0.0),
    "answers": (FALSE_ALARMS[0] / FALSE_ALARMS[1], MISSES[0] / MISSES[1]),
    "none": (0.0, 1.0),
}
"""Where labels come from → (share of right answers that are called wrong, share of wrong ones that are overlooked).

"perfect": the file's own, as somebody who knows would give them; "answers": as comparing freely worded answers would,
which errs (`index.answers`), and an audit asks the kept question again; "none": there are none. Where both rows have
their answer's text, "answers" compares the two; else, and for the kept question's own repeat, of which a file has no
answer, it errs as often as was measured.
"""

SEEMS: Final = {True: 0.9, False: 0.1}
"""What a comparison says of answers that it takes for the same, and for different."""


@dataclass(slots=True)
class Counts:
    """What came of one rehearsal."""

    asked: int = 0
    exact: int = 0
    hits: int = 0
    wrong: int = 0
    read_wrong: int = 0  # wrong by the readings, where there is one of the pair
    unread: int = 0  # wrong by the labels, and not read
    unjudged: int = 0  # hits of which nobody knows whether they were right
    audited: int = 0
    standings: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    doubtful: list[tuple[str, str]] = field(default_factory=list)  # pairs served that the labels call wrong


class Outcome(NamedTuple):
    hit: bool
    audited: bool


NOTHING = Outcome(False, False)
Truth = Callable[[Asked, Asked], bool | None]
"""(kept, asked) → whether the kept answer is right for the question asked; None when that is not known."""


def by_answer(kept: Asked, asked: Asked) -> bool:
    return kept.answer == asked.answer


class Texts:
    """Vectors and signatures of texts, and what the pair guard says of two, each computed once."""

    def __init__(self, backend: Backend, guard: Guard | None = None) -> None:
        self.identity = backend.identity
        self.dimension = backend.dimension
        self.backend = backend
        self._vectors: dict[str, NDArray[np.float32] | None] = {}
        self._signatures: dict[str, NDArray[np.uint64]] = {}
        self._guard = guard
        self._states: dict[str, TokenStates | None] = {}
        self._logits: dict[tuple[str, str], float] = {}
        self._alike: dict[tuple[str, str], float] = {}
        if backend.batch_limit > 1:
            backend.batch_limit = BATCH

    def prepare(self, texts: Iterable[str], what: str = "embedding", *, with_states: bool = False) -> float:
        """Embed what is not known yet, equal lengths together; seconds spent. `with_states` keeps the token states of
        the same pass, 1.5 KiB a token, until `drop_states`."""
        started = time.perf_counter()
        encode = self.backend.encode_states if with_states and self.can_verify else self._encode_plain
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        by_length: dict[int, list[tuple[str, list[int]]]] = {}
        for text in new:
            try:
                ids = self.backend.tokens(text)
            except TextTooLong:
                self._vectors[text] = None
                continue
            by_length.setdefault(len(ids), []).append((text, ids))
        bar = Bar(what, sum(map(len, by_length.values())))
        for waiting in by_length.values():
            for at in range(0, len(waiting), self.backend.batch_limit):
                part = waiting[at : at + self.backend.batch_limit]
                vectors, states = encode([ids for _, ids in part])
                for i, (text, _) in enumerate(part):
                    self._vectors[text] = vectors[i].copy()
                    if states is not None:
                        self._states[text] = states[i]
                bar.advance(len(part))
        bar.close()
        return time.perf_counter() - started

    def _encode_plain(self, ids: Sequence[list[int]]) -> tuple[NDArray[np.float32], None]:
        return self.backend.encode_tokens(ids), None

    def drop_states(self) -> None:
        """Forget token states; they are computed anew where they are asked for."""
        self._states.clear()

    def vector(self, text: str) -> NDArray[np.float32] | None:
        """None for a text longer than the window."""
        return self._vectors[text]

    def signature(self, text: str) -> NDArray[np.uint64]:
        known = self._signatures.get(text)
        if known is None:
            known = self._signatures[text] = signature_of(text)
        return known

    @property
    def can_verify(self) -> bool:
        return self._guard is not None

    def logit(self, asked: str, kept: str) -> float:
        """The pair guard's; see `index.guard.head`."""
        assert self._guard is not None
        known = self._logits.get((asked, kept))
        if known is None:
            (known,) = self._guard.judge(self.states(asked), [self.states(kept)])
            self._logits[asked, kept] = known
        return known

    def says_same(self, a: str, b: str) -> float:
        """Probability that two answers say the same, as serving compares them."""
        one, other = sorted((a, b))
        known = self._alike.get((one, other))
        if known is None:
            known = self._alike[one, other] = compared(one, other, self._closeness)
        return known

    def _closeness(self, one: str, other: str) -> Closeness:
        found = []
        for text in (one, other):
            ids = self.backend.tokens(text)
            if len(ids) <= SPECIAL_TOKENS:
                raise EmbedderFault("a text without tokens cannot be matched")
            if len(ids) > MAX_TOKENS + SPECIAL_TOKENS:
                ids = [*ids[: MAX_TOKENS + 1], ids[-1]]
            found.append(self.backend.encode_states([ids])[1][0])
        return closeness(found[0], found[1])

    def states(self, text: str) -> TokenStates | None:
        """Token states as the guard takes them; None for a text longer than the window."""
        if text not in self._states:
            try:
                self._states[text] = self.backend.encode_states([self.backend.tokens(text)])[1][0]
            except TextTooLong:
                self._states[text] = None
        return self._states[text]


def compile_matching(dimension: int) -> None:
    compile_kernels(dimension)
    compile_features()


def is_eligible(text: str, is_first_turn: bool, rules: Rules) -> bool:
    """Whether the shipped policy would look for this prompt's like at all."""
    facts = Facts(model="m", prompt=text, context=(), settings={}, first_turn=is_first_turn, user_turns=1)
    return policy.classify(facts, Controls(), rules).level is Level.FULL


class Rehearsal:
    """One cache, one judge, one budget, from an empty start."""

    def __init__(
        self,
        texts: Texts,
        rules: Rules,
        max_error: float,
        *,
        labels: str = "perfect",
        seed: int = 0,
        truth: Truth = by_answer,
        readings: Readings | None = None,
        ignored: int = 0,
    ) -> None:
        """`ignored` are vetoes to leave out."""
        self.counts = Counts()
        self.lookup_s: list[float] = []
        self._texts = texts
        self._rules = rules
        self._max_error = max_error
        self._false_alarm, self._overlooked = LABELS[labels]
        self._rng = random.Random(seed)
        self._readings = readings or Readings()
        self._truth = truth
        self._allowed = ~ignored
        self._errs = labels == "answers"
        measured = Noise(100.0, 100.0 * self._false_alarm, 100.0, 100.0 * (1.0 - self._overlooked))
        self._judge = Judge(
            rules,
            Learner,
            LEVELS,
            comparer=BUILT_IN if self._errs else FEEDBACK,
            noise=measured if self._errs else Noise(),
        )
        self._index = VectorOwner(texts.identity, texts.dimension, promote_above=1 << 30)
        self._kept: list[Asked] = []
        self._exact: set[tuple[bytes, str]] = set()

    @property
    def learns(self) -> bool:
        return self._overlooked < 1.0

    def ask(self, asked: Asked) -> Outcome:
        counts = self.counts
        counts.asked += 1
        if (asked.scope, asked.text) in self._exact:
            counts.exact += 1
            return NOTHING
        vector = self._texts.vector(asked.text)
        if vector is None or not is_eligible(asked.text, asked.is_first_turn, self._rules):
            _count(counts.reasons, "exact_only")
            return NOTHING
        signature = self._texts.signature(asked.text)
        place = Place(asked.scope, "", "tenant", asked.text.encode("utf-8", "replace"))
        started = time.perf_counter()
        found = self._index.find_now(asked.scope, vector, signature, 0, CANDIDATES)
        candidates = [Candidate(*one)._replace(vetoes=one.vetoes & self._allowed) for one in found]
        opinion = self._judge.consider(place, signature, candidates, self._max_error)
        chosen = opinion.chosen
        self.lookup_s.append(time.perf_counter() - started)
        while chosen is not None and (against := self._objection(opinion, chosen, asked.text)):
            opinion.refused[chosen.candidate.entry_id] = against
            chosen = opinion.chosen
        self._judge.see(place, signature)
        audited, weight = True, 1.0
        if chosen is not None:
            audited, weight = self._serve(opinion, chosen, asked)
        elif (about := opinion.guarded or opinion.decision) is not None:
            _count(counts.reasons, opinion.refused.get(about.candidate.entry_id, about.reason))
        elif opinion.judged:
            _count(counts.reasons, next(iter(opinion.refused.values())))
        if self.learns and audited:
            self._label(opinion, asked, weight, served=chosen is not None)
        if chosen is None or audited:
            self._store(place, asked, vector, signature, candidates)
        return Outcome(chosen is not None, chosen is not None and audited)

    def _objection(self, opinion: Opinion, judged: Judged, asked: str) -> str:
        against = objection(opinion, judged, self._judge, can_verify=self._texts.can_verify)
        if against is None:
            entry_id = judged.candidate.entry_id
            opinion.logits[entry_id] = self._texts.logit(asked, self._kept[entry_id].text)
            against = objection(opinion, judged, self._judge, can_verify=True)
        return against or ""

    def _serve(self, opinion: Opinion, chosen: Judged, asked: Asked) -> tuple[bool, float]:
        """Count a hit; whether it is audited, and so its label comes, and how many hits it then stands for."""
        assert chosen.standing is not None
        share = self._judge.audit_share(opinion, chosen) if self.learns else 0.0
        audited = self._rng.random() < share
        self._judge.serve(opinion.place)
        counts, kept = self.counts, self._kept[chosen.candidate.entry_id]
        counts.hits += 1
        counts.audited += audited
        _count(counts.standings, chosen.standing.value)
        right = self._truth(kept, asked)
        if right is None:
            counts.unjudged += 1
        elif not right:
            counts.wrong += 1
            read = self._readings.same(kept.text, asked.text)
            counts.unread += read is None
            counts.read_wrong += read is not True
            counts.doubtful.append((kept.text, asked.text))
        return audited, 1.0 / share if share else 1.0

    def _label(self, opinion: Opinion, asked: Asked, weight: float, *, served: bool) -> None:
        judged = opinion.decision
        if judged is None or judged.candidate.similarity < LEARN_FROM:
            return
        kept = self._kept[judged.candidate.entry_id]
        p_same = self._p_same(kept, asked)
        if p_same is None:
            return
        guarded = self._rules.pair_guard and self._texts.can_verify
        if not served and guarded and self._texts.logit(asked.text, kept.text) <= 0.0:
            weight = 0.0
        p_null, comparer = None, FEEDBACK
        if self._errs:
            comparer = BUILT_IN
            p_null = SEEMS[self._rng.random() >= self._false_alarm] if served else None
        label = comparison(
            opinion, judged, p_same=p_same, weight=weight, served=served, source="audit" if served else "forward",
            comparer=comparer, p_null=p_null, request_id="", embedder="", ts_ms=0,
        )  # fmt: skip
        self._judge.apply(label)

    def _p_same(self, kept: Asked, asked: Asked) -> float | None:
        """What comparing the two answers says, or would say; None when they cannot be compared."""
        if self._errs and kept.told and asked.told:
            return self._texts.says_same(kept.told, asked.told)
        same = self._truth(kept, asked)
        if same is None or not self._errs:
            return same if same is None else float(same)
        seems = self._rng.random() >= self._false_alarm if same else self._rng.random() < self._overlooked
        return SEEMS[seems]

    def _store(
        self,
        place: Place,
        asked: Asked,
        vector: NDArray[np.float32],
        signature: NDArray[np.uint64],
        candidates: Sequence[Candidate],
    ) -> None:
        entry_id = len(self._kept)
        self._kept.append(asked)
        self._exact.add((asked.scope, asked.text))
        self._index.add_now(entry_id, asked.scope, vector, signature, FAR_MS)
        group = entry_id
        if self.learns:
            alike = (c.entry_id for c in candidates if self._truth(self._kept[c.entry_id], asked))
            group = self._judge.group_of(next(alike, entry_id))
        self._judge.enter(place, entry_id, group)


def _count(into: dict[str, int], name: str) -> None:
    into[name] = into.get(name, 0) + 1


def nearest(texts: Texts, rows: Sequence[Asked]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Of each row, similarity to the most similar earlier one and whether its answer is the same: a cache that serves
    on similarity alone and stores every miss is no better than this."""
    kept = [(row, vector) for row in rows if (vector := texts.vector(row.text)) is not None]
    best, right = np.full(len(kept), -1.0, np.float32), np.zeros(len(kept), np.bool_)
    matrix = np.stack([vector for _, vector in kept]) if kept else np.zeros((0, 1), np.float32)
    for i in range(1, len(kept)):
        similarities = matrix[:i] @ matrix[i]
        at = int(np.argmax(similarities))
        best[i], right[i] = similarities[at], kept[at][0].answer == kept[i][0].answer
    return best, right
