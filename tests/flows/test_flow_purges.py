"""A purge reaches what is under way: no answer begun before it is stored, joined or stands in after it."""

from __future__ import annotations

import asyncio
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest

from tests.batch_upstream import BatchUpstream
from tests.flows.batching import QUICK, ended, hand_in, line, sdk
from tests.flows.running import EMBEDDER, EXACT_ONLY, MODEL, TOKEN, chat_body, running, until
from tests.flows.test_flow_batches_restart import written
from tests.upstream import Chat, Json, Vectors
from tests.waiting import PATIENCE_S

ASKED = "What does document 42 say about the leave of absence?"
MARKED = {"cache": {"namespace": "red", "tags": ["doc:42"]}}
ONLY_IF_STORED = {"Cache-Control": "only-if-cached"}


class Held:
    """A scripted answer that is on its way until it is let go."""

    def __init__(self, up, reply=None):
        self.arrived, self.released = asyncio.Event(), asyncio.Event()
        self._reply = reply or Chat(text="the old text")
        up.script(self._answer)

    async def _answer(self, _seen):
        self.arrived.set()
        await self.released.wait()
        return self._reply


async def purge(ibid, how, reply=None):
    """One way to purge what was asked; how many entries it removed."""
    selectors = {
        "tag": {"tags": ["doc:42"]},
        "namespace": {"namespace": "red"},
        "model": {"model": MODEL},
        "age": {"older_than": (datetime.now(UTC) + timedelta(minutes=1)).isoformat()},
        "all of them": {"tags": ["doc:42"], "namespace": "red", "model": MODEL},
        "another tag": {"tags": ["doc:43"]},
        "another namespace": {"tags": ["doc:42"], "namespace": "blue"},
    }
    match how:
        case "flush":
            return (await ibid.admin("POST", "/cache/flush", {"confirm": "flush"}))["count"]
        case "flushall":
            return (await ibid.admin("POST", "/cache/flushall"))["deleted"]
        case "delete":
            return (await ibid.admin("DELETE", f"/cache/entries/{reply.entry}"))["count"]
        case "delete as LiteLLM spells it":
            return (await ibid.admin("POST", "/cache/delete", {"keys": [reply.entry]}))["deleted"]
        case "id":
            body = {"ids": [reply.entry], "dry_run": False}
            return (await ibid.admin("POST", "/cache/invalidate", body))["count"]
        case "wrong":
            body = {"entry_id": reply.entry, "verdict": "wrong"}
            return int((await ibid.admin("POST", "/cache/feedback", body))["quarantined"])
        case "tenant":
            (row,) = await ibid.entries()
            return (await ibid.admin("POST", "/cache/invalidate", {"writer": row["tenant"], "dry_run": False}))["count"]
    return (await ibid.admin("POST", "/cache/invalidate", {**selectors[how], "dry_run": False}))["count"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("how", ["tag", "namespace", "model", "age", "all of them", "flush", "flushall"])
async def test_an_answer_begun_before_a_purge_is_not_stored_after_it(exact, up, how, stream):
    held = Held(up)
    asking = asyncio.create_task(exact.ask(ASKED, stream=stream, **MARKED))
    await held.arrived.wait()
    assert await purge(exact, how) == 0
    held.released.set()
    assert (await asking).text == "the old text"  # the client gets what it asked for
    await exact.settled()
    assert await exact.entries() == []
    again = await exact.ask(ASKED, stream=stream, **MARKED)
    assert (again.cache, again.text == "the old text") == ("MISS", False)
    await exact.settled()
    assert (await exact.ask(ASKED, **MARKED)).text == again.text  # begun after it


@pytest.mark.parametrize("how", ["another tag", "another namespace"])
async def test_what_a_purge_does_not_name_is_stored(exact, up, how):
    held = Held(up)
    asking = asyncio.create_task(exact.ask(ASKED, **MARKED))
    await held.arrived.wait()
    assert await purge(exact, how) == 0
    held.released.set()
    await asking
    await exact.settled()
    assert (await exact.ask(ASKED, **MARKED)).tier == "exact"


@pytest.mark.parametrize("how", ["delete", "delete as LiteLLM spells it", "id", "wrong", "tenant", "tag", "flush"])
@pytest.mark.parametrize("unmarked", [False, True], ids=["marked", "unmarked"])
async def test_a_refetch_begun_before_a_purge_does_not_bring_the_entry_back(exact, up, how, unmarked):
    """Its own marks count, and those of the entry it would replace."""
    await exact.fill(ASKED, **MARKED)
    hit = await exact.ask(ASKED, **MARKED)
    held = Held(up)
    marks = {"cache": {"namespace": "red"}} if unmarked else MARKED
    asking = asyncio.create_task(exact.ask(ASKED, headers={"x-cache-mode": "refresh"}, **marks))
    await held.arrived.wait()
    assert await purge(exact, how, hit) == 1
    held.released.set()
    assert (await asking).text == "the old text"
    await exact.settled()
    again = await exact.ask(ASKED, **MARKED)
    assert (again.cache, again.text == "the old text") == ("MISS", False)


async def test_who_asks_after_a_purge_does_not_join_a_call_from_before_it(exact, up):
    held = Held(up)
    asking = [asyncio.create_task(exact.ask(ASKED, **MARKED))]
    await held.arrived.wait()
    asking.append(asyncio.create_task(exact.ask(ASKED, **MARKED)))
    (flight,) = exact.app.pipeline.flights.values()
    await until(lambda: len(flight._seats) == 2)
    await purge(exact, "tag")
    late = await exact.ask(ASKED, **MARKED)
    assert (late.cache, late.text == "the old text") == ("MISS", False)
    held.released.set()
    assert {(await one).text for one in asking} == {"the old text"}
    await exact.settled()
    assert (await exact.ask(ASKED, **MARKED)).text == late.text


@pytest.mark.parametrize("how", ["flush", "model"])
async def test_vectors_begun_before_a_purge_are_not_stored_after_it(exact, up, how):
    held = Held(up, Vectors())
    asking = asyncio.create_task(exact.embed(["one", "two"], encoding_format="float"))
    await held.arrived.wait()
    if how == "flush":
        await purge(exact, "flush")
    else:
        await exact.admin("POST", "/cache/invalidate", {"model": EMBEDDER, "dry_run": False})
    held.released.set()
    assert (await asking).status == 200
    await exact.settled()
    assert await exact.entries() == []
    assert (await exact.embed(["one", "two"])).cache == "MISS"
    await exact.settled()
    assert (await exact.embed(["one", "two"])).cache == "HIT"


async def test_a_call_read_to_its_end_for_nobody_is_overtaken_too(data_dir, up):
    async with running(data_dir, up.url, {**EXACT_ONLY, "stream": {"on_leave": "finish"}}) as ibid:
        gate = asyncio.Event()
        up.script(Chat(text="the old text", pieces=4, gates={2: gate}))
        async with ibid.open(chat_body(ASKED, stream=True, **MARKED)) as response:
            await response.content.readany()
        (flight,) = ibid.app.pipeline.flights.values()
        await until(lambda: flight._seats and not any(seat.is_client for seat in flight._seats))
        await purge(ibid, "tag")
        gate.set()
        await overtaken(ibid)
        assert (await ibid.ask(ASKED, **MARKED)).cache == "MISS"


async def test_a_refetch_of_what_is_served_stale_is_overtaken_too(data_dir, up):
    policy = [{"plan": ["exact", "stale-while-revalidate", "collapse"]}]
    sections = {**EXACT_ONLY, "policy": policy, "lane.stale": {"while_revalidate_s": 600}}
    async with running(data_dir, up.url, sections) as ibid:
        first = await ibid.fill(ASKED, **MARKED)
        await expire(ibid)
        held = Held(up)
        assert (await ibid.ask(ASKED, **MARKED)).text == first.text
        await held.arrived.wait()
        assert await purge(ibid, "tag") == 1
        held.released.set()
        await overtaken(ibid)
        assert await ibid.entries() == []


async def test_a_guess_is_overtaken_too(data_dir, up):
    first, second = "What is in stock today", "What does it cost today"
    plan = {"x-plan": "exact,prefetch"}
    sections = {**EXACT_ONLY, "lane.prefetch": {"min_count": 1}, "lane.tier": {"models": [MODEL]}}
    async with running(data_dir, up.url, sections) as ibid:
        for question in (first, second):
            await ibid.ask(question, headers=plan)
            await ibid.settled()
        await purge(ibid, "flush")
        both = [Held(up), Held(up)]  # the question, and the one that usually follows
        asking = asyncio.create_task(ibid.ask(first, headers=plan))
        for held in both:
            await held.arrived.wait()
        await purge(ibid, "flush")
        for held in both:
            held.released.set()
        await asking
        await overtaken(ibid, 2)
        assert await ibid.entries() == []


async def test_a_purged_entry_does_not_stand_in_for_an_upstream_that_fails(data_dir, up):
    policy, ready = [{"on_error": ["stale"]}], {"lane.stale": {"if_error_s": 600}}
    async with running(data_dir, up.url, {**EXACT_ONLY, "policy": policy, **ready}) as ibid:
        first = await ibid.fill(ASKED, **MARKED)
        await expire(ibid)
        held = Held(up, Json(503, {"error": {"message": "down"}}))
        asking = asyncio.create_task(ibid.ask(ASKED, **MARKED))
        await held.arrived.wait()
        held.released.set()
        assert ((await asking).text, (await asking).tier) == (first.text, "stale")
        held = Held(up, Json(503, {"error": {"message": "down"}}))
        asking = asyncio.create_task(ibid.ask(ASKED, **MARKED))
        await held.arrived.wait()
        assert await purge(ibid, "tag") == 1
        held.released.set()
        assert (await asking).status == 503


@pytest.mark.parametrize("how", ["tag", "flush", "another tag"])
async def test_lines_a_provider_had_before_a_purge_are_not_stored_after_it_nor_after_a_restart(data_dir, up, how):
    asked = [line(f"l{n}", f"{ASKED} Part {n}", cache={"tags": ["doc:42"]}) for n in range(3)]
    theirs = BatchUpstream(up, polls=0)
    parts = "SELECT state, purge FROM batch_part"
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        await purge(ibid, "another namespace")  # so that there is one it began after
        batch = await hand_in(client, asked)
        await until(lambda: written(data_dir, parts) == [("running", 1)])
        await purge(ibid, how)
    theirs.polls = 1
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        batch = await ended(client, await client.batches.retrieve(batch.id))
        assert (batch.status, batch.request_counts.completed) == ("completed", 3)
        await ibid.settled()
        assert len(await ibid.entries()) == (3 if how == "another tag" else 0)


async def test_a_purge_in_another_process_reaches_what_this_one_is_at(tmp_path, data_dir, up, pg_url):
    (tmp_path / "other").mkdir(mode=0o700)
    async with (
        running(data_dir, up.url, EXACT_ONLY, pg_url) as ibid,
        running(tmp_path / "other", up.url, EXACT_ONLY, pg_url) as other,
    ):
        hot = await ibid.fill("Is this in memory, and in whose?", **MARKED)
        held = Held(up)
        asking = asyncio.create_task(ibid.ask(ASKED, **MARKED))
        await held.arrived.wait()
        assert await purge(other, "tag") == 1
        await ibid.app.pipeline.entries.follow()  # what the timer does
        assert not ibid.app.pipeline.flights  # nobody joins it any more
        held.released.set()
        assert (await asking).text == "the old text"
        await ibid.settled()
        assert (await ibid.ask(ASKED, **MARKED)).cache == "MISS"
        again = await ibid.ask("Is this in memory, and in whose?", **MARKED)
        assert (again.cache, again.text == hot.text) == ("MISS", False)


async def test_a_purge_while_the_database_is_held_elsewhere_is_an_error_and_serves_on(exact, data_dir):
    first = await exact.fill(ASKED, **MARKED)
    lock = sqlite3.connect(data_dir / "ibid.db", isolation_level=None, timeout=PATIENCE_S)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        token = {"Authorization": f"Bearer {TOKEN}"}
        body = {"tags": ["doc:42"], "dry_run": False}
        async with exact.session.post(exact.admin_url + "/cache/invalidate", json=body, headers=token) as refused:
            assert refused.status == 503
            assert (await refused.json())["error"]["code"] == "store_down"
        assert (await exact.ask(ASKED, **MARKED)).text == first.text
        assert (await exact.ask("Something that was not asked before", **MARKED)).status == 200
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    await until(lambda: exact.app.store.writer.is_trying)
    assert await purge(exact, "tag") >= 1
    assert (await exact.ask(ASKED, **MARKED)).cache == "MISS"


async def overtaken(ibid, count=1):
    """So many answers have come whole, and were not stored on account of a purge."""
    await until(lambda: ibid.app.telemetry._unstored.get(("purged",), 0) == count)


async def expire(ibid):
    """Let every stored entry be past its time."""
    now_ms = int(ibid.app.pipeline.clock() * 1000)
    for row in await ibid.entries():
        await ibid.app.store.entries.touch(row["id"], now_ms - 1000)
    ibid.app.pipeline.hot.clear()


async def test_a_purge_by_meaning_names_what_is_alike_in_any_scope_and_only_then_removes_it(ibid, up):
    alike = ["How do I reset my password?", "How can I reset my password?"]
    other = "What is the capital of France?"
    for key, question in [("sk-a", alike[0]), ("sk-b", alike[1]), ("sk-a", other)]:
        await ibid.ask(question, key=key)
        await ibid.settled()
    tenants = {row["prompt"]: row["tenant"] for row in await ibid.entries()}
    wanted = {"similar_to": "How do I reset my password?", "above": 0.85}
    told = await ibid.admin("POST", "/cache/invalidate", wanted)
    assert (told["dry_run"], told["count"], told["not_compared"]) == (True, 2, 0)
    assert [found["similarity"] for found in told["nearest"]] == sorted(
        [found["similarity"] for found in told["nearest"]], reverse=True
    )
    assert told["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert len(await ibid.entries()) == 3
    nothing = {"similar_to": "Pianos of the nineteenth century", "model": MODEL, "dry_run": False}
    assert (await ibid.admin("POST", "/cache/invalidate", nothing))["count"] == 0
    assert len(await ibid.entries()) == 3  # nothing alike is not "all of this model"
    one = {**wanted, "writer": tenants[alike[1]], "dry_run": False}
    assert (await ibid.admin("POST", "/cache/invalidate", one))["count"] == 1
    assert (await ibid.admin("POST", "/cache/invalidate", {**wanted, "dry_run": False}))["count"] == 1
    assert [row["prompt"] for row in await ibid.entries()] == [other]
    assert (await ibid.ask(alike[0])).cache == "MISS"
    acts = await ibid.sql("SELECT parameters FROM act")
    assert "27 characters" in acts[0]["parameters"]
    assert "password" not in str(acts)


async def test_a_purge_by_meaning_without_a_model_is_refused(exact, up):
    await exact.fill("How do I reset my password?")
    body = {"similar_to": "How do I reset my password?", "model": MODEL, "dry_run": False}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    url = f"{exact.admin_url}/cache/invalidate"
    async with exact.session.post(url, json=body, headers=headers) as response:
        assert response.status == 503
    assert len(await exact.entries()) == 1
