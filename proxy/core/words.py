"""What a prompt's text shows to a reader who only knows patterns: time, persons, injection, odd characters, length.

Word lists first, patterns only where a cheap sign makes them worth running. English, with the commonest words of
German, Spanish and French. Every list errs towards finding too much: the price of a false alarm is one forward.
"""

from __future__ import annotations

import re
from datetime import date
from typing import NamedTuple

READ_LIMIT_CHARS = 8192

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")

# -- time --------------------------------------------------------------------------------------------------------------

TIME_WORDS = frozenset(
    "today today's todays tonight tomorrow tomorrow's yesterday yesterday's now nowadays current currently latest"
    " newest recent recently upcoming ongoing price prices priced pricing weather forecast temperature score scores"
    " standings news headline headlines breaking"
    " heute heutige heutigen morgen gestern jetzt derzeit aktuell aktuelle aktuellen aktueller neueste neuesten preis"
    " preise wetter hoy ahora ayer actual actualmente actuales reciente precio precios clima"
    " aujourd'hui aujourd\u2019hui maintenant demain hier actuel actuelle actuellement prix m\u00e9t\u00e9o".split()
)
_TIME_LEADS = frozenset(
    {"this", "last", "next", "past", "right", "time", "date", "day", "year", "as", "o'clock", "stock"}
)
_TIME_PHRASE = re.compile(
    r"\b(?:(?:this|last|next|past)\s+(?:few\s+|couple\s+of\s+)?(?:second|minute|hour|day|night|morning|afternoon|evening|week|weekend|month"
    r"|quarter|season|year|decade|monday|tuesday|wednesday|thursday|friday|saturday|sunday|january|february|march|april"
    r"|may|june|july|august|september|october|november|december)s?"
    r"|what(?:'s|\u2019s|s|\s+is)\s+(?:the\s+)?(?:time|date|day|year)\b(?!\s+(?:of|for|complexity))"
    r"|(?:the|what)\s+time\s+is\s+it|what\s+(?:day|year|month|date)\s+is\s+it|as\s+of|right\s+away|stock\s+(?:quote|market)"
    r"|exchange\s+rate)\b"
)
_ISO_DATE = re.compile(r"(?<!\d)(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")
NEAR_DAYS = 3

# -- persons -----------------------------------------------------------------------------------------------------------

_MINE = re.compile(
    r"\b(?:my|our|mein(?:e[nmrs]?)?|mi|mis|mon|ma|mes)\s+(?:\w+\s+)?(?:accounts?|orders?|balances?|invoices?|bookings?|reservations?"
    r"|appointments?|statements?|passwords?|parcels?|shipments?|salary|paycheck|tickets?|subscriptions?|prescriptions?"
    r"|konto|bestellung|rechnung|cuenta|pedido|factura|compte|commande|facture)\b"
)
_MINE_LEADS = frozenset(
    {"my", "our", "mein", "meine", "meinen", "meiner", "meinem", "meines", "mi", "mis", "mon", "ma", "mes"}
)
_HOW_TO = re.compile(
    r"^\W*(?:(?:please|hi|hello|hey|so|ok|okay|um|uh|and|for my \w+)\W+)*"
    r"(?:how\s+(?:do|does|can|could|would|should|might|to|long|much)\b|where\s+(?:do|can|could|should)\s+(?:i|we|one)\b"
    r"|(?:can|could|may|should|must)\s+(?:i|we|one)\b|do\s+(?:i|we)\s+(?:need|have)\s+to\b|am\s+i\s+(?:able|allowed)\b"
    r"|is\s+it\s+(?:possible|allowed|ok|okay)\b|is\s+there\s+(?:a|any)\s+way\b|what\s+(?:do|must|should)\s+i\s+do\b"
    r"|what\s+(?:are\s+the\s+steps|is\s+the\s+(?:way|process|procedure))\b|what\s+happens\s+(?:if|when)\b"
    r"|(?:can|could|would)\s+you\s+(?:please\s+)?(?:tell|explain|show)\s+(?:me\s+)?how\b)"
)
"""A question about how something is done: "my account" in it is anybody's. What asks for a state ("where is my order",
"my balance is wrong") stays personal."""
_STATE = re.compile(
    r"\b(?:balance|how\s+much\s+(?:is|are|do\s+i|money)|how\s+long\s+(?:until|till|has|have)|check|see|find\s+out|track)\b"
)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_PHONE = re.compile(
    r"(?<![\w.+/-])(?:\+\d(?:[ ()./-]{0,2}\d){6,14}"
    r"|\(\d{2,5}\)[ ./-]?\d{2,4}[ ./-]?\d{2,5}"
    r"|\d{3,5}[ ./-]\d{3,4}[ ./-]\d{3,4})(?![\w/-]|[.,]\d)"
)
_SOCIAL = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_IBAN = re.compile(r"(?<![A-Z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Z0-9])")
_CARD = re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d-]|[.,]\d)")
_LONG_NUMBER = re.compile(r"(?<![\d.,])\d{6,}(?![.,]?\d)")
_DIGITS = re.compile(r"\d")
_DIGITS_OF_A_PERSON = 6

# -- injection ---------------------------------------------------------------------------------------------------------

_INJECTION_LEADS = frozenset(
    "ignore disregard forget override overwrite bypass pretend roleplay jailbreak jailbroken dan reveal repeat print"
    " system developer instruction instructions inst unrestricted uncensored simulate ignoriere ignora ignorez"
    " oublie".split()
)
_INJECTION = re.compile(
    r"\b(?:ignore|disregard|forget|override|overwrite|bypass)\b.{0,40}\b(?:previous|prior|above|earlier|preceding|all|any|your|system|these|those)\b"
    r".{0,40}\b(?:instructions?|prompts?|rules?|messages?|guidelines?|directions?|context|polic(?:y|ies)|restrictions?)\b"
    r"|\b(?:reveal|print|show|repeat|output|leak)\b.{0,40}\b(?:system|initial|hidden|developer|original)\s+(?:prompt|message|instructions?)\b"
    r"|\brepeat\b.{0,20}\b(?:words|text|everything)\s+above\b"
    r"|\b(?:pretend|act|simulate|roleplay)\b.{0,40}\b(?:no\s+(?:restrictions|rules|limits|filters)|unrestricted|uncensored|jailbroken|dan)\b"
    r"|\bjailbr(?:eak|oken)\b|\bdo\s+anything\s+now\b|\bdeveloper\s+mode\b"
    r"|\bignoriere\b.{0,40}\banweisung|\bignora\b.{0,40}\binstrucci|\b(?:ignorez|oublie)\b.{0,40}\binstructions?\b"
    r"|(?:^|\n)\s*(?:\#{1,6}\s*)?(?:system|assistant|developer|instructions?)\s*:",
    re.DOTALL,
)
_TEMPLATE_SIGN = re.compile(r"[<\[|{]")
_TEMPLATE_MARKS = ("<|", "|>", "[inst", "[/inst", "<<sys", "<</sys", "<s>", "</s>", "<system", "</system", "{{#")

# -- characters --------------------------------------------------------------------------------------------------------

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\uffff\U000e0000-\U000e0fff\ue000-\uf8ff"
    "\U000f0000-\U0010ffff\ud800-\udfff]"
)
_JOINER_IN_WORD = re.compile("(?<=[\u0600-\u06ff\u0900-\u0dff])[\u200c\u200d](?=[\u0600-\u06ff\u0900-\u0dff])")
_LOOKALIKE = "\u0370-\u03ff\u0400-\u052f\u0530-\u058f\u13a0-\u13ff\u1c80-\u1c8f\u1f00-\u1fff\u2c80-\u2cff\ua640-\ua69f"
_LATIN = "A-Za-z\u00c0-\u024f"
_MIXED = re.compile(  # the second line: Latin in disguise
    f"[{_LATIN}][\\d_]*[{_LOOKALIKE}]|[{_LOOKALIKE}][\\d_]*[{_LATIN}]"
    "|[\uff21-\uff3a\uff41-\uff5a\u249c-\u24e9\u2100-\u214f\U0001d400-\U0001d7ff\U0001f130-\U0001f189]"
)
_SYMBOL = re.compile(  # no letter, mark, digit, blank or ordinary sign: an embedding model reads most of them alike
    "[^\\w\\s!-~\u00a1-\u00bf\u00d7\u00f7\u0300-\u036f\u0591-\u05c7\u0600-\u06ff\u0900-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2122\u200c\u200d\ufe0e\ufe0f\u3000-\u303f\uff01-\uff0f\uff1a-\uff1f]"
)


class Reading(NamedTuple):
    """What one look at a prompt found."""

    words: int
    time: bool
    personal: bool
    injection: bool
    odd: str | None  # "invisible", "mixed_script", "symbols"


def read_prompt(text: str, today: date | None = None) -> Reading:
    """One look at a prompt. Without `today` any date counts as near.

    Of a text longer than READ_LIMIT_CHARS only beginning and end are read, where instructions stand: looking stays
    within a few milliseconds whatever comes. Scripts without spaces count as no words: what cannot be counted is not
    long enough.
    """
    if len(text) > READ_LIMIT_CHARS:
        half = READ_LIMIT_CHARS // 2
        text = f"{text[:half]}\n{text[-half:]}"
    lowered = text.lower()
    found = _WORD.findall(lowered)
    words = set(found)
    has_digits = _DIGITS.search(text) is not None and len(_DIGITS.findall(text)) >= _DIGITS_OF_A_PERSON
    return Reading(
        words=len(found) if text.isascii() else sum(_UNSPACED.search(word) is None for word in found),
        time=(
            not words.isdisjoint(TIME_WORDS)
            or (not words.isdisjoint(_TIME_LEADS) and _TIME_PHRASE.search(lowered) is not None)
            or (has_digits and _names_near_date(text, today))
        ),
        personal=(
            ("@" in text and _EMAIL.search(text) is not None)
            or (not words.isdisjoint(_MINE_LEADS) and _asks_of_mine(lowered))
            or (has_digits and _names_number(text))
        ),
        injection=(
            (_TEMPLATE_SIGN.search(text) is not None and any(mark in lowered for mark in _TEMPLATE_MARKS))
            or (not words.isdisjoint(_INJECTION_LEADS) and _INJECTION.search(lowered) is not None)
        ),
        odd=odd_characters(text),
    )


def _asks_of_mine(lowered: str) -> bool:
    """Whether the answer depends on whose account, order or booking it is."""
    if _MINE.search(lowered) is None:
        return False
    return _HOW_TO.search(lowered) is None or _STATE.search(lowered) is not None


def odd_characters(text: str) -> str | None:
    """Characters a reader does not see, letters that pose as others, and signs a model cannot tell apart."""
    if text.isascii():
        return "invisible" if _CONTROL.search(text) is not None else None
    if _INVISIBLE.search(_JOINER_IN_WORD.sub("", text)) is not None:
        return "invisible"
    if _MIXED.search(text) is not None:
        return "mixed_script"
    return "symbols" if _SYMBOL.search(text) is not None else None


def _names_near_date(text: str, today: date | None) -> bool:
    for match in _ISO_DATE.finditer(text):
        try:
            named = date(int(match[1]), int(match[2]), int(match[3]))
        except ValueError:
            continue
        if today is None or abs((named - today).days) <= NEAR_DAYS:
            return True
    return False


def _names_number(text: str) -> bool:
    """A phone, card, bank account or long identifying number."""
    return (
        any(not match[0].endswith("000") for match in _LONG_NUMBER.finditer(text))
        or _PHONE.search(text) is not None
        or _SOCIAL.search(text) is not None
        or any(is_card(match[0]) for match in _CARD.finditer(text))
        or any(is_iban(match[0]) for match in _IBAN.finditer(text.upper()))
    )


def is_card(text: str) -> bool:
    """Luhn's check over 13 to 19 digits (ISO/IEC 7812-1)."""
    digits = [int(sign) for sign in text if sign.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """The check digits of an IBAN: 97 divides what remains 1 (ISO 13616-1)."""
    compact = text.replace(" ", "").upper()
    if not 15 <= len(compact) <= 34 or not compact.isascii() or not compact.isalnum():
        return False
    return int("".join(str(int(sign, 36)) for sign in compact[4:] + compact[:4])) % 97 == 1
