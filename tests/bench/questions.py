"""Everyday questions for the benches: distinct, about 16 tokens, and rewordings that no cache has seen."""

from __future__ import annotations

import json
import random

WORDS = (
    "garden river engine battery window doctor recipe contract planet violin harbour market teacher camera bicycle "
    "library candle glacier carpet island printer forest saddle lantern whistle marble copper needle orchard tunnel"
).split()


def chat(text: str, **fields: object) -> bytes:
    return json.dumps(
        {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **fields}, separators=(",", ":")
    ).encode()


def question(i: int) -> str:
    """A distinct everyday question of about 16 tokens."""
    pick = random.Random(i)
    a, b, c = pick.sample(WORDS, 3)
    return f"Why does an old {a} need another {b} when somebody moves the {c} of {_letters(i)} away?"


def _letters(i: int) -> str:
    """A word without digits, different for every i."""
    syllables = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu"]
    return "".join(syllables[int(digit)] for digit in f"{i:04d}")


def fresh_question(serial: int) -> str:
    """A question never asked before: the words of `question` with a made-up name that numbers it."""
    return question(1000 + serial % 9000) + f" Ask {_letters(serial // 9000)}{_letters(serial % 9000)} too."


def reworded(i: int, serial: int) -> str:
    """The same question in bytes never sent before: spaces doubled at places numbered by `serial`."""
    words = question(i).split(" ")
    gaps = [" " if serial >> place & 1 == 0 else "  " for place in range(len(words) - 1)]
    text = words[0] + "".join(gap + word for gap, word in zip(gaps, words[1:], strict=True))
    return text + " " * (serial >> (len(words) - 1))
