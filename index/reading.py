"""One pass over a text: its tokens, sorted into the classes that a signature digests."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from index import lexicon as lex
from index.words import QUESTION_INDEX, Word, canonical_number, digest16, know

_WORD = r"[^\W\d_]++(?:['\u2019][^\W\d_]++)*+"
_TOKEN = re.compile(
    rf"""
      (?P<word>{_WORD})(?![\w@(\#]|-\w*\d|\+\+|[.:][\w/]|\.{{0,2}}/\w)
    | (?P<space>\s++)
    | (?P<stop>[.!?;:]++(?=\s|$))
    | (?P<number>[$€£¥₹₩₽]?\s?(?:\d{{4}}-\d\d-\d\d|\d{{1,2}}[:/.]\d{{1,2}}(?:[:/.]\d{{2,4}})?(?![\d.,])
        |\d++(?:[.,]\d++)*+)(?:\s?[%€£$°]|(?i:st|nd|rd|th)\b)?)(?![\w]|-\d|\.\d)
    | (?P<measure>[$€£]?\d++(?:[.,]\d++)?[A-Za-zµ]{{1,6}})(?![\w-]|\.\w)
    | (?P<code>```.*?```|`[^`\n]{{1,400}}`)
    | (?P<quoted>"[^"\n]{{1,200}}"|\u201c[^\u201d\n]{{1,200}}\u201d|\u00ab[^\u00bb\n]{{1,200}}\u00bb
        |(?<!\w)'[^'\n]{{2,100}}'(?!\w)|\u2018[^\u2019\n]{{1,100}}\u2019)
    | (?P<mail>[\w.+-]{{1,64}}+@[\w.-]+)
    | (?P<url>(?:https?|ftp|file|s3)://\S+)
    | (?P<path>(?:~|\.{{1,2}}|[A-Za-z]:)?[/\\][\w.\-/\\]+)
    | (?P<ident>[A-Za-z](?:\#|\+\+)|[^\W\d]\w*+(?:(?:\.|::|->|/|-)\w++)*+(?:\(\)?)?|(?<!\w)--?[A-Za-z][\w-]*)
    | (?P<id>\w[\w-]*+(?:[.:]\w++)*+)
    | (?P<operator>[=!<>]=+|&&|\|\||[-=]>|::|\+\+|<<|>>|[{{}}\[\]^=<>|&*+%~\\]+)
    """,
    re.VERBOSE | re.DOTALL,
)
_CAMEL = re.compile(r"[a-z]{2,}[A-Z]")
_SPANS = re.compile("[\"`\u201c\u00ab\u2018]|(?<!\\w)'")


class Reading:
    """What one pass over a text collects."""

    __slots__ = (
        "antonyms", "capitals", "code", "content", "dates", "first_word", "ids", "languages", "last_number",
        "negations", "numbers", "pending", "possessives", "question", "quoted", "sequence", "starts", "units", "words",
    )  # fmt: skip

    def __init__(self) -> None:
        self.numbers: list[str] = []
        self.units: list[str] = []
        self.dates: list[str] = []
        self.ids: list[str] = []
        self.quoted: list[str] = []
        self.code: list[str] = []
        self.content: dict[int, bool] = {}  # digest -> is a named entity
        self.sequence: list[str] = []
        self.words: list[Word] = []
        self.antonyms = [0, 0]
        self.languages = [0] * 8
        self.capitals = 0
        self.negations = 0
        self.possessives = 0
        self.question = 0
        self.first_word = True
        self.starts = True
        self.pending: tuple[int, int] | None = None  # value of number words so far, their count
        self.last_number = False

    def flush(self) -> None:
        if self.pending is not None:
            self.numbers.append(str(self.pending[0]))
            self.pending = None

    def word(self, word: Word, capital: bool) -> None:
        self.words.append(word)
        self.languages[word.language] += 1
        if capital:
            self.capitals += 1
        if word.plain:
            if self.pending is not None:
                self.flush()
            self.last_number = False
        else:
            if word.pair >= 0:
                self.antonyms[word.pair & 1] |= 1 << (word.pair >> 1)
            if word.negation:
                self.negations += 1
            if self._special(word, capital):
                self.starts = self.first_word = False
                return
        if word.digest:
            if capital and not self.starts:
                self.content[word.digest] = True
            else:
                self.content.setdefault(word.digest, False)
            self.sequence.append(word.stem)
        self.starts = self.first_word = False

    def token(self, kind: str, raw: str) -> None:
        if kind == "word":
            if _CAMEL.match(raw) is not None:
                self.other("code", raw)
            else:
                self.word(know(raw), raw[0].isupper())
        elif kind == "number":
            self.number(raw)
        elif kind == "measure":
            self.measure(raw)
        elif kind == "stop":
            self.starts = True
        else:
            self.other(kind, raw)

    def _special(self, word: Word, capital: bool) -> bool:
        """Sort a word of a closed class; whether it was a number or a unit, and so is no content word."""
        text = word.folded
        if self._number_word(text):
            return True
        followed = self.last_number or self.pending is not None
        self.flush()
        self.last_number = False
        if followed and (unit := lex.UNITS.get(text)) is not None:
            self.units.append(unit)
            return True
        if (currency := lex.CURRENCIES.get(text)) is not None:
            self.units.append(currency)
        if (date := lex.DATES.get(text)) is not None:
            self.dates.append(date)
        elif text in lex.DATES_WHEN_CAPITAL and (followed or (capital and not self.starts)):
            self.dates.append(text)
        self.possessives |= lex.POSSESSIVES.get(text, 0)
        if (kind := lex.QUESTION_WORDS.get(text)) is not None:
            if not self.question or self.question == 15:
                self.question = QUESTION_INDEX[kind]
        elif self.first_word and text in lex.YES_NO:
            self.question = 15
        if self.question == 14 and len(self.words) > 1 and self.words[-2].folded in ("how", "how's"):
            self.question = QUESTION_INDEX[lex.HOW_KINDS.get(text, "how")]
        return False

    def _number_word(self, text: str) -> bool:
        value = lex.NUMBER_WORDS.get(text)
        if value is not None:
            if text == "one" and len(self.words) > 1 and self.words[-2].folded in lex.PRONOUN_ONE:
                return False
            if self.pending is not None and (self.pending[0] % 100 >= 20 or self.pending[0] % 100 == 0) and value < 100:
                self.pending = (self.pending[0] + value, self.pending[1] + 1)
            else:
                self.flush()
                self.pending = (value, 1)
            return True
        scale = lex.MULTIPLIERS.get(text)
        if scale is not None:
            if self.pending is not None:
                self.pending = (self.pending[0] * scale, self.pending[1] + 1)
            elif self.last_number and self.numbers:
                self.numbers[-1] += f"e{scale}" if not self.numbers[-1].isdigit() else ""
                if self.numbers[-1].isdigit():
                    self.numbers[-1] = str(int(self.numbers[-1][:32]) * scale)
            else:
                self.pending = (scale, 1)
            return True
        ordinal = lex.ORDINALS.get(text)
        if ordinal is not None and not (text == "second" and self.last_number):
            base = self.pending[0] if self.pending is not None else 0
            self.pending = None
            self.numbers.append(f"#{base + ordinal}")
            return True
        return False

    def number(self, raw: str) -> None:
        self.flush()
        text = raw.replace(" ", "")
        for symbol in "$€£¥₹₩₽":
            if symbol in text:
                self.units.append(lex.CURRENCIES[symbol])
                text = text.replace(symbol, "")
        if text[-1] in "%°":
            self.units.append("percent" if text[-1] == "%" else "degree")
            text = text[:-1]
        if text[-1].isalpha():
            self.numbers.append("#" + text[:-2])
        elif ":" in text or "/" in text or text.count("-") == 2:
            self.dates.append(text)
        elif len(text) >= 6 and text.isdigit():
            self.ids.append(text)
        else:
            self.numbers.append(canonical_number(text))
        self.last_number = True
        self.starts = self.first_word = False

    def measure(self, raw: str) -> None:
        """A number with letters stuck to it: "5km", "3pm", "$20k"; anything else is an id."""
        text = raw.lstrip("$€£")
        cut = len(text)
        while text[cut - 1].isalpha():
            cut -= 1
        unit = text[cut:].lower()
        if unit in lex.UNITS or unit in lex.CURRENCIES or unit in ("am", "pm"):
            self.number(raw[: len(raw) - len(unit)])
            if unit in ("am", "pm"):
                self.dates.append(unit)
            else:
                self.units.append(lex.UNITS.get(unit) or lex.CURRENCIES[unit])
        else:
            self.ids.append(raw.casefold())
            self.starts = self.first_word = False

    def other(self, kind: str, raw: str) -> None:
        self.flush()
        self.last_number = self.first_word = self.starts = False
        if kind == "quoted":
            self.quoted.append(" ".join(raw[1:-1].casefold().split()))
        elif kind == "id":
            (self.ids if any(c.isdigit() for c in raw) else self.code).append(raw.casefold())
        elif kind == "ident":
            self._identifier(raw)
        elif kind == "code":
            self.code.append(raw.strip("`"))
        elif kind == "mail":
            self.ids.append(raw.casefold().rstrip("."))
        else:
            self.code.append(raw.rstrip(".,;!?)") if kind != "operator" else raw)

    def _identifier(self, raw: str) -> None:
        """snake_case, dotted.calls(), letters with digits, either/or; plain words joined by a slash stay words."""
        if "_" in raw or "." in raw or "(" in raw or "::" in raw or "->" in raw or raw.startswith("-"):
            self.code.append(raw.rstrip("("))
        elif raw.endswith(("#", "++")):
            self.code.append(raw.casefold())
        elif any(c.isdigit() for c in raw):
            self.ids.append(raw.casefold())
        else:
            for part in re.split("[/-]", raw):
                if part:
                    self.word(know(part), part[0].isupper())


_DIRECTIONAL: Final = frozenset(("from", "to", "into", "than"))


def direction(words: list[Word]) -> list[str]:
    """Ordered pairs: "from X to Y" and "to Y from X" are X>Y; "convert X to Y" likewise; "X than Y" is X>>Y."""
    found: list[str] = []
    origin = target = ""
    last_content = ""
    size = len(words)
    if not any(word.folded in _DIRECTIONAL for word in words):
        return found
    for i, word in enumerate(words):
        text = word.folded
        if text == "from" or text == "to" or text == "into":
            j = i + 1
            while j < size and words[j].folded in ("the", "a", "an", "my"):
                j += 1
            if j >= size:
                continue
            name = words[j].stem
            if words[j].folded in lex.TWO_WORD_HEADS and j + 1 < size:
                name += " " + words[j + 1].stem
            if text == "from":
                origin = name
                if target and not found:
                    found.append(f"{origin}>{target}")
            elif origin:
                found.append(f"{origin}>{name}")
                origin = ""
            else:
                target = name
                if last_content and any(w.folded in ("convert", "translate", "change", "exchange") for w in words[:i]):
                    found.append(f"{last_content}>{name}")
        elif text == "than" and i + 1 < size:
            rest = next((w.stem for w in words[i + 1 :] if w.digest), "")
            found.append(f">>{rest}")
        if word.digest:
            last_content = word.stem
    if origin and not target:
        found.append(f"{origin}>")
    return found


Token = tuple[str, str]


def _acronym(text: str) -> Word:
    """ "US" and "IT" in mixed-case text are names even where "us" and "it" are not."""
    word = know(text)
    return word._replace(digest=digest16(word.stem), plain=word.plain, negation=False)


def _tokens(text: str) -> tuple[Token, ...]:
    return tuple(
        (kind, match.group())
        for match in _TOKEN.finditer(text)
        if (kind := match.lastgroup) is not None and kind != "space"
    )


def _cut(chunk: str) -> tuple[Word | None, bool, bool, tuple[Token, ...]]:
    """What stands between two spaces: a word (with capital and sentence end marked), or several tokens."""
    core = chunk.strip("().,!?;:")
    if core.isalpha() and _CAMEL.match(core) is None and "(" not in chunk[1:]:
        if len(core) == 2 and core.isupper() and core not in ("OK", "NO", "AM", "PM"):
            return _acronym(core), True, chunk[-1] in ".!?;:", ()
        return know(core), core[0].isupper(), chunk[-1] in ".!?;:", ()
    return None, False, False, _tokens(chunk)


_cut_cached = lru_cache(maxsize=16384)(_cut)


def read(text: str) -> Reading:
    reading = Reading()
    if _SPANS.search(text) is not None:  # something may be quoted across spaces
        for kind, raw in _tokens(text):
            reading.token(kind, raw)
    else:
        for chunk in text.split():
            word, capital, ends, tokens = _cut_cached(chunk) if len(chunk) < 40 else _cut(chunk)
            if word is not None:
                reading.word(word, capital)
                reading.starts = ends
            else:
                for kind, raw in tokens:
                    reading.token(kind, raw)
    reading.flush()
    return reading
