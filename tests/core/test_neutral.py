"""Members that say nothing, and counters wherever providers put them: what every recorder understands alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from proxy.core.dialects.dialect import Dialect, Recording
from proxy.core.dialects.recording import is_neutral
from proxy.core.dialects.routes import Routes
from proxy.core.model import Usage

ROUTES = Routes(orjson.loads)


def recorded(path: str, body: bytes, *, is_stream: bool) -> Recording:
    dialect: Dialect | None = ROUTES.find(path, "?alt=sse").dialect
    assert dialect is not None
    return dialect.record(body, is_stream=is_stream, n=1)


def event(said: Mapping[str, Any] | str) -> bytes:
    return b"data: " + (said if isinstance(said, str) else json.dumps(said)).encode() + b"\n\n"


NEUTRAL: dict[str, Any] = {
    "tool_calls": [], "refusal": "", "function_call": None, "reasoning_content": None, "images": [], "annotations": [],
    "audio": {}, "provider_specific_fields": {"a": None, "b": []}, "prefix": False, "citations": [],
    "role": "assistant",
    "name": "assistant", "reasoning": "", "extra_content": {},
}  # fmt: skip
OF_A_TOKEN = ["token_id", "token_ids", "token", "logprob"]


@pytest.mark.parametrize("value", [None, False, "", [], {}, {"a": None}, [[], {}], {"a": {"b": ""}}])
def test_what_says_nothing(value: object) -> None:
    assert is_neutral(value)


@pytest.mark.parametrize("value", [0, 1, True, " ", [0], {"a": 1}, {"a": [""], "b": "x"}])
def test_what_says_something(value: object) -> None:
    assert not is_neutral(value)


def chat(delta: Mapping[str, Any], finish: Any = None, **choice: Any) -> bytes:
    return event({"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]})


def chat_stream(more: Any, *, going_on: Any = None) -> bytes:
    """Four texts, each with more members: what `more` gives for its place."""
    texts = ["Lyon", " lies", " on", " the Rhône."]
    chunks = [chat({"content": text, **more(i)}, going_on) for i, text in enumerate(texts)]
    return b"".join([chat({"role": "assistant", "content": ""}), *chunks, chat({}, "stop"), event("[DONE]")])


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_members_of_every_delta_are_understood(name: str) -> None:
    answer = recorded("/v1/chat/completions", chat_stream(lambda _: {name: NEUTRAL[name]}), is_stream=True).answer
    assert answer is not None
    assert answer.message["content"] == "Lyon lies on the Rhône."
    assert answer.message["role"] == "assistant"


def test_all_of_them_together_and_an_empty_role_at_the_end() -> None:
    answer = recorded("/v1/chat/completions", chat_stream(lambda i: {**NEUTRAL, "role": ""}), is_stream=True).answer
    assert answer is not None
    assert (answer.message["role"], answer.message["content"]) == ("assistant", "Lyon lies on the Rhône.")


@pytest.mark.parametrize("name", OF_A_TOKEN)
def test_what_describes_a_token_is_none_of_the_answer(name: str) -> None:
    answer = recorded("/v1/chat/completions", chat_stream(lambda i: {name: 100 + i}), is_stream=True).answer
    assert answer is not None
    assert name not in answer.message


@pytest.mark.parametrize("going_on", ["", None])
def test_an_empty_finish_reason_finishes_nothing(going_on: Any) -> None:
    raw = chat_stream(lambda _: {}, going_on=going_on)
    assert recorded("/v1/chat/completions", raw, is_stream=True).answer is not None
    unfinished = raw.replace(b'"stop"', b'""')
    assert recorded("/v1/chat/completions", unfinished, is_stream=True).refusal_reason == "truncated"


def test_a_member_that_was_empty_may_still_come_to_say_something() -> None:
    calls = [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    raw = chat({"content": "", "tool_calls": []}) + chat({"tool_calls": calls}) + chat({}, "tool_calls")
    answer = recorded("/v1/chat/completions", raw + event("[DONE]"), is_stream=True).answer
    assert answer is not None
    assert answer.message["tool_calls"][0]["function"]["name"] == "f"
    refused = chat({"content": "no", "refusal": ""}) + chat({"refusal": "I will not."}) + chat({}, "stop")
    assert recorded("/v1/chat/completions", refused + event("[DONE]"), is_stream=True).refusal_reason == "refusal"
    thought = chat({"reasoning_content": ""}) + chat({"reasoning_content": "so"}) + chat({"content": "x"}, "stop")
    answer = recorded("/v1/chat/completions", thought + event("[DONE]"), is_stream=True).answer
    assert answer is not None
    assert answer.message["reasoning_content"] == "so"


@pytest.mark.parametrize("odd", [{"delta": []}, {"delta": None}, {"index": None, "delta": {}}])
def test_an_empty_choice_says_nothing(odd: dict[str, Any]) -> None:
    said = event({"model": "m", "choices": [{"index": 0, "finish_reason": None, **odd}]})
    raw = said + chat({"content": "Lyon"}) + said + chat({}, "stop") + said + event("[DONE]")
    answer = recorded("/v1/chat/completions", raw, is_stream=True).answer
    assert answer is not None
    assert answer.message["content"] == "Lyon"


def test_what_is_not_understood_is_refused_as_ever() -> None:
    raw = chat_stream(lambda i: {"mystery": f"part {i}"})
    assert recorded("/v1/chat/completions", raw, is_stream=True).refusal_reason == "unknown_delta"


def test_legacy_completions_bear_the_same() -> None:
    def chunk(text: Any, finish: Any) -> bytes:
        return event({"model": "m", "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}]})

    usage = event({"model": "m", "choices": None, "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    raw = chunk("Lyon", "") + chunk(" lies", "") + chunk(None, "stop") + usage + event("[DONE]")
    recording = recorded("/v1/completions", raw, is_stream=True)
    assert recording.answer is not None
    assert recording.answer.message["content"] == "Lyon lies"
    assert recording.usage == Usage(3, 2)


def test_gemini_bears_the_same() -> None:
    def chunk(part: Mapping[str, Any], finish: Any = None) -> bytes:
        candidate = {"content": {"parts": [part]}, "finishReason": finish, "index": 0, "citationMetadata": None}
        return event({"candidates": [candidate], "modelVersion": "m"})

    odd = {"thought": False, "thoughtSignature": "", "functionCall": None, "videoMetadata": {}, "inlineData": None}
    odd.pop("functionCall")
    raw = chunk({"text": "Lyon", **odd}) + chunk({}) + chunk({"text": " lies", **odd}, "") + chunk({"text": ""}, "STOP")
    recording = recorded("/v1beta/models/m:streamGenerateContent", raw, is_stream=True)
    assert recording.answer is not None, recording.refusal_reason
    assert recording.answer.message["content"] == "Lyon lies"


def test_ollama_bears_the_same() -> None:
    odd = {"images": [], "tool_calls": None, "tool_name": "", "thinking": "", "annotations": []}
    lines = [
        {"model": "m", "message": {"role": "assistant", "content": "Lyon", **odd}, "done": False, "done_reason": ""},
        {"model": "m", "message": {"role": "assistant", "content": "", **odd}, "done": True, "done_reason": ""},
    ]
    recording = recorded("/api/chat", b"".join([json.dumps(line).encode() + b"\n" for line in lines]), is_stream=True)
    assert recording.answer is not None, recording.refusal_reason


# --- counters -------------------------------------------------------------------------------------------------------

TOLD = {
    "OpenAI": ({"prompt_tokens_details": {"cached_tokens": 900}}, Usage(1000, 10, 900)),
    "DeepSeek": ({"prompt_cache_hit_tokens": 900, "prompt_cache_miss_tokens": 100}, Usage(1000, 10, 900)),
    "Moonshot": ({"cached_tokens": 900}, Usage(1000, 10, 900)),
    "LiteLLM": ({"cache_read_input_tokens": 900, "cache_creation_input_tokens": 50}, Usage(1000, 10, 900, 50)),
    "Bedrock": ({"cacheReadInputTokens": 900, "cacheWriteInputTokens": 50}, Usage(1000, 10, 900, 50)),
    "both places": ({"prompt_tokens_details": {"cached_tokens": 900}, "cached_tokens": 900}, Usage(1000, 10, 900)),
    "null details": ({"prompt_tokens_details": None, "prompt_cache_hit_tokens": 900}, Usage(1000, 10, 900)),
    "zero details": ({"prompt_tokens_details": {"cached_tokens": 0}, "cached_tokens": 900}, Usage(1000, 10, 900)),
    "nonsense": ({"cached_tokens": "900", "prompt_cache_hit_tokens": -1}, Usage(1000, 10)),
    "beside the total": ({"cache_read_input_tokens": 9000}, Usage(10_000, 10, 9000)),
}


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("is_stream", [False, True])
def test_cached_tokens_are_read_wherever_they_are_told(name: str, is_stream: bool) -> None:
    more, usage = TOLD[name]
    told = {"prompt_tokens": 1000, "completion_tokens": 10, **more}
    if is_stream:
        body = chat({"content": "x"}, "stop") + event({"model": "m", "choices": [], "usage": told}) + event("[DONE]")
    else:
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
        body = json.dumps({"model": "m", "choices": [choice], "usage": told}).encode()
    assert recorded("/v1/chat/completions", body, is_stream=is_stream).usage == usage


def test_a_usage_that_stands_in_the_choice_counts() -> None:
    told = {"prompt_tokens": 1000, "completion_tokens": 10, "cached_tokens": 900}
    raw = chat({"content": "x"}) + chat({}, "stop", usage=told) + event("[DONE]")
    answer = recorded("/v1/chat/completions", raw, is_stream=True).answer
    assert answer is not None
    assert answer.usage == Usage(1000, 10, 900)
    assert "usage" not in answer.choice


OTHERS: dict[str, tuple[str, dict[str, Any], Usage]] = {
    "responses": (
        "/v1/responses",
        {
            "status": "completed", "model": "m",
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "x"}]}],
            "usage": {"input_tokens": 1000, "output_tokens": 10, "prompt_cache_hit_tokens": 900},
        },
        Usage(1000, 10, 900),
    ),
    "anthropic by Bedrock": (
        "/v1/messages",
        {
            "type": "message", "model": "m", "stop_reason": "end_turn", "content": [{"type": "text", "text": "x"}],
            "usage": {"inputTokens": 100, "outputTokens": 10, "cacheReadInputTokens": 900, "cacheWriteInputTokens": 5},
        },
        Usage(1005, 10, 900, 5),
    ),
    "gemini": (
        "/v1beta/models/m:generateContent",
        {
            "candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "STOP"}],
            "usageMetadata": {"promptTokenCount": 1000, "candidatesTokenCount": 10, "cachedContentTokenCount": 900},
        },
        Usage(1000, 10, 900),
    ),
    "ollama": (
        "/api/chat",
        {
            "model": "m", "message": {"role": "assistant", "content": "x"}, "done": True,
            "prompt_eval_count": 1000, "prompt_eval_cached_count": 900, "eval_count": 10,
        },
        Usage(1000, 10, 900),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_so_they_are_in_other_dialects(name: str) -> None:
    path, body, usage = OTHERS[name]
    assert recorded(path, json.dumps(body).encode(), is_stream=False).usage == usage
