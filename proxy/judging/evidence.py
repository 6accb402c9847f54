"""What is written down of the judge's levels, read back when the judge has dropped it or has just begun.

The judge keeps a bounded number of levels. A level that comes again gets its tally back, exact to the last label,
before anything is served on its account. One with labels enough to be judged by gets its comparisons as well: that
takes a fraction of a second, is done once for all who wait, and goes on when they give up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from proxy import ports
from proxy.core.errors import CacheFault
from proxy.core.risk import LevelName
from proxy.judging.judge import Judge, Place
from proxy.tasks import Tasks

READ_S: Final = 1.0  # longest wait of a lookup for its levels; then it is a bypass
RELEARNED: Final = 4_000  # comparisons a level is learned from: as many as a learner keeps
A_TURN: Final = 16  # of them before the loop gets its turn: 1.5 ms


class Evidence:
    """Lives on the event loop; owns nothing it is given."""

    def __init__(self, judge: Judge, comparisons: ports.Comparisons, embedder: Callable[[], str], tasks: Tasks) -> None:
        self._judge = judge
        self._comparisons = comparisons
        self._embedder = embedder
        self._tasks = tasks
        self._relearning: dict[LevelName, asyncio.Task[None]] = {}

    async def read(self, place: Place) -> None:
        """Return when the judge may be asked about a place, at once where its levels are in memory.

        Raises CacheFault and TimeoutError.
        """
        if not self._judge.unread(place):
            return
        async with asyncio.timeout(READ_S):
            while levels := self._judge.unread(place):  # again: others may have driven one out meanwhile
                lacking = await self._restore(levels)
                if lacking:
                    await self._relearn(lacking)

    async def read_all(self) -> None:
        """Give every level in memory its tally; those that lack comparisons get both when they are asked for."""
        _ = await self._restore(self._judge.unread())

    async def _restore(self, levels: Sequence[LevelName]) -> list[LevelName]:
        """Levels that lack their comparisons; the others are whole."""
        written = await self._comparisons.tallies(self._embedder(), levels)
        lacking = [level for level in levels if self._judge.lacks_rows(level, written[level])]
        for level in levels:
            if level not in lacking:
                self._judge.restore(level, written[level])
        return lacking

    async def _relearn(self, levels: Sequence[LevelName]) -> None:
        if self._tasks.closed:
            raise CacheFault("ibid is stopping", code="store_down")
        for level in levels:
            if level not in self._relearning:
                self._relearning[level] = self._tasks.spawn(self._relearn_one(level), "relearn")
        done, _ = await asyncio.wait([self._relearning[level] for level in levels])
        for task in done:
            task.result()

    async def _relearn_one(self, level: LevelName) -> None:
        try:
            learner = self._judge.new_learner()
            rows = await self._comparisons.of_level(self._embedder(), level, RELEARNED)
            for number, found in enumerate(rows, start=1):
                self._judge.teach(learner, found)
                if not number % A_TURN:
                    await asyncio.sleep(0)
            written = await self._comparisons.tallies(self._embedder(), [level])
            self._judge.restore(level, written[level], learner)
        finally:
            del self._relearning[level]
