"""Virtual keys in batches and deferred calls: limits line by line, whose rows they are, revocation, restarts."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anthropic
import openai
import pytest

from proxy.core.keys import _LENGTHS_MS, Window
from tests.batch_upstream import BatchUpstream
from tests.flows.batching import balanced, ended, hand_in, line, rows, sdk, text
from tests.flows.running import KEYED, Client, Ibid, Reply, running, serving, until
from tests.flows.test_flow_batches_restart import written
from tests.flows.test_flow_deferred import get, later
from tests.flows.test_flow_keys import make, price_of, shown
from tests.upstream import Chat, Json
from tests.waiting import PATIENCE_S

BATCHED = {**KEYED, "batch": {"poll_interval_s": 0.02}}
SMALL = {"max_tokens": 20}
SAME = Chat(text="the same answer to each")


def asked(count: int, word: str = "hose") -> list[Any]:
    """Lines that cost the same."""
    return [line(f"l{n}", f"How do I mend {word} number {n}?", **SMALL) for n in range(count)]


def said(row: Any) -> tuple[int, str]:
    """Status and code of a line of the error file."""
    return row["response"]["status_code"], row["response"]["body"]["error"]["code"]


async def spent(ibid: Ibid, made: dict[str, Any]) -> int:
    found = await ibid.sql(f"SELECT SUM(actual_nusd) AS n FROM request WHERE key_id = '{made['id']}'")
    return int(found[0]["n"] or 0)


async def limit(ibid: Client, made: dict[str, Any]) -> tuple[str, str]:
    """What is spent and held of a key's only limit, as `ibid keys show` tells it."""
    found = (await shown(ibid, made))["limits"][0]
    return found["spent"], found["held"]


@pytest.mark.parametrize("has_api", [True, False])
async def test_a_budget_ends_in_the_middle_of_a_batch_to_the_nano_dollar(data_dir, up, has_api):
    theirs = BatchUpstream(up) if has_api else None
    if theirs is None:
        up.default = SAME
    async with running(data_dir, up.url, BATCHED) as ibid:
        white = await make(ibid, "white")
        async with sdk(ibid, white["secret"]) as client:
            await ended(client, await hand_in(client, asked(1)))
        each = await spent(ibid, white)
        assert each > 0
        friend = await make(ibid)
        async with sdk(ibid, friend["secret"]) as client:
            await ended(client, await hand_in(client, [line("k", "How do I mend what is known?", **SMALL)]))
        before = len(up.requests) if theirs is None else theirs.lines
        made = await make(ibid, limit_usd=[f"{price_of(3 * each)}/month"])
        lines = [*asked(7), line("known", "How do I mend what is known?", **SMALL)]
        async with sdk(ibid, made["secret"]) as client:
            batch = await ended(client, await hand_in(client, lines))
            good, bad = await rows(client, batch.output_file_id), await rows(client, batch.error_file_id)
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 4, 4)
        assert "known" in good
        assert {said(row) for row in bad.values()} == {(429, "budget_exceeded")}
        assert good.keys() | bad.keys() == {one["custom_id"] for one in lines}
        assert (up.meter.calls - 2 if theirs is None else theirs.lines - before) == 3
        assert await limit(ibid, made) == (price_of(3 * each), "0.000000000")
        assert await spent(ibid, made) == 3 * each
        mine = await ibid.sql(f"SELECT DISTINCT team FROM request WHERE key_id = '{made['id']}'")
        assert mine == [{"team": "red"}]
        assert await ibid.sql("SELECT 1 AS one FROM request WHERE key_id IS NULL") == []
        assert await balanced(ibid)
        assert not ibid.app.keys.held


async def test_what_a_providers_batch_may_cost_is_held_until_it_has_come(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with running(data_dir, up.url, BATCHED) as ibid:
        made = await make(ibid, limit_usd=["1/month"], limit_requests=["100/day"])
        async with sdk(ibid, made["secret"]) as client:
            batch = await hand_in(client, asked(5))
            await until(lambda: theirs.batches)
            limits = (await shown(ibid, made))["limits"]
            assert (float(limits[0]["held"]) > 0, limits[1]["held"]) == (True, 5)
            theirs.polls = 1
            await ended(client, batch)
        limits = (await shown(ibid, made))["limits"]
        assert [(one["held"], one["spent"]) for one in limits] == [
            ("0.000000000", price_of(await spent(ibid, made))), (0, 5)
        ]  # fmt: skip


@pytest.mark.parametrize("has_api", [True, False])
async def test_a_limit_of_requests_that_soon_begins_anew_is_waited_for(data_dir, up, monkeypatch, has_api):
    monkeypatch.setitem(_LENGTHS_MS, Window.MINUTE, 1000)
    if has_api:
        BatchUpstream(up)
    async with running(data_dir, up.url, BATCHED) as ibid:
        made = await make(ibid, limit_requests=["3/minute"])
        began = time.monotonic()
        async with sdk(ibid, made["secret"]) as client:
            batch = await ended(client, await hand_in(client, asked(7)))
        assert (batch.request_counts.completed, batch.request_counts.failed) == (7, 0)
        assert time.monotonic() - began > 1  # three windows at least
        hour = await make(ibid, limit_requests=["3/day"])
        async with sdk(ibid, hour["secret"]) as client:
            batch = await ended(client, await hand_in(client, asked(7, "pump")))
            bad = await rows(client, batch.error_file_id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 4)
        assert {said(row) for row in bad.values()} == {(429, "rate_limit_exceeded")}


async def test_repeats_count_as_requests_and_cost_nothing(data_dir, up):
    up.default = SAME
    async with running(data_dir, up.url, BATCHED) as ibid:
        made = await make(ibid, limit_requests=["100/day"])
        async with sdk(ibid, made["secret"]) as client:
            lines = [line(f"l{n}", f"What is part {n % 2} for?") for n in range(10)]
            batch = await ended(client, await hand_in(client, lines))
        assert batch.request_counts.completed == 10
        assert (await shown(ibid, made))["limits"][0]["spent"] == 10
        assert up.meter.calls == 2


@pytest.mark.parametrize("has_api", [True, False])
async def test_a_model_that_a_key_does_not_allow_is_refused_line_by_line(data_dir, up, has_api):
    if has_api:
        BatchUpstream(up)
    async with running(data_dir, up.url, BATCHED) as ibid:
        made = await make(ibid, models=["gpt-4o*", "claude-x"], limit_usd=["5/day"])
        other = line("bad", "What is a hose?")
        other["body"]["model"] = "gpt-5"
        async with sdk(ibid, made["secret"]) as client:
            batch = await ended(client, await hand_in(client, [line("good", "What is a hose?"), other]))
            assert text((await rows(client, batch.output_file_id))["good"]).endswith("What is a hose?")
            (bad,) = (await rows(client, batch.error_file_id)).values()
        assert (bad["custom_id"], said(bad)) == ("bad", (403, "model_not_allowed"))
        async with anthropic.AsyncAnthropic(base_url=ibid.url, api_key=made["secret"], max_retries=0) as client:
            body: Any = {"model": "claude-y", "max_tokens": 9, "messages": [{"role": "user", "content": "hose?"}]}
            batch = await client.messages.batches.create(requests=[{"custom_id": "m", "params": body}])
            async with asyncio.timeout(PATIENCE_S):
                while batch.processing_status != "ended":
                    await asyncio.sleep(0.01)
                    batch = await client.messages.batches.retrieve(batch.id)
            (result,) = [one async for one in await client.messages.batches.results(batch.id)]
        assert (result.custom_id, result.result.type) == ("m", "errored")
        assert result.result.error.error.type == "permission_error"
        assert "claude-y" in result.result.error.error.message


async def test_a_revoked_key_ends_the_rest_of_a_batch_of_ordinary_calls(data_dir, up, monkeypatch):
    gate = asyncio.Event()

    async def held(_seen):
        await gate.wait()
        return SAME

    noticed = asyncio.Event()

    async with running(data_dir, up.url, {**BATCHED, "batch": {"concurrency": 2}}) as ibid:
        look = ibid.app.keys.barred

        def barred(key_id):
            if (found := look(key_id)) is not None:
                noticed.set()
            return found

        monkeypatch.setattr(ibid.app.keys, "barred", barred)
        made, friend = await make(ibid), await make(ibid)
        async with sdk(ibid, made["secret"]) as client, sdk(ibid, friend["secret"]) as other:
            up.script(Json(404, {}), held, held)
            up.default = SAME
            batch = await hand_in(client, asked(20))
            await until(lambda: len(up.requests) == 3)
            await ibid.admin("POST", f"/cache/keys/{made['id']}/revoke")
            await noticed.wait()
            gate.set()
            with pytest.raises(openai.AuthenticationError):
                await client.batches.retrieve(batch.id)
            batch = await ended(other, batch)  # another key of the project
            assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 18)
            bad = await rows(other, batch.error_file_id)
        assert {said(row) for row in bad.values()} == {(401, "key_revoked")}
        assert up.meter.calls == 2


async def test_a_revoked_key_ends_what_a_provider_has_not_answered(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with running(data_dir, up.url, {**KEYED, "batch": {"poll_interval_s": 60}}) as ibid:
        made, friend = await make(ibid, limit_usd=["1/day"]), await make(ibid)
        async with sdk(ibid, made["secret"]) as client, sdk(ibid, friend["secret"]) as other:
            batch = await hand_in(client, [*asked(6), line("again", asked(1)[0]["body"]["messages"][0]["content"])])
            await until(lambda: [one.status for one in theirs.batches.values()] == ["in_progress"])
            await ibid.admin("POST", f"/cache/keys/{made['id']}/revoke")
            batch = await ended(other, batch)
            assert (batch.status, batch.request_counts.total) == ("completed", 7)
            good, bad = await rows(other, batch.output_file_id), await rows(other, batch.error_file_id)
        assert sorted(good) in (["again", "l0"], ["l0"])  # what it had answered before it was told to stop
        assert {said(row) for row in bad.values()} == {(401, "key_revoked")}
        assert len(good) + len(bad) == 7
        assert (await limit(ibid, made))[1] == "0.000000000"
        assert theirs.lines == 1
        assert await balanced(ibid)


async def test_a_batch_of_a_key_goes_on_after_a_kill_without_its_owner(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with serving(data_dir, up.url, BATCHED) as process:
        made = await make(process, limit_usd=["1/month"])
        async with sdk(process, made["secret"]) as client:
            await hand_in(client, asked(5))
            await until(lambda: written(data_dir, "SELECT state FROM batch_part") == [("running",)])
        held = (await limit(process, made))[1]
        process.kill()
    for file in data_dir.rglob("*"):
        if file.is_file() and "models" not in file.parts:
            assert made["secret"].encode() not in file.read_bytes(), file
    async with serving(data_dir, up.url, BATCHED) as process:

        async def is_held() -> bool:
            return (await limit(process, made))[1] == held

        await until(is_held)  # what is with the provider is set aside again
        theirs.polls = 1
        await until(lambda: written(data_dir, "SELECT status, succeeded FROM batch_job") == [("completed", 5)])
        await until(lambda: written(data_dir, "SELECT COUNT(*) FROM request") == [(5,)])
        assert written(data_dir, "SELECT DISTINCT key_id, team FROM request") == [(made["id"], "red")]
        ((cost,),) = written(data_dir, "SELECT SUM(actual_nusd) FROM request")
        assert await limit(process, made) == (price_of(cost), "0.000000000")
    assert (len(theirs.batches), theirs.lines) == (1, 5)


async def test_a_rotated_key_changes_nothing_and_one_that_expires_ends_its_batch(data_dir, up, monkeypatch):
    theirs = BatchUpstream(up, polls=0)
    async with running(data_dir, up.url, BATCHED) as ibid:
        made = await make(ibid, limit_usd=["1/day"])
        async with sdk(ibid, made["secret"]) as client:
            batch = await hand_in(client, asked(3))
            await until(lambda: theirs.batches)
        made = await ibid.admin("POST", f"/cache/keys/{made['id']}/rotate")
        await asyncio.sleep(1.1)
        theirs.polls = 1
        async with sdk(ibid, made["secret"]) as client:
            batch = await ended(client, batch)
            assert batch.request_counts.completed == 3
        theirs.polls = 0
        short, friend = await make(ibid, expires="1h"), await make(ibid)
        async with sdk(ibid, short["secret"]) as client, sdk(ibid, friend["secret"]) as other:
            batch = await hand_in(client, asked(3, "pump"))
            monkeypatch.setattr(ibid.app.keys, "_clock", lambda: time.time() + 7200)
            batch = await ended(other, batch)
            bad = await rows(other, batch.error_file_id)
        assert {said(row) for row in bad.values()} == {(401, "key_expired")}


async def test_a_key_revoked_while_nothing_ran_ends_its_batch_at_the_start(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with serving(data_dir, up.url, BATCHED) as process:
        made = await make(process)
        async with sdk(process, made["secret"]) as client:
            await hand_in(client, asked(5))
            await until(lambda: written(data_dir, "SELECT state FROM batch_part") == [("running",)])
        await process.admin("POST", f"/cache/keys/{made['id']}/revoke")
        process.kill()
    async with serving(data_dir, up.url, BATCHED):
        await until(lambda: written(data_dir, "SELECT status, errored FROM batch_job") == [("completed", 4)])
    assert theirs.lines == 1


@pytest.mark.parametrize("patient", [False, True])
async def test_a_deferred_call_is_its_keys(data_dir, up, patient):
    theirs = BatchUpstream(up)
    headers = {"Prefer": "respond-async", **({"x-deadline": "24h"} if patient else {})}
    sections = {**KEYED, "batch": {"poll_interval_s": 0.02, "collect_s": 0.1}}
    async with running(data_dir, up.url, sections) as ibid:
        made = await make(ibid, limit_usd=["1/month"], models=["gpt-4o*"])
        ibid.key = made["secret"]
        place = await later(ibid, "What is a hose?", headers)
        reply = await finished(ibid, place, made["secret"])
        assert reply.status == 200
        assert await limit(ibid, made) == (price_of(await spent(ibid, made)), "0.000000000")
        assert await ibid.sql("SELECT DISTINCT key_id, team FROM request") == [{"key_id": made["id"], "team": "red"}]
        assert (len(theirs.batches), up.meter.calls) == ((1, 0) if patient else (0, 1))
        refused = await ibid.ask("What is a hose?", headers=headers, model="gpt-5")
        assert (refused.status, refused.json["error"]["code"]) == (403, "model_not_allowed")

        poor = await make(ibid, limit_usd=["0/month"])
        ibid.key = poor["secret"]
        known, new = [await later(ibid, f"What is a {word}?", headers) for word in ("hose", "pump")]
        hit = await finished(ibid, known, poor["secret"])
        assert (hit.status, hit.cache, hit.text) == (200, "HIT", reply.text)
        told = await finished(ibid, new, poor["secret"])
        assert (told.status, told.json["error"]["code"], told.headers["x-should-retry"]) == (
            429,
            "budget_exceeded",
            "false",
        )
        assert await balanced(ibid)


async def finished(ibid: Client, place: str, key: str) -> Reply:
    async with asyncio.timeout(PATIENCE_S):
        reply = await get(ibid, place, key)
        while reply.status == 202:
            await asyncio.sleep(0.01)
            reply = await get(ibid, place, key)
    return reply


async def test_a_deferred_call_waits_for_what_others_hold_and_ends_with_its_key(data_dir, up):
    gate = asyncio.Event()

    async def held(_seen):
        await gate.wait()
        return SAME

    async with running(data_dir, up.url, BATCHED) as ibid:
        made, friend = await make(ibid, limit_usd=["0.000001/month"]), await make(ibid)
        ibid.key = made["secret"]
        up.script(held)
        first = asyncio.create_task(ibid.ask("What is a hose?"))
        await until(lambda: len(up.requests) == 1)
        place = await later(ibid, "What is a pump?")
        await asyncio.sleep(0.2)
        assert (await get(ibid, place, made["secret"])).status == 202
        await ibid.admin("POST", f"/cache/keys/{made['id']}/revoke")
        told = await finished(ibid, place, friend["secret"])
        assert (told.status, told.json["error"]["code"]) == (401, "key_revoked")
        gate.set()
        assert (await first).status == 200
        assert len(up.requests) == 1


async def test_a_patient_client_that_stays_does_not_stand_in_its_own_way(data_dir, up):
    BatchUpstream(up)
    async with running(data_dir, up.url, {**KEYED, "batch": {"poll_interval_s": 0.02, "collect_s": 0.1}}) as ibid:
        made = await make(ibid, limit_usd=["0.000001/month"])  # less than one answer may cost
        async with asyncio.timeout(PATIENCE_S):
            reply = await ibid.ask("What is a hose?", key=made["secret"], headers={"x-deadline": "24h"})
        assert (reply.status, "hose" in reply.text) == (200, True)
        assert await limit(ibid, made) == (price_of(await spent(ibid, made)), "0.000000000")
        assert await ibid.sql("SELECT key_id, tier FROM request JOIN upstream_call ON request_id = request.id") == [
            {"key_id": made["id"], "tier": "batch"}
        ]


async def test_a_deferred_call_of_a_key_goes_on_after_a_kill_without_its_owner(data_dir, up):
    gate = asyncio.Event()

    async def held(_seen):
        await gate.wait()
        return SAME

    async with serving(data_dir, up.url, BATCHED) as process:
        made = await make(process, limit_usd=["1/month"])
        up.script(held)
        reply = await process.ask("What is a hose?", key=made["secret"], headers={"Prefer": "respond-async"})
        assert reply.status == 202
        await until(lambda: len(up.requests) == 1)
        process.kill()
    gate.set()
    up.default = SAME
    async with serving(data_dir, up.url, BATCHED) as process:
        await until(lambda: written(data_dir, "SELECT reply IS NOT NULL FROM deferred") == [(1,)])
        await until(lambda: written(data_dir, "SELECT key_id, team FROM request") == [(made["id"], "red")])
        ((cost,),) = written(data_dir, "SELECT actual_nusd FROM request")
        assert await limit(process, made) == (price_of(cost), "0.000000000")
        told = await finished(process, reply.headers["Location"], made["secret"])
        assert (told.status, told.text) == (200, "the same answer to each")


async def test_a_keys_plan_and_scope_are_those_of_its_live_requests(data_dir, up):
    async with running(data_dir, up.url, BATCHED) as ibid:
        made = await make(ibid)
        live = await ibid.ask("What is a hose?", key=made["secret"])
        await ibid.settled()
        async with sdk(ibid, made["secret"]) as client, sdk(ibid, (await make(ibid, "blue"))["secret"]) as blue:
            batch = await ended(client, await hand_in(client, [line("a", "What is a hose?")]))
            assert text((await rows(client, batch.output_file_id))["a"]) == live.text
            batch = await ended(blue, await hand_in(blue, [line("a", "What is a hose?")]))
            assert text((await rows(blue, batch.output_file_id))["a"]) != live.text
            with pytest.raises(openai.NotFoundError):
                await client.batches.retrieve(batch.id)
        plain = await make(ibid, plan="-exact,-semantic")
        async with sdk(ibid, plain["secret"]) as client:
            calls = up.meter.calls
            await ended(client, await hand_in(client, [line("a", "What is a hose?")]))
            assert up.meter.calls == calls + 1


async def test_what_is_not_ours_is_still_refused_where_money_is_limited(data_dir, up):
    up.default = lambda seen: Json(200, {"ok": True})
    async with running(data_dir, up.url, BATCHED) as ibid:
        made = await make(ibid, limit_usd=["1/day"])
        async with sdk(ibid, made["secret"]) as client:
            for asked_of in ("file-theirs", "file-ibid"):
                with pytest.raises(openai.PermissionDeniedError) as caught:
                    await client.batches.create(
                        input_file_id=asked_of, endpoint="/v1/chat/completions", completion_window="24h"
                    )
                assert caught.value.code == "cost_not_told"
        assert up.requests == []
