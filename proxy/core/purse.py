"""What learning may cost: a share of what semantic hits have saved, and a small credit to begin with.

Money is counted in nano-dollars. A call that nobody knows the price of counts for its tokens, on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from proxy.core.model import Usage

CREDIT_CALLS: Final = 24  # calls, of what learning calls cost on average, that may be owed
LEARNING: Final = frozenset({"audit", "repeat", "judge"})
"""Purposes of calls that are made to learn."""


def worth(nusd: int, usage: Usage | None) -> int:
    """What a call costs, or a hit saves: its price, else its tokens."""
    return nusd or (0 if usage is None else usage.input_tokens + usage.output_tokens)


@dataclass(slots=True)
class Purse:
    """Of one process. `share` is 0...1 of what was saved."""

    share: float
    earned: int = 0
    spent: int = 0
    calls: int = 0

    def spend(self, cost: int) -> None:
        self.spent += cost
        self.calls += 1

    @property
    def has_room(self) -> bool:
        """Whether something more may be learned for money."""
        if self.share <= 0.0:
            return False
        credit = CREDIT_CALLS * self.spent / self.calls if self.calls else 0.0
        return self.spent <= self.share * self.earned + credit
