"""Fakes of the ports, held to the same contract suites as the real edges (tests/contracts/)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from index import tokens
from index.errors import IndexRoomError, Overloaded, TextTooLong
from index.guard.head import MAX_KEPT, MAX_TOKENS, NO_OPINION
from index.lexicon import NEGATIONS


class FakeEmbedder:
    """Bag of hashed words as a unit vector: texts that share words are alike. A token is a word.

    Its guard refuses texts that share less than half of their words, or differ in one that is a number or a negation.
    `fault`, when set, is raised by every embed and verify; `held`, when set to an unset Event, keeps texts in flight.
    `asked` lists the texts that reached the "model".
    """

    def __init__(self, dimension: int = 64, window: int = 256, queue: int = 256) -> None:
        self.identity = f"fake:words:{window}"
        self.dimension = dimension
        self.window = window
        self.fault: IndexRoomError | None = None
        self.held: asyncio.Event | None = None
        self.asked: list[str] = []
        self._queue = queue
        self._in_flight = 0

    @property
    def can_verify(self) -> bool:
        return True

    async def embed(self, text: str, tenant: str = "") -> NDArray[np.float32]:
        words = text.lower().split()
        if len(words) > self.window:
            raise TextTooLong(f"{len(words)} words, window {self.window}")
        await self._pass(text)
        vector = np.zeros(self.dimension, dtype=np.float32)
        for word in words or [""]:
            draw = int.from_bytes(
                hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little"
            )
            vector[draw % self.dimension] += 1.0
        vector /= np.linalg.norm(vector)
        vector.flags.writeable = False
        return vector

    async def verify(self, asked: str, kept: Sequence[str], tenant: str = "") -> list[float]:
        if not 1 <= len(kept) <= MAX_KEPT:
            raise ValueError(f"{len(kept)} stored texts")
        await self._pass(asked, *kept)
        return [self._logit(asked.lower().split(), text.lower().split()) for text in kept]

    def _logit(self, asked: list[str], kept: list[str]) -> float:
        if not all(0 < len(words) <= MAX_TOKENS for words in (asked, kept)):
            return NO_OPINION
        both, either = set(asked) & set(kept), set(asked) | set(kept)
        if any(word.strip("?.,").isdigit() or word in NEGATIONS for word in either - both):
            return -4.0
        return 4.0 if 2 * len(both) >= len(either) else -2.0

    async def _pass(self, *texts: str) -> None:
        """One call of the "model"."""
        if self.fault is not None:
            raise self.fault
        if self._in_flight >= self._queue:
            raise Overloaded(f"{self._queue} texts in flight")
        self._in_flight += 1
        try:
            self.asked += texts
            if self.held is not None:
                await self.held.wait()
        finally:
            self._in_flight -= 1

    def signature(self, text: str) -> NDArray[np.uint64]:
        return tokens.signature(text)
