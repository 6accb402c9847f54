"""Newline-delimited JSON as bytes: where one line ends. Gives the same lines however the network cut the stream."""

from __future__ import annotations

from proxy.core.eventstream import HELD_BYTES, LINE_LIMIT_BYTES, MARK_BYTES, Fragment

__all__ = ["LINE_LIMIT_BYTES", "LineSplitter"]


class LineSplitter:
    """Cuts a stream into whole lines, each with its line end; a very long one into fragments, of which the last has
    it. CR LF ends a line too; blank lines are lines."""

    __slots__ = ("held", "is_within")

    def __init__(self) -> None:
        self.held = b""
        self.is_within = False  # of a line whose first fragments were given already

    def feed(self, chunk: bytes) -> list[bytes]:
        """Lines that became whole, and fragments of one that is too long for it."""
        *lines, self.held = (self.held + chunk).split(b"\n")
        whole = [line + b"\n" if len(line) < HELD_BYTES else Fragment(line + b"\n") for line in lines]
        if self.is_within and whole:
            whole[0] = Fragment(whole[0])
            self.is_within = False
        if self.is_within or len(self.held) > HELD_BYTES:
            self.is_within = True
            given, self.held = self.held[:-MARK_BYTES], self.held[-MARK_BYTES:]
            if given:
                whole.append(Fragment(given))
        return whole

    def end(self) -> bytes:
        """What was left without its line end, when the stream ended cleanly: a whole line to every client."""
        held, self.held = self.held, b""
        return Fragment(held) if self.is_within else held
