"""OpenAI Responses: record an upstream's answer.

The last event of a stream repeats the whole response, so that is what is read, streamed or not; the text deltas only
say where the text was cut. A stream is storable only when that event is `response.completed` and nothing comes after
it. Whatever is not fully understood is relayed and not stored; the reason is one machine-readable word.

Text and function calls go into the message. Output items that say more than that (annotations, a summary of what was
thought, encrypted thought) are kept in `choice["output"]`, which other dialects cannot say; items that merely look
otherwise (an empty reasoning item, a phase) in `extra["output"]`. Ids of items are dropped, unless the upstream keeps
the response under its id: then `extra` holds that id and its times, and `extra["output"]` or `choice["output"]` the
items with theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proxy.core.dialects.dialect import Loads, Recording
from proxy.core.dialects.openai_record import are_calls
from proxy.core.dialects.recording import cached_in, details_of, is_sayable, last_usage, read_object, recorded, usage_of
from proxy.core.errors import UpstreamError
from proxy.core.eventstream import LINE_LIMIT_BYTES, EventDecoder, is_done
from proxy.core.model import Answer, Usage

NULL_FIELDS = ("error", "incomplete_details")  # of a complete response
_TOP_FIELDS = frozenset(
    {"id", "object", "created_at", "completed_at", "model", "status", "output", "usage", "error", "incomplete_details",
     "output_text"}
)  # fmt: skip
_OF_ONE_REQUEST: Mapping[str, Any] = {  # echoes of what is not part of the question → what is said instead
    "metadata": {}, "max_output_tokens": None, "prompt_cache_key": None, "prompt_cache_options": None,
    "prompt_cache_retention": None, "prompt_cache_diagnostics": None,
}  # fmt: skip
_KEPT_FIELDS = ("id", "created_at", "completed_at")
_ITEMS = frozenset({"message", "reasoning", "function_call"})
_MESSAGE_FIELDS = frozenset({"type", "id", "role", "status", "content", "phase"})
_PARTS = ("content", "summary")
_TEXT_FIELDS = frozenset({"type", "text"})
_CALL_FIELDS = frozenset({"type", "id", "call_id", "name", "arguments", "status"})
_REASONING_FIELDS = frozenset({"type", "id", "status"})
_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})
_EVENTS = _ENDS | {
    "response.created",
    "response.queued",
    "response.in_progress",
    "response.output_item.added",
    "response.output_item.done",
    "response.content_part.added",
    "response.content_part.done",
    "response.output_text.delta",
    "response.output_text.done",
    "response.output_text.annotation.added",
    "response.refusal.delta",
    "response.refusal.done",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.reasoning_summary_part.added",
    "response.reasoning_summary_part.done",
    "response.reasoning_summary_text.delta",
    "response.reasoning_summary_text.done",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
}
_KEEPALIVE = "keepalive"
_INCOMPLETE = {"max_output_tokens": "finish_length", "content_filter": "finish_content_filter"}


def read_usage(raw: object) -> Usage | None:
    """Token counters of a `usage` object, or None when it does not hold whole numbers."""
    if not isinstance(raw, dict):
        return None
    cached = cached_in(raw, details_of(raw, "input_tokens_details"))
    return usage_of(raw.get("input_tokens"), raw.get("output_tokens"), *cached)


def find_usage(body: bytes) -> Usage | None:
    """The last usage in a body, streamed or whole, complete or cut; None when there is none."""
    return last_usage(body, b'"usage"', read_usage)


def record(body: bytes, *, is_stream: bool, keeps_id: bool = False, loads: Loads = json.loads) -> Recording:
    """Read a body that ended cleanly, streamed or whole. `keeps_id`: the request left it to the upstream to keep the
    response, which it then does unless it says otherwise."""
    answer = (_read_stream if is_stream else _read_whole)(body, keeps_id, loads)
    return recorded(answer, body, find_usage)


def _read_whole(body: bytes, keeps_id: bool, loads: Loads) -> Answer | str:
    response = read_object(body, loads)
    return response if isinstance(response, str) else _storable(response, (), keeps_id, loads)


def _read_stream(body: bytes, keeps_id: bool, loads: Loads) -> Answer | str:
    if len(body) > 8 * LINE_LIMIT_BYTES:
        return "too_large"
    decoder = EventDecoder()
    response: Any = None
    items: dict[Any, Any] = {}
    pieces: list[int] = []
    try:
        for data in [*decoder.feed(body), *decoder.end()]:
            if is_done(data):  # not of this API, but some servers end every stream with it
                continue
            event = loads(data)
            kind = event.get("type") if isinstance(event, dict) else None
            if kind == _KEEPALIVE:
                continue
            if response is not None:
                return "data_after_done"
            if (reason := _against(event, kind)) is not None:
                return reason
            if kind == "response.output_text.delta":
                pieces.append(len(event["delta"]))
            elif kind == "response.output_item.done":
                items[event.get("output_index", len(items))] = event["item"]
            elif kind in _ENDS:
                response = event["response"]
        if response is None:
            return "truncated"
        if not response.get("output"):
            response = {**response, "output": [items[index] for index in sorted(items)]}
    except UpstreamError:
        return "too_large"
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return "garbage"
    return _storable(response, tuple(pieces), keeps_id, loads)


def _against(event: Any, kind: object) -> str | None:
    if not isinstance(event, dict):
        return "garbage"
    if kind == "error" or event.get("error") is not None:
        return "error_event"
    if kind in _EVENTS:
        return None
    return "provider_tools" if isinstance(kind, str) and kind.startswith("response.") else "unknown_event"


def _storable(response: Mapping[str, Any], pieces: tuple[int, ...], keeps_id: bool, loads: Loads) -> Answer | str:
    if response.get("error") is not None:
        return "error_object"
    if response.get("status") != "completed":
        return _unfinished(response)
    output, model, usage = response.get("output"), response.get("model"), response.get("usage")
    if not isinstance(output, list) or not isinstance(model, str) or not isinstance(usage, dict | None):
        return "garbage"
    message = _message(output)
    if isinstance(message, str):
        return message
    is_kept = keeps_id and response.get("store") is not False and isinstance(response.get("id"), str)
    extra = {name: _OF_ONE_REQUEST.get(name, value) for name, value in response.items() if name not in _TOP_FIELDS}
    extra |= {name: None for name in NULL_FIELDS if name in response}  # some servers leave them out
    if is_kept:
        extra |= {name: response[name] for name in _KEPT_FIELDS if name in response}
    items = output if is_kept else [_nameless(item) for item in output]
    says_more = any([_says_more(item) for item in output]) or len(_texts(output)) > 1
    is_plain = not is_kept and not says_more and [_told(item) for item in items] == [_told(i) for i in made(message)]
    if not says_more and not is_plain:
        extra["output"] = items
    if not is_sayable(loads, output, model, usage, extra):
        return "garbage"
    return Answer(
        message=message,
        finish_reason="tool_calls" if "tool_calls" in message else "stop",
        model=model,
        usage=read_usage(usage),
        raw_usage=usage,
        extra=extra,
        pieces=pieces if len(_texts(output)) == 1 and sum(pieces) == len(message["content"]) else (),
        choice={"output": items} if says_more else {},
        dialect="responses",
        opaque=any([item.get("encrypted_content") for item in output]),
    )


def _unfinished(response: Mapping[str, Any]) -> str:
    status, details = response.get("status"), response.get("incomplete_details")
    if status == "incomplete":
        reason = details.get("reason") if isinstance(details, dict) else None
        return _INCOMPLETE.get(reason, "finish_other") if isinstance(reason, str) else "finish_other"
    if status in ("failed", "cancelled"):
        return "error_object"
    return "truncated" if status in ("in_progress", "queued") else "garbage"


def _message(output: list[Any]) -> dict[str, Any] | str:
    """The output in chat's words, or the reason why it is not storable."""
    if not all([isinstance(item, dict) and isinstance(item.get("type"), str) for item in output]):
        return "garbage"
    if not _ITEMS.issuperset([item["type"] for item in output]):
        return "provider_tools"
    if any([item.get("status") not in (None, "completed") for item in output]):
        return "truncated"
    for item in output:
        for name in _PARTS:
            parts = item.get(name)
            if not isinstance(parts, list | None) or not all([isinstance(part, dict) for part in parts or ()]):
                return "garbage"
    parts = [part for item in output if item["type"] == "message" for part in item.get("content") or ()]
    if any([part.get("type") == "refusal" for part in parts]):
        return "refusal"
    if any([part.get("type") != "output_text" for part in parts]):
        return "provider_tools"
    thoughts = [p for item in output if item["type"] == "reasoning" for n in _PARTS for p in item.get(n) or ()]
    if not all([isinstance(part.get("text"), str) for part in (*parts, *thoughts)]):
        return "garbage"
    if any([part.get("logprobs") for part in parts]):
        return "logprobs"
    calls = [
        {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        for item in output
        if item["type"] == "function_call"
    ]
    if not are_calls(calls):
        return "tool_calls"
    texts = _texts(output)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts else None}
    if calls:
        message["tool_calls"] = calls
    elif not (message["content"] or "").strip():
        return "empty"
    return message


def _texts(output: Sequence[Mapping[str, Any]]) -> list[str]:
    return [part["text"] for item in output if item["type"] == "message" for part in item.get("content") or ()]


def _says_more(item: Mapping[str, Any]) -> bool:
    """Whether an item says what a message of text and calls cannot."""
    if item["type"] == "message":
        known, inner = _MESSAGE_FIELDS, item.get("content") or ()
        if any([part[name] for part in inner for name in part.keys() - _TEXT_FIELDS]):
            return True
    else:
        known = _CALL_FIELDS if item["type"] == "function_call" else _REASONING_FIELDS
    return any([item[name] for name in item.keys() - known])


def _nameless(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def _told(value: Any) -> Any:
    """Without what is empty, and in no order."""
    if isinstance(value, Mapping):
        return {name: _told(inner) for name, inner in value.items() if inner not in (None, [], "") and name != "status"}
    return [_told(inner) for inner in value] if isinstance(value, list) else value


def made(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The items that a message of text and calls stands for, without their ids."""
    if message.get("content"):
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": message["content"]}
        yield {"type": "message", "status": "completed", "content": [part], "role": "assistant"}
    for call in message.get("tool_calls") or ():
        function = call["function"]
        yield {
            "type": "function_call",
            "status": "completed",
            "arguments": function["arguments"],
            "name": function["name"],
        }
