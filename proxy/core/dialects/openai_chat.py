"""OpenAI chat completions: read a request, ask the upstream for usage, say errors.

Fields as of the API description of 2026-08 and the SDK 3.54. A field that is merely unknown is forwarded and becomes
part of the identity; only a type that no server could understand is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from proxy.core.dialects.callids import named_in_order
from proxy.core.dialects.dialect import Recording, Spoken, StreamFilter, Template, UsageMode
from proxy.core.dialects.fields import (
    ARRAY,
    BOOLEAN,
    CACHE_TWIN,
    INTEGER,
    NUMBER,
    OBJECT,
    SESSION_FIELDS,
    STRING,
    Types,
    limit_of,
    mistyped,
    model_in,
    person_in,
    whole,
    without_twin,
)
from proxy.core.dialects.openai_filter import UsageFilter
from proxy.core.dialects.openai_record import find_usage, record
from proxy.core.dialects.openai_replay import render_stream, render_whole
from proxy.core.errors import BadRequest, IbidError
from proxy.core.facts import Facts
from proxy.core.jsontext import add_member, members, set_member
from proxy.core.model import Answer, Usage
from proxy.core.search import is_offered, is_remote

MESSAGE_LIMIT = 2048
CHOICE_LIMIT = 128

DELIVERY_FIELDS = frozenset(
    {
        "stream",  # how the answer travels
        "stream_options",
        "metadata",  # labels of the upstream's own log; the model does not see them
        "prompt_cache_key",  # the provider's prefix cache: cost and time only
        "prompt_cache_options",
        "prompt_cache_retention",
        "user",  # in `end_user`
        "safety_identifier",
        *SESSION_FIELDS,
        CACHE_TWIN,
    }
)

_TYPES: Types = {
    "audio": OBJECT,
    "frequency_penalty": NUMBER,
    "function_call": (str, dict),
    "functions": ARRAY,
    "logit_bias": OBJECT,
    "logprobs": BOOLEAN,
    "max_completion_tokens": INTEGER,
    "max_tokens": INTEGER,
    "metadata": OBJECT,
    "modalities": ARRAY,
    "parallel_tool_calls": BOOLEAN,
    "prediction": OBJECT,
    "presence_penalty": NUMBER,
    "prompt_cache_key": STRING,
    "reasoning_effort": STRING,
    "response_format": OBJECT,
    "safety_identifier": STRING,
    "seed": INTEGER,
    "service_tier": STRING,
    "stop": (str, list),
    "store": BOOLEAN,
    "stream": BOOLEAN,
    "stream_options": OBJECT,
    "temperature": NUMBER,
    "tool_choice": (str, dict),
    "tools": ARRAY,
    "top_logprobs": INTEGER,
    "top_p": NUMBER,
    "user": STRING,
    "verbosity": STRING,
    "web_search_options": OBJECT,
}
KNOWN_FIELDS = (
    frozenset(_TYPES)
    | SESSION_FIELDS
    | {
        "messages",
        "model",
        "moderation",
        "n",
        "prompt_cache_options",
        "prompt_cache_retention",
        CACHE_TWIN,
    }
)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_ASKING = frozenset({"system", "developer", "user"})
_CALLS = ("tool_calls", "function_call")
_NULLABLE_ROLES = frozenset({"assistant", "tool", "function"})
_SPEAKING = _ROLES - _NULLABLE_ROLES
_MESSAGE_FIELDS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations"}
)
_LIMITS = ("max_completion_tokens", "max_tokens")
_ELSEWHERE = DELIVERY_FIELDS | {"messages", "model", *_LIMITS}  # of `Facts`
_ASK_FOR_USAGE = b'{"include_usage":true}'
_PARTS = frozenset({"text", "refusal", "image_url", "input_audio", "file"})


def read(body: Mapping[str, Any]) -> Facts:
    """What the request says. Raises BadRequest (invalid_type, invalid_value) naming the parameter."""
    model = model_in(body)
    if model is None:
        raise invalid_type("model", "a string")
    messages = _messages(body.get("messages"))
    check_types(body, _TYPES)
    prompt, context = split_prompt(messages)
    roles = [message["role"] for message in messages]
    has_calls = "tool" in roles or "function" in roles or any([m.get(c) for m in messages for c in _CALLS])
    if has_calls:
        context = named_in_order(context)
    users = roles.count("user")
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    kinds = {part["type"] for part in parts}
    stream_options = body.get("stream_options") or {}
    modalities = body.get("modalities") or ()
    return Facts(
        model=model,
        prompt=prompt,
        context=context,
        settings=_settings(body),
        unknown=tuple(_unknown(body, messages)),
        stream=body.get("stream") is True,
        wants_usage=stream_options.get("include_usage") is True,
        temperature=body.get("temperature"),
        n=choices_of(body),
        seed=body.get("seed"),
        has_tools=bool(body.get("tools") or body.get("functions")),
        tool_results=has_calls,
        web_search=is_offered(body.get("tools")),
        has_images="image_url" in kinds,
        has_audio="input_audio" in kinds or any([message.get("audio") for message in messages]),
        has_files="file" in kinds,
        remote_urls=any([_is_remote(part) for part in parts]),
        audio_output="audio" in modalities or body.get("audio") is not None,
        logprobs=body.get("logprobs") is True or bool(body.get("top_logprobs")),
        store=body.get("store") is True,
        response_format=_format(body.get("response_format")),
        output_limit=limit_of(*[body.get(name) for name in _LIMITS]),
        has_stops=bool(body.get("stop")),
        end_user=end_user_of(body),
        first_turn=users == 1 and _ASKING.issuperset(roles),
        user_turns=users,
    )


def check_types(body: Mapping[str, Any], known: Types) -> None:
    """Raises BadRequest for a field that is of none of its types; null always passes."""
    if (wrong := mistyped(body, known)) is not None:
        raise invalid_type(*wrong)


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in body.items() if name not in _ELSEWHERE}
    if isinstance(stop := settings.get("stop"), str):
        settings["stop"] = [stop]
    return settings


def forward_body(raw: bytes, parsed: Mapping[str, Any]) -> bytes:
    """The bytes that go upstream: the client's, save that a stream asks for its usage and the cache twin is gone.

    langchain-openai and others leave usage off behind a custom base URL, so it is always asked for.
    """
    raw = without_twin(raw, parsed)
    if parsed.get("stream") is not True:
        return raw
    if "stream_options" not in parsed:
        return add_member(raw, "stream_options", _ASK_FOR_USAGE)
    options = parsed["stream_options"]
    if isinstance(options, dict):
        if options.get("include_usage") is True:
            return raw
        _, start, end = members(raw)["stream_options"]
        return set_member(raw, "stream_options", set_member(raw[start:end], "include_usage", b"true"))
    return set_member(raw, "stream_options", _ASK_FOR_USAGE)


def as_asked(body: bytes, asked: bytes) -> bytes:
    """`body` without what `forward_body` added to what the client `asked`, whatever else was done to it since."""
    own = members(asked).get("stream_options")
    return set_member(body, "stream_options", None if own is None else asked[own[1] : own[2]])


_KINDS = {"budget_exceeded": "insufficient_quota", "rate_limit_exceeded": "rate_limit_exceeded"}


def error_body(error: IbidError) -> bytes:
    """The error envelope; all four keys are required by the API description."""
    kind = _KINDS.get(error.code, "invalid_request_error" if error.status < 500 else "server_error")
    envelope = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return json.dumps({"error": envelope}, separators=(",", ":")).encode()


def stream_error(error: IbidError) -> bytes:
    """An error as the last event of a stream; close without `[DONE]` after it, so that every SDK raises."""
    return b"data: " + error_body(error) + b"\n\n"


def invalid_type(param: str, wanted: str) -> BadRequest:
    return BadRequest(f"Invalid type for '{param}': expected {wanted}.", code="invalid_type", param=param)


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MESSAGE_LIMIT:
        raise invalid_type("messages", f"an array of 1 to {MESSAGE_LIMIT} messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid_type(f"messages[{i}]", "object")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise invalid_type(f"messages[{i}].role", "string")
        if isinstance(content, list):
            for j, part in enumerate(content):
                _check_part(part, f"messages[{i}].content[{j}]")
        elif not isinstance(content, str) and (content is not None or role in _SPEAKING):
            raise invalid_type(f"messages[{i}].content", "string or array")
    return messages


def _check_part(part: object, path: str) -> None:
    if not isinstance(part, dict):
        raise invalid_type(path, "object")
    if not isinstance(part.get("type"), str):
        raise invalid_type(f"{path}.type", "string")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise invalid_type(f"{path}.text", "string")


def choices_of(body: Mapping[str, Any]) -> int:
    """`n`. Raises BadRequest (invalid_value)."""
    if body.get("n") is None:
        return 1
    n = whole(body["n"])
    if n is None or not 1 <= n <= CHOICE_LIMIT:
        raise BadRequest(f"'n' must be an integer from 1 to {CHOICE_LIMIT}.", code="invalid_value", param="n")
    return n


def split_prompt(messages: Sequence[dict[str, Any]]) -> tuple[str | None, tuple[Mapping[str, Any], ...]]:
    """The prompt and what stands around it. A lone text part says the same as a string."""
    *earlier, last = (_plain(message) for message in messages)
    content = last.get("content")
    if last["role"] != "user" or not isinstance(content, str):
        return None, (*earlier, last)
    rest = {k: v for k, v in last.items() if k not in ("role", "content")}
    return content, (*earlier, rest) if rest else tuple(earlier)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and content[0].keys() == {"type", "text"}:
        return {**message, "content": content[0]["text"]}
    return message


def _unknown(body: Mapping[str, Any], messages: list[dict[str, Any]]) -> Iterator[str]:
    if not body.get("model"):
        yield "model"  # whatever the server has
    if not body.keys() <= KNOWN_FIELDS:
        yield from sorted(body.keys() - KNOWN_FIELDS)
    for i, message in enumerate(messages):
        if message["role"] not in _ROLES:
            yield f"messages[{i}].role"
        if not message.keys() <= _MESSAGE_FIELDS:
            yield from (f"messages[{i}].{name}" for name in sorted(message.keys() - _MESSAGE_FIELDS))
        content = message.get("content")
        if isinstance(content, list):
            yield from (f"messages[{i}].content[{j}]" for j, p in enumerate(content) if p["type"] not in _PARTS)


def _is_remote(part: Mapping[str, Any]) -> bool:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    return (isinstance(url, str) and not url[:5].lower() == "data:") or is_remote(part)


def _format(response_format: Mapping[str, Any] | None) -> str | None:
    kind = response_format.get("type") if response_format else None
    return kind if isinstance(kind, str) else None


def end_user_of(body: Mapping[str, Any]) -> str:
    """Whom a body names, under any of its three names; "" for nobody."""
    metadata = body.get("metadata") or {}
    named = (body.get("user"), body.get("safety_identifier"), metadata.get("user_id"))
    people = list(dict.fromkeys(person_in(name) for name in named if isinstance(name, str) and name))
    return people[0] if len(people) == 1 else json.dumps(people) if people else ""


class OpenAIChat(Spoken):
    """`Dialect` of OpenAI chat completions."""

    name = "openai"
    operation = "chat"

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        """See `read`; a model in the path (Azure's deployments) stands for the body's."""
        return read({**body, "model": model} if model else body)

    def forward_body(self, raw: bytes, parsed: Mapping[str, Any]) -> bytes:
        return forward_body(raw, parsed)

    def record(self, body: bytes, *, is_stream: bool, n: int, keeps_id: bool = False) -> Recording:
        return record(body, is_stream=is_stream, n=n, loads=self._loads)

    def find_usage(self, body: bytes) -> Usage | None:
        return find_usage(body)

    def filter(self, *, wants_usage: bool, n: int) -> StreamFilter:
        return UsageFilter(not wants_usage, n, self._loads)

    def expresses(self, answer: Answer, *, has_stops: bool, keeps_id: bool = False) -> bool:
        """All but native parts: thinking with its signature, citations, server tools."""
        return answer.dialect == self.name or not (answer.opaque or answer.choice)

    def render(self, answer: Answer, *, stream: bool, wants_usage: bool, usage_mode: UsageMode) -> Template:
        if answer.dialect != self.name:
            answer = translated(answer)
        return render_stream(answer, wants_usage, usage_mode) if stream else render_whole(answer, usage_mode)

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        return error_body(error)

    def stream_error(self, error: IbidError, request_id: str = "", *, after: int = -1) -> bytes:
        return stream_error(error)


def translated(answer: Answer) -> Answer:
    """Another dialect's answer in this one's words."""
    usage = answer.usage
    counts: dict[str, Any] | None = None
    if usage is not None:
        details = {"cached_tokens": usage.cache_read_tokens}
        if usage.cache_write_tokens:
            details["cache_write_tokens"] = usage.cache_write_tokens
        counts = {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "prompt_tokens_details": details,
        }
    finish = "stop" if answer.finish_reason == "stop_sequence" else answer.finish_reason
    return replace(answer, finish_reason=finish, raw_usage=counts, extra={}, choice={})
