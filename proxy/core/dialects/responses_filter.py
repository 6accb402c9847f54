"""OpenAI Responses: relay a stream in whole events, and know whether it came to its end."""

from __future__ import annotations

import json
import re
from typing import Any

from proxy.core.eventstream import EventSplitter, Fragment, is_cut, read_event

ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})  # each says what it is
_END = re.compile(rb'"type"\s*:\s*"response\.(?:completed|incomplete|failed)"')
_NUMBER = re.compile(rb'"sequence_number"\s*:\s*([0-9]{1,18})')
_MARKS = (b"response.completed", b"response.incomplete", b"response.failed", b'"error"')


class ResponseFilter:
    """Every event passes as it came; the answer is whole once an event of ENDS did."""

    __slots__ = ("_done", "_last", "_splitter", "failed")

    def __init__(self) -> None:
        self.failed = False
        self._splitter = EventSplitter()
        self._done = False
        self._last = b""  # event

    @property
    def complete(self) -> bool:
        return self._done and not self._splitter.is_within

    @property
    def number(self) -> int:
        """Of the last event that passed; -1 when the upstream does not number them."""
        if isinstance(self._last, Fragment):
            return int((_NUMBER.findall(self._last) or [b"-1"])[-1])
        number = _read(self._last).get("sequence_number")
        return number if type(number) is int else -1

    @property
    def is_within(self) -> bool:
        return self._splitter.is_within

    def feed(self, chunk: bytes) -> bytes:
        blocks = self._splitter.feed(chunk)
        for block in blocks:
            self._see(block)
        passed = b"".join(blocks)
        if self._splitter.bom:
            passed, self._splitter.bom = self._splitter.bom + passed, b""
        return passed

    def end(self) -> bytes:
        """A last event without its blank line says nothing to any SDK, but those that ask no further than the body's
        end are content with it."""
        rest = self._splitter.end()
        if rest and not is_cut(rest, json.loads):
            self._see(rest)
        return rest if self._done or self.failed else b""

    def _see(self, block: bytes) -> None:
        if isinstance(block, Fragment):
            self._last = block if _NUMBER.search(block) else self._last
            self._done = self._done or _END.search(block) is not None
            return
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
