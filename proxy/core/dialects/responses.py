"""OpenAI Responses: read a request, say errors, and what joins the parts of the dialect.

The API keeps an answer under its id unless the request says `store: false`; a later request may name that id. So
`store` is part of the scope, an answer that is kept is replayed with the ids it came with, and no answer of another
dialect serves a request that wants it kept. With `store: false` every replay has new ids. Fields as of the SDK 3.54.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from proxy.core import search
from proxy.core.answer import to_json
from proxy.core.dialects import responses_input as said
from proxy.core.dialects.callids import named_in_order
from proxy.core.dialects.dialect import Recording, Spoken, StreamFilter, Template, UsageMode, is_plain
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
    model_in,
)
from proxy.core.dialects.openai_chat import (
    check_types,
    end_user_of,
    error_body,
    invalid_type,
    split_prompt,
)
from proxy.core.dialects.responses_filter import ResponseFilter
from proxy.core.dialects.responses_record import find_usage, record
from proxy.core.dialects.responses_replay import render_stream, render_whole
from proxy.core.errors import IbidError
from proxy.core.facts import Facts
from proxy.core.model import Answer, Usage

DELIVERY_FIELDS = frozenset(
    {
        "stream",  # how the answer travels
        "stream_options",
        "metadata",  # labels of the upstream's own log; the model does not see them
        "prompt_cache_key",  # the provider's prefix cache: cost and time only
        "prompt_cache_options",  # likewise, but see `_settings`
        "prompt_cache_retention",
        "user",  # in `end_user`
        "safety_identifier",
        *SESSION_FIELDS,
        CACHE_TWIN,
    }
)
_TYPES: Types = {
    "background": BOOLEAN,
    "context_management": ARRAY,
    "conversation": (str, dict),
    "include": ARRAY,
    "input": (str, list),
    "instructions": STRING,
    "max_output_tokens": INTEGER,
    "max_tool_calls": INTEGER,
    "metadata": OBJECT,
    "parallel_tool_calls": BOOLEAN,
    "previous_response_id": STRING,
    "prompt": OBJECT,
    "prompt_cache_key": STRING,
    "prompt_cache_options": OBJECT,
    "reasoning": OBJECT,
    "safety_identifier": STRING,
    "service_tier": STRING,
    "store": BOOLEAN,
    "stream": BOOLEAN,
    "stream_options": OBJECT,
    "temperature": NUMBER,
    "text": OBJECT,
    "tool_choice": (str, dict),
    "tools": ARRAY,
    "top_logprobs": INTEGER,
    "top_p": NUMBER,
    "truncation": STRING,
    "user": STRING,
}
KNOWN_FIELDS = (
    frozenset(_TYPES)
    | SESSION_FIELDS
    | {
        "access_programs",
        "background_options",
        "image",
        "model",
        "moderation",
        "prompt_cache_retention",
        CACHE_TWIN,
    }
)
_STATE = ("previous_response_id", "conversation")
_ELSEWHERE = DELIVERY_FIELDS | {
    "model",
    "input",
    "instructions",
    "max_output_tokens",
    "text",
    "tools",
    "tool_choice",
    "store",
    "background",
    *_STATE,
}
_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"


def read(body: Mapping[str, Any]) -> Facts:
    """What the request says. Raises BadRequest (invalid_type) naming the parameter."""
    model = model_in(body)
    if model is None:
        raise invalid_type("model", "a string")
    check_types(body, _TYPES)
    items = said.items_of(body)
    messages = said.messages_of(body, items)
    prompt, context = split_prompt(messages) if items else (None, tuple(messages))
    has_calls = any([said.is_tool_item(item) for item in items])
    continues = _continued(body, kinds := [said.kind_of(item) for item in items])
    if has_calls and not continues:  # an id there may name a call that stands elsewhere
        context = named_in_order(context)
    roles = [message["role"] for message in messages]
    parts = said.parts_of(items)
    content = {part["type"] for part in parts}
    keeps_id = body.get("store") is not False
    settings = _settings(body)
    tools, include = body.get("tools") or (), body.get("include") or ()
    form = (body.get("text") or {}).get("format")
    return Facts(
        model=model,
        prompt=prompt,
        context=context,
        settings={**settings, "store": True} if keeps_id else settings,
        unknown=(*([] if model else ["model"]), *sorted(body.keys() - KNOWN_FIELDS), *said.unknown_items(items)),
        stream=body.get("stream") is True,
        wants_usage=True,  # its streams always tell
        temperature=body.get("temperature"),
        has_tools=bool(tools),
        tool_results=has_calls,
        web_search=search.is_offered(tools, choice=body.get("tool_choice"), shows_use=True),
        has_images="input_image" in content,
        has_audio="input_audio" in content,
        has_files="input_file" in content,
        remote_urls=bool(body.get("prompt"))
        or any([said.is_remote(part) for part in [*parts, *said.outputs_of(items)]]),
        logprobs=bool(body.get("top_logprobs")) or _LOGPROBS in include,
        keeps_id=keeps_id,
        background=body.get("background") is True,
        previous_response=said.STATE_ITEM in kinds or any([body.get(name) for name in _STATE]),
        continues=continues,
        response_format=form["type"] if isinstance(form, dict) and isinstance(form.get("type"), str) else None,
        output_limit=limit_of(body.get("max_output_tokens")),
        opaque=_ENCRYPTED in include,
        end_user=end_user_of(body),
        first_turn=roles.count("user") == 1 and {"system", "developer", "user"}.issuperset(roles),
        user_turns=roles.count("user"),
    )


def _continued(body: Mapping[str, Any], kinds: Sequence[str]) -> str:
    """The one kept answer that a request continues; "" when it is none, or more than that."""
    previous = body.get("previous_response_id")
    is_all = not body.get("conversation") and said.STATE_ITEM not in kinds
    return previous if isinstance(previous, str) and is_all else ""


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in body.items() if name not in _ELSEWHERE}
    if (body.get("prompt_cache_options") or {}).get("prewarm"):  # asks for no answer at all
        settings["prompt_cache_options"] = body["prompt_cache_options"]
    if body.get("text") is not None:
        settings |= said.text_settings(body["text"])
    if body.get("tools") is not None:
        settings["tools"] = [said.neutral_tool(tool) for tool in body["tools"]]
    if body.get("tool_choice") is not None:
        settings["tool_choice"] = said.neutral_choice(body["tool_choice"])
    return settings


class Responses(Spoken):
    """`Dialect` of OpenAI Responses."""

    name = "responses"
    operation = "chat"

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        return read({**body, "model": model} if model else body)

    def record(self, body: bytes, *, is_stream: bool, n: int, keeps_id: bool = False) -> Recording:
        return record(body, is_stream=is_stream, keeps_id=keeps_id, loads=self._loads)

    def find_usage(self, body: bytes) -> Usage | None:
        return find_usage(body)

    def filter(self, *, wants_usage: bool, n: int) -> StreamFilter:
        return ResponseFilter()

    def expresses(self, answer: Answer, *, has_stops: bool, keeps_id: bool = False) -> bool:
        """Text and tool calls, for a request whose answer the upstream is not to keep: what another dialect recorded
        has no id that this API could be asked about."""
        return answer.dialect == self.name or (not keeps_id and is_plain(answer))

    def render(self, answer: Answer, *, stream: bool, wants_usage: bool, usage_mode: UsageMode) -> Template:
        return render_stream(answer, usage_mode) if stream else render_whole(answer, usage_mode)

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        return error_body(error)

    def stream_error(self, error: IbidError, request_id: str = "", *, after: int = -1) -> bytes:
        """The API's event, and in it the envelope as well: the SDKs raise on `error` and on nothing else."""
        envelope = json.loads(error_body(error))["error"]
        told = {"code": error.code, "message": error.message, "param": error.param, "sequence_number": after + 1}
        return b"event: error\ndata: " + to_json({"type": "error", **told, "error": envelope}) + b"\n\n"
