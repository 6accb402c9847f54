"""A client whose library tries again is not made to pay twice, whatever it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tests.flows.running import Ibid, chat_body, until
from tests.upstream import Chat, Json, Seen
from tests.waiting import A_WHILE_S

CALL = {"id": "c", "type": "function", "function": {"name": "warmth", "arguments": "{}"}}
TURNS = [
    {"role": "user", "content": "How warm is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "12"},
]
ASKED: dict[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {
    "a question": (chat_body("Who wrote Faust?"), {}),
    "the results of tools": (chat_body(TURNS), {}),
    "another sample": (chat_body("Who wrote Faust?", temperature=1.4), {}),
    "two samples": (chat_body("Who wrote Faust?", n=2), {}),
    "what is not stored": (chat_body("Who wrote Faust?"), {"Cache-Control": "no-store"}),
    "what is asked anew": (chat_body("Who wrote Faust?"), {"Cache-Control": "no-cache"}),
    "what is searched for": (chat_body("Who wrote Faust?", web_search_options={}), {}),
}
AGAIN: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "stainless": ({"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "1"}),
    "plain": ({"x-retry-count": "0"}, {"x-retry-count": "2"}),
    "envoy": ({"x-envoy-attempt-count": "1"}, {"x-envoy-attempt-count": "2"}),
    "aws": ({"amz-sdk-request": "attempt=1; max=3"}, {"amz-sdk-request": "attempt=2; max=3"}),
}


def held(gate: asyncio.Event) -> Any:
    async def reply(_seen: Seen) -> Chat | Json:
        await gate.wait()
        return Chat()

    return reply


@pytest.mark.parametrize("how", AGAIN)
@pytest.mark.parametrize("what", ASKED)
async def test_the_second_try_joins_the_first_that_is_under_way(exact, up, what, how):
    (body, controls), (first_try, second_try) = ASKED[what], AGAIN[how]
    gate = asyncio.Event()
    up.default = held(gate)
    first = asyncio.create_task(exact.send(body, headers={**controls, **first_try}))
    await until(lambda: up.requests)
    again = asyncio.create_task(exact.send(body, headers={**controls, **second_try}))
    await until(lambda: all_seats(exact) == 2)
    first.cancel()
    await until(lambda: all_seats(exact) == 1)
    gate.set()
    reply = await again
    assert (reply.status, reply.tier, up.meter.calls) == (200, "collapsed", 1)
    (row,) = [row for row in await exact.sql("SELECT * FROM request") if row["id"] == reply.headers["x-request-id"]]
    assert row["retry_of"] is not None
    assert row["actual_nusd"] == 0


OTHERS: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "first tries of their own": ({"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "0"}),
    "a client that says nothing": ({}, {"x-stainless-retry-count": "1"}),
    "a try of another request": (
        {"x-stainless-retry-count": "0", "Idempotency-Key": "a"},
        {"x-stainless-retry-count": "1", "Idempotency-Key": "b"},
    ),
    "another header that may matter": (
        {"x-stainless-retry-count": "0"},
        {"x-stainless-retry-count": "1", "x-feature": "b"},
    ),
    "another tenant": (
        {"x-stainless-retry-count": "0"},
        {"x-stainless-retry-count": "1", "Authorization": "Bearer sk-b"},
    ),
}


@pytest.mark.parametrize("who", OTHERS)
async def test_another_sample_is_shared_with_nobody_else(exact, up, who):
    gate = asyncio.Event()
    up.default = held(gate)
    body = chat_body("Who wrote Faust?", temperature=1.4)
    asked = []
    for number, headers in enumerate(OTHERS[who]):
        key = headers.get("Authorization", "Bearer sk-a").removeprefix("Bearer ")
        rest = {name: value for name, value in headers.items() if name != "Authorization"}
        asked.append(asyncio.create_task(exact.send(body, key=key, headers=rest)))
        await until(lambda number=number: len(up.requests) == number + 1)
    gate.set()
    assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
    assert up.meter.calls == 2


@pytest.mark.parametrize("what", ASKED)
async def test_who_gave_up_for_lack_of_time_finds_the_call_still_there(exact, up, what):
    body, controls = ASKED[what]
    gate = asyncio.Event()
    up.default = held(gate)
    headers = {**controls, "x-stainless-read-timeout": "0.01", "x-stainless-retry-count": "0"}
    first = asyncio.create_task(exact.send(body, headers=headers))
    await until(lambda: up.requests)
    await asyncio.sleep(A_WHILE_S)  # its time is over
    first.cancel()
    await until(lambda: client_seats(exact) == 0)
    again = asyncio.create_task(exact.send(body, headers={**headers, "x-stainless-retry-count": "1"}))
    await until(lambda: client_seats(exact) == 1)
    gate.set()
    reply = await again
    assert (reply.status, reply.tier, up.meter.calls, up.meter.cancelled) == (200, "collapsed", 1, 0)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-stainless-read-timeout": "600", "x-stainless-retry-count": "0"},
        {"x-stainless-read-timeout": "0.01"},
        {"x-stainless-retry-count": "0"},
    ],
)
async def test_who_leaves_of_their_own_will_ends_the_call_at_once(exact, up, headers):
    up.default = held(asyncio.Event())
    first = asyncio.create_task(exact.send(chat_body("Who wrote Faust?"), headers=headers))
    await until(lambda: up.requests)
    await asyncio.sleep(A_WHILE_S)
    first.cancel()
    await up.left.wait()
    await exact.settled()


def client_seats(ibid: Ibid) -> int:
    return sum([seat.is_client for flight in ibid.app.pipeline.boarding._aloft for seat in flight._seats])


def all_seats(ibid: Ibid) -> int:
    return sum([len(flight._seats) for flight in ibid.app.pipeline.boarding._aloft])
