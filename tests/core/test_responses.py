"""OpenAI Responses: what is read from a request, what is kept of an answer, and what a replay says event by event."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy.core.answer import decode_answer, encode_answer
from proxy.core.dialects.anthropic import Messages
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.dialects.responses import Responses, read
from proxy.core.dialects.responses_filter import ResponseFilter
from proxy.core.errors import UpstreamError
from proxy.core.fingerprint import fingerprint_of, scope_of
from proxy.core.model import Answer, Usage

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts" / "responses"
DIALECT = Responses(orjson.loads)
USER = {"role": "user", "content": "Why?"}
TOOL = {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"name": "city", "strict": True, "schema": {"type": "object"}}


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": "Why?", **fields}


def digest(dialect: Any, body: dict[str, Any]) -> bytes:
    facts = dialect.read({"model": "m", **body})
    return fingerprint_of(scope_of(facts, tenant="t", upstream="u", operation=dialect.operation), facts.prompt)


def recorded(stem: str, *, keeps_id: bool | None = None) -> Answer:
    raw, keeps = (TRANSCRIPTS / f"{stem}.sse").read_bytes(), stem.startswith("kept") if keeps_id is None else keeps_id
    answer = DIALECT.record(raw, is_stream=True, n=1, keeps_id=keeps).answer
    assert answer is not None
    return answer


def replayed(answer: Answer, *, stream: bool, token: str = "a" * 32, mode: Any = "original") -> bytes:
    template = DIALECT.render(answer, stream=stream, wants_usage=True, usage_mode=mode)
    return template.fill(token, 1_800_000_000)


def events(raw: bytes) -> list[dict[str, Any]]:
    """The data of every event, each of which bears its type as a name too."""
    found = []
    for block in raw.split(b"\n\n")[:-1]:
        name, data = block.split(b"\n")
        found.append(json.loads(data.removeprefix(b"data: ")))
        assert name == b"event: " + found[-1]["type"].encode()
    return found


# -- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "fact", "value"),
    [
        ({}, "keeps_id", True),
        ({"store": None}, "keeps_id", True),
        ({"store": True}, "keeps_id", True),
        ({"store": True}, "store", False),
        ({"store": False}, "keeps_id", False),
        ({"previous_response_id": "resp_1"}, "previous_response", True),
        ({"previous_response_id": None}, "previous_response", False),
        ({"conversation": "conv_1"}, "previous_response", True),
        ({"conversation": {"id": "conv_1"}}, "previous_response", True),
        ({"input": [USER, {"id": "msg_1"}]}, "previous_response", True),
        ({"input": [USER, {"type": "item_reference", "id": "msg_1"}]}, "previous_response", True),
        ({"background": True}, "background", True),
        ({"background": False}, "background", False),
        ({"prompt": {"id": "pmpt_1"}}, "remote_urls", True),
        ({"tools": [{"type": "function", "name": "f"}]}, "has_tools", True),
        ({"tools": [{"type": "function", "name": "f"}]}, "web_search", False),
        ({"tools": [{"type": "custom", "name": "f"}]}, "web_search", False),
        *(({"tools": [{"type": kind}]}, "web_search", True) for kind in ("web_search", "file_search", "odd", None)),
        *(({"tools": [{"type": kind}]}, "web_search", False) for kind in ("mcp", "code_interpreter", "computer",
          "image_generation", "local_shell")),
        ({"input": [USER, {"type": "function_call", "call_id": "c"}]}, "tool_results", True),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]}, "tool_results", True),
        ({"input": [{"type": "web_search_call", "id": "w"}, USER]}, "tool_results", True),
        ({"input": [{"type": "mcp_approval_response"}, USER]}, "tool_results", True),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}, USER]}, "tool_results", False),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}, USER]}, "unknown", ()),
        ({"input": [{"type": "hologram"}, USER]}, "unknown", ("input[0].type",)),
        ({"input": [{**USER, "aura": 1}]}, "unknown", ("input[0].aura",)),
        ({"input": [{"role": "wizard", "content": "x"}]}, "unknown", ("input[0].role",)),
        ({"input": [{"role": "user", "content": [{"type": "smell"}]}]}, "unknown", ("input[0].content[0]",)),
        ({"brand_new": 1}, "unknown", ("brand_new",)),
        ({"top_logprobs": 2}, "logprobs", True),
        ({"include": ["message.output_text.logprobs"]}, "logprobs", True),
        ({"include": ["reasoning.encrypted_content"]}, "opaque", True),
        ({"text": {"format": {"type": "json_object"}}}, "response_format", "json_object"),
        ({"max_output_tokens": 7}, "output_limit", 7),
        ({"safety_identifier": "ann", "user": "bob"}, "end_user", '["bob", "ann"]'),
        ({"instructions": "Be brief."}, "first_turn", True),
        ({"input": [USER, {"role": "assistant", "content": "x"}, USER]}, "first_turn", False),
        ({"input": None}, "prompt", None),
        ({"input": [USER, {"role": "assistant", "content": "x"}]}, "prompt", None),
    ],
)  # fmt: skip
def test_each_field_is_seen(fields: dict[str, Any], fact: str, value: object) -> None:
    assert getattr(read(asked(**fields)), fact) == value


@pytest.mark.parametrize(
    ("part", "facts"),
    [
        ({"type": "input_image", "image_url": "data:image/png;base64,AA"}, {"has_images"}),
        ({"type": "input_image", "image_url": "https://example.org/a.png"}, {"has_images", "remote_urls"}),
        ({"type": "input_image", "file_id": "file_1"}, {"has_images"}),
        ({"type": "input_file", "file_url": "https://example.org/a.pdf"}, {"has_files", "remote_urls"}),
        ({"type": "input_file", "file_data": "AA"}, {"has_files"}),
        ({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}, {"has_audio"}),
    ],
)
def test_each_kind_of_content_is_seen(part: dict[str, Any], facts: set[str]) -> None:
    facts_read = read(asked(input=[{"role": "user", "content": [{"type": "input_text", "text": "x"}, part]}]))
    kinds = ("has_images", "has_files", "has_audio", "remote_urls")
    assert {name for name in kinds if getattr(facts_read, name)} == facts


@pytest.mark.parametrize("told", [("error", "incomplete_details"), ("error",), ()])
def test_a_replay_says_no_null_that_the_upstream_left_out(told: tuple[str, ...]) -> None:
    """llama.cpp leaves out both; JavaScript's clients show the difference."""
    part = {"type": "output_text", "annotations": [], "text": "Because."}
    item = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
    usage = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
    whole = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "m"}
    raw = orjson.dumps({**whole, "output": [item], "usage": usage, **dict.fromkeys(told)})
    answer = DIALECT.record(raw, is_stream=False, n=1, keeps_id=True).answer
    assert answer is not None
    assert json.loads(replayed(answer, stream=False)).keys() == orjson.loads(raw).keys()
    ends = [event["response"] for event in events(replayed(answer, stream=True)) if "response" in event]
    assert {name for end in ends for name in end if name in ("error", "incomplete_details")} == set(told)


URL = "data:image/png;base64,AA"
SAME = [
    (
        {"instructions": "Be brief.", "temperature": 0, "top_p": 0.5, "parallel_tool_calls": False},
        {"messages": [{"role": "system", "content": "Be brief."}, USER], "temperature": 0.0, "top_p": 0.5,
         "parallel_tool_calls": False},
    ),
    (
        {"tools": [{"type": "function", **TOOL, "strict": False}], "tool_choice": {"type": "function", "name": "f"}},
        {"messages": [USER], "tools": [{"type": "function", "function": TOOL}],
         "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ),
    (
        {"tools": [{"type": "function", **TOOL, "strict": True}], "tool_choice": "required"},
        {"messages": [USER], "tools": [{"type": "function", "function": {**TOOL, "strict": True}}],
         "tool_choice": "required"},
    ),
    (
        {"text": {"format": {"type": "json_schema", **SCHEMA}, "verbosity": "low"}},
        {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": SCHEMA}, "verbosity": "low"},
    ),
    (
        {"text": {"format": {"type": "json_object"}}},
        {"messages": [USER], "response_format": {"type": "json_object"}},
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Why?"},
                                                {"type": "input_image", "image_url": URL, "detail": "auto"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"},
                                                   {"type": "image_url", "image_url": {"url": URL}}]}]},
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Why?"},
                                                {"type": "input_file", "filename": "a", "file_data": "AA"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"},
                                                   {"type": "file", "file": {"filename": "a", "file_data": "AA"}}]}]},
    ),
    (
        {"input": [USER, {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "Because.", "annotations": [], "logprobs": []}]}, USER]},
        {"messages": [USER, {"role": "assistant", "content": "Because."}, USER]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "chat"), SAME)
def test_what_means_the_same_in_chat_is_the_same_question(body: dict[str, Any], chat: dict[str, Any]) -> None:
    assert digest(DIALECT, {"input": "Why?", "store": False, **body}) == digest(OpenAIChat(), chat)
    assert digest(DIALECT, {"input": "Why?", **body}) != digest(OpenAIChat(), chat)  # which keeps nothing upstream


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", **TOOL}]},  # an absent `strict` is another default
        {"text": {"format": {"type": "json_schema", "name": "city", "schema": {}}}},
        {"reasoning": {"effort": "low"}},
        {"input": [{**USER, "phase": "commentary"}]},
        {"input": [{**USER, "status": "incomplete"}]},
    ],
)
def test_what_may_mean_something_else_keeps_its_form(fields: dict[str, Any]) -> None:
    assert digest(DIALECT, asked(store=False, **fields)) != digest(DIALECT, asked(store=False))


def test_another_dialects_unknown_field_finds_no_answer_that_is_kept_upstream() -> None:
    other = Messages()
    body = {"messages": [USER], "max_tokens": 9, "store": True}
    assert digest(other, body) == digest(DIALECT, asked())  # the same scope, and so `expresses` must say no
    assert not DIALECT.expresses(replace(recorded("whole"), dialect="anthropic"), has_stops=False, keeps_id=True)


def test_only_what_is_meant_for_the_proxy_is_taken_out() -> None:
    raw = b'{"model":"m","cache":{"ttl":3},"stream":true,"input":"x"}'
    assert DIALECT.forward_body(raw, json.loads(raw)) == b'{"model":"m","stream":true,"input":"x"}'


# -- record -----------------------------------------------------------------------------------------------------------


def test_an_answer_kept_upstream_keeps_its_ids() -> None:
    (kept,) = {replayed(recorded("kept"), stream=True, token=token * 32) for token in "ab"}
    first, last = events(kept)[0]["response"], events(kept)[-1]["response"]
    assert first["id"] == last["id"] == "resp_67ccd2bed1ec8190b14f964abc054267"
    assert first["created_at"] == 1741476542
    assert last["output"][0]["id"] == "msg_67ccd2bf17f0819081ff3bb2cf6508e6"
    call = json.loads(replayed(recorded("kept_call"), stream=False))["output"][0]
    assert (call["id"], call["call_id"]) == ("fc_67ca09c6bedc8190a7abfec07b1a1332", "call_unLAR8MvFNptuiZK6K6HCy5k")


def test_an_answer_that_is_not_kept_has_new_ids_everywhere() -> None:
    for stem in ("whole", "function_call", "thinking", "phase"):
        answer = recorded(stem)
        assert b"67ccd2b" not in encode_answer(answer)
        one, other = (replayed(answer, stream=True, token=token * 32) for token in "ab")
        assert one.replace(b"a" * 24, b"").replace(b"a" * 8, b"") == other.replace(b"b" * 24, b"").replace(
            b"b" * 8, b""
        )
        ids = {event["item_id"] for event in events(one) if "item_id" in event}
        items = events(one)[-1]["response"]["output"]
        assert ids <= {item["id"] for item in items}
        assert len({item["id"] for item in items}) == len(items)
        assert "\ue000" not in one.decode()
    call = json.loads(replayed(recorded("function_call"), stream=False))["output"][0]
    assert call["call_id"].startswith("call_aaaa")
    assert call["id"].startswith("fc_aaaa")


@pytest.mark.parametrize(
    ("stem", "keeps_id", "is_kept"),
    [
        ("kept", True, True),
        ("kept_without_word", True, True),  # a server that says nothing of keeping may keep
        ("whole", True, False),  # an account for which nothing is ever kept
        ("kept_without_word", False, False),
        ("whole", False, False),
    ],
)
def test_what_is_kept_takes_the_request_and_the_upstream(stem: str, keeps_id: bool, is_kept: bool) -> None:
    said = replayed(recorded(stem, keeps_id=keeps_id), stream=False)
    assert (b"resp_67ccd2bed1ec8190b14f964abc054267" in said) is is_kept
    assert (b"msg_67ccd2bf17f0819081ff3bb2cf6508e6" in said) is is_kept


def test_what_one_request_alone_said_is_not_told_to_the_next() -> None:
    whole = json.loads(replayed(recorded("whole"), stream=False))
    assert (whole["metadata"], whole["max_output_tokens"], whole["prompt_cache_key"]) == ({}, None, None)
    assert whole["text"] == {"format": {"type": "text"}, "verbosity": "medium"}


def test_items_that_say_nothing_more_do_not_keep_an_answer_from_chat() -> None:
    assert OpenAIChat().expresses(recorded("phase"), has_stops=False)
    assert OpenAIChat().expresses(recorded("function_call"), has_stops=False)
    for stem in ("thinking", "summary", "annotations"):
        assert not OpenAIChat().expresses(recorded(stem), has_stops=False)


def test_the_end_mark_of_other_servers_is_no_event() -> None:
    raw = (TRANSCRIPTS / "whole.sse").read_bytes()
    assert DIALECT.record(raw + b"data: [DONE]\n\n", is_stream=True, n=1).answer == recorded("whole")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "in_progress"}, "truncated"),
        ({"status": "queued"}, "truncated"),
        ({"status": "cancelled"}, "error_object"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "finish_length"),
        ({"status": "incomplete", "incomplete_details": None}, "finish_other"),
        ({"status": None}, "garbage"),
        ({"error": {"code": "x", "message": "x"}}, "error_object"),
        ({"output": None}, "garbage"),
        ({"output": [3]}, "garbage"),
        ({"output": []}, "empty"),
        ({"output": [{"type": "message", "content": [{"type": "output_text"}]}]}, "garbage"),
        ({"output": [{"type": "message", "content": [{"type": "output_text", "text": " "}]}]}, "empty"),
        ({"output": [{"type": "message", "content": [{"type": "output_audio", "text": "x"}]}]}, "provider_tools"),
        ({"output": [{"type": "message", "status": "in_progress", "content": []}]}, "truncated"),
        ({"output": [{"type": "message", "content": [{"type": "output_text", "text": "x", "logprobs": [{}]}]}]},
         "logprobs"),
        ({"output": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "tool_calls"),
        ({"output": [{"type": "image_generation_call", "result": "AA"}]}, "provider_tools"),
        ({"model": None}, "garbage"),
        ({"usage": 3}, "garbage"),
        ({"usage": None}, ""),
    ],
)  # fmt: skip
def test_only_a_completed_response_is_storable(change: dict[str, Any], reason: str) -> None:
    whole = json.loads(replayed(recorded("whole"), stream=False))
    for dialect in (DIALECT, Responses()):
        recording = dialect.record(json.dumps({**whole, **change}).encode(), is_stream=False, n=1)
        assert recording.refusal_reason == reason


def test_an_answer_survives_the_store() -> None:
    for path in TRANSCRIPTS.glob("*.sse"):
        answer = DIALECT.record(path.read_bytes(), is_stream=True, n=1).answer
        if answer is not None:
            assert decode_answer(encode_answer(answer)) == answer


def test_a_local_server_is_read_that_numbers_nothing() -> None:
    """llama.cpp: no `sequence_number`, no `output_index`, a response without what it repeats of the request."""
    answer = recorded("llama_cpp")
    assert (answer.usage, answer.choice) == (Usage(33, 25, 32), {})
    assert answer.message["content"] == "".join(piece["delta"] for piece in events(
        (TRANSCRIPTS / "llama_cpp.sse").read_bytes()) if "delta" in piece)  # fmt: skip
    replay = events(replayed(answer, stream=True))
    assert [event["sequence_number"] for event in replay] == list(range(len(replay)))
    assert ResponseFilter().number == -1


# -- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["whole", "kept", "annotations", "function_call", "thinking", "phase"])
def test_a_replay_tells_the_events_of_the_original_in_their_order(stem: str) -> None:
    raw = (TRANSCRIPTS / f"{stem}.sse").read_bytes()
    replay = events(replayed(recorded(stem), stream=True))
    assert [event["sequence_number"] for event in replay] == list(range(len(replay)))

    def without_cuts(told: list[dict[str, Any]]) -> list[str]:
        kinds = [event["type"] for event in told]
        return [kind for i, kind in enumerate(kinds) if not kind.endswith(".delta") or kinds[i - 1] != kind]

    assert without_cuts(replay) == without_cuts(events(raw))
    for event, original in zip(replay, events(raw), strict=False):
        if stem in ("whole", "kept", "annotations"):  # cut as it was
            told = event.keys() | {"obfuscation"} if event["type"].endswith(".delta") else event.keys()
            assert told == original.keys()
            assert {name: event[name] for name in ("delta", "text", "annotation") if name in event} == {
                name: original[name] for name in ("delta", "text", "annotation") if name in original
            }
    if stem == "kept":
        said, meant = replay[-1]["response"], events(raw)[-1]["response"]
        assert said == {**meant, "metadata": {}, "max_output_tokens": None, "prompt_cache_key": None}
        assert said.keys() == meant.keys()


def test_counters_are_zeroed_on_demand() -> None:
    whole = json.loads(replayed(recorded("whole"), stream=False, mode="zero"))
    assert whole["usage"]["input_tokens"] == whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 0


# -- relay ------------------------------------------------------------------------------------------------------------


def test_an_error_of_ours_is_the_next_event() -> None:
    relay = ResponseFilter()
    raw = (TRANSCRIPTS / "without_completed.sse").read_bytes()
    relay.feed(raw + b": ping\n\n")
    assert relay.number == events(raw)[-1]["sequence_number"]
    error = UpstreamError("The upstream broke off.", code="upstream_incomplete")
    (said,) = events(DIALECT.stream_error(error, after=relay.number))
    assert said["sequence_number"] == relay.number + 1
    assert (said["type"], said["code"], said["message"]) == ("error", "upstream_incomplete", "The upstream broke off.")
    assert said["param"] is None
    assert said["error"]["code"] == "upstream_incomplete"  # what the SDKs raise on


def test_an_error_before_any_event_is_the_first() -> None:
    (said,) = events(DIALECT.stream_error(UpstreamError("x", code="x"), after=ResponseFilter().number))
    assert said["sequence_number"] == 0


def test_text_that_names_an_end_is_not_one() -> None:
    relay = ResponseFilter()
    text = {"type": "response.output_text.delta", "delta": '"type":"response.completed" "error"', "sequence_number": 4}
    relay.feed(b"event: response.completed\ndata: " + json.dumps(text).encode() + b"\n\n")
    assert (relay.complete, relay.failed, relay.number) == (False, False, 4)


def test_a_made_image_passes_in_one_event() -> None:
    relay = ResponseFilter()
    event = b'data: {"type":"response.completed","response":{"x":"' + b"x" * (3 << 20) + b'"}}\n\n'
    assert relay.feed(event) == event
    assert relay.complete
