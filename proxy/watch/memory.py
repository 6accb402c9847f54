"""How much memory there is, and what gives way when it runs short.

The bound is the container's, of either version of control groups, or a configured one. From SHED_AT of it caches are
dropped, what is kept of answers under way with them; from REFUSE_AT new requests are refused until it is less again;
from CUT_AT answers under way are cut, one a look: the kernel, which ends all of them at once, has nobody to kill.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

SHED_AT: Final = 0.85
REFUSE_AT: Final = 0.95
CUT_AT: Final = 0.98
SHED_EVERY_S: Final = 1.0
NO_LIMIT: Final = 1 << 60  # version 1 says so by a number near 2**63
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Resident memory of this process, by /proc/self/statm; 0 where there is none."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def group_limit_bytes(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least memory limit of this process's control group and those above it; None where there is none."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    limits: list[int] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            limits += _limits(root, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "memory", path, "memory.limit_in_bytes")
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def _limits(root: Path, path: str, name: str) -> list[int]:
    """Limits of a group and its ancestors; those whose file cannot be seen from inside a container are left out."""
    folder = root / path.lstrip("/")
    found = []
    for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(root))):
        try:
            word = (group / name).read_text().strip()
        except OSError:
            continue
        if word.isdecimal():
            found.append(int(word))
    return found


class Memory:
    """Looked at by the pulse. `caches` are what can be dropped at once; `limit_bytes` None: there is no bound."""

    def __init__(
        self,
        limit_bytes: int | None,
        caches: Sequence[Callable[[], None]],
        refuse: Callable[[bool], None],
        cut: Callable[[], None],
        measure: Callable[[], int] = resident_bytes,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.sheds = 0
        self.is_short = False  # new requests are refused
        self._caches = caches
        self._refuse = refuse
        self._cut = cut
        self._measure = measure
        self._shed_s = float("-inf")

    @property
    def used_share(self) -> float:
        """Resident memory as a share of the bound; 0 without one."""
        return self._measure() / self.limit_bytes if self.limit_bytes else 0.0

    def look(self, now_s: float) -> None:
        """Measure, and act on it. `now_s` is `time.monotonic`."""
        if not self.limit_bytes:
            return
        used = self.used_share
        if used >= SHED_AT and now_s - self._shed_s >= SHED_EVERY_S:
            self._shed_s = now_s
            self.sheds += 1
            for drop in self._caches:
                drop()
            log.warning("memory is short: caches were dropped", extra={"used": round(used, 3)})
            used = self.used_share
        if (is_short := used >= REFUSE_AT) != self.is_short:
            self.is_short = is_short
            self._refuse(is_short)
            log.warning("memory is short: requests are %s", "refused" if is_short else "taken again")
        if used >= CUT_AT:
            self._cut()
