"""Parts that are down, purges and judgements: cache trouble is never the client's trouble."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from proxy.store.engine import DATABASE_ERRORS
from tests.flows.running import running, until
from tests.waiting import PATIENCE_S

ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"
AGAIN = "How can we repair a leaking garden hose?"


async def test_model_missing_means_exact_hits_and_a_named_reason(data_dir, up, tmp_path):
    """An empty model directory in the configuration: nothing is downloaded, nothing is refused."""
    (tmp_path / "no-model").mkdir()
    sections = {"embedding": {"model": str(tmp_path / "no-model")}}
    async with running(data_dir, up.url, sections) as ibid:
        first = await ibid.ask(ASKED)
        assert (first.status, first.cache) == (200, "BYPASS")
        assert first.reason == ibid.app.pipeline.semantic_fault != ""
        assert first.reason.startswith("embedder") or first.reason.startswith("model")
        await ibid.settled()
        again = await ibid.ask(ASKED)
        assert (again.tier, again.text) == ("exact", first.text)
        assert (await ibid.ask(REWORDED)).cache == "BYPASS"
        async with ibid.session.get(ibid.admin_url + "/readyz") as response:
            state = await response.json()
            assert (response.status, state["ready"]) == (200, True)
            assert state["degraded"]["semantic"] == first.reason
        assert (await ibid.row(first))["reason"] == first.reason


async def test_what_was_stored_without_a_model_still_hits_when_it_is_back(data_dir, up, tmp_path):
    (tmp_path / "no-model").mkdir()
    async with running(data_dir, up.url, {"embedding": {"model": str(tmp_path / "no-model")}}) as ibid:
        first = await ibid.ask(ASKED)
        await ibid.settled()
    async with running(data_dir, up.url) as ibid:
        assert (await ibid.ask(ASKED)).text == first.text
        await until(lambda: ibid.app.pipeline.index.size == 1)  # its vector is made now
        reworded = await ibid.ask(REWORDED)
        assert (reworded.tier, reworded.text) == ("semantic", first.text)


async def test_index_down_means_bypass_not_500(ibid, up):
    first = await ibid.fill(ASKED)
    ibid.app.pipeline.index.close()
    replies = [await ibid.ask(REWORDED), await ibid.ask(AGAIN, stream=True)]
    assert {(reply.status, reply.cache) for reply in replies} == {(200, "BYPASS")}
    assert all(reply.reason.startswith("index") for reply in replies)
    await ibid.settled()
    assert (await ibid.ask(ASKED)).text == first.text
    assert (await ibid.ask(REWORDED)).cache == "HIT"  # the answer itself was stored all the same
    assert "ibid_faults_total" in await ibid.admin("GET", "/metrics")


async def test_embedder_down_means_bypass_not_500(ibid, up):
    first = await ibid.fill(ASKED)
    await ibid.app.pipeline.embedder.close()
    reply = await ibid.ask(REWORDED)
    assert (reply.status, reply.cache) == (200, "BYPASS")
    assert reply.reason.startswith("embedder")
    assert (await ibid.ask(ASKED)).text == first.text


async def test_a_database_that_stops_writing_costs_no_client_anything(exact, up, monkeypatch):
    """Commits fail: everything is forwarded and answered, hits in memory go on, and it recovers by itself."""
    first = await exact.fill(ASKED)
    writer = exact.app.store.writer

    async def broken(_jobs):
        raise sqlite3.OperationalError("database or disk is full")

    assert isinstance(sqlite3.OperationalError("x"), DATABASE_ERRORS)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_attempt", broken)
        replies = await asyncio.gather(
            *(exact.ask(f"Something else, number {n}", stream=n % 2 == 0) for n in range(40))
        )
        assert {(reply.status, reply.cache) for reply in replies} == {(200, "MISS")}
        await exact.settled()
        assert (await exact.ask(ASKED)).text == first.text
        async with exact.session.get(exact.admin_url + "/readyz") as response:
            assert response.status == 200
            assert (await response.json())["degraded"]["store"] in ("full", "down")
        await exact.app.store.ledger.flush()
        assert exact.app.store.ledger.spilled >= 41
    await until(lambda: writer.state == "ok" and not exact.app.store.ledger.owes)  # with no traffic at all
    rows = (await exact.sql("SELECT COUNT(*) AS n FROM request"))[0]["n"]
    assert rows == 42  # one fill, forty forwards, one hit: what waited in the spill came back, once
    await exact.fill("And now it stores again, does it not?")
    assert len(await exact.entries()) == 2


async def test_a_locked_database_delays_nobody(exact, up, data_dir):
    lock = sqlite3.connect(data_dir / "ibid.db", isolation_level=None, timeout=PATIENCE_S)
    lock.execute("BEGIN IMMEDIATE")
    try:
        async with asyncio.timeout(PATIENCE_S):
            replies = await asyncio.gather(*(exact.ask(f"Something else, number {n}") for n in range(20)))
        assert {(reply.status, reply.cache) for reply in replies} == {(200, "MISS")}
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    await until(lambda: not exact.app.pipeline.flights)


@pytest.mark.parametrize("how", ["id", "tag", "namespace", "writer", "flush", "delete"])
async def test_a_purge_is_effective_before_it_returns(ibid, up, how):
    """From SQL, index, hot rows, rendered replies and learnt wordings."""
    fields = {"cache": {"namespace": "red", "tags": ["doc:1"]}}
    first = await ibid.fill(ASKED, **fields)
    hit = await ibid.ask(REWORDED, **fields)
    assert (hit.tier, (await ibid.ask(REWORDED, **fields)).tier) == ("semantic", "semantic")  # the second from memory
    match how:
        case "id":
            dry = await ibid.admin("POST", "/cache/invalidate", {"ids": [hit.entry]})
            assert (dry["dry_run"], dry["ids"]) == (True, [hit.entry])
            assert (await ibid.ask(ASKED, **fields)).cache == "HIT"
            await ibid.admin("POST", "/cache/invalidate", {"ids": [hit.entry], "dry_run": False})
        case "tag":
            await ibid.admin("POST", "/cache/invalidate", {"tags": ["doc:1"], "dry_run": False})
        case "namespace":
            await ibid.admin("POST", "/cache/invalidate", {"namespace": "red", "dry_run": False})
        case "writer":
            body = {"writer": first.headers["x-request-id"], "dry_run": False}
            assert (await ibid.admin("POST", "/cache/invalidate", body))["count"] == 1
        case "flush":
            await ibid.admin("POST", "/cache/flush", {"confirm": "flush"})
        case "delete":
            await ibid.admin("DELETE", f"/cache/entries/{hit.entry}")
    for prompt in (REWORDED, AGAIN, ASKED):
        reply = await ibid.ask(prompt, headers={"x-cache-mode": "read"}, **fields)
        assert reply.cache == "MISS", prompt
    assert len(ibid.app.pipeline.hot) == 0
    assert await ibid.entries() == []


async def test_wrong_takes_an_answer_out_of_service_and_right_puts_it_back(ibid, up):
    first = await ibid.fill(ASKED)
    hit = await ibid.ask(REWORDED)
    assert (hit.tier, (await ibid.ask(REWORDED)).tier) == ("semantic", "semantic")
    body = {"request_id": hit.headers["x-request-id"], "verdict": "wrong"}
    assert (await ibid.admin("POST", "/cache/feedback", body))["quarantined"] is True
    for prompt in (REWORDED, AGAIN, ASKED):
        assert (await ibid.ask(prompt, headers={"x-cache-mode": "read"})).cache == "MISS", prompt
    wrong = await ibid.sql("SELECT hits, judged, wrong FROM wrong_hits WHERE lane = 'cache.semantic'")
    assert wrong == [{"hits": 2, "judged": 1, "wrong": 1}]
    await ibid.admin("POST", "/cache/feedback", {"entry_id": hit.entry, "verdict": "right"})
    for prompt, tier in ((AGAIN, "semantic"), (REWORDED, "semantic"), (ASKED, "exact")):
        reply = await ibid.ask(prompt)
        assert (reply.tier, reply.text) == (tier, first.text), prompt


async def test_a_purge_while_a_row_is_on_its_way_into_memory_wins(exact, up, monkeypatch):
    """The row was read before the purge and arrives after it: it must not come back to life."""
    await exact.fill(ASKED)
    pipeline, store = exact.app.pipeline, exact.app.store.entries
    pipeline.hot.clear()
    read, purged = asyncio.Event(), asyncio.Event()
    find = store.find

    async def slow_find(fingerprint):
        entry = await find(fingerprint)
        if not read.is_set():
            read.set()
            await purged.wait()
        return entry

    monkeypatch.setattr(store, "find", slow_find)
    asking = asyncio.create_task(exact.ask(ASKED, headers={"x-cache-mode": "read"}))
    await read.wait()
    await exact.admin("POST", "/cache/flush", {"confirm": "flush"})
    purged.set()
    await asking
    assert (await exact.ask(ASKED, headers={"x-cache-mode": "read"})).cache == "MISS"


async def test_a_purge_while_an_answer_is_being_stored_wins(ibid, up, monkeypatch):
    """Committed, purged, and only then told to memory and index."""
    store = ibid.app.store.entries
    stored, purged = asyncio.Event(), asyncio.Event()
    put = store.put

    async def slow_put(draft, began):
        done = await put(draft, began)
        if not stored.is_set():
            stored.set()
            await purged.wait()
        return done

    monkeypatch.setattr(store, "put", slow_put)
    await ibid.ask(ASKED)
    await stored.wait()
    await ibid.admin("POST", "/cache/flush", {"confirm": "flush"})
    purged.set()
    await ibid.settled()
    for prompt in (ASKED, REWORDED):
        assert (await ibid.ask(prompt, headers={"x-cache-mode": "read"})).cache == "MISS", prompt
