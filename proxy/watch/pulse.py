"""The event loop's own pulse: how late it wakes up, and what rides along."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from proxy.watch.memory import Memory

BEAT_S: Final = 0.02


class Pulse:
    """Measures how late the event loop wakes up, and lets once-a-second work ride along."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._began_s = time.perf_counter()

    def told(self) -> dict[str, float]:
        """What `stats` shows of it."""
        return {"loop_stall_ms_max": round(self.longest_ms, 3), "uptime_s": round(time.perf_counter() - self._began_s)}

    async def run(self, memory: Memory, each_second: Callable[[float], None]) -> None:
        second = time.monotonic()
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT_S)
            now = time.monotonic()
            self.longest_ms = max(self.longest_ms, (now - before - BEAT_S) * 1e3)
            memory.look(now)
            if now - second >= 1.0:
                second = now
                each_second(now)
