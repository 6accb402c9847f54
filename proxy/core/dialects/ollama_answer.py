"""Ollama chat and generate: record an upstream's answer, relay its lines, write a stored answer.

Both operations speak newline-delimited JSON and end with a line that says `"done":true`; they differ in where the text
stands (`message.content` or `response`). Nothing less than that line makes an answer storable. What is written is
ASCII: the Python client splits its lines where Unicode has line ends too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from proxy.core.dialects.dialect import Loads, Recording, Template, UsageMode
from proxy.core.dialects.lines import LINE_LIMIT_BYTES, LineSplitter
from proxy.core.dialects.openai_replay import split
from proxy.core.dialects.recording import is_neutral, is_sayable, recorded, usage_of
from proxy.core.eventstream import Fragment
from proxy.core.model import Answer, Usage

SEAM = '"created_at":"{date}"'
_TOP_FIELDS = frozenset({"model", "created_at", "message", "response", "thinking", "tool_calls", "done", "done_reason"})
_COUNTERS = frozenset(
    {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
     "prompt_eval_cached_count"}
)  # fmt: skip
_MESSAGE_FIELDS = frozenset({"role", "content", "thinking", "tool_calls", "images"})
_REASONING = ("reasoning", "reasoning_content", "thinking")
_DONE = re.compile(rb'"done"\s*:\s*true')


def read_usage(line: Mapping[str, Any]) -> Usage | None:
    """Token counters of a last line; a prompt that was cached whole is told as no count at all."""
    asked, cached = line.get("prompt_eval_count", 0), line.get("prompt_eval_cached_count") or 0
    return usage_of(asked, line.get("eval_count"), min(cached, asked) if type(asked) is type(cached) is int else 0)


def find_usage(body: bytes) -> Usage | None:
    """What the last line of a body says it used; None when there is none."""
    for line in reversed(body.splitlines()):
        if b'"eval_count"' in line:
            try:
                return read_usage(json.loads(line))
            except (ValueError, RecursionError, AttributeError):
                return None
    return None


def record(body: bytes, loads: Loads = json.loads) -> Recording:
    """Read a body that ended cleanly: one line is an answer in one piece."""
    answer = _assembled(body, loads)
    return recorded(answer, body, find_usage)


def _assembled(body: bytes, loads: Loads) -> Answer | str:
    if len(body) > 4 * LINE_LIMIT_BYTES:
        return "too_large"
    splitter = LineSplitter()
    pieces: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    last: dict[str, Any] | None = None
    try:
        for raw in [*splitter.feed(body), splitter.end()]:
            if isinstance(raw, Fragment):
                return "too_large"
            if not raw.strip():
                continue
            line = loads(raw)
            if last is not None:
                return "data_after_done"
            if not isinstance(line, dict) or line.get("error") is not None:
                return "error_object" if isinstance(line, dict) else "garbage"
            message = line.get("message", line)
            if not isinstance(message, dict):
                return "unknown_delta"
            said = {name for name, value in message.items() if not is_neutral(value)}
            if "message" in line and not said <= _MESSAGE_FIELDS:
                return "unknown_delta"
            if message.get("images"):
                return "image_output"
            pieces.append(message.get("content" if "message" in line else "response") or "")
            thoughts.append(message.get("thinking") or "")
            calls += message.get("tool_calls") or []
            if line.get("done") is True:
                last = line
        content, thought = "".join(pieces), "".join(thoughts)
    except (ValueError, RecursionError, TypeError):
        return "garbage"
    return "truncated" if last is None else _storable(last, content, thought, calls, pieces, loads)


def _storable(
    last: Mapping[str, Any], content: str, thought: str, calls: list[Any], pieces: Iterable[str], loads: Loads
) -> Answer | str:
    reason, model = last.get("done_reason") or "stop", last.get("model")
    if reason == "length":
        return "finish_length"
    if reason != "stop" or not isinstance(model, str):
        return "finish_other"
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thought:
        message["reasoning"] = thought
    if calls:
        message["tool_calls"] = made = [_call(i, call) for i, call in enumerate(calls)]
        message["content"] = content or None
        if None in made:
            return "garbage"
    elif not content.strip():
        return "empty"
    counters = {name: value for name, value in last.items() if name in _COUNTERS}
    extra = {name: value for name, value in last.items() if name not in _TOP_FIELDS | _COUNTERS}
    if not is_sayable(loads, message, model, counters, extra):
        return "garbage"
    lengths = tuple(len(piece) for piece in pieces if piece)
    return Answer(
        message=message,
        finish_reason="tool_calls" if calls else "stop",
        model=model,
        usage=read_usage(last),
        raw_usage=counters,
        extra=extra,
        pieces=lengths if len(lengths) > 1 else (),
        dialect="ollama",
    )


def _call(i: int, call: Any) -> dict[str, Any] | None:
    """A tool call in OpenAI's words: arguments as text, and an id where Ollama gave none."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False, separators=(",", ":"))
    found = call.get("id")
    name = {"name": function["name"], "arguments": arguments}
    return {"id": found if isinstance(found, str) else f"call_{i}", "type": "function", "function": name}


# -- what reaches the client ------------------------------------------------------------------------------------------


class LineFilter:
    """Every line passes as it came; the answer is whole once one said `"done":true`."""

    number = -1
    __slots__ = ("_done", "_splitter", "failed")

    def __init__(self) -> None:
        self.failed = False
        self._splitter = LineSplitter()
        self._done = False

    @property
    def complete(self) -> bool:
        return self._done and not self._splitter.is_within

    @property
    def is_within(self) -> bool:
        return self._splitter.is_within

    def feed(self, chunk: bytes) -> bytes:
        lines = self._splitter.feed(chunk)
        for line in lines:
            self._see(line)
        return b"".join(lines)

    def end(self) -> bytes:
        rest = self._splitter.end()
        self._see(rest)
        return rest

    def _see(self, line: bytes) -> None:
        if not (_DONE.search(line) or b'"error"' in line):
            return
        if isinstance(line, Fragment):
            self._done = self._done or _DONE.search(line) is not None
            return
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(said, dict):
            self._done = self._done or said.get("done") is True
            self.failed = self.failed or said.get("error") is not None


# -- replay -----------------------------------------------------------------------------------------------------------


def render(answer: Answer, *, is_chat: bool, stream: bool, usage_mode: UsageMode) -> Template:
    """The answer as lines, or as one. Raises ValueError for what JSON cannot say."""
    message = answer.message
    thought = next((message[name] for name in _REASONING if message.get(name)), "")
    calls = [
        {"function": {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"] or "{}")}}
        for call in message.get("tool_calls") or ()
    ]
    content = message.get("content") or ""
    ending = {"done": True, "done_reason": "stop", **_counters(answer, usage_mode)}
    if answer.dialect == "ollama":
        ending |= answer.extra
    if stream:
        said: list[dict[str, Any]] = [{"thinking": piece} for piece in split(thought, ())]
        said += [{"content": piece} for piece in split(content, answer.pieces)]
        said += [{"tool_calls": calls}] if calls else []
        lines = [{**_placed(part, is_chat), "done": False} for part in said]
        lines.append({**_placed({}, is_chat), **ending})
    else:
        part = {"content": content, **({"thinking": thought} if thought else {})}
        lines = [{**_placed({**part, **({"tool_calls": calls} if calls else {})}, is_chat), **ending}]
    head = f'{{"model":{json.dumps(answer.model)},'.encode()
    tails = [b"," + _ascii(line)[1:] + (b"\n" if stream else b"") for line in lines]
    return Template((head, *(tail + head for tail in tails[:-1]), tails[-1]), SEAM)


def _placed(part: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    if is_chat:
        return {"message": {"role": "assistant", "content": "", **part}}
    return {"response": part.get("content", ""), **{k: v for k, v in part.items() if k != "content"}}


def _counters(answer: Answer, usage_mode: UsageMode) -> dict[str, Any]:
    usage = answer.usage
    if answer.dialect == "ollama" and answer.raw_usage is not None:
        counters = dict(answer.raw_usage)
    elif usage is not None:
        counters = {"prompt_eval_count": usage.input_tokens, "eval_count": usage.output_tokens}
    else:
        counters = {}
    return counters if usage_mode == "original" else dict.fromkeys(counters, 0)


def _ascii(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
