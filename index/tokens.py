"""Token classes of a text as a small fixed array: what an embedding blurs and an answer depends on.

"5 km" and "6 km", "enable" and "disable", "Boston to Oakland" and back lie closer to each other than real paraphrases
do. `signature` reads a text once and keeps, per class, a digest of what it found; `index.kernels.veto_bits` compares
two signatures and names the classes that disagree. Nothing here is learned.

Layout of a signature, (WIDTH,) uint64; all digests are CRC-32 of sorted members, 0 when the class is empty:

    0  numbers | units << 32          1  dates | ids << 32         2  quoted | code << 32
    3  direction | order << 32        4  antonyms, left sides      5  antonyms, right sides
    6  flags (see below)              7  content set | entity set << 32
    8..13  24 content words as 16-bit digests, ascending, 0 = unused

Flags: bits 0-23 mark which content words are named entities; 24 negation parity; 25-28 question class; 29-31
possessives; 32-35 script; 36-38 language; 39 suspicious characters; 40 more content words than fit; 48-63 a stamp of
the rules, so that signatures of other rules are recognised.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from index.reading import direction, read

WIDTH: Final = 14
WORDS: Final = 24
RULES_VERSION: Final = 1
STAMP: Final = 0x1B00 + RULES_VERSION

GUARDS: Final[tuple[str, ...]] = (
    "numbers",
    "units",
    "dates",
    "ids",
    "quoted",
    "code",
    "entities",
    "negation",
    "antonyms",
    "question",
    "script",
    "direction",
    "possessive",
    "order",
    "substitution",
    "addition",
)
"""Bit i of a veto set is GUARDS[i]. The core, which cannot import this and is not imported here, says the same names
again in `policy.GUARDS`; a test holds them equal."""


_SUSPICIOUS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_JOINER_IN_WORD = re.compile("(?<=[\u0600-\u06ff\u0900-\u0dff])[\u200c\u200d](?=[\u0600-\u06ff\u0900-\u0dff])")
_MIXED = re.compile(
    "[A-Za-z\u00c0-\u024f][\u0370-\u03ff\u0400-\u052f\u0530-\u058f\u13a0-\u13ff]"
    "|[\u0370-\u03ff\u0400-\u052f\u0530-\u058f\u13a0-\u13ff][A-Za-z\u00c0-\u024f]"
)
_IDEOGRAPH = re.compile("([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
_SCRIPTS: Final = tuple(
    re.compile(f"[{span}]")
    for span in (
        "A-Za-z\u00c0-\u024f",
        "\u0400-\u052f",
        "\u0370-\u03ff",
        "\u0590-\u05ff",
        "\u0600-\u06ff\u0750-\u077f",
        "\u0900-\u0dff",
        "\u0e00-\u0eff",
        "\u3040-\u30ff",
        "\u3400-\u9fff",
        "\uac00-\ud7af",
        "\u10a0-\u10ff\u0530-\u058f",
    )
)


def _digest(members: list[str]) -> int:
    if not members:
        return 0
    members.sort()
    return crc32("\x1f".join(members).encode("utf-8", "surrogatepass")) or 1


def _script(text: str) -> int:
    """1 + the script with the most letters, 0 when there are none."""
    best, most = 0, 0
    for i, pattern in enumerate(_SCRIPTS):
        if (n := len(pattern.findall(text))) > most:
            best, most = i + 1, n
    if best == 9 and _SCRIPTS[7].search(text):  # kana among ideographs: Japanese
        return 8
    return best


def _normalise(text: str) -> tuple[str, int, bool]:
    """Folded to compatibility characters and ASCII digits; its script; whether it hides something."""
    if text.isupper():
        text = text.lower()  # shouting
    if text.isascii():
        return text, 1 if any(map(str.isalpha, text)) else 0, _CONTROLS.search(text) is not None
    suspicious = _SUSPICIOUS.search(_JOINER_IN_WORD.sub("", text)) is not None or _MIXED.search(text) is not None
    folded = unicodedata.normalize("NFKC", text)
    folded = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in folded)
    return _IDEOGRAPH.sub(r" \1 ", folded), _script(folded), suspicious


def signature(text: str) -> NDArray[np.uint64]:
    """Token classes of a text: (WIDTH,) uint64, laid out as in the head of this file. Any str is accepted."""
    folded, script, suspicious = _normalise(text)
    reading = read(folded)
    content = reading.content
    named = [digest for digest, is_named in content.items() if is_named]
    if reading.capitals * 5 > len(reading.words) * 3 and len(reading.words) > 3:
        named = []  # a headline or shouting: capitals tell nothing
    overflow = len(content) > WORDS
    kept = sorted(content)[:WORDS]
    flags = 0
    if named:
        chosen = set(named)
        for i, digest in enumerate(kept):
            if digest in chosen:
                flags |= 1 << i
    languages = reading.languages
    most = max(languages)
    language = languages.index(most) if most else 0
    flags |= (
        (reading.negations & 1) << 24
        | reading.question << 25
        | reading.possessives << 29
        | script << 32
        | language << 36
        | suspicious << 39
        | overflow << 40
        | STAMP << 48
    )
    sequence = reading.sequence
    lanes = [
        _digest(reading.numbers) | _digest(reading.units) << 32,
        _digest(reading.dates) | _digest(reading.ids) << 32,
        _digest(reading.quoted) | _digest(reading.code) << 32,
        _digest(direction(reading.words)) | crc32("\x1f".join(sequence).encode("utf-8", "surrogatepass")) << 32,
        reading.antonyms[0],
        reading.antonyms[1],
        flags,
        _digest([str(d) for d in kept] if not overflow else [str(d) for d in content])
        | _digest([str(d) for d in named]) << 32,
    ]
    kept += [0] * (WORDS - len(kept))
    lanes += [kept[i] | kept[i + 1] << 16 | kept[i + 2] << 32 | kept[i + 3] << 48 for i in range(0, WORDS, 4)]
    return np.array(lanes, dtype=np.uint64)
