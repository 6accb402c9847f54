"""Whose turn it is: what waits, by tenant, one of each tenant after the other.

Who asks much waits behind their own texts, and when there is no more room it is one of theirs that goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """Something that waits; equal digests are the same thing."""

    digest: bytes
    tenant: str


W = TypeVar("W", bound=Waiting)


class Turns(Generic[W]):
    """Tenants in turn, and in the order of arrival within one. Bounded by its owner; not thread-safe."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, dict[bytes, W]] = OrderedDict()  # none is empty

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[W]:
        for queue in self._queues.values():
            yield from queue.values()

    def __contains__(self, one: W) -> bool:
        return self._queues.get(one.tenant, {}).get(one.digest) is one

    def count(self, tenant: str) -> int:
        """How many of a tenant's wait."""
        return len(self._queues.get(tenant, ()))

    def add(self, one: W) -> None:
        """Behind the tenant's others; a tenant that had none waiting comes behind the other tenants."""
        self._queues.setdefault(one.tenant, {})[one.digest] = one

    def drop(self, one: W) -> None:
        """Forget one that is there."""
        queue = self._queues[one.tenant]
        del queue[one.digest]
        if not queue:
            del self._queues[one.tenant]

    def take(self, one: W) -> None:
        """Its turn has come: its tenant is behind the others now."""
        self.drop(one)
        if one.tenant in self._queues:
            self._queues.move_to_end(one.tenant)

    def ahead(self, n: int) -> list[W]:
        """The next n, in the order of their turns."""
        found: list[W] = []
        queues = [iter(queue.values()) for queue in self._queues.values()]
        while queues and len(found) < n:
            round_ = [(queue, next(queue, None)) for queue in queues]
            found += [one for _, one in round_ if one is not None]
            queues = [queue for queue, one in round_ if one is not None]
        return found[:n]

    def gives_way(self, tenant: str) -> W | None:
        """The newest of the tenant with the most waiting, or None when that would leave it fewer than `tenant` has."""
        longest = max(self._queues.values(), key=len, default={})
        if len(longest) <= self.count(tenant) + 1:
            return None
        return next(reversed(longest.values()))

    def clear(self) -> None:
        self._queues.clear()
