"""Batches across a kill -9, and whose credential lets them go on."""

from __future__ import annotations

import contextlib
import sqlite3

from tests.batch_upstream import BatchUpstream
from tests.flows.batching import QUICK, ended, hand_in, line, rows, sdk, text
from tests.flows.running import serving, until
from tests.upstream import Chat, Json
from tests.waiting import PATIENCE_S

ASKED = [line(f"l{n}", f"What is part {n % 40} for?") for n in range(60)]


def written(data_dir, sql: str):
    with contextlib.closing(sqlite3.connect(data_dir / "ibid.db", timeout=PATIENCE_S)) as database:
        return database.execute(sql).fetchall()


async def test_a_batch_of_ordinary_calls_goes_on_where_it_was_killed_when_its_owner_asks(data_dir, up):
    """What was answered is not asked again; at most the calls under way at the kill are."""
    slow = {**QUICK, "batch": {"concurrency": 2}}
    up.script(Json(404, {}))
    up.default = lambda seen: Chat(text=f"to {seen.json['messages'][-1]['content']}", delay_s=0.02)
    async with serving(data_dir, up.url, slow) as process, sdk(process) as client:
        batch = await hand_in(client, ASKED)
        await until(lambda: up.meter.calls >= 12)
        process.kill()
    asked = [seen.json["messages"][-1]["content"] for seen in up.requests if seen.path == "/v1/chat/completions"]
    for file in data_dir.rglob("*"):  # nor is the key anywhere on disk
        if file.is_file() and "models" not in file.parts:
            assert b"sk-a" not in file.read_bytes(), file
    before = len(asked)
    async with serving(data_dir, up.url, slow) as process, sdk(process) as client, sdk(process, "sk-b") as other:
        up.script(Json(404, {}))
        assert [one async for one in other.batches.list()] == []
        assert written(data_dir, "SELECT status FROM batch_job") == [("in_progress",)]
        assert up.meter.calls == before  # it waits for its owner
        up.script(Json(404, {}))
        batch = await ended(client, await client.batches.retrieve(batch.id))
        assert (batch.status, batch.request_counts.completed) == ("completed", 60)
        found = await rows(client, batch.output_file_id)
        assert {name: text(row) for name, row in found.items()} == {
            one["custom_id"]: f"to {one['body']['messages'][0]['content']}" for one in ASKED
        }
    asked = [seen.json["messages"][-1]["content"] for seen in up.requests if seen.path == "/v1/chat/completions"]
    assert len(set(asked)) == 40
    assert len(asked) <= 40 + 2  # what its two workers were at


async def test_a_providers_batch_is_not_handed_in_twice(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with serving(data_dir, up.url, QUICK) as process, sdk(process) as client:
        batch = await hand_in(client, ASKED)
        await until(lambda: written(data_dir, "SELECT state FROM batch_part") == [("running",)])
        process.kill()
    theirs.polls = 1
    async with serving(data_dir, up.url, QUICK) as process, sdk(process) as client:
        batch = await ended(client, await client.batches.retrieve(batch.id))
        assert (batch.status, batch.request_counts.completed) == ("completed", 60)
        assert len(await rows(client, batch.output_file_id)) == 60
        spent = "SELECT COUNT(*), COUNT(DISTINCT request_id) FROM upstream_call"
        await until(lambda: written(data_dir, spent) == [(40, 40)])
    assert (len(theirs.batches), theirs.lines) == (1, 40)


async def test_a_batch_whose_id_was_lost_is_found_again_at_the_provider(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with serving(data_dir, up.url, QUICK) as process, sdk(process) as client:
        batch = await hand_in(client, ASKED)
        await until(lambda: written(data_dir, "SELECT state FROM batch_part") == [("running",)])
        process.kill()
    with contextlib.closing(sqlite3.connect(data_dir / "ibid.db", timeout=PATIENCE_S)) as database, database:
        database.execute("UPDATE batch_part SET state = 'creating', provider_id = ''")
    theirs.polls = 1
    async with serving(data_dir, up.url, QUICK) as process, sdk(process) as client:
        batch = await ended(client, await client.batches.retrieve(batch.id))
        assert (batch.status, batch.request_counts.completed) == ("completed", 60)
    assert (len(theirs.batches), theirs.lines) == (1, 40)


async def test_with_a_key_of_the_upstreams_own_a_batch_goes_on_at_the_start(data_dir, up, monkeypatch):
    theirs = BatchUpstream(up, polls=0)
    keyed = {**QUICK, "upstream.openai": {"key_env": "UPSTREAM_KEY"}}
    monkeypatch.setenv("UPSTREAM_KEY", "sk-of-the-upstream")
    async with serving(data_dir, up.url, keyed) as process, sdk(process) as client:
        await hand_in(client, ASKED)
        await until(lambda: written(data_dir, "SELECT state FROM batch_part") == [("running",)])
        process.kill()
    theirs.polls = 1
    async with serving(data_dir, up.url, keyed):
        await until(lambda: written(data_dir, "SELECT status, succeeded FROM batch_job") == [("completed", 60)])
    assert (len(theirs.batches), theirs.lines) == (1, 40)
    assert {seen.header("Authorization") for seen in up.requests} == {"Bearer sk-of-the-upstream"}


async def test_a_stop_ends_no_batch_and_loses_no_line(data_dir, up):
    up.script(Json(404, {}))
    up.default = Chat(delay_s=0.02)
    slow = {**QUICK, "batch": {"concurrency": 2}}
    async with serving(data_dir, up.url, slow) as process, sdk(process) as client:
        batch = await hand_in(client, ASKED)
        await until(lambda: up.meter.calls >= 8)
        process.child.terminate()
        assert await process.stopped() == 0
    assert written(data_dir, "SELECT status FROM batch_job") == [("in_progress",)]
    async with serving(data_dir, up.url, slow) as process, sdk(process) as client:
        up.script(Json(404, {}))
        batch = await ended(client, await client.batches.retrieve(batch.id))
        assert (batch.status, batch.request_counts.completed) == ("completed", 60)
    assert up.meter.calls == 40
