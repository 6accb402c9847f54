"""Conversations that a provider keeps and a client continues by an id: found by what was said, where ibid saw it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.flows.running import EXACT_ONLY, MODEL, Ibid, Reply, running
from tests.upstream import Json, Seen, Stream, event

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}
CALLED = [{"type": "function_call_output", "call_id": "call_1", "output": "12 °C"}]


class Keeper:
    """Keeps every answer under an id of its own; what it says depends on nothing but `says`."""

    def __init__(self) -> None:
        self.asked: list[Mapping[str, Any]] = []
        self.says = "Goethe."

    def __call__(self, seen: Seen) -> Any:
        body = seen.json
        self.asked.append(body)
        number = len(self.asked)
        item: dict[str, Any] = {
            "id": f"msg_{number}", "type": "message", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "annotations": [], "text": self.says}],
        }  # fmt: skip
        if body.get("tools") and "previous_response_id" not in body:
            item = {"id": f"fc_{number}", "type": "function_call", "status": "completed", "name": "weather",
                    "call_id": f"call_{number}", "arguments": "{}"}  # fmt: skip
        whole = {
            "id": f"resp_{number}", "object": "response", "created_at": 1, "status": "completed", "model": MODEL,
            "output": [item], "store": body.get("store", True), "usage": {"input_tokens": 9, "output_tokens": 2},
            "previous_response_id": body.get("previous_response_id"), "error": None, "incomplete_details": None,
        }  # fmt: skip
        if not body.get("stream"):
            return Json(200, whole)
        end = {"type": "response.completed", "sequence_number": 1, "response": whole}
        return Stream([b"event: response.completed\n" + event(end)])


@pytest.fixture
def keeper(up) -> Keeper:
    up.default = Keeper()
    return up.default


async def ask(
    ibid: Ibid, said: Any, *, key: str = "sk-a", headers: Mapping[str, str] | None = None, **fields: Any
) -> Reply:
    sent = {"Authorization": f"Bearer {key}", **(headers or {})}
    body = {"model": MODEL, "input": said, **fields}
    async with ibid.session.post(ibid.url + "/v1/responses", json=body, headers=sent) as response:
        reply = Reply(response.status, response.headers, await response.read())
    await ibid.settled()
    return reply


async def begun(ibid: Ibid, **fields: Any) -> str:
    """The id of a first answer."""
    return str((await ask(ibid, "Who wrote Faust?", **fields)).json["id"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_is_found_by_what_was_said_in_it(exact, keeper, stream):
    first = await begun(exact)
    replies = [await ask(exact, "And when?", previous_response_id=first, stream=stream) for _ in range(2)]
    assert [reply.cache for reply in replies] == ["MISS", "HIT"]
    third = [await ask(exact, "Where?", previous_response_id="resp_2", stream=stream) for _ in range(2)]
    assert [reply.cache for reply in third] == ["MISS", "HIT"]
    again = await ask(exact, "Who wrote Faust?", headers={"Cache-Control": "no-cache"})
    assert again.json["id"] not in (first, "resp_2", "resp_3")
    same = await ask(exact, "And when?", previous_response_id=again.json["id"], stream=stream)
    assert same.cache == "HIT", "another id of the same words"
    assert len(keeper.asked) == 4


async def test_other_words_under_the_same_question_are_another_conversation(exact, keeper):
    first = await begun(exact)
    await ask(exact, "And when?", previous_response_id=first)
    keeper.says = "Marlowe."
    other = await ask(exact, "Who wrote Faust?", headers={"Cache-Control": "no-cache"})
    assert (await ask(exact, "And when?", previous_response_id=other.json["id"])).cache == "MISS"
    assert (await ask(exact, "And when?")).cache == "MISS", "the same words without what was said before"


UNKNOWN: dict[str, Mapping[str, Any]] = {
    "an id nobody saw": {"previous_response_id": "resp_99"},
    "a conversation that grows": {"conversation": "conv_1"},
    "both": {"previous_response_id": "resp_1", "conversation": "conv_1"},
    "an item by its name": {"previous_response_id": "resp_1", "input": [{"type": "item_reference", "id": "msg_1"}]},
    "work behind the answer": {"previous_response_id": "resp_1", "background": True},
}


@pytest.mark.parametrize("what", UNKNOWN)
async def test_what_is_not_known_by_its_words_is_never_looked_up(exact, keeper, what):
    assert await begun(exact) == "resp_1"
    replies = [await ask(exact, "And when?", **UNKNOWN[what]) for _ in range(2)]
    assert {reply.cache for reply in replies} == {"BYPASS"}
    assert len(keeper.asked) == 3


async def test_nobody_continues_what_another_tenant_was_told(exact, keeper):
    first = await begun(exact)
    await ask(exact, "And when?", previous_response_id=first)
    other = await ask(exact, "And when?", previous_response_id=first, key="sk-b")
    assert (other.cache, other.reason) == ("BYPASS", "previous_response")


async def test_an_id_asked_for_before_it_was_told_is_known_once_it_was(exact, keeper):
    for _ in range(2):
        assert (await ask(exact, "And when?", previous_response_id="resp_3")).cache == "BYPASS"
    assert await begun(exact) == "resp_3"
    replies = [await ask(exact, "And when?", previous_response_id="resp_3") for _ in range(2)]
    assert [reply.cache for reply in replies] == ["MISS", "HIT"]


async def test_after_a_restart_it_is_known_again_once_its_beginning_was_served(data_dir, up, keeper):
    async with running(data_dir, up.url, EXACT_ONLY) as ibid:
        first = await begun(ibid)
        await ask(ibid, "And when?", previous_response_id=first)
    async with running(data_dir, up.url, EXACT_ONLY) as ibid:
        assert (await ask(ibid, "And when?", previous_response_id=first)).reason == "previous_response"
        assert await begun(ibid) == first
        assert (await ask(ibid, "And when?", previous_response_id=first)).cache == "HIT"


async def test_a_tool_loop_continued_by_id_costs_nothing_the_second_time(exact, keeper):
    for _ in range(2):
        first = await begun(exact, tools=[TOOL])
        reply = await ask(exact, CALLED, previous_response_id=first, tools=[TOOL])
        assert reply.json["output"][0]["content"][0]["text"] == "Goethe."
    assert len(keeper.asked) == 2
    other = [{**CALLED[0], "call_id": "call_2"}]
    assert (await ask(exact, other, previous_response_id=first, tools=[TOOL])).cache == "MISS"


async def test_a_store_less_answer_is_no_beginning(exact, keeper):
    reply = await ask(exact, "Who wrote Faust?", store=False)
    assert (await ask(exact, "And when?", previous_response_id=reply.json["id"])).cache == "BYPASS"
