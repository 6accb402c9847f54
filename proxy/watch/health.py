"""What is not as it should be: one register, which the banner, /readyz, `stats`, the metrics and the log all read.

A part is looked at when somebody asks, and once a second. What is found is a word of REMEDIES; how long it has stood is
kept here. A part without trouble is not listed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

log = logging.getLogger(__name__)

REMEDIES: Final[Mapping[str, str]] = {
    "loading": "wait: exact hits and forwards are served meanwhile",
    "embedder_down": "see the log; `ibid check` looks at the model's files",
    "embedder_late": "the model answers too slowly: give it more CPU, or raise embedding.deadline_ms",
    "torch_fallback": "the model did not convert, torch serves it: slower, more memory; the log says why",
    "no_pair_guard": "the guard was fitted to another model: hits need evidence; cache.pair_guard = false if meant",
    "interpreted": "Numba compiles nothing here (NUMBA_DISABLE_JIT): lookups are slow",
    "index_down": "restart; the index is rebuilt from SQL",
    "index_rebuilding": "wait: it is built from the vectors in SQL",
    "snapshot_unsaved": "the index could not be saved, the next start builds it from SQL: make room on the disk",
    "unlearned": "what the judge had learned could not be read: fewer hits until a restart",
    "down": "see the log: the database does not answer; it is tried again every second",
    "full": "make room on the disk: answers are not stored",
    "gone": "the database file is not where it was: put it back and restart, or nothing of now is kept",
    "journal_full": "rows of the ledger are in memory alone: neither database nor journal takes more",
    "journal_down": "rows of the ledger are in memory alone: the data directory cannot be written",
    "dropping": "rows of the ledger were lost: neither database nor data directory could be written",
    "refused": "the database refused rows of the ledger; the log names them",
    "unread": "virtual keys are as they were when the database last answered",
    "unpriced": "set prices.override for these models, or upstream.NAME.prices_as",
}
"""What the operator may do about it, by reason."""


PASSING: Final = frozenset({"loading", "index_rebuilding"})
"""What every start goes through."""


class Trouble(NamedTuple):
    """`reason` is a word of REMEDIES, or of a fault; `why` is for people and holds no secret."""

    reason: str
    why: str = ""


class Standing(NamedTuple):
    trouble: Trouble
    since_ms: int


class Health:
    """Lives on the event loop. `watch` every part before the first look."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._looks: dict[str, Callable[[], Trouble | None]] = {}
        self._standing: dict[str, Standing] = {}

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self._looks)

    def watch(self, part: str, look: Callable[[], Trouble | None]) -> None:
        """`look` is quick, touches no network, and gives None while the part is sound."""
        self._looks[part] = look

    def look(self) -> Mapping[str, Standing]:
        """What is degraded now, by part. What began or ended since the last look is logged."""
        for part, look in self._looks.items():
            found, known = look(), self._standing.get(part)
            if found is None:
                if known is not None:
                    del self._standing[part]
                    log.info("sound again", extra={"part": part, "reason": known.trouble.reason})
            elif known is None or known.trouble.reason != found.reason:
                self._standing[part] = Standing(found, int(self._clock() * 1000))
                log.log(
                    logging.INFO if found.reason in PASSING else logging.WARNING,
                    "degraded",
                    extra={"part": part, "reason": found.reason, "why": found.why, "do": remedy_of(found.reason)},
                )
            else:
                self._standing[part] = known._replace(trouble=found)
        return dict(self._standing)

    def reasons(self) -> dict[str, str]:
        """Part → word, as /readyz shows it to everybody."""
        return {part: standing.trouble.reason for part, standing in self.look().items()}

    def told(self) -> list[dict[str, Any]]:
        """All of it, as `stats` shows it to the operator."""
        return [
            {
                "part": part,
                "reason": trouble.reason,
                "since_ms": since_ms,
                "why": trouble.why,
                "do": remedy_of(trouble.reason),
            }
            for part, (trouble, since_ms) in self.look().items()
        ]

    def is_degraded(self, part: str) -> bool:
        """As of the last look."""
        return part in self._standing


def remedy_of(reason: str) -> str:
    return REMEDIES.get(reason, "see the log")
