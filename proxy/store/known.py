"""Which fingerprints may have a row, so that a lookup of something never stored costs no SQL.

What is not known here has no row: a fingerprint enters before its row is written, and none leaves by itself. Rows go,
though, so now and then the rows are read anew, while what is stored meanwhile goes into the old set and the new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LOOSE = 1.5  # fingerprints held for each row, and ...
SLACK = 1_024  # ... so many more, from which the rows are read anew


class Fingerprints:
    """At most `limit` of them, about 0.1 KiB each; past it any may have a row, until the rows are read anew."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[int] | None = None
        self._since: set[int] | None = None  # stored while the rows are being read

    def __len__(self) -> int:
        return len(self._known or ())

    def may_hold(self, fingerprint: bytes) -> bool:
        """False only when no row has it."""
        return self._known is None or _short(fingerprint) in self._known

    def add(self, fingerprint: bytes) -> bool:
        """A row of it is about to be written; whether there may have been one before."""
        short = _short(fingerprint)
        if self._since is not None:
            self._since.add(short)
        known = self._known
        if known is None:
            return True
        before = len(known)
        known.add(short)
        if len(known) > self._limit:
            self._known = None
        return len(known) == before

    def is_loose(self, rows: int) -> bool:
        """Whether many more are held than there are rows, or none because there were too many."""
        return self._known is None or len(self._known) > LOOSE * rows + SLACK

    @contextmanager
    def reading(self) -> Iterator[set[int]]:
        """The set to fill with the rows' own (`shortened`), which counts once this ends without an exception.

        Before the rows are read, every write that was under way when this began has to be over.
        """
        found: set[int] = set()
        self._since = since = set[int]()
        try:
            yield found
            found |= since
            self._known = found if len(found) <= self._limit else None
        finally:
            self._since = None


def shortened(head: bytes) -> int:
    """The number that stands for a fingerprint, of its first eight bytes."""
    return int.from_bytes(head, "big")


def _short(fingerprint: bytes) -> int:
    return shortened(fingerprint[:8])
