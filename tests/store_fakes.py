"""Fakes of the store's ports, held to the same contract suite as the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxy.core.errors import CacheFault
from proxy.core.model import Draft, Entry, Outcome, again
from proxy.core.purges import Began, Purges, marks_of
from proxy.ports import Stored


class FakeEntryStore:
    """EntryStore in a dictionary. `fault` set: every call raises it."""

    def __init__(self) -> None:
        self.rows: dict[int, Entry] = {}
        self.fault: CacheFault | None = None
        self.used: dict[int, int] = {}
        self._last_id = 0
        self.purges = Purges()

    async def find(self, fingerprint: bytes) -> Entry | None:
        self._check()
        return next((row for row in self.rows.values() if row.draft.fingerprint == fingerprint), None)

    async def find_many(self, fingerprints: Sequence[bytes]) -> Sequence[Entry]:
        self._check()
        return [row for row in self.rows.values() if row.draft.fingerprint in fingerprints]

    def mark_used(self, entry_id: int, now_ms: int) -> None:
        self.used[entry_id] = now_ms

    async def get(self, entry_id: int) -> Entry | None:
        self._check()
        return self.rows.get(entry_id)

    async def follow(self) -> None:
        self._check()

    async def put(self, draft: Draft, began: Began) -> Stored | None:
        self._check()
        if self.purges.overtook(marks_of(draft), began):
            return None
        gone = tuple(row.id for row in self.rows.values() if row.draft.fingerprint == draft.fingerprint)
        for entry_id in gone:
            del self.rows[entry_id]
        self._last_id += 1
        made = Entry(self._last_id, draft, b"")
        self.rows[made.id] = made
        return Stored(made, gone)

    async def touch(self, entry_id: int, expires_ms: int) -> None:
        self._check()
        row = self.rows.get(entry_id)
        if row is not None:
            fields = {name: getattr(row.draft, name) for name in row.draft.__dataclass_fields__}
            self.rows[entry_id] = Entry(entry_id, Draft(**{**fields, "expires_ms": expires_ms}), row.checksum)

    def _check(self) -> None:
        if self.fault is not None:
            raise self.fault


class FakeLedger:
    """Ledger that keeps outcomes."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def record_again(self, recurring: tuple[Any, ...], request_id: str, ts_ms: int, total_ms: float) -> None:
        self.record(again(recurring, request_id, ts_ms, total_ms, total_ms))

    def record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
