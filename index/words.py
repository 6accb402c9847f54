"""What one word alone tells: its stem, whether it is content, and the closed classes it belongs to."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple
from zlib import crc32

from index import lexicon as lex


class Word(NamedTuple):
    """What one word alone tells; computed once and remembered."""

    folded: str
    stem: str
    digest: int  # 1..65535; 0 = not a content word
    plain: bool  # in no closed class: the common case
    negation: bool
    pair: int  # antonym pair << 1 | side, or -1
    language: int


_PAIRS: Final = {
    word: i << 1 | side
    for i, pair in enumerate(lex.ANTONYMS)
    for side, text in enumerate(pair)
    for word in text.split()
}
QUESTION_INDEX: Final = {name: i for i, name in enumerate(lex.QUESTIONS)}
_SPECIAL: Final = (
    set(lex.QUESTION_WORDS)
    | lex.YES_NO
    | set(lex.HOW_KINDS)
    | set(lex.POSSESSIVES)
    | set(lex.NUMBER_WORDS)
    | set(lex.MULTIPLIERS)
    | set(lex.ORDINALS)
    | set(lex.UNITS)
    | set(lex.CURRENCIES)
    | set(lex.DATES)
    | set(lex.DATES_WHEN_CAPITAL)
    | {"from", "to", "into", "than", "convert", "translate"}
)


_COUNTED: Final = (
    set(lex.NUMBER_WORDS) | set(lex.MULTIPLIERS) | set(lex.ORDINALS) | set(lex.DATES) | set(lex.CURRENCIES)
)
"""Words with a class of their own: "three" must equal "3", so it is no content word."""


def stem(word: str) -> str:
    """A crude English stem: enough that flight/flights, book/booking/booked agree; other languages pass through."""
    if word.endswith(("'s", "\u2019s")):
        word = word[:-2]
    n = len(word)
    if n > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if n > 5 and word.endswith("ing"):
        word = word[:-3]
    elif n > 4 and word.endswith("ed"):
        word = word[:-2]
    elif n > 4 and word.endswith("es") and word[-3] in "sxzh":
        return word[:-2]
    elif n > 3 and word.endswith("s") and word[-2] not in "su":
        word = word[:-1]
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    if len(word) > 4 and word.endswith("e"):
        word = word[:-1]
    return word


def digest16(text: str) -> int:
    return crc32(text.encode("utf-8", "surrogatepass")) % 65535 + 1


@lru_cache(maxsize=8192)
def know(word: str) -> Word:
    folded = word.casefold().replace("\u2019", "'")
    negation = (
        folded in lex.NEGATIONS
        or folded.endswith("n't")
        or (len(folded) > 8 and folded.startswith("non") and folded not in ("nonsense", "nonetheless"))
    )
    bare = folded[:-2] if folded.endswith("'s") else folded
    content = not (bare in lex.STOPWORDS or folded in lex.STOPWORDS or negation or folded in _COUNTED)
    root = stem(folded)
    return Word(
        folded,
        root,
        digest16(root) if content else 0,
        not negation and folded not in _SPECIAL and folded not in _PAIRS,
        negation,
        _PAIRS.get(folded, -1),
        lex.LANGUAGES.get(folded, 0),
    )


def canonical_number(text: str) -> str:
    """ "1,000" and "1000", "1.50" and "1.5", "0,5" and "0.5" are one number."""
    if "," in text:
        groups = text.split(",")
        if "." in text or len(groups) > 2 or (len(groups[-1]) == 3 and groups[0] != "0"):
            text = text.replace(",", "")
        else:
            text = text.replace(",", ".")
    if text.count(".") > 1:
        return text
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.lstrip("0") or "0"
