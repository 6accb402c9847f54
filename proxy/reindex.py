"""Vectors of another model, made anew: in the background, when the embedder has nothing else to do.

Lookups never meet two models: the index holds vectors of the current one alone, and an entry that is not done yet is
found by its exact identity only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from proxy import ports
from proxy.core.errors import CacheFault
from proxy.core.model import Entry
from proxy.store.entries import Entries

log = logging.getLogger(__name__)

PIECE = 256
PAUSE_S = 0.05
PATIENCE = 100  # pauses before one more text is embedded all the same
REST_S = 5.0  # after trouble of a part


class Reindex:
    """One run at a time. `propose(entry)` puts a changed entry into the index; `waiting()` are texts in flight."""

    def __init__(
        self,
        embedder: ports.Embedder,
        entries: Entries,
        propose: Callable[[Entry], None],
        waiting: Callable[[], int],
    ) -> None:
        self._embedder = embedder
        self._entries = entries
        self._propose = propose
        self._waiting = waiting
        self.total = 0
        self.done = 0
        self.running = False

    async def run(self) -> None:
        """Work until no entry has a vector of another model."""
        if self.running:
            return
        self.running = True
        try:
            while (left := await self._count()) is None or left > 0:
                self.total, self.done = left or 0, 0
                if left and not await self._sweep():
                    return
        finally:
            self.running = False

    async def _count(self) -> int | None:
        try:
            return await self._entries.count_foreign(self._embedder.identity)
        except CacheFault:
            await asyncio.sleep(REST_S)
            return None

    async def _sweep(self) -> bool:
        """Every foreign entry once; whether any could be changed."""
        last, changed = 0, 0
        log.info("embedding stored questions with the new model", extra={"entries": self.total})
        while True:
            try:
                rows = await self._entries.foreign(self._embedder.identity, last, PIECE)
                for entry_id, prompt in rows:
                    changed += await self._renew(entry_id, prompt)
                    last = entry_id
                    self.done += 1
            except ports.CACHE_FAULTS as fault:
                log.warning("re-embedding waits", extra={"cause": type(fault).__name__})
                await asyncio.sleep(REST_S)
                continue
            if len(rows) < PIECE:
                return changed > 0

    async def _renew(self, entry_id: int, prompt: str) -> bool:
        for _ in range(PATIENCE):
            if not self._waiting():
                break
            await asyncio.sleep(PAUSE_S)
        try:
            vector = await self._embedder.embed(prompt)
        except ports.CACHE_FAULTS as fault:
            if getattr(fault, "reason", "") != "too_long":
                raise
            return False  # longer than this model's window: exact hits only
        signature = self._embedder.signature(prompt)
        entry = await self._entries.revector(
            entry_id, vector.astype("<f4").tobytes(), signature.astype("<u8").tobytes(), self._embedder.identity
        )
        if entry is not None:
            self._propose(entry)
        return entry is not None

    def progress(self) -> dict[str, Any]:
        return {"running": self.running, "done": self.done, "total": self.total}
