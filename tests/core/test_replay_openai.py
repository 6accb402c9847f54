"""A stream is stored only when it is whole and understood, and a replay is read back as the answer it came from."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.dialects.openai_filter import UsageFilter
from proxy.core.dialects.openai_record import Recorder, read_usage, read_whole
from proxy.core.dialects.openai_replay import render_stream, render_whole, split
from proxy.core.eventstream import LINE_LIMIT_BYTES, EventDecoder
from proxy.core.model import Answer, Usage

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
PATHS = sorted(TRANSCRIPTS.glob("*.sse"))
CONTENT = "Paris is the capital of France. \U0001f5fc e\u0301t\u2028end"
REFUSED = {
    "after_done": "data_after_done",
    "content_filter": "finish_content_filter",
    "cut_mid_event": "truncated",
    "done_without_finish": "truncated",
    "error_mid_stream": "error_event",
    "garbage": "garbage",
    "length": "finish_length",
    "named_event": "unknown_event",
    "refusal": "refusal",
    "two_choices": "choices",
    "two_choices_one_open": "choices",
    "without_done": "truncated",
}
INCOMPLETE = {"cut_mid_event", "done_without_finish", "error_mid_stream", "two_choices_one_open"}


def record(raw: bytes, loads=orjson.loads, cuts=()) -> Answer | str:
    recorder = Recorder(loads=loads)
    for a, b in pairwise([0, *cuts, len(raw)]):
        recorder.feed(raw[a:b])
    return recorder.finish()


def choices_of(path: Path) -> int:
    return 2 if path.stem.startswith("two_choices") else 1


@pytest.mark.parametrize("loads", [json.loads, orjson.loads], ids=["json", "orjson"])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_only_a_whole_understood_stream_is_storable(path, loads):
    answer = record(path.read_bytes(), loads)
    if path.stem in REFUSED:
        assert answer == REFUSED[path.stem]
        return
    assert isinstance(answer, Answer)
    if path.stem == "tool_calls":
        (call,) = answer.message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
            "get_weather",
            {"location": "Paris"},
        )
        return
    assert answer.message["content"] == CONTENT
    assert sum(answer.pieces) == len(CONTENT)
    assert answer.pieces[:3] == (5, 3, 4)
    assert answer.finish_reason == "stop"
    assert answer.model == "gpt-4o-mini-2024-07-18"
    assert answer.extra["system_fingerprint"] == "fp_44709d6fcb"
    assert "obfuscation" not in answer.extra


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
@given(data=st.data())
def test_recording_does_not_depend_on_cuts(path, data):
    raw = path.read_bytes()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=20)))
    assert record(raw, cuts=cuts) == record(raw)


@pytest.mark.parametrize("stem", ["whole", "crlf", "usage", "comments", "reasoning"])
def test_every_proper_prefix_is_not_storable(stem):
    raw = (TRANSCRIPTS / f"{stem}.sse").read_bytes()
    end = raw.index(b"[DONE]") + len(b"[DONE]")
    for length in range(0, end, 7):
        assert isinstance(record(raw[:length]), str)
    assert isinstance(record(raw[: end - 1]), str)


def test_fields_beside_the_content_are_kept():
    reasoning = record((TRANSCRIPTS / "reasoning.sse").read_bytes())
    assert reasoning.message["reasoning_content"] == "The user asks for a capital."
    assert reasoning.usage == Usage(input_tokens=19, output_tokens=10, cache_read_tokens=4)
    assert reasoning.choice == {"logprobs": None}
    annotated = record((TRANSCRIPTS / "annotations.sse").read_bytes())
    assert annotated.message["annotations"][0]["url_citation"]["title"] == "Paris"
    assert annotated.message["refusal"] is None
    prelude = record((TRANSCRIPTS / "azure_prelude.sse").read_bytes())
    assert prelude.extra["prompt_filter_results"] == [{"prompt_index": 0}]


def stream_of(*choices: dict) -> bytes:
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunks = [json.dumps({**head, "choices": [{"index": 0, **choice}]}) for choice in choices]
    return b"".join(b"data: %b\n\n" % data.encode() for data in [*chunks, "[DONE]"])


STOP = {"delta": {}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ([{"delta": {"content": " \n"}}, STOP], "empty"),
        ([STOP], "empty"),
        ([{"delta": {"content": None}}, STOP], "empty"),
        ([{"delta": {"content": ["a"]}}, STOP], "content_type"),
        ([{"delta": {"content": "a"}}, {"delta": {}, "finish_reason": "unheard_of"}], "finish_other"),
        ([{"delta": {"content": "a"}}, {"delta": {}, "finish_reason": "function_call"}], "tool_calls"),
        ([{"delta": {"content": "a", "tool_calls": [{"index": 0}]}}, STOP], "tool_calls"),
        ([{"delta": {"content": "a", "audio": {"data": "x"}}}, STOP], "audio"),
        ([{"delta": {"content": "a"}, "logprobs": {"content": []}}, STOP], "logprobs"),
        ([{"delta": {"content": "a"}}, STOP, {"delta": {"content": "b"}}], "garbage"),
        ([{"delta": {"content": "a", "new": "x"}}, {"delta": {"new": "y"}}, STOP], "unknown_delta"),
        ([{"delta": "a"}, STOP], "garbage"),
        ([{"index": 1, "delta": {"content": "a"}}, STOP], "choices"),
        ([{"delta": {"content": "\ud83d"}}, {"delta": {"content": "\ude00"}}, STOP], "garbage"),
        ([{"delta": {"content": "a" * 600_000}}, {"delta": {"content": "b" * 600_000}}, STOP], "too_large"),
    ],
)
def test_what_is_not_understood_has_its_reason(choices, reason):
    assert record(stream_of(*choices), json.loads) == reason


def test_reasoning_details_are_joined_by_index():
    def entry(i, text):
        return {"delta": {"reasoning_details": [{"type": "reasoning.text", "index": i, "text": text}]}}

    answer = record(stream_of(entry(0, "a"), entry(0, "b"), entry(1, "c"), {"delta": {"content": "x"}}, STOP))
    assert [(d["index"], d["text"]) for d in answer.message["reasoning_details"]] == [(0, "ab"), (1, "c")]


def test_a_long_answer_is_parsed_in_batches_and_kept_whole():
    words = [f"word{i} " for i in range(3000)]
    answer = record(stream_of(*[{"delta": {"content": w}} for w in words], STOP))
    assert answer.message["content"] == "".join(words)
    assert len(answer.pieces) == 3000


# A chunk like the last one is read by its text alone; these look alike and are not, or hold what must be unescaped.
alike = st.sampled_from(
    [
        '"plain"',
        '" "',
        '""',
        '"\\""',
        '"\\u00e9\\n\\ud83d\\ude00"',
        '"caf\u00e9 \U0001f5fc"',
        '"back\\\\"',
        '"a","refusal":null',
        '"a","content":"b"',
        '"a","reasoning":"b"',
        "null",
    ]
)


@given(contents=st.lists(alike, max_size=12), spaced=st.booleans())
def test_reading_by_text_alone_gives_what_parsing_gives(contents, spaced):
    chunk = '{"model":"m","choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}]}'
    if spaced:
        chunk = chunk.replace(":", ": ").replace(",", ", ")
    datas = [chunk % content for content in ['"first"', *contents]]
    end = '{"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
    raw = "".join(f"data: {data}\n\n" for data in [*datas, end, "[DONE]"]).encode()
    deltas = [json.loads(data)["choices"][0]["delta"] for data in datas]
    answer = record(raw)
    assert answer.message["content"] == "".join(delta["content"] or "" for delta in deltas)
    assert answer.pieces == tuple(len(delta["content"]) for delta in deltas if delta["content"])
    assert answer.message.get("reasoning", "") == "".join(delta.get("reasoning", "") for delta in deltas)
    assert ("refusal" in answer.message) is any("refusal" in delta for delta in deltas)


@pytest.mark.parametrize(
    "data",
    [
        b'{"model":"m","choices":[{"index":0,"delta":{"content":"},"finish_reason":null}]}',  # they overlap
        b'{"model":"m","choices":[{"index":0,"delta":{"content":"tab\there"},"finish_reason":null}]}',
        b'{"model":"m","choices":[{"index":0,"delta":{"content":"\xff"},"finish_reason":null}]}',
        b'{"model":"m","choices":[{"index":0,"delta":{"content":"\\x"},"finish_reason":null}]}',
    ],
)
def test_what_only_looks_like_the_last_chunk_is_garbage(data):
    first = b'{"model":"m","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}'
    raw = b"".join(b"data: %b\n\n" % d for d in [first, first, data, b"[DONE]"])
    assert record(raw) == record(raw, json.loads) == "garbage"


# ---- replay

texts = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("e\u0301\u2028\u2029\x85\U0001f9d1\u200d\r\n[]"))
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
counts = st.integers(0, 10**6)
message_fields = st.fixed_dictionaries(
    {},
    optional={
        "reasoning_content": texts,
        "refusal": st.none(),
        "annotations": st.lists(st.dictionaries(st.text(max_size=3), texts, max_size=2), max_size=2),
        "tool_calls": st.none() | st.just([]),
        "x_new": values,
    },
)


@st.composite
def answers(draw) -> Answer:
    pieces = draw(st.lists(texts, min_size=1, max_size=6))
    if not "".join(pieces).strip():
        pieces.append("a")
    raw_usage = {
        "prompt_tokens": draw(counts),
        "completion_tokens": draw(counts),
        "prompt_tokens_details": {"cached_tokens": draw(counts)},
    }
    return Answer(
        message={"role": "assistant", "content": "".join(pieces), **draw(message_fields)},
        finish_reason="stop",
        model=draw(st.text(min_size=1, max_size=5)),
        usage=read_usage(raw_usage),
        raw_usage=raw_usage,
        extra=draw(st.fixed_dictionaries({}, optional={"system_fingerprint": texts, "timings": values, "n": counts})),
        pieces=tuple(len(p) for p in pieces if p),
        choice=draw(st.fixed_dictionaries({}, optional={"logprobs": st.none(), "stop_reason": st.none() | texts})),
    )


@given(answer=answers())
def test_a_replayed_stream_is_recorded_as_the_same_answer(answer):
    raw = render_stream(answer, include_usage=True).fill("1", 1)
    assert record(raw, json.loads) == answer
    assert raw.endswith(b"data: [DONE]\n\n")
    assert b"\r" not in raw
    assert len(raw.decode().splitlines()) == raw.count(b"\n")  # no character a line splitter could trip over


@given(answer=answers())
def test_a_whole_replay_is_read_as_the_same_answer(answer):
    answer = replace(answer, pieces=())
    assert read_whole(render_whole(answer).fill("1", 1), json.loads) == answer
    streamed = record(render_stream(answer, include_usage=True).fill("1", 1), json.loads)
    assert replace(streamed, pieces=()) == answer


@given(text=texts)
def test_words_join_to_the_text(text):
    assert "".join(split(text, ())) == text


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_has_the_providers_form(include_usage):
    answer = record((TRANSCRIPTS / "usage.sse").read_bytes())
    raw = render_stream(answer, include_usage).fill("abc", 1800000000)
    *datas, done = EventDecoder().feed(raw)
    chunks = [json.loads(data) for data in datas]
    assert done == b"[DONE]"
    assert {(c["id"], c["created"], c["object"], c["model"]) for c in chunks} == {
        ("chatcmpl-abc", 1800000000, "chat.completion.chunk", "gpt-4o-mini-2024-07-18")
    }
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    if include_usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == answer.raw_usage
        assert all(c["usage"] is None for c in chunks[:-1])
        chunks.pop()
    assert include_usage or not any("usage" in c for c in chunks)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    contents = [c["choices"][0]["delta"].get("content") for c in chunks[1:-1]]
    assert contents == [
        "Paris",
        " is",
        " the",
        " capital",
        " of",
        " France",
        ". ",
        "\U0001f5fc",
        " e\u0301t",
        "\u2028end",
    ]


def test_counters_are_zeroed_when_the_operator_says_so():
    answer = record((TRANSCRIPTS / "usage.sse").read_bytes())
    usage = json.loads(render_whole(answer, "zero").fill("1", 1))["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert b'"total_tokens":0' in render_stream(answer, True, "zero").fill("1", 1)


def test_an_answer_without_counters_is_replayed_without_them():
    answer = record((TRANSCRIPTS / "whole.sse").read_bytes())
    assert answer.usage is None
    assert "usage" not in json.loads(render_whole(answer).fill("1", 1))
    assert b'"choices":[]' not in render_stream(answer, True).fill("1", 1)


CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
]


@pytest.mark.parametrize("content", [None, "I shall look it up."])
def test_tool_calls_are_replayed_with_new_ids(content):
    """The same id twice in one conversation is refused by providers, so each replay has its own."""
    message = {"role": "assistant", "content": content, "tool_calls": CALLS}
    answer = Answer(message, "tool_calls", "m", Usage(1, 2), {"prompt_tokens": 1, "completion_tokens": 2})
    bodies = [render_whole(answer).fill(token * 32, 1) for token in "ab"]
    whole = [read_whole(body) for body in bodies]
    streamed = [record(render_stream(answer, True).fill(token * 32, 1)) for token in "ab"]
    ids = [[call["id"] for call in a.message["tool_calls"]] for a in whole]
    assert ids == [[call["id"] for call in a.message["tool_calls"]] for a in streamed]
    assert len({*ids[0], *ids[1]}) == 4
    assert all(i.startswith("call_") for i in ids[0])
    for replayed in (*whole, *streamed):
        said = [{**call, "id": kept["id"]} for call, kept in zip(replayed.message["tool_calls"], CALLS, strict=True)]
        assert said == CALLS
        assert replayed.message["content"] == content


def test_streamed_tool_calls_are_assembled_from_their_parts():
    def part(**call):
        return {"delta": {"tool_calls": [call]}}

    end = {"delta": {}, "finish_reason": "tool_calls"}
    named = part(index=0, id="call_1", type="function", function={"name": "weather", "arguments": ""})
    more = [part(index=0, function={"arguments": text}) for text in ('{"city"', ':"Paris"}')]
    other = part(index=1, id="call_2", type="function", function={"name": "time", "arguments": "{}"})
    answer = record(stream_of({"delta": {"role": "assistant", "content": None}}, named, *more, other, end))
    assert answer.message["tool_calls"] == CALLS
    assert record(stream_of(named, part(index=0, id="another", function={"arguments": ""}), end)) == "tool_calls"
    assert record(stream_of(part(index=0, function={"arguments": "{}"}), end)) == "tool_calls"


# ---- whole bodies

GOOD = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}


def good(**choice):
    return {**GOOD, "choices": [{**GOOD["choices"][0], **choice}]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "garbage"),
        (b"<html>", "garbage"),
        (b"{}", "choices"),
        (b"[" * 100_000, "garbage"),
        (b"[]", "garbage"),
        ({**GOOD, "error": {"message": "x"}}, "error_object"),
        ({**GOOD, "choices": []}, "choices"),
        ({**GOOD, "choices": GOOD["choices"] * 2}, "choices"),
        ({**GOOD, "model": None}, "garbage"),
        (good(message={"role": "assistant", "content": None}), "empty"),
        (good(message={"role": "assistant", "content": "  "}), "empty"),
        (good(message={"role": "assistant", "content": [{"type": "text"}]}), "content_type"),
        (good(message={"role": "assistant", "content": "x", "refusal": "no"}), "refusal"),
        (good(message={"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}), "tool_calls"),
        (good(message={"role": "assistant", "content": "\ud800"}), "garbage"),
        (good(message=None), "garbage"),
        (good(finish_reason=None), "truncated"),
        (good(finish_reason="length"), "finish_length"),
        (good(finish_reason="content_filter"), "finish_content_filter"),
        (good(finish_reason="tool_calls"), "tool_calls"),
        (good(logprobs={"content": []}), "logprobs"),
        (good(message={"role": "assistant", "content": "x" * LINE_LIMIT_BYTES}), "too_large"),
    ],
)
def test_a_body_that_is_not_a_plain_answer_has_its_reason(body, reason):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert read_whole(raw) == reason
    assert read_whole(raw, orjson.loads) == reason


def test_a_plain_body_is_an_answer():
    answer = read_whole(json.dumps(GOOD).encode(), orjson.loads)
    assert (answer.message["content"], answer.usage, answer.model) == ("hi", Usage(1, 2), "m")


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": "1", "completion_tokens": 1}, {"prompt_tokens": -1}])
def test_counters_that_are_not_whole_numbers_are_not_counted(usage):
    assert read_usage(usage) is None


# ---- what reaches the client


def relay(raw: bytes, cuts=(), strip=True, n=1) -> tuple[bytes, UsageFilter]:
    usage_filter = UsageFilter(strip, n, orjson.loads)
    out = b"".join(usage_filter.feed(raw[a:b]) for a, b in pairwise([0, *cuts, len(raw)]))
    return out + usage_filter.end(), usage_filter


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
@given(data=st.data(), strip=st.booleans())
def test_the_filter_takes_the_usage_chunk_and_nothing_else(path, data, strip):
    raw = path.read_bytes()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=20)))
    out, usage_filter = relay(raw, cuts, strip, choices_of(path))
    expected = raw
    if strip and path.stem in ("usage", "usage_spaced", "reasoning"):
        start = raw.rindex(b"data: {")
        expected = raw[:start] + raw[raw.index(b"data: [DONE]") :]
    if strip:
        expected = expected.replace(b',"usage":null', b"").replace(b', "usage": null', b"")
    if path.stem == "cut_mid_event":
        expected = raw[: raw.rindex(b"data: ")]
    if path.stem in ("done_without_finish", "two_choices_one_open"):
        expected = raw[: raw.index(b"data: [DONE]")]
    assert out == expected
    assert usage_filter.complete is (path.stem not in INCOMPLETE)
    assert usage_filter.failed is (path.stem == "error_mid_stream")


def test_a_chunk_of_whole_events_passes_as_the_same_object():
    usage_filter = UsageFilter(strip=False)
    first, second, *_ = (event + b"\n\n" for event in (TRANSCRIPTS / "usage.sse").read_bytes().split(b"\n\n"))
    usage_filter.feed(first)
    assert usage_filter.feed(second) is second


def test_every_output_is_whole_events_so_an_error_can_follow_at_any_time():
    raw = (TRANSCRIPTS / "whole.sse").read_bytes()
    usage_filter = UsageFilter(strip=True)
    outs = [usage_filter.feed(raw[i : i + 50]) for i in range(0, len(raw), 50)]
    assert all(out == b"" or out.endswith(b"\n\n") for out in outs)


FUNCTION = {"name": "weather", "arguments": '{"city":"Paris"}'}


@pytest.mark.parametrize("finish", ["function_call", "stop"])  # "stop" where the client named the function
@pytest.mark.parametrize("content", [None, "I shall look it up."])
def test_a_function_called_as_before_there_were_tools_is_replayed_as_it_was(content, finish):
    message = {"role": "assistant", "content": content, "function_call": FUNCTION}
    answer = Answer(message, finish, "m", Usage(1, 2), {"prompt_tokens": 1, "completion_tokens": 2})
    assert read_whole(render_whole(answer).fill("a" * 32, 1)) == answer
    streamed = record(render_stream(answer, True).fill("a" * 32, 1))
    assert replace(streamed, pieces=()) == answer


def test_a_streamed_function_call_is_assembled_from_its_parts():
    parts = [{"name": "weather", "arguments": ""}, {"arguments": '{"city":'}, {"arguments": '"Paris"}'}]
    deltas = [{"delta": {"role": "assistant", "content": None}}, *[{"delta": {"function_call": one}} for one in parts]]
    answer = record(stream_of(*deltas, {"delta": {}, "finish_reason": "function_call"}))
    assert answer.message == {"role": "assistant", "content": None, "function_call": FUNCTION}


@pytest.mark.parametrize(
    "part", [{"name": "time"}, {"arguments": 7}, ["weather"], {"name": "weather", "arguments": {"city": "Paris"}}]
)
def test_a_function_call_that_cannot_be_joined_is_not_kept(part):
    said = [{"delta": {"function_call": FUNCTION}}, {"delta": {"function_call": part}}]
    assert record(stream_of(*said, {"delta": {}, "finish_reason": "function_call"})) == "tool_calls"
