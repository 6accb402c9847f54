"""Heads and bodies on their way: how long a body may take, and who may have how many of either.

A body has patience. Waiting for its bytes uses it up, second by second; the bytes give it back at the least rate, never
above the full measure. So silence ends after `body_timeout_s`, so does a trickle, and an upload of any size may go on
while it keeps up, until its total deadline. The time that an upstream takes to accept bytes does not count.

Places are bounded. While more than a quarter of them is free anyone may have one. Then a credential or an address that
holds its share gets no more, and those that fell behind give way: half a body keeps nobody out for longer than GRACE_S,
and behind one load balancer, where all share an address, an honest rate is never cut for a crowd.

Of a head nothing is known but its address and its bytes. One that comes in one piece needs no room. When room is short
the oldest of an address that holds its share is ended, or the oldest of all: whoever sends a head at once is never it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Final, Generic, NamedTuple, TypeVar

from proxy.core.errors import Busy
from proxy.core.model import Limits

GRACE_S: Final = 2.0
"""Patience that a body may have used before it counts as behind: round trips, and a resent packet."""
SCARCE: Final = 0.75  # of the places taken, from where shares count


class Arrival:
    """One body on its way. Times are those of a monotonic clock; `owners` are whose places it counts among."""

    __slots__ = (
        "_full_s",
        "_left_s",
        "_rate",
        "_rest_s",
        "_room",
        "_since_s",
        "held_bytes",
        "is_displaced",
        "owners",
        "wake",
    )

    def __init__(self, limits: Limits, owners: tuple[Hashable, ...] = (), room: Room | None = None) -> None:
        self.owners = owners
        self.is_displaced = False
        self.wake: Callable[[], None] | None = None  # ends the wait under way
        self.held_bytes = 0  # in memory until the body is whole
        self._room = room
        self._full_s = self._left_s = limits.body_timeout_s
        self._rest_s = limits.upload_timeout_s
        self._rate = limits.body_bytes_per_s
        self._since_s: float | None = None  # since when its bytes are waited for

    def waits(self, now_s: float) -> float:
        """A wait begins; how long it may last, in seconds."""
        self._since_s = now_s
        return 0.0 if self.is_displaced else max(0.0, min(self._left_s, self._rest_s))

    def came(self, size_bytes: int, now_s: float) -> None:
        """A wait has ended with so many bytes."""
        waited_s = 0.0 if self._since_s is None else max(0.0, now_s - self._since_s)
        self._since_s = None
        self._rest_s -= waited_s
        self._left_s = min(self._full_s, self._left_s - waited_s + size_bytes / self._rate)

    def behind_s(self, now_s: float) -> float:
        """Patience used so far."""
        waited_s = 0.0 if self._since_s is None else now_s - self._since_s
        return self._full_s - self._left_s + waited_s

    def hold(self, size_bytes: int, now_s: float) -> None:
        """So many bytes of it stay in memory. Raises Busy when bodies on their way together would hold too many."""
        if self._room is not None:
            self._room.hold(self, size_bytes, now_s)

    def leave(self) -> None:
        """It has arrived, or it is given up. May be said twice."""
        if self._room is not None:
            self._room.leave(self)


class Room:
    """The places. Not for threads."""

    def __init__(self, limits: Limits) -> None:
        # Bodies that pass through are admitted while they arrive: they may have half of the turns, never all.
        self.places = max(1, min(limits.bodies, limits.in_flight // 2))
        self.held_bytes = 0
        self.is_shut = False  # for want of memory: no body is begun or read on
        self._limit_bytes = limits.bodies_bytes
        self._share = max(1, int(self.places * limits.body_share))
        self._limits = limits
        self._arriving: dict[Arrival, None] = {}
        self._held_by: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return len(self._arriving)

    def enter(self, owners: tuple[Hashable, ...], now_s: float) -> Arrival:
        """A place for one more body; its end is `leave`. Raises Busy."""
        self._refuse_if_shut()
        if len(self._arriving) >= self.places * SCARCE:
            greedy = [owner for owner in owners if self._held_by[owner] >= self._share]
            if greedy or len(self._arriving) >= self.places:
                self._displace(greedy[0] if greedy else None, now_s)
        arrival = Arrival(self._limits, owners, self)
        self._arriving[arrival] = None
        self._held_by.update(owners)
        return arrival

    def hold(self, arrival: Arrival, size_bytes: int, now_s: float) -> None:
        """These bytes of it are kept in memory. Raises Busy."""
        self._refuse_if_shut()
        while self.held_bytes + size_bytes > self._limit_bytes:
            self._displace(None, now_s)
        if arrival in self._arriving:
            arrival.held_bytes += size_bytes
            self.held_bytes += size_bytes

    def _refuse_if_shut(self) -> None:
        if self.is_shut:
            raise Busy("Memory is short.")

    def leave(self, arrival: Arrival) -> None:
        if arrival not in self._arriving:
            return
        del self._arriving[arrival]
        self.held_bytes -= arrival.held_bytes
        self._held_by.subtract(arrival.owners)
        for owner in arrival.owners:
            if not self._held_by[owner]:
                del self._held_by[owner]

    def _displace(self, owner: Hashable | None, now_s: float) -> None:
        """End the body that is furthest behind, of this owner's or of all. Raises Busy when none is behind."""
        candidates = [one for one in self._arriving if owner is None or owner in one.owners]
        last = max(candidates, key=lambda one: one.behind_s(now_s), default=None)
        if last is None or last.behind_s(now_s) < GRACE_S:
            raise Busy("Too many request bodies are on their way.")
        last.is_displaced = True
        self.leave(last)
        if last.wake is not None:
            last.wake()


Sender = TypeVar("Sender", bound=Hashable)


class _Half(NamedTuple):
    address: str
    size_bytes: int


class HeadRoom(Generic[Sender]):
    """Room in memory for heads that are not whole yet, each known by who sends it. Not for threads."""

    def __init__(self, limits: Limits) -> None:
        self.held_bytes = 0
        self._limit_bytes = limits.heads_bytes
        self._share_bytes = int(limits.heads_bytes * limits.head_share)
        self._halves: dict[Sender, _Half] = {}  # the oldest first
        self._held_by: Counter[str] = Counter()  # bytes

    def hold(self, sender: Sender, address: str, size_bytes: int) -> list[Sender]:
        """So many more bytes of a head are kept. Whose heads must be ended for them; their room is free already."""
        held = self._halves.get(sender, _Half(address, 0))
        self._halves[sender] = _Half(address, held.size_bytes + size_bytes)
        self._add(address, size_bytes)
        ended = []
        while (sheds := self._sheds(address)) is not None:
            ended.append(sheds)
            self.leave(sheds)
        return ended

    def leave(self, sender: Sender) -> None:
        """Its head is whole, or given up. May be said twice."""
        if (half := self._halves.pop(sender, None)) is not None:
            self._add(half.address, -half.size_bytes)

    def _sheds(self, address: str) -> Sender | None:
        """The head to end, if one must be."""
        if self.held_bytes > self._limit_bytes * SCARCE and self._held_by[address] > self._share_bytes:
            return next(sender for sender, half in self._halves.items() if half.address == address)
        return next(iter(self._halves)) if self.held_bytes > self._limit_bytes else None

    def _add(self, address: str, size_bytes: int) -> None:
        self.held_bytes += size_bytes
        self._held_by[address] += size_bytes
        if not self._held_by[address]:
            del self._held_by[address]
