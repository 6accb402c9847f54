"""A body that is there already, in the pieces of one that arrives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

PIECE_BYTES: Final = 256 * 1024


async def once(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]
