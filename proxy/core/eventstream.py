"""Server-sent events as bytes: where one event ends, and what it says (WHATWG HTML §9.2.6).

`EventSplitter` cuts a byte stream into whole events without changing a byte; `EventDecoder` reads their data. Both
give the same result however the network cut the stream. A carriage return at the very end of what has arrived may be
half of CRLF, so it is decided by the next byte or by `end`.

What is relayed has no limit: an event longer than HELD_BYTES is not held until it is whole, it goes on in `Fragment`s
as it comes. What is read has one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from proxy.core.errors import UpstreamError

LINE_LIMIT_BYTES = 1024 * 1024
"""Of an event that is read, to be kept."""
HELD_BYTES = 1024 * 1024
"""Of an event, or of a line, that is waited for before it is relayed."""
MARK_BYTES = 128
"""No mark that a filter looks for is longer. The end of a fragment is held back, so that each is whole in one piece."""
DONE = b"[DONE]"

_BOM = b"\xef\xbb\xbf"
_BOUNDARY = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?=[^\n]))")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Event(NamedTuple):
    name: bytes  # b"" when the stream did not name it
    data: bytes


class Fragment(bytes):
    """A piece of an event, or of a line, that is too long to be held until it is whole."""

    __slots__ = ()


def is_done(data: bytes) -> bool:
    """The end mark of OpenAI's streams, blanks around it or not: the SDKs look at how the data begins."""
    return data.strip() == DONE


def read_event(block: bytes) -> Event | None:
    """The event one block of lines says, or None when it holds no data line (comments, `retry:`, blank lines)."""
    name = b""
    data: list[bytes] = []
    for line in _LINE_END.split(block):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value[1:] if value.startswith(b" ") else value)
        elif field == b"event":
            name = value[1:] if value.startswith(b" ") else value
    return Event(name, b"\n".join(data)) if data else None


def is_cut(rest: bytes, loads: Callable[[bytes], Any]) -> bool:
    """Whether the bytes behind the last blank line of a stream are half of an event, and not one whose blank line was
    left out."""
    event = read_event(rest)
    if event is None:  # a comment, or the beginning of a line that may have become anything
        return not rest.startswith(b":") and bool(rest.strip())
    try:
        if not is_done(event.data):
            loads(event.data)
    except (ValueError, RecursionError):
        return True
    return False


class EventSplitter:
    """Cuts a stream into whole events, each with its own bytes and the blank line that ends it; a very long one into
    fragments, of which the last ends with that line."""

    __slots__ = ("_limit", "bom", "held", "is_within", "started")

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        self._limit = held_bytes
        self.held = b""  # bytes of an unfinished event
        self.is_within = False  # of an event whose first fragments were given already
        self.started = False  # past the place where a byte order mark may stand
        self.bom = b""  # a byte order mark found at the start; not part of any event

    def feed(self, chunk: bytes) -> list[bytes]:
        """Events that became whole, and fragments of one that is too long for it."""
        buffer = self.held + chunk if self.held else chunk
        if not self.started:
            if len(buffer) < 3 and _BOM.startswith(buffer):
                self.held = buffer
                return []
            self.started = True
            if buffer.startswith(_BOM):
                self.bom, buffer = _BOM, buffer[3:]
        if b"\r" not in buffer:
            blocks = buffer.split(b"\n\n")
            self.held = blocks.pop()
            events = [block + b"\n\n" for block in blocks]
        else:
            events, start = [], 0
            for boundary in _BOUNDARY.finditer(buffer):
                events.append(buffer[start : boundary.end()])
                start = boundary.end()
            self.held = buffer[start:]
        return self._fragmented(events) if self.is_within or len(buffer) > self._limit else events

    def _fragmented(self, events: list[bytes]) -> list[bytes]:
        """The same with what is too long as fragments, the end of an unfinished one held back."""
        if self.is_within and events:
            events[0] = Fragment(events[0])
            self.is_within = False
        events = [Fragment(event) if len(event) > self._limit else event for event in events]
        if self.is_within or len(self.held) > self._limit:
            self.is_within = True
            given, self.held = self.held[:-MARK_BYTES], self.held[-MARK_BYTES:]
            if given:
                events.append(Fragment(given))
        return events

    def end(self) -> bytes:
        """What was left without its blank line, when the stream ended cleanly; nothing waits afterwards."""
        held, self.held = self.held, b""
        return Fragment(held) if self.is_within else held


class EventDecoder:
    """Data of the events of one stream. `names` collects the event names that were seen."""

    __slots__ = ("_splitter", "names")

    def __init__(self) -> None:
        self._splitter = EventSplitter()
        self.names: set[bytes] = set()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that became whole. Raises UpstreamError(upstream_protocol_error) for one that is longer
        than may be kept."""
        found = []
        splitter = self._splitter
        buffer = splitter.held + chunk
        if (splitter.started or buffer.startswith(b"data")) and b"\r" not in buffer and len(buffer) <= LINE_LIMIT_BYTES:
            splitter.started = True
            blocks = buffer.split(b"\n\n")  # what `EventSplitter.feed` does, without the blank lines
            splitter.held = blocks.pop()
        else:
            blocks = _whole(splitter.feed(chunk))
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block and b"\r" not in block:
                found.append(block[6:])
            elif (event := read_event(block)) is not None:
                found.append(event.data)
                if event.name:
                    self.names.add(event.name)
        return found

    def feed_named(self, chunk: bytes) -> list[Event]:
        """As `feed`, with event names."""
        return [event for block in _whole(self._splitter.feed(chunk)) if (event := read_event(block)) is not None]

    def end(self) -> list[bytes]:
        """Data of the last event when the stream ended cleanly.

        An event without its blank line is dropped, as every SDK does, with two exceptions: a lone CR now counts as the
        end of a line, and a complete `[DONE]` needs no blank line to be understood.
        """
        held = self._splitter.end()
        event = read_event(held)
        whole = held.endswith((b"\r\r", b"\n\r"))
        return [event.data] if event is not None and (whole or is_done(event.data)) else []


def _whole(blocks: list[bytes]) -> list[bytes]:
    if any([isinstance(block, Fragment) for block in blocks]):
        said = f"the upstream sent an event over {HELD_BYTES >> 20} MiB"
        raise UpstreamError(said, code="upstream_protocol_error")
    return blocks
