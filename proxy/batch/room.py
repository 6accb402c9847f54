"""Room for what clients hand in: files of lines, and the bytes of an upload that wait on disk for its purpose.

Who checks a credential is the upstream, and an upload reaches none: so a made-up key may hand in as well as a real one.
All files together hold at most `limit_bytes`. Once half of that is taken, no tenant and no address may hold more than
an eighth. What an address handed in is known since the program started; what a tenant holds, SQL knows. What waits may
be the upstream's: it is bounded together alone, without asking SQL.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

from proxy.batch.ports import BatchStore
from proxy.core.errors import BadRequest

SCARCE: Final = 1 / 2  # of the room: from there on shares are counted
SHARE: Final = 1 / 8  # of the room


class FileRoom:
    """For one loop."""

    def __init__(self, store: BatchStore, limit_bytes: int, now_ms: Callable[[], int]) -> None:
        self.limit_bytes = limit_bytes
        self.arriving_bytes = 0
        self.taken_bytes = 0  # ever, less what was given back
        self.waiting_bytes = 0
        self.arriving_of: Counter[str] = Counter()  # tenants, addresses
        self._store = store
        self._now_ms = now_ms
        self._handed: dict[str, list[tuple[int, int]]] = {}  # address → when each of its files expires, and its bytes

    @contextlib.asynccontextmanager
    async def place(self, tenant: str, address: str, expires_ms: int) -> AsyncIterator[Place]:
        """A place for one upload, kept when the block ends well. Raises CacheFault."""
        before, begun = self.arriving_bytes, self.taken_bytes
        held, own = await self._store.bytes_of_files(tenant)
        place = Place(self, (tenant, address), held + before - begun, {tenant: own, address: self._of(address)})
        try:
            yield place
        except BaseException:
            place.give_back(place.bytes)
            raise
        if place.bytes:
            self._handed.setdefault(address, []).append((expires_ms, place.bytes))
            place.settle()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[int], None]]:
        """Call it with what comes to wait on disk. It raises BadRequest (413, `batch_storage_full`)."""
        own_bytes = 0

        def wait(size_bytes: int) -> None:
            nonlocal own_bytes
            if self.waiting_bytes + size_bytes > self.limit_bytes:
                raise _full("There is no room for more uploads", self.limit_bytes)
            self.waiting_bytes += size_bytes
            own_bytes += size_bytes

        try:
            yield wait
        finally:
            self.waiting_bytes -= own_bytes

    def _of(self, address: str) -> int:
        """What an address handed in and has not expired. A file that was deleted counts until then: whoever fills and
        empties at once keeps the writer as busy."""
        now_ms = self._now_ms()
        for other in [*self._handed]:
            self._handed[other] = [one for one in self._handed[other] if one[0] > now_ms]
            if not self._handed[other]:
                del self._handed[other]
        return sum(size for _, size in self._handed.get(address, ()))


class Place:
    """What one upload takes."""

    def __init__(self, room: FileRoom, owners: tuple[str, str], held_bytes: int, own_bytes: dict[str, int]) -> None:
        self.bytes = 0
        self._room = room
        self._owners = owners
        self._held_bytes = held_bytes  # less what was ever taken when it was looked up
        self._own_bytes = own_bytes

    def take(self, size_bytes: int) -> None:
        """Raises BadRequest (413, `batch_storage_full`)."""
        room = self._room
        total = self._held_bytes + room.taken_bytes + size_bytes
        if total > room.limit_bytes:
            raise _full("There is no room for more files of batches", room.limit_bytes)
        if total > room.limit_bytes * SCARCE:
            for owner in self._owners:
                if self._own_bytes[owner] + room.arriving_of[owner] + size_bytes > room.limit_bytes * SHARE:
                    raise _full("Your files take their share of what is left for batches", room.limit_bytes)
        self.bytes += size_bytes
        room.taken_bytes += size_bytes
        room.arriving_bytes += size_bytes
        room.arriving_of.update(dict.fromkeys(self._owners, size_bytes))

    def give_back(self, size_bytes: int) -> None:
        """They are not kept."""
        self._room.taken_bytes -= size_bytes
        self._leave(size_bytes)

    def settle(self) -> None:
        """SQL knows of them."""
        self._leave(self.bytes)

    def _leave(self, size_bytes: int) -> None:
        room = self._room
        self.bytes -= size_bytes
        room.arriving_bytes -= size_bytes
        for owner in self._owners:
            room.arriving_of[owner] -= size_bytes
            if not room.arriving_of[owner]:
                del room.arriving_of[owner]


def _full(what: str, limit_bytes: int) -> BadRequest:
    message = f"{what}: delete some, or raise batch.files_bytes ({limit_bytes:,} bytes)."
    return BadRequest(message, code="batch_storage_full", status=413, param="file", should_retry=False)
