"""What compares questions by their meaning: the model and the index, loaded while the listeners are open already.

One of three states: loading, there (`parts`), or not there. In the first and the last, `reason` is the word that a
lookup says instead: "loading", "semantic_off", or that of the fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from proxy import ports

LOADING: Final = "loading"
SNAPSHOT_NAME: Final = "index.snapshot"  # of the index, in the data directory

Verify = Callable[[str, Sequence[str], str], Awaitable[Sequence[float]]]
"""(text asked, stored texts, tenant) → the pair guard's logits. Raises as `ports.Embedder.verify`."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Open and warm."""

    embedder: ports.Embedder
    index: ports.VectorIndex
    comparer: ports.AnswerComparer | None = None
    waiting: Callable[[], int] = int  # texts in flight at the embedder
    verify: Verify | None = None  # None where there is no pair guard, or none is wanted
    shed: Callable[[], None] = lambda: None  # drops what is remembered of texts


class Step(NamedTuple):
    """What is being loaded, and how far that is."""

    about: str
    number: int
    of: int


class Meaning:
    """Lives on the event loop. Whoever opens the parts closes them, after everything that asks here has stopped."""

    def __init__(self, parts: Parts | None = None) -> None:
        self.parts = parts
        self.identity = "" if parts is None else parts.embedder.identity  # of the embedder, known before it is used
        self.reason = LOADING if parts is None else ""
        self.cause = ""  # in words, for the operator: why there is none
        self.step: Step | None = None
        self._settled = asyncio.Event()
        if parts is not None:
            self._settled.set()

    @property
    def is_loading(self) -> bool:
        return self.reason == LOADING

    @property
    def embedder(self) -> ports.Embedder | None:
        return None if self.parts is None else self.parts.embedder

    @property
    def index(self) -> ports.VectorIndex | None:
        return None if self.parts is None else self.parts.index

    @property
    def comparer(self) -> ports.AnswerComparer | None:
        return None if self.parts is None else self.parts.comparer

    @property
    def verify(self) -> Verify | None:
        return None if self.parts is None else self.parts.verify

    @property
    def waiting(self) -> int:
        """Texts in flight at the embedder."""
        return 0 if self.parts is None else self.parts.waiting()

    def shed(self) -> None:
        """Drop what is remembered of texts, for want of memory."""
        if self.parts is not None:
            self.parts.shed()

    def open(self, parts: Parts) -> None:
        """From now on questions are compared."""
        self.parts, self.reason, self.step, self.identity = parts, "", None, parts.embedder.identity
        self._settled.set()

    def close(self, reason: str, cause: str = "") -> None:
        """There is none, and there will be none."""
        self.reason, self.cause, self.step = reason, cause, None
        self._settled.set()

    async def settled(self) -> None:
        """Wait until it is loaded, or known that it will not be."""
        await self._settled.wait()
