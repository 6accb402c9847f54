"""The event loop's own pulse: how late it wakes up, and what rides along."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from proxy.watch.memory import Memory

BEAT_S: Final = 0.02
REST_S: Final = 0.1  # between beats while nothing is asked, so that a process that nobody needs takes next to nothing


class Pulse:
    """Measures how late the event loop wakes up, and lets once-a-second work ride along."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._began_s = time.perf_counter()

    def told(self) -> dict[str, float]:
        """What `stats` shows of it."""
        return {"loop_stall_ms_max": round(self.longest_ms, 3), "uptime_s": round(time.perf_counter() - self._began_s)}

    async def run(self, memory: Memory, each_second: Callable[[float], None], asked: Callable[[], int]) -> None:
        """`asked` counts requests; as long as it stands still for a second the pulse rests."""
        second, count, beat_s = time.monotonic(), asked(), BEAT_S
        while True:
            before = time.monotonic()
            await asyncio.sleep(beat_s)
            now = time.monotonic()
            self.longest_ms = max(self.longest_ms, (now - before - beat_s) * 1e3)
            memory.look(now)
            if asked() != count:
                beat_s = BEAT_S
            if now - second >= 1.0:
                second = now
                each_second(now)
                beat_s, count = (REST_S if asked() == count else BEAT_S), asked()
