"""Changes to a text: those that keep its meaning, and those that do not although they are small.

A rewording returns a text. A hard edit returns the text and what it did, or None where it does not apply; the same
text under two different deeds has two meanings. Both draw from `random.Random`, so a seed fixes everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from random import Random
from typing import NamedTuple

from index.guard.training import phrases
from index.lexicon import ANTONYMS

Edited = tuple[str, str]


class Adjunct(NamedTuple):
    """A restriction and its wordings; two of one group exclude each other no more than two of different groups."""

    group: int
    wordings: tuple[str, ...]


def _listed(text: str, separator: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.strip().split(separator))


@cache
def adjuncts() -> tuple[Adjunct, ...]:
    return tuple(
        Adjunct(group, _listed(member, "|"))
        for group, line in enumerate(phrases.lines("adjuncts"))
        for member in line.split(", ")
    )


@cache
def qualifiers() -> dict[str, tuple[str, ...]]:
    """Noun → words that narrow it."""
    rows = (line.split(":") for line in phrases.lines("qualifiers"))
    return {noun.strip(): _listed(words, ",") for noun, words in rows}


CONTRACTIONS = (
    ("what is", "what's"), ("how is", "how's"), ("where is", "where's"), ("who is", "who's"), ("i am", "i'm"),
    ("i would", "i'd"), ("i have", "i've"), ("do not", "don't"), ("does not", "doesn't"), ("did not", "didn't"),
    ("can not", "can't"), ("cannot", "can't"), ("will not", "won't"), ("is not", "isn't"), ("are not", "aren't"),
    ("it is", "it's"), ("that is", "that's"), ("there is", "there's"), ("they are", "they're"), ("we are", "we're"),
    ("you are", "you're"), ("i will", "i'll"), ("let us", "let's"), ("want to", "wanna"), ("because", "cause"),
)  # fmt: skip
HOW_TO = (
    "how do i", "how can i", "how to", "how would i", "how does one", "how could i", "how should i", "how do you",
    "what is the best way to", "what's the way to", "what do i do to", "what are the steps to", "is there a way to",
    "i want to", "i'd like to", "i need to", "show me how to", "tell me how to", "explain how to", "can you help me",
)  # fmt: skip
_HOW = re.compile(r"^(how do i|how can i|how to|how would i|what is the way to|what are the steps to)\b", re.I)
_ASKED = re.compile(r"^(what|when|where|who|which|why|how)\b", re.I)
_AUXILIARY = re.compile(r"^(is|are|was|were|does|do|did|can|could|should|would|will|may|must|has|have)\b", re.I)
_INVERTED = re.compile(r"^(what|when|where|who|which|why|how)( \w+)? (is|are|was|were|does|do|did|can) ", re.I)
_IMPERATIVE = re.compile(
    r"^(show|list|find|give|tell|write|compose|set|play|add|remove|delete|turn|switch|book|cancel|call|text|send|move|"
    r"remind|put|make|convert|translate|start|stop|order|reserve|schedule|lock|order|read|open|include|count|save)\b",
    re.I,
)
_NUMBER = re.compile(r"(?<![\w.,])\$?\d[\d,]*(?:\.\d+)?(?![\w.])")
_ARTICLE = re.compile(
    r"\b(the|my|your|a|an|which|any|these|our) "
    r"(?!(?:is|are|was|were|do|does|did|can|will|should|must|has|have|best|most|same|other|way)\b)(?=[a-z]{4,})",
    re.I,
)
_NAME = re.compile(r"(?<=[a-z,] )([A-Z][a-z]{2,})\b")
_FROM_TO = re.compile(r"\bfrom ((?:the )?[\w'-]+) (to|into) ((?:the )?[\w'-]+)\b", re.I)
_THAN = re.compile(r"\b([\w'-]+) ((?:is |are |was )?(?:\w+er|more \w+|less \w+)) than ((?:the |a )?[\w'-]+)", re.I)
NUMBER_WORDS = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "fifteen", "twenty",
    "thirty", "forty", "fifty", "sixty", "hundred", "thousand",
)  # fmt: skip


def _negating() -> tuple[tuple[re.Pattern[str], str], ...]:
    """Patterns and what they become; each turns a question or a wish round."""
    pairs = (
        (r"\bhow (do|can|could|should|would) i (?!not)", r"how \1 i not "),
        (r"\bhow to (?!not)", "how not to "),
        (r"\bwhy (is|are|was|were|does|do|did|can|should) (the |my |a |an )?(\w+) ", r"why \1 \2\3 not "),
        (
            r"\b(which|what) ([\w ]{1,20}?)\b(have|need|take|include|offer|cover|come|use|work|get|cost) ",
            r"\1 \2do not \3 ",
        ),
        (r"\bwhich ([\w ]{1,20}?)\b(is|are|was|were|can|should|will) ", r"which \1\2 not "),
        (r"\bwho (is|was|can|should|must|will|has) ", r"who \1 not "),
        (r"\bwhere (can|should|may) i ", r"where \1 i not "),
        (r"\bwhen (can|should|may|must) i ", r"when \1 i not "),
        (r"\bwhat should i ", "what should i not "),
        (r"\bwhat can i ", "what can i not "),
        (r"\bi want\b", "i don't want"),
        (r"\bi would like\b", "i would not like"),
        (r"\bi'd like\b", "i would hate"),
        (r"\bi need\b", "i don't need"),
        (r"\bi can\b", "i can't"),
        (r"\bi have\b", "i don't have"),
        (r"\bi am\b", "i am not"),
        (r"\bi'm\b", "i'm not"),
        (r"\bi received\b", "i never received"),
        (r"\bthere is\b", "there is no"),
        (r"\bis there (a|an|any)?\b", "is there no"),
        (r"\bwith\b", "without"),
        (r"\bwithout\b", "with"),
        (r"\bhas (been)?", r"has not \1"),
        (r"\bmust\b", "need not"),
        (r"\b(is|are) (allowed|possible|included|required|covered|available|free|safe)\b", r"\1 not \2"),
        (r"\b(possible)\b", "impossible"),
        (r"\b(allowed)\b", "forbidden"),
        (r"\b(available)\b", "unavailable"),
        (r"\bcan be\b", "cannot be"),
        (r"\bworks\b", "does not work"),
        (r"\b(don't|do not|doesn't|does not|didn't|did not|won't|never) ", ""),
        (r"\b(can't|cannot) ", "can "),
        (r"\b(isn't|is not) ", "is "),
        (r"\bnot ", ""),
        (r"\bno ", "a "),
        (r"\balways\b", "never"),
        (r"\bto (be|have|get|use|pay|see|eat|take|do) ", r"to avoid \1ing "),
    )
    return tuple((re.compile(pattern, re.I), after) for pattern, after in pairs)


NEGATING = _negating()


@cache
def _same() -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    found = []
    for line in phrases.lines("same"):
        group = _listed(line, ",")
        found.append((re.compile(rf"\b({'|'.join(map(re.escape, group))})\b", re.I), group))
    return tuple(found)


@cache
def _exclusive() -> dict[str, tuple[str, ...]]:
    """Word → the words that exclude it; the lexicon's antonyms are among them."""
    found: dict[str, tuple[str, ...]] = {}
    for line in phrases.lines("exclusive"):
        group = _listed(line, ",")
        for word in group:
            found[word] = found.get(word, ()) + tuple(other for other in group if other != word)
    for left, right in ANTONYMS:
        mine, theirs = left.split(), right.split()
        if len(mine) == len(theirs):
            for one, other in zip(mine, theirs, strict=True):
                found.setdefault(one, ())
                found.setdefault(other, ())
                found[one] += (other,)
                found[other] += (one,)
    return found


@cache
def _exclusive_pattern() -> re.Pattern[str]:
    words = sorted(_exclusive(), key=len, reverse=True)
    return re.compile(rf"(?<![\w'-])({'|'.join(map(re.escape, words))})(?![\w'-])", re.I)


def _like(word: str, model: str) -> str:
    """`word` with the capitals of `model`."""
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


# What keeps the meaning.


def reword(text: str, rng: Random, times: int) -> str:
    """The text after `times` changes that keep its meaning."""
    for change in rng.choices(REWORDINGS, weights=REWORDING_WEIGHTS, k=times):
        text = change(text, rng)
    return text


def _synonym(text: str, rng: Random) -> str:
    groups = list(_same())
    rng.shuffle(groups)
    for pattern, group in groups:
        if found := pattern.search(text):
            others = [word for word in group if word != found.group().lower()]
            return text[: found.start()] + _like(rng.choice(others), found.group()) + text[found.end() :]
    return text


def _how(text: str, rng: Random) -> str:
    return _HOW.sub(lambda found: rng.choice(HOW_TO), text, count=1)


def _open(text: str, rng: Random) -> str:
    opening = rng.choice(phrases.short("openings"))
    return f"{opening}{rng.choice((',', ':', '!', ' -', ','))} {text}"


def _ask(text: str, rng: Random) -> str:
    """Put the question into another: word order stays, which people do as well."""
    if not _ASKED.match(text):
        return text
    asking = rng.choice(phrases.short("asking"))
    found = _INVERTED.match(text)
    if found and found.group(3).lower() in ("is", "are", "was", "were") and len(text) < 60 and rng.random() < 0.5:
        return f"{asking} {text[: found.start(3)].rstrip()} {text[found.end() :].rstrip('?.! ')} {found.group(3)}"
    return f"{asking}{rng.choice((' ', ' ', ': '))}{text}"


def _close(text: str, rng: Random) -> str:
    mark = rng.choice(("?", ".", ",", ""))
    return f"{text.rstrip('?.! ')}{mark} {rng.choice(phrases.short('closings'))}"


def _contract(text: str, rng: Random) -> str:
    pairs = [pair for pair in CONTRACTIONS if re.search(rf"\b{pair[0]}\b", text, re.I)]
    if not pairs:
        return text
    long, short = rng.choice(pairs)
    return re.sub(rf"\b{long}\b", lambda found: _like(short, found.group()), text, count=1, flags=re.I)


def _expand(text: str, rng: Random) -> str:
    pairs = [pair for pair in CONTRACTIONS if pair[1] in text and pair[1] != "cause"]
    if not pairs:
        return text
    long, short = rng.choice(pairs)
    return text.replace(short, long, 1)


def _typo(text: str, rng: Random) -> str:
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha() and word.islower()]
    if not places:
        return text
    at = rng.choice(places)
    word = words[at]
    cut = rng.randrange(1, len(word) - 2)
    words[at] = rng.choice(
        (
            word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :],
            word[:cut] + word[cut + 1 :],
            word[:cut] + word[cut] + word[cut:],
        )
    )
    return " ".join(words)


def _drop_article(text: str, rng: Random) -> str:
    return re.sub(r"\b(the|a|an) ", "", text, count=rng.choice((1, 1, 0)), flags=re.I)


def _mark(text: str, rng: Random) -> str:
    return text.rstrip("?.! ") + rng.choice(("?", "??", "", ".", " ?", "!", "?!"))


def _case(text: str, rng: Random) -> str:
    return rng.choice((str.lower, str.lower, str.upper, str.title, lambda x: x[:1].upper() + x[1:]))(text)


def _fill(text: str, rng: Random) -> str:
    filler = rng.choice(phrases.short("fillers"))
    text = text if text[-1:] in "?.!" else text + rng.choice("?.")
    return f"{filler} {text}" if rng.random() < 0.5 else f"{text} {filler}"


REWORDINGS: tuple[Callable[[str, Random], str], ...] = (
    _synonym, _how, _open, _ask, _close, _contract, _expand, _typo, _drop_article, _mark, _case, _fill,
)  # fmt: skip
REWORDING_WEIGHTS = (5, 3, 2, 3, 2, 2, 1, 1.5, 1, 2, 0.5, 1)


# What changes it.


def change_number(text: str, rng: Random) -> Edited | None:
    found = list(_NUMBER.finditer(text))
    words = [m for m in re.finditer(rf"\b({'|'.join(NUMBER_WORDS)})\b", text, re.I)]
    if not found and not words:
        return None
    match = rng.choice(found + words)
    old = match.group()
    if old[-1:].isalpha():
        new = rng.choice([word for word in NUMBER_WORDS if word != old.lower()])
    else:
        digits = old.lstrip("$")
        value = float(digits.replace(",", ""))
        whole = value == int(value) and "." not in digits
        choices = [value + rng.randint(1, 10), value + 1, value * rng.choice((2, 3, 10)), value * 5]
        if "," not in digits and digits[-1:] != "0":
            choices += [float(digits[::-1])] * 2
        if value > 12:
            choices += [value - rng.randint(1, 10), float(rng.randint(1, int(value)))]
        fresh = rng.choice([choice for choice in choices if choice != value])
        shown = f"{int(fresh):,}" if whole and "," in digits else f"{int(fresh)}" if whole else f"{fresh:.4g}"
        new = "$" * old.startswith("$") + shown
    return text[: match.start()] + _like(new, old) + text[match.end() :], f"number {match.start()} {new}"


def change_word(text: str, rng: Random) -> Edited | None:
    """One word of an exclusive group becomes another."""
    found = list(_exclusive_pattern().finditer(text))
    if not found:
        return None
    match = rng.choice(found)
    new = rng.choice(_exclusive()[match.group().lower()])
    return text[: match.start()] + _like(new, match.group()) + text[match.end() :], f"word {match.start()} {new}"


def change_name(text: str, rng: Random) -> Edited | None:
    found = list(_NAME.finditer(text))
    if not found:
        return None
    if len(found) > 1 and rng.random() < 0.35:
        one, other = sorted(rng.sample(found, 2), key=lambda m: m.start())
        if one.group() != other.group():
            swapped = other.group() + text[one.end() : other.start()] + one.group()
            return text[: one.start()] + swapped + text[other.end() :], "names exchanged"
    match = rng.choice(found)
    new = rng.choice([name for name in phrases.short("names") if name != match.group()])
    return text[: match.start()] + new + text[match.end() :], f"name {match.start()} {new}"


def turn_round(text: str, rng: Random) -> Edited | None:
    """From X to Y becomes from Y to X; X than Y becomes Y than X."""
    if (found := _FROM_TO.search(text)) and found.group(1) != found.group(3):
        return _FROM_TO.sub(r"from \3 \2 \1", text, count=1), "direction"
    if (found := _THAN.search(text)) and found.group(1) != found.group(3):
        return _THAN.sub(r"\3 \2 than \1", text, count=1), "direction"
    return None


def negate(text: str, rng: Random) -> Edited | None:
    if _IMPERATIVE.match(text) and rng.random() < 0.5:
        return f"don't {text[:1].lower()}{text[1:]}", "negation"
    matching = [(pattern, after) for pattern, after in NEGATING if pattern.search(text)]
    if not matching:
        return None
    pattern, after = rng.choice(matching)
    return pattern.sub(lambda m: _like(m.expand(after), m.group()), text, count=1), "negation"


def narrow(text: str, rng: Random) -> Edited | None:
    """A restriction at the end, or a word before a noun that narrows it."""
    if rng.random() < 0.5 and (narrowed := qualify(text, rng)):
        return narrowed
    adjunct = rng.choice(adjuncts())
    return restrict(text, adjunct, rng), f"adjunct {adjunct.wordings[0]}"


def restrict(text: str, adjunct: Adjunct, rng: Random) -> str:
    wording = rng.choice(adjunct.wordings)
    end = text[-1] if text[-1:] in "?.!" else ""
    if rng.random() < 0.2:
        return f"{wording}, {text}"
    return f"{text.rstrip('?.! ')}{rng.choice((' ', ' ', ' ', ', '))}{wording}{end}"


@cache
def _noun_pattern() -> re.Pattern[str]:
    return re.compile(rf"(?<= )({'|'.join(sorted(qualifiers(), key=len, reverse=True))})(?![\w'-])")


def qualify(text: str, rng: Random) -> Edited | None:
    known = list(_noun_pattern().finditer(text))
    after_article = list(_ARTICLE.finditer(text))
    if known and (not after_article or rng.random() < 0.5):
        match = rng.choice(known)
        at, word = match.start(), rng.choice(qualifiers()[match.group()])
    elif after_article:
        at, word = rng.choice(after_article).end(), rng.choice(phrases.short("adjectives"))
    else:
        return None
    return f"{text[:at]}{word} {text[at:]}", f"qualifier {at} {word}"


EDITS: dict[str, Callable[[str, Random], Edited | None]] = {
    "number": change_number,
    "word": change_word,
    "name": change_name,
    "direction": turn_round,
    "negation": negate,
    "scope": narrow,
}


def hard_edit(text: str, rng: Random) -> Edited | None:
    """One edit of a kind that applies, drawn evenly among the kinds; its name begins what it did."""
    kinds = list(EDITS)
    rng.shuffle(kinds)
    for kind in kinds:
        if (done := EDITS[kind](text, rng)) and done[0].casefold() != text.casefold():
            return done[0], f"{kind}: {done[1]}"
    return None
