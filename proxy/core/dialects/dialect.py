"""What a wire format has to know, so that nothing else needs to.

Every dialect reads a body into the same neutral `Facts` and records an upstream's reply as the same neutral `Answer`,
so one question asked in two of them has one fingerprint, and one stored answer is written in either. Neutral means the
words of OpenAI chat completions: roles, `tools` of functions, `stop` as a list. What a dialect has beyond them keeps
its own name and, being part of the identity, keeps requests apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Protocol

from proxy.core.dialects.fields import without_twin
from proxy.core.errors import IbidError
from proxy.core.facts import Facts
from proxy.core.model import Answer, Usage

Loads = Callable[[bytes], Any]
UsageMode = Literal["original", "zero"]

EVENT_STREAM = "text/event-stream"
JSON = "application/json"


class Recording(NamedTuple):
    """What a complete body said. `usage` is there also when the answer is not storable: it was paid for."""

    answer: Answer | None
    refusal_reason: str
    usage: Usage | None


class Template:
    """A rendered answer with holes for what is new in each replay. Immutable and shared between hits.

    `seam` is what stands in a hole, with `{id}` (the request's, hexadecimal), `{created}` (seconds since the Unix
    epoch) and `{date}` (the same as RFC 3339). `calls` marks holes of their own: hole i of them is the id of tool call
    calls[i], new in every replay and the same wherever that call is named within one.
    """

    __slots__ = ("_call_prefix", "_calls", "_dated", "_made", "_seam", "nbytes", "parts")

    def __init__(
        self, parts: tuple[bytes, ...], seam: str, *, calls: Sequence[int | None] = (), call_prefix: str = ""
    ) -> None:
        self.parts = parts
        self.nbytes = sum(map(len, parts))  # without the holes
        self._seam = seam
        self._dated = "{date}" in seam
        self._calls = tuple(calls)
        self._made = frozenset(calls)
        self._call_prefix = call_prefix

    def fill(self, token: str, created: int) -> bytes:
        """The body. `token` is 32 hexadecimal digits that no other replay has."""
        date = rfc3339(created) if self._dated else ""
        seam = self._seam.replace("{id}", token).replace("{created}", str(created)).replace("{date}", date).encode()
        if not self._calls:
            return seam.join(self.parts)
        holes = {i: f"{self._call_prefix}{token[8:]}{i:02x}".encode() for i in self._made if i is not None}
        filled = [seam] * (2 * len(self.parts) - 1)
        filled[::2] = self.parts
        filled[1::2] = [seam if call is None else holes[call] for call in self._calls]
        return b"".join(filled)


def rfc3339(created: int) -> str:
    """Seconds since the Unix epoch as `2026-11-25T21:30:00Z`."""
    return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def call_mark(i: int, prefix: str = "") -> str:
    """What stands for the id of tool call `i` in a body until `templated` cuts it there. A private-use character: no
    text that a model writes is exactly this. `prefix` (letters and an underscore) stays in front of the id."""
    return f"{prefix}\ue000call {i}\ue000"


def templated(parts: Sequence[bytes], seam: str, call_prefix: str) -> Template:
    """A Template of parts with holes between them, cut once more where a JSON string is a `call_mark`."""
    if not any([b"\xee\x80\x80call " in part for part in parts]):
        return Template(tuple(parts), seam)
    cut: list[bytes] = []
    calls: list[int | None] = []
    for part in parts:
        if cut:
            calls.append(None)
        text, *rest = _CALL_MARK.split(part)
        for prefix, i, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            cut.append(text + b'"' + prefix)
            calls.append(int(i))
            text = b'"' + after
        cut.append(text)
    return Template(tuple(cut), seam, calls=calls, call_prefix=call_prefix)


_CALL_MARK = re.compile('"([a-z]*_?)\ue000call (\\d+)\ue000"'.encode())


def is_plain(answer: Answer, parts: Collection[str] = ("role", "content", "tool_calls")) -> bool:
    """Whether an answer holds nothing but these parts of a message, so that any dialect that has them can say it all:
    nothing signed, nothing of its recorder's own, and calls whose arguments are objects."""
    told = [name for name, value in answer.message.items() if value not in (None, "", [])]
    if answer.opaque or any(answer.choice.values()) or not all([name in parts for name in told]):
        return False
    return all([_is_object(call["function"]["arguments"]) for call in answer.message.get("tool_calls") or ()])


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except (ValueError, RecursionError):
        return False


class StreamFilter(Protocol):
    """Turns the upstream's stream into the client's, in whole events but for one of a MiB and more, and knows whether
    it came to its end."""

    failed: bool  # the upstream itself sent an error

    @property
    def number(self) -> int:
        """Of the last event that passed, where its dialect numbers them; else -1."""
        ...

    @property
    def complete(self) -> bool:
        """The marks that the answer is whole were seen; else the relay owes the client an error."""
        ...

    @property
    def is_within(self) -> bool:
        """What passed last ends inside an event, one too long to be held: nothing may be said in between."""
        ...

    def feed(self, chunk: bytes) -> bytes:
        """Bytes for the client now, maybe none."""
        ...

    def end(self) -> bytes:
        """Bytes still owed after a clean end, which may be what shows that the answer is whole."""
        ...


_BEGINS_STREAM = re.compile(rb"\s*(?:\xef\xbb\xbf)?(?:data|event|id|retry)?:")


def is_streamed(dialect: Dialect, content_type: str, start: bytes) -> bool:
    """Whether a body is a stream of this dialect: by its media type, or, when a server calls it something else or
    nothing, by its first bytes."""
    if content_type == dialect.stream_type:
        return True
    if dialect.stream_type == EVENT_STREAM:
        return _BEGINS_STREAM.match(start) is not None
    return content_type != JSON and start.lstrip().startswith(b"{")


class Spoken:
    """What most dialects have alike: server-sent events, with room for comments between them, and bodies of which
    nothing but the cache twin is ours."""

    heartbeat: bytes | None = b": ping\n"
    patience: bytes | None = b"\n"
    """A single LF: every SDK accepts it before a whole answer, and after an `id:` line of a stream."""
    stream_type = EVENT_STREAM
    id_header = ""

    def __init__(self, loads: Loads = json.loads) -> None:
        self._loads = loads

    def forward_body(self, raw: bytes, parsed: Mapping[str, Any]) -> bytes:
        return without_twin(raw, parsed)


class Dialect(Protocol):
    """One operation of one wire format. Holds no state of a request."""

    @property
    def name(self) -> str:
        """The ledger's word: "openai", "anthropic", "gemini", "ollama"."""
        ...

    @property
    def operation(self) -> str:
        """Part of the scope: "chat", "completion". What answers one operation never answers another."""
        ...

    @property
    def heartbeat(self) -> bytes | None:
        """What may stand between two events of a stream for the sake of those who wait; None where nothing may."""
        ...

    @property
    def patience(self) -> bytes | None:
        """What may stand before a whole answer for the sake of those who wait; None where nothing may."""
        ...

    @property
    def stream_type(self) -> str:
        """Media type of its streams."""
        ...

    @property
    def id_header(self) -> str:
        """The response header in which its SDK looks for the request's id, beside `x-request-id`; or ""."""
        ...

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        """What the request says; `model` and `stream` where the path says them. Raises BadRequest naming the
        parameter."""
        ...

    def forward_body(self, raw: bytes, parsed: Mapping[str, Any]) -> bytes:
        """The bytes that go upstream: the client's, without what is meant for us."""
        ...

    def record(self, body: bytes, *, is_stream: bool, n: int, keeps_id: bool = False) -> Recording:
        """Read a body that ended cleanly, streamed or whole. `keeps_id`: see `Facts`."""
        ...

    def find_usage(self, body: bytes) -> Usage | None:
        """The last usage in a body, complete or cut; None when there is none."""
        ...

    def filter(self, *, wants_usage: bool, n: int) -> StreamFilter:
        """A filter for one relayed stream."""
        ...

    def expresses(self, answer: Answer, *, has_stops: bool, keeps_id: bool = False) -> bool:
        """Whether this dialect can say all of an answer that another one recorded. `keeps_id`: see `Facts`; no other
        dialect's answer has the id that its clients will come back with."""
        ...

    def render(self, answer: Answer, *, stream: bool, wants_usage: bool, usage_mode: UsageMode) -> Template:
        """The answer as a body. Raises ValueError for what JSON cannot say."""
        ...

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        """The error envelope of this dialect."""
        ...

    def stream_error(self, error: IbidError, request_id: str = "", *, after: int = -1) -> bytes:
        """An error as the last words of a stream, after which every SDK raises. `after`: see `StreamFilter.number`."""
        ...
