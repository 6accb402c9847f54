"""Whether a cheaper model is good enough for a question, by what it made of the most alike ones.

Votes are good or bad; a share of them says little when there are few, so the lower bound of Wilson's interval decides
(Wilson 1927): with none against, 25 votes reach 0.90 and 52 reach 0.95 at z = 1.645.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from proxy.core.facts import Facts
from proxy.core.jsontext import canonical

REPHRASE_MS = 120_000
"""Who asks nearly the same again within this time was not served by the first answer."""
REPHRASE_SIMILARITY = 0.9

_REFUSAL = re.compile(
    r"\s*(i('| a)m (sorry|unable|not able)|sorry,|i can(no|')t|i cannot|as an ai\b|i won't|unfortunately, i can)", re.I
)


class Votes(NamedTuple):
    """What the neighbours say of one candidate."""

    good: int
    total: int

    def lower_bound(self, z: float) -> float:
        """Of the share of good ones, 0 without votes."""
        return wilson(self.good, self.total, z)


def wilson(good: int, total: int, z: float) -> float:
    """Lower bound of Wilson's score interval for `good` of `total`."""
    if total <= 0:
        return 0.0
    share, square = good / total, z * z
    middle = share + square / (2 * total)
    spread = z * math.sqrt((share * (1 - share) + square / (4 * total)) / total)
    return max(0.0, (middle - spread) / (1 + square / total))


def conversation_of(facts: Facts, tenant: str) -> bytes:
    """32 bytes that stay the same through a conversation: who, which model, and how it began."""
    first: Any = facts.prompt
    begun: list[Mapping[str, Any]] = []
    for message in facts.context:
        if message.get("role") == "user":
            first = message.get("content")
            break
        begun.append(message)
    return hashlib.sha256(canonical(["conversation", tenant, facts.end_user, facts.model, begun, first])).digest()


def is_refusal(text: str) -> bool:
    """Whether an answer begins as a model's refusal does."""
    return _REFUSAL.match(text) is not None
