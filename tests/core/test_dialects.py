"""Every dialect stores only whole, understood answers, writes back what it read, and asks what the others ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core.dialects.anthropic_record import COUNTED_LAST
from proxy.core.dialects.dialect import Dialect, rfc3339
from proxy.core.dialects.routes import CHAT_PATH, Routes, family_of, keys_in, without_key
from proxy.core.errors import BadRequest, Busy
from proxy.core.fingerprint import fingerprint_of, scope_of
from proxy.core.model import Answer, Usage

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
ROUTES = Routes(orjson.loads)
PATHS = {
    "anthropic": "/v1/messages",
    "completions": "/v1/completions",
    "gemini": "/v1beta/models/m:streamGenerateContent",
    "ollama": "/api/chat",
    "openai": CHAT_PATH,
    "responses": "/v1/responses",
}
DIALECTS: Mapping[str, Dialect] = {
    name: dialect for name, path in PATHS.items() if (dialect := ROUTES.find(path, "?alt=sse").dialect) is not None
}
CHATS = sorted(name for name, dialect in DIALECTS.items() if dialect.operation == "chat")
CONTENT = "Paris is the capital of France. \U0001f5fc e\u0301t\u2028end"
REFUSED = {
    "anthropic": {
        "cut_mid_event": "truncated",
        "error_mid_stream": "error_event",
        "garbage": "garbage",
        "max_tokens": "finish_length",
        "open_block": "truncated",
        "refusal": "refusal",
        "server_tool": "provider_tools",
        "stop_without_reason": "truncated",
        "unknown_delta": "unknown_delta",
        "without_stop": "truncated",
    },
    "completions": {
        "after_done": "data_after_done",
        "content_filter": "finish_content_filter",
        "done_without_finish": "truncated",
        "error_mid_stream": "error_event",
        "length": "finish_length",
        "logprobs": "logprobs",
        "two_choices": "choices",
        "without_done": "truncated",
    },
    "gemini": {
        "code_execution": "unknown_delta",
        "cut_mid_event": "truncated",
        "error_mid_stream": "error_object",
        "max_tokens": "finish_length",
        "safety": "finish_safety",
        "two_candidates": "choices",
        "without_finish": "truncated",
    },
    "ollama": {
        "after_done": "data_after_done",
        "cut_mid_line": "garbage",
        "error_mid_stream": "error_object",
        "garbage": "garbage",
        "length": "finish_length",
        "load": "finish_other",
        "without_done": "truncated",
    },
    "responses": {
        "after_done": "data_after_done",
        "content_filter": "finish_content_filter",
        "custom_tool": "provider_tools",
        "cut_mid_event": "truncated",
        "error_mid_stream": "error_event",
        "failed": "error_object",
        "garbage": "garbage",
        "length": "finish_length",
        "refusal": "refusal",
        "unknown_event": "unknown_event",
        "web_search": "provider_tools",
        "without_completed": "truncated",
    },
}
INCOMPLETE = {
    ("anthropic", "cut_mid_event"), ("anthropic", "error_mid_stream"), ("anthropic", "stop_without_reason"),
    ("gemini", "cut_mid_event"), ("gemini", "error_mid_stream"),
    ("gemini", "without_finish"), ("ollama", "cut_mid_line"), ("ollama", "error_mid_stream"),
    ("ollama", "without_done"), ("completions", "done_without_finish"), ("completions", "error_mid_stream"),
    ("responses", "cut_mid_event"), ("responses", "error_mid_stream"), ("responses", "without_completed"),
}  # fmt: skip
KEPT_UPSTREAM = {"kept", "kept_call", "kept_without_word", "summary"}  # answers that the upstream knows by their ids
FILES = sorted(path for name in REFUSED for path in (TRANSCRIPTS / name).iterdir())
KEPT = [path for path in FILES if path.stem not in REFUSED[path.parent.name]]
named = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
kept = pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.stem}")


def spoken(path: Path) -> Dialect:
    if path.stem == "generate":
        found = ROUTES.find("/api/generate").dialect
        assert found is not None
        return found
    return DIALECTS[path.parent.name]


def recorded(path: Path) -> Answer:
    return again_recorded(path, path.read_bytes(), is_stream=True)


def again_recorded(path: Path, raw: bytes, *, is_stream: bool) -> Answer:
    answer = spoken(path).record(raw, is_stream=is_stream, n=1, keeps_id=path.stem in KEPT_UPSTREAM).answer
    assert answer is not None
    return answer


# -- record -----------------------------------------------------------------------------------------------------------


@named
def test_only_a_whole_understood_stream_is_storable(path: Path) -> None:
    recording = spoken(path).record(path.read_bytes(), is_stream=True, n=1)
    reason = REFUSED[path.parent.name].get(path.stem)
    assert (recording.answer is None, recording.refusal_reason) == (reason is not None, reason or "")
    if recording.answer is not None:
        assert recording.usage == recording.answer.usage
        assert recording.answer.dialect == path.parent.name


@kept
def test_what_was_said_is_kept(path: Path) -> None:
    answer = recorded(path)
    calls = answer.message.get("tool_calls")
    if calls:
        (call,) = calls
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
            "get_weather",
            {"city": "Paris"},
        )
        assert answer.finish_reason == "tool_calls"
    elif path.stem not in ("citations", "llama_cpp"):
        assert answer.message["content"] == CONTENT
    assert answer.opaque is (path.stem in ("thinking", "thought") and path.parent.name != "ollama")
    if answer.pieces:
        assert sum(answer.pieces) == len(answer.message["content"])


@pytest.mark.parametrize(
    ("name", "stem", "usage"),
    [
        ("anthropic", "whole", Usage(25, 15)),
        ("anthropic", "cached_prefix", Usage(1225, 15, 1000, 200)),
        ("gemini", "whole", Usage(9, 11)),
        ("gemini", "thought", Usage(9, 41)),
        ("ollama", "whole", Usage(26, 12)),
        ("completions", "whole", Usage(9, 12)),
        ("responses", "whole", Usage(25, 15)),
    ],
)
def test_counters_are_read_as_they_are_billed(name: str, stem: str, usage: Usage) -> None:
    (path,) = (TRANSCRIPTS / name).glob(f"{stem}.*")
    assert recorded(path).usage == usage
    assert DIALECTS[name].find_usage(path.read_bytes()) == usage


@kept
def test_every_proper_prefix_is_not_storable(path: Path) -> None:
    raw = path.read_bytes().rstrip(b"\r\n")
    for cut in range(1, len(raw), 7):
        assert spoken(path).record(raw[:cut], is_stream=True, n=1).answer is None, raw[:cut][-60:]


# -- relay ------------------------------------------------------------------------------------------------------------


@named
@settings(max_examples=30)
@given(data=st.data())
def test_the_relay_passes_every_event_as_it_came_however_it_was_cut(path: Path, data: st.DataObject) -> None:
    raw = path.read_bytes()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=20)))
    relay = spoken(path).filter(wants_usage=True, n=1)
    passed = b"".join([*(relay.feed(raw[a:b]) for a, b in pairwise([0, *cuts, len(raw)])), relay.end()])
    assert relay.complete is ((path.parent.name, path.stem) not in INCOMPLETE)
    assert relay.failed is (path.stem == "error_mid_stream")
    if path.stem == "stop_without_reason":
        assert passed == raw[: raw.rindex(b"event: message_stop")]
    elif path.stem == "done_without_finish":
        assert passed == raw[: raw.rindex(b"data: [DONE]")]
    elif relay.complete or relay.failed:
        assert passed == raw
    else:
        assert raw.startswith(passed)


@given(raw=st.binary(max_size=300))
def test_garbage_is_never_an_answer_and_never_a_crash(raw: bytes) -> None:
    for dialect in DIALECTS.values():
        for is_stream in (False, True):
            assert dialect.record(raw, is_stream=is_stream, n=1).answer is None
        relay = dialect.filter(wants_usage=True, n=1)
        relay.feed(raw)
        relay.end()
        assert not relay.complete


# -- replay -----------------------------------------------------------------------------------------------------------


def replayed(dialect: Dialect, answer: Answer, *, stream: bool, token: str = "a" * 32) -> bytes:
    template = dialect.render(answer, stream=stream, wants_usage=True, usage_mode="original")
    return template.fill(token, 1_800_000_000)


def without_call_ids(answer: Answer) -> Answer:
    text = orjson.dumps([answer.message, answer.choice])
    for call in answer.message.get("tool_calls") or ():
        text = text.replace(call["id"].encode(), b"id")
    message, choice = orjson.loads(text)
    return replace(answer, message=message, choice=choice)


@kept
def test_a_replay_is_recorded_as_the_answer_it_came_from(path: Path) -> None:
    dialect, answer = spoken(path), recorded(path)
    for stream in (True, False):
        again = again_recorded(path, replayed(dialect, answer, stream=stream), is_stream=stream)
        kept = {name: value for name, value in answer.extra.items() if stream or name != COUNTED_LAST}
        expected = replace(answer, pieces=(), extra=kept)
        assert without_call_ids(replace(again, pieces=())) == without_call_ids(expected)
        if stream and answer.pieces:
            assert again.pieces == answer.pieces


@pytest.mark.parametrize("name", ["gemini", "ollama", "openai"])
def test_no_character_of_a_replay_ends_a_line_for_a_client_that_splits_at_unicodes_line_ends(name: str) -> None:
    answer = replace(made(PLAIN), message={"role": "assistant", "content": "a\u2028b\u2029c\x85d"})
    body = replayed(DIALECTS[name], answer, stream=True)
    assert body.endswith(b"\n")
    assert len(body.decode().splitlines()) == body.count(b"\n")


@kept
def test_no_two_replays_share_an_id(path: Path) -> None:
    dialect, answer = spoken(path), recorded(path)
    one, other = (replayed(dialect, answer, stream=True, token=token * 32) for token in "ab")
    if path.parent.name == "ollama" or path.stem in KEPT_UPSTREAM:
        assert one == other or path.parent.name == "ollama"  # which has none
        return
    assert one != other
    assert one.replace(b"a" * 22, b"b" * 22) != one


# -- one answer, every dialect ----------------------------------------------------------------------------------------

CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
PLAIN = {"role": "assistant", "content": CONTENT}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def made(message: Mapping[str, Any], dialect: str = "openai", **fields: Any) -> Answer:
    usage = Usage(20, 7, 4, 0)
    raw = {"prompt_tokens": 20, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}
    known = {"usage": usage, "raw_usage": raw, "dialect": dialect}
    known["finish_reason"] = "tool_calls" if message.get("tool_calls") else "stop"
    return Answer(message, model="m", **{**known, **fields})


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("message", [PLAIN, CALLING], ids=["text", "call"])
def test_an_answer_of_openai_is_said_in_every_dialect(name: str, message: Mapping[str, Any]) -> None:
    dialect, answer = DIALECTS[name], made(message)
    assert dialect.expresses(answer, has_stops=False)
    for stream in (True, False):
        again = dialect.record(replayed(dialect, answer, stream=stream), is_stream=stream, n=1).answer
        assert again is not None
        assert again.message.get("content") == message["content"]
        assert [c["function"] for c in again.message.get("tool_calls", ())] == [
            c["function"] for c in message.get("tool_calls", ())
        ]
        assert again.usage is not None
        assert (again.usage.input_tokens, again.usage.output_tokens) == (20, 7)


@kept
@pytest.mark.parametrize("name", CHATS)
def test_an_answer_is_said_in_another_dialect_whole_or_not_at_all(name: str, path: Path) -> None:
    dialect, answer = DIALECTS[name], recorded(path)
    if path.parent.name == name or path.stem == "generate":
        return
    if not dialect.expresses(answer, has_stops=False):
        assert answer.opaque or answer.choice or path.stem == "thinking"
        return
    for stream in (True, False):
        again = dialect.record(replayed(dialect, answer, stream=stream), is_stream=stream, n=1).answer
        assert again is not None
        assert again.message["content"] == answer.message["content"]
        assert again.usage == answer.usage or name != "openai"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("anthropic", made({**PLAIN, "reasoning_content": "hm"})),
        ("gemini", made({**PLAIN, "reasoning_content": "hm"})),
        ("anthropic", made(PLAIN, usage=None)),  # its clients need the counters
        ("anthropic", made({**CALLING, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]})),
        ("gemini", made({**CALLING, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]})),
        ("ollama", made({**CALLING, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]})),
        ("ollama", made(PLAIN, choice={"logprobs": {"content": []}})),
        ("openai", made(PLAIN, "anthropic", choice={"content": [{"type": "thinking"}]}, opaque=True)),
        ("ollama", made(PLAIN, "anthropic", opaque=True)),
        ("responses", made({**PLAIN, "reasoning_content": "hm"})),
        ("responses", made(PLAIN, "anthropic", opaque=True)),
        ("completions", made(PLAIN)),
    ],
)
def test_what_a_dialect_cannot_say_is_not_said(name: str, answer: Answer) -> None:
    assert not DIALECTS[name].expresses(answer, has_stops=False)


def test_an_answer_that_is_to_be_kept_upstream_is_nobody_elses() -> None:
    dialect = DIALECTS["responses"]
    assert dialect.expresses(made(PLAIN), has_stops=False)
    assert not dialect.expresses(made(PLAIN), has_stops=False, keeps_id=True)
    assert dialect.expresses(made(PLAIN, "responses"), has_stops=False, keeps_id=True)


def test_which_stop_ended_a_text_is_not_made_up() -> None:
    assert not DIALECTS["anthropic"].expresses(made(PLAIN), has_stops=True)
    assert DIALECTS["openai"].expresses(made(PLAIN, "anthropic", finish_reason="stop_sequence"), has_stops=True)


# -- one question, every dialect --------------------------------------------------------------------------------------

IMAGE = "iVBORw0KGgo="
TOOL = {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}
ASKED: Mapping[str, tuple[dict[str, Any] | None, ...]] = {
    "plain": (
        {"messages": [{"role": "user", "content": "Why?"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], "max_tokens": 1024},
        {"contents": [{"role": "user", "parts": [{"text": "Why?"}]}]},
        {"messages": [{"role": "user", "content": "Why?"}], "keep_alive": "5m"},
        {"input": "Why?", "store": False},
    ),
    "system and sampling": (
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
            "temperature": 0, "top_p": 0.5, "stop": "END", "max_completion_tokens": 99, "stream": True,
        },
        {
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": "Why?"}],
            "temperature": 0.0, "top_p": 0.5, "stop_sequences": ["END"], "max_tokens": 99,
        },
        {
            "system_instruction": {"parts": [{"text": "Be brief."}]},
            "contents": [{"parts": [{"text": "Why?"}]}],
            "generation_config": {"temperature": 0, "top_p": 0.5, "stop_sequences": ["END"], "max_output_tokens": 99},
        },
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
            "options": {"temperature": 0, "top_p": 0.5, "stop": ["END"], "num_predict": 99},
        },
        None,  # knows no stop
    ),
    "earlier turns": (
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
        {"contents": [{"role": r, "parts": [{"text": c}]} for r, c in (("user", "a"), ("model", "b"), ("user", "c"))]},
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
        {"input": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))],
         "store": False},
    ),
}  # fmt: skip
IN_ORDER = ("openai", "anthropic", "gemini", "ollama", "responses")
ASKED_PLAINLY = {**dict(zip(IN_ORDER, ASKED["plain"], strict=True)), "completions": {"prompt": "Why?"}}


def digest(name: str, body: Mapping[str, Any]) -> bytes:
    facts = DIALECTS[name].read({"model": "m", **body}, model="m" if name == "gemini" else "")
    scope = scope_of(facts, tenant="t", upstream="u", operation=DIALECTS[name].operation)
    return fingerprint_of(scope, facts.prompt)


@pytest.mark.parametrize("case", sorted(ASKED))
def test_one_question_has_one_fingerprint_in_every_dialect(case: str) -> None:
    bodies = dict(zip(IN_ORDER, ASKED[case], strict=True))
    assert len({digest(name, body) for name, body in bodies.items() if body is not None}) == 1


def test_images_and_tools_are_the_same_question_in_openai_and_anthropic() -> None:
    text = {"type": "text", "text": "What is this?"}
    source = {"type": "base64", "media_type": "image/png", "data": IMAGE}
    openai = {
        "messages": [
            {
                "role": "user",
                "content": [text, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}],
            }
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": "required",
    }
    schema = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}
    anthropic = {
        "messages": [{"role": "user", "content": [text, {"type": "image", "source": source}]}],
        "tools": [schema],
        "tool_choice": {"type": "any"},
        "max_tokens": 10,
    }
    assert digest("openai", openai) == digest("anthropic", anthropic)


CHANGES: Mapping[str, Mapping[str, Any]] = {
    "anthropic": {
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "temperature": 0.5, "top_k": 5, "top_p": 0.5,
        "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "auto"}, "system": "x",
        "stop_sequences": ["x"], "output_config": {"effort": "low"}, "speed": "fast", "service_tier": "auto",
        "inference_geo": "eu", "mcp_servers": [{}], "container": "c", "context_management": {}, "novel": 1,
        "diagnostics": {}, "metadata": {"user_id": "u"},
    },
    "gemini": {
        "systemInstruction": "x", "generationConfig": {"temperature": 0.5}, "tools": [{"googleSearch": {}}],
        "toolConfig": {}, "safetySettings": [{}], "cachedContent": "cachedContents/x", "novel": 1,
    },
    "ollama": {
        "options": {"mirostat": 1}, "format": "json", "tools": [{}], "think": True, "logprobs": True,
        "top_logprobs": 2, "novel": 1,
    },
    "completions": {
        "suffix": "x", "echo": True, "logprobs": 0, "best_of": 2, "n": 2, "temperature": 0.5, "top_p": 0.5, "seed": 1,
        "stop": "x", "logit_bias": {"1": 1}, "frequency_penalty": 1, "presence_penalty": 1, "user": "u", "novel": 1,
        "prompt": ["Why?", "How?"],
    },
    "responses": {
        "instructions": "x", "temperature": 0.5, "top_p": 0.5, "tools": [{"type": "function", "name": "f"}],
        "tool_choice": "none", "parallel_tool_calls": False, "text": {"verbosity": "low"},
        "reasoning": {"effort": "low"}, "include": ["x"], "truncation": "auto", "store": True, "service_tier": "flex",
        "max_tool_calls": 1, "context_management": [{"type": "compaction"}], "top_logprobs": 1, "prompt": {"id": "p"},
        "moderation": {}, "metadata": {"user_id": "u"}, "prompt_cache_options": {"prewarm": True}, "user": "u",
        "novel": 1, "access_programs": {}, "image": {},
    },
}  # fmt: skip
UNTOLD: Mapping[str, Mapping[str, Any]] = {
    "anthropic": {"stream": True, "metadata": {}, "cache_control": {"type": "ephemeral"}, "max_tokens": 7,
                  "cache": {}},
    "gemini": {"labels": {"a": "b"}, "generationConfig": {"maxOutputTokens": 7}, "cache": {}},
    "ollama": {"stream": False, "keep_alive": "5m", "options": {"num_predict": 7}, "cache": {}},
    "completions": {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 7, "cache": {},
                    "prompt": ["Why?"]},
    "responses": {
        "stream": True, "stream_options": {"include_obfuscation": False}, "metadata": {"run": "7"}, "cache": {},
        "max_output_tokens": 7, "prompt_cache_key": "k", "prompt_cache_options": {"ttl": "30m"},
        "prompt_cache_retention": "24h", "text": {"format": {"type": "text"}}, "background": False,
        "input": [{"type": "message", "role": "user", "id": "msg_1", "status": "completed", "content": [
            {"type": "input_text", "text": "Why?", "prompt_cache_breakpoint": {"mode": "explicit"}}]}],
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, fields in CHANGES.items() for f in fields])
def test_every_field_that_may_change_an_answer_keeps_requests_apart(name: str, field: str) -> None:
    body = ASKED_PLAINLY[name]
    assert body is not None
    assert digest(name, {**body, field: CHANGES[name][field]}) != digest(name, body)


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, fields in UNTOLD.items() for f in fields])
def test_delivery_is_not_part_of_the_question(name: str, field: str) -> None:
    body = ASKED_PLAINLY[name]
    assert body is not None
    assert digest(name, {**body, field: UNTOLD[name][field]}) == digest(name, body)


# -- bad input, errors, paths -----------------------------------------------------------------------------------------

BAD = [
    ("anthropic", {"messages": []}, "messages"),
    ("anthropic", {"messages": [3]}, "messages.0"),
    ("anthropic", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ("anthropic", {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type"),
    ("anthropic", {"messages": [{"role": "user", "content": "x"}], "max_tokens": "5"}, "max_tokens"),
    ("anthropic", {"messages": [{"role": "user", "content": "x"}], "system": [3]}, "system.0"),
    ("gemini", {"contents": []}, "contents"),
    ("gemini", {"contents": [3]}, "contents[0]"),
    ("gemini", {"contents": [{"parts": 3}]}, "contents[0].parts"),
    ("gemini", {"contents": [{"parts": []}], "systemInstruction": 3}, "systemInstruction"),
    ("ollama", {"messages": []}, "messages"),
    ("ollama", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ("ollama", {"messages": [{"role": "user"}], "options": 3}, "options"),
    ("completions", {"prompt": 3}, "prompt"),
    ("completions", {"prompt": "x", "echo": 1}, "echo"),
    ("completions", {"prompt": "x", "best_of": True}, "best_of"),
    ("responses", {"input": 3}, "input"),
    ("responses", {"input": [3]}, "input[0]"),
    ("responses", {"input": [{"type": 3}]}, "input[0].type"),
    ("responses", {"input": [{"role": 3}]}, "input[0].role"),
    ("responses", {"input": [{"role": "user"}]}, "input[0].content"),
    ("responses", {"input": [{"role": "user", "content": [3]}]}, "input[0].content[0]"),
    ("responses", {"input": [{"role": "user", "content": [{}]}]}, "input[0].content[0].type"),
    ("responses", {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ("responses", {"input": "x", "text": "json"}, "text"),
    ("responses", {"input": "x", "store": 1}, "store"),
]


@pytest.mark.parametrize(("name", "body", "param"), BAD)
def test_a_body_no_server_could_read_is_refused_by_its_parameter(name: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        DIALECTS[name].read({"model": "m", **body}, model="m" if name == "gemini" else "")
    assert (caught.value.code, caught.value.param) == ("invalid_type", param)
    assert param.encode() in DIALECTS[name].error_body(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "parts", "source", "input_schema", "name", "x", "format",
                         "strict", "image_url"]), inner,
        max_size=3),
    max_leaves=12,
)  # fmt: skip
fields = st.sampled_from(
    sorted({*(name for told in CHANGES.values() for name in told), "messages", "contents", "options", "input"})
)


@settings(max_examples=300)
@given(body=st.dictionaries(fields, json_values, max_size=5))
def test_any_json_is_read_or_refused(body: dict[str, Any]) -> None:
    for name, dialect in (*DIALECTS.items(), ("generate", ROUTES.find("/api/generate").dialect)):
        assert dialect is not None
        try:
            facts = dialect.read({"model": "m", **body}, model="m" if name == "gemini" else "")
        except BadRequest:
            continue
        scope_of(facts, tenant="t", upstream="u", operation=dialect.operation)


def test_errors_are_said_in_the_clients_dialect() -> None:
    error = Busy("Full.")
    said = {name: json.loads(dialect.error_body(error, "r1")) for name, dialect in DIALECTS.items()}
    assert said["openai"]["error"]["type"] == "server_error"
    assert (said["anthropic"]["type"], said["anthropic"]["error"]["type"]) == ("error", "overloaded_error")
    assert said["anthropic"]["request_id"] == "r1"
    assert (said["gemini"]["error"]["code"], said["gemini"]["error"]["status"]) == (503, "UNAVAILABLE")
    assert said["ollama"]["error"] == "Full."
    assert said["responses"] == said["completions"] == said["openai"]


@pytest.mark.parametrize(
    ("path", "query", "family", "model", "stream"),
    [
        ("/v1/chat/completions", "", "openai", "", False),
        ("/chat/completions", "", "openai", "", False),
        ("/openai/deployments/gpt-4o/chat/completions", "?api-version=1", "openai", "gpt-4o", False),
        ("/openai/v1/chat/completions", "", "openai", "", False),
        ("/v1/responses", "", "responses", "", False),
        ("/responses", "", "responses", "", False),
        ("/v1/v1/responses", "", "responses", "", False),
        ("/openai/v1/responses", "", "responses", "", False),
        ("/openai/responses", "?api-version=1", "responses", "", False),
        ("/v1/responses/resp_1", "", None, "", False),
        ("/v1/responses/input_tokens", "", None, "", False),
        ("/v1/completions", "", "completions", "", False),
        ("/completions", "", "completions", "", False),
        ("/openai/v1/completions", "", "completions", "", False),
        ("/openai/deployments/instruct/completions", "?api-version=1", "completions", "instruct", False),
        ("/v1/messages", "?beta=true", "anthropic", "", False),
        ("/v1beta/models/gemini-3:generateContent", "", "gemini", "gemini-3", False),
        ("/v1/models/gemini-3:streamGenerateContent", "?alt=sse&key=k", "gemini", "gemini-3", True),
        ("/v1/models/gemini-3:streamGenerateContent", "", None, "", False),
        ("/api/chat", "", "ollama", "", False),
        ("/v1/messages/count_tokens", "", None, "", False),
        ("/v1/models", "", None, "", False),
    ],
)
def test_paths_lead_to_their_dialect(path: str, query: str, family: str | None, model: str, stream: bool) -> None:
    route = ROUTES.find(path, query)
    assert (route.dialect.name if route.dialect else None, route.model, route.stream) == (family, model, stream)
    assert "key" not in route.scope_query
    assert "alt" not in route.scope_query


def test_every_key_in_the_query_is_found_and_decoded_however_it_is_spelled() -> None:
    assert keys_in("?alt=sse&key=a%2Bb") == (b"a+b",)
    assert keys_in("?key=a&k%65y=b&key=") == (b"a", b"b")
    assert keys_in("?monkey=1") == keys_in("") == keys_in("?key") == ()
    assert without_key("?k%65y=a&alt=sse&key=b&key") == "?alt=sse"
    assert without_key("?key=a") == without_key("") == ""


def test_where_paths_coincide_the_version_header_decides() -> None:
    assert family_of("/v1/models", {}) == "openai"
    assert family_of("/v1/models", {"anthropic-version": "2026-10-21"}) == "anthropic"
    assert family_of("/v1beta/models", {}) == family_of("/v1/models", {"x-goog-api-key": "k"}) == "gemini"
    assert family_of("/api/tags", {}) == "ollama"


def test_times_are_spelled_as_rfc_3339() -> None:
    assert rfc3339(1_800_000_000) == "2027-01-15T08:00:00Z"
