"""Whether two answers say the same, as a probability: what labels the judge's decisions.

A question that was forwarded brings a new answer; if it says the same as the one that would have been served, serving
would have been right. What it looks at: meaning (inner product of the embeddings of what the answers begin with),
figures that agree or clash, names, negation, yes against no, and whether texts alike in wording differ by a word here
and there. Answers that are equal but for case, space and punctuation are the same.

It errs, more on answers put freely than on canned ones: measured by `python -m tests.bench.answers` on answers written
to be hard, November 2026. What it overlooks is taken off the budget (SENSITIVITY); what it wrongly calls different
makes ibid strict. Where that matters, feedback or a language model (`cache.judge_model`) labels better.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from difflib import SequenceMatcher
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.errors import IndexRoomError
from index.lexicon import STOPWORDS
from index.reading import Reading, read

HEAD_WORDS: Final = 40
"""Words of each answer whose meaning is compared: an answer says what it says at its beginning, and embedding more
would keep the embedder from lookups."""
SETTLED: Final = 0.5  # answers this unlike in what they state are not embedded: no meaning could save them
UNKNOWN_MEANING: Final = 0.6
PAUSE_S: Final = 0.02
PATIENCE: Final = 25  # pauses before a text is embedded beside lookups
READ_CHARACTERS: Final = 4000
SEQUENCE_WORDS: Final = 200  # of each answer, that are compared in their order
ALIKE_WORDING: Final = 0.6
_YES = frozenset(
    {"yes", "yeah", "yep", "correct", "right", "true", "certainly", "absolutely", "sure", "ja", "oui", "si"}
)
_NO = frozenset({"no", "nope", "incorrect", "wrong", "false", "never", "unfortunately", "nein", "non"})
_WORD = re.compile(r"(?:(?<![^\s(\[{,:=])[-\u2212](?=\d))?[^\W_]+")  # a minus is part of its number
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|cannot|without|nicht|kein\w*|nie|ne|pas|sans|nunca|sin)\b|n['\u2019]t\b", re.IGNORECASE
)

WEIGHTS: Final[dict[str, float]] = {
    "one": -2.2,
    "meaning": 3.1,
    "agreeing": 1.4,
    "clashing": -0.9,
    "names": -1.0,
    "polarity": -4.1,
    "negation": -0.3,
    "swapped": -2.6,
    "brief": -1.3,
    "within": 2.9,
}
"""Fitted by `python -m tests.bench.answers --fit`."""
SENSITIVITY: Final = 0.8
"""Share of differing answers that are called different: 578 of 696 on questions left out of the fit (83.0 %, 95 %: 80.0
to 85.8). Of 303 pairs that say the same, most of them rewritten whole, 133 (44 %) are called different, too."""


class Likeness(NamedTuple):
    """What two answers show without a model, each 0...1."""

    equal: bool
    agreeing: float = 0.0  # share of the figures of the one with fewer that the other has, too
    clashing: float = 0.0  # each has a figure that the other lacks
    names: float = 0.0  # each has a name that the other lacks
    polarity: float = 0.0  # one begins with yes, the other with no
    negation: float = 0.0  # one negates, the other does not
    swapped: float = 0.0  # alike in wording, but for a word or two exchanged that carry meaning
    brief: float = 0.0  # one has three words or fewer
    within: float = 0.0  # one has six words or fewer, all of them in the other


def likeness(a: str, b: str) -> Likeness:
    """Symmetric."""
    a, b = sorted((a[:READ_CHARACTERS], b[:READ_CHARACTERS]))
    words_a, words_b = _WORD.findall(a.casefold()), _WORD.findall(b.casefold())
    if words_a == words_b:
        return Likeness(equal=True)
    one, other = read(a), read(b)
    figures_a, figures_b = _figures(one), _figures(other)
    fewer = min(len(figures_a), len(figures_b))
    names_a, names_b = (
        {word for word, is_name in this.content.items() if is_name} - set(that.content)
        for this, that in ((one, other), (other, one))
    )
    matcher = SequenceMatcher(None, words_a[:SEQUENCE_WORDS], words_b[:SEQUENCE_WORDS], autojunk=False)
    is_alike = matcher.ratio() > ALIKE_WORDING
    shorter = min(len(words_a), len(words_b))
    is_within = set(words_a) <= set(words_b) or set(words_b) <= set(words_a)
    return Likeness(
        equal=False,
        agreeing=len(figures_a & figures_b) / fewer if fewer else 0.0,
        clashing=float(bool(figures_a - figures_b and figures_b - figures_a)),
        names=float(bool(names_a and names_b)),
        polarity=float(_polarity(words_a) * _polarity(words_b) < 0),
        negation=float(bool(_NEGATION.search(a)) != bool(_NEGATION.search(b))),
        swapped=float(is_alike and any(_is_exchange(words_a, words_b, *code) for code in matcher.get_opcodes())),
        brief=float(shorter <= 3),
        within=float(shorter <= 6 and is_within),
    )


def _figures(reading: Reading) -> set[str]:
    return {*reading.numbers, *reading.dates, *reading.ids}


def _is_exchange(a: Sequence[str], b: Sequence[str], what: str, from_a: int, to_a: int, from_b: int, to_b: int) -> bool:
    """Whether one or two words stand where the other text has others, and both mean something."""
    if what != "replace" or to_a - from_a > 2 or to_b - from_b > 2:
        return False
    one, other = a[from_a:to_a], b[from_b:to_b]
    if STOPWORDS.issuperset(one) or STOPWORDS.issuperset(other):
        return False
    figures = _figures(read(" ".join(one)))
    return not figures or figures != _figures(read(" ".join(other)))  # "ten" for 10 is no exchange


def _polarity(words: Sequence[str]) -> int:
    for word in words[:3]:
        if word in _YES:
            return 1
        if word in _NO:
            return -1
    return 0


def probability(found: Likeness, meaning: float) -> float:
    """That one answer serves for the other. `meaning`: inner product of their heads' embeddings, -1...1."""
    if found.equal:
        return 0.999
    odds = WEIGHTS["one"] + WEIGHTS["meaning"] * meaning
    odds += sum(WEIGHTS[name] * value for name, value in zip(found._fields[1:], found[1:], strict=True))
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, odds))))


def head(text: str) -> str:
    return " ".join(text.split(maxsplit=HEAD_WORDS)[:HEAD_WORDS])


class Comparer:
    """Compares answers with the embedder that also serves lookups, when it has nothing else to do.

    `embed(text, tenant)` gives a unit vector, `waiting()` tells how many texts are in flight. A comparison never fails:
    if one that needs the model were given up on where others are not, labels would lean to what is easily compared.
    """

    def __init__(self, embed: Callable[[str, str], Awaitable[NDArray[np.float32]]], waiting: Callable[[], int]) -> None:
        self._embed = embed
        self._waiting = waiting
        self.unembedded = 0  # comparisons that had to do without the model

    async def compare(self, a: str, b: str, tenant: str = "") -> float:
        """Probability that `a` and `b` say the same."""
        found = likeness(a, b)
        if found.equal or probability(found, 1.0) < SETTLED:
            return probability(found, 1.0)
        try:
            meaning = float(np.dot(await self._meaning(a, tenant), await self._meaning(b, tenant)))
        except IndexRoomError:
            self.unembedded += 1
            meaning = UNKNOWN_MEANING
        return probability(found, meaning)

    async def _meaning(self, text: str, tenant: str) -> NDArray[np.float32]:
        for _ in range(PATIENCE):
            if not self._waiting():
                break
            await asyncio.sleep(PAUSE_S)
        return await self._embed(head(text), tenant)
