"""Loops of agents through a whole ibid: a loop that was run once is answered from the cache the second time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.edge.faults_app import Running, ibid, question, up
from tests.edge.faults_wire import whole
from tests.providers import provider, say
from tests.upstream import Body, Chat, Json, Seen

__all__ = ["ibid", "up"]  # fixtures

TOOLS = [{"type": "function", "function": {"name": "warmth", "parameters": {"type": "object"}}}]
CITIES = ["Lyon", "Brest", "Metz"]


def model(seen: Seen) -> Json:
    """Asks for one city after the other, then says so."""
    results = [message for message in seen.json["messages"] if message["role"] == "tool"]
    if len(results) == len(CITIES):
        return Json(200, whole(f"All {len(CITIES)} are warm."))
    function = {"name": "warmth", "arguments": json.dumps({"city": CITIES[len(results)]})}
    call = {"id": f"call_m{len(results)}", "type": "function", "function": function}
    return Json(200, whole(None, "tool_calls", message={"tool_calls": [call]}))


async def run(ibid: Running, *headers: str, **fields: Any) -> tuple[str, list[str], int]:
    """One run of the loop: its last words, the ids of its calls, and how many answers were hits."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "How warm are my cities?"}]
    ids, hits = [], 0
    while True:
        reply = await ibid.ask(question(messages=messages, tools=TOOLS, **fields), *headers)
        assert reply.status == 200
        hits += reply.is_hit
        await ibid.settled()
        message = json.loads(reply.body)["choices"][0]["message"]
        messages.append(message)
        if not message.get("tool_calls"):
            return message["content"], ids, hits
        for call in message["tool_calls"]:
            ids.append(call["id"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "9"})


async def test_a_loop_that_was_run_once_costs_nothing_the_second_time(ibid: Running) -> None:
    ibid.up.default = model
    said, first, hits = await run(ibid)
    assert (ibid.asked, hits) == (4, 0)
    again, second, hits = await run(ibid, "session_id: another", "x-request-id: another")
    assert (again, hits, ibid.asked) == (said, 4, 4)
    assert len({*first, *second}) == 6, "every replay of a call has an id of its own"
    third = (await run(ibid))[1]
    assert len({*first, *second, *third}) == 9


async def test_another_result_is_another_conversation(ibid: Running) -> None:
    ibid.up.default = model
    await run(ibid)
    call = {"id": "c", "type": "function", "function": {"name": "warmth", "arguments": '{"city": "Lyon"}'}}
    turns = [
        {"role": "user", "content": "How warm are my cities?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "10"},
    ]
    assert not (await ibid.ask(question(messages=turns, tools=TOOLS))).is_hit


async def test_identical_turns_with_tool_results_are_one_call(ibid: Running) -> None:
    gate = asyncio.Event()

    async def slow(seen: Seen) -> Json:
        await gate.wait()
        return Json(200, whole())

    ibid.up.default = slow
    turns = [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "c", "content": "1"}]
    body = question(messages=turns)
    asked = [asyncio.ensure_future(ibid.ask(body, f"x-stainless-retry-count: {n}")) for n in range(5)]
    await ibid.up.arrived.wait()
    gate.set()
    assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
    assert ibid.asked == 1


FORCED = {"tool_choice": {"type": "function", "function": {"name": "warmth"}}, "tools": TOOLS}


@pytest.mark.parametrize("finish", ["stop", "tool_calls"])
@pytest.mark.parametrize("stream", [False, True])
async def test_structured_output_by_a_forced_tool_is_kept(ibid: Running, stream: bool, finish: str) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "warmth", "arguments": '{"c": 9}'}}
    ibid.up.default = Chat(text="", message={"tool_calls": [call]}, finish_reason=finish)
    body = question(stream=stream, **FORCED)
    await ibid.ask(body)
    await ibid.settled()
    assert (await ibid.ask(body)).is_hit


async def test_a_sample_above_the_bound_is_never_served_nor_shared_unless_it_is_named(ibid: Running) -> None:
    body = question(temperature=1.3)
    for _ in range(2):
        assert not (await ibid.ask(body)).is_hit
        await ibid.settled()
    assert ibid.asked == 2
    for sample, is_hit in (("1", False), ("1", True), ("2", False), ("2", True), ("1", True)):
        assert (await ibid.ask(body, f"x-cache-sample: {sample}")).is_hit is is_hit
        await ibid.settled()
    assert ibid.up.requests[-1].header("x-cache-sample") is None
    gate = asyncio.Event()

    async def slow(seen: Seen) -> Json:
        await gate.wait()
        return Json(200, whole())

    ibid.up.default = slow
    asked = [asyncio.ensure_future(ibid.ask(body)) for _ in range(3)]
    while ibid.asked < 7:
        ibid.up.arrived.clear()
        await ibid.up.arrived.wait()
    gate.set()
    await asyncio.gather(*asked)


def spoken(path: str, **fields: Any) -> tuple[bytes, dict[str, Any]]:
    """One question in a dialect, and how it is sent."""
    asked = {"input": "Who wrote Faust?"} if path.endswith("responses") else {"messages": [TURN]}
    return json.dumps({"model": "m-1", **asked, **fields}).encode(), {"target": path}


TURN = {"role": "user", "content": "Who wrote Faust?"}


async def test_what_the_upstream_keeps_is_shared_with_no_other_dialect_and_repeats_its_id(ibid: Running) -> None:
    """As the page "clients" says, narrower than one stored answer for every dialect."""
    ibid.up.default = provider
    chat, how = spoken("/v1/chat/completions")
    await ibid.ask(chat, **how)
    await ibid.settled()
    unkept, how = spoken("/v1/responses", store=False)
    assert (await ibid.ask(unkept, **how)).is_hit, "chat's answer serves a response that nobody keeps"
    kept, how = spoken("/v1/responses")
    first = await ibid.ask(kept, **how)
    assert not first.is_hit, "an id that the upstream never gave could not be asked about"
    await ibid.settled()
    again = await ibid.ask(kept, **how)
    assert again.is_hit
    assert json.loads(again.body)["id"] == json.loads(first.body)["id"]
    assert json.loads((await ibid.ask(unkept, target="/v1/responses")).body)["id"] != json.loads(first.body)["id"]


async def test_a_search_that_was_offered_in_a_box_of_tools_is_kept_unless_it_ran(ibid: Running) -> None:
    tools = [{"type": "function", "name": "exec_command", "parameters": {}, "strict": False}, {"type": "web_search"}]
    body, how = spoken("/v1/responses", store=False, tools=tools)
    searched = say("/v1/responses", json.loads(body), "Goethe.")
    assert isinstance(searched, Body)
    whole = json.loads(searched.body)
    whole["output"].insert(0, {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}})
    ibid.up.default = Json(200, whole)
    for _ in range(2):
        assert not (await ibid.ask(body, **how)).is_hit, "it ran"
        await ibid.settled()
    ibid.up.default = searched
    assert not (await ibid.ask(body, **how)).is_hit
    await ibid.settled()
    assert (await ibid.ask(body, **how)).is_hit, "it was only offered"
