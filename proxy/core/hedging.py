"""When to send one more call, and how many at most: arithmetic of hedged requests (The Tail at Scale, CACM 2013).

The delay adapts: it is a quantile of the times to first token that were seen lately. The load is bounded by a bucket
that only sent calls fill, so further calls can never exceed their share of the calls made, whatever the upstream does.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Hashable

WINDOW = 256
KINDS = 512
BURST = 8.0


class Times:
    """The last WINDOW durations of each kind of call, in milliseconds; the least used kind beyond KINDS is dropped."""

    def __init__(self, window: int = WINDOW, kinds: int = KINDS) -> None:
        self._window = window
        self._limit = kinds
        self._seen: OrderedDict[Hashable, tuple[deque[float], list[float]]] = OrderedDict()

    def see(self, kind: Hashable, ms: float) -> None:
        known = self._seen.get(kind)
        if known is None:
            known = self._seen[kind] = (deque(), [])
            if len(self._seen) > self._limit:
                self._seen.popitem(last=False)
        self._seen.move_to_end(kind)
        order, ranked = known
        order.append(ms)
        insort(ranked, ms)
        if len(order) > self._window:
            del ranked[bisect_left(ranked, order.popleft())]

    def count(self, kind: Hashable) -> int:
        known = self._seen.get(kind)
        return 0 if known is None else len(known[0])

    def quantile(self, kind: Hashable, q: float, least: int) -> float | None:
        """Nearest-rank quantile in milliseconds; None with fewer than `least` durations."""
        known = self._seen.get(kind)
        if known is None or len(known[1]) < max(1, least):
            return None
        return known[1][max(0, math.ceil(q * len(known[1])) - 1)]


class Budget:
    """At most `share` further calls for each call made, BURST of them at once, and `room` before any was made."""

    def __init__(self, share: float, room: float = 0.0) -> None:
        self._share = share
        self._room = room if share else 0.0
        self.made = 0
        self.spent = 0

    def earn(self) -> None:
        """A call was made that would have been made anyway."""
        self.made += 1
        self._room = min(self._room + self._share, BURST)

    def spend(self) -> bool:
        """Whether one more call may be made now; it then counts as made."""
        if self._room < 1.0 - 1e-9:
            return False
        self._room -= 1.0
        self.spent += 1
        return True
