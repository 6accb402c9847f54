"""How a test waits: for an event or a state, and never for a time. The one deadline here only ends a wait in vain."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

PATIENCE_S = 300.0
"""Far more than anything takes, with a dozen busy processes beside it too: what passes it is lost, not late."""

A_WHILE_S = 0.05
"""How long nothing happens where nothing may: a shorter look would show less, and none fails for being late."""


async def until(claim: Callable[[], Any], within_s: float = PATIENCE_S) -> None:
    """Wait for a state that nobody announces; fail when it does not come. What `claim` returns may be awaitable."""
    async with asyncio.timeout(within_s):
        while not (await held if inspect.isawaitable(held := claim()) else held):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
