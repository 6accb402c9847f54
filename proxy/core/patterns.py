"""Names by pattern, as an operator writes them: `gpt-*`, `qwen?`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def is_one_of(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern of `fnmatch` fits all of the name, its case included. Without patterns none does."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
