"""Gemini generateContent: record an upstream's answer, relay its stream, write a stored answer.

There is no end marker: a stream is storable when its one candidate has a `finishReason` and the body ended cleanly. An
answer of plain text becomes that text; any other keeps its parts as they were, in `choice["parts"]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from proxy.core.answer import to_json
from proxy.core.dialects.dialect import Loads, Recording, Template, UsageMode
from proxy.core.dialects.openai_replay import counted, escaped, split
from proxy.core.dialects.recording import is_neutral, is_sayable, last_usage, recorded
from proxy.core.errors import UpstreamError
from proxy.core.eventstream import LINE_LIMIT_BYTES, EventDecoder, EventSplitter, is_cut
from proxy.core.model import Answer, Usage

SEAM = '"responseId":"{id}"'
_TOP_FIELDS = frozenset({"candidates", "usageMetadata", "modelVersion", "responseId", "createTime"})
_CANDIDATE_FIELDS = frozenset({"content", "finishReason", "index"})
_PART_KINDS = frozenset({"text", "functionCall", "thought", "thoughtSignature"})
FINISHES = {"STOP": "stop", "MAX_TOKENS": "length"}
_FINISHED = re.compile(rb'"finishReason"\s*:\s*"[^"]')


def read_usage(raw: object) -> Usage | None:
    """Token counters of a `usageMetadata`; what was thought is output, what tools said is input."""
    if not isinstance(raw, dict):
        return None
    names = ("promptTokenCount", "toolUsePromptTokenCount", "candidatesTokenCount", "thoughtsTokenCount",
             "cachedContentTokenCount")  # fmt: skip
    counts = [raw.get(name) or 0 for name in names]
    if "promptTokenCount" not in raw or any(type(count) is not int or count < 0 for count in counts):
        return None
    asked, tools, said, thought, cached = counts
    return Usage(asked + tools, said + thought, cached)


def find_usage(body: bytes) -> Usage | None:
    """The last counters in a body, streamed or whole, complete or cut; None when there are none."""
    return last_usage(body, b'"usageMetadata"', read_usage)


def record(body: bytes, *, is_stream: bool, loads: Loads = json.loads) -> Recording:
    """Read a body that ended cleanly, streamed or whole."""
    answer = _assembled(body, is_stream, loads)
    return recorded(answer, body, find_usage)


def _assembled(body: bytes, is_stream: bool, loads: Loads) -> Answer | str:
    if len(body) > 4 * LINE_LIMIT_BYTES:
        return "too_large"
    try:
        chunks = [loads(data) for data in EventDecoder().feed(body)] if is_stream else [loads(body)]
    except UpstreamError:
        return "too_large"
    except (ValueError, RecursionError):
        return "garbage"
    parts: list[dict[str, Any]] = []
    pieces: list[int] = []
    top: dict[str, Any] = {}
    candidate: dict[str, Any] = {}
    for chunk in chunks:
        if not isinstance(chunk, dict) or chunk.get("error") is not None:
            return "error_object" if isinstance(chunk, dict) else "garbage"
        if candidate.get("finishReason") and chunk.get("candidates"):
            return "data_after_done"
        top |= chunk
        found = chunk.get("candidates") or []
        if not isinstance(found, list) or len(found) > 1 or not all([isinstance(c, dict) for c in found]):
            return "choices"
        for one in found:
            candidate |= one
            content = one.get("content") or {}
            if not isinstance(content, dict) or not all([_take(p, parts, pieces) for p in content.get("parts") or ()]):
                return "unknown_delta"
    return _storable(top, candidate, parts, tuple(pieces) if is_stream else (), loads)


def _take(part: Any, parts: list[dict[str, Any]], pieces: list[int]) -> bool:
    """One more part; text goes on where the part before it was text of the same kind."""
    if not isinstance(part, dict) or not isinstance(part.get("text", ""), str):
        return False
    part = {name: value for name, value in part.items() if name in ("text", "functionCall") or not is_neutral(value)}
    if not part.keys() <= _PART_KINDS:
        return False
    if not part:
        return True
    if "text" in part and part.get("thought") is None and part["text"]:
        pieces.append(len(part["text"]))
    last = parts[-1] if parts else None
    if last is not None and "text" in part and "text" in last and last.get("thought") == part.get("thought"):
        last["text"] += part["text"]
        last |= {name: value for name, value in part.items() if name not in ("text", "thought")}
    else:
        parts.append(dict(part))
    return True


def _storable(
    top: Mapping[str, Any], candidate: Mapping[str, Any], parts: list[dict[str, Any]], pieces: tuple[int, ...],
    loads: Loads,
) -> Answer | str:  # fmt: skip
    finish, model, usage = candidate.get("finishReason"), top.get("modelVersion", ""), top.get("usageMetadata")
    if not finish:
        return "blocked" if top.get("promptFeedback") else "truncated"
    if not isinstance(finish, str) or not isinstance(model, str) or not isinstance(usage, dict | None):
        return "garbage"
    if finish not in FINISHES:
        return f"finish_{finish.lower()[:32]}"
    if finish == "MAX_TOKENS":
        return "finish_length"
    content = "".join(part["text"] for part in parts if "text" in part and not part.get("thought"))
    calls = [_call(i, part["functionCall"]) for i, part in enumerate(parts) if "functionCall" in part]
    message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
    if calls:
        message["tool_calls"] = calls
        if None in calls:
            return "garbage"
    elif not content.strip():
        return "empty"
    is_plain = len(parts) == 1 and parts[0].keys() == {"text"}
    rest = {name: value for name, value in candidate.items() if name not in _CANDIDATE_FIELDS}
    choice = rest if is_plain else {**rest, "parts": parts}
    extra = {name: value for name, value in top.items() if name not in _TOP_FIELDS}
    if not is_sayable(loads, message, model, usage, choice, extra):
        return "garbage"
    return Answer(
        message=message,
        finish_reason="tool_calls" if calls else "stop",
        model=model,
        usage=read_usage(usage),
        raw_usage=usage,
        extra=extra,
        pieces=pieces if is_plain else (),
        choice=choice,
        dialect="gemini",
        opaque=any(["thoughtSignature" in part for part in parts]),
    )


def _call(i: int, call: Any) -> dict[str, Any] | None:
    """A function call in OpenAI's words, with an id where Gemini gave none."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = json.dumps(call.get("args") or {}, ensure_ascii=False, separators=(",", ":"))
    found = call.get("id")
    function = {"name": call["name"], "arguments": arguments}
    return {"id": found if isinstance(found, str) else f"call_{i}", "type": "function", "function": function}


# -- what reaches the client ------------------------------------------------------------------------------------------


class CandidateFilter:
    """Every event passes as it came; the answer is whole once a candidate has its finish reason, or the prompt was
    refused."""

    number = -1
    __slots__ = ("_done", "_splitter", "failed")

    def __init__(self) -> None:
        self.failed = False
        self._splitter = EventSplitter()
        self._done = False

    @property
    def complete(self) -> bool:
        return self._done and not self._splitter.is_within

    @property
    def is_within(self) -> bool:
        return self._splitter.is_within

    def feed(self, chunk: bytes) -> bytes:
        events = self._splitter.feed(chunk)
        for event in events:
            self._see(event)
        return b"".join(events)

    def end(self) -> bytes:
        """A last event without its blank line may be half of one; when it is whole, its clients read it."""
        rest = self._splitter.end()
        if not is_cut(rest, json.loads):
            self._see(rest)
        return rest if self._done or self.failed else b""

    def _see(self, event: bytes) -> None:
        if _FINISHED.search(event) or b'"blockReason"' in event:
            self._done = True
        if event.startswith(b'data: {"error"'):
            self.failed = True


# -- replay -----------------------------------------------------------------------------------------------------------


def render(answer: Answer, *, stream: bool, usage_mode: UsageMode) -> Template:
    """The answer as events, or as one body. Raises ValueError for what JSON cannot say."""
    own = answer.dialect == "gemini"
    parts = (answer.choice.get("parts") if own else None) or list(_parts(answer.message))
    rest = {name: value for name, value in answer.choice.items() if name != "parts"} if own else {}
    ending = {"finishReason": "STOP", "index": 0, **rest}
    usage = _usage(answer, usage_mode)
    tail = {"modelVersion": answer.model, **(answer.extra if own else {})}
    if usage is not None:
        tail = {"usageMetadata": usage, **tail}
    if not stream:
        body = {"candidates": [{"content": {"parts": parts, "role": "model"}, **ending}], **tail}
        return Template((b"{", b"," + _json(body)[1:]), SEAM)
    said = [piece for part in parts for piece in _pieces(part, answer.pieces)]
    contents = [{"parts": [part], "role": "model"} for part in said]
    chunks: list[dict[str, Any]] = [
        {"candidates": [{"content": content, "index": 0}], "modelVersion": answer.model} for content in contents[:-1]
    ]
    chunks.append({"candidates": [{"content": contents[-1], **ending}], **tail})
    bodies = [b"," + _json(chunk)[1:] + b"\n\n" for chunk in chunks]
    return Template((b"data: {", *(body + b"data: {" for body in bodies[:-1]), bodies[-1]), SEAM)


def _json(value: Mapping[str, Any]) -> bytes:
    """Without the characters at which one of its clients' transports ends a line."""
    return escaped(to_json(value).decode()).encode()


def _parts(message: Mapping[str, Any]) -> Any:
    if message.get("content"):
        yield {"text": message["content"]}
    for call in message.get("tool_calls") or ():
        function = call["function"]
        yield {"functionCall": {"name": function["name"], "args": json.loads(function["arguments"] or "{}")}}


def _pieces(part: Mapping[str, Any], lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """A part as it is streamed: text by its pieces, the rest of it with the last."""
    if "text" not in part:
        return [dict(part)]
    texts = split(part["text"], lengths) or [""]
    marks = {"thought": part["thought"]} if "thought" in part else {}
    last = {name: value for name, value in part.items() if name not in ("text", "thought")}
    return [{"text": text, **marks, **(last if i == len(texts) - 1 else {})} for i, text in enumerate(texts)]


def _usage(answer: Answer, usage_mode: UsageMode) -> Mapping[str, Any] | None:
    if answer.dialect == "gemini":
        return None if answer.raw_usage is None else counted(answer.raw_usage, usage_mode)
    usage = answer.usage
    if usage is None:
        return None
    counts = {
        "promptTokenCount": usage.input_tokens,
        "candidatesTokenCount": usage.output_tokens,
        "totalTokenCount": usage.input_tokens + usage.output_tokens,
    }
    if usage.cache_read_tokens:
        counts["cachedContentTokenCount"] = usage.cache_read_tokens
    return counted(counts, usage_mode)
