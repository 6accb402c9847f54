"""Identical requests in flight share one upstream call, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from tests.flows.running import chat_body, running, told_apart, until
from tests.upstream import Chat, Json, Raw
from tests.waiting import PATIENCE_S

ASKED = "How do I repair a leaking garden hose?"


def seats(ibid) -> int:
    """Clients on forwards in flight."""
    return sum(len(flight._seats) for flight in ibid.app.pipeline.flights.values())


async def test_fifty_identical_streams_are_one_upstream_call(exact, up):
    gate = asyncio.Event()
    up.default = Chat(pieces=4, gates={2: gate})
    asking = [asyncio.create_task(exact.ask(ASKED, stream=True)) for _ in range(50)]
    await until(lambda: seats(exact) == 50)
    gate.set()
    replies = await asyncio.gather(*asking)
    assert up.meter.calls == 1
    assert len({reply.body for reply in replies}) == 1
    assert ASKED in replies[0].text
    assert sorted(reply.tier or "" for reply in replies) == [""] + ["collapsed"] * 49
    assert {reply.headers["Cache-Status"].count("; collapsed") for reply in replies if reply.tier} == {1}
    assert len({reply.headers["x-request-id"] for reply in replies}) == 50
    await exact.settled()
    assert len(await exact.entries()) == 1
    rows = await exact.sql(
        "SELECT lane, COUNT(*) AS n, SUM(actual_nusd) AS paid FROM request GROUP BY lane ORDER BY lane"
    )
    assert [(row["lane"], row["n"], row["paid"] > 0) for row in rows] == [
        ("forward", 1, True),
        ("stream.coalesce", 49, False),
    ]
    assert await exact.sql("SELECT COUNT(*) AS n FROM upstream_call") == [{"n": 1}]


async def test_a_late_joiner_gets_every_byte(exact, up):
    gate = asyncio.Event()
    up.default = Chat(pieces=4, gates={4: gate})
    first = asyncio.create_task(exact.ask(ASKED, stream=True))
    await until(lambda: any(flight.size_bytes for flight in exact.app.pipeline.flights.values()))
    late = asyncio.create_task(exact.ask(ASKED, stream=True))
    await until(lambda: seats(exact) == 2)
    gate.set()
    one, two = await asyncio.gather(first, late)
    assert one.body == two.body
    assert (two.tier, up.meter.calls) == ("collapsed", 1)


async def test_the_first_client_leaves_and_the_others_go_on_with_the_same_call(exact, up):
    gate = asyncio.Event()
    up.default = Chat(pieces=4, gates={3: gate})
    async with exact.open(chat_body(ASKED, stream=True)) as leader:
        head = await leader.content.readuntil(b"\n\n")
        followers = [asyncio.create_task(exact.ask(ASKED, stream=True)) for _ in range(5)]
        await until(lambda: seats(exact) == 6)
        leader.close()
    await until(lambda: seats(exact) == 5)
    gate.set()
    replies = await asyncio.gather(*followers)
    assert len({reply.body for reply in replies}) == 1
    assert replies[0].body.startswith(head)
    assert ASKED in replies[0].text
    assert (up.meter.calls, up.meter.completed, up.meter.cancelled) == (1, 1, 0)
    await exact.settled()
    assert (await exact.ask(ASKED)).cache == "HIT"
    rows = await exact.sql("SELECT outcome, COUNT(*) AS n FROM request GROUP BY outcome ORDER BY outcome")
    assert rows == [{"outcome": "cancelled", "n": 1}, {"outcome": "ok", "n": 6}]
    assert await exact.sql("SELECT COUNT(*) AS n FROM upstream_call WHERE cost_nusd > 0") == [{"n": 1}]


@pytest.mark.parametrize("at", [0, 2], ids=["before the head", "mid stream"])
async def test_the_last_client_leaves_and_the_upstream_call_is_cut(exact, up, at):
    gate = asyncio.Event()
    up.default = Chat(pieces=4, gates={2: gate}) if at else Raw(b"", "stall", gate)
    async with contextlib.AsyncExitStack() as stack:
        if at:
            for _ in range(3):
                response = await stack.enter_async_context(exact.open(chat_body(ASKED, stream=True)))
                await response.content.readuntil(b"\n\n")
                stack.callback(response.close)
        else:
            asking = [asyncio.create_task(exact.ask(ASKED, stream=True)) for _ in range(3)]
            await until(lambda: seats(exact) == 3)
            await until(lambda: len(up.requests) == 1)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
    async with asyncio.timeout(PATIENCE_S):
        await up.left.wait()
    assert not up.meter.completed
    await exact.settled()
    assert await exact.entries() == []
    await until(lambda: exact.app.telemetry.count() == 3)
    assert await exact.sql("SELECT outcome, COUNT(*) AS n FROM request GROUP BY outcome") == [
        {"outcome": "cancelled", "n": 3}
    ]
    gate.set()


async def test_tenants_never_share_a_call(exact, up):
    gate = asyncio.Event()

    def reply(seen):
        return Chat(text=told_apart(seen).text, gates={1: gate})

    up.default = reply
    asking = [asyncio.create_task(exact.ask(ASKED, stream=True, key=f"sk-{n % 2}")) for n in range(20)]
    await until(lambda: seats(exact) == 20)
    gate.set()
    replies = await asyncio.gather(*asking)
    assert up.meter.calls == 2
    assert [reply.text for reply in replies] == [f"for sk-{n % 2}: {ASKED}" for n in range(20)]


async def test_a_whole_request_joins_a_stream_in_flight_and_the_other_way_round(exact, up):
    for streams in (True, False):
        gate = asyncio.Event()

        async def reply(seen, gate=gate):
            if not seen.json.get("stream"):
                await gate.wait()
            return Chat(gates={2: gate})

        up.default = reply
        prompt = f"{ASKED} {streams}"
        first = asyncio.create_task(exact.ask(prompt, stream=streams))
        await until(lambda: seats(exact) == 1)
        other = asyncio.create_task(exact.ask(prompt, stream=not streams))
        await until(lambda: seats(exact) == 2)
        gate.set()
        one, two = await asyncio.gather(first, other)
        assert (one.text, two.tier) == (two.text, "collapsed")
        assert two.headers["Content-Type"].startswith("application/json" if streams else "text/event-stream")
        await exact.settled()
    assert up.meter.calls == 2


async def test_a_clients_own_retry_joins_and_the_ledger_names_what_it_retries(exact, up):
    gate = asyncio.Event()

    async def reply(_seen):
        await gate.wait()
        return Chat()

    up.default = reply
    first = asyncio.create_task(exact.ask(ASKED))
    await until(lambda: seats(exact) == 1)
    retry = asyncio.create_task(exact.ask(ASKED, headers={"x-stainless-retry-count": "1"}))
    await until(lambda: seats(exact) == 2)
    first.cancel()  # what an SDK does before it tries again
    await asyncio.gather(first, return_exceptions=True)
    await until(lambda: seats(exact) == 1)
    gate.set()
    reply_ = await retry
    assert (reply_.status, up.meter.calls) == (200, 1)
    rows = {row["id"]: row for row in await exact.sql("SELECT id, retry_of, outcome FROM request")}
    mine = rows[reply_.headers["x-request-id"]]
    assert rows[mine["retry_of"]]["outcome"] == "cancelled"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failing_upstream_fails_all_alike_and_nothing_is_kept(exact, up, stream):
    gate = asyncio.Event()
    error = {"error": {"message": "too many", "type": "rate_limit_error", "param": None, "code": "rate_limited"}}

    async def reply(_seen):
        await gate.wait()
        return Json(429, error, {"Retry-After": "7"})

    up.script(reply)
    asking = [asyncio.create_task(exact.ask(ASKED, stream=stream)) for _ in range(20)]
    await until(lambda: seats(exact) == 20)
    gate.set()
    replies = await asyncio.gather(*asking)
    assert {(r.status, r.body, r.headers["Retry-After"]) for r in replies} == {(429, json.dumps(error).encode(), "7")}
    assert len(up.requests) == 1
    await exact.settled()
    assert await exact.entries() == []
    assert (await exact.ask(ASKED, stream=stream)).status == 200
    up.script(Raw(b"", "rst"), Raw(b"", "rst"))
    replies = await asyncio.gather(*(exact.ask("and another one", stream=stream) for _ in range(3)))
    assert {r.status for r in replies} <= {502, 200}
    assert 502 in {r.status for r in replies}


@pytest.fixture
async def patient(data_dir, up):
    """ibid that waits for its embedder, however busy the machine is."""
    async with running(data_dir, up.url, {"embedding": {"deadline_ms": 10_000}}) as served:
        yield served


async def test_two_tenants_with_the_same_two_hundred_questions_never_meet(patient, up):
    """Reworded, streamed, at once: every answer carries the credential it was made for and the question it answers."""
    ibid = patient
    up.default = told_apart
    nouns = (
        "lamp kettle bicycle window door carpet mirror clock piano guitar sofa fridge oven heater fan camera printer"
    )
    verbs = "clean repair store move paint sell insure choose measure polish".split()
    pairs = [(verb, noun) for verb in verbs for noun in [*nouns.split(), "scanner", "tent", "bed"]]
    assert len(pairs) == 200
    limit = asyncio.Semaphore(24)

    async def ask(key: str, wording: str, verb: str, noun: str):
        async with limit:
            reply = await ibid.ask(f"How {wording} I {verb} a {noun} at home?", key=key, stream=True)
        assert reply.status == 200
        who, _, question = reply.text.partition(": ")
        assert who == f"for {key}"
        assert question.split()[3:] == f"{verb} a {noun} at home?".split()
        return reply

    for wording in ("do", "can"):
        jobs = [ask(key, wording, *pair) for pair in pairs for key in ("sk-one", "sk-two")]
        replies = await asyncio.gather(*jobs)
        await ibid.settled()
    hits = [reply.tier for reply in replies if reply.cache == "HIT"]
    assert hits.count("semantic") > 300  # the rest found the embedder busy and was forwarded
    assert await ibid.sql("SELECT COUNT(DISTINCT tenant) AS tenants, COUNT(*) AS n FROM request") == [
        {"tenants": 2, "n": 800}
    ]


async def test_who_joins_in_the_other_form_and_leaves_or_fails_has_a_ledger_row_too(exact, up):
    gate = asyncio.Event()
    up.default = Raw(b"", "stall", gate)
    first = asyncio.create_task(exact.ask(ASKED, stream=True))
    await until(lambda: seats(exact) == 1)
    others = [asyncio.create_task(exact.ask(ASKED)) for _ in range(2)]
    await until(lambda: seats(exact) == 3)
    others[0].cancel()
    await asyncio.gather(others[0], return_exceptions=True)
    await until(lambda: seats(exact) == 2)
    gate.set()  # the upstream hangs up without an answer
    assert [(await task).status for task in (first, others[1])] == [502, 502]
    await exact.settled()
    rows = await exact.sql("SELECT outcome, status FROM request ORDER BY outcome, status")
    assert [(row["outcome"], row["status"]) for row in rows] == [("cancelled", 499), ("error", 502), ("error", 502)]
