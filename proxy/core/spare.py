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

    def take(self, cost_s: float, now_s: float) -> bool:
        """Whether there is room for work of `cost_s`, which is then spent."""
        before_s = now_s if self.filled_s is None else self.filled_s
        gained_s = self.burst_s if self.filled_s is None else self.share * (now_s - before_s)
        self.left_s, self.filled_s = min(self.burst_s, self.left_s + gained_s), now_s
        if self.left_s < cost_s:
            return False
        self.left_s -= cost_s
        return True
