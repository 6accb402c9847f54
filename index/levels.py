"""Where the learner counts errors; on its own, so that whoever judges by them need not load the learner's kernels."""

from __future__ import annotations

from typing import Final

LEVELS: Final = tuple(-1.0 + 0.25 * i for i in range(41))
"""Log-odds: -1 (probability .27) to 9 (.9999)."""
