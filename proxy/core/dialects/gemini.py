"""Gemini generateContent and streamGenerateContent: read a request, say errors.

The path names the model and says whether the answer is streamed. Field names are read in both spellings that the
provider takes (`systemInstruction`, `system_instruction`). What can be said in OpenAI's words is read into them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from proxy.core.answer import to_json
from proxy.core.dialects.callids import named_in_order
from proxy.core.dialects.dialect import Recording, Spoken, StreamFilter, Template, UsageMode, is_plain
from proxy.core.dialects.fields import CACHE_TWIN, limit_of, whole
from proxy.core.dialects.gemini_answer import CandidateFilter, find_usage, record, render
from proxy.core.errors import BadRequest, IbidError
from proxy.core.facts import Facts
from proxy.core.model import Answer, Usage

DELIVERY_QUERY = frozenset({"alt", "$alt", "key", "prettyPrint", "$prettyPrint"})
"""Query parameters that change delivery, or are the credential."""

DELIVERY_FIELDS = frozenset(
    {
        "labels",  # for the upstream's bill; the model does not see them
        CACHE_TWIN,
    }
)
_KNOWN = frozenset(
    {"contents", "systemInstruction", "generationConfig", "tools", "toolConfig", "safetySettings", "cachedContent",
     "labels", "model", CACHE_TWIN}
)  # fmt: skip
_TYPES: Mapping[str, type] = {
    "contents": list, "generationConfig": dict, "tools": list, "toolConfig": dict, "safetySettings": list,
    "cachedContent": str, "labels": dict,
}  # fmt: skip
_SAMPLING = {
    "temperature": "temperature", "topP": "top_p", "topK": "top_k", "seed": "seed", "stopSequences": "stop",
    "presencePenalty": "presence_penalty", "frequencyPenalty": "frequency_penalty",
}  # fmt: skip
_ROLES = {"user": "user", "model": "assistant", "function": "tool"}
_PARTS = frozenset({"text", "inlineData", "fileData", "functionCall", "functionResponse", "thought",
                    "thoughtSignature"})  # fmt: skip
_STATUSES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 408: "CANCELLED",
    413: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 502: "UNAVAILABLE", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip
_SNAKE = re.compile(r"_([a-z])")


def read(body: Mapping[str, Any], model: str, *, stream: bool) -> Facts:
    """What the request says. Raises BadRequest (invalid_type) naming the parameter."""
    body = _camel(body)
    for name, wanted in _TYPES.items():
        if body.get(name) is not None and not isinstance(body[name], wanted):
            raise _invalid_type(name, "an array" if wanted is list else "an object" if wanted is dict else "a string")
    contents = body.get("contents")
    if not contents:
        raise _invalid_type("contents", "a non-empty array")
    messages = [_message(content, i) for i, content in enumerate(contents)]
    parts = [part for content in contents for part in content.get("parts") or ()]
    kinds = {name for part in parts for name in _camel(part)}
    config = _camel(body.get("generationConfig") or {})
    tools = [_camel(tool) for tool in body.get("tools") or () if isinstance(tool, dict)]
    has_calls = not kinds.isdisjoint(("functionCall", "functionResponse"))
    told = [*_system(body.get("systemInstruction")), *messages]
    *earlier, last = named_in_order(told) if has_calls else told
    asks = last["role"] == "user" and isinstance(last["content"], str)
    roles = [message["role"] for message in messages]
    settings, modalities = _settings(body, config), config.get("responseModalities") or ()
    wants_json = config.get("responseMimeType") == "application/json"
    return Facts(
        model=model.removeprefix("models/"),
        prompt=last["content"] if asks else None,
        context=tuple(earlier if asks else [*earlier, last]),
        settings=settings,
        unknown=tuple(_unknown(body, parts)),
        stream=stream,
        wants_usage=True,  # its streams always tell
        temperature=config.get("temperature"),
        n=whole(config.get("candidateCount")) or 1,
        seed=config.get("seed"),
        has_tools=bool(tools),
        tool_results=has_calls,
        web_search=any([not tool.keys() <= {"functionDeclarations"} for tool in tools]),
        has_images="inlineData" in kinds,
        has_files="fileData" in kinds or bool(body.get("cachedContent")),
        remote_urls="fileData" in kinds,
        audio_output=any([str(kind).upper() != "TEXT" for kind in modalities]) or "speechConfig" in config,
        logprobs=bool(config.get("responseLogprobs") or config.get("logprobs")),
        output_limit=limit_of(config.get("maxOutputTokens")),
        has_stops=bool(config.get("stopSequences")),
        response_format="json_schema" if wants_json else None,
        first_turn=roles == ["user"],
        user_turns=roles.count("user"),
    )


def _invalid_type(param: str, wanted: str) -> BadRequest:
    return BadRequest(f"Invalid value at '{param}': expected {wanted}.", code="invalid_type", param=param)


def _camel(value: Mapping[str, Any]) -> dict[str, Any]:
    return {_SNAKE.sub(lambda found: found[1].upper(), name): inner for name, inner in value.items()}


def _message(content: Any, i: int) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _invalid_type(f"contents[{i}]", "an object")
    role, parts = content.get("role", "user"), content.get("parts")
    if not isinstance(role, str):
        raise _invalid_type(f"contents[{i}].role", "a string")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _invalid_type(f"contents[{i}].parts", "an array of objects")
    rest = {name: value for name, value in content.items() if name not in ("role", "parts")}
    return {"role": _ROLES.get(role, role), "content": _content(parts), **rest}


def _content(parts: list[dict[str, Any]]) -> Any:
    """A string, or parts; one plain text is a string."""
    if len(parts) == 1 and parts[0].keys() == {"text"} and isinstance(parts[0]["text"], str):
        return parts[0]["text"]
    return [_part(_camel(part)) for part in parts]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part.keys() == {"text"}:
        return {"type": "text", **part}
    if part.keys() == {"inlineData"} and isinstance(part["inlineData"], dict):
        blob = _camel(part["inlineData"])
        if blob.keys() == {"mimeType", "data"} and str(blob["mimeType"]).startswith("image/"):
            return {"type": "image_url", "image_url": {"url": f"data:{blob['mimeType']};base64,{blob['data']}"}}
    return part


def _system(instruction: Any) -> list[dict[str, Any]]:
    if not instruction:
        return []
    if isinstance(instruction, str):
        return [{"role": "system", "content": instruction}]
    parts = instruction.get("parts") if isinstance(instruction, dict) else None
    if isinstance(parts, dict):
        parts = [parts]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _invalid_type("systemInstruction", "an object with parts")
    return [{"role": "system", "content": _content(parts)}]


def _settings(body: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    elsewhere = DELIVERY_FIELDS | {"contents", "systemInstruction", "generationConfig", "model"}
    settings = {name: value for name, value in body.items() if name not in elsewhere}
    settings |= {ours: config[name] for name, ours in _SAMPLING.items() if config.get(name) is not None}
    rest = {name: value for name, value in config.items() if name not in _SAMPLING and name != "maxOutputTokens"}
    if rest:
        settings["generationConfig"] = rest
    return settings


def _unknown(body: Mapping[str, Any], parts: list[dict[str, Any]]) -> Iterator[str]:
    yield from sorted(body.keys() - _KNOWN)
    yield from sorted({name for part in parts for name in _camel(part)} - _PARTS)


class Gemini(Spoken):
    """`Dialect` of Gemini's generateContent and streamGenerateContent."""

    name = "gemini"
    operation = "chat"
    heartbeat = None  # a comment crashes its clients
    patience = None

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        return read(body, model, stream=stream)

    def record(self, body: bytes, *, is_stream: bool, n: int, keeps_id: bool = False) -> Recording:
        return record(body, is_stream=is_stream, loads=self._loads)

    def find_usage(self, body: bytes) -> Usage | None:
        return find_usage(body)

    def filter(self, *, wants_usage: bool, n: int) -> StreamFilter:
        return CandidateFilter()

    def expresses(self, answer: Answer, *, has_stops: bool, keeps_id: bool = False) -> bool:
        """Text and function calls."""
        return answer.dialect == self.name or is_plain(answer)

    def render(self, answer: Answer, *, stream: bool, wants_usage: bool, usage_mode: UsageMode) -> Template:
        return render(answer, stream=stream, usage_mode=usage_mode)

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        status = _STATUSES.get(error.status, "INVALID_ARGUMENT" if error.status < 500 else "INTERNAL")
        reason = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": error.code}
        return to_json(
            {"error": {"code": error.status, "message": error.message, "status": status, "details": [reason]}}
        )

    def stream_error(self, error: IbidError, request_id: str = "", *, after: int = -1) -> bytes:
        """Nothing: no event of this dialect means that something broke, so the connection is cut."""
        return b""
