"""Vectors that stored questions lack, made in the background when the embedder has nothing else to do.

A question lacks a vector of the current model when another model made it, or when the model was late, full or away
while the answer was stored. Lookups never meet two models: the index holds vectors of the current one alone, and an
entry that has none yet is found by its exact identity only. A text that the model cannot take is marked with the
model's name and no vector, so that it is looked at once for each model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
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
TRIES = 3  # of one text; then others have their turn
GATHER_S = 1.0  # between the first entry that lacks a vector and the sweep for it
AGAIN_S = 600.0  # before texts are tried again on which the model failed


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
        self._lacking = asyncio.Event()
        self._swept = 0  # entries up to this id have been seen to
        self.total = 0
        self.done = 0
        self.failed = 0
        self.running = False

    def wake(self) -> None:
        """An entry was stored without its vector."""
        self._lacking.set()

    async def keep_up(self) -> None:
        """Sweep now, and again whenever entries lack a vector. Never returns."""
        await self.run()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_S if self.failed else None):
                    await self._lacking.wait()
                    await asyncio.sleep(GATHER_S)
            self._lacking.clear()
            await self.run(0 if self.failed else self._swept)

    async def run(self, after_id: int = 0) -> None:
        """See to every entry with a higher id that lacks a vector of this model."""
        if self.running:
            return
        self.running = True
        try:
            self.total, self.done, self.failed = await self._count(after_id), 0, 0
            if self.total:
                log.info("embedding stored questions", extra={"entries": self.total})
                await self._sweep(after_id)
        finally:
            self.running = False

    async def _count(self, after_id: int) -> int:
        while True:
            try:
                return await self._entries.count_lacking(self._embedder.identity, after_id)
            except CacheFault:
                await asyncio.sleep(REST_S)

    async def _sweep(self, after_id: int) -> None:
        """Every one of them once, in order of their ids."""
        while True:
            try:
                rows = await self._entries.lacking(self._embedder.identity, after_id, PIECE)
            except CacheFault:
                await asyncio.sleep(REST_S)
                continue
            for entry_id, prompt in rows:
                began_s = time.perf_counter()
                self.failed += not await self._renewed(entry_id, prompt)
                self.done += 1
                after_id = entry_id
                self._swept = max(self._swept, entry_id)
                await asyncio.sleep(time.perf_counter() - began_s)  # at most half of one processor
            if len(rows) < PIECE:
                return

    async def _renewed(self, entry_id: int, prompt: str) -> bool:
        """Whether an entry is seen to; not when the model fails on its text again and again."""
        await self._idle()
        tries = 0
        while tries < TRIES:
            try:
                await self._renew(entry_id, prompt)
                return True
            except ports.CACHE_FAULTS as fault:
                is_of_the_text = getattr(fault, "reason", "") == "embedder_down"
                tries += is_of_the_text
                log.debug("an embedding waits", extra={"entry": entry_id, "cause": type(fault).__name__})
            await asyncio.sleep(REST_S)
        return False

    async def _idle(self) -> None:
        """Return when no client waits for the embedder, or after a while."""
        for _ in range(PATIENCE):
            if not self._waiting():
                return
            await asyncio.sleep(PAUSE_S)

    async def _renew(self, entry_id: int, prompt: str) -> None:
        try:
            vector = await self._embedder.embed(prompt)
        except ports.CACHE_FAULTS as fault:
            if getattr(fault, "reason", "") != "too_long":
                raise
            await self._entries.revector(entry_id, None, None, self._embedder.identity)
            return
        signature = self._embedder.signature(prompt)
        entry = await self._entries.revector(
            entry_id, vector.astype("<f4").tobytes(), signature.astype("<u8").tobytes(), self._embedder.identity
        )
        if entry is not None:
            self._propose(entry)

    def progress(self) -> dict[str, Any]:
        return {"running": self.running, "done": self.done, "total": self.total, "failed": self.failed}
