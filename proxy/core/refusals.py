"""Refusals in plain words, which end as any other answer: another try, or another model behind the name, may answer.

Conservative: a short text that begins as refusals begin, in five languages, and says no more than that. What it costs
to take an answer for one is a repeated call; a longer text that declines a part and goes on to answer is an answer.
"""

from __future__ import annotations

import re
from typing import Final

LIMIT_CHARS: Final = 600
"""A longer text says more than no."""

_SORRY: Final = (
    r"(?:(?:i(?:'m| am) (?:really |very |so |truly )?+sorry|sorry|apologies|my apologies|i apologi[sz]e|unfortunately"
    r"|as an ai(?: language)?+(?: model| assistant)?+)[,.;:!\u2014\u2013-]*+(?: but| however)?+,?+ *+)*+"
)
_ENGLISH: Final = (
    rf"{_SORRY}(?:i(?:'m| am) (?:not able|unable|not allowed|not permitted|not comfortable|not going) "
    r"(?:to (?:assist|help|comply|fulfil|provide|continue|engage|discuss|support|answer|create|generate|produce|write"
    r"|share|participate|respond|do (?:that|this))|with|providing|helping|assisting|creating|generating|discussing"
    r"|writing|sharing)"
    r"|i (?:can't|cannot|can not|won't|will not|must decline to|have to decline to) (?:assist|comply|fulfil|engage"
    r"|discuss|participate|support|help(?: you)?(?: with| to| create| write| make| plan| do|[.!,]|$)|do (?:that|this)"
    r"|(?:provide|create|generate|produce|write) (?:you )?(?:with )?(?:any |a |an |the |that|this"
    r"|instructions|content|information|guidance|advice|detailed|explicit|sexual|step)|continue|respond to"
    r"|answer (?:that|this))"
    r"|i(?:'d| would) (?:rather|prefer) not|i (?:must|have to|need to) (?:decline|refuse)"
    r"|(?:that|this) (?:is not something|isn't something) i can|i don't feel comfortable)"
)
_GERMAN: Final = (
    r"(?:(?:es tut mir (?:wirklich |sehr )?+leid|tut mir leid|entschuldigung|leider|als ki(?:-sprachmodell|-modell)?+)"
    r"[,.!]*+(?: aber| doch)?+ *+)*+(?:dass )?(?:(?:dabei|damit|hierbei|das) )?(?:ich )?(?:kann|darf|werde)(?: ich)?"
    r"(?: ihnen| dir| euch)?(?: (?!nicht)\w+){0,4} nicht (?:weiter)?(?:helfen|tun|beantworten|bereitstellen"
    r"|unterstützen|erfüllen|nachkommen|behilflich|erstellen|geben)"
)
_FRENCH: Final = (
    r"(?:(?:je suis (?:vraiment |sincèrement )?+désolée?+|désolée?+|je regrette|malheureusement|je m'excuse)[,.!]*+"
    r"(?: mais)?+,?+ *+)*+je ne (?:peux|pourrai|suis)(?: malheureusement)? pas (?:en mesure (?:de |d'))?"
    r"(?:vous |t'|te )?(?:aider|répondre|fournir|satisfaire|créer|générer|donner suite|accéder|assister|faire cela)"
)
_SPANISH: Final = (
    r"(?:(?:lo siento(?: mucho)?+|lamentablemente|lo lamento|perdona|disculpa)[,.!]*+(?: pero)?+,?+ *+)*+"
    r"(?:yo )?no (?:puedo|podré) (?:ayudar|cumplir|proporcionar|asistir|hacer eso|responder a es|generar"
    r"|crear contenido|participar|continuar)"
)
_ITALIAN: Final = (
    r"(?:(?:mi dispiace(?: molto)?+|sono spiacente|purtroppo|scusa|mi scuso)[,.!]*+(?: ma)?+,?+ *+)*+"
    r"(?:io )?non posso (?:aiutar|fornire|assister|soddisfare|rispondere a quest|creare contenuti|generare|partecipare)"
)
_BEGINS: Final = re.compile("|".join(f"(?:{words})" for words in (_ENGLISH, _GERMAN, _FRENCH, _SPANISH, _ITALIAN)))
_GOES_ON: Final = re.compile(
    r"\n\n|\n[-*\d]|```|\b(?:however|instead|but i can|here(?:'s| is| are)|what i can|jedoch|stattdessen"
    r"|hier (?:ist|sind)|aber ich kann|cependant|en revanche|voici|sin embargo|en cambio|aquí|tuttavia|invece|ecco)\b"
)
"""Signs that something is answered all the same."""


def is_refusal(text: str) -> bool:
    """Whether an answer says no, and nothing but no."""
    if len(text) > LIMIT_CHARS:
        return False
    said = text.strip().lower().replace("\u2019", "'").lstrip("*_\"'«“ ")
    found = _BEGINS.match(said)
    return found is not None and _GOES_ON.search(said, found.end()) is None
