"""Anthropic messages: write a stored answer, whole or as a stream.

Events in the order the SDKs' accumulators demand: `message_start`, each block's start, deltas and stop, `message_delta`
with the stop reason and the final counters, `message_stop`. Every event has its name: without one the SDKs drop it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from proxy.core.answer import to_json
from proxy.core.dialects.anthropic_record import COUNTED_LAST
from proxy.core.dialects.dialect import Template, UsageMode, call_mark, templated
from proxy.core.dialects.openai_replay import counted, split
from proxy.core.model import Answer

SEAM = '"id":"msg_{id}"'
CALL_PREFIX = "toolu_"
_REASONS = {"stop": "end_turn", "stop_sequence": "stop_sequence", "tool_calls": "tool_use", "length": "max_tokens"}
_HEAD = {"type": "message", "role": "assistant"}


def render_whole(answer: Answer, usage_mode: UsageMode = "original") -> Template:
    """The answer as one JSON body. Raises ValueError for what JSON cannot say."""
    body = {**_HEAD, "model": answer.model, "content": _blocks(answer), **_ending(answer)}
    body |= {"usage": counted(_usage(answer), usage_mode), **_extra(answer)}
    return templated((b"{", b"," + to_json(body)[1:]), SEAM, CALL_PREFIX)


def render_stream(answer: Answer, usage_mode: UsageMode = "original") -> Template:
    """The answer as an event stream. Raises ValueError for what JSON cannot say."""
    usage = counted(_usage(answer), usage_mode)
    started = {**usage, "output_tokens": min(1, usage.get("output_tokens") or 0)}
    start: dict[str, Any] = {**_HEAD, "model": answer.model, "content": [], "stop_reason": None, "stop_sequence": None}
    events = [_event("content_block_" + kind, rest) for kind, rest in _block_events(answer)]
    counted_last = answer.extra.get(COUNTED_LAST, usage)
    told = {name: usage[name] for name in counted_last if name in usage}
    delta = {"delta": _ending(answer), "usage": told, **_extra(answer)}
    events += [_event("message_delta", delta), _event("message_stop", {})]
    head = b'event: message_start\ndata: {"type":"message_start","message":{'
    rest = b"," + to_json({**start, "usage": started})[1:] + b"}\n\n"
    return templated((head, rest + b"".join(events)), SEAM, CALL_PREFIX)


def _event(name: str, rest: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json({"type": name, **rest}))


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    """The blocks as they were recorded, or those that another dialect's message stands for."""
    calls = 0
    blocks = []
    for block in answer.choice.get("content") or _made(answer.message):
        if block["type"] == "tool_use":
            block = {**block, "id": call_mark(calls)}
            calls += 1
        blocks.append(block)
    return blocks


def _made(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if message.get("content"):
        yield {"type": "text", "text": message["content"]}
    for call in message.get("tool_calls") or ():
        function = call["function"]
        asked = json.loads(function["arguments"] or "{}")
        yield {
            "type": "tool_use",
            "id": "",
            "name": function["name"],
            "input": asked,
        }


def _ending(answer: Answer) -> dict[str, Any]:
    return {
        "stop_reason": _REASONS.get(answer.finish_reason, answer.finish_reason),
        "stop_sequence": answer.extra.get("stop_sequence") if answer.dialect == "anthropic" else None,
    }


def _extra(answer: Answer) -> dict[str, Any]:
    if answer.dialect != "anthropic":
        return {}
    return {name: value for name, value in answer.extra.items() if name not in ("stop_sequence", COUNTED_LAST)}


def _usage(answer: Answer) -> Mapping[str, Any]:
    usage = answer.usage
    if answer.dialect == "anthropic" and answer.raw_usage is not None:
        return answer.raw_usage
    assert usage is not None  # else `expresses` said no
    return {
        "input_tokens": usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cache_read_tokens,
        "output_tokens": usage.output_tokens,
    }


def _block_events(answer: Answer) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, block in enumerate(_blocks(answer)):
        match block["type"]:
            case "text":
                yield "start", {"index": index, "content_block": {**block, "text": "", **_uncited(block)}}
                for piece in split(block["text"], answer.pieces):
                    yield "delta", _delta(index, "text_delta", text=piece)
                for citation in block.get("citations") or ():
                    yield "delta", _delta(index, "citations_delta", citation=citation)
            case "tool_use":
                yield "start", {"index": index, "content_block": {**block, "input": {}}}
                yield "delta", _delta(index, "input_json_delta", partial_json=to_json(block["input"]).decode())
            case "thinking":
                yield "start", {"index": index, "content_block": {**block, "thinking": "", "signature": ""}}
                for piece in split(block.get("thinking", ""), ()):
                    yield "delta", _delta(index, "thinking_delta", thinking=piece)
                yield "delta", _delta(index, "signature_delta", signature=block.get("signature", ""))
            case _:  # comes whole
                yield "start", {"index": index, "content_block": block}
        yield "stop", {"index": index}


def _delta(index: int, kind: str, **rest: Any) -> dict[str, Any]:
    return {"index": index, "delta": {"type": kind, **rest}}


def _uncited(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"citations": []} if block.get("citations") else {}
