"""OpenAI legacy completions: what is read from a request, and what a replay says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy.core.dialects.completions import Completions, read
from proxy.core.model import Answer

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts" / "completions"
DIALECT = Completions(orjson.loads)


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "Why?", **fields}


def recorded(stem: str) -> Answer:
    answer = DIALECT.record((TRANSCRIPTS / f"{stem}.sse").read_bytes(), is_stream=True, n=1).answer
    assert answer is not None
    return answer


@pytest.mark.parametrize(
    ("fields", "fact", "value"),
    [
        ({}, "prompt", "Why?"),
        ({"prompt": ["Why?"]}, "prompt", "Why?"),
        ({"prompt": ["Why?", "How?"]}, "n", 2),
        ({"prompt": ["Why?", "How?"], "n": 2}, "n", 4),
        ({"prompt": [1, 2, 3]}, "n", 1),
        ({"prompt": [1, 2, 3]}, "prompt", None),
        ({"prompt": [[1, 2], [3]]}, "n", 2),
        ({"prompt": []}, "n", 1),
        ({"prompt": None}, "prompt", None),
        ({"echo": True}, "prompt", None),
        ({"suffix": "."}, "prompt", None),
        ({"best_of": 3}, "n", 3),
        ({"best_of": 1, "n": 1}, "n", 1),
        ({"logprobs": 0}, "logprobs", True),
        ({"logprobs": 5}, "logprobs", True),
        ({"logprobs": None}, "logprobs", False),
        ({"max_tokens": 7}, "output_limit", 7),
        ({}, "output_limit", None),
        ({"stop": "x"}, "has_stops", True),
        ({"stop": "x"}, "settings", {"stop": ["x"]}),
        ({"user": "ann"}, "end_user", "ann"),
        ({"stream_options": {"include_usage": True}}, "wants_usage", True),
        ({"brand_new": 1}, "unknown", ("brand_new",)),
    ],
)
def test_each_field_is_seen(fields: dict[str, Any], fact: str, value: object) -> None:
    assert getattr(read(asked(**fields)), fact) == value


def test_a_deployment_in_the_path_names_the_model() -> None:
    assert DIALECT.read({"prompt": "x"}, model="instruct").model == "instruct"


def test_a_stream_asks_for_its_usage() -> None:
    raw = b'{"model":"m","prompt":"x","stream":true}'
    assert json.loads(DIALECT.forward_body(raw, json.loads(raw)))["stream_options"] == {"include_usage": True}


def test_the_usage_that_only_the_proxy_asked_for_is_left_out() -> None:
    raw = (TRANSCRIPTS / "whole.sse").read_bytes()
    relay = DIALECT.filter(wants_usage=False, n=1)
    passed = relay.feed(raw) + relay.end()
    assert relay.complete
    assert b"usage" in raw
    assert b"usage" not in passed
    assert passed.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("wants_usage", [True, False])
def test_a_replayed_stream_is_cut_as_it_was(wants_usage: bool) -> None:
    template = DIALECT.render(recorded("whole"), stream=True, wants_usage=wants_usage, usage_mode="original")
    raw = template.fill("a" * 32, 1_800_000_000).decode()
    *chunks, done, rest = raw.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    said = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert {(c["id"], c["created"], c["object"]) for c in said} == {
        ("cmpl-" + "a" * 32, 1_800_000_000, "text_completion")
    }
    texts = [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in said if c["choices"]]
    assert texts[:2] == [("Paris", None), (" is the", None)]
    assert texts[-1] == ("", "stop")
    assert [c.get("usage", "none") for c in said][-1] == (
        {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21} if wants_usage else "none"
    )


def test_a_whole_replay_has_the_fields_of_the_original() -> None:
    template = DIALECT.render(recorded("whole"), stream=False, wants_usage=False, usage_mode="zero")
    said = json.loads(template.fill("a" * 32, 1_800_000_000))
    assert said.keys() == {"id", "created", "object", "model", "choices", "usage"}
    assert said["choices"][0].keys() == {"text", "index", "logprobs", "finish_reason"}
    assert said["usage"]["total_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[]", "garbage"),
        (b"{", "garbage"),
        (b'{"error":{"message":"x"}}', "error_object"),
        (b'{"choices":[]}', "choices"),
        (b'{"choices":[{"text":"x","index":0}],"model":"m"}', "truncated"),
        (b'{"choices":[{"text":" ","index":0,"finish_reason":"stop"}],"model":"m"}', "empty"),
        (b'{"choices":[{"text":3,"index":0,"finish_reason":"stop"}],"model":"m"}', "garbage"),
        (b'{"choices":[{"text":"x","index":0,"finish_reason":"stop"}],"model":"m","usage":3}', "garbage"),
        (b'{"choices":[{"text":"x","index":0,"finish_reason":"eos"}],"model":"m"}', "finish_other"),
    ],
)
def test_only_one_finished_choice_is_storable(body: bytes, reason: str) -> None:
    for dialect in (DIALECT, Completions()):
        assert dialect.record(body, is_stream=False, n=1).refusal_reason == reason
