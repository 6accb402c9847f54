"""The official client's Responses and legacy completions: what is shared, what keeps its id, what the client reads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.running import CHAT, EXACT_ONLY, running
from tests.flows.test_flow_sdk import Driver, drive, python_with
from tests.upstream import Chat, Json, Stream, event
from tests.waiting import PATIENCE_S

DRIVER = Path(__file__).with_name("responses_driver.py")
ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"
FORMS = ("whole", "stream", "helper")
TOOL = {"type": "function", "name": "get_weather", "strict": False, "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module", params=["2", "3"])
def client(request: pytest.FixtureRequest) -> Iterator[Driver]:
    command = [python_with(request.param), str(DRIVER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as child:
        try:
            yield Driver(request.param, child)
            child.stdin.close()
            assert child.wait(PATIENCE_S) == 0
        finally:
            child.kill()


# -- an upstream that speaks Responses --------------------------------------------------------------------------------


class Model:
    """Answers with a counter, and keeps what it answered under its id unless told otherwise."""

    def __init__(self) -> None:
        self.calls = 0
        self.kept: dict[str, dict[str, Any]] = {}

    def __call__(self, seen):
        if seen.method == "GET":
            found = self.kept.get(seen.path.rpartition("/")[2])
            return Json(200, found) if found else Json(404, {"error": {"message": "no such response", "code": "404"}})
        body = seen.json
        if "messages" in body:
            return Chat()
        self.calls += 1
        if "prompt" in body:
            return self.completion(body)
        if body.get("previous_response_id") and body["previous_response_id"] not in self.kept:
            return Json(400, {"error": {"message": "not found", "code": "previous_response_not_found", "param": "x"}})
        text = f"answer #{self.calls}: Ünïcode \U0001f600 \u2028 end"
        item = {"id": f"msg_up{self.calls}", "type": "message", "status": "completed", "role": "assistant", "content": [
            {"type": "output_text", "annotations": [], "logprobs": [], "text": text}]}  # fmt: skip
        if body.get("tools"):
            item = {"id": f"fc_up{self.calls}", "type": "function_call", "status": "completed", "name": "get_weather",
                    "call_id": f"call_up{self.calls}", "arguments": '{"city":"Paris"}'}  # fmt: skip
        whole = self.response(body, item)
        if whole["store"]:
            self.kept[whole["id"]] = whole
        return Stream([b"".join(response_events(whole, text))]) if body.get("stream") else Json(200, whole)

    def response(self, body, item):
        usage = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                 "output_tokens": 12, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 21}  # fmt: skip
        return {
            "id": f"resp_up{self.calls}", "object": "response", "created_at": 1_700_000_000, "status": "completed",
            "error": None, "incomplete_details": None, "instructions": body.get("instructions"), "model": body["model"],
            "output": [item], "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto",
            "tools": body.get("tools", []), "top_p": 1.0, "store": body.get("store", True), "metadata": {},
            "previous_response_id": body.get("previous_response_id"), "usage": usage,
        }  # fmt: skip

    def completion(self, body):
        head = {"id": f"cmpl-up{self.calls}", "object": "text_completion", "created": 1, "model": body["model"]}
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        pieces = [f" answer #{self.calls}", " ends."]
        if not body.get("stream"):
            choice = {"text": "".join(pieces), "index": 0, "logprobs": None, "finish_reason": "stop"}
            return Json(200, {**head, "choices": [choice], "usage": usage})
        assert body["stream_options"] == {"include_usage": True}
        choices = [{"text": text, "index": 0, "logprobs": None, "finish_reason": None} for text in pieces]
        choices.append({"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"})
        chunks = [event({**head, "choices": [choice], "usage": None}) for choice in choices]
        return Stream([*chunks, event({**head, "choices": [], "usage": usage}), event("[DONE]")])


def response_events(whole, text, cut=False):
    """A stream of the API; `cut` leaves out its last event."""
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    (item,) = whole["output"]
    place = {"item_id": item["id"], "output_index": 0}
    said = [("response.created", {"response": begun}), ("response.in_progress", {"response": begun})]
    if item["type"] == "message":
        (part,), at = item["content"], {**place, "content_index": 0}
        empty = {**item, "status": "in_progress", "content": []}
        said.append(("response.output_item.added", {"output_index": 0, "item": empty}))
        said.append(("response.content_part.added", {**at, "part": {**part, "text": ""}}))
        for piece in (text[:8], text[8:]):
            said.append(("response.output_text.delta", {**at, "delta": piece, "logprobs": []}))
        said.append(("response.output_text.done", {**at, "text": text, "logprobs": []}))
        said.append(("response.content_part.done", {**at, "part": part}))
    else:
        empty = {**item, "status": "in_progress", "arguments": ""}
        said.append(("response.output_item.added", {"output_index": 0, "item": empty}))
        said.append(("response.function_call_arguments.delta", {**place, "delta": item["arguments"]}))
        done = {**place, "arguments": item["arguments"], "name": item["name"]}
        said.append(("response.function_call_arguments.done", done))
    said.append(("response.output_item.done", {"output_index": 0, "item": item}))
    said.append((f"response.{whole['status']}", {"response": whole}))
    return [
        f"event: {kind}\n".encode() + event({"type": kind, **rest, "sequence_number": number})
        for number, (kind, rest) in enumerate(said[:-1] if cut else said)
    ]


@pytest.fixture
def model(up) -> Model:
    up.default = Model()
    return up.default


def step(form: str, *, prompt: str = ASKED, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    return {"form": form, "headers": headers, "ask": {"model": "gpt-4o-mini", "input": prompt, **fields}}


async def post(ibid, path: str, body: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    headers = {"Authorization": "Bearer sk-a"}
    async with ibid.session.post(ibid.url + path, json=body, headers=headers) as response:
        return response.headers, json.loads(await response.read())


# -- what the client reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [False, True], ids=["unkept", "kept"])
async def test_the_client_reads_one_entry_in_every_form(ibid, model, client, store):
    fresh = [step(form, store=store, headers={"x-cache-namespace": form}) for form in FORMS]
    direct = dict(zip(FORMS, await drive(client, ibid.url, fresh), strict=True))
    await ibid.settled()
    assert model.calls == 3
    again = [step(form, store=store, headers={"x-cache-namespace": first}) for first in FORMS for form in FORMS]
    alike = [step(form, store=store, prompt=REWORDED, headers={"x-cache-namespace": "whole"}) for form in FORMS]
    results = await drive(client, ibid.url, again + alike)
    assert model.calls == 3
    ids = set()
    for number, result in enumerate(results):
        original = direct[FORMS[number // 3]] if number < 9 else direct["whole"]
        assert (result["text"], result["status"], result["usage"]) == (original["text"], "completed", 21), result
        assert (result["id"] == original["id"]) is store
        assert (result["items"][0]["id"] == original["items"][0]["id"]) is store
        assert "".join(result.get("deltas", [result["text"]])) == result["text"]
        assert result.get("lifecycle", [result["id"]]) == [result["id"]]
        ids.add(result["id"])
        if number % 3 == 1:
            assert (result["cache"], result["tier"]) == ("HIT", "semantic" if number >= 9 else "exact")
    assert len(ids) == (3 if store else len(results))
    for result in results[4:6]:  # streams from what was streamed: event by event the same
        assert (result["types"], result["deltas"]) == (direct["stream"]["types"], direct["stream"]["deltas"])


async def test_a_kept_answer_can_be_followed_up_after_a_hit(ibid, model, up, client):
    (first,) = await drive(client, ibid.url, [step("whole")])
    await ibid.settled()
    (again,) = await drive(client, ibid.url, [step("stream")])
    assert (first["cache"], again["cache"], again["id"]) == ("MISS", "HIT", "resp_up1")
    (follow,) = await drive(client, ibid.url, [step("whole", prompt="And then?", previous_response_id=again["id"])])
    assert follow["cache"] == "MISS"
    assert up.requests[-1].json["previous_response_id"] == "resp_up1"
    async with ibid.session.get(f"{ibid.url}/v1/responses/{again['id']}",
                                headers={"Authorization": "Bearer sk-a"}) as found:  # fmt: skip
        assert (found.status, (await found.json())["output"]) == (200, again["items"])


async def test_calls_are_replayed_with_ids_of_their_own(data_dir, up, model, client):
    async with running(data_dir, up.url, {"cache": {**EXACT_ONLY["cache"], "cache_tool_calls": True}}) as ibid:
        for store in (False, True):
            (missed,) = await drive(client, ibid.url, [step("whole", tools=[TOOL], store=store)])
            await ibid.settled()
            hits = await drive(client, ibid.url, [step(form, tools=[TOOL], store=store) for form in FORMS])
            calls = {hit["items"][0]["call_id"] for hit in hits}
            assert [hit["items"][0]["arguments"] for hit in hits] == ['{"city":"Paris"}'] * 3
            assert (calls == {missed["items"][0]["call_id"]}) is store
            assert len(calls) == (1 if store else 3)
    assert model.calls == 2


async def test_the_client_raises_when_a_stream_breaks_off(exact, up, model, client):
    body = {"model": "gpt-4o-mini"}
    item = {"id": "m", "type": "message", "status": "completed", "role": "assistant", "content": [
        {"type": "output_text", "annotations": [], "logprobs": [], "text": "Half an answer"}]}  # fmt: skip
    cut = b"".join(response_events(model.response(body, item), "Half an answer", cut=True))
    up.script(*(Stream([cut], cut=how) for how in ("fin", "rst", None) for _ in range(2)), Stream([cut, cut[:20]]))
    forms = ["stream", "helper"] * 3 + ["stream"]
    results = await drive(client, exact.url, [step(form, prompt=f"{ASKED} {n}") for n, form in enumerate(forms)])
    for result in results:
        assert result["error"]["class"] == "APIError", result
        assert result["error"]["code"] in ("upstream_incomplete", "upstream_reset")
    assert results[0]["before"] >= 8
    await exact.settled()
    assert await exact.entries() == []


async def test_an_incomplete_response_is_an_honest_end_and_not_stored(exact, up, model, client):
    item = {"id": "m", "type": "message", "status": "incomplete", "role": "assistant", "content": [
        {"type": "output_text", "annotations": [], "logprobs": [], "text": "Half an answer"}]}  # fmt: skip
    whole = {**model.response({"model": "gpt-4o-mini"}, item), "status": "incomplete",
             "incomplete_details": {"reason": "max_output_tokens"}}  # fmt: skip
    up.script(Stream(response_events(whole, "Half an answer")), Json(200, whole))
    streamed, read = await drive(client, exact.url, [step("stream"), step("whole")])
    assert (streamed["status"], streamed["types"][-1]) == ("incomplete", "response.incomplete")
    assert (read["status"], read["cache"]) == ("incomplete", "MISS")
    await exact.settled()
    assert await exact.entries() == []


# -- who shares with whom ---------------------------------------------------------------------------------------------


async def test_chat_and_unkept_responses_share_their_answers(exact, model, up):
    chat = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": ASKED}]}
    _, said = await post(exact, CHAT, chat)
    await exact.settled()
    headers, response = await post(exact, "/v1/responses", {"model": "gpt-4o-mini", "input": ASKED, "store": False})
    assert headers["x-cache"] == "HIT"
    assert response["output"][0]["content"][0]["text"] == said["choices"][0]["message"]["content"]
    assert response["usage"]["total_tokens"] == said["usage"]["total_tokens"]
    assert response["id"].startswith("resp_")
    _, told = await post(exact, "/responses", {"model": "gpt-4o-mini", "input": "Why?", "store": False})
    await exact.settled()
    headers, answered = await post(exact, CHAT, {**chat, "messages": [{"role": "user", "content": "Why?"}]})
    assert headers["x-cache"] == "HIT"
    assert answered["choices"][0]["message"]["content"] == told["output"][0]["content"][0]["text"]
    assert (answered["object"], answered["usage"]["completion_tokens"]) == ("chat.completion", 12)
    assert len(up.requests) == 2


async def test_an_answer_to_be_kept_comes_from_no_entry_that_is_not(exact, model, up):
    body = {"model": "gpt-4o-mini", "input": ASKED}
    await post(exact, CHAT, {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": ASKED}]})
    await post(exact, "/v1/responses", {**body, "store": False})
    await exact.settled()
    headers, kept = await post(exact, "/v1/responses", body)
    assert (headers["x-cache"], kept["id"]) == ("MISS", "resp_up1")
    await exact.settled()
    headers, again = await post(exact, "/v1/responses", {**body, "store": True, "metadata": {"run": "8"}})
    assert (headers["x-cache"], again["id"]) == ("HIT", "resp_up1")
    assert len(up.requests) == 2


async def test_a_stream_is_relayed_as_it_came(exact, model, up):
    body = {"model": "gpt-4o-mini", "input": ASKED, "stream": True}
    async with exact.session.post(exact.url + "/v1/responses", json=body, headers={"Authorization": "Bearer x"}) as r:
        passed = await r.read()
    assert json.loads(up.requests[0].body) == body
    whole = model.kept["resp_up1"]
    assert passed == b"".join(response_events(whole, whole["output"][0]["content"][0]["text"]))


# -- legacy completions -----------------------------------------------------------------------------------------------


async def test_the_client_reads_the_same_completions(exact, model, client):
    ask = {"model": "gpt-3.5-turbo-instruct", "prompt": "Once upon a time there was a", "max_tokens": 50}
    forms = ("completion_stream", "completion", "completion_stream")
    steps = [{"form": form, "ask": ask} for form in forms]
    steps.append({"form": "completion_stream", "ask": {**ask, "stream_options": {"include_usage": True}}})
    (missed,) = await drive(client, exact.url, steps[:1])
    await exact.settled()
    hits = await drive(client, exact.url, steps[1:])
    assert (missed["cache"], [hit["cache"] for hit in hits]) == ("MISS", ["HIT"] * 3)
    assert {result["text"] for result in (missed, *hits)} == {" answer #1 ends."}
    assert {result["finish"] for result in (missed, *hits)} == {"stop"}
    assert [result["usage"] for result in (missed, *hits)] == [[], [7], [], [7]]
    ids = [result["ids"] for result in (missed, *hits)]
    assert all(len(found) == 1 and found[0].startswith("cmpl-") for found in ids)
    assert len({found[0] for found in ids}) == 4
    assert model.calls == 1


async def test_a_completion_never_answers_a_chat(exact, model, up):
    await post(exact, "/v1/completions", {"model": "gpt-4o-mini", "prompt": ASKED})
    await exact.settled()
    headers, _ = await post(exact, CHAT, {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": ASKED}]})
    assert headers["x-cache"] == "MISS"
    headers, _ = await post(exact, "/v1/completions", {"model": "gpt-4o-mini", "prompt": [ASKED, ASKED]})
    assert (headers["x-cache"], headers["x-cache-reason"]) == ("BYPASS", "n")
    assert len(up.requests) == 3
