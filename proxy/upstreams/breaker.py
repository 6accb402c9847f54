"""Stops asking an upstream that keeps failing: closed → open → a probe now and then → closed (catalogue row 39).

Closed: requests pass and their outcomes are counted by the second, over a window. When at least `least` of them fell
into the window and at least `share` of those failed, the breaker opens. Open: requests are refused at once, but every
`probe_every_s` one may pass. The first probe that brings a response head closes the breaker with an empty window.

A probe is some client's request: it may take minutes, fail late, or be given up. So nobody waits for its outcome: the
next one goes by the clock, and an upstream that answers again is found within `probe_every_s`.

Not for threads: one breaker belongs to one event loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from proxy.core.errors import UpstreamError

WINDOW_S = 10


class Breaker:
    """`now` gives monotonic seconds."""

    __slots__ = ("_buckets", "_least", "_name", "_next_probe", "_now", "_open", "_probe_every_s", "_share")

    def __init__(
        self,
        name: str,
        now: Callable[[], float],
        *,
        least: int = 20,
        share: float = 0.5,
        probe_every_s: float = 5.0,
    ) -> None:
        self._name = name
        self._now = now
        self._least = least
        self._share = share
        self._probe_every_s = probe_every_s
        self._buckets: dict[int, list[int]] = {}  # second → [requests, failures]
        self._open = False
        self._next_probe = 0.0

    @property
    def is_open(self) -> bool:
        return self._open

    def admit(self) -> bool:
        """True when this request is a probe. Raises UpstreamError circuit_open (503) with the wait in seconds."""
        if not self._open:
            return False
        wait_s = self._next_probe - self._now()
        if wait_s > 0:
            raise UpstreamError(
                f"The upstream {self._name!r} keeps failing; it is asked again shortly.",
                code="circuit_open",
                status=503,
                retry_after_s=max(1, math.ceil(wait_s)),
            )
        self._next_probe = self._now() + self._probe_every_s
        return True

    def succeeded(self, is_probe: bool) -> None:
        if not self._open:
            self._bucket()[0] += 1
        elif is_probe:
            self._open = False
            self._buckets.clear()

    def failed(self, is_probe: bool) -> None:
        """A probe that fails changes nothing; one that fails after another closed the breaker says nothing new."""
        if is_probe or self._open:
            return
        bucket = self._bucket()
        bucket[0] += 1
        bucket[1] += 1
        requests = sum(b[0] for b in self._buckets.values())
        failures = sum(b[1] for b in self._buckets.values())
        if requests >= self._least and failures >= requests * self._share:
            self._open = True
            self._next_probe = self._now() + self._probe_every_s
            self._buckets.clear()

    def _bucket(self) -> list[int]:
        second = int(self._now())
        bucket = self._buckets.get(second)
        if bucket is None:
            for old in [s for s in self._buckets if s <= second - WINDOW_S]:
                del self._buckets[old]
            bucket = self._buckets[second] = [0, 0]
        return bucket
