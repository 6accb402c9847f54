"""What an answer states, read without a model: its sentences without courtesies, figures, names, code and negations.

"Sure! ... Hope this helps!" states nothing: sentences that are nothing but manners are left out at either end, so that
two answers are neither alike nor unlike for being polite.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from index.reading import Reading, read

READ_CHARACTERS: Final = 3000
PIECES: Final = 30  # sentences, items and lines that are read of an answer

COURTESIES: Final = (
    r"(?:hi|hello|hey|hallo|hola|bonjour|salut|guten tag)(?: (?:there|team|zusammen|a todos))?",
    r"sure(?: thing)?|certainly|of course|absolutely|no problem|gladly|happy to help|here you go|cheers",
    r"good luck.{0,20}|(?:great|good|excellent) question|thanks?(?: you)? for\b.{0,60}",
    r"(?:i'm |i am )?(?:glad|happy) (?:you asked|to help).{0,30}",
    r"klar|gerne?|sehr gerne|natürlich|selbstverständlich|gute frage|(?:vielen )?dank für\b.{0,60}|viel erfolg.{0,20}",
    r"claro(?: que sí)?|por supuesto|con (?:mucho )?gusto|buena pregunta|gracias por\b.{0,60}",
    r"bien sûr|avec plaisir|bonne question|merci (?:pour|de)\b.{0,60}|volontiers|bon courage|bonne journée",
    r".{0,40}\b(?:hope|hoffe|espère|espero)\b.{0,40}\b(?:helps?|hilft|helfen|aide|ayude?|sirva|clear|useful)\b.{0,20}",
    r"(?:please )?(?:just )?(?:let me know|feel free|don't hesitate|do not hesitate)\b.{0,90}",
    r"(?:melde dich|melden sie sich|n'hésitez pas|no dude[ns]?)\b.{0,90}",
    r"if you (?:have|need|would like|want|run into)\b.{0,60}"
    r"\b(?:let me know|just ask|feel free|happy to help|here to help)\b.{0,40}",
    r"(?:wenn|falls|bei)\b.{0,60}\b(?:fragen?|hilfe)\b.{0,60}",
    r"(?:si|s'il)\b.{0,60}\b(?:questions?|besoin|preguntas?|duda|necesitas|ayuda)\b.{0,60}",
    r"(?:is there )?anything else\b.{0,40}",
    r"(?:have|enjoy) (?:a|your)\b.{0,30}\b(?:day|one|evening|weekend|trip)\b.{0,10}",
    r"(?:einen )?schönen\b.{0,20}|que tengas?\b.{0,30}|(?:viele|beste) grüße",
)
"""Sentences of answers that state nothing: English, German, Spanish, French."""
_COURTESY = re.compile(rf"[¡¿]?(?:{'|'.join(COURTESIES)})[\s!.,:?)\u2013-]*", re.IGNORECASE)
_FENCE = re.compile(r"```[\w+-]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_END = re.compile(r"(?<=[.!?…])[\"')”»*_]*\s+(?=[^a-z\s])|\s*\n+\s*|\s+(?=[-*•]\s)")
_MARK = re.compile(r"(?:(?:[-*•>#|]+|\d{1,2}[.)])\s+)+")
_INLINE = re.compile(r"`([^`\n]+)`")
_CODE_WORD = re.compile(r"[\w.-]+")
WORD: Final = re.compile(r"(?:(?<![^\s(\[{,:=])[-\u2212](?=\d))?[^\W_]+")  # a minus is part of its number
_CLOCK = re.compile(r"(?<![\d:.,])(\d{1,2})(?::00)?\s?([ap])\.?m\b\.?", re.IGNORECASE)
_FULL_HOUR = re.compile(r"(?<![\d:.,])0?(\d{1,2}):00(?![\d:])")
_RANGE = re.compile(r"(?<![\d.,-])(\d{1,3})\s?[-\u2013]\s?(\d{1,3})(?![\d-]|[.,]\d)")
NUMBERS: Final = {
    word: str(number)
    for number, words in enumerate(
        (
            "zwei deux dos",
            "drei trois tres",
            "vier quatre cuatro",
            "fünf cinq cinco",
            "sechs six seis",
            "sieben sept siete",
            "acht huit ocho",
            "neun neuf nueve",
            "zehn dix diez",
            "elf onze once_",
            "zwölf douze doce",
            "dreizehn treize trece",
            "vierzehn quatorze catorce",
            "fünfzehn quinze quince",
        ),
        start=2,
    )
    for word in words.split()
}
"""Numbers in words that `index.reading` does not know: German, French, Spanish."""
_NUMBER = re.compile(rf"\b(?:{'|'.join(NUMBERS)})\b", re.IGNORECASE)


class Statement(NamedTuple):
    """What is left of an answer once its courtesies are gone."""

    text: str
    words: tuple[str, ...]  # casefolded, in their order
    parts: tuple[frozenset[str], ...]  # stems and code of each sentence
    stems: frozenset[str]  # of all of them
    figures: tuple[str, ...]  # numbers, dates and ids in their order
    code: frozenset[str]
    names: frozenset[int]  # digests of names
    content: frozenset[int]  # digests of all words that carry meaning
    negations: int
    antonyms: tuple[int, int]


def state(answer: str) -> Statement:
    answer = answer[:READ_CHARACTERS]
    pieces = without_courtesies(_pieces(answer))[:PIECES]
    readings = [read(_spelled(piece)) for piece in pieces]
    parts = tuple(frozenset((*reading.sequence, *map(str.casefold, reading.code))) for reading in readings)
    content = {digest: False for reading in readings for digest in reading.content}
    for reading in readings:
        content.update((digest, True) for digest, is_name in reading.content.items() if is_name)
    text = " ".join(pieces)
    return Statement(
        text=text,
        words=tuple(WORD.findall(text.casefold())),
        parts=parts,
        stems=frozenset().union(*parts),
        figures=tuple(figure for reading in readings for figure in figures_of(reading)),
        code=_code(answer),
        names=frozenset(digest for digest, is_name in content.items() if is_name),
        content=frozenset(content),
        negations=sum(word.negation for reading in readings for word in reading.words),
        antonyms=(_union(readings, 0), _union(readings, 1)),
    )


def _union(readings: list[Reading], side: int) -> int:
    mask = 0
    for reading in readings:
        mask |= reading.antonyms[side]
    return mask


def figures_of(reading: Reading) -> list[str]:
    return [figure.lstrip("#") for figure in (*reading.numbers, *reading.dates, *reading.ids)]


def without_courtesies(pieces: list[str]) -> list[str]:
    """Of an answer that is nothing but courtesies, all."""
    first, last = 0, len(pieces)
    while first < last and _COURTESY.fullmatch(pieces[first]):
        first += 1
    while first < last and _COURTESY.fullmatch(pieces[last - 1]):
        last -= 1
    return pieces[first:last] or pieces


def _pieces(text: str) -> list[str]:
    """Sentences, list items, lines; a block of code is one."""
    found: list[str] = []
    at = 0
    for fence in _FENCE.finditer(text):
        found += _sentences(text[at : fence.start()])
        found.append(" ".join(fence[1].split()))
        at = fence.end()
    found += _sentences(text[at:])
    return [piece for piece in found if any(sign.isalnum() for sign in piece)]


def _sentences(text: str) -> list[str]:
    return [
        _MARK.sub("", piece.strip(), count=1) if _MARK.match(piece.strip()) else piece for piece in _END.split(text)
    ]


def _spelled(piece: str) -> str:
    """Figures in one spelling, and no marks of Markdown."""
    piece = piece.replace("`", " ").replace("**", "").replace("|", " ")
    piece = _CLOCK.sub(_hour, piece)
    piece = _RANGE.sub(r"\1 to \2", _FULL_HOUR.sub(r"\1", piece))
    return _NUMBER.sub(lambda word: NUMBERS[word[0].lower()], piece)


def _hour(match: re.Match[str]) -> str:
    """ "3 pm" is 15."""
    hour = int(match[1]) % 12
    return str(hour + 12 * (match[2] in "pP"))


def _code(answer: str) -> frozenset[str]:
    """Words of what is marked as code."""
    marked = [fence[1] for fence in _FENCE.finditer(answer)]
    marked += _INLINE.findall(_FENCE.sub(" ", answer))
    return frozenset(word.casefold() for code in marked for word in _CODE_WORD.findall(code))
