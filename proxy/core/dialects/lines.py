"""Newline-delimited JSON as bytes: where one line ends. Gives the same lines however the network cut the stream."""

from __future__ import annotations

from proxy.core.errors import UpstreamError

LINE_LIMIT_BYTES = 1024 * 1024


class LineSplitter:
    """Cuts a stream into whole lines, each with its line end. CR LF ends a line too; blank lines are lines."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Lines that became whole. Raises UpstreamError (upstream_protocol_error) for one over 1 MiB."""
        *lines, self.held = (self.held + chunk).split(b"\n")
        if len(self.held) > LINE_LIMIT_BYTES or any([len(line) > LINE_LIMIT_BYTES for line in lines]):
            raise UpstreamError("the upstream sent a line over 1 MiB", code="upstream_protocol_error")
        return [line + b"\n" for line in lines]

    def end(self) -> bytes:
        """What was left without its line end, when the stream ended cleanly: a whole line to every client."""
        held, self.held = self.held, b""
        return held
