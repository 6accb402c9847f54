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
    " newest recent recently upcoming ongoing price prices priced pricing weather forecast score scores"
    " standings news headline headlines breaking"
    " heute heutige heutigen morgen gestern jetzt derzeit aktuell aktuelle aktuellen aktueller neueste neuesten preis"
    " preise wetter hoy ahora ayer actual actualmente actuales reciente precio precios clima"
    " aujourd'hui aujourd\u2019hui maintenant demain hier actuel actuelle actuellement prix m\u00e9t\u00e9o".split()
)
_TIME_LEADS = frozenset(
    {"this", "last", "next", "past", "right", "time", "date", "day", "year", "as", "o'clock", "stock", "temperature"}
)
_TIME_PHRASE = re.compile(
    r"\b(?:(?:this|last|next|past)\s+(?:few\s+|couple\s+of\s+)?(?:second|minute|hour|day|night|morning|afternoon|evening|week|weekend|month"
    r"|quarter|season|year|decade|monday|tuesday|wednesday|thursday|friday|saturday|sunday|january|february|march|april"
    r"|may|june|july|august|september|october|november|december)s?"
    r"|what(?:'s|\u2019s|s|\s+is)\s+(?:the\s+)?(?:time|date|day|year)\b(?!\s+(?:of|for|complexity))"
    r"|(?:the|what)\s+time\s+is\s+it|what\s+(?:day|year|month|date)\s+is\s+it|as\s+of|right\s+away|stock\s+(?:quote|market)"
    r"|exchange\s+rate)\b"
    r"|\b(?:what|how)(?:'s|\u2019s|\s+is)\s+the\s+temperature\b(?!\s+(?:of|for|at|to|range|that|needed))"
    r"|\btemperature\s+(?:outside\b|in\s+(?!celsius|fahrenheit|kelvin|degrees|an?\b|the\s+(?:oven|fridge|freezer)))"
)
_TIMELESS = re.compile(
    r"\bcurrent\s+(?:accounts?|director(?:y|ies)|folder|branch|line|file|page|row|column|cell|user|password|element"
    r"|selection|position|scope|thread|process|node|object|value|index)\b"
    r"|\b(?:what|and)\s+now\b|\bnow\s+what\b|\bnow\s+that\b|\bfrom\s+now\s+on\b|\bwas\s+(?:mache\s+ich\s+)?jetzt\W*$"
    r"|\bet\s+maintenant\W*$|\by\s+ahora(?:\s+qu\u00e9)?\W*$"
    r"|\bprice[\s-](?:match\w*|guarantees?|protection)\b"
    r"|\bmatch\w*\s+(?:(?:a|the|any|your|their|lower|better|cheaper)\s+)*prices?\b|\bin\s+the\s+prices?\b"
    r"|\b(?:most\s+)?recent(?:ly)?\s+(?:commits?|rows?|records?|entry|entries|lines?)\b"
    r"|\bbreaking\s+changes?\b|\bcredit\s+scores?\b"
    r"|\bnext[\s-]day\s+(?:delivery|shipping)\b|\bnext\s+(?:business|working)\s+day\b|\blast\s+days?\s+of\b"
)
"""What holds a time word and has nothing to do with now: "current account", "what now?", "price match"."""
_FALSE_FRIENDS = {
    "actual": re.compile(r"\b(?:el|la|los|las|del|es|cu\u00e1l|qu\u00e9|qui\u00e9n|precio)\b"),
    "hier": re.compile(r"\b(?:le|la|les|est|que|qui|\u00e9t\u00e9|pass\u00e9|quel|quelle|ce|je|dans)\b"),
}
"""Time words of one language that mean something else in another, and what shows that language."""
_ISO_DATE = re.compile(r"(?<!\d)(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")
NEAR_DAYS = 3

_SMALL_WORDS = frozenset(
    "a an and are at be but by can do for from go good have hello here hey hi how i in is it me more morning my no not"
    " of ok okay on one or please so sorry sure tell thank thanks that the then there this to very was we well what"
    " when where which who why with yes you your continue details elaborate evening night welcome bye dear team nice"
    " again"
    " hallo guten tag abend bitte danke ja nein und oder warum was wer wie wo gut weiter"
    " hola buenos buenas d\u00edas tardes noches gracias por favor s\u00ed que qu\u00e9"
    " bonjour bonsoir salut merci oui non et ou pourquoi quoi".split()
)

# -- persons -----------------------------------------------------------------------------------------------------------

_THINGS = (
    r"(?:accounts?(?!\s+(?:models?|class|tables?|types?|objects?|services?|controllers?|managers?|settings)\b)"
    r"|orders?(?!\s+(?:of|by)\b)|balances?|invoices?|bookings?|reservations?|appointments?|statements?|passwords?|parcels?"
    r"|packages?|shipments?|deliver(?:y|ies)|salary|paycheck|tickets?|subscriptions?|prescriptions?|refunds?"
    r"|konto(?:stand)?|bestellung(?:en)?|rechnung(?:en)?|paket|lieferung|gehalt"
    r"|cuenta|pedidos?|facturas?|paquete|reserva|saldo|compte|commandes?|factures?|colis|solde)\b"
)
_MY = r"(?:my|our|mein(?:e[nmrs]?)?|unser(?:e[nmrs]?)?|mi|mis|mon|ma|mes)"
_MINE = re.compile(rf"\b{_MY}\s+(?:\w+\s+)?{_THINGS}")
_MINE_LEADS = frozenset(
    {"my", "our", "mein", "meine", "meinen", "meiner", "meinem", "meines", "unser", "unsere", "unseren", "mi", "mis"}
    | {"mon", "ma", "mes"}
)
_ASKS = (
    r"(?:where|when|why|what|which|who|how\s+(?:much|many|high|late|far))(?:'s|\u2019s|\s+(?:is|are|was|were|has|have|had|did|does|do|will))"
    r"|is|are|was|were|has|have|did|will"
    r"|(?:wo|wann|warum|was|wie\s+(?:hoch|viel))\s+(?:ist|sind|war|waren|kommt|kommen|wird|bleibt)|ist|kommt|wurde"
    r"|(?:d\u00f3nde|cu\u00e1ndo|cu\u00e1l|qu\u00e9|cu\u00e1nto)\s+(?:est\u00e1n?|es|son|llegan?|hay)"
    r"|(?:o\u00f9|quand|quel(?:le)?s?|combien)\s+(?:est|sont|arrivent?)"
)
_STATE = re.compile(
    rf"^\W*(?:(?:please|hi|hello|hey|so|ok|okay|and|bitte|hallo|hola|bonjour)\W+)*"
    rf"(?:(?:can|could|would)\s+you\s+(?:please\s+)?)?"
    rf"(?:{_ASKS}|track|check|show|find|list|look\s+up|tell|give|send|zeig|dime|montre)(?:\s+(?:me|us|mir|moi))?"
    rf"\s+(?:(?!to\b|how\b|i\b|we\b|one\b|you\b)\w+\s+){{0,3}}{_MY}\s+(?:\w+\s+)?{_THINGS}"
    rf"|\b(?:balance|status|kontostand|saldo|solde)\b|\bhow\s+much\s+(?:money|do\s+i\s+owe)\b"
    rf"|\bhow\s+long\s+(?:until|till|has|have)\b"
)
"""A question after the state of what is one's own: where it is, how much, why so high. How something is done with it
("cancel my account", "track my parcel") has one answer for everybody."""
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_PHONE = re.compile(
    r"(?<![\w.+/-])(?:\+\d(?:[ ()./-]{0,2}\d){8,14}"  # +44 20 7946 0958
    r"|\(0?\d{2,4}\)[ ./-]?\d{3,4}[ ./-]?\d{2,5}"  # (030) 901820
    r"|[2-9]\d{2}([.-])\d{3}\1\d{4}"  # 555-867-5309
    r"|0\d{2,4}[ /-]\d{3,8}(?:[ -]\d{2,5}){0,2}"  # 0171 1234567, 020 7946 0958
    r"|0[1-9](?:([ .-])\d{2})(?:\2\d{2}){3}"  # 06 12 34 56 78
    r"|[67]\d{2}[ ]\d{3}[ ]\d{3})(?![\w/-]|[.,]\d|[ ]\d)"  # 612 345 678
)
_SOCIAL = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_INSURANCE = re.compile(r"(?<!\w)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D](?!\w)")
_SPANISH = re.compile(r"(?<!\w)([XYZ]?)(\d{7,8})[ -]?([A-HJ-NP-TV-Z])(?!\w)")
_FRENCH = re.compile(r"(?<!\d)([12] ?\d{2} ?(?:0[1-9]|1[0-2]|[2-9]\d) ?\d{2} ?\d{3} ?\d{3}) ?(\d{2})(?!\d)")
_IBAN = re.compile(r"(?<![A-Z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Z0-9])")
_CARD = re.compile(r"(?<![\w.,-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|[.,]\d)")
_REFERENCE = re.compile(
    r"\b(?:customer|client|account|order|invoice|policy|member|membership|booking|reservation|case|tracking|reference"
    r"|contract|employee|patient|passport|licen[cs]e|meter|kunde|konto|kunden|bestell|rechnungs|vertrags|auftrags"
    r"|cliente|cuenta|pedido|factura|client|compte|commande|facture|dossier)"
    r"(?:[\s-]*(?:number|no\b\.?|nr\b\.?|num\b\.?|id|nummer|n\u00famero|num\u00e9ro|n\u00b0|#))?"
    r"\s*(?:(?:is|ist|es|est)\s+)?[:#]?\s*[a-z]{0,3}-?\d{5,}(?![\w.,]*\d)"
)
"""A number that names one person's account, order or file."""
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

    words: int  # two that each name something count as three: "refund policy" asks as much as "what is it"
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
        words=_counted(found if text.isascii() else [word for word in found if _UNSPACED.search(word) is None]),
        time=(_asks_of_now(lowered, words) or (has_digits and _names_near_date(text, today))),
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
    return _MINE.search(lowered) is not None and _STATE.search(lowered) is not None


def _asks_of_now(lowered: str, words: set[str]) -> bool:
    """Whether the answer depends on when it is asked."""
    timely = words & TIME_WORDS
    timely -= {word for word in timely & _FALSE_FRIENDS.keys() if _FALSE_FRIENDS[word].search(lowered) is None}
    is_phrase = not words.isdisjoint(_TIME_LEADS)
    if not (timely or is_phrase):
        return False
    rest = _TIMELESS.sub(" ", lowered)
    if rest != lowered:
        timely &= set(_WORD.findall(rest))
    return bool(timely) or (is_phrase and _TIME_PHRASE.search(rest) is not None)


def _counted(found: list[str]) -> int:
    """Words, two that each name something as three."""
    if len(found) == 2 and not _SMALL_WORDS.intersection(found) and min(map(len, found)) >= 3:
        return 3
    return len(found)


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
    """A phone, card, bank account, national id, or the number of one person's account or order."""
    upper = text.upper()
    return (
        _PHONE.search(text) is not None
        or _SOCIAL.search(text) is not None
        or _INSURANCE.search(upper) is not None
        or _REFERENCE.search(text.lower()) is not None
        or any(is_card(match[0]) for match in _CARD.finditer(text))
        or any(_begins_with_iban(match[0]) for match in _IBAN.finditer(upper))
        or any(is_spanish_id(*match.groups()) for match in _SPANISH.finditer(upper))
        or any(is_french_id(*match.groups()) for match in _FRENCH.finditer(text))
    )


def _begins_with_iban(text: str) -> bool:
    """Whether an IBAN stands here, with whatever short words follow it."""
    groups = text.split(" ")
    return any(is_iban("".join(groups[:count])) for count in range(len(groups), 0, -1))


def is_spanish_id(lead: str, digits: str, letter: str) -> bool:
    """The letter of a DNI (8 digits) or NIE (X, Y or Z and 7): what is left by 23 (Real Decreto 1553/2005)."""
    if len(digits) != (7 if lead else 8):
        return False
    return "TRWAGMYFPDXBNJZSQVHLCKE"[("XYZ".find(lead) * 10**7 + int(digits)) % 23] == letter


def is_french_id(number: str, key: str) -> bool:
    """The key of a numéro de sécurité sociale: 97 less what is left by 97 (decree 82-103)."""
    return 97 - int(number.replace(" ", "")) % 97 == int(key)


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
