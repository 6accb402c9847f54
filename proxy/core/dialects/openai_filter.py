"""OpenAI chat completions: what of an upstream's stream reaches the client, and whether it came to its end."""

from __future__ import annotations

import json
import re

from proxy.core.dialects.dialect import Loads
from proxy.core.eventstream import HELD_BYTES, EventSplitter, Fragment, is_cut, is_done, read_event

_FINISH = re.compile(rb'"finish_reason"\s*:\s*"[^"]')
_INDEX = re.compile(rb'"index"\s*:\s*([0-9]{1,3})')


LAST = 4  # events at the end of a stream that say other things: finish, usage, [DONE]
_MARKS = (b"[DONE]", b'"error"')
_ODD = (b'"error"', b'"choices":[]', b'"usage":{', b'"usage": {')
_UNASKED = (b',"usage":null', b', "usage": null')
_NULLS = _CLOSE, _SPACED = (b'"usage":null', b'"usage": null')
_GOES_ON = b'"finish_reason":null'
_SPELLINGS = (  # a member, how it is usually spelled where nothing is to be done, and where something is
    (b'"finish_reason"', (b'"finish_reason":null', b'"finish_reason": null'),
     (b'"finish_reason":"', b'"finish_reason": "')),
    (b'"choices"', (b'"choices":[{', b'"choices": [{'), (b'"choices":[]', b'"choices": []')),
    (b'"usage"', (b'"usage":null', b'"usage": null'), (b'"usage":{', b'"usage": {')),
)  # fmt: skip


def _deltas_until(chunk: bytes) -> int:
    """Where the last LAST events of a chunk begin, when all before them are usual deltas; else 0.

    An event that says `"finish_reason":null` has one choice that goes on; text cannot say it, its quotes are escaped.
    """
    cut = len(chunk)
    for _ in range(LAST + 1):
        cut = chunk.rfind(b"\n\n", 0, cut)
        if cut <= 0:
            return 0
    cut += 2
    lines = chunk.count(b"\n", 0, cut)
    if chunk.find(b"\r", 0, cut) >= 0 or any([chunk.find(mark, 0, cut) >= 0 for mark in _ODD]):
        return 0
    first = chunk.find(b"\n\n") + 2
    end = chunk[max(chunk.rfind(_GOES_ON, 0, first), 0) : first]  # how the first event ends
    if end.startswith(_GOES_ON) and 2 * chunk.count(end, 0, cut) == lines:  # so do all: one line each, none is [DONE]
        return cut
    return cut if 2 * chunk.count(_GOES_ON, 0, cut) == lines and chunk.find(b"[DONE]", 0, cut) < 0 else 0


def _plain_until(chunk: bytes) -> int:
    """Where the first event begins that the filter has to look at, or that is not whole; 0 when that is not plain.

    Counting literals is some twenty times faster than one regular expression over a chunk of many events.
    """
    if len(chunk) > HELD_BYTES:
        return 0
    if (cut := _deltas_until(chunk)) > 0:
        return cut
    first = len(chunk)
    for mark in _MARKS:
        if (at := chunk.find(mark, 0, first)) >= 0:
            first = at
    for member, idle, active in _SPELLINGS:
        for spelling in active:
            if (at := chunk.find(spelling, 0, first)) >= 0:
                first = at
        if chunk.count(member, 0, first) != sum(chunk.count(spelling, 0, first) for spelling in idle):
            return 0
    return chunk.rfind(b"\n\n", 0, first) + 2 if chunk.find(b"\r") < 0 and b"\n\n" in chunk[:first] else 0


class UsageFilter:
    """What of an upstream's stream reaches the client, in whole events, and whether the stream came to its end.

    With `strip`, the usage chunk that only the proxy asked for is left out, and the nulls that announce it. `[DONE]`
    is withheld when a choice has no finish_reason, because a client would take it for success. Everything else passes
    verbatim, data after `[DONE]` included. Only whole events leave, so a heartbeat or an error event may be written
    between any two results, unless `is_within` says otherwise. A body that ends between two events needs no `[DONE]`
    once every choice has its finish_reason: nothing can be missing, and the SDKs ask for no more.
    """

    number = -1
    __slots__ = (
        "_done",
        "_finished",
        "_has_ended",
        "_loads",
        "_may_skip",
        "_n",
        "_seen",
        "_splitter",
        "_strip",
        "_withheld",
        "failed",
    )

    def __init__(self, strip: bool, n: int = 1, loads: Loads = json.loads) -> None:
        self.failed = False  # the upstream itself sent an error event
        self._splitter = EventSplitter()
        self._strip = strip
        self._n = n
        self._loads = loads
        self._seen: set[object] = set()
        self._finished: set[object] = set()
        self._done = False
        self._has_ended = False  # cleanly, every choice finished
        self._withheld = False
        self._may_skip = False

    @property
    def complete(self) -> bool:
        """Every choice has its finish_reason, and `[DONE]` was seen or the body has ended; else the relay owes the
        client an error event."""
        return (self._done or self._has_ended) and not self._withheld

    @property
    def is_within(self) -> bool:
        return self._splitter.is_within

    def feed(self, chunk: bytes) -> bytes:
        """Bytes for the client now, maybe none."""
        return self._asked_for(self._passed(chunk))

    def _asked_for(self, passed: bytes) -> bytes:
        if self._strip:  # a quote inside a string is escaped, so this is a member and nobody's text
            for unasked in _UNASKED:
                passed = passed.replace(unasked, b"")
        return passed

    def _passed(self, chunk: bytes) -> bytes:
        if self._may_skip and not self._splitter.held and self._is_plain(chunk):
            return chunk
        splitter = self._splitter
        may_skip = self._may_skip or (self._n == 1 and not splitter.started and chunk.startswith(b"data:"))
        cut = _plain_until(chunk) if may_skip and not splitter.held else 0
        plain, rest = (chunk[:cut], chunk[cut:]) if cut else (b"", chunk)
        splitter.started = splitter.started or cut > 0
        passed = [plain, *(block for block in splitter.feed(rest) if self._passes(block))]
        if splitter.bom:
            passed.insert(0, splitter.bom)
            splitter.bom = b""
        self._may_skip = self._n == 1 and splitter.started and not self._withheld
        return b"".join(passed)

    def _is_plain(self, chunk: bytes) -> bool:
        """Whole events, none of which the filter has to look at."""
        if chunk.find(b"\n\n") == len(chunk) - 2 and b'"finish_reason":null' in chunk:
            return len(chunk) <= HELD_BYTES  # the usual delta, one in a chunk
        return (
            chunk.endswith((b"\n\n", b"\r\n\r\n"))
            and len(chunk) <= HELD_BYTES
            and b"[DONE]" not in chunk
            and b'"error"' not in chunk
            and not _FINISH.search(chunk)
            and not (self._strip and chunk.count(b'"usage"') != sum([chunk.count(null) for null in _NULLS]))
        )

    def end(self) -> bytes:
        """Bytes still owed after a clean end: a last event without its blank line, unless an error must follow it."""
        rest = self._splitter.end()
        passes = self._passes(rest)
        if not self._done and len(self._finished) >= self._n and self._seen <= self._finished:
            self._has_ended = not is_cut(rest, self._loads)
        return self._asked_for(rest) if passes and (self.complete or self.failed) else b""

    def _passes(self, block: bytes) -> bool:
        if self._withheld:
            return False
        if self._done:
            return True
        if isinstance(block, Fragment):
            self._see(block)
            return True
        if b"[DONE]" in block and (event := read_event(block)) is not None and is_done(event.data):
            self._done = True
            finished = bool(self._finished) and self._seen <= self._finished
            self._withheld = not finished and not self.failed
            return not self._withheld
        may_be_unasked = self._strip and _CLOSE not in block and b'"usage"' in block and _SPACED not in block
        if may_be_unasked or self._n > 1 or b'"error"' in block or _FINISH.search(block):
            return self._inspect(block)
        return True

    def _see(self, fragment: bytes) -> None:
        """Of an event that is never whole here: whether a choice finishes in it."""
        if _FINISH.search(fragment):
            index = int((_INDEX.findall(fragment) or [b"0"])[-1])
            self._seen.add(index)
            self._finished.add(index)

    def _inspect(self, block: bytes) -> bool:
        event = read_event(block)
        try:
            chunk = self._loads(event.data) if event is not None else None
        except (ValueError, RecursionError):
            return True
        if not isinstance(chunk, dict):
            return True
        if chunk.get("error") is not None:
            self.failed = True
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            return True
        for choice in choices:
            if isinstance(choice, dict):
                index = choice.get("index", 0)
                index = index if isinstance(index, int) else 0
                self._seen.add(index)
                if isinstance(reason := choice.get("finish_reason"), str) and reason:
                    self._finished.add(index)
        return not (self._strip and not choices and isinstance(chunk.get("usage"), dict))
