"""Anthropic messages: read a request, say errors, and what joins the parts of the dialect.

Fields as of the API of 2026-10-21 and the SDK 2.12. What can be said in OpenAI's words is read into them, so that the
same question asked in either dialect is one; the rest keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from proxy.core.answer import to_json
from proxy.core.dialects.anthropic_filter import MessageFilter
from proxy.core.dialects.anthropic_record import find_usage, record
from proxy.core.dialects.anthropic_replay import render_stream, render_whole
from proxy.core.dialects.callids import named_in_order
from proxy.core.dialects.dialect import Recording, Spoken, StreamFilter, Template, UsageMode, is_plain
from proxy.core.dialects.fields import (
    ARRAY,
    BOOLEAN,
    CACHE_TWIN,
    INTEGER,
    NUMBER,
    OBJECT,
    STRING,
    Types,
    limit_of,
    mistyped,
    model_in,
    person_in,
)
from proxy.core.errors import BadRequest, IbidError
from proxy.core.facts import Facts
from proxy.core.model import Answer, Usage
from proxy.core.search import is_offered

MESSAGE_LIMIT = 100_000  # the provider's own

DELIVERY_FIELDS = frozenset(
    {
        "stream",  # how the answer travels
        "metadata",  # the end user is in `end_user`; the rest is for the upstream's log
        "cache_control",  # the provider's prefix cache: cost and time only
        CACHE_TWIN,
    }
)
_TYPES: Types = {
    "cache_control": OBJECT,
    "container": (str, dict),
    "context_management": OBJECT,
    "diagnostics": OBJECT,
    "inference_geo": STRING,
    "max_tokens": INTEGER,
    "mcp_servers": ARRAY,
    "metadata": OBJECT,
    "output_config": OBJECT,
    "service_tier": STRING,
    "speed": STRING,
    "stop_sequences": ARRAY,
    "stream": BOOLEAN,
    "system": (str, list),
    "temperature": NUMBER,
    "thinking": OBJECT,
    "tool_choice": OBJECT,
    "tools": ARRAY,
    "top_k": INTEGER,
    "top_p": NUMBER,
}
KNOWN_FIELDS = frozenset(_TYPES) | {"messages", "model", CACHE_TWIN}
_ELSEWHERE = DELIVERY_FIELDS | {"messages", "model", "system", "max_tokens", "stop_sequences", "tools", "tool_choice"}
_KINDS = frozenset(
    {"text", "image", "document", "tool_use", "tool_result", "thinking", "redacted_thinking", "search_result"}
)
_ROLES = frozenset({"user", "assistant", "system"})
_MESSAGE_FIELDS = frozenset({"role", "content"})
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read(body: Mapping[str, Any]) -> Facts:
    """What the request says. Raises BadRequest (invalid_type) naming the parameter."""
    model = model_in(body)
    if model is None:
        raise _invalid_type("model", "a string")
    if (wrong := mistyped(body, _TYPES)) is not None:
        raise _invalid_type(*wrong)
    messages = _messages(body.get("messages"))
    kinds = {block["type"] for message in messages for block in _blocks(message)}
    system = _system(body.get("system"))
    has_calls = any([kind.endswith(("tool_use", "tool_result")) for kind in kinds])
    neutral = [*system, *(_neutral(message) for message in messages)]
    if has_calls:
        neutral = [dict(message) for message in named_in_order(neutral)]
    *earlier, last = neutral
    content = last["content"]
    asks = last["role"] == "user" and isinstance(content, str)
    roles = [message["role"] for message in messages]
    tools = body.get("tools") or ()
    thinking = body.get("thinking")
    return Facts(
        model=model,
        prompt=content if asks else None,
        context=tuple(earlier if asks else neutral),
        settings=_settings(body),
        unknown=tuple(_unknown(body, messages)),
        stream=body.get("stream") is True,
        wants_usage=True,  # its streams always tell
        temperature=body.get("temperature"),
        has_tools=bool(tools),
        tool_results=has_calls,
        web_search=is_offered(tools, choice=body.get("tool_choice"), shows_use=True),
        has_images="image" in kinds,
        has_files="document" in kinds or body.get("container") is not None,
        remote_urls=any([_is_remote(block) for message in messages for block in _blocks(message)]),
        output_limit=limit_of(body.get("max_tokens")),
        has_stops=bool(body.get("stop_sequences")),
        opaque=isinstance(thinking, dict) and thinking.get("type") != "disabled",
        response_format="json_schema" if _wants_json(body.get("output_config")) else None,
        end_user=_end_user(body),
        first_turn=roles == ["user"],
        user_turns=roles.count("user"),
    )


def _invalid_type(param: str, wanted: str) -> BadRequest:
    return BadRequest(f"{param}: Input should be {wanted}.", code="invalid_type", param=param)


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MESSAGE_LIMIT:
        raise _invalid_type("messages", f"an array of 1 to {MESSAGE_LIMIT} messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _invalid_type(f"messages.{i}", "an object")
        if not isinstance(message.get("role"), str):
            raise _invalid_type(f"messages.{i}.role", "a string")
        _check_content(message.get("content"), f"messages.{i}.content")
    return messages


def _check_content(content: object, path: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise _invalid_type(path, "a string or an array of blocks")
    for i, block in enumerate(content):
        if not isinstance(block, dict):
            raise _invalid_type(f"{path}.{i}", "an object")
        if not isinstance(block.get("type"), str):
            raise _invalid_type(f"{path}.{i}.type", "a string")
        if block["type"] == "text" and not isinstance(block.get("text"), str):
            raise _invalid_type(f"{path}.{i}.text", "a string")


def _blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []


# -- the same in OpenAI's words ---------------------------------------------------------------------------------------


_BILLING = "x-anthropic-billing-header:"
"""What Claude Code writes into its first system block: its version, and a checksum that is another in every request."""


def _system(system: object) -> list[dict[str, Any]]:
    if not system:
        return []
    _check_content(system, "system")
    if isinstance(system, list):
        system = [block for block in system if not str(block.get("text", "")).startswith(_BILLING)]
    return [{"role": "system", "content": _content(system)}]


def _neutral(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": _content(message["content"])}


def _content(content: Any) -> Any:
    """A string, or parts; one plain text block is a string. `cache_control` marks a prefix, it says nothing."""
    if isinstance(content, str):
        return content
    parts = [_part(block) for block in content]
    return parts[0]["text"] if len(parts) == 1 and parts[0].keys() == {"type", "text"} else parts


def _part(block: Mapping[str, Any]) -> dict[str, Any]:
    part = {name: value for name, value in block.items() if name != "cache_control"}
    source = part.get("source")
    if part["type"] == "image" and isinstance(source, dict) and part.keys() == {"type", "source"}:
        if source.get("type") == "base64" and source.keys() == {"type", "media_type", "data"}:
            return {"type": "image_url", "image_url": {"url": f"data:{source['media_type']};base64,{source['data']}"}}
        if source.get("type") == "url" and source.keys() == {"type", "url"}:
            return {"type": "image_url", "image_url": {"url": source["url"]}}
    return part


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in body.items() if name not in _ELSEWHERE}
    if body.get("stop_sequences") is not None:
        settings["stop"] = body["stop_sequences"]
    if body.get("tools") is not None:
        settings["tools"] = [_tool(tool) for tool in body["tools"]]
    if body.get("tool_choice") is not None:
        settings |= _tool_choice(body["tool_choice"])
    return settings


def _tool(tool: Any) -> Any:
    """A client's own tool as a function; what the provider runs keeps its form."""
    if not isinstance(tool, dict) or tool.get("type", "custom") not in ("custom", None) or "input_schema" not in tool:
        return tool
    rest = {k: v for k, v in tool.items() if k not in ("type", "input_schema", "cache_control")}
    return {"type": "function", "function": {**rest, "parameters": tool["input_schema"]}}


def _tool_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    known = choice.keys() <= {"type", "name", "disable_parallel_tool_use"}
    if kind == "tool" and known:
        said: Any = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in _CHOICES and known and "name" not in choice:
        said = _CHOICES[kind]
    else:
        return {"tool_choice": choice}
    parallel = choice.get("disable_parallel_tool_use")
    return {"tool_choice": said} if parallel is None else {"tool_choice": said, "parallel_tool_calls": not parallel}


# -- facts ------------------------------------------------------------------------------------------------------------


def _is_remote(block: Mapping[str, Any]) -> bool:
    """A block of what is behind an address, or the result of a tool that holds one."""
    source, inner = block.get("source"), block.get("content")
    if isinstance(source, dict) and source.get("type") in ("url", "file"):
        return True
    return isinstance(inner, list) and any([_is_remote(part) for part in inner if isinstance(part, dict)])


def _wants_json(config: object) -> bool:
    return isinstance(config, dict) and isinstance(config.get("format"), dict)


def _end_user(body: Mapping[str, Any]) -> str:
    user = (body.get("metadata") or {}).get("user_id")
    return person_in(user) if isinstance(user, str) else ""


def _unknown(body: Mapping[str, Any], messages: list[dict[str, Any]]) -> Iterator[str]:
    if not body.get("model"):
        yield "model"
    if not body.keys() <= KNOWN_FIELDS:
        yield from sorted(body.keys() - KNOWN_FIELDS)
    for i, message in enumerate(messages):
        if message["role"] not in _ROLES:
            yield f"messages.{i}.role"
        yield from (f"messages.{i}.{name}" for name in sorted(message.keys() - _MESSAGE_FIELDS))
        yield from (f"messages.{i}.content.{j}" for j, b in enumerate(_blocks(message)) if b["type"] not in _KINDS)


# -- errors -----------------------------------------------------------------------------------------------------------


def error_body(error: IbidError, request_id: str = "") -> bytes:
    """The error envelope. `code` and `param` are ours beside the provider's own two."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    said = {"type": kind, "message": error.message, "code": error.code}
    if error.param is not None:
        said["param"] = error.param
    return to_json({"type": "error", "error": said, "request_id": request_id or None})


class Messages(Spoken):
    """`Dialect` of Anthropic messages."""

    name = "anthropic"
    operation = "chat"
    heartbeat = b'event: ping\ndata: {"type": "ping"}\n\n'
    id_header = "request-id"

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        return read({**body, "model": model} if model else body)

    def record(self, body: bytes, *, is_stream: bool, n: int, keeps_id: bool = False) -> Recording:
        return record(body, is_stream=is_stream, loads=self._loads)

    def find_usage(self, body: bytes) -> Usage | None:
        return find_usage(body)

    def filter(self, *, wants_usage: bool, n: int) -> StreamFilter:
        return MessageFilter()

    def expresses(self, answer: Answer, *, has_stops: bool, keeps_id: bool = False) -> bool:
        """Text and tool calls whose length is known; which of several stops ended a text another dialect did not say,
        and thinking without a signature is none here."""
        if answer.dialect == self.name:
            return True
        if answer.usage is None or (has_stops and answer.finish_reason == "stop"):
            return False
        return is_plain(answer)

    def render(self, answer: Answer, *, stream: bool, wants_usage: bool, usage_mode: UsageMode) -> Template:
        return render_stream(answer, usage_mode) if stream else render_whole(answer, usage_mode)

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        return error_body(error, request_id)

    def stream_error(self, error: IbidError, request_id: str = "", *, after: int = -1) -> bytes:
        return b"event: error\ndata: " + error_body(error, request_id) + b"\n\n"
