"""What learning may cost: a share of what semantic hits have saved, and a small credit to begin with.

Money is counted in nano-dollars. A call that nobody knows the price of counts for its tokens, on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from proxy.core.model import Usage

CREDIT_HITS: Final = 24  # hits, of what one has saved on average, that may be owed
LEARNING: Final = frozenset({"audit", "repeat", "judge"})
"""Purposes of calls that are made to learn."""


def worth(nusd: int, usage: Usage | None) -> int:
    """What a call costs, or a hit saves: its price, else its tokens."""
    return nusd or (0 if usage is None else usage.input_tokens + usage.output_tokens)


@dataclass(slots=True)
class Purse:
    """Of one process. `share` is 0...1 of what was saved. An audit costs several calls, which are paid one by one; what
    it costs in all is known once the first has ended."""

    share: float
    earned: int = 0
    hits: int = 0  # that earned it
    spent: int = 0
    audits: int = 0  # that have ended
    under_way: int = 0

    def earn(self, saved: int) -> None:
        self.earned += saved
        self.hits += 1

    def spend(self, cost: int) -> None:
        self.spent += cost

    @property
    def has_room(self) -> bool:
        """Whether one more audit may be made, beside those under way."""
        if self.share <= 0.0 or (self.under_way and not self.audits):
            return False
        an_audit = self.spent / self.audits if self.audits else 0.0
        credit = CREDIT_HITS * self.earned / max(1, self.hits)
        return self.spent + (self.under_way + 1) * an_audit <= self.share * self.earned + credit

    def begin(self) -> None:
        self.under_way += 1

    def end(self) -> None:
        self.under_way -= 1
        self.audits += 1
