"""Fakes of the ports, held to the same contract suites as the real edges (tests/contracts/)."""

from __future__ import annotations

import asyncio
import hashlib

import numpy as np
from numpy.typing import NDArray

from index import tokens
from index.errors import IndexRoomError, Overloaded, TextTooLong


class FakeEmbedder:
    """Bag of hashed words as a unit vector: texts that share words are alike. A token is a word.

    `fault`, when set, is raised by every embed; `held`, when set to an unset Event, keeps texts in flight. `asked`
    lists the texts that reached the "model".
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

    async def embed(self, text: str, tenant: str = "") -> NDArray[np.float32]:
        words = text.lower().split()
        if len(words) > self.window:
            raise TextTooLong(f"{len(words)} words, window {self.window}")
        if self.fault is not None:
            raise self.fault
        if self._in_flight >= self._queue:
            raise Overloaded(f"{self._queue} texts in flight")
        self._in_flight += 1
        try:
            self.asked.append(text)
            if self.held is not None:
                await self.held.wait()
        finally:
            self._in_flight -= 1
        vector = np.zeros(self.dimension, dtype=np.float32)
        for word in words or [""]:
            draw = int.from_bytes(
                hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little"
            )
            vector[draw % self.dimension] += 1.0
        vector /= np.linalg.norm(vector)
        vector.flags.writeable = False
        return vector

    def signature(self, text: str) -> NDArray[np.uint64]:
        return tokens.signature(text)
