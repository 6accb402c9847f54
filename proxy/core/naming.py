"""Other names under which an upstream answers, learnt: the model behind an alias, a gateway's own spelling.

A name counts once an upstream has answered a model asked with it STEADY times in a row. Any other name in between
starts anew: what answers now this, now that is a router, and only its operator can say that all of it will do.
"""

from __future__ import annotations

from typing import Final

STEADY: Final = 2
NAMES_KEPT: Final = 4096


class Naming:
    """Not for threads; lives as long as the process."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[str, int]] = {}  # upstream and model asked → its name, times in a row

    def see(self, upstream: str, asked: str, answered: str) -> None:
        """An answer that ended well named its model."""
        if not answered or answered == asked:
            return
        if len(self._seen) >= NAMES_KEPT:
            self._seen.clear()
        name, times = self._seen.get((upstream, asked), ("", 0))
        self._seen[upstream, asked] = (answered, times + 1 if name == answered else 1)

    def of(self, upstream: str, asked: str) -> tuple[str, ...]:
        """What this upstream always answers with."""
        name, times = self._seen.get((upstream, asked), ("", 0))
        return (name,) if times >= STEADY else ()
