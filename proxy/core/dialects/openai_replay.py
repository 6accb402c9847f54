"""OpenAI chat completions: write a stored answer, whole or as a stream.

Everything but `id` and `created` is rendered once into a Template; a hit joins its parts around the two. Streams
follow the emission rules the SDKs agree on: LF, `data: ` with a space, role delta first, usage chunk only when asked
for, `[DONE]` last. One stored answer serves both forms, and a Recorder that reads the replay gets the answer back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from json.encoder import encode_basestring
from typing import Any

from proxy.core.answer import to_json
from proxy.core.dialects.dialect import Template, UsageMode, call_mark, templated
from proxy.core.model import Answer

_WORDS = re.compile(r"\s*\S+|\s+\Z")
_AFTER_CONTENT = frozenset({"annotations"})
_SEPARATORS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))  # some clients split lines at these


SEAM = '"id":"chatcmpl-{id}","created":{created}'
CALL_PREFIX = "call_"


def render_whole(answer: Answer, usage_mode: UsageMode = "original") -> Template:
    """The answer as one JSON body. Raises ValueError for what JSON cannot say."""
    message = _with_call_marks(answer.message)
    choice = {"index": 0, "message": message, **answer.choice, "finish_reason": answer.finish_reason}
    body: dict[str, Any] = {"object": "chat.completion", "model": answer.model, "choices": [choice]}
    if answer.raw_usage is not None:
        body["usage"] = counted(answer.raw_usage, usage_mode)
    return templated([b"{", b"," + to_json({**body, **answer.extra})[1:]], SEAM, CALL_PREFIX)


def render_stream(answer: Answer, include_usage: bool, usage_mode: UsageMode = "original") -> Template:
    """The answer as an event stream, `[DONE]` included. Raises ValueError for what JSON cannot say."""
    small = {name: value for name, value in answer.extra.items() if not isinstance(value, dict | list)}
    large = {name: value for name, value in answer.extra.items() if isinstance(value, dict | list)}
    nulls = {name: value for name, value in answer.choice.items() if value is None}
    head = to_text({"object": "chat.completion.chunk", "model": answer.model, **small})[1:-1]
    rest = to_text({**nulls, "finish_reason": None})[1:]
    usage = ',"usage":null' if include_usage else ""
    before, after = f',{head},"choices":[{{"index":0,"delta":', f",{rest}]{usage}}}"
    events = [f"{before}{delta}{after}" for delta in _deltas(answer)]
    finish = to_text({"index": 0, "delta": {}, **answer.choice, "finish_reason": answer.finish_reason})
    events.append(f',{head},"choices":[{finish}]{usage}{_more(large)}}}')
    if include_usage and answer.raw_usage is not None:
        events.append(f',{head},"choices":[],"usage":{to_text(counted(answer.raw_usage, usage_mode))}}}')
    parts = [event.encode() + b"\n\ndata: {" for event in events[:-1]]
    parts = [b"data: {", *parts, events[-1].encode() + b"\n\ndata: [DONE]\n\n"]
    return templated(parts, SEAM, CALL_PREFIX)


def _with_call_marks(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [{**call, "id": call_mark(i)} for i, call in enumerate(calls)]}


def _deltas(answer: Answer) -> Iterator[str]:
    """Deltas in JSON: role, what was thought, the text in its pieces, what came after it."""
    message = answer.message
    calls, function = message.get("tool_calls") or (), message.get("function_call") or {}
    said = {"role", "content", *(["tool_calls"] if calls else []), *(["function_call"] if function else [])}
    others = {name: value for name, value in message.items() if name not in said}
    nulls = {name: None for name, value in others.items() if value is None}
    yield to_text({"role": message.get("role", "assistant"), "content": "", **nulls})
    late = {name: value for name, value in others.items() if name in _AFTER_CONTENT and value is not None}
    early = {name: value for name, value in others.items() if name not in late and value is not None}
    if early:
        yield to_text(early)
    for piece in split(message["content"] or "", answer.pieces):
        yield f'{{"content":{escaped(encode_basestring(piece))}}}'
    for i, call in enumerate(calls):
        called = call["function"]
        first = {"index": i, "id": call_mark(i), "type": "function", "function": {**called, "arguments": ""}}
        yield to_text({"tool_calls": [first]})
        yield to_text({"tool_calls": [{"index": i, "function": {"arguments": called["arguments"]}}]})
    if function:
        yield to_text({"function_call": {**function, "arguments": ""}})
        yield to_text({"function_call": {"arguments": function["arguments"]}})
    if late:
        yield to_text(late)


def split(content: str, pieces: tuple[int, ...]) -> list[str]:
    """The text cut where it was streamed, or, when that is not known, before each word."""
    if not pieces or sum(pieces) != len(content):
        return _WORDS.findall(content)
    found, start = [], 0
    for length in pieces:
        if length:
            found.append(content[start : start + length])
        start += length
    return found


def to_text(value: Mapping[str, Any]) -> str:
    """Compact JSON for an event stream. Raises ValueError for what JSON cannot say."""
    return escaped(to_json(value).decode())


def _more(members: Mapping[str, Any]) -> str:
    return "," + to_text(members)[1:-1] if members else ""


def escaped(text: str) -> str:
    """JSON without the characters at which some clients split lines."""
    for raw, escape in _SEPARATORS:
        if raw in text:
            text = text.replace(raw, escape)
    return text


def counted(usage: Mapping[str, Any], mode: UsageMode) -> Mapping[str, Any]:
    """A usage object as it is told on a hit."""
    return usage if mode == "original" else {name: _zeroed(value) for name, value in usage.items()}


def _zeroed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _zeroed(inner) for name, inner in value.items()}
    return 0 if isinstance(value, int | float) and not isinstance(value, bool) else value
