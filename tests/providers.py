"""Providers in their own words, for `ScriptedUpstream(default=provider)`: whichever path is asked answers natively.

The text is the same for the same question every time, so that an answer through ibid can be compared with one had
directly; `pieces` of it are streamed. How a question begins says what comes of it: "call" a tool call, "think" a signed
thought where the provider has those, "json" an object, "long" 3,000 words, "fail" a 429, "break" a stream without its
second half, or half a body where nothing is streamed. After "json" the rest says what is in the object, or what becomes
of it: "json long", "json fail". Inputs that are to be embedded are answered with `Vectors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.upstream import EMBEDDING_PATHS, Body, Chat, Json, Raw, Reply, Seen, Stream, Vectors, chat_chunks

PIECES = 4
MODEL = "m-1"
ARGUMENTS = {"city": "Paris"}


class Call(NamedTuple):
    """What a model says when it wants a tool to be run."""

    name: str
    arguments: Mapping[str, Any]


WEATHER = Call("weather", ARGUMENTS)


def provider(seen: Seen) -> Reply:
    """The answer of the provider whose path this is."""
    path = seen.path.partition("?")[0]
    wish = wish_of(seen.json)
    if wish.startswith("fail"):
        return Json(429, _slow_down(path), headers={"Retry-After": "1"})
    reply = _native(seen, path)
    if wish.startswith("break") and isinstance(reply, Stream):
        return Stream(reply.chunks[: len(reply.chunks) // 2], content_type=reply.content_type)
    if wish.startswith("break") and isinstance(reply, Vectors):
        return Raw(
            b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"object": "list", '
        )
    return reply


def _native(seen: Seen, path: str) -> Reply:
    if path.endswith(EMBEDDING_PATHS):
        return Vectors()
    if "enerateContent" in path:
        return _gemini(seen.json, path)
    if path in ("/api/chat", "/api/generate"):
        return _ollama(seen.json, is_chat=path == "/api/chat")
    if "messages" not in seen.json and not path.endswith("/responses"):
        return _completion(seen.json)
    prompt = prompt_of(seen.json)
    begins = prompt if path.endswith("/messages") else wish_of(seen.json)
    return say(path, seen.json, WEATHER if begins.startswith("call") else text_for(prompt), prompt)


def say(path: str, body: Mapping[str, Any], said: str | Call, prompt: str = "") -> Reply:
    """A text or a call as an answer of the chat API at this path."""
    if path.endswith("/messages"):
        return _anthropic(body, said, prompt)
    return _responses(body, said) if path.endswith("/responses") else _openai(body, said)


def prompt_of(body: Mapping[str, Any]) -> str:
    """The last thing said in a body of any dialect."""
    if "requests" in body or "content" in body:
        content = body.get("requests", [body])[-1]["content"]["parts"]
    elif "contents" in body:
        content = body["contents"][-1]["parts"]
    elif "input" in body:
        last = body["input"] if isinstance(body["input"], str) else body["input"][-1]
        content = last["content"] if isinstance(last, Mapping) else last
    else:
        content = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def wish_of(body: Mapping[str, Any]) -> str:
    """The last thing said, without that it is to be said as JSON."""
    return prompt_of(body).removeprefix("json ")


def _slow_down(path: str) -> dict[str, Any]:
    if path.endswith("/messages"):
        return {"type": "error", "error": {"type": "rate_limit_error", "message": "Slow down."}}
    if "Content" in path:
        return {"error": {"code": 429, "message": "Slow down.", "status": "RESOURCE_EXHAUSTED"}}
    if path.startswith("/api/"):
        return {"error": "Slow down."}
    return {"error": {"message": "Slow down.", "type": "rate_limit", "param": None, "code": "rate_limit"}}


def text_for(prompt: str) -> str:
    if prompt.startswith("json"):
        return json.dumps({"city": text_for(prompt.removeprefix("json").lstrip()), "days": 3})
    if prompt.startswith("long"):
        return "".join(f"word {i} of a long answer. " for i in range(600))
    return f"This is what is known about it: {prompt} And that is all there is to say, \u00e9t\u00e9 \U0001f5fc."


def pieces_of(text: str) -> list[str]:
    width = -(-len(text) // PIECES)
    return [text[start : start + width] for start in range(0, len(text), width)]


def _event(data: Mapping[str, Any], *, name: bool = False) -> bytes:
    head = f"event: {data['type']}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _json(body: Mapping[str, Any]) -> Body:
    return Body(body=json.dumps(body).encode(), headers={"request-id": "req_upstream", "x-request-id": "req_upstream"})


# -- OpenAI -----------------------------------------------------------------------------------------------------------


def _openai(body: Mapping[str, Any], said: str | Call) -> Reply:
    if isinstance(said, str):
        return _openai_text(body, said)
    function = {"name": said.name, "arguments": json.dumps(said.arguments)}
    call = {"id": "call_abc", "type": "function", "function": function}
    head = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": body["model"]}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    if not body.get("stream"):
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        return _json({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    first = {"index": 0, **call, "function": {**function, "arguments": ""}}
    more = {"index": 0, "function": {"arguments": function["arguments"]}}

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    last = _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    calls = [chunk({"role": "assistant", "content": None, "tool_calls": [first]}), chunk({"tool_calls": [more]})]
    counted = [last] if (body.get("stream_options") or {}).get("include_usage") else []
    return Stream([*calls, chunk({}, "tool_calls"), *counted, b"data: [DONE]\n\n"])


def _openai_text(body: Mapping[str, Any], text: str) -> Reply:
    head = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": body["model"]}
    usage = {"prompt_tokens": 10, "completion_tokens": 25, "total_tokens": 35}
    if not body.get("stream"):
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return _json({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    wanted = (body.get("stream_options") or {}).get("include_usage")
    return Stream(chat_chunks(head, text, Chat(pieces=PIECES), usage if wanted else None))


def _completion(body: Mapping[str, Any]) -> Reply:
    text = text_for(prompt_of(body))
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1_700_000_000, "model": body["model"]}
    usage = {"prompt_tokens": 10, "completion_tokens": 25, "total_tokens": 35}

    def choice(text: str, finish: str | None = None) -> list[dict[str, Any]]:
        return [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish}]

    if not body.get("stream"):
        return _json({**head, "choices": choice(text, "stop"), "usage": usage})
    chunks = [_event({**head, "choices": choice(piece)}) for piece in pieces_of(text)]
    chunks.append(_event({**head, "choices": choice("", "stop")}))
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(_event({**head, "choices": [], "usage": usage}))
    return Stream([*chunks, b"data: [DONE]\n\n"])


# -- OpenAI Responses -------------------------------------------------------------------------------------------------


def _responses(body: Mapping[str, Any], said: str | Call) -> Reply:
    if isinstance(said, Call):
        item = {"id": "fc_1", "type": "function_call", "status": "completed", "name": said.name, "call_id": "call_abc",
                "arguments": json.dumps(said.arguments)}  # fmt: skip
    else:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": said}
        item = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
    usage = {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
             "output_tokens": 25, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 35}  # fmt: skip
    whole = {
        "id": "resp_1", "object": "response", "created_at": 1_700_000_000, "status": "completed", "error": None,
        "incomplete_details": None, "instructions": body.get("instructions"), "model": body["model"], "output": [item],
        "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto", "tools": body.get("tools", []),
        "top_p": 1.0, "store": body.get("store", True), "metadata": {}, "previous_response_id": None, "usage": usage,
        "text": body.get("text", {"format": {"type": "text"}}),
    }  # fmt: skip
    if not body.get("stream"):
        return _json(whole)
    begun = {"response": {**whole, "status": "in_progress", "output": [], "usage": None}}
    told = [("created", begun), ("in_progress", begun), *_item_events(item), ("completed", {"response": whole})]
    numbered = [{"type": f"response.{kind}", **rest, "sequence_number": n} for n, (kind, rest) in enumerate(told)]
    return Stream([_event(event, name=True) for event in numbered])


def _item_events(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    at: dict[str, Any] = {"item_id": item["id"], "output_index": 0}
    empty = {"content": []} if item["type"] == "message" else {"arguments": ""}
    yield "output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress", **empty}}
    if item["type"] == "message":
        (part,) = item["content"]
        at["content_index"] = 0
        yield "content_part.added", {**at, "part": {**part, "text": ""}}
        for piece in pieces_of(part["text"]):
            yield "output_text.delta", {**at, "delta": piece, "logprobs": []}
        yield "output_text.done", {**at, "text": part["text"], "logprobs": []}
        yield "content_part.done", {**at, "part": part}
    else:
        yield "function_call_arguments.delta", {**at, "delta": item["arguments"]}
        yield "function_call_arguments.done", {**at, "name": item["name"], "arguments": item["arguments"]}
    yield "output_item.done", {"output_index": 0, "item": item}


# -- Anthropic --------------------------------------------------------------------------------------------------------


def _anthropic(body: Mapping[str, Any], said: str | Call, prompt: str) -> Reply:
    text = said if isinstance(said, str) else text_for(prompt)
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if prompt.startswith("think"):
        blocks.insert(0, {"type": "thinking", "thinking": "Let me see what that is.", "signature": "c2lnbmVk"})
    if isinstance(said, Call):
        blocks.append({"type": "tool_use", "id": "toolu_abc", "name": said.name, "input": dict(said.arguments)})
    reason = "tool_use" if isinstance(said, Call) else "end_turn"
    usage = {"input_tokens": 10, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 25}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"]}
    end = {"stop_reason": reason, "stop_sequence": None}
    if not body.get("stream"):
        return _json({**head, "content": blocks, **end, "usage": usage})
    started = {
        **head,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**usage, "output_tokens": 1},
    }
    events = [{"type": "message_start", "message": started}, {"type": "ping"}]
    for index, block in enumerate(blocks):
        events += _block_events(index, block)
    events += [{"type": "message_delta", "delta": end, "usage": usage}, {"type": "message_stop"}]
    return Stream([_event(event, name=True) for event in events], headers={"request-id": "req_upstream"})


def _block_events(index: int, block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
    yield {"type": "content_block_start", "index": index, "content_block": {**block, **empty[block["type"]]}}
    if block["type"] == "text":
        deltas = [{"type": "text_delta", "text": piece} for piece in pieces_of(block["text"])]
    elif block["type"] == "thinking":
        deltas = [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    else:
        deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
    yield from ({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas)
    yield {"type": "content_block_stop", "index": index}


# -- Gemini -----------------------------------------------------------------------------------------------------------


def _gemini(body: Mapping[str, Any], path: str) -> Reply:
    prompt = prompt_of(body)
    model = path.partition("/models/")[2].partition(":")[0]
    said: list[dict[str, Any]] = [{"text": piece} for piece in pieces_of(text_for(prompt))]
    whole: list[dict[str, Any]] = [{"text": text_for(prompt)}]
    if prompt.startswith("think"):
        said[-1]["thoughtSignature"] = whole[-1]["thoughtSignature"] = "c2lnbmVk"
    if prompt.startswith("call"):
        said = whole = [{"functionCall": {"name": "weather", "args": ARGUMENTS}}]
    usage = {"promptTokenCount": 10, "candidatesTokenCount": 25, "totalTokenCount": 35}
    tail = {"usageMetadata": usage, "modelVersion": model, "responseId": "r1"}

    def candidate(parts: list[dict[str, Any]], **end: Any) -> dict[str, Any]:
        return {"candidates": [{"content": {"parts": parts, "role": "model"}, "index": 0, **end}], **tail}

    if "streamGenerateContent" not in path:
        return _json(candidate(whole, finishReason="STOP"))
    chunks = [candidate([part]) for part in said[:-1]] + [candidate([said[-1]], finishReason="STOP")]
    return Stream([_event(chunk) for chunk in chunks])


# -- Ollama -----------------------------------------------------------------------------------------------------------


def _ollama(body: Mapping[str, Any], *, is_chat: bool) -> Reply:
    prompt = prompt_of(body)
    head = {"model": body["model"], "created_at": "2026-11-20T19:22:45.499127Z"}
    end = {
        "done": True, "done_reason": "stop", "total_duration": 5_000_000, "load_duration": 1_000_000,
        "prompt_eval_count": 10, "prompt_eval_duration": 1_000_000, "eval_count": 25, "eval_duration": 3_000_000,
    }  # fmt: skip

    def said(text: str, **more: Any) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, **more}} if is_chat else {"response": text, **more}

    call = {"tool_calls": [{"function": {"name": "weather", "arguments": ARGUMENTS}}]}
    parts = [said("", **call)] if prompt.startswith("call") else [said(piece) for piece in pieces_of(text_for(prompt))]
    if body.get("stream") is False:
        whole = said("", **call) if prompt.startswith("call") else said(text_for(prompt))
        return _json({**head, **whole, **end})
    lines = [{**head, **part, "done": False} for part in parts] + [{**head, **said(""), **end}]
    return Stream([json.dumps(line).encode() + b"\n" for line in lines], content_type="application/x-ndjson")
