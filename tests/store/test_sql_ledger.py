"""The ledger: nothing lost, nothing twice, nothing on the caller's time."""

from __future__ import annotations

import asyncio
import sqlite3

import orjson
import pytest

from proxy.core.model import again
from proxy.core.saving import day_of
from proxy.store.ledger import _TABLES, FLUSH_ROWS, SPILL_NAME, TURNS
from proxy.store.store import open_store
from tests.rows import call, hit, list_price, outcome
from tests.waiting import PATIENCE_S


async def count(store, table):
    ((found,),) = await store.database.rows(f"SELECT COUNT(*) FROM {table}")
    return found


async def until_written(store, rows):
    async with asyncio.timeout(PATIENCE_S):
        while await count(store, "request") < rows:
            await store.ledger.flush()


def test_settled_rows_have_the_tables_columns_in_the_tables_order():
    for table, columns in _TABLES:
        assert tuple(column.name for column in table.columns) == columns


async def test_close_writes_everything_recorded(tmp_path):
    store = await open_store(None, tmp_path, price=list_price)
    for number in range(1_500):
        store.ledger.record(outcome(f"f{number}") if number % 2 else hit(f"h{number}"))
    await store.close()
    again = await open_store(None, tmp_path, price=list_price)
    assert await count(again, "request") == 1_500
    assert await count(again, "upstream_call") == 750
    assert await count(again, "saving") == 750
    await again.close()


async def test_a_large_backlog_is_settled_in_as_few_turns_of_a_busy_loop_as_a_small_one(store):
    turns = 0

    async def count_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    for number in range(8 * FLUSH_ROWS):
        store.ledger.record(hit(f"h{number}"))
    await store.ledger._settle(store.ledger._waiting[:])
    counting.cancel()
    assert TURNS <= turns <= 2 * TURNS
    await store.ledger.flush()
    assert await count(store, "request") == 8 * FLUSH_ROWS


async def test_rows_appear_without_being_asked_for(store):
    store.ledger.record(hit())
    async with asyncio.timeout(PATIENCE_S):
        while await count(store, "request") == 0:  # each look is a round trip, so the ledger's task gets its turn
            pass


async def test_a_row_reads_back_as_it_was_settled(store):
    store.ledger.record(outcome(calls=(call("c1"), call("c2", purpose="hedge", won=False)), tag="eval"))
    await store.ledger.flush()
    row = await store.queries.request("q")
    assert (row["tag"], row["day"], row["baseline_nusd"], row["actual_nusd"]) == (
        "eval",
        "2026-11-22",
        180_000,
        360_000,
    )
    assert [line["id"] for line in row["calls"]] == ["c1", "c2"]
    assert [step["saved_nusd"] for step in row["savings"]] == [-180_000]
    assert await store.queries.request("nobody") is None


async def test_recording_the_same_request_twice_keeps_one(store):
    for _ in range(2):
        store.ledger.record(outcome())
        await store.ledger.flush()
    assert await count(store, "request") == 1
    assert await count(store, "upstream_call") == 1


async def test_a_row_no_database_takes_does_not_take_others_along(store):
    store.ledger.record(outcome("good-1"))
    store.ledger.record(outcome("bad", tag="\ud800"))
    store.ledger.record(outcome("good-2"))
    await store.ledger.flush()
    assert await count(store, "request") == 2
    assert store.ledger.refused == 1


async def test_a_locked_database_spills_and_is_replayed_when_it_is_free(sqlite_store):
    blocker = sqlite3.connect(sqlite_store.database.path, isolation_level=None, timeout=PATIENCE_S)
    blocker.execute("BEGIN EXCLUSIVE")
    for number in range(40):
        sqlite_store.ledger.record(hit(f"h{number}"))
    await sqlite_store.ledger.flush()
    assert sqlite_store.ledger.spilled == 40
    assert sqlite_store.state == "down"
    blocker.execute("ROLLBACK")
    blocker.close()
    async with asyncio.timeout(PATIENCE_S):
        while await count(sqlite_store, "request") < 41:
            sqlite_store.ledger.record(hit("last"))
            await asyncio.sleep(0.1)
    await sqlite_store.ledger.flush()  # waits for the replay under way, which removes the file after its last row
    assert sqlite_store.state == "ok"
    assert not sqlite_store.ledger.owes
    assert sqlite_store.ledger.journal_bytes == 0


async def test_what_an_earlier_release_spilled_is_inserted_once_and_a_torn_line_is_skipped(tmp_path):
    store = await open_store(None, tmp_path, price=list_price)
    line = orjson.dumps((await store.ledger._settle([hit("a"), outcome("b")]))[:3]) + b"\n"
    await store.close()
    spill = tmp_path / SPILL_NAME
    spill.write_bytes(2 * line + b'[[["torn')
    again = await open_store(None, tmp_path, price=list_price)
    assert await count(again, "request") == 2
    assert await count(again, "saving") == 1
    assert again.ledger.refused == 1
    assert not spill.exists()
    await again.close()


async def test_with_neither_database_nor_disk_outcomes_wait_in_memory(sqlite_store):
    blocker = sqlite3.connect(sqlite_store.database.path, isolation_level=None, timeout=PATIENCE_S)
    blocker.execute("BEGIN EXCLUSIVE")
    sqlite_store.ledger._journal._limit_bytes = 0
    sqlite_store.ledger.record(hit())
    assert sqlite_store.ledger.state == "journal_full"
    await sqlite_store.ledger.flush()
    assert sqlite_store.ledger.waiting == 1
    assert sqlite_store.ledger.dropped == 0
    blocker.close()
    await until_written(sqlite_store, 1)
    assert sqlite_store.ledger.waiting == 0


@pytest.mark.parametrize("mechanism", ["cache.exact", "stream.coalesce"])
async def test_no_prompt_text_reaches_the_ledger(sqlite_store, mechanism):
    sqlite_store.ledger.record(hit(mechanism=mechanism))
    await sqlite_store.ledger.flush()
    row = await sqlite_store.queries.request("h")
    assert not {"prompt", "answer", "body"} & set(row)


async def test_an_outcome_that_recurs_gets_the_rows_it_would_get_alone(tmp_path):
    """Settled once and dated again, or settled each time: the same rows, on either side of midnight."""
    once = hit("first")
    midnight = (once.ts_ms // 86_400_000 + 1) * 86_400_000
    times = [("a", once.ts_ms, 3.25), ("b", once.ts_ms + 1, 0.5), ("c", midnight + 5, 7.0)]
    store = await open_store(None, tmp_path, price=list_price)
    recurring = once.recurring
    for request_id, ts_ms, total_ms in times:
        store.ledger.record_again(recurring, request_id, ts_ms, total_ms)
        store.ledger.record(again(recurring, request_id + "-alone", ts_ms, total_ms, total_ms))
    await store.ledger.flush()
    for request_id, _, _ in times:
        dated, alone = [await store.queries.request(name) for name in (request_id, request_id + "-alone")]
        assert dated is not None
        assert alone is not None
        assert dated["day"] == day_of(dated["ts"])
        assert {**dated, "id": "", "savings": []} == {**alone, "id": "", "savings": []}
        steps = [[{**step, "request_id": ""} for step in rows["savings"]] for rows in (dated, alone)]
        assert steps[0] == steps[1] != []
    await store.close()
