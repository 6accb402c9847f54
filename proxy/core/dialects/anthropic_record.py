"""Anthropic messages: record an upstream's answer.

A stream is storable only when its end was seen: `message_start` → every block opened and closed → `message_delta` with
a stop reason → `message_stop` → clean end of the body. Truncation is invisible to the Python SDK, so nothing less
counts. Whatever is not fully understood is relayed and not stored; the reason is one machine-readable word.

An answer that is one plain text becomes that text and its usage. Any other keeps its blocks as they were, in
`choice["content"]`, beside the text and the tool calls that other dialects can say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from proxy.core.dialects.dialect import Loads, Recording
from proxy.core.dialects.recording import cached_in, details_of, is_sayable, objects_under, read_object, recorded
from proxy.core.errors import UpstreamError
from proxy.core.eventstream import LINE_LIMIT_BYTES, EventDecoder
from proxy.core.model import Answer, Usage

FINISHES = {
    "end_turn": "stop",
    "stop_sequence": "stop_sequence",
    "tool_use": "tool_calls",
    "max_tokens": "length",
}
"""Anthropic's word → ours; `refusal`, `pause_turn`, `model_context_window_exceeded` and what is new stay themselves."""

COUNTED_LAST = "counted_last"
"""In `extra`: the counters that the last event told, where it left some to the first one. Clients add them up."""

_TOP_FIELDS = frozenset(
    {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage", "created", "request_id"}
)
_OPAQUE = frozenset({"thinking", "redacted_thinking"})
_STORABLE = frozenset({"text", "tool_use", "thinking", "redacted_thinking"})
_DELTAS = {  # type of delta → (its field, where it goes)
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
}


def read_usage(raw: object) -> Usage | None:
    """Token counters of a `usage` object, cache reads and writes counted into the input; None when it holds none."""
    if not isinstance(raw, dict):
        return None
    read, written = cached_in(raw, details_of(raw, "prompt_tokens_details"))
    asked, said = raw.get("input_tokens", raw.get("inputTokens")), raw.get("output_tokens", raw.get("outputTokens"))
    counts: tuple[Any, ...] = (asked, said, read, written)
    if any(type(count) is not int or count < 0 for count in counts):
        return None
    return Usage(counts[0] + read + written, counts[1], read, written)


def record(body: bytes, *, is_stream: bool, loads: Loads = json.loads) -> Recording:
    """Read a body that ended cleanly, streamed or whole."""
    if not is_stream:
        answer = read_whole(body, loads)
    else:
        recorder = Recorder(loads=loads)
        recorder.feed(body)
        answer = recorder.finish()
    return recorded(answer, body, find_usage)


def find_usage(body: bytes) -> Usage | None:
    """What a body says it used, streamed or whole, complete or cut. A stream tells the input first, the output last."""
    told: dict[str, Any] = {}
    for raw in objects_under(body, b'"usage"', last_first=False):
        told |= {name: value for name, value in raw.items() if value is not None}
    return read_usage(told)


def read_whole(raw: bytes, loads: Loads = json.loads, limit_bytes: int = LINE_LIMIT_BYTES) -> Answer | str:
    """The Answer of a JSON body, or the reason why it is not storable."""
    body = read_object(raw, loads, limit_bytes)
    if isinstance(body, str):
        return body
    if body.get("type") == "error" or body.get("error") is not None:
        return "error_object"
    if body.get("type") != "message" or not isinstance(body.get("content"), list):
        return "garbage"
    return _storable(body, body["content"], (), loads)


def _storable(body: Mapping[str, Any], blocks: list[Any], pieces: tuple[int, ...], loads: Loads) -> Answer | str:
    finish, model, usage = body.get("stop_reason"), body.get("model"), body.get("usage")
    if finish is None:
        return "truncated"
    if not all([isinstance(block, dict) and isinstance(block.get("type"), str) for block in blocks]):
        return "garbage"
    if not isinstance(finish, str) or not isinstance(model, str) or not isinstance(usage, dict):
        return "garbage"
    if not _STORABLE.issuperset([block["type"] for block in blocks]):
        return "provider_tools"
    texts = [block.get("text") for block in blocks if block["type"] == "text"]
    calls = [_call(block) for block in blocks if block["type"] == "tool_use"]
    if not all([isinstance(text, str) for text in texts]) or None in calls:
        return "garbage"
    message: dict[str, Any] = {"role": "assistant", "content": "".join(map(str, texts)) if texts else None}
    if calls:
        message["tool_calls"] = calls
    if finish not in FINISHES:
        return finish
    if finish == "max_tokens":
        return "finish_length"
    if not calls and not (message["content"] or "").strip():
        return "empty"
    is_plain = [_is_plain_text(block) for block in blocks] == [True]
    extra = {name: value for name, value in body.items() if name not in _TOP_FIELDS}
    if body.get("stop_sequence") is not None:
        extra["stop_sequence"] = body["stop_sequence"]
    if not is_sayable(loads, blocks, model, usage, extra):
        return "garbage"
    return Answer(
        message=message,
        finish_reason=FINISHES[finish],
        model=model,
        usage=read_usage(usage),
        raw_usage=usage,
        extra=extra,
        pieces=pieces if is_plain else (),
        choice={} if is_plain else {"content": blocks},
        dialect="anthropic",
        opaque=any([block["type"] in _OPAQUE for block in blocks]),
    )


def _is_plain_text(block: Mapping[str, Any]) -> bool:
    return block.get("type") == "text" and not any([block[name] for name in block if name not in ("type", "text")])


def _call(block: Mapping[str, Any]) -> dict[str, Any] | None:
    """A tool call in OpenAI's words; None for one that nobody could answer."""
    if not isinstance(block.get("id"), str) or not isinstance(block.get("name"), str):
        return None
    arguments = json.dumps(block.get("input", {}), ensure_ascii=False, separators=(",", ":"))
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


class Recorder:
    """Assembles one streamed answer. After a refusal nothing is kept."""

    __slots__ = ("_blocks", "_counted_last", "_decoder", "_inputs", "_length", "_limit", "_loads", "_message", "_open",
                 "_pieces", "_stopped", "refusal_reason")  # fmt: skip

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES, loads: Loads = json.loads) -> None:
        self.refusal_reason: str | None = None
        self._loads = loads
        self._limit = limit_bytes
        self._decoder = EventDecoder()
        self._message: dict[str, Any] | None = None
        self._blocks: list[dict[str, Any]] = []
        self._open: set[int] = set()
        self._inputs: dict[int, list[str]] = {}
        self._pieces: list[int] = []  # lengths of the text deltas
        self._length = 0
        self._stopped = False
        self._counted_last: list[str] = []

    def feed(self, chunk: bytes) -> None:
        """The next bytes as the upstream sent them, before any filter."""
        if self.refusal_reason is not None:
            return
        try:
            for event in self._decoder.feed_named(chunk):
                self._read(event.data)
        except UpstreamError:
            self._refuse("too_large")
        except (ValueError, RecursionError):
            self._refuse("garbage")
        if self._length > self._limit:
            self._refuse("too_large")

    def finish(self) -> Answer | str:
        """The Answer, or the reason why it is not storable. Call once, and only when the body ended cleanly."""
        if self.refusal_reason is None and (not self._stopped or self._open or self._message is None):
            self._refuse("truncated")
        if self.refusal_reason is not None:
            return self.refusal_reason
        assert self._message is not None
        for index, parts in self._inputs.items():
            try:
                self._blocks[index]["input"] = self._loads("".join(parts).encode()) if any(parts) else {}
            except (ValueError, RecursionError):
                return "garbage"
        answer = _storable(self._message, self._blocks, tuple(self._pieces), self._loads)
        if isinstance(answer, str):
            self._refuse(answer)
        elif set(self._counted_last) != set(answer.raw_usage or ()):
            return replace(answer, extra={**answer.extra, COUNTED_LAST: self._counted_last})
        return answer

    def _refuse(self, reason: str) -> None:
        if self.refusal_reason is None:
            self.refusal_reason = reason
        self._blocks.clear()
        self._inputs.clear()
        self._pieces.clear()

    def _read(self, data: bytes) -> None:
        event = self._loads(data)
        kind = event.get("type") if isinstance(event, dict) else None
        if self._stopped and kind != "ping":
            return self._refuse("data_after_done")
        match kind:
            case "ping":
                pass
            case "message_start" if self._message is None and isinstance(event.get("message"), dict):
                self._message = dict(event["message"])
            case "content_block_start" | "content_block_delta" | "content_block_stop" if self._message is not None:
                self._read_block(kind, event, len(data))
            case "message_delta" if self._message is not None:
                self._end(event)
            case "message_stop":
                self._stopped = True
            case "error":
                self._refuse("error_event")
            case _:
                self._refuse("unknown_event")
        return None

    def _end(self, event: Mapping[str, Any]) -> None:
        """Stop reason and the counters that count: cumulative, and only those that are told."""
        assert self._message is not None
        delta, usage = event.get("delta"), event.get("usage")
        if not isinstance(delta, dict) or not isinstance(usage, dict | None):
            return self._refuse("garbage")
        self._message |= delta
        self._counted_last = [name for name, value in (usage or {}).items() if value is not None]
        self._message["usage"] = {
            **(self._message.get("usage") or {}),
            **{name: value for name, value in (usage or {}).items() if value is not None},
        }
        self._message |= {n: v for n, v in event.items() if n not in ("type", "delta", "usage") and v is not None}
        return None

    def _read_block(self, kind: str, event: Mapping[str, Any], size: int) -> None:
        index = event.get("index")
        if kind == "content_block_start":
            block = event.get("content_block")
            if index != len(self._blocks) or not isinstance(block, dict):
                return self._refuse("garbage")
            self._blocks.append(dict(block))
            self._open.add(index)
            self._length += size
            if block.get("type") == "tool_use":
                self._inputs[index] = []
            return None
        if type(index) is not int or index not in self._open:
            return self._refuse("garbage")
        if kind == "content_block_stop":
            self._open.discard(index)
            return None
        return self._merge(index, event.get("delta"))

    def _merge(self, index: int, delta: Any) -> None:
        kind = delta.get("type") if isinstance(delta, dict) else None
        block = self._blocks[index]
        if kind in _DELTAS:
            told, name = _DELTAS[kind]
            text = delta.get(told)
            if not isinstance(text, str) or not isinstance(block.setdefault(name, ""), str):
                return self._refuse("garbage")
            block[name] += text
            self._length += len(text)
            if kind == "text_delta" and text:
                self._pieces.append(len(text))
        elif kind == "input_json_delta" and index in self._inputs and isinstance(delta.get("partial_json"), str):
            self._inputs[index].append(delta["partial_json"])
            self._length += len(delta["partial_json"])
        elif kind == "citations_delta" and isinstance(block.setdefault("citations", []) or [], list):
            block["citations"] = [*(block["citations"] or []), delta.get("citation")]
            self._length += len(str(delta.get("citation")))
        else:
            self._refuse("unknown_delta")
        return None
