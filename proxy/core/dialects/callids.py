"""Ids of tool calls say nothing but which result belongs to which call: what is asked is the same under any of them.
Neither does what an agent writes of one run around a result, see outputs.py.

A stored call is replayed with a new id each time, so the next turn of a loop comes with that one. Ids are therefore
told in the order in which they come up; a conversation in which they are used otherwise stays another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proxy.core.dialects.outputs import steady

Name = Callable[[Any], Any]

_IN_PARTS = ("functionCall", "functionResponse")


def named_in_order(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The messages, in the words of `Facts`, with the ids of calls replaced by their places."""
    names: dict[str, str] = {}

    def name(found: Any) -> Any:
        return names.setdefault(found, f"call {len(names)}") if isinstance(found, str) and found else found

    return tuple([_renamed(message, name) for message in messages])


def _renamed(message: Mapping[str, Any], name: Name) -> Mapping[str, Any]:
    told = dict(message)
    if isinstance(calls := told.get("tool_calls"), list):
        told["tool_calls"] = [_with(call, name, "id") for call in calls]
    if isinstance(parts := told.get("content"), list):
        told["content"] = [_part(part, name) for part in parts]
    if isinstance(item := told.get("item"), dict):  # of Responses
        told["item"] = _with(item, name, "call_id", "id")
        if "output" in item:
            told["item"]["output"] = steady(item["output"])
    if "tool_call_id" in told:
        told["tool_call_id"] = name(told["tool_call_id"])
    if told.get("role") == "tool":
        told["content"] = steady(told.get("content"))
    return told


def _part(part: Any, name: Name) -> Any:
    """A block of Anthropic's or a part of Gemini's."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if isinstance(kind, str) and kind.endswith("tool_use"):
        return _with(part, name, "id")
    if isinstance(kind, str) and kind.endswith("tool_result"):
        named = _with(part, name, "tool_use_id")
        return {**named, "content": steady(part["content"])} if "content" in part else named
    return {key: _result(_with(inner, name, "id")) if key in _IN_PARTS else inner for key, inner in part.items()}


def _result(said: Any) -> Any:
    """A result of Gemini's."""
    if not isinstance(said, dict) or "response" not in said:
        return said
    return {**said, "response": steady(said["response"])}


def _with(said: Any, name: Name, *keys: str) -> Any:
    if not isinstance(said, dict):
        return said
    return {**said, **{key: name(said[key]) for key in keys if key in said}}
