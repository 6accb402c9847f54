"""kill -9, SIGTERM, and what is there after the next start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.flows.running import EXACT_ONLY, Process, chat_body, running, serving, until
from tests.upstream import Chat
from tests.waiting import PATIENCE_S

ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"
ROUNDS, WRITES, WITH_MODEL = 20, 1000, (6, 13)
LEFT = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError)


def after_a_crash(data_dir: Path, into: Path) -> sqlite3.Connection:
    """The database as a crash left it, opened elsewhere, so that looking does not repair it."""
    into.mkdir()
    for file in data_dir.glob("ibid.db*"):
        shutil.copy(file, into / file.name)
    return sqlite3.connect(into / "ibid.db", timeout=PATIENCE_S)


async def write_until_killed(process, up, round_: int, when: int):
    """Ask up to WRITES new questions, each again until it hits; kill in the middle.

    What was acknowledged as stored, by prompt, and the id of every answered request.
    """
    acknowledged: dict[str, str] = {}
    answered: set[str] = set()
    numbers = iter(range(WRITES))

    async def client():
        for number in numbers:
            prompt = f"Question {round_}-{number} of a long list of them"
            told = None
            while prompt not in acknowledged:
                reply = await process.ask(prompt, stream=number % 2 == 0)
                answered.add(reply.headers["x-request-id"])
                assert reply.status == 200
                assert told in (None, reply.text)
                told = reply.text
                if reply.cache == "HIT":
                    acknowledged[prompt] = told

    clients = [asyncio.create_task(client()) for _ in range(16)]
    await until(lambda: len(acknowledged) >= when)
    process.kill()
    for done in await asyncio.gather(*clients, return_exceptions=True):
        if done is not None and not isinstance(done, LEFT):
            raise done
    return acknowledged, answered


async def test_kill_during_a_thousand_writes_twenty_times_loses_no_acknowledged_entry(data_dir, up, tmp_path):
    """Every entry a client saw hit hits after the restart with the same answer; SQLite is whole; in the end the ledger
    has every answer, and nothing twice."""
    chance = random.Random(2)
    up.default = lambda seen: Chat(text=f"answer to: {seen.json['messages'][-1]['content']}", pieces=2)
    kept: dict[str, str] = {}
    told: set[str] = set()
    for round_ in range(ROUNDS):
        real = round_ in WITH_MODEL  # a new interpreter, and everything on
        async with serving(data_dir, up.url, {} if real else EXACT_ONLY, forked=not real) as process:
            sample = dict(chance.sample(sorted(kept.items()), min(len(kept), 200)))
            calls = up.meter.calls
            for prompt, text in sample.items():
                reply = await process.ask(prompt)
                assert (reply.cache, reply.text) == ("HIT", text), (round_, prompt)
            assert up.meter.calls == calls
            acknowledged, answered = await write_until_killed(process, up, round_, chance.randrange(50, 400))
        with contextlib.closing(after_a_crash(data_dir, tmp_path / f"crash{round_}")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            stored = {prompt for (prompt,) in database.execute("SELECT prompt FROM entry")}
            twice = "SELECT request_id FROM upstream_call GROUP BY request_id HAVING COUNT(*) > 1"
            assert database.execute(twice).fetchall() == []
        shutil.rmtree(tmp_path / f"crash{round_}")
        assert acknowledged.keys() <= stored
        kept |= acknowledged
        told |= answered
    async with running(data_dir, up.url, EXACT_ONLY) as ibid:
        calls = up.meter.calls
        for prompt, text in kept.items():
            reply = await ibid.ask(prompt)
            assert (reply.cache, reply.text) == ("HIT", text), prompt
        assert up.meter.calls == calls
        assert (await ibid.admin("POST", "/savings/query", {"name": "balance"}))["rows"] == []
        await ibid.app.store.ledger.flush()
        there = {request_id for (request_id,) in await ibid.app.store.database.rows("SELECT id FROM request")}
    assert told <= there, len(told - there)


@contextlib.contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """So many processes beside us that want a whole core each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


@pytest.mark.parametrize("is_locked", [False, True])
async def test_kill_on_a_starved_machine_loses_no_row_of_an_answer(data_dir, up, is_locked):
    """With the database free, or locked by another process: what a client has the end of is in the ledger, once, with
    its call and its saving, and agrees with what client and upstream counted."""
    chance = random.Random(11)
    up.default = lambda seen: Chat(text=f"answer to: {seen.json['messages'][-1]['content']}", pieces=2)
    answered: dict[str, tuple[bool, Any]] = {}
    for round_ in range(3):
        async with serving(data_dir, up.url, EXACT_ONLY, forked=True) as process:
            blocked = locked(data_dir / "ibid.db") if is_locked else contextlib.nullcontext()
            with blocked, busy_loops(3):
                await answers_until_killed(process, answered, round_, len(answered) + chance.randrange(30, 90))
    async with running(data_dir, up.url, EXACT_ONLY) as ibid:
        assert (await ibid.admin("POST", "/savings/query", {"name": "balance"}))["rows"] == []
        rows = await ibid.sql("SELECT id, lane, actual_nusd, in_tok, out_tok FROM request")
        calls = await ibid.sql("SELECT request_id, in_tok, out_tok, cost_nusd FROM upstream_call")
        savings = await ibid.sql("SELECT DISTINCT request_id FROM saving")
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids))
    lost = answered.keys() - set(ids)
    assert not lost, f"{len(lost)} of {len(answered)} answers have no row"
    paid = {call["request_id"]: call for call in calls}
    assert len(paid) == len(calls) <= up.meter.calls
    saved = {saving["request_id"] for saving in savings}
    for request_id, (called, usage) in answered.items():
        assert (request_id in paid, request_id in saved) == (called, not called)
        if called and usage is not None:
            told = usage["prompt_tokens"], usage["completion_tokens"]
            assert (paid[request_id]["in_tok"], paid[request_id]["out_tok"]) == told
    assert len(saved) > 10


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE_S)) as blocker:
        blocker.execute("BEGIN EXCLUSIVE")
        yield


async def answers_until_killed(process: Process, answered: dict[str, tuple[bool, Any]], round_: int, when: int) -> None:
    """Ask, whole and streamed, each question several times; kill it when so many are answered. By request:
    whether it had a call of its own, and the usage, where it was told."""

    async def client(number: int) -> None:
        for turn in range(1_000):
            prompt = f"Question {round_}-{number}-{turn // 4} of a long list"
            reply = await process.ask(prompt, stream=turn % 2 == 0)
            assert reply.status == 200
            usage = None if turn % 2 == 0 else reply.json["usage"]
            called = reply.cache != "HIT" and "collapsed" not in reply.headers["Cache-Status"]
            answered[reply.headers["x-request-id"]] = called, usage

    clients = [asyncio.create_task(client(number)) for number in range(8)]
    await until(lambda: len(answered) >= when or any(one.done() for one in clients), 120)
    process.kill()
    for done in await asyncio.gather(*clients, return_exceptions=True):
        if not isinstance(done, LEFT):
            raise AssertionError(done) from done


async def test_sigterm_under_load_finishes_streams_and_loses_no_ledger_row(data_dir, up):
    gate = asyncio.Event()
    held = 0

    def reply(seen):
        nonlocal held
        prompt = seen.json["messages"][-1]["content"]
        held += prompt.startswith("Hold")
        return Chat(text=f"answer to: {prompt}", gates={2: gate} if prompt.startswith("Hold") else {})

    up.default = reply
    answered: list[str] = []
    async with serving(data_dir, up.url, EXACT_ONLY) as process:

        async def load(worker: int):
            for number in range(100_000):
                answer = await process.ask(f"Question {worker}-{number // 2} of many", stream=number % 3 == 0)
                answered.append(answer.headers["x-request-id"])
                assert answer.status in (200, 503)

        streams = [asyncio.create_task(process.ask(f"Hold number {n} for me", stream=True)) for n in range(5)]
        await until(lambda: held == 5)
        loads = [asyncio.create_task(load(worker)) for worker in range(8)]
        await until(lambda: len(answered) >= 100)
        process.child.send_signal(signal.SIGTERM)
        ends = await asyncio.gather(*loads, return_exceptions=True)
        assert all(isinstance(end, LEFT) for end in ends), ends
        async with process.session.get(process.admin_url + "/readyz") as response:
            assert response.status == 503
        assert process.child.poll() is None  # it waits for the streams
        gate.set()
        for number, stream in enumerate(await asyncio.gather(*streams)):
            answered.append(stream.headers["x-request-id"])
            assert stream.text == f"answer to: Hold number {number} for me"  # and [DONE] came
        assert await process.stopped() == 0
    with contextlib.closing(sqlite3.connect(data_dir / "ibid.db", timeout=PATIENCE_S)) as database:
        there = {row for (row,) in database.execute("SELECT id FROM request WHERE outcome = 'ok'")}
        assert database.execute("SELECT COUNT(*) FROM request").fetchone()[0] >= len(answered)
    assert set(answered) <= there
    assert len(there - set(answered)) <= 8  # answered, but the connection was closed before the client had read it


async def test_a_second_sigterm_ends_at_once(data_dir, up):
    gate = asyncio.Event()
    up.default = Chat(gates={1: gate})
    async with serving(data_dir, up.url, EXACT_ONLY) as process:
        async with process.open(chat_body(ASKED, stream=True)):
            process.child.send_signal(signal.SIGTERM)
            stopping = False
            while not stopping:
                async with process.session.get(process.admin_url + "/readyz") as response:
                    stopping = response.status == 503
            process.child.send_signal(signal.SIGTERM)
            assert await process.stopped() == 1
        gate.set()


async def test_a_second_process_on_the_same_directory_refuses_to_start(data_dir, up):
    async with running(data_dir, up.url, EXACT_ONLY):
        with pytest.raises(AssertionError, match="another ibid is using"):
            async with serving(data_dir, up.url, EXACT_ONLY):
                pass


@pytest.mark.parametrize("damage", ["none", "flipped", "truncated", "missing", "directory"])
async def test_a_warm_restart_hits_by_text_and_by_meaning_whatever_became_of_the_snapshot(data_dir, up, damage, caplog):
    async with running(data_dir, up.url) as ibid:
        first = await ibid.fill(ASKED)
    snapshot = data_dir / "index.snapshot"
    assert snapshot.stat().st_size > 0
    caplog.set_level(logging.INFO, "proxy.upkeep.loading")
    caplog.clear()
    match damage:
        case "flipped":
            raw = bytearray(snapshot.read_bytes())
            raw[len(raw) // 2] ^= 0x55
            snapshot.write_bytes(raw)
        case "truncated":
            snapshot.write_bytes(snapshot.read_bytes()[:-7])
        case "missing":
            snapshot.unlink()
        case "directory":
            snapshot.unlink()
            snapshot.mkdir()
    async with running(data_dir, up.url) as ibid:
        again = await ibid.ask(REWORDED)
        assert (again.cache, again.tier, again.text) == ("HIT", "semantic", first.text)
        assert (await ibid.ask(ASKED)).tier == "exact"
        assert up.meter.calls == 1
        assert ("building the index from SQL" in caplog.text) == (damage != "none")


async def test_the_index_learns_on_start_what_changed_in_sql_after_its_snapshot(data_dir, up):
    async with running(data_dir, up.url) as ibid:
        await ibid.fill(ASKED)
    old = (data_dir / "index.snapshot").read_bytes()
    async with running(data_dir, up.url) as ibid:
        await ibid.admin("POST", "/cache/flush", {"confirm": "flush"})
        newer = await ibid.fill("How do I sharpen a kitchen knife?")
    (data_dir / "index.snapshot").write_bytes(old)
    async with running(data_dir, up.url) as ibid:
        assert (await ibid.ask(REWORDED)).cache == "MISS"
        assert (await ibid.ask("How can I sharpen a kitchen knife?")).text == newer.text
