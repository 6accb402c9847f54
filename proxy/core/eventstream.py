"""Server-sent events as bytes: where one event ends, and what it says (WHATWG HTML §9.2.6).

`EventSplitter` cuts a byte stream into whole events without changing a byte; `EventDecoder` reads their data. Both
give the same result however the network cut the stream. A carriage return at the very end of what has arrived may be
half of CRLF, so it is decided by the next byte or by `end`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from proxy.core.errors import UpstreamError

LINE_LIMIT_BYTES = 1024 * 1024
EVENT_LINES = 4  # an event of many lines, each within the line limit, is at most as long as so many of the longest
DONE = b"[DONE]"

_BOM = b"\xef\xbb\xbf"
_BOUNDARY = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?=[^\n]))")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Event(NamedTuple):
    name: bytes  # b"" when the stream did not name it
    data: bytes


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


class EventSplitter:
    """Cuts a stream into whole events, each with its own bytes and the blank line that ends it."""

    __slots__ = ("_limit", "bom", "held", "started")

    def __init__(self, line_limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._limit = line_limit_bytes
        self.held = b""  # bytes of an unfinished event
        self.started = False  # past the place where a byte order mark may stand
        self.bom = b""  # a byte order mark found at the start; not part of any event

    def feed(self, chunk: bytes) -> list[bytes]:
        """Events that became whole. Raises UpstreamError(upstream_protocol_error) for a line over the limit."""
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
        if len(buffer) > self._limit:
            _check_lengths([*events, self.held], self._limit)
        return events

    def end(self) -> bytes:
        """What was left without its blank line, when the stream ended cleanly; nothing waits afterwards."""
        held, self.held = self.held, b""
        return held


class EventDecoder:
    """Data of the events of one stream. `names` collects the event names that were seen."""

    __slots__ = ("_splitter", "names")

    def __init__(self) -> None:
        self._splitter = EventSplitter()
        self.names: set[bytes] = set()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that became whole. Raises UpstreamError(upstream_protocol_error)."""
        found = []
        splitter = self._splitter
        buffer = splitter.held + chunk
        if (splitter.started or buffer.startswith(b"data")) and b"\r" not in buffer and len(buffer) <= LINE_LIMIT_BYTES:
            splitter.started = True
            blocks = buffer.split(b"\n\n")  # what `EventSplitter.feed` does, without the blank lines
            splitter.held = blocks.pop()
        else:
            blocks = splitter.feed(chunk)
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
        return [event for block in self._splitter.feed(chunk) if (event := read_event(block)) is not None]

    def end(self) -> list[bytes]:
        """Data of the last event when the stream ended cleanly.

        An event without its blank line is dropped, as every SDK does, with two exceptions: a lone CR now counts as the
        end of a line, and a complete `[DONE]` needs no blank line to be understood.
        """
        held = self._splitter.end()
        event = read_event(held)
        whole = held.endswith((b"\r\r", b"\n\r"))
        return [event.data] if event is not None and (whole or event.data == DONE) else []


def _check_lengths(blocks: list[bytes], limit: int) -> None:
    for block in blocks:
        if len(block) <= limit:
            continue
        if len(block) > EVENT_LINES * limit or any(len(line) > limit for line in _LINE_END.split(block)):
            said = f"the upstream sent an event line over {limit >> 20} MiB"
            raise UpstreamError(said, code="upstream_protocol_error")
