"""How long a client can wait."""

from __future__ import annotations

import re
import time
from typing import Final

from proxy.records import Client, Fetch

LONGEST_S: Final = 600.0
_TIMEOUT_HEADER: Final = b"x-stainless-read-timeout"
_NUMBER: Final = re.compile(rb"[0-9]{1,6}(?:\.[0-9]{1,6})?")


def patience_s(fetch: Fetch) -> float:
    """How long the client can wait from now: its deadline, and its own read timeout, whichever ends first."""
    deadline_s, own_s = fetch.asked.controls.deadline_s, read_timeout_s(fetch.client)
    bounds = [LONGEST_S if deadline_s is None else deadline_s]
    if own_s is not None:
        bounds.append(own_s)
    return min(bounds) - (time.perf_counter() - fetch.client.started_s)


def read_timeout_s(client: Client) -> float | None:
    """After how long without a byte its library gives up, where that says so."""
    told = next((value for name, value in client.headers if name.lower() == _TIMEOUT_HEADER), b"")
    return float(told) if _NUMBER.fullmatch(told) else None
