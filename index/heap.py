"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Give freed pages back to the system where the C library can (glibc): training leaves much behind."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
