"""OpenAI Responses: what a request says, in the words of chat completions, so that one question is one in both.

Only what means the same in both is translated. What an absent `strict` means differs, so structured outputs and
functions are translated only where it is said; every other item, part, tool and setting keeps its form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from proxy.core import search
from proxy.core.dialects.openai_chat import invalid_type

STATE_ITEM = "item_reference"  # stands for an item that the upstream keeps
_SILENT_ITEMS = frozenset({"reasoning", "compaction"})  # of the conversation, opaque, no output of a tool
_TEXTS = frozenset({"input_text", "output_text"})
_PARTS = _TEXTS | {"input_image", "input_file", "input_audio", "refusal"}
_ROLES = frozenset({"system", "developer", "user", "assistant"})
_MESSAGE_FIELDS = frozenset({"type", "role", "content", "id", "status", "phase"})
_FILE_FIELDS = frozenset({"file_data", "file_id", "filename"})
_FORMAT_FIELDS = frozenset({"type", "name", "description", "schema", "strict"})
_FUNCTION_FIELDS = frozenset({"type", "name", "description", "parameters", "strict"})


def items_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The items of `input`; a text is a user's message. Empty where everything was said before. Raises BadRequest."""
    given = body.get("input")
    if given is None:
        return []
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise invalid_type("input", "string or array")
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            raise invalid_type(f"input[{i}]", "object")
        if not isinstance(item.get("type"), str | None):
            raise invalid_type(f"input[{i}].type", "string")
        if kind_of(item) == "message":
            _check_message(item, f"input[{i}]")
    return given


def kind_of(item: Mapping[str, Any]) -> str:
    """Its type, which a message and a reference to an item may leave out."""
    return item.get("type") or ("message" if "role" in item else STATE_ITEM)


def _check_message(item: Mapping[str, Any], path: str) -> None:
    if not isinstance(item.get("role"), str):
        raise invalid_type(f"{path}.role", "string")
    content = item.get("content")
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise invalid_type(f"{path}.content", "string or array")
    for j, part in enumerate(content):
        if not isinstance(part, dict):
            raise invalid_type(f"{path}.content[{j}]", "object")
        if not isinstance(part.get("type"), str):
            raise invalid_type(f"{path}.content[{j}].type", "string")
        if part["type"] in _TEXTS and not isinstance(part.get("text"), str):
            raise invalid_type(f"{path}.content[{j}].text", "string")


def parts_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content parts of all messages."""
    contents = [item["content"] for item in items if kind_of(item) == "message"]
    return [part for content in contents if isinstance(content, list) for part in content]


def outputs_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content parts that tools gave back."""
    outputs = [item.get("output") for item in items]
    return [
        part
        for output in outputs
        if isinstance(output, list)
        for part in output
        if isinstance(part, dict) and isinstance(part.get("type"), str)
    ]


def is_tool_item(item: Mapping[str, Any]) -> bool:
    """A call of a tool or what came of it: `function_call_output`, `web_search_call`, `mcp_approval_request`."""
    kind = kind_of(item)
    return "_call" in kind or kind.startswith("mcp_") or "tool_search" in kind


def unknown_items(items: list[dict[str, Any]]) -> Iterator[str]:
    for i, item in enumerate(items):
        kind = kind_of(item)
        if kind != "message":
            if kind not in _SILENT_ITEMS and kind != STATE_ITEM and not is_tool_item(item):
                yield f"input[{i}].type"
            continue
        if item["role"] not in _ROLES:
            yield f"input[{i}].role"
        yield from (f"input[{i}].{name}" for name in sorted(item.keys() - _MESSAGE_FIELDS))
        if isinstance(item["content"], list):
            yield from (f"input[{i}].content[{j}]" for j, p in enumerate(item["content"]) if p["type"] not in _PARTS)


def messages_of(body: Mapping[str, Any], items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Instructions and items as chat's messages; an item that is no message stays as it is, in one of no role."""
    instructions = body.get("instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    return [*system, *(_message(item) if kind_of(item) == "message" else {"role": "", "item": item} for item in items)]


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item's id names it and says nothing, and neither does it that it is complete."""
    rest = {name: value for name, value in item.items() if name not in ("type", "id", "status") and value is not None}
    if item.get("status") not in (None, "completed"):
        rest["status"] = item["status"]
    content = item["content"]
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        content = parts[0]["text"] if len(parts) == 1 and parts[0].keys() == {"type", "text"} else parts
    return {**rest, "content": content}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A content part in chat's form. A breakpoint of the prefix cache and empty lists say nothing."""
    rest = {name: value for name, value in part.items() if name not in ("type", "prompt_cache_breakpoint")}
    kind = part["type"]
    if kind in _TEXTS:
        return {"type": "text", **{name: value for name, value in rest.items() if value or name == "text"}}
    told = {name: value for name, value in rest.items() if value is not None}
    if kind == "input_image" and isinstance(told.get("image_url"), str) and told.keys() <= {"image_url", "detail"}:
        detail = {} if told.get("detail", "auto") == "auto" else {"detail": told["detail"]}
        return {"type": "image_url", "image_url": {"url": told["image_url"], **detail}}
    if kind == "input_file" and told.keys() <= _FILE_FIELDS:
        return {"type": "file", "file": told}
    return {"type": kind, **rest}


def is_remote(part: Mapping[str, Any]) -> bool:
    """Content behind an address."""
    url = part.get("image_url")
    is_named = isinstance(url, str) and not url[:5].lower() == "data:"
    return bool(part.get("file_url")) or is_named or (part["type"] not in _TEXTS and search.is_remote(part))


# -- settings ---------------------------------------------------------------------------------------------------------


def text_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """`text` as chat's `response_format` and `verbosity`; what is left of it under its own name."""
    said: dict[str, Any] = {}
    rest = dict(text)
    form = rest.get("format")
    if form == {"type": "text"} or form is None:
        rest.pop("format", None)
    elif form == {"type": "json_object"}:
        said["response_format"] = rest.pop("format")
    elif isinstance(form, dict) and form.get("type") == "json_schema" and type(form.get("strict")) is bool:
        if form.keys() <= _FORMAT_FIELDS:
            schema = {name: value for name, value in form.items() if name != "type"}
            said["response_format"] = {"type": "json_schema", "json_schema": schema}
            del rest["format"]
    if rest.get("verbosity") is not None:
        said["verbosity"] = rest.pop("verbosity")
    return {**said, "text": rest} if rest else said


def neutral_tool(tool: Any) -> Any:
    """A function as chat writes it: there an absent `strict` means false."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or type(tool.get("strict")) is not bool:
        return tool
    if not tool.keys() <= _FUNCTION_FIELDS:
        return tool
    dropped = ("type",) if tool["strict"] else ("type", "strict")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name not in dropped}}


def neutral_choice(choice: Any) -> Any:
    """`tool_choice` as chat writes it."""
    if isinstance(choice, dict) and choice.get("type") == "function" and choice.keys() == {"type", "name"}:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice
