"""Rows that passed the gate, kept in memory with their rendered replies.

Filled only with rows that SQL has committed and whose checksum held; emptied by a purge before the purge returns.
Bounded by bytes, least recently used out first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from proxy.core.dialects.dialect import Template
from proxy.core.model import Answer, Draft, Entry
from proxy.relay import Head

ROW_OVERHEAD_BYTES = 1024
FORM_OVERHEAD_BYTES = 1024  # of a form beside its template: headers, ledger row


class Form:
    """One way in which an entry is served: streamed or whole, found exactly or by similarity. Made at its first use."""

    __slots__ = ("baseline_nusd", "head", "recurring", "second", "template", "worth")

    def __init__(self, template: Template, recurring: tuple[Any, ...], baseline_nusd: int, worth: int = 0) -> None:
        self.template = template
        self.recurring = recurring  # of its Outcome
        self.baseline_nusd = baseline_nusd
        self.worth = worth  # what a hit earns for learning, see `proxy.core.purse`
        self.head: Head | None = None
        self.second = -1  # the second of which `head` tells age and ttl


class HotRow:
    """An entry, its decoded answer, and the forms it was served in so far."""

    __slots__ = ("answer", "entry", "forms", "size_bytes")

    def __init__(self, entry: Entry, answer: Answer) -> None:
        self.entry = entry
        self.answer = answer
        self.forms: dict[tuple[object, ...], Form] = {}
        draft = entry.draft
        self.size_bytes = ROW_OVERHEAD_BYTES + 2 * len(draft.answer) + len(draft.prompt) + len(draft.embedding or b"")


@dataclass(slots=True)
class Alias:
    """A wording that was judged to be served by an entry: the next time it costs what an exact hit costs. The more it
    is asked, the more it matters that this is right: after `uses` it is judged anew, and perhaps audited."""

    entry_id: int
    similarity: float
    probability: float
    epoch: int  # of the judge: what it narrowed since makes the judgement void
    uses: int = 1  # from one judgement to the next
    used: int = 0


class HotRows:
    """LRU over rows by fingerprint and by id, and over aliases. Not thread-safe: lives on the event loop."""

    def __init__(self, limit_bytes: int, alias_limit: int = 65_536) -> None:
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self._rows: OrderedDict[bytes, HotRow] = OrderedDict()
        self._by_id: dict[int, bytes] = {}
        self._aliases: OrderedDict[bytes, Alias] = OrderedDict()
        self._alias_limit = alias_limit

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, fingerprint: bytes) -> HotRow | None:
        row = self._rows.get(fingerprint)
        if row is not None:
            self._rows.move_to_end(fingerprint)
        return row

    def get(self, entry_id: int) -> HotRow | None:
        fingerprint = self._by_id.get(entry_id)
        return None if fingerprint is None else self.find(fingerprint)

    def alias(self, fingerprint: bytes) -> Alias | None:
        return self._aliases.get(fingerprint)

    def add_alias(self, fingerprint: bytes, alias: Alias) -> None:
        self._aliases[fingerprint] = alias
        if len(self._aliases) > self._alias_limit:
            self._aliases.popitem(last=False)

    def drop_alias(self, fingerprint: bytes) -> None:
        self._aliases.pop(fingerprint, None)

    def put(self, entry: Entry, answer: Answer) -> HotRow:
        """Keep a row; a row larger than an eighth of the bound is returned without being kept."""
        row = HotRow(entry, answer)
        if row.size_bytes > self.limit_bytes // 8:
            return row
        self._discard(entry.draft.fingerprint)
        self._rows[entry.draft.fingerprint] = row
        self._by_id[entry.id] = entry.draft.fingerprint
        self.size_bytes += row.size_bytes
        self._shrink()
        return row

    def grew(self, row: HotRow, by_bytes: int) -> None:
        """Account for a reply that was rendered after the row was put."""
        by_bytes += FORM_OVERHEAD_BYTES
        row.size_bytes += by_bytes
        if self._rows.get(row.entry.draft.fingerprint) is row:
            self.size_bytes += by_bytes
            self._shrink()

    def forget(self, entry_ids: Iterable[int]) -> None:
        for entry_id in entry_ids:
            fingerprint = self._by_id.get(entry_id)
            if fingerprint is not None:
                self._discard(fingerprint)

    def those(self, chosen: Callable[[Draft], bool]) -> list[int]:
        """Ids of the entries that are chosen."""
        return [row.entry.id for row in self._rows.values() if chosen(row.entry.draft)]

    def clear(self) -> None:
        self._rows.clear()
        self._by_id.clear()
        self._aliases.clear()
        self.size_bytes = 0

    def _shrink(self) -> None:
        while self.size_bytes > self.limit_bytes:
            self._discard(next(iter(self._rows)))

    def _discard(self, fingerprint: bytes) -> None:
        row = self._rows.pop(fingerprint, None)
        if row is not None:
            self.size_bytes -= row.size_bytes
            self._by_id.pop(row.entry.id, None)
