"""Whether two answers say the same, as a probability: what labels the judge's decisions.

A question that was forwarded brings a new answer; if it says the same as the one that would have been served, serving
would have been right. Answers are read without a model first (`likeness`): how much of what each sentence of one says
is found in the other, figures, names and code that agree or clash, negation, yes against no, texts alike in wording
that differ by a word. Where that leaves open what to call them, the tokens of what they begin with are matched in the
embedding model's states (`index.closeness`), one pass of at most 44 tokens each. Courtesies count for nothing; answers
that are equal but for them, case, space and punctuation are the same.

It errs, more on answers put freely than on canned ones. How often is measured (`index.measured`) by the command that
fits it, `python -m tests.bench.answers --fit`.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from difflib import SequenceMatcher
from functools import cache
from importlib import resources
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.closeness import Closeness
from index.errors import IndexRoomError
from index.lexicon import STOPWORDS
from index.measured import FALSE_ALARMS, MISSES
from index.reading import read
from index.statement import Statement, figures_of, state

__all__ = ["FALSE_ALARMS", "MISSES", "Comparer", "Likeness", "compared", "likeness", "probability"]

EQUAL: Final = 0.999
SETTLED: Final = (0.2, 0.8)
"""Answers whose likeness alone gives less or more than this are not matched in the model: it hardly ever calls them
otherwise. Of 2,366 pairs 47 % are left to it, and as many are called wrong as with all."""
HEAD_WORDS: Final = 40  # of each answer that the model may see; it takes as many tokens of them as it can
PAUSE_S: Final = 0.02
PATIENCE: Final = 25  # pauses before a text goes through the model beside lookups
SEQUENCE_WORDS: Final = 200  # of each answer, that are compared in their order
ALIKE_WORDING: Final = 0.6
BEGINNING: Final = 5  # letters of a stem that may have a family
SAME_LETTERS: Final = 4  # that the shortest of a family share at their beginning
COMPOUND: Final = 10  # letters of a stem that may be made of others
_YES = frozenset(
    {"yes", "yeah", "yep", "correct", "right", "true", "certainly", "absolutely", "sure", "ja", "oui", "si", "sí"}
)
_NO = frozenset(
    {"no", "nope", "not", "incorrect", "wrong", "false", "never", "unfortunately", "nein", "leider", "non", "nicht"}
)


class Likeness(NamedTuple):
    """What two answers show without a model. Shares are 0...1; `low` and `high` are of the two directions."""

    cover_high: float  # words of one that are found in the other
    cover_low: float
    aligned_high: float  # the same, but each sentence within the other's sentence that fits it best
    aligned_low: float
    peak: float  # the best fit of any two sentences
    first_high: float  # fit of the first sentences
    first_low: float
    figures: float  # figures of both, of the fewer
    figures_all: float  # figures of both, of all
    lead: float  # the first figure of each is in the other (1), of one (.5), of none (0)
    figured: float  # both have figures (1), one has (.5)
    clashing: float  # each has a figure that the other lacks
    names: float  # names that are found in both, of all
    other_names: float  # each has names that the other lacks: their least share
    code: float  # words in code of both, of the fewer
    other_code: float  # each has words in code that the other lacks
    polarity: float  # both begin with yes, or with no (1), one with yes and one with no (-1)
    negation: float  # one negates, the other does not
    antonyms: float  # one has a word, the other its opposite
    swapped: float  # alike in wording, but for a word or two exchanged that carry meaning
    order: float  # words in the same order
    within: float  # one has six words or fewer, all of them in the other
    length: float  # words of the shorter, logarithm
    longer: float  # by how much the other is longer, logarithm


def likeness(a: Statement, b: Statement) -> Likeness | None:
    """None when they are equal. Symmetric."""
    if a.words == b.words:
        return None
    a, b = sorted((a, b), key=lambda one: (len(one.text), one.text))
    kin, other_kin = kin_of(a.stems, b.stems), kin_of(b.stems, a.stems)
    cover = cover_of(a.stems, b.stems, kin), cover_of(b.stems, a.stems, other_kin)
    ours, theirs = _alignment(a, b, kin), _alignment(b, a, other_kin)
    aligned = _mean(ours), _mean(theirs)
    first = ours[0][0] if ours else 0.0, theirs[0][0] if theirs else 0.0
    figures_a, figures_b = set(a.figures), set(b.figures)
    leads = [a.figures[0] in figures_b, b.figures[0] in figures_a] if figures_a and figures_b else [False]
    alone_a, alone_b = a.names - b.content, b.names - a.content
    named = a.names | b.names
    matcher = SequenceMatcher(None, a.words[:SEQUENCE_WORDS], b.words[:SEQUENCE_WORDS], autojunk=False)
    order = matcher.ratio()
    words_a, words_b = set(a.words), set(b.words)
    fewer, more = sorted((len(a.words), len(b.words)))
    return Likeness(
        cover_high=max(cover),
        cover_low=min(cover),
        aligned_high=max(aligned),
        aligned_low=min(aligned),
        peak=max((fit for fit, _ in (*ours, *theirs)), default=0.0),
        first_high=max(first),
        first_low=min(first),
        figures=_shared(figures_a, figures_b),
        figures_all=len(figures_a & figures_b) / max(1, len(figures_a | figures_b)),
        lead=sum(leads) / len(leads),
        figured=(bool(figures_a) + bool(figures_b)) / 2,
        clashing=float(bool(figures_a - figures_b and figures_b - figures_a)),
        names=len(named & a.content & b.content) / max(1, len(named)),
        other_names=min(len(alone_a) / max(1, len(a.names)), len(alone_b) / max(1, len(b.names))),
        code=_shared(a.code, b.code),
        other_code=float(bool(a.code and b.code and a.code - b.code and b.code - a.code)),
        polarity=float(_polarity(a.words) * _polarity(b.words)),
        negation=float(bool(a.negations) != bool(b.negations)),
        antonyms=float(_are_opposed(a.antonyms, b.antonyms)),
        swapped=float(
            order > ALIKE_WORDING and any(_is_exchange(a.words, b.words, *code) for code in matcher.get_opcodes())
        ),
        order=order,
        within=float(fewer <= 6 and (words_a <= words_b or words_b <= words_a)),
        length=math.log(fewer + 3),
        longer=math.log((more + 3) / (fewer + 3)),
    )


Kin = dict[str, dict[str, float]]
"""Of each stem the other text's stems of its family, and how near they are."""


def kin_of(stems: frozenset[str], others: frozenset[str]) -> Kin:
    """Stems that begin alike, and compounds with what they hold."""
    alike: dict[str, list[str]] = {}
    for other in others:
        if len(other) >= BEGINNING:
            alike.setdefault(other[:SAME_LETTERS], []).append(other)
    compounds = [other for other in others if len(other) >= COMPOUND]
    found: Kin = {}
    for stem in stems:
        kin = found[stem] = {}
        if len(stem) < BEGINNING:
            continue
        holders = others if len(stem) >= COMPOUND else compounds
        kin |= {other: 0.6 for other in holders if len(other) >= BEGINNING and (stem in other or other in stem)}
        kin |= {other: 0.8 for other in alike.get(stem[:SAME_LETTERS], ()) if _begin_alike(stem, other)}
    return found


def _begin_alike(stem: str, other: str) -> bool:
    size = max(SAME_LETTERS, math.ceil(0.7 * min(len(stem), len(other))))
    return stem[:size] == other[:size]


def cover_of(stems: frozenset[str], others: frozenset[str], kin: Kin) -> float:
    """Share of `stems` that are among `others`, words of one family counting in part."""
    found = 0.0
    for stem in stems:
        if stem in others:
            found += 1.0
        elif kin[stem]:
            found += max((near for other, near in kin[stem].items() if other in others), default=0.0)
    return found / len(stems) if stems else 0.0


def _alignment(one: Statement, other: Statement, kin: Kin) -> list[tuple[float, int]]:
    """For each sentence how well the other's best one covers it, and how many words it has."""
    return [
        (max((cover_of(part, theirs, kin) for theirs in other.parts), default=0.0), len(part))
        for part in one.parts
        if part
    ]


def _mean(alignment: list[tuple[float, int]]) -> float:
    return sum(fit * size for fit, size in alignment) / max(1, sum(size for _, size in alignment))


def _shared(a: Collection[str], b: Collection[str]) -> float:
    fewer = min(len(a), len(b))
    return len(set(a) & set(b)) / fewer if fewer else 0.0


def _are_opposed(a: tuple[int, int], b: tuple[int, int]) -> bool:
    only_a, only_b = (a[0] & ~a[1], a[1] & ~a[0]), (b[0] & ~b[1], b[1] & ~b[0])
    return bool(only_a[0] & only_b[1] or only_a[1] & only_b[0])


def _is_exchange(a: Sequence[str], b: Sequence[str], what: str, from_a: int, to_a: int, from_b: int, to_b: int) -> bool:
    """Whether one or two words stand where the other text has others, and both mean something."""
    if what != "replace" or to_a - from_a > 2 or to_b - from_b > 2:
        return False
    one, other = a[from_a:to_a], b[from_b:to_b]
    if STOPWORDS.issuperset(one) or STOPWORDS.issuperset(other):
        return False
    figures = set(figures_of(read(" ".join(one))))
    return not figures or figures != set(figures_of(read(" ".join(other))))  # "ten" for 10 is no exchange


def _polarity(words: Sequence[str]) -> int:
    for word in words[:3]:
        if word in _YES:
            return 1
        if word in _NO:
            return -1
    return 0


class Trees(NamedTuple):
    """Boosted trees of depth 3, complete: what stands at node i goes to 2i + 1, or to 2i + 2 where it is greater."""

    start: float
    features: NDArray[np.int64]  # (trees, 7)
    thresholds: NDArray[np.float64]  # (trees, 7)
    leaves: NDArray[np.float64]  # (trees, 8), log-odds

    def log_odds(self, row: Sequence[float]) -> float:
        values, trees = np.asarray(row), np.arange(len(self.leaves))
        node = np.zeros(len(trees), np.int64)
        for _ in range(3):
            node = 2 * node + 1 + (values[self.features[trees, node]] > self.thresholds[trees, node])
        return self.start + float(self.leaves[trees, node - 7].sum())


class Fitted(NamedTuple):
    alone: Trees  # over Likeness
    matched: Trees  # over Likeness and Closeness


FILE: Final = "answers.json"


@cache
def fitted() -> Fitted:
    """What `python -m tests.bench.answers --fit` wrote."""
    found = json.loads(resources.files("index").joinpath(FILE).read_text(encoding="ascii"))
    return Fitted(*(trees_from(found[name]) for name in Fitted._fields))


def trees_from(written: dict[str, list[float]]) -> Trees:
    features = np.array(written["features"], np.int64).reshape(-1, 7)
    return Trees(
        float(written["start"][0]),
        features,
        np.array(written["thresholds"]).reshape(-1, 7),
        np.array(written["leaves"]).reshape(-1, 8),
    )


def probability(found: Likeness | None, closeness: Closeness | None = None) -> float:
    """That one answer serves for the other."""
    if found is None:
        return EQUAL
    odds = fitted().alone.log_odds(found) if closeness is None else fitted().matched.log_odds((*found, *closeness))
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, odds))))


def compared(a: str, b: str, match: Callable[[str, str], Closeness]) -> float:
    """Probability that `a` and `b` say the same, with `match` where words leave it open; see `Comparer`."""
    one, other = state(a), state(b)
    found = likeness(one, other)
    alone = probability(found)
    if not SETTLED[0] < alone < SETTLED[1]:
        return alone
    first, second = sorted((head(one.text), head(other.text)))
    try:
        return probability(found, match(first, second))
    except IndexRoomError:
        return alone


def head(text: str) -> str:
    return " ".join(text.split(maxsplit=HEAD_WORDS)[:HEAD_WORDS])


class Comparer:
    """Compares answers, where need be with the embedder that also serves lookups, when it has nothing else to do.

    `match(a, b, tenant)` tells how close two texts' tokens are, None where the model shows no states, `matching_s()`
    what that has cost, in seconds of processor time; `waiting()` how many texts are in flight. A comparison never
    fails: if one that needs the model were given up on where others are not, labels would lean to what is easily
    compared.
    """

    def __init__(
        self,
        match: Callable[[str, str, str], Awaitable[Closeness]] | None,
        waiting: Callable[[], int],
        matching_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._match = match
        self._waiting = waiting
        self._matching_s = matching_s
        self._reading_s = 0.0
        self.matched = 0  # comparisons for which the model was asked
        self.unmatched = 0  # comparisons that had to do without the model

    @property
    def spent_s(self) -> float:
        """Processor time of all comparisons so far."""
        return self._reading_s + self._matching_s()

    def by_words(self, a: str, b: str) -> float:
        """Probability that `a` and `b` say the same, without the model: 2 ms for answers of 90 words."""
        return self._read(a, b)[3]

    def _read(self, a: str, b: str) -> tuple[Statement, Statement, Likeness | None, float]:
        started = time.thread_time()
        one, other = state(a), state(b)
        found = likeness(one, other)
        read = one, other, found, probability(found)
        self._reading_s += time.thread_time() - started
        return read

    async def compare(self, a: str, b: str, tenant: str = "") -> float:
        """Probability that `a` and `b` say the same."""
        one, other, found, alone = self._read(a, b)
        if self._match is None or not SETTLED[0] < alone < SETTLED[1]:
            return alone
        try:
            await self._pause()
            self.matched += 1
            first, second = sorted((head(one.text), head(other.text)))
            return probability(found, await self._match(first, second, tenant))
        except IndexRoomError:
            self.unmatched += 1
            return alone

    async def _pause(self) -> None:
        for _ in range(PATIENCE):
            if not self._waiting():
                break
            await asyncio.sleep(PAUSE_S)
