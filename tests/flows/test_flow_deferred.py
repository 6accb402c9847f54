"""`Prefer: respond-async`: plain calls whose answers are fetched later, alone or through a provider's batch."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.batch_upstream import BatchUpstream
from tests.flows.batching import QUICK, balanced
from tests.flows.running import CHAT, MODEL, Reply, chat_body, running, serving, until
from tests.upstream import Chat, Json
from tests.waiting import PATIENCE_S

LATER = {"Prefer": "respond-async"}
PATIENT = {**LATER, "x-deadline": "24h"}
TOGETHER = {**QUICK, "batch": {"poll_interval_s": 0.02, "collect_s": 0.2}}
COLLECTING = {**QUICK, "batch": {"poll_interval_s": 0.02, "collect_s": 3600}}  # until there are COLLECT_LINES


async def get(ibid, path: str, key: str = "sk-a") -> Reply:
    async with ibid.session.get(ibid.url + path, headers={"Authorization": f"Bearer {key}"}) as response:
        return Reply(response.status, response.headers, await response.read())


async def later(ibid, prompt: str, headers=LATER, **fields: Any) -> str:
    """Where the answer will be."""
    reply = await ibid.ask(prompt, headers=headers, **fields)
    assert (reply.status, reply.json["status"], reply.json["object"]) == (202, "in_progress", "deferred")
    assert reply.headers["Preference-Applied"] == "respond-async"
    assert int(reply.headers["Retry-After"]) > 0
    return reply.headers["Location"]


async def fetched(ibid, place: str) -> Reply:
    async with asyncio.timeout(PATIENCE_S):
        reply = await get(ibid, place)
        while reply.status == 202:
            await asyncio.sleep(0.01)
            reply = await get(ibid, place)
    return reply


async def test_the_answer_comes_later_with_its_own_status_and_headers(data_dir, up):
    gate = asyncio.Event()
    async with running(data_dir, up.url, QUICK) as ibid:

        async def held(_seen):
            await gate.wait()
            return Chat()

        up.script(held)
        place = await later(ibid, "What is a hinge?")
        reply = await get(ibid, place)
        assert (reply.status, reply.headers["Location"]) == (202, place)
        assert (await get(ibid, place, "sk-b")).status == 404
        for name in ("def_ibid" + "0" * 24, "other"):
            assert (await get(ibid, f"/v1/deferred/{name}")).json["error"]["code"] == "not_found"
        gate.set()
        reply = await fetched(ibid, place)
        assert (reply.status, reply.cache, reply.headers["Content-Type"]) == (
            200,
            "MISS",
            "application/json; charset=utf-8",
        )
        assert reply.text.endswith("What is a hinge?")
        assert (await ibid.row(reply))["lane"] == "forward"
        again = await fetched(ibid, await later(ibid, "What is a hinge?"))
        assert (again.cache, again.tier, again.text) == ("HIT", "exact", reply.text)
        assert (await fetched(ibid, place)).body == reply.body
        streamed = await fetched(ibid, await later(ibid, "What is a hinge?", stream=True))
        assert (streamed.cache, streamed.text) == ("HIT", reply.text)
        up.script(Json(400, {"error": {"message": "no", "type": "x", "param": None, "code": "y"}}))
        refused = await fetched(ibid, await later(ibid, "What is refused?"))
        assert (refused.status, refused.json["error"]["code"]) == (400, "y")
        assert await balanced(ibid)


@pytest.mark.parametrize("said", ["soon", "5", "-1h", "1w", ""])
async def test_a_deadline_that_cannot_be_read_is_refused(exact, up, said):
    reply = await exact.ask("What is a hinge?", headers={**LATER, "x-deadline": said})
    assert (reply.status, reply.json["error"]["code"], reply.json["error"]["param"]) == (
        400,
        "invalid_value",
        "x-deadline",
    )
    assert not up.requests


async def test_patient_calls_go_together_through_the_providers_batch(data_dir, up, monkeypatch):
    monkeypatch.setattr("proxy.batch.deferred.COLLECT_LINES", 3)
    theirs = BatchUpstream(up)
    async with running(data_dir, up.url, COLLECTING) as ibid:
        known = await ibid.fill("What is known?")
        places = [await later(ibid, f"What is {n}?", PATIENT) for n in (1, 2, 1)]
        places.append(await later(ibid, "What is known?", PATIENT))
        replies = [await fetched(ibid, place) for place in places]
        assert [reply.status for reply in replies] == [200] * 4
        assert [reply.text.endswith(f"What is {n}?") for reply, n in zip(replies, (1, 2, 1), strict=False)] == [
            True
        ] * 3
        assert (replies[3].cache, replies[3].text) == ("HIT", known.text)
        assert replies[0].cache == "MISS"
        (handed,) = theirs.batches.values()
        assert (len(handed.requests), up.meter.calls) == (2, 1)
        mechanisms = await ibid.sql("SELECT mechanism, COUNT(*) AS n FROM saving GROUP BY mechanism ORDER BY mechanism")
        assert [(row["mechanism"], row["n"]) for row in mechanisms] == [
            ("batch.dedup", 1), ("batch.provider", 2), ("cache.exact", 1)
        ]  # fmt: skip
        async with ibid.session.get(ibid.url + "/v1/batches", headers={"Authorization": "Bearer sk-a"}) as response:
            assert (await response.json())["data"] == []  # nobody sees the batch they went with
        assert await balanced(ibid)


async def test_what_the_batch_does_not_bring_is_asked_for_alone(data_dir, up, monkeypatch):
    monkeypatch.setattr("proxy.batch.deferred.COLLECT_LINES", 2)
    theirs = BatchUpstream(up, outcome="expired")
    theirs.expire = {0}
    async with running(data_dir, up.url, COLLECTING) as ibid:
        places = [await later(ibid, f"What is {n}?", PATIENT) for n in (1, 2)]
        replies = [await fetched(ibid, place) for place in places]
        assert [reply.status for reply in replies] == [200, 200]
        assert (len(theirs.batches), theirs.lines, up.meter.calls) == (1, 1, 1)
        assert await balanced(ibid)


async def test_an_impatient_call_and_an_upstream_without_batches_are_asked_at_once(data_dir, up):
    theirs = BatchUpstream(up)
    async with running(data_dir, up.url, TOGETHER) as ibid:
        assert (await fetched(ibid, await later(ibid, "What is now?", {**LATER, "x-deadline": "10m"}))).status == 200
        assert theirs.batches == {}
        up.default = lambda seen: Chat() if seen.path == CHAT else Json(404, {})
    async with running(data_dir, up.url, TOGETHER) as ibid:
        assert (await fetched(ibid, await later(ibid, "What is then?", PATIENT))).status == 200
    assert up.meter.calls == 2


async def test_a_message_is_deferred_in_its_own_dialect(data_dir, up):
    theirs = BatchUpstream(up)
    body = {"model": "claude-sonnet-4-6", "max_tokens": 9, "messages": [{"role": "user", "content": "What is it?"}]}
    headers = {"x-api-key": "sk-a", "anthropic-version": "2023-06-01", "Content-Type": "application/json", **PATIENT}
    async with running(data_dir, up.url, TOGETHER) as ibid:
        async with ibid.session.post(ibid.url + "/v1/messages", data=json.dumps(body), headers=headers) as response:
            assert response.status == 202
            place = response.headers["Location"]
        reply = await fetched(ibid, place)
        assert reply.json["content"][0]["text"].endswith("What is it?")
        assert len(theirs.batches) == 1


async def test_a_key_in_the_query_is_not_written_down(data_dir, up):
    said = {"candidates": [{"content": {"role": "model", "parts": [{"text": "It is."}]}, "finishReason": "STOP"}],
            "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2, "totalTokenCount": 5}}  # fmt: skip
    up.default = Json(200, said)
    path = "/v1beta/models/gemini-3-flash:generateContent?key=AIza-secret"
    body = {"contents": [{"role": "user", "parts": [{"text": "What is it?"}]}]}
    async with running(data_dir, up.url, QUICK) as ibid:
        async with ibid.session.post(ibid.url + path, json=body, headers=LATER) as response:
            assert response.status == 202
            place = response.headers["Location"]
        async with asyncio.timeout(PATIENCE_S):
            status = 202
            while status == 202:
                async with ibid.session.get(f"{ibid.url}{place}?key=AIza-secret") as response:
                    status, told = response.status, await response.json()
        assert told["candidates"][0]["content"]["parts"][0]["text"] == "It is."
        assert up.requests[-1].header("x-goog-api-key") == "AIza-secret"
        for file in data_dir.rglob("*"):
            if file.is_file() and "models" not in file.parts:
                assert b"AIza-secret" not in file.read_bytes(), file


async def test_deferred_calls_survive_a_kill_and_wait_for_their_owner(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with serving(data_dir, up.url, {**QUICK, "batch": {"poll_interval_s": 0.02, "collect_s": 0}}) as process:
        handed = await later(process, "What is handed in?", PATIENT)
        await until(lambda: theirs.batches)
        process.kill()
    async with serving(data_dir, up.url, {**QUICK, "batch": {"poll_interval_s": 0.02, "collect_s": 60}}) as process:
        collected = await later(process, "What is collected?", PATIENT)
        process.kill()
    for file in data_dir.rglob("*"):
        if file.is_file() and "models" not in file.parts:
            assert b"sk-a" not in file.read_bytes(), file
    theirs.polls = 1
    async with serving(data_dir, up.url, {**QUICK, "batch": {"poll_interval_s": 0.02, "collect_s": 0}}) as process:
        for place, word in ((handed, "handed in"), (collected, "collected")):
            assert (await fetched(process, place)).text.endswith(f"What is {word}?")
    assert (len(theirs.batches), theirs.lines) == (2, 2)


async def test_without_the_batch_api_a_preference_is_ignored(data_dir, up):
    async with running(data_dir, up.url, {**QUICK, "batch": {"serve": False}}) as ibid:
        reply = await ibid.send(chat_body("What is a hinge?"), headers=LATER)
        assert (reply.status, reply.json["model"]) == (200, MODEL)


async def test_a_client_that_stays_gets_the_answer_of_a_batch_on_its_open_connection(data_dir, up, monkeypatch):
    monkeypatch.setattr("proxy.client.delivery.HEARTBEAT_S", 0.1)
    monkeypatch.setattr("proxy.batch.deferred.COLLECT_LINES", 3)
    batches = BatchUpstream(up, polls=3)
    up.default = batches.answer
    async with running(data_dir, up.url, COLLECTING) as ibid:
        asks = [ibid.ask(f"What is hinge {number}?", headers={"x-deadline": "24h"}) for number in range(3)]
        replies = await asyncio.gather(*asks)
        assert [reply.status for reply in replies] == [200] * 3
        assert all("detail=held" in reply.headers["Cache-Status"] for reply in replies)
        assert all(reply.body.startswith(b"\n") and "hinge" in reply.text for reply in replies)
        assert all("defer" in reply.headers["x-plan"] for reply in replies)
        assert len(batches.batches) == 1
        known = await ibid.ask("What is hinge 1?")
        assert (known.tier, known.text) == ("exact", replies[1].text)
        calls = await ibid.sql("SELECT tier, COUNT(*) AS n FROM upstream_call GROUP BY tier")
        assert [row["n"] for row in calls] == [3]
        assert await balanced(ibid)


async def test_without_a_batch_api_a_patient_client_is_answered_as_usual(data_dir, up):
    async with running(data_dir, up.url, QUICK) as ibid:
        reply = await ibid.ask("What is a hinge?", headers={"x-deadline": "2h"})
        assert (reply.status, reply.text.endswith("What is a hinge?")) == (200, True)
        up.script(Json(400, {"error": {"message": "no", "type": "x", "param": None, "code": "y"}}))
        refused = await ibid.ask("What is refused?", headers={"x-deadline": "2h"})
        assert (refused.status, refused.json["error"]["message"], refused.json["error"]["code"]) == (400, "no", "y")
        assert await balanced(ibid)
