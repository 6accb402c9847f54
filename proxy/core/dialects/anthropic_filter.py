"""Anthropic messages: relay a stream in whole events, and know whether it came to its end."""

from __future__ import annotations

import json
import re

from proxy.core.eventstream import EventSplitter, Fragment, is_cut

_STOPPED = re.compile(rb'"stop_reason"\s*:\s*"[^"]')


class MessageFilter:
    """Every event passes as it came. `message_stop` is withheld when no stop reason came before it, because a client
    would take it for success. A body that ends between two events needs none once the stop reason is there."""

    number = -1
    __slots__ = ("_done", "_has_reason", "_splitter", "failed")

    def __init__(self) -> None:
        self.failed = False
        self._splitter = EventSplitter()
        self._has_reason = False
        self._done = False

    @property
    def complete(self) -> bool:
        return self._done

    @property
    def is_within(self) -> bool:
        return self._splitter.is_within

    def feed(self, chunk: bytes) -> bytes:
        passed = b"".join([block for block in self._splitter.feed(chunk) if self._passes(block)])
        if self._splitter.bom:
            passed, self._splitter.bom = self._splitter.bom + passed, b""
        return passed

    def end(self) -> bytes:
        """A last event without its blank line says nothing to any SDK, but it may be the one that nobody misses."""
        rest = self._splitter.end()
        if not self._done and not is_cut(rest, json.loads):
            self._passes(rest)
            self._done = self._has_reason
        return rest if self._done else b""

    def _passes(self, block: bytes) -> bool:
        if (b"message_delta" in block or isinstance(block, Fragment)) and _STOPPED.search(block):
            self._has_reason = True
        elif b"message_stop" in block and _kind(block) == b"message_stop":
            self._done = self._has_reason
            return self._done or self.failed
        elif b"error" in block and _kind(block) == b"error":
            self.failed = True
        return True


_EVENT = re.compile(rb"^event:[ ]?([^\r\n]*)", re.MULTILINE)
_TYPE = re.compile(rb'^data:\s*\{\s*"type"\s*:\s*"([a-z_]+)"', re.MULTILINE)


def _kind(block: bytes) -> bytes:
    """What the event is: the SDKs go by its name, and drop one that has none."""
    found = _EVENT.search(block) or _TYPE.search(block)
    return found[1] if found is not None else b""
