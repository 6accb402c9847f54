"""What this process holds of the stored entries, and what a purge takes: rows in memory, vectors in the index, and the
calls whose answers would be stored after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import orjson

from proxy.core.answer import decode_answer
from proxy.core.model import Answer, Draft, Entry
from proxy.core.purges import Began, asked_ms, marks_of, reaches
from proxy.core.query import Query
from proxy.hot import HotRow
from proxy.records import Client
from proxy.request.normals import Normals
from proxy.request.parts import Parts


class Entries:
    """Owns nothing it is given."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._hot = parts.hot
        self._meaning = parts.meaning
        self._flights = parts.flights
        self._telemetry = parts.telemetry
        self._followed = parts.store.purges.newest
        self.normals = Normals()
        self.purges = 0  # rows read or written before the last of them may be gone
        self.on_lacking: Callable[[], None] = _nobody_is_told  # an entry was stored without the vector of its question

    async def knows(self, query: Query) -> bool:
        """Whether this very question has an entry, fresh or not, or was answered by one. Raises CacheFault."""
        if self._hot.find(query.fingerprint) is not None or self._hot.alias(query.fingerprint) is not None:
            return True
        return await self._store.find(query.fingerprint) is not None

    def warm(self, entry: Entry, purges: int) -> HotRow:
        """A row to serve, kept in memory unless a purge came while it was read."""
        answer = decode_answer(entry.draft.answer, orjson.loads)
        self.normals.keep(entry.id, entry.draft.scope, entry.draft.prompt)
        return self._hot.put(entry, answer) if purges == self.purges else HotRow(entry, answer)

    async def put(self, draft: Draft, answer: Answer, began: Began) -> Entry | None:
        """Commit an entry, then let memory and index know it. None if a purge took it. Raises CacheFault."""
        purges = self.purges
        stored = await self._store.put(draft, began)
        if stored is None:
            self._telemetry.unstored("purged")
            return None
        entry, replaced = stored
        while purges != self.purges:  # a purge came meanwhile: it may have taken this one along
            purges = self.purges
            if await self._store.get(entry.id) is None:
                return None
        if replaced:
            self.forget(replaced)
        self._hot.put(entry, answer)
        self.propose(entry)
        if draft.prompt and draft.embedding is None:
            self.on_lacking()
        return entry

    def propose(self, entry: Entry) -> None:
        """Put a stored entry back into the index."""
        draft, index, embedder = entry.draft, self._meaning.index, self._meaning.embedder
        if (
            index is not None
            and embedder is not None
            and draft.embedder == embedder.identity
            and draft.embedding is not None
            and draft.signature is not None
        ):
            self.normals.keep(entry.id, entry.draft.scope, entry.draft.prompt)
            vector = np.frombuffer(draft.embedding, np.float32)
            index.add(entry.id, draft.scope, vector, np.frombuffer(draft.signature, np.uint64), draft.expires_ms)

    def forget(self, entry_ids: Sequence[int]) -> None:
        """Drop entries that SQL no longer has from memory and index."""
        self.purges += bool(entry_ids)
        self._hot.forget(entry_ids)
        self.normals.forget(list(entry_ids))
        if self._meaning.index is not None:
            self._meaning.index.remove(entry_ids)

    # -- purges -----------------------------------------------------------------------------------------------------

    def began(self, client: Client) -> Began:
        """What begins now, on account of this client."""
        return Began(self._store.purges.newest, client.ts_ms)

    def purged(self, entry_ids: Sequence[int]) -> None:
        """After a purge was made: what it removed is nowhere in memory, and nobody new joins a call it overtook."""
        self.purges += 1
        self.forget(entry_ids)
        known = self._store.purges
        for fingerprint, flight in list(self._flights.items()):
            if known.overtook(flight.context.marks, flight.context.began):
                del self._flights[fingerprint]

    async def follow(self) -> None:
        """Do as much for purges that other processes made. Raises CacheFault."""
        await self._store.follow()
        if made := self._store.purges.after(self._followed):
            self._followed = self._store.purges.newest
            self.purged(
                self._hot.those(lambda draft: any(reaches(purge, marks_of(draft), asked_ms(draft)) for purge in made))
            )


def _nobody_is_told() -> None:
    """There is no embedder that would make it."""
