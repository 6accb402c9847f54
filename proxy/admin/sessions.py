"""Who has signed in to the dashboard: sessions of this process, and tickets that open one, once.

A secret is told to one browser and is nowhere here: what lies in memory is its digest. All of it ends with the process.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable

from proxy.admin.roles import FIRST, Who

SESSION_S = 12 * 3600
TICKET_S = 600
MOST = 100
"""Sessions, and tickets, at a time; the oldest gives way."""


class Sessions:
    """`clock`: seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sessions: dict[
            str, tuple[float, Who]
        ] = {}  # digest → when it ends, and whose; in the order they were opened
        self._tickets: dict[str, tuple[float, Who]] = {}

    def ticket(self) -> str:
        """A secret that `redeem` takes once, within TICKET_S, for a session of the first token's owner."""
        return self._issue(self._tickets, TICKET_S, FIRST)

    def redeem(self, ticket: str) -> str | None:
        """A session's secret for a ticket; None when it was used, is too old or was never given."""
        ends, who = self._tickets.pop(_digest(ticket), (float("-inf"), FIRST))
        return self.open(who) if self._clock() < ends else None

    def open(self, who: Who) -> str:
        """A new session's secret, good for SESSION_S. It may what the token may that opened it."""
        return self._issue(self._sessions, SESSION_S, who)

    def owner(self, secret: str) -> Who | None:
        """Whose session it is; None once it has ended."""
        ends, who = self._sessions.get(_digest(secret), (float("-inf"), FIRST))
        return who if self._clock() < ends else None

    def close(self, secret: str) -> None:
        self._sessions.pop(_digest(secret), None)

    def _issue(self, kept: dict[str, tuple[float, Who]], life_s: float, who: Who) -> str:
        now = self._clock()
        for ended in [digest for digest, (ends, _) in kept.items() if ends <= now]:
            del kept[ended]
        while len(kept) >= MOST:
            del kept[next(iter(kept))]
        secret = secrets.token_urlsafe(32)
        kept[_digest(secret)] = now + life_s, who
        return secret


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
