"""How much of a core work behind the scenes may take, whatever the traffic: a bucket that fills with time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Spare:
    """`share` of each second may be spent, and what was left over of the last `burst_s` spent seconds."""

    share: float
    burst_s: float
    left_s: float = 0.0
    filled_s: float | None = None  # when, on a monotonic clock

    def has_room(self, now_s: float) -> bool:
        """Whether more work may begin. What it costs is known, and spent, once it has ended."""
        before_s = now_s if self.filled_s is None else self.filled_s
        gained_s = self.burst_s if self.filled_s is None else self.share * (now_s - before_s)
        self.left_s, self.filled_s = min(self.burst_s, self.left_s + gained_s), now_s
        return self.left_s > 0.0

    def spend(self, cost_s: float) -> None:
        self.left_s -= cost_s
