"""Whether two answers say the same, as a probability: what labels the judge's decisions.

A question that was forwarded brings a new answer; if it says the same as the one that would have been served, serving
would have been right. The comparison errs, so it gives a probability, and the risk bound counts it as such. What it
looks at: meaning (inner product of the embeddings of what the answers begin with), numbers, dates and identifiers,
names, shared words, and yes against no. Answers that are equal but for case, space and punctuation are the same.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.errors import IndexRoomError
from index.reading import Reading, read

HEAD_WORDS: Final = 40
"""Words of each answer whose meaning is compared: an answer says what it says at its beginning, and embedding more
would keep the embedder from lookups."""
SETTLED: Final = 0.5  # answers this unlike in what they state are not embedded: no meaning could save them
UNKNOWN_MEANING: Final = 0.6
PAUSE_S: Final = 0.02
PATIENCE: Final = 25  # pauses before a text is embedded beside lookups
READ_CHARACTERS: Final = 4000
_YES = frozenset(
    {"yes", "yeah", "yep", "correct", "right", "true", "certainly", "absolutely", "sure", "ja", "oui", "si"}
)
_NO = frozenset({"no", "nope", "incorrect", "wrong", "false", "never", "unfortunately", "nein", "non"})
_WORD = re.compile(r"[^\W_]+")

WEIGHTS: Final[dict[str, float]] = {
    "one": -7.0,
    "meaning": 8.0,
    "shared": 3.0,
    "numbers": -4.0,
    "names": -1.5,
    "polarity": -4.0,
    "length": -0.5,
}


class Likeness(NamedTuple):
    """What two answers show without a model, each 0...1 (numbers, names: share that conflicts; length: log ratio)."""

    equal: bool
    shared: float  # content words of the poorer one that the other has too
    numbers: float
    names: float
    polarity: float
    length: float


def likeness(a: str, b: str) -> Likeness:
    """Symmetric."""
    a, b = a[:READ_CHARACTERS], b[:READ_CHARACTERS]
    words_a, words_b = _WORD.findall(a.casefold()), _WORD.findall(b.casefold())
    if words_a == words_b:
        return Likeness(True, 1.0, 0.0, 0.0, 0.0, 0.0)
    one, other = read(a), read(b)
    content_a, content_b = set(one.content), set(other.content)
    named_a = {word for word, is_name in one.content.items() if is_name}
    named_b = {word for word, is_name in other.content.items() if is_name}
    return Likeness(
        False,
        len(content_a & content_b) / min(len(content_a), len(content_b)) if content_a and content_b else 0.0,
        _conflict(_figures(one), _figures(other)),
        _conflict(named_a - content_b, named_b - content_a) if named_a and named_b else 0.0,
        float(_polarity(words_a) * _polarity(words_b) < 0),
        abs(math.log((1 + len(words_a)) / (1 + len(words_b)))),
    )


def _figures(reading: Reading) -> set[str]:
    return {*reading.numbers, *reading.dates, *reading.ids}


def _conflict(a: set[str] | set[int], b: set[str] | set[int]) -> float:
    """Share of the smaller set that the other lacks; half of it when only one has any."""
    if not a and not b:
        return 0.0
    if not a or not b:
        return 0.3
    return 1.0 - len(set(a) & set(b)) / min(len(a), len(b))


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
    odds = (
        WEIGHTS["one"]
        + WEIGHTS["meaning"] * meaning
        + WEIGHTS["shared"] * found.shared
        + WEIGHTS["numbers"] * found.numbers
        + WEIGHTS["names"] * found.names
        + WEIGHTS["polarity"] * found.polarity
        + WEIGHTS["length"] * found.length
    )
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
