"""Lines that go with a batch of the provider's, from when they are looked up to when their answer is there."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.batch.lines import Lines
from proxy.records import Client, Lookup

LOOKUPS = 4096  # kept from looking a line up to storing its answer

Place = tuple[str, str]  # upstream; model, where a batch has one alone


class Aside:
    """What is kept of them, by number."""

    def __init__(self, lines: Lines) -> None:
        self.pending: dict[Place, list[int]] = {}  # not handed in yet
        self.lookups: dict[int, Lookup] = {}
        self.held: dict[int, Client] = {}  # for whom something of a key's limits is set aside
        self._lines = lines

    def add(self, place: Place, numbers: Iterable[int]) -> None:
        self.pending.setdefault(place, []).extend(numbers)

    def remember(self, number: int, found: Lookup) -> None:
        if len(self.lookups) < LOOKUPS:
            self.lookups[number] = found

    def free(self, number: int) -> None:
        """Nothing of a key's limits is set aside for this line any more."""
        if (held := self.held.pop(number, None)) is not None:
            self._lines.let_go(held)

    def free_all(self) -> None:
        for client in self.held.values():
            self._lines.let_go(client)
        self.held.clear()
