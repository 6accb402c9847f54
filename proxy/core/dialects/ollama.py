"""Ollama chat and generate: read a request, say errors.

Its options with a name in OpenAI's words are read into those; the rest stays in `options`. A request without `stream`
is streamed. Both operations may lack a credential, since Ollama itself asks for none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from proxy.core.answer import to_json
from proxy.core.dialects.callids import named_in_order
from proxy.core.dialects.dialect import Loads, Recording, Spoken, StreamFilter, Template, UsageMode, is_plain
from proxy.core.dialects.fields import CACHE_TWIN, Types, limit_of, mistyped, model_in
from proxy.core.dialects.ollama_answer import LineFilter, find_usage, record, render
from proxy.core.errors import BadRequest, IbidError
from proxy.core.facts import Facts
from proxy.core.model import Answer, Usage
from proxy.core.search import is_offered, is_remote

NDJSON = "application/x-ndjson"

DELIVERY_FIELDS = frozenset(
    {
        "stream",  # how the answer travels
        "keep_alive",  # how long the model stays in memory: time only
        CACHE_TWIN,
    }
)
_TYPES: Types = {
    "context": (list,),
    "format": (str, dict),
    "images": (list,),
    "keep_alive": (str, int, float),
    "logprobs": (bool,),
    "options": (dict,),
    "prompt": (str,),
    "raw": (bool,),
    "stream": (bool,),
    "suffix": (str,),
    "system": (str,),
    "template": (str,),
    "think": (bool, str),
    "tools": (list,),
    "top_logprobs": (int,),
}
_KNOWN = {
    "chat": frozenset({"model", "messages", "tools", "format", "options", "stream", "keep_alive", "think", "logprobs",
                       "top_logprobs", CACHE_TWIN}),
    "generate": frozenset({"model", "prompt", "suffix", "images", "format", "options", "system", "template", "stream",
                           "raw", "keep_alive", "context", "think", "logprobs", "top_logprobs", CACHE_TWIN}),
}  # fmt: skip
_SAME_NAME = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "stop")
_MESSAGE_FIELDS = frozenset({"role", "content", "thinking", "images", "tool_calls", "tool_name", "tool_call_id"})
_PARTS = frozenset({"role", "content", "tool_calls", "reasoning", "reasoning_content", "thinking"})
_ROLES = frozenset({"system", "user", "assistant", "tool"})


def read(body: Mapping[str, Any], operation: Literal["chat", "generate"]) -> Facts:
    """What the request says. Raises BadRequest (invalid_type) naming the parameter."""
    model = model_in(body)
    if model is None:
        raise _invalid_type("model", "a string")
    if (wrong := mistyped(body, _TYPES)) is not None:
        raise _invalid_type(*wrong)
    messages = _messages(body.get("messages")) if operation == "chat" else _asked(body)
    options = dict(body.get("options") or {})
    elsewhere = DELIVERY_FIELDS | {"model", "messages", "prompt", "options"}
    settings = {k: v for k, v in body.items() if k not in elsewhere and v not in (None, "", [])}  # its clients say them
    settings |= _sampling(options)
    limit = options.pop("num_predict", None)
    if options:
        settings["options"] = options
    if settings.get("format") == "json":
        del settings["format"]
        settings["response_format"] = {"type": "json_object"}
    prompt, context = _split(messages)
    roles = [message["role"] for message in messages]
    has_calls = "tool" in roles or any([message.get("tool_calls") for message in messages])
    if has_calls:
        context = named_in_order(context)
    temperature, seed = settings.get("temperature"), settings.get("seed")
    return Facts(
        model=model,
        prompt=None if operation == "generate" and (body.get("suffix") or body.get("raw")) else prompt,
        context=context,
        settings=settings,
        unknown=tuple(_unknown(body, messages, _KNOWN[operation])),
        stream=body.get("stream") is not False,
        wants_usage=True,  # its streams always tell
        temperature=temperature if isinstance(temperature, int | float) else None,
        seed=seed if isinstance(seed, int) else None,
        has_tools=bool(body.get("tools")),
        tool_results=has_calls,
        has_images=any([message.get("images") for message in messages]) or bool(body.get("images")),
        web_search=is_offered(body.get("tools")),
        remote_urls=is_remote({"images": [m.get("images") for m in [*messages, body]]}),
        logprobs=bool(body.get("logprobs") or body.get("top_logprobs")),
        output_limit=limit_of(limit),
        has_stops=bool(settings.get("stop")),
        response_format="json_schema" if body.get("format") else None,
        first_turn=roles.count("user") == 1 and {"system", "user"}.issuperset(roles) and not body.get("context"),
        user_turns=roles.count("user"),
    )


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    found = {name: options.pop(name) for name in _SAME_NAME if name in options}
    if isinstance(stop := found.get("stop"), str):
        found["stop"] = [stop]
    return found


def _invalid_type(param: str, wanted: str) -> BadRequest:
    return BadRequest(f"invalid {param}: expected {wanted}", code="invalid_type", param=param)


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _invalid_type("messages", "a non-empty array")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _invalid_type(f"messages[{i}]", "an object with a role")
        if not isinstance(message.get("content", ""), str):
            raise _invalid_type(f"messages[{i}].content", "a string")
    return messages


def _asked(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise _invalid_type("prompt", "a string")
    return [{"role": "user", "content": prompt}]


def _split(messages: list[dict[str, Any]]) -> tuple[str | None, tuple[Mapping[str, Any], ...]]:
    """The prompt and what stands around it. Fields that say nothing are left out, as OpenAI's clients do."""
    *earlier, last = ({k: v for k, v in message.items() if v not in (None, [])} for message in messages)
    if last.keys() != {"role", "content"} or last["role"] != "user":
        return None, (*earlier, last)
    return last["content"], tuple(earlier)


def _unknown(body: Mapping[str, Any], messages: list[dict[str, Any]], known: frozenset[str]) -> Iterator[str]:
    if not body.get("model"):
        yield "model"
    yield from sorted(body.keys() - known)
    for i, message in enumerate(messages):
        if message["role"] not in _ROLES:
            yield f"messages[{i}].role"
        yield from (f"messages[{i}].{name}" for name in sorted(message.keys() - _MESSAGE_FIELDS))


class Ollama(Spoken):
    """`Dialect` of `/api/chat` and of `/api/generate`."""

    name = "ollama"
    heartbeat = None
    patience = None
    stream_type = NDJSON

    def __init__(self, operation: Literal["chat", "generate"], loads: Loads = json.loads) -> None:
        super().__init__(loads)
        self.operation = operation

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        return read(body, self.operation)

    def record(self, body: bytes, *, is_stream: bool, n: int, keeps_id: bool = False) -> Recording:
        return record(body, self._loads)

    def find_usage(self, body: bytes) -> Usage | None:
        return find_usage(body)

    def filter(self, *, wants_usage: bool, n: int) -> StreamFilter:
        return LineFilter()

    def expresses(self, answer: Answer, *, has_stops: bool, keeps_id: bool = False) -> bool:
        """Text, what was thought, and tool calls."""
        return answer.dialect == self.name or is_plain(answer, _PARTS)

    def render(self, answer: Answer, *, stream: bool, wants_usage: bool, usage_mode: UsageMode) -> Template:
        return render(answer, is_chat=self.operation == "chat", stream=stream, usage_mode=usage_mode)

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        return to_json({"error": error.message, "code": error.code})

    def stream_error(self, error: IbidError, request_id: str = "", *, after: int = -1) -> bytes:
        return self.error_body(error, request_id) + b"\n"
