"""Exit codes of the commands; 1 is a bug, by Python's own traceback."""

from __future__ import annotations

from typing import Final

FINE: Final = 0
ACT: Final = 2  # the operator must
TRY_AGAIN: Final = 75  # it may heal by itself: EX_TEMPFAIL of sysexits.h
INTERRUPTED: Final = 130
