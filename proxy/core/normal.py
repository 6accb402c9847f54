"""The normal form of a question: what is left once case, spacing, closing punctuation and pleasantries are gone.

Two texts with one normal form ask the same, as far as a reader of patterns can tell; whether the stored answer serves
is still for the judge and the guards. Nothing between the pleasantries is changed but case and spacing, so that texts
that differ in a number, a negation or a word never meet. There is none for what may hold meaning in its case or signs:
code, quotes, scripts other than Latin, Turkish; nor for less than two words.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

LIMIT_CHARS: Final = 2000
MIN_WORDS: Final = 2

GREETINGS: Final = (
    r"(?:hi|hello|hey|hiya|greetings|good (?:morning|afternoon|evening|day)|dear)"
    r"(?: (?:there|again|team|all|everyone|everybody|folks|guys|support))?",
    r"(?:hallo|moin|servus|guten (?:morgen|tag|abend)|grüß gott)(?: (?:zusammen|team|liebes team))?",
    r"(?:bonjour|bonsoir|salut|coucou)(?: (?:à tous|à toutes|l'équipe))?",
    r"(?:hola|buenos días|buenas tardes|buenas noches|buenas)(?: (?:a todos|equipo))?",
)
"""Come first; with a sign after them, or before a word that begins a question."""
OPENINGS: Final = (
    r"please|pls|(?:just )?(?:a |one )?(?:quick|short|small) question|i have a (?:(?:quick|short|small) )?question",
    r"(?:can|could|would|will) you (?:please )?help(?: me)?(?: out)?(?: please)?|sorry to bother you|excuse me",
    r"i was (?:just )?wondering|tell me",
    r"bitte|(?:nur )?(?:eine )?kurze frage|ich (?:habe|hätte) (?:da )?(?:mal )?eine (?:kurze )?frage|entschuldigung",
    r"(?:kannst du|können sie|könnten sie|könntest du) mir (?:bitte )?(?:kurz )?helfen",
    r"s'il (?:vous|te) plaît|svp|(?:une )?petite question|excusez-moi|(?:pouvez-vous|peux-tu|pourriez-vous) m'aider",
    r"por favor|una (?:pregunta|duda)(?: rápida)?|(?:me puede|me puedes|puede|puedes) ayudar(?:me)?|disculpe|perdona",
)
"""With a sign after them, or before a word that begins a question."""
ASKING: Final = (
    r"(?:can|could|would|will) you (?:please )?tell me(?: please)?|(?:please )?tell me|do you know",
    r"i(?:'d| would) like to know|i want to know",
    r"(?:kannst du|können sie|könnten sie|könntest du) mir (?:bitte )?sagen|weißt du|wissen sie|ich wollte fragen",
    r"(?:pouvez-vous|peux-tu|pourriez-vous) me dire|savez-vous|je me demandais",
    r"(?:me puede|me puedes|puede|puedes|podría|podrías) decir(?:me)?|quisiera saber|quería saber",
)
"""Only before a word that asks: "tell me a joke" is no pleasantry."""
CLOSINGS: Final = (
    r"(?:many )?thanks(?: a lot| so much| very much)?(?: in advance)?|thank you(?: (?:so|very) much)?(?: in advance)?",
    r"thx|cheers|please|pls|(?:best|kind) regards",
    r"(?:vielen |besten )?dank(?: im voraus)?|danke(?: schön| sehr)?(?: im voraus)?|bitte|viele grüße",
    r"merci(?: beaucoup)?(?: d'avance| par avance)?|s'il (?:vous|te) plaît|svp|cordialement",
    r"(?:muchas )?gracias(?: de antemano)?|por favor|saludos",
)
"""Come last, after a sign or a space."""
ASKS: Final = (
    r"how|what|what's|where|when|why|who|which|whose|if|whether",
    r"wie|was|wo|wann|warum|wer|welche[nmrs]?|wieso|ob|woher|wohin|wieviel",
    r"comment|que|qu'est-ce|quoi|où|quand|pourquoi|qui|quel|quelle|quels|quelles|combien|si",
    r"cómo|qué|dónde|cuándo|por qué|quién|cuál|cuáles|cuánto|cuánta|cuántos|cuántas",
)
BEGINS: Final = (
    r"is|are|was|were|do|does|did|can|could|should|would|will|may|must|am|has|have|i|i'm|i'd|we|my|tell|explain",
    r"ist|sind|kann|können|darf|muss|gibt|ich|wir|mein|meine|habe|hat|soll",
    r"est-ce|est|puis-je|peut-on|je|j'ai|faut-il|dois-je|mon|ma",
    r"puedo|es|hay|tengo|se puede|necesito|debo|mi|quiero",
)
ABOUT_WORDS: Final = (
    "say says said saying mean means meaning word words phrase translate translation spell write writing pronounce"
    " reply respond answer song lyrics email letter note sagen sagt heißt bedeutet wort schreibt schreiben übersetze"
    " antworten dire dit signifie mot écrire traduire répondre decir dice significa palabra escribir traducir responder"
)
"""Where one of them stands, a text may ask about the pleasantry itself."""
LEADS: Final = (
    "a an the to of for with and or no not without in on at by from like as my your his her our more than"
    " der die ein eine zu für mit und oder kein keine ohne von le la les un une de du pour avec et ou sans"
    " el los las una por con y o sin"
)
"""What stands before a closing that is none."""
TWO_MEANINGS: Final = frozenset(
    "us it who aids may march polish turkey china reading mobile nice sie ihr ihre ihrem ihren ihrer"
    " ihres ihnen".split()
)
"""Words whose case tells what they mean, within a text: "US" and "us", "Sie" and "sie"; German nouns are not kept, as
people type them either way."""

_SIGNS: Final = r"[\s,.:;!?\u2026\u2013\u2014-]"
_GREETING = re.compile(
    rf"(?:{'|'.join((*GREETINGS, *OPENINGS))})(?:{_SIGNS}*[,.:;!?\u2026\u2013\u2014-]{_SIGNS}*"
    rf"|\s+(?=[\u00bf\u00a1]?(?:{'|'.join((*ASKS, *BEGINS))})(?![\w'])))"
)
_ASKING = re.compile(rf"(?:{'|'.join(ASKING)}){_SIGNS}+(?=[\u00bf\u00a1]?(?:{'|'.join(ASKS)})(?![\w']))")
_CLOSING = re.compile(rf"(?:(?P<sign>{_SIGNS}*[,.:;!?\u2026\u2013\u2014-]{_SIGNS}*)|\s+)(?:{'|'.join(CLOSINGS)})$")
_END = re.compile(r"(?:\s|[.?\u2026]|(?<![\d!])!+)+$")
_NOT_TEXT = re.compile(
    r"[`{}<>=\\_|#@$%^*~\[\]\"\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a\u2018\u201a;&/+]|(?<!\w)'|'(?!\w)|\n[ \t]"
)
_TURKISH = re.compile("[\u011e\u011f\u0130\u0131\u015e\u015f]")
_FOREIGN = re.compile(r"[^\W\d_a-zA-Z\u00aa-\u024f\u1e00-\u1eff]")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_ABOUT_WORDS = frozenset(ABOUT_WORDS.split())
_LEADS = frozenset(LEADS.split())
_ENDED = frozenset(".?!\u2026")


def normal_form(text: str) -> str | None:
    """None where there is none. Idempotent; has at least MIN_WORDS words."""
    if len(text) > LIMIT_CHARS:
        return None
    text = unicodedata.normalize("NFC", text.replace("\u2019", "'"))
    if _NOT_TEXT.search(text) or _TURKISH.search(text) or _FOREIGN.search(text):
        return None
    rest = bare(text)
    if len(_WORD.findall(rest)) < MIN_WORDS:
        return None
    return rest.lower() if rest.isupper() else _folded(rest)


def bare(text: str) -> str:
    """A text without the pleasantries, in its own case."""
    text, before = " ".join(text.split()), None
    while text != before:
        before = text
        text = _END.sub("", text).lstrip("\u00bf\u00a1 ")
        lowered = text.lower()
        if len(lowered) != len(text):  # a letter that grows when it is lowered
            return text
        if (opening := _GREETING.match(lowered) or _ASKING.match(lowered)) is not None:
            text = text[opening.end() :]
        elif (closing := _CLOSING.search(lowered)) is not None and _closes(lowered, closing):
            text = text[: closing.start()]
    return text


def _closes(lowered: str, closing: re.Match[str]) -> bool:
    """Whether a pleasantry at the end is none of the question's words: "how do you say thank you"."""
    words = _WORD.findall(lowered[: closing.start()])
    if not words:
        return False
    sign = closing["sign"] or ""
    if sign.startswith("!") and lowered[closing.start() - 1].isdigit():  # a factorial
        return False
    if not _ENDED.isdisjoint(sign):
        return True
    return words[-1] not in _LEADS and _ABOUT_WORDS.isdisjoint(words)


def _folded(text: str) -> str:
    """Lower case, but for words within the text that mean something else in it."""
    lowered = text.lower()
    kept = [
        found.span()
        for found in _WORD.finditer(text)
        if found.start() > 0 and found[0] != found[0].lower() and found[0].lower() in TWO_MEANINGS
    ]
    for start, end in kept:
        lowered = lowered[:start] + text[start:end] + lowered[end:]
    return lowered
