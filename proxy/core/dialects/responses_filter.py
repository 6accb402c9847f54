"""OpenAI Responses: relay a stream in whole events, and know whether it came to its end."""

from __future__ import annotations

import json
from typing import Any

from proxy.core.eventstream import LINE_LIMIT_BYTES, EventSplitter, read_event

EVENT_LINE_BYTES = 8 * LINE_LIMIT_BYTES
"""The last event repeats all of the answer, and a made image comes in one event as well."""

ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})  # each says what it is
_MARKS = (b"response.completed", b"response.incomplete", b"response.failed", b'"error"')


class ResponseFilter:
    """Every event passes as it came; the answer is whole once an event of ENDS did."""

    __slots__ = ("_done", "_last", "_splitter", "failed")

    def __init__(self) -> None:
        self.failed = False
        self._splitter = EventSplitter(EVENT_LINE_BYTES)
        self._done = False
        self._last = b""  # event

    @property
    def complete(self) -> bool:
        return self._done

    @property
    def number(self) -> int:
        """Of the last event that passed; -1 when the upstream does not number them."""
        number = _read(self._last).get("sequence_number")
        return number if type(number) is int else -1

    def feed(self, chunk: bytes) -> bytes:
        blocks = self._splitter.feed(chunk)
        for block in blocks:
            self._see(block)
        passed = b"".join(blocks)
        if self._splitter.bom:
            passed, self._splitter.bom = self._splitter.bom + passed, b""
        return passed

    def end(self) -> bytes:
        """A last event without its blank line says nothing to any SDK, so it is not the end of an answer either."""
        return self._splitter.end() if self._done or self.failed else b""

    def _see(self, block: bytes) -> None:
        if b"data" in block:
            self._last = block
        if not any([mark in block for mark in _MARKS]):
            return
        event = _read(block)
        if event.get("type") in ENDS:
            self._done = True
        elif event.get("type") == "error" or event.get("error") is not None:
            self.failed = True


def _read(block: bytes) -> dict[str, Any]:
    """What an event says, by its data alone as the SDKs read it; empty when that is nothing."""
    event = read_event(block)
    try:
        said = json.loads(event.data) if event is not None else None
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
