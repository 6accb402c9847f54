"""OpenAI Responses: write a stored answer, whole or as a stream.

Events in the order the SDK's accumulator demands: `response.created`, each item added, filled and done,
`response.completed` with all of it again; every event numbered from 0. Ids are new, the same wherever an item is named
within one replay, unless the upstream keeps the answer under the ids it came with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from proxy.core.dialects.dialect import Template, UsageMode, call_mark, templated
from proxy.core.dialects.openai_replay import counted, split, to_text
from proxy.core.dialects.responses_record import NULL_FIELDS, made
from proxy.core.model import Answer

SEAM = '"id":"resp_{id}","created_at":{created}'
_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_UNTOLD: Mapping[str, Any] = {
    "instructions": None, "metadata": {}, "parallel_tool_calls": True, "previous_response_id": None, "store": False,
    "temperature": None, "tool_choice": "auto", "tools": [], "top_p": None,
}  # fmt: skip
"""What a response repeats of its request and another dialect's answer does not say."""


def render_whole(answer: Answer, usage_mode: UsageMode = "original") -> Template:
    """The answer as one JSON body. Raises ValueError for what JSON cannot say."""
    return _template(answer, [b"", _response(answer, usage_mode)])


def render_stream(answer: Answer, usage_mode: UsageMode = "original") -> Template:
    """The answer as an event stream. Raises ValueError for what JSON cannot say."""
    whole = _response(answer, usage_mode)
    begun = _response(answer, usage_mode, begun=True)
    middle = [_event(name, rest, number) for number, (name, rest) in enumerate(_item_events(answer), 2)]
    ends = [b',"sequence_number":%d}\n\n' % number for number in (0, 1, 2 + len(middle))]
    heads = [_head(f"response.{kind}") for kind in ("created", "in_progress", "completed")]
    between = [begun + ends[0] + heads[1], begun + ends[1] + b"".join(middle) + heads[2]]
    return _template(answer, [heads[0], *between, whole + ends[2]])


def _template(answer: Answer, parts: list[bytes]) -> Template:
    """Parts joined where a response object begins."""
    if _is_kept(answer):
        kept = to_text({name: answer.extra[name] for name in ("id", "created_at") if name in answer.extra})
        return Template((f"{{{kept[1:-1]}".encode().join(parts),), "")
    opened = [part + b"{" for part in parts[:-1]]
    return templated([*opened, parts[-1]], SEAM, "")


def _is_kept(answer: Answer) -> bool:
    """Whether the upstream keeps it under the ids it came with."""
    return answer.dialect == "responses" and "id" in answer.extra


def _head(name: str) -> bytes:
    return f'event: {name}\ndata: {{"type":"{name}","response":'.encode()


def _event(name: str, rest: Mapping[str, Any], number: int) -> bytes:
    said = to_text({"type": name, **rest, "sequence_number": number})
    return f"event: {name}\ndata: {said}\n\n".encode()


def _response(answer: Answer, usage_mode: UsageMode, *, begun: bool = False) -> bytes:
    """The response object behind its id and time; `begun`: as it is told before there is any output."""
    native = answer.dialect == "responses"
    echoed = {n: v for n, v in answer.extra.items() if n not in ("id", "created_at", "output")} if native else _UNTOLD
    usage = _usage(answer)
    body: dict[str, Any] = {
        "object": "response",
        "status": "in_progress" if begun else "completed",
        "error": None,
        "incomplete_details": None,
        "model": answer.model,
        "output": [] if begun else _items(answer),
        **echoed,
        "usage": None if begun or usage is None else counted(usage, usage_mode),
    }
    if native:
        body = {name: value for name, value in body.items() if name not in NULL_FIELDS or name in echoed}
    if begun and "completed_at" in body:
        body["completed_at"] = None
    return b"," + to_text(body)[1:].encode()


def _usage(answer: Answer) -> Mapping[str, Any] | None:
    usage = answer.usage
    if answer.dialect == "responses" or usage is None:
        return answer.raw_usage if answer.dialect == "responses" else None
    read = {"cached_tokens": usage.cache_read_tokens, "cache_write_tokens": usage.cache_write_tokens}
    details = (answer.raw_usage or {}).get("completion_tokens_details")
    thought = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": read,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": thought or 0},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def _items(answer: Answer) -> list[dict[str, Any]]:
    """The output items as they were recorded, or those that another dialect's message stands for; with ids."""
    own = answer.choice.get("output") or answer.extra.get("output") if answer.dialect == "responses" else None
    if own and _is_kept(answer):
        return list(own)
    items = []
    for i, item in enumerate(own or made(answer.message)):
        named = {"id": call_mark(i, _PREFIXES[item["type"]]), **item}
        if item["type"] == "function_call":
            named["call_id"] = call_mark(i, "call_")
        items.append(named)
    return items


def _item_events(answer: Answer) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, item in enumerate(_items(answer)):
        place = {"output_index": index, "item_id": item.get("id") or ""}
        yield "response.output_item.added", {"output_index": index, "item": _begun(item)}
        match item["type"]:
            case "message":
                for i, part in enumerate(item.get("content") or ()):
                    yield from _text_events(part, {**place, "content_index": i}, answer.pieces)
            case "function_call":
                name, told = "response.function_call_arguments.", item["arguments"]
                yield name + "delta", {**place, "delta": told}
                yield name + "done", {**place, "name": item["name"], "arguments": told}
            case _:
                yield from _thought_events(item, place)
        yield "response.output_item.done", {"output_index": index, "item": item}


def _begun(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item as it is told before it is filled."""
    empty = {"content": [], "summary": [], "arguments": ""}
    begun = {name: empty[name] if name in empty and value else value for name, value in item.items()}
    return {**begun, "status": "in_progress"} if item.get("status") else begun


def _text_events(
    part: Mapping[str, Any], place: Mapping[str, Any], pieces: tuple[int, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    empty = {**part, "text": "", **({"annotations": []} if "annotations" in part else {})}
    yield "response.content_part.added", {**place, "part": empty}
    for piece in split(part["text"], pieces):
        yield "response.output_text.delta", {**place, "delta": piece, "logprobs": []}
    for i, annotation in enumerate(part.get("annotations") or ()):
        yield "response.output_text.annotation.added", {**place, "annotation_index": i, "annotation": annotation}
    yield "response.output_text.done", {**place, "text": part["text"], "logprobs": []}
    yield "response.content_part.done", {**place, "part": part}


def _thought_events(item: Mapping[str, Any], place: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, part in enumerate(item.get("summary") or ()):
        at = {**place, "summary_index": i}
        yield "response.reasoning_summary_part.added", {**at, "part": {**part, "text": ""}}
        for piece in split(part["text"], ()):
            yield "response.reasoning_summary_text.delta", {**at, "delta": piece}
        yield "response.reasoning_summary_text.done", {**at, "text": part["text"]}
        yield "response.reasoning_summary_part.done", {**at, "part": part}
    for i, part in enumerate(item.get("content") or ()):
        at = {**place, "content_index": i}
        yield "response.content_part.added", {**at, "part": {**part, "text": ""}}
        for piece in split(part["text"], ()):
            yield "response.reasoning_text.delta", {**at, "delta": piece}
        yield "response.reasoning_text.done", {**at, "text": part["text"]}
        yield "response.content_part.done", {**at, "part": part}
