"""How a failure shows, when a request may be asked again, and of whom: rules without a clock or a socket."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import failover
from proxy.core.dialects.anthropic import Messages
from proxy.core.dialects.gemini import Gemini
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.dialects.responses import Responses
from proxy.core.plan import Lane, Plan, edited

NOW_S = 1_780_000_000.0


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n', 529),
        (b'event: error\ndata: {"type":"error","error":{"type":"rate_limit_error"}}\n\n', 429),
        (b'event: error\ndata: {"type":"error","error":{"type":"api_error"}}\n\n', 500),
        (b'data: {"error":{"message":"no","code":502}}\n\n', 502),
        (b'data: {"error": {"code": "404"}}\n\n', 404),
        (b'{"error":{"code":503,"status":"UNAVAILABLE"}}', 503),
        (b' \n{"type":"error","error":{}}', 500),
        (b'{"error":"model crashed"}', 500),
        (b'data: {"error":null,"choices":[]}\n\n', None),
        (b'data: {"choices":[{"delta":{"content":"{\\"error\\":{}}"}}]}\n\n', None),
        (b"event: message_start\ndata: {}\n\n", None),
        (b": error\n\n", None),
        (b"event: errors\n\n", None),
        (b"", None),
    ],
)
def test_an_error_is_known_by_the_first_bytes_of_a_200(start, status):
    assert failover.error_in(start) == status


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "3", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Thu, 28 May 2026 20:26:50 GMT"}, 10),
        ({"retry-after": "Thu, 28 May 2026 20:26:50 -0000"}, 10),
        ({"retry-after": "Thu, 28 May 2020 20:26:50 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_what_an_upstream_tells_of_waiting_is_read_as_clients_do(headers: Mapping[str, str], wait_s):
    assert failover.retry_after_s(headers.get, NOW_S) == wait_s


@given(st.text(max_size=40))
def test_no_header_makes_it_fail(text):
    told = failover.retry_after_s({"retry-after": text}.get, NOW_S)
    assert told is None or told >= 0


@given(tried=st.integers(0, 60), chance=st.floats(0, 1))
def test_pauses_grow_and_are_never_shorter_than_what_was_told(tried, chance):
    assert 0 < failover.pause_s(tried, None, chance) <= failover.LONGEST_PAUSE_S
    assert failover.pause_s(tried, 3.0, chance) >= 3.0


@pytest.mark.parametrize(
    ("names", "model", "own"),
    [
        ((), "gpt-4o", "gpt-4o"),
        (("gpt-4o=mine",), "gpt-4o", "mine"),
        (("gpt-4o=mine",), "gpt-4o-mini", None),
        (("gpt-4o=mine", "gpt-*=*"), "gpt-4o-mini", "gpt-4o-mini"),
        (("*=all", "gpt-4o=mine"), "gpt-4o", "all"),
    ],
)
def test_a_stand_in_has_its_own_names(names, model, own):
    assert failover.named_there(model, names) == own


USER = {"role": "user", "content": "Who wrote Faust?"}
CHAT = {"model": "m", "messages": [USER]}
SAID = {"model": "m", "input": "Who wrote Faust?", "store": False}
MESSAGE = {"model": "m", "max_tokens": 9, "messages": [USER]}
GEMINI = {"contents": [{"role": "user", "parts": [{"text": "Who wrote Faust?"}]}]}
KEPT = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
MOVES: list[tuple[Any, Mapping[str, Any], bool]] = [
    (OpenAIChat(), CHAT, True),
    (OpenAIChat(), CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}, True),
    (OpenAIChat(), {"model": "m", "messages": [{**USER, "content": 'Write {"file_id": "x"} as JSON'}]}, True),
    (OpenAIChat(), CHAT | {"store": True}, False),
    (OpenAIChat(), CHAT | {"api_key": "sk-1"}, False),
    (OpenAIChat(), CHAT | {"messages": [{**USER, "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, False),
    (Responses(), SAID, True),
    (Responses(), {**SAID, "store": True}, False),
    (Responses(), {"model": "m", "input": "Who?"}, False),
    (Responses(), SAID | {"previous_response_id": None, "conversation": None}, True),
    (Responses(), SAID | {"previous_response_id": "resp_1"}, False),
    (Responses(), SAID | {"conversation": {"id": "conv_1"}}, False),
    (Responses(), SAID | {"prompt": {"id": "pmpt_1"}}, False),
    (Responses(), SAID | {"background": True}, False),
    (Responses(), SAID | {"input": [{"type": "item_reference", "id": "i"}]}, False),
    (Responses(), SAID | {"tools": [{"type": "file_search", "vector_store_ids": ["vs"]}]}, False),
    (Messages(), MESSAGE, True),
    (Messages(), MESSAGE | {"container": "c_1"}, False),
    (Messages(), MESSAGE | {"mcp_servers": [{"type": "url", "url": "https://x", "authorization_token": "t"}]}, False),
    (Messages(), MESSAGE | {"messages": [{**USER, "content": [KEPT]}]}, False),
    (Gemini(), GEMINI, True),
    (Gemini(), GEMINI | {"cachedContent": "cachedContents/1"}, False),
    (Gemini(), {"contents": [{"role": "user", "parts": [{"fileData": {"fileUri": "files/1"}}]}]}, False),
]


@pytest.mark.parametrize(("dialect", "body", "moves"), MOVES)
@pytest.mark.parametrize("indent", [None, 2])
def test_only_what_stands_for_itself_is_asked_of_another_server(dialect, body, moves, indent):
    facts = dialect.read(body, model="m") if isinstance(dialect, Gemini) else dialect.read(body)
    assert failover.may_move(facts, json.dumps(body, indent=indent).encode()) is moves


ACTING = Responses().read(SAID | {"tools": [{"type": "mcp", "server_url": "https://x"}]})


@pytest.mark.parametrize(
    ("status", "was_sent", "may"),
    [(500, True, False), (502, True, False), (0, True, False), (0, False, True), (429, True, True), (503, True, True)],
)
def test_what_may_have_been_done_is_not_done_twice(status, was_sent, may):
    assert failover.may_repeat(ACTING, status, was_sent=was_sent) is may
    assert failover.may_repeat(OpenAIChat().read(CHAT), status, was_sent=was_sent)


def test_a_client_adds_to_what_the_policy_tries_and_never_to_what_it_says_of_429():
    plan = Plan(frozenset({Lane.STALE_IF_ERROR}), on_error=("stale",), on_limit=())
    more = edited(plan, "+edge-if-error,+retry")
    assert more.standing_in(is_limit=False) == ("stale", "retry", "edge")
    assert more.standing_in(is_limit=True) == ()
    assert edited(plan, "-stale-if-error").standing_in(is_limit=False) == ()
    assert edited(Plan(frozenset()), "+edge-if-error,+stale-if-error").standing_in(is_limit=True) == ("stale", "edge")
