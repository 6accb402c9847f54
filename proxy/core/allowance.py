"""How often somebody may cause something in a minute, for more of them than memory could name.

A minute slides: what was counted in the one before still weighs by the part of it that is less than a minute ago. Who
finds no place of their own in a minute is counted with all the others who find none, so nobody's count is ever dropped
for somebody else's sake.
"""

from __future__ import annotations

from typing import Final

MINUTE_S: Final = 60.0
NAMED: Final = 4_096  # counted by themselves in a minute
OTHERS: Final = ""


class Allowance:
    """`per_min` for each; 0: without a bound. Times are seconds of a clock that does not go back."""

    def __init__(self, per_min: int, named: int = NAMED) -> None:
        self._per_min = per_min
        self._named = named
        self._minute = 0
        self._counts: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._counts) + len(self._before)

    def has_room(self, who: str, now_s: float) -> bool:
        if not self._per_min:
            return True
        self._turn(now_s)
        past = now_s / MINUTE_S - self._minute
        counted = self._counts.get(self._place(who), 0) + self._before.get(who, 0) * (1.0 - past)
        return counted < self._per_min

    def count(self, who: str, now_s: float) -> None:
        """It happened once more."""
        if self._per_min:
            self._turn(now_s)
            place = self._place(who)
            self._counts[place] = self._counts.get(place, 0) + 1

    def _place(self, who: str) -> str:
        return who if who in self._counts or len(self._counts) < self._named else OTHERS

    def _turn(self, now_s: float) -> None:
        minute = int(now_s // MINUTE_S)
        if minute != self._minute:
            self._before = self._counts if minute == self._minute + 1 else {}
            self._counts, self._minute = {}, minute
