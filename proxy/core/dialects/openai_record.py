"""OpenAI chat completions: record an upstream's answer.

A stream is storable only when its end was seen: open → the choice has its finish_reason → `[DONE]` → clean end of
the body. Truncation is invisible to the SDKs, so nothing less counts. Whatever is not fully understood is relayed
and not stored; the reason is one machine-readable word.

Most chunks of a stream differ in nothing but the text. Once a chunk was parsed, its bytes before and after the text
are remembered, and a chunk that starts and ends with them is read as its text alone: the rest says again what was
already taken in. Measured on a slow core: orjson 2.0 us a chunk of 230 bytes, the whole reading 6.5 us without this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from proxy.core.dialects.dialect import Loads, Recording
from proxy.core.dialects.recording import (
    cached_in,
    details_of,
    is_neutral,
    is_sayable,
    last_usage,
    read_object,
    recorded,
    usage_of,
)
from proxy.core.errors import UpstreamError
from proxy.core.eventstream import LINE_LIMIT_BYTES, EventDecoder, is_done
from proxy.core.model import Answer, Usage

_BATCH_BYTES = 64 * 1024  # raw bytes parsed at once: about 0.5 ms
_TOP_FIELDS = frozenset({"id", "object", "created", "model", "choices", "usage", "error", "obfuscation"})
_CHOICE_FIELDS = frozenset({"index", "delta", "message", "finish_reason"})
_TEXT_FIELDS = frozenset({"reasoning_content", "reasoning", "thinking"})  # streamed in parts to be joined
_DETAIL_TEXTS = frozenset({"text", "summary", "data"})  # joined within one entry of reasoning_details
_FINISHES = {"tool_calls": "tool_calls", "function_call": "tool_calls", "length": "finish_length"}
_CALL_FIELDS = frozenset({"index", "id", "type", "function"})
_OF_A_TOKEN = frozenset({"token", "token_id", "token_ids", "tokens", "logprob", "probability", "bytes"})
"""Members of a delta that describe its own tokens: another value in each, and none of the answer's."""

_CONTENT = re.compile(rb'"content"\s*:\s*"((?:[^"\\]|\\.)+)"')
_STRING = re.compile(rb'(?:[^"\\\x00-\x1f]|\\.)*')  # inside of a JSON string
_SPECIAL = re.compile(rb'["\\\x00-\x1f]')
_LESSONS = 16  # a stream whose chunks differ elsewhere too (obfuscation padding) is not studied for ever


def read_usage(raw: object) -> Usage | None:
    """Token counters of a `usage` object, or None when it does not hold whole numbers."""
    if not isinstance(raw, dict):
        return None
    details, written = details_of(raw, "prompt_tokens_details"), details_of(raw, "completion_tokens_details")
    read, made = cached_in(raw, details)
    asked = raw.get("prompt_tokens", raw.get("inputTokens"))
    if type(asked) is int and read + made > asked:  # told beside the total, as Anthropic does
        asked += read + made
    return usage_of(
        asked,
        raw.get("completion_tokens", raw.get("outputTokens")),
        read,
        made,
        written.get("accepted_prediction_tokens") or 0,
        written.get("rejected_prediction_tokens") or 0,
    )


def read_whole(raw: bytes, loads: Loads = json.loads, limit_bytes: int = LINE_LIMIT_BYTES) -> Answer | str:
    """The Answer of a JSON body, or the reason why it is not storable."""
    body = read_object(raw, loads, limit_bytes)
    if isinstance(body, str):
        return body
    if body.get("error") is not None:
        return "error_object"
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return "choices"
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict) or choice.get("index") not in (None, 0):
        return "garbage"
    return _storable(
        message=message,
        finish_reason=choice.get("finish_reason"),
        model=body.get("model"),
        raw_usage=body.get("usage"),
        choice={k: v for k, v in choice.items() if k not in _CHOICE_FIELDS},
        extra={k: v for k, v in body.items() if k not in _TOP_FIELDS},
        loads=loads,
    )


def _storable(
    *,
    message: Mapping[str, Any],
    finish_reason: object,
    model: object,
    raw_usage: object,
    choice: Mapping[str, Any],
    extra: Mapping[str, Any],
    loads: Loads,
    pieces: tuple[int, ...] = (),
) -> Answer | str:
    if message.get("refusal"):
        return "refusal"
    if not is_neutral(message.get("audio")):
        return "audio"
    if choice.get("logprobs"):
        return "logprobs"
    if finish_reason is None:
        return "truncated"
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    has_legacy = not is_neutral(legacy)
    if (calls and (has_legacy or not are_calls(calls))) or (has_legacy and not is_function(legacy)):
        return "tool_calls"
    called = "tool_calls" if calls else "function_call" if has_legacy else "stop"
    if not isinstance(finish_reason, str) or finish_reason not in ("stop", called):
        known = "finish_content_filter" if finish_reason == "content_filter" else "finish_other"
        return _FINISHES.get(finish_reason, known) if isinstance(finish_reason, str) else "garbage"
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        return "content_type"
    if called == "stop" and (content is None or not content.strip()):
        return "empty"
    if not isinstance(model, str) or not (raw_usage is None or isinstance(raw_usage, dict)):
        return "garbage"
    if not is_sayable(loads, message, model, raw_usage, choice, extra):
        return "garbage"
    return Answer(message, finish_reason, model, read_usage(raw_usage), raw_usage, extra, pieces, choice)


def are_calls(calls: object) -> bool:
    """Whether these are tool calls as a replay can write them: functions with a name, an id and arguments."""
    return isinstance(calls, list) and all(
        isinstance(call, dict)
        and call.get("type", "function") == "function"
        and isinstance(call.get("id"), str)
        and is_function(call.get("function"))
        for call in calls
    )


def is_function(function: object) -> bool:
    """Whether this is the call of a function by its name: of a tool call, or all of a `function_call`, as calls were
    written before there were tools."""
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str)
    )


class Recorder:
    """Assembles one streamed answer. `feed` is an append; parsing happens by the batch and in `finish`.

    `limit_bytes` bounds the assembled texts; raw bytes wait at most one batch. After a refusal nothing is kept.
    """

    __slots__ = (
        "_calls",
        "_choice",
        "_chunks",
        "_contents",
        "_decoder",
        "_done",
        "_extra",
        "_fields",
        "_finish",
        "_function",
        "_length",
        "_lessons",
        "_limit",
        "_loads",
        "_model",
        "_pieces",
        "_prefix",
        "_size",
        "_suffix",
        "_texts",
        "_usage",
        "refusal_reason",
    )

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES, n: int = 1, loads: Loads = json.loads) -> None:
        self.refusal_reason: str | None = "choices" if n != 1 else None
        self._loads = loads
        self._limit = limit_bytes
        self._decoder = EventDecoder()
        self._chunks: list[bytes] = []
        self._size = 0
        self._length = 0
        self._model: object = None
        self._contents: list[str] = []
        self._pieces: list[int] = []  # lengths
        self._texts: dict[str, list[str]] = {}
        self._fields: dict[str, Any] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._function: dict[str, Any] = {}  # called without a tool
        self._choice: dict[str, Any] = {}
        self._extra: dict[str, Any] = {}
        self._usage: object = None
        self._finish: object = None
        self._done = False
        self._prefix = self._suffix = b""
        self._lessons = _LESSONS

    def feed(self, chunk: bytes) -> None:
        """The next bytes as the upstream sent them, before any filter."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size >= _BATCH_BYTES:
            self._parse()

    def feed_whole(self, body: bytes) -> None:
        """As `feed`, when all of the body is there: a run of chunks that differ in their text only is split at what
        they share, instead of being looked at one by one."""
        if b"\r" in body or not body.startswith(b"data"):
            self.feed(body)
            return
        at = 0
        while at < len(body) and self.refusal_reason is None:
            if self._prefix and (after := self._read_run(body, at)) > at:
                at = after
                continue
            end = body.find(b"\n\n", at)
            if 0 <= end <= at + LINE_LIMIT_BYTES and body.startswith(b"data: ", at) and body.find(b"\n", at, end) < 0:
                self._read(body[at + 6 : end])  # one line of data, as nearly always
                at = end + 2
                continue
            end = len(body) if end < 0 else end + 2
            self.feed(body[at:end])
            self._parse()
            at = end
        if self._length > self._limit:
            self._refuse("too_large")

    def _read_run(self, body: bytes, at: int) -> int:
        """Take in the run of events from `at` that say the same as the last one but for their text; where it ends."""
        lead, tail = b"data: " + self._prefix, self._suffix + b"\n\n"
        if not body.startswith(lead, at):
            return at
        start = len(lead)
        blocks = body[at:].split(tail)[:-1]
        texts = [block[start:] for block in blocks]
        if not body.startswith((tail + lead).join(texts), at + start):  # one of them begins otherwise
            texts = [block[start:] for block in takewhile(lambda block: block.startswith(lead), blocks)]
        around = start + len(tail)
        try:
            joined = b"".join(texts)
            if _SPECIAL.search(joined) is None:
                at += len(joined) + around * len(texts)
                if joined.isascii():  # as many characters as bytes
                    self._take(joined.decode(), [len(text) for text in texts if text])
                    return at
                parts = [text.decode() for text in texts]
            else:
                parts = []
                for text in texts:
                    if _STRING.fullmatch(text) is None:  # another kind of event stands in between
                        break
                    parts.append(self._loads(b'"%b"' % text) if b"\\" in text else text.decode())
                    at += len(text) + around
        except ValueError:
            self._refuse("garbage")
            return at
        self._take("".join(parts), [len(part) for part in parts if part])
        return at

    def _take(self, text: str, lengths: list[int]) -> None:
        """More text, and the lengths of the pieces it came in."""
        self._contents.append(text)
        self._pieces += lengths
        self._length += len(text)

    def finish(self) -> Answer | str:
        """The Answer, or the reason why it is not storable. Call once, and only when the body ended cleanly."""
        self._parse()
        for data in self._decoder.end():
            self._read(data)
        if self._decoder.names - {b"message"}:
            self._refuse("unknown_event")
        if self.refusal_reason is None and not self._done:
            self._refuse("truncated")
        if self.refusal_reason is not None:
            return self.refusal_reason
        texts: dict[str, Any] = {name: "".join(parts) for name, parts in self._texts.items()}
        content: dict[str, Any] = {"content": "".join(self._contents)}
        if self._calls:
            content["content"] = content["content"] or None
            texts["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        if self._function:
            content["content"] = content["content"] or None
            texts["function_call"] = self._function
        answer = _storable(
            message={"role": "assistant", **self._fields, **content, **texts},
            finish_reason=self._finish,
            model=self._model,
            raw_usage=self._usage,
            choice=self._choice,
            extra=self._extra,
            loads=self._loads,
            pieces=tuple(self._pieces),
        )
        if isinstance(answer, str):
            self._refuse(answer)
        return answer

    def _refuse(self, reason: str) -> None:
        if self.refusal_reason is None:
            self.refusal_reason = reason
        for kept in (
            self._contents, self._pieces, self._texts, self._fields, self._calls, self._function, self._choice,
            self._extra,
        ):  # fmt: skip
            kept.clear()

    def _parse(self) -> None:
        raw = b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        if self.refusal_reason is not None:
            return
        try:
            self._read_all(self._decoder.feed(raw))
        except UpstreamError:
            self._refuse("too_large")
        except ValueError:
            self._refuse("garbage")
        if self._length > self._limit:
            self._refuse("too_large")

    def _read_all(self, datas: list[bytes]) -> None:
        prefix, suffix = self._prefix, self._suffix
        start, end = len(prefix), len(suffix)
        fullmatch = _STRING.fullmatch
        for data in datas:
            if prefix and data.startswith(prefix) and data.endswith(suffix) and len(data) > start + end:
                raw = data[start:-end]
                if fullmatch(raw):
                    text = self._loads(b'"%b"' % raw) if b"\\" in raw else raw.decode()
                    self._take(text, [len(text)] if text else [])
                    continue
            self._read(data)
            if self.refusal_reason is not None:
                return
            prefix, suffix = self._prefix, self._suffix
            start, end = len(prefix), len(suffix)

    def _read(self, data: bytes) -> None:
        self._prefix = b""
        if self._done:
            return self._refuse("data_after_done")
        if is_done(data):
            self._done = True
            return None
        try:
            chunk = self._loads(data)
        except (ValueError, RecursionError):
            return self._refuse("garbage")
        if type(chunk) is not dict:
            return self._refuse("garbage")
        if chunk.get("error") is not None:
            return self._refuse("error_event")
        choices = chunk.get("choices")
        if choices is None and isinstance(chunk.get("usage"), dict):
            choices = []
        if type(choices) is not list:
            return self._refuse("unknown_event")
        for name, value in chunk.items():
            if name not in _TOP_FIELDS and (value is not None or name not in self._extra):
                self._extra[name] = value
        if self._model is None:
            self._model = chunk.get("model") or None
        if (usage := chunk.get("usage")) is not None:
            self._usage = usage
        if choices:
            self._read_choice(choices, len(data))
        if choices and usage is None and self._finish is None and self.refusal_reason is None:
            delta = choices[0].get("delta")
            if isinstance(delta, dict) and delta.keys() == {"content"} and delta["content"]:
                self._learn(data)
        return None

    def _read_choice(self, choices: list[Any], size: int) -> None:
        choice = choices[0]
        if len(choices) != 1 or type(choice) is not dict or choice.get("index") not in (None, 0):
            return self._refuse("choices")
        delta = choice.get("delta")
        if type(delta) is dict:
            for name, value in delta.items():
                if name == "content" and type(value) is str:
                    if value and self._finish is not None:
                        return self._refuse("garbage")
                    if value:
                        self._take(value, [len(value)])
                elif name != "content" or value is not None:
                    self._merge(name, value, size)
        elif not is_neutral(delta):
            return self._refuse("garbage")
        for name, value in choice.items():
            if name not in _CHOICE_FIELDS and (value is not None or name not in self._choice):
                self._choice[name] = value
        if (usage := self._choice.pop("usage", None)) is not None and self._usage is None:
            self._usage = usage  # some say there what it took, and nowhere else
        if reason := choice.get("finish_reason"):
            self._finish = reason
        return None

    def _learn(self, data: bytes) -> None:
        """Remember what stands around the text of a chunk that holds nothing else new."""
        found = _CONTENT.search(data)
        if found is None or self._lessons == 0:
            return
        self._lessons -= 1
        prefix, suffix = data[: found.start(1)], data[found.end(1) :]
        try:
            probe = self._loads(prefix + b"probe" + suffix)
            if probe["choices"][0]["delta"]["content"] == "probe":
                self._prefix, self._suffix = prefix, suffix
        except (ValueError, LookupError, TypeError):
            return

    def _merge(self, name: str, value: Any, size: int) -> None:
        """A field of a delta other than text content. What cannot be joined with certainty is refused."""
        known = self._fields.get(name)
        if name == "role":
            self._fields[name] = value or known
        elif name in _OF_A_TOKEN:
            return
        elif is_neutral(value):
            if name not in self._texts and name != "content":
                self._fields.setdefault(name, value)
        elif name == "tool_calls":
            self._length += size
            if not isinstance(value, list) or not all(self._join_call(call) for call in value):
                self._refuse("tool_calls")
        elif name == "function_call":
            self._length += size
            if not _join_function(self._function, value):
                self._refuse("tool_calls")
        elif name == "refusal":
            self._refuse("refusal")
        elif name == "content":
            self._refuse("content_type")
        elif name in _TEXT_FIELDS and isinstance(value, str) and is_neutral(known):
            self._fields.pop(name, None)
            self._texts.setdefault(name, []).append(value)
            self._length += len(value)
        elif known == value:
            return
        elif is_neutral(known):
            self._fields[name] = value
            self._length += size
        elif name == "annotations" and isinstance(known, list) and isinstance(value, list):
            self._fields[name] = known + value
            self._length += size
        elif name == "reasoning_details" and isinstance(known, list) and isinstance(value, list):
            self._length += size
            if not all(_join_detail(known, detail) for detail in value):
                self._refuse("unknown_delta")
        else:
            self._refuse("unknown_delta")

    def _join_call(self, part: Any) -> bool:
        """Add one streamed part of a tool call: the first brings id and name, those after it more of its arguments."""
        if not isinstance(part, dict) or not part.keys() <= _CALL_FIELDS:
            return False
        index, function = part.get("index", 0), part.get("function")
        if type(index) is not int or not isinstance(function, dict | None):
            return False
        function = function or {}
        call = self._calls.get(index)
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):
            return False
        if call is None:
            self._calls[index] = {
                "id": part.get("id"),
                "type": part.get("type") or "function",
                "function": {**function, "arguments": arguments},
            }
            return True
        if part.get("id") not in (None, "", call["id"]):
            return False
        return _join_function(call["function"], function)


def _join_function(known: dict[str, Any], part: Any) -> bool:
    """Add a streamed part of a function's call: its name, said once or again, and more of its arguments."""
    if not isinstance(part, dict):
        return False
    name, arguments = part.get("name"), part.get("arguments") or ""
    if not isinstance(arguments, str) or (name and known.get("name") not in (None, "", name)):
        return False
    news = {member: value for member, value in part.items() if not known.get(member)}
    known.update({**news, "arguments": known.get("arguments", "") + arguments})
    return True


def _join_detail(known: list[Any], detail: Any) -> bool:
    """Add one streamed entry of reasoning_details, joined by index and type; False when that is not possible."""
    if not isinstance(detail, dict):
        return False
    last = known[-1] if known else None
    same = isinstance(last, dict) and (last.get("index"), last.get("type")) == (detail.get("index"), detail.get("type"))
    if not same:
        known.append(detail)
        return True
    assert isinstance(last, dict)
    for name, value in detail.items():
        if name in _DETAIL_TEXTS and isinstance(last.get(name), str) and isinstance(value, str):
            last[name] += value
        elif last.get(name) is None:
            last[name] = value
        elif value is not None and last[name] != value:
            return False
    return True


def record(body: bytes, *, is_stream: bool, n: int = 1, loads: Loads = json.loads) -> Recording:
    """Read a body that ended cleanly, streamed or whole."""
    if is_stream:
        recorder = Recorder(n=n, loads=loads)
        recorder.feed_whole(body)
        answer = recorder.finish()
    else:
        answer = read_whole(body, loads)
    return recorded(answer, body, find_usage)


def find_usage(body: bytes) -> Usage | None:
    """The last usage object in a body, streamed or whole, complete or cut; None when there is none."""
    return last_usage(body, b'"usage"', read_usage)
