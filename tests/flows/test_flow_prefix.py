"""Marks for Anthropic's own cache: on where they pay, never in the way, and in the books."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.flows.running import EXACT_ONLY, Ibid, running
from tests.flows.test_flow_lanes import Claude, balanced
from tests.upstream import Json, Seen

PRICES = {
    "input_usd_per_mtok": 3, "output_usd_per_mtok": 15,
    "cache_read_usd_per_mtok": 0.3, "cache_write_usd_per_mtok": 3.75,
}  # fmt: skip
SECTIONS: dict[str, Any] = {'prices.override."anthropic/*"': PRICES, **EXACT_ONLY}
SYSTEM = "You are careful. " * 400
HEADERS = {"x-api-key": "sk-a", "anthropic-version": "2026-10-21"}
REFUSAL = Json(400, {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}})
CALLS = 5


async def ask(ibid: Ibid, number: int, headers: Mapping[str, str] | None = None, **fields: Any) -> tuple[int, Any]:
    question = {"role": "user", "content": f"Question number {number}"}
    body = {"model": "claude-x", "max_tokens": 9, "system": SYSTEM, "messages": [question], **fields}
    url = ibid.url + "/v1/messages"
    async with ibid.session.post(url, data=json.dumps(body), headers={**HEADERS, **(headers or {})}) as response:
        await response.read()
    await ibid.settled()
    return response.status, response.headers


async def test_a_beginning_seen_twice_is_marked_without_anybody_asking_and_booked(data_dir, up):
    up.default = claude = Claude()
    async with running(data_dir, up.url, SECTIONS) as ibid:
        told = [await ask(ibid, number) for number in range(CALLS)]
        assert claude.marks == [0, 1, 1, 1, 1]
        assert {headers["x-plan"] for _, headers in told} == {"exact,semantic,collapse,prefix"}
        written = claude.usages[1]["cache_creation_input_tokens"]
        steps = await ibid.sql("SELECT mechanism, saved_nusd FROM saving ORDER BY saved_nusd")
        assert [step["saved_nusd"] for step in steps] == [-written * 750] + [written * 2_700] * 3
        assert {step["mechanism"] for step in steps} == {"cache.prefix"}
        assert await balanced(ibid)
        assert len(await ibid.entries()) == CALLS, "a mark is no part of the question"
        _, again = await ask(ibid, 3)
        assert again["x-cache"] == "HIT"


OWN = {"system": [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]}
UNMARKED: dict[str, tuple[Mapping[str, Any], Mapping[str, str], Mapping[str, Any]]] = {
    "switched off": ({"lane.prefix": {"by_default": False}}, {}, {}),
    "a policy that lists lanes": ({"policy": [{"plan": ["exact", "collapse"]}]}, {}, {}),
    "a client that takes it off": ({}, {"x-plan": "-prefix"}, {}),
    "a client that lists lanes": ({}, {"x-plan": "exact,collapse"}, {}),
    "too short": ({}, {}, {"system": "You are careful."}),
    "no price known": ({'prices.override."anthropic/*"': {"input_usd_per_mtok": 3, "output_usd_per_mtok": 15}}, {}, {}),
}


@pytest.mark.parametrize("what", UNMARKED)
async def test_where_it_does_not_pay_or_was_not_wanted_nothing_is_marked(data_dir, up, what):
    sections, headers, fields = UNMARKED[what]
    up.default = claude = Claude()
    async with running(data_dir, up.url, {**SECTIONS, **sections}) as ibid:
        for number in range(CALLS):
            assert (await ask(ibid, number, headers, **fields))[0] == 200
        assert claude.marks == [0] * CALLS


async def test_a_policy_that_lists_no_lanes_keeps_the_marks_and_a_clients_own_are_enough(data_dir, up):
    up.default = claude = Claude()
    async with running(data_dir, up.url, {**SECTIONS, "policy": [{"ttl_s": 60}]}) as ibid:
        for number in range(3):
            await ask(ibid, number)
        for number in range(3, 6):
            await ask(ibid, number, **OWN)
        assert claude.marks == [0, 1, 1, 1, 1, 1]


async def test_a_mark_that_is_refused_is_left_out_and_that_is_remembered(data_dir, up):
    claude, bodies = Claude(), []

    def strict(seen: Seen) -> Any:
        bodies.append(seen.body)
        return REFUSAL if b'"cache_control"' in seen.body else claude(seen)

    up.default = strict
    async with running(data_dir, up.url, SECTIONS) as ibid:
        assert [(await ask(ibid, number))[0] for number in range(CALLS)] == [200] * CALLS
        assert [b'"cache_control"' in body for body in bodies] == [False, True, False, False, False, False]
        assert bodies[2] == bodies[1].replace(
            b'[{"type":"text","text":' + json.dumps(SYSTEM).encode() + b',"cache_control":{"type":"ephemeral"}}]',
            json.dumps(SYSTEM).encode(),
        )
        assert await balanced(ibid)


async def test_a_request_that_is_refused_either_way_says_nothing_of_marks(data_dir, up):
    up.default = claude = Claude()
    async with running(data_dir, up.url, SECTIONS) as ibid:
        await ask(ibid, 0)
        up.script(REFUSAL, REFUSAL)
        assert (await ask(ibid, 1))[0] == 400
        await ask(ibid, 2)
        assert claude.marks == [0, 1]


async def test_marks_that_are_never_read_rest(data_dir, up):
    claude = Claude()

    def forgetful(seen: Seen) -> Any:
        claude.seen.clear()
        return claude(seen)

    up.default = forgetful
    async with running(data_dir, up.url, SECTIONS) as ibid:
        for number in range(20):
            await ask(ibid, number)
        assert claude.marks == [0] + [1] * 16 + [0] * 3


async def test_a_mark_leaves_every_other_byte_as_it_was(data_dir, up):
    up.default = Claude()
    tool = b'{"name":"f","input_schema":{"type":"object", "maximum": 1.0, "n":12345678901234567890123}}'
    raw = (
        b'{ "model":"claude-x","max_tokens":9,"temperature":0.10, "tools":[ ' + tool + b' ],"system":"'
        + SYSTEM.encode() + b'","messages":[{"role":"user","content":"%d"}]}'
    )  # fmt: skip
    async with running(data_dir, up.url, SECTIONS) as ibid:
        for number in range(2):
            async with ibid.session.post(ibid.url + "/v1/messages", data=raw % number, headers=HEADERS) as response:
                assert response.status == 200
            await ibid.settled()
    first, second = (seen.body for seen in up.requests)
    assert first == raw % 0
    text = b'"' + SYSTEM.encode() + b'"'
    assert second == (raw % 1).replace(
        text, b'[{"type":"text","text":' + text + b',"cache_control":{"type":"ephemeral"}}]'
    )
