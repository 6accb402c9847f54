"""What a purge reaches: stored entries, and answers that are still on their way.

A purge is a numbered fact. A call that began before it may bring the very text the purge was made to remove, so its
answer is not stored where the purge would have removed it, nor where the purge did remove what was stored for the same
question. Numbers, not times, say what came first: clocks step back and are not the same on two machines.

Purges are remembered up to a bound. What began before the oldest one still known is stored nowhere: what came since is
not known in full.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from proxy.core.model import Draft

PREFIX_BYTES = 8
KEPT = 10_000  # purges
KEPT_BYTES = 16 * 1024 * 1024  # of fingerprints in them
KEPT_MS = 3 * 86_400_000  # longer than a provider's batch may take


@dataclass(frozen=True, slots=True)
class Selector:
    """Entries to purge: those that meet every condition given. An empty one selects nothing; `everything` is explicit.

    `writer` is a request id or a tenant digest; `older_than_ms` an instant: entries that were asked for before it.
    """

    ids: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()  # any of them
    namespace: str | None = None
    model: str | None = None
    older_than_ms: int | None = None
    writer: str | None = None
    everything: bool = False


class Began(NamedTuple):
    """When a call was begun whose answer may be stored."""

    purge: int  # number of the newest purge that was known
    ts_ms: int


class Marks(NamedTuple):
    """What a purge looks at."""

    fingerprint: bytes
    tenant: str
    namespace: str
    model: str
    request_id: str
    tags: Sequence[str]


class Purge(NamedTuple):
    """One that was made. `removed`: first bytes of the fingerprints it removed, sorted, PREFIX_BYTES each."""

    number: int
    ts_ms: int
    selector: Selector
    removed: bytes


def marks_of(draft: Draft) -> Marks:
    return Marks(draft.fingerprint, draft.tenant, draft.namespace, draft.model, draft.request_id, draft.tags)


def asked_ms(draft: Draft) -> float:
    """When the answer of a stored entry was asked for."""
    return draft.created_ms - draft.total_ms


def prefixes(fingerprints: Iterable[bytes]) -> bytes:
    """`Purge.removed` of these."""
    return b"".join(sorted([fingerprint[:PREFIX_BYTES] for fingerprint in fingerprints]))


def reaches(purge: Purge, marks: Marks, asked_ms: float) -> bool:
    """Whether a purge would have removed such an entry, asked for at this time."""
    chosen = purge.selector
    if chosen.everything or _is_among(purge.removed, marks.fingerprint):
        return True
    if chosen.ids or chosen == Selector():  # which of them there were, `removed` says
        return False
    return (
        (not chosen.tags or not set(chosen.tags).isdisjoint(marks.tags))
        and chosen.namespace in (None, marks.namespace)
        and chosen.model in (None, marks.model)
        and (chosen.older_than_ms is None or asked_ms < chosen.older_than_ms)
        and chosen.writer in (None, marks.request_id, marks.tenant)
    )


def _is_among(removed: bytes, fingerprint: bytes) -> bool:
    def at(place: int) -> bytes:
        return removed[place * PREFIX_BYTES : (place + 1) * PREFIX_BYTES]

    wanted = fingerprint[:PREFIX_BYTES]
    return at(bisect_left(range(len(removed) // PREFIX_BYTES), wanted, key=at)) == wanted


class Purges:
    """The newest purges, without a gap between their numbers. Not thread-safe."""

    def __init__(self) -> None:
        self.newest = 0  # number
        self._kept: list[Purge] = []  # in order
        self._bytes = 0

    def __iter__(self) -> Iterator[Purge]:
        return iter(self._kept)

    @property
    def forgotten(self) -> int:
        """Purges up to this number are not known."""
        return self.newest - len(self._kept)

    def learn(self, purges: Iterable[Purge]) -> None:
        """Take up what is newer, in order."""
        for purge in purges:
            if purge.number <= self.newest:
                continue
            if purge.number != self.newest + 1:  # others came and were forgotten before this process saw them
                self._drop(len(self._kept))
            self._kept.append(purge)
            self._bytes += len(purge.removed)
            self.newest = purge.number
        self._drop(max(0, len(self._kept) - KEPT))
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._drop(1)

    def forget(self, now_ms: int) -> int:
        """Let go of what nothing under way is older than; never of the newest. Gives back `forgotten`."""
        self._drop(sum(1 for purge in self._kept[:-1] if purge.ts_ms < now_ms - KEPT_MS))
        return self.forgotten

    def _drop(self, count: int) -> None:
        self._bytes -= sum(len(purge.removed) for purge in self._kept[:count])
        del self._kept[:count]

    def after(self, number: int) -> Sequence[Purge]:
        """Those that are newer and known."""
        return self._kept[max(0, number - self.forgotten) :]

    def overtook(self, marks: Marks, began: Began) -> bool:
        """Whether an answer must not be stored: a purge that reaches it was made after it was begun."""
        if began.purge < self.forgotten:
            return True
        return any(reaches(purge, marks, began.ts_ms) for purge in self.after(began.purge))
